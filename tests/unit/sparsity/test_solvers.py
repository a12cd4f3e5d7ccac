"""Solvers against slow ones that are plainly right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paredown import registry
from paredown.sparsity import Pattern, alps, loss_of, sparsegpt
from tests.contracts.test_sparsity import problem

ORDER = ("alps", "sparsegpt", "wanda", "magnitude")


def surgeon(weight: Tensor, gram: Tensor, pattern: Pattern, zeros: int) -> Tensor:
    """SparseGPT by its definition: the inverse of what is left of the Hessian, made anew for every column."""
    found, width = weight.double().clone(), weight.shape[1]
    hessian = gram.double().clone()
    dead = hessian.diagonal() == 0
    hessian.diagonal()[dead] = 1.0
    found[:, dead] = 0.0
    hessian += sparsegpt.DAMPING * hessian.diagonal().mean() * torch.eye(width, dtype=torch.float64)
    inverses = [torch.linalg.inv(hessian[j:, j:]) for j in range(width)]
    own = torch.stack([one[0, 0] for one in inverses])
    gone = 0
    for start in range(0, width, sparsegpt.BLOCK):
        stop = min(start + sparsegpt.BLOCK, width)
        count = round(zeros * stop / width) - gone
        scores = found[:, start:stop].square() / own[start:stop]
        lowest = scores.flatten().argsort()[:count]
        keep = torch.ones(scores.numel(), dtype=torch.bool)
        keep[lowest] = False
        keep, gone = keep.reshape(scores.shape), gone + count
        for j in range(start, stop):
            if pattern.kind == "n:m" and (j - start) % pattern.m == 0:
                now = found[:, j : j + pattern.m].square() / own[j : j + pattern.m]
                keep[:, j - start : j - start + pattern.m] = now.argsort(1).argsort(1) >= pattern.m - pattern.n
            lost = found[:, j] * ~keep[:, j - start]
            found[:, j:] -= (lost / own[j])[:, None] * inverses[j][0]
    return found


@pytest.mark.parametrize("text", ["unstructured", "2:4"])
def test_sparsegpt_is_the_brain_surgeon(text: str) -> None:
    weight, gram = problem(8, 160)
    pattern = Pattern.parse(text)
    zeros = pattern.zeros((8, 160), 0.6)
    ours, theirs = sparsegpt.solve(weight, gram, pattern, zeros), surgeon(weight, gram, pattern, zeros)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("text", ["unstructured", "2:4", "4x1"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_published_order(text: str, seed: int) -> None:
    weight, gram = problem(32, 160, seed=seed)
    pattern = Pattern.parse(text)
    zeros = pattern.zeros((32, 160), 0.6)
    lost = [loss_of(weight, registry.find("sparsity", s).solve(weight, gram, pattern, zeros), gram) for s in ORDER]
    assert lost == sorted(lost)


def test_alps_solves_least_squares_on_its_support() -> None:
    weight, gram = problem(4, 40)
    found = alps.solve(weight, gram, Pattern(), 80).double()
    hessian = gram + alps.DAMPING * gram.diagonal().mean() * torch.eye(40, dtype=torch.float64)
    for row, dense in zip(found, weight.double(), strict=True):
        stay = row != 0
        best = torch.linalg.solve(hessian[stay][:, stay], (hessian @ dense)[stay])
        gap = (row[stay] - best) @ hessian[stay][:, stay] @ (row[stay] - best)
        whole = (dense @ hessian @ dense) - best @ hessian[stay][:, stay] @ best
        assert gap < 0.02 * whole  # ten steps of conjugate gradients


def test_wanda_compares_within_outputs() -> None:
    weight = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    gram = torch.tensor([[9.0, 0.0], [0.0, 1.0]]).double()
    assert registry.find("sparsity", "wanda").solve(weight, gram, Pattern(), 2).tolist() == [[1.0, 0.0], [10.0, 0.0]]
