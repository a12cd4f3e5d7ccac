"""How much a layer adds: the relative L2 change of the stream, which sees what Block Influence does not: its norm."""

from paredown.importance._evidence import DepthEvidence
from paredown.types import Array

UNITS = ("layer", "sublayer")
NEEDS = ("streams",)


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: mean over tokens of |behind - before| / |before|."""
    assert evidence.streams is not None
    return evidence.between(evidence.streams.change)
