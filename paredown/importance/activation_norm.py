"""How strongly a unit is active, whatever it writes with (Minitron, Muralidharan et al. 2024, arXiv:2407.14679)."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS = ("moments",)


def score(evidence: Evidence) -> Array:
    """[U]: root of the mean over tokens of the squared norm of the unit's activations."""
    assert evidence.moments is not None
    return np.asarray(np.sqrt(evidence.moments[1][evidence.positions].sum(axis=1)))
