"""|w| times the norm of its input, compared within each output (Sun et al. 2024, arXiv:2306.11695)."""

from torch import Tensor

from paredown.sparsity._pattern import ROW, Pattern

NEEDS = ("gram",)


def solve(weight: Tensor, gram: Tensor | None, pattern: Pattern, zeros: int, *, seed: int = 0) -> Tensor:
    """[O, K]: `weight` without the `zeros` of least |W_ij| |x_j|; `gram` [K, K] is the sum of x x' over rows."""
    assert gram is not None
    norms = gram.diagonal().clamp(min=0).sqrt()
    return weight * pattern.kept(weight.abs() * norms, zeros, among=ROW)
