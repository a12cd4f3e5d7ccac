"""Filters that others can stand in for go first (FPGM, He et al. 2019, arXiv:1811.00250, equation 5)."""

import numpy as np
from scipy.spatial.distance import cdist

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("channel",)
NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: sum over all units of the distance between the filters; nothing for a unit that nobody reads."""
    distances = cdist(evidence.incoming, evidence.incoming).sum(axis=1)
    return np.where(evidence.alive, distances, 0.0)
