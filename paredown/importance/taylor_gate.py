"""First-order Taylor expansion on a gate at each unit's output (Michel et al. 2019, arXiv:1905.10650)."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS = ("gates",)


def score(evidence: Evidence) -> Array:
    """[U]: mean over texts of |d loss / d gate|."""
    assert evidence.gates is not None
    return np.asarray(evidence.gates[0])
