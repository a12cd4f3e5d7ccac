"""How much the first token ([CLS]) looks at a token, averaged over heads: one row of attention per head.

EViT (Liang et al. 2022, arXiv:2202.07800, equation 3), there for vision transformers.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("first_attention",)


def score(seen: Seen) -> Tensor:
    """[G, n], summing to 1 over a text."""
    return cast(Tensor, seen.first_attention).mean(1)
