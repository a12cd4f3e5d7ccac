"""A number drawn from token and position: the control that every other scorer has to beat.

The same text always gets the same numbers, whatever batch it is in, here and in an exported graph.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("ids", "positions")
_DRAWN = np.random.default_rng(0).random(4096).astype(np.float32)


def score(seen: Seen) -> Tensor:
    """[G, n], uniform in [0, 1) but for the thousandth that positions take off."""
    ids, positions = cast(Tensor, seen.ids), cast(Tensor, seen.positions)
    size = len(_DRAWN)
    places = (ids % size * 227 + positions % size * 3639) % size  # below 2^24: OpenVINO counts in float32 here
    # No two of a text are equal: of equal ones OpenVINO keeps any.
    return torch.from_numpy(_DRAWN).to(ids.device)[places] - positions * 1e-6
