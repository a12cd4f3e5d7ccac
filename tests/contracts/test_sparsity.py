"""What every solver, every public file of sparsity/, must pass, in every pattern."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from paredown import registry
from paredown.anatomy import describe
from paredown.network import network
from paredown.sparsity import Pattern, loss_of, matrices_of, matrix, solve
from tests.contracts.families import CASES, batch, tiny

SOLVERS = registry.available("sparsity")
PATTERNS = ("unstructured", "2:4", "1:4", "4:8", "4x1")
EVERY = pytest.mark.parametrize(("solver", "text"), [(s, p) for s in SOLVERS for p in PATTERNS])


def problem(outputs: int = 24, inputs: int = 160, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight [O, K] and the gram of correlated inputs, some of them always zero."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=random) * torch.rand(inputs, generator=random)
    rows = torch.randn(400, inputs, generator=random) @ mixing
    rows[:, 3] = 0.0
    return torch.randn(outputs, inputs, generator=random), (rows.T @ rows).double()


def given(solver: str, gram: Tensor) -> Tensor | None:
    return gram if registry.find("sparsity", solver).NEEDS else None


def test_the_first_solvers_are_there() -> None:
    assert {"magnitude", "wanda", "sparsegpt", "alps", "random"} <= set(SOLVERS)


@EVERY
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.8, 1.0])
def test_exactly_the_asked_pattern_and_amount(solver: str, text: str, sparsity: float) -> None:
    weight, gram = problem()
    pattern, before = Pattern.parse(text), (weight.clone(), gram.clone())
    zeros = pattern.zeros((24, 160), sparsity)
    module = registry.find("sparsity", solver)
    found = module.solve(weight, given(solver, gram), pattern, zeros, seed=3)
    assert found.shape == weight.shape and found.dtype == weight.dtype and torch.isfinite(found).all()
    dead = 24 if module.NEEDS else 0  # the weights of an input that is always zero may be zero beyond the number
    assert zeros <= int((found == 0).sum()) <= zeros + dead
    assert pattern.holds(found) or dead
    assert torch.equal(weight, before[0]) and torch.equal(gram, before[1])
    assert torch.equal(found, module.solve(weight, given(solver, gram), pattern, zeros, seed=3))


@EVERY
def test_what_looks_at_data_loses_less_than_chance(solver: str, text: str) -> None:
    weight, gram = problem()
    pattern = Pattern.parse(text)
    zeros = pattern.zeros((24, 160), 0.5)
    ours = registry.find("sparsity", solver).solve(weight, given(solver, gram), pattern, zeros, seed=1)
    chance = registry.find("sparsity", "random").solve(weight, None, pattern, zeros, seed=2)
    lost, by_chance = loss_of(weight, ours, gram), loss_of(weight, chance, gram)
    assert lost < by_chance or (solver == "random" and lost == pytest.approx(by_chance, rel=0.5))


@pytest.mark.parametrize(("family", "task"), CASES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_whole_model(solver: str, family: str, task: str) -> None:
    model = tiny(family, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dense = network(model, describe(model).layout)
    names = matrices_of(model, dense.layout)
    shares = dict.fromkeys(names, 0.5)
    arrays = {name: tensor.numpy() for name, tensor in batch(model, lengths=(9, 7, 3, 1)).items()}
    sparse = solve(dense, shares, Pattern.parse("unstructured"), solver, [arrays], seed=1)
    for name, part in matrices_of(sparse, dense.layout).items():
        zeros = int((matrix(part) == 0).sum())
        assert zeros == pytest.approx(matrix(part).numel() / 2, abs=1), name
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
