"""Diagonal Fisher information of a gate on each unit, from per-sample gradients (Kwon et al. 2022, arXiv:2204.09656).

The published code squares the mean gradient of a mini-batch; here every text's own gradient is squared.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

NEEDS = ("gradients",)


def score(evidence: Evidence) -> Array:
    """[U]: mean over texts of (d loss / d gate)^2; the loss is label-free, the divergence from the dense model."""
    assert evidence.gradients is not None
    per_text = evidence.gradients[:, evidence.positions].sum(axis=2)
    return np.asarray(np.square(per_text, dtype=np.float64).mean(axis=0))
