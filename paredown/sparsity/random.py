"""Weights go by chance: what every other solver has to beat."""

import torch
from torch import Tensor

from paredown.sparsity._pattern import Pattern

NEEDS = ()


def solve(weight: Tensor, gram: Tensor | None, pattern: Pattern, zeros: int, *, seed: int = 0) -> Tensor:
    """[O, K]: `weight` without `zeros` entries drawn by the seed."""
    drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed))
    return weight * pattern.kept(drawn, zeros)
