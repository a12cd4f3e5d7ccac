"""First-order Taylor expansion on weights (Molchanov et al. 2019, arXiv:1906.10771; LLM-Pruner, arXiv:2305.11627)."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS = ("weight_gradients",)


def score(evidence: Evidence) -> Array:
    """[U]: sum of |g * w| over all weights and biases of the unit, g the mean gradient over the texts."""
    assert evidence.incoming_gradients is not None and evidence.outgoing_gradients is not None
    outgoing = np.abs(evidence.outgoing * evidence.outgoing_gradients)[evidence.positions].sum(axis=(1, 2))
    return np.asarray(np.abs(evidence.incoming * evidence.incoming_gradients).sum(axis=1) + outgoing)
