"""What the answers lose when a head alone goes: the ablation of Michel et al. 2019 (arXiv:1905.10650, section 3), with
what stays of its sub-layer re-fitted, as `paredown.recovery.reconstruct` does after a cut.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head",)
NEEDS = ("head_gram", "ablations")


def score(evidence: Evidence) -> Array:
    """[U]: mean over texts of the divergence of the answers without the unit, as far as there is any."""
    assert evidence.ablated is not None
    return np.where(evidence.alive, np.maximum(evidence.ablated, np.finfo(np.float64).tiny), 0.0)
