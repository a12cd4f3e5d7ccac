"""Diagonal Fisher information of a gate on each unit, from per-sample gradients (Kwon et al. 2022, arXiv:2204.09656).

The published code squares the mean gradient of a mini-batch; here every text's own gradient is squared.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS = ("gates",)


def score(evidence: Evidence) -> Array:
    """[U]: mean over texts of (d loss / d gate)^2; the loss is label-free unless the texts bring their labels."""
    assert evidence.gates is not None
    return np.asarray(evidence.gates[1])
