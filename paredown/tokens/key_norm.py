"""Minus the length of a token's key, averaged over heads: short keys draw much attention.

Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression", arXiv:2406.11430.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from paredown.tokens._seen import Seen

NEEDS = ("keys",)


def score(seen: Seen) -> Tensor:
    """[G, n]"""
    found: Tensor = torch.linalg.vector_norm(cast(Tensor, seen.keys), dim=-1)
    return -found.mean(1)
