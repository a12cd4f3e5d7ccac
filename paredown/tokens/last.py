"""The last tokens stay, the first go: a control."""

from __future__ import annotations

from typing import cast

from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("positions",)


def score(seen: Seen) -> Tensor:
    """[G, n]: the position."""
    return cast(Tensor, seen.positions).float()
