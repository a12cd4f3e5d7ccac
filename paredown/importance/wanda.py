"""Wanda on whole units, |w| times the norm of the input (Sun et al. 2024, arXiv:2306.11695).

For units this is Wanda-sp of An et al. 2024, arXiv:2312.11983.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron")
NEEDS = ("moments",)


def score(evidence: Evidence) -> Array:
    """[U]: sum over the unit's inputs j of mean_o |W_jo| times the root mean square of x_j."""
    assert evidence.moments is not None
    by_input = np.abs(evidence.outgoing).mean(axis=1) * np.sqrt(evidence.moments[1])
    return np.asarray(by_input[evidence.positions].sum(axis=1))
