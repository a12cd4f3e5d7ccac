"""What the model's answers lose without a layer, measured, one after another (Zhong et al. 2024, BlockPruner,
arXiv:2406.10594; Kim et al. 2024, Shortened LLaMA, arXiv:2402.02834).
"""

import numpy as np

from paredown.importance._evidence import DepthEvidence
from paredown.types import Array

UNITS = ("layer", "sublayer")
NEEDS = ("removals",)


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: the divergence from the dense model at which a greedy removal takes the piece.

    The piece goes whose removal, on top of those gone, costs least. A later one never scores below an earlier one.
    """
    assert evidence.removed is not None
    left = list(range(len(evidence.places) - 1))
    values = np.zeros(len(left))
    gone: list[int] = []
    height = 0.0
    while left:
        costs = [evidence.removed([*gone, piece]) for piece in left]
        taken = left.pop(int(np.argmin(costs)))
        gone.append(taken)
        height = max(min(costs), height * (1 + 1e-9))
        values[taken] = height
    return values
