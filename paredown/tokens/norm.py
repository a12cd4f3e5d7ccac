"""The length of a token's hidden state: sqrt(sum of x^2) over the width.

No attention is needed. Behind a LayerNorm lengths differ by its weights' pattern alone, and still tell tokens apart
that carry content. Devoto et al. 2024 (arXiv:2406.11430) rank by the norms of keys: that is `key_norm`.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("stream",)


def score(seen: Seen) -> Tensor:
    """[G, n]"""
    found: Tensor = torch.linalg.vector_norm(cast(Tensor, seen.stream), dim=-1)
    return found
