"""Optimal brain surgeon column by column, the columns to come making good for those that went
(Frantar and Alistarh 2023, arXiv:2301.00774, algorithm 1).

Legend: O outputs, K inputs, B columns of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.sparsity._pattern import Pattern

NEEDS = ("gram",)

DAMPING = 1e-2  # of the mean diagonal, as published
BLOCK = 128  # columns whose mask is chosen together, as published


def solve(weight: Tensor, gram: Tensor | None, pattern: Pattern, zeros: int, *, seed: int = 0) -> Tensor:
    """[O, K]: the weights that stay, updated so that the output W x changes little; `gram` [K, K] sums x x' over rows.

    Which weights of a block of columns go is decided once the columns before it are done, by w^2 / U_jj^2, U being the
    upper Cholesky factor of the inverse of the damped gram; in n:m, group by group. Inputs that are always zero go
    first.
    """
    assert gram is not None
    found = weight.double().clone()
    factor, dead = inverse_factor(gram)
    found[:, dead] = 0.0
    width = found.shape[1]
    step = BLOCK - BLOCK % max(pattern.columns, pattern.m, 1) or max(pattern.columns, pattern.m)
    done = 0
    for start in range(0, width, step):
        stop = min(start + step, width)
        goal = round(zeros * stop / width)  # so that the rounding of blocks adds up to the number asked for
        size = pattern.rows * pattern.columns
        goal -= goal % size if stop < width else 0
        part, root = found[:, start:stop], factor[start:stop, start:stop]
        keep = torch.ones_like(part, dtype=torch.bool)
        if pattern.kind != "n:m":
            keep = pattern.kept((part / root.diagonal()).square(), goal - done)
            done = goal
        errors = torch.zeros_like(part)
        for j in range(stop - start):
            if pattern.kind == "n:m" and j % pattern.m == 0:
                group = slice(j, j + pattern.m)
                keep[:, group] = pattern.kept((part[:, group] / root.diagonal()[group]).square(), 0)
            lost = part[:, j] * ~keep[:, j]
            errors[:, j] = lost / root[j, j]
            part[:, j:] -= errors[:, j, None] * root[j, j:]
            part[:, j] *= keep[:, j]  # what the update leaves there is rounding
        found[:, stop:] -= errors @ factor[start:stop, stop:]
    return found.to(weight.dtype)


def inverse_factor(gram: Tensor) -> tuple[Tensor, Tensor]:
    """U [K, K] with U'U the inverse of the damped gram, and which inputs were always zero, bool [K]."""
    damped = gram.double().clone()
    diagonal = damped.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1.0
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor, dead
