"""Block Influence on whole texts: all of a text's tokens as one vector (the variant of several implementations of
ShortGPT, arXiv:2403.03853), in which tokens of large norm count more.
"""

import numpy as np

from paredown.importance._evidence import DepthEvidence
from paredown.types import Array

UNITS = ("layer", "sublayer")
NEEDS = ("streams",)


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: 1 - the mean over texts of the cosine between the flattened streams before and behind."""
    assert evidence.streams is not None
    return np.asarray(1 - evidence.between(evidence.streams.flat_cosine))
