"""The smallest weights go, the control that asks no data (Han et al. 2015, arXiv:1506.02626)."""

from torch import Tensor

from paredown.sparsity._pattern import Pattern

NEEDS = ()


def solve(weight: Tensor, gram: Tensor | None, pattern: Pattern, zeros: int, *, seed: int = 0) -> Tensor:
    """[O, K]: `weight` without its `zeros` smallest entries."""
    return weight * pattern.kept(weight.abs(), zeros)
