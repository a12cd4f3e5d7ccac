"""Gates that are trained for a few steps under a penalty (Louizos et al. 2018, arXiv:1712.01312) with layer-wise
distillation (CoFi, Xia et al. 2022, arXiv:2204.00408); here with an L1 penalty, drawn by the texts, without labels.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron")
NEEDS = ("learned",)


def score(evidence: Evidence) -> Array:
    """[U]: the gate at the end, in (0, 1)."""
    assert evidence.learned is not None
    return np.where(evidence.alive, evidence.learned, 0.0)
