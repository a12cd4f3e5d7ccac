"""What batch norm multiplies a channel with (network slimming, Liu et al. 2017, arXiv:1708.06519)."""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("channel",)
NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: mean |gamma| over the norms of a unit; where it has none, the L2 norm of its filters."""
    if evidence.scale is None:
        return np.asarray(np.linalg.norm(evidence.incoming, axis=1))
    return evidence.scale
