"""ZERO IT: patterns of zeros, and solvers that choose them and make the other weights good for it. A file, a solver."""

from paredown.sparsity._allocation import ALLOCATIONS, allocate
from paredown.sparsity._module import solve_module
from paredown.sparsity._pattern import Pattern
from paredown.sparsity._permute import permuted
from paredown.sparsity._solve import loss_of, matrices_of, matrix, solve

__all__ = [
    "ALLOCATIONS",
    "Pattern",
    "allocate",
    "loss_of",
    "matrices_of",
    "matrix",
    "permuted",
    "solve",
    "solve_module",
]
