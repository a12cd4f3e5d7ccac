"""L1 norm of a unit's weights: Q, K, V and O of a head, in and out of a neuron (Li et al. 2017, arXiv:1608.08710)."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: sum of |w|."""
    outgoing = np.abs(evidence.outgoing[evidence.positions]).sum(axis=(1, 2))
    return np.asarray(np.abs(evidence.incoming).sum(axis=1) + outgoing)
