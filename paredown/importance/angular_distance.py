"""The n consecutive layers that together turn the stream least (Gromov et al. 2024, arXiv:2403.17887).

Published for the last token of a decoder; encoders, whose tokens are pooled, take the mean over all tokens.
"""

import numpy as np

from paredown.importance._evidence import DepthEvidence
from paredown.types import Array

UNITS = ("layer", "sublayer")
NEEDS = ("streams",)


def score_depth(evidence: DepthEvidence) -> Array:
    """[U]: the least angular distance over any block of `drop` neighbours that the piece is part of.

    So the `drop` lowest pieces are the best block; its members differ by a trifle, by their own angles.
    """
    assert evidence.streams is not None
    angle, places = evidence.streams.angle, evidence.places
    count = len(places) - 1
    drop = min(max(evidence.drop, 1), count)
    block = angle[places[: count - drop + 1], places[drop:]]  # one for every first piece
    own = evidence.between(angle)
    least = np.asarray([block[max(0, u - drop + 1) : u + 1].min() for u in range(count)])
    return least + 1e-9 * own
