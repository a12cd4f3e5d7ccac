"""Squared norms, each as a share of those of its group that are no smaller (LAMP, Lee et al. 2021, arXiv:2010.07611,
equation 4), which makes groups comparable.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("channel",)
NEEDS: tuple[str, ...] = ()


def score(evidence: Evidence) -> Array:
    """[U]: |F_i|^2 / sum of |F_j|^2 over the units j whose filters F have no smaller a norm."""
    squares = (evidence.incoming**2).sum(axis=1)
    order = np.argsort(-squares, kind="stable")
    values = np.empty(len(squares))
    values[order] = squares[order] / np.maximum(np.cumsum(squares[order]), 1e-300)
    return np.where(evidence.alive, values, 0.0)
