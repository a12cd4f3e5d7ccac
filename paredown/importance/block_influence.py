"""Block Influence: how far a layer turns the stream, token by token (ShortGPT, Men et al. 2024, arXiv:2403.03853)."""

import numpy as np

from paredown.importance._evidence import DepthEvidence
from paredown.types import Array

UNITS = ("layer", "sublayer")
NEEDS = ("streams",)


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: 1 - the mean over tokens of the cosine between the stream before and behind."""
    assert evidence.streams is not None
    return np.asarray(1 - evidence.between(evidence.streams.cosine))
