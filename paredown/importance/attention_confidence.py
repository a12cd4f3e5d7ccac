"""How sure a head looks: the mean of its largest attention weight, special tokens left out (Voita et al. 2019,
arXiv:1905.09418).
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head",)
NEEDS = ("attention",)


def score(evidence: Evidence) -> Array:
    """[H]: mean over tokens of the largest probability that one of the text's own tokens gets."""
    assert evidence.attention is not None
    return np.where(evidence.alive, evidence.attention[1], 0.0)
