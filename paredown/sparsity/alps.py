"""The layer's least squares under a limit on the number of weights, by ADMM and then conjugate gradients on the support
(ALPS: Meng et al. 2024, arXiv:2406.07831).

Legend: O outputs, K inputs; inside, weights lie [K, O], as in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from paredown.sparsity._pattern import Pattern

NEEDS = ("gram",)

DAMPING = 1e-2  # of the mean diagonal, as published
FIRST_PENALTY, MOST_STEPS, LOOK_EVERY = 0.1, 300, 3
RAISES = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # the support changed by more than this share of k: penalty times this
POLISHING = 10  # steps of conjugate gradients


def solve(weight: Tensor, gram: Tensor | None, pattern: Pattern, zeros: int, *, seed: int = 0) -> Tensor:
    """[O, K]: the weights that stay, solved for anew; `gram` [K, K] sums x x' over rows."""
    assert gram is not None
    hessian = gram.double().clone()
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean().clamp(min=1e-12))
    scale = hessian.diagonal().sqrt()
    hessian /= scale[:, None] * scale[None, :]
    dense = weight.double().T * scale[:, None]
    goal = hessian @ dense
    support = _support(hessian, dense, goal, pattern, zeros)
    found = _polished(hessian, goal, dense * support, support)
    return (found / scale[:, None]).T.contiguous().to(weight.dtype)


def _support(hessian: Tensor, dense: Tensor, goal: Tensor, pattern: Pattern, zeros: int) -> Tensor:
    """Which weights stay, bool [K, O]: the support on which ADMM settles."""

    def largest(values: Tensor) -> Tensor:
        return pattern.kept(values.square().T, zeros).T

    values, basis = torch.linalg.eigh(hessian)
    penalty, grown = FIRST_PENALTY, False
    support = largest(dense)
    split, dual = dense * support, torch.zeros_like(dense)
    kept, before = int(support.sum()), support
    for step in range(1, MOST_STEPS + 1):
        solved = basis @ ((basis.T @ (goal - dual + penalty * split)) / (values[:, None] + penalty))
        support = largest(solved + dual / penalty)
        split = (solved + dual / penalty) * support
        dual += penalty * (solved - split)
        if step % LOOK_EVERY:
            continue
        changed, before = int((support & ~before).sum()), support
        if changed == 0 and grown:
            break
        if step >= 30 and changed < 0.0003 * kept:
            break
        factor = next((times for share, times in RAISES if changed > share * kept), 1.0)
        if factor in (1.3, 1.2):
            penalty, grown = penalty * factor, True
        elif grown:
            penalty *= factor
        else:  # too stiff to move at all: looser, and from the start where it had begun to move
            penalty /= 5
            if changed:
                support = largest(dense)
                split, dual, before = dense * support, torch.zeros_like(dense), support
    return support


def _polished(hessian: Tensor, goal: Tensor, start: Tensor, support: Tensor) -> Tensor:
    """[K, O]: least squares on the support, each output by itself, by conjugate gradients from `start`."""
    found = start
    residual = (goal - hessian @ found) * support
    direction, energy = residual, residual.square().sum(0)
    for _ in range(POLISHING):
        curved = (hessian @ direction) * support
        bend = (direction * curved).sum(0)
        length = torch.where(bend > 0, energy / bend.clamp(min=1e-300), torch.zeros_like(bend))
        found = found + length * direction
        residual = residual - length * curved
        after = residual.square().sum(0)
        direction = (
            residual + torch.where(energy > 0, after / energy.clamp(min=1e-300), torch.zeros_like(after)) * direction
        )
        energy = after
    return found * support
