"""Weight magnitude: the L2 norm of everything a unit reads with and writes with (Han et al. 2015, arXiv:1506.02626)."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: product of the norms of incoming and outgoing weights, so that moving scale between them changes nothing."""
    outgoing = np.linalg.norm(evidence.outgoing[evidence.positions], axis=(1, 2))
    return np.asarray(np.linalg.norm(evidence.incoming, axis=1) * outgoing)
