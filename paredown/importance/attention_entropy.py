"""How focused a head looks: entropy of its attention, low entropy counting as important (Voita et al. 2019,
arXiv:1905.09418; Clark et al. 2019, arXiv:1906.04341). Special tokens are left out.
"""

import numpy as np

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head",)
NEEDS = ("attention",)


def score(evidence: Evidence) -> Array:
    """[H]: mean over tokens of 1 - entropy / log T, T the number of the text's own tokens."""
    assert evidence.attention is not None
    return np.where(evidence.alive, evidence.attention[0], 0.0)
