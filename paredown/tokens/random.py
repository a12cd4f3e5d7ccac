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
    table = torch.from_numpy(_DRAWN).to(ids.device)
    drawn = table[(ids * 227 + positions * 3639) % len(_DRAWN)]  # OpenVINO counts in 32 bits
    return drawn - positions * 1e-6  # of equal scores OpenVINO keeps any, so none are
