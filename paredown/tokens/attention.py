"""Attention received: how much all heads and all real queries of the layer look at a token, on average.

a_j = 1 / (H n) sum over heads and queries of A[h, q, j] (PoWER-BERT: Goyal et al. 2020, arXiv:2001.08950; LTP: Kim et
al. 2022, arXiv:2107.00910; Qi et al. 2024, arXiv:2408.11799). LTP's code divides by the padded length; this does not.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("attention",)


def score(seen: Seen) -> Tensor:
    """[G, n], summing to 1 over a text."""
    attention = cast(Tensor, seen.attention)
    if seen.real is None:
        return attention.mean((1, 2))
    weight = seen.real / seen.real.sum(1, keepdim=True)
    return (attention.mean(1) * weight[:, :, None]).sum(1)
