"""How often a neuron is active: the share of tokens with an activation above a threshold (cf. APoZ, arXiv:1607.03250).

APoZ counts what is above zero, for ReLU. With GELU that ranks worse than chance (MiniLM on BANKING77: a neuron that is
seldom above zero is one that matters when it is), so the threshold is 1.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("neuron",)
NEEDS = ("moments",)

TIE = 1e-6  # of neurons that are active equally often, the stronger one counts more


def score(evidence: Evidence) -> Array:
    """[U]: the share of tokens with an activation above the threshold; equal ones by their mean square."""
    assert evidence.moments is not None
    _, square, active = evidence.moments[:, evidence.positions[:, 0]]
    return np.asarray(active + TIE * square / max(float(square.max(initial=0)), 1e-300))
