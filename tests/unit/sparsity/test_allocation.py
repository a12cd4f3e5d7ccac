"""How zeros are shared out: the sum is what was asked for, and goes where it costs least."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paredown.anatomy import describe
from paredown.errors import ParedownError, UnsupportedModel
from paredown.network import Network, network
from paredown.sparsity import ALLOCATIONS, Pattern, allocate, matrices_of, matrix
from paredown.sparsity._allocation import TRIED, _least_error, _owl, _within
from tests.contracts.families import CASES, batch, tiny


def dense(family: str, task: str) -> tuple[Network, list[dict[str, np.ndarray]]]:
    model = tiny(family, task)
    inputs = {name: value.numpy() for name, value in batch(model).items()}
    return network(model, describe(model).layout), [inputs]


@pytest.mark.parametrize("how", ALLOCATIONS)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_all_together_have_the_share_asked_for(family: str, task: str, how: str) -> None:
    whole, batches = dense(family, task)
    parts = matrices_of(whole.model, whole.layout)
    for sparsity in (0.1, 0.6, 0.9, 0.97):
        shares = allocate(whole, sparsity, Pattern(), batches, how=how)
        assert set(shares) == {name for name, part in parts.items() if matrix(part).numel()}
        assert all(0 <= share < 1 for share in shares.values())
        sizes = [matrix(parts[name]).numel() for name in shares]
        assert np.average(list(shares.values()), weights=sizes) == pytest.approx(sparsity, abs=1e-3)
    assert how == "uniform" or len(set(shares.values())) > 1


def test_one_threshold_for_all() -> None:
    whole, batches = dense("bert", "text-classification")
    parts = matrices_of(whole.model, whole.layout)
    quiet = next(iter(parts))
    with torch.no_grad():
        matrix(parts[quiet]).mul_(0.01)
    shares = allocate(whole, 0.5, Pattern(), batches, how="global")
    assert shares.pop(quiet) > 0.9 and max(shares.values()) < 0.6


def test_blocks_are_compared_as_blocks() -> None:
    whole, batches = dense("bert", "text-classification")
    shares = allocate(whole, 0.5, Pattern.parse("4x1"), batches, how="global")
    assert len(set(shares.values())) > 1 and np.mean(list(shares.values())) == pytest.approx(0.5, abs=0.1)


def test_layers_with_outliers_keep_more() -> None:
    whole, _ = dense("bert", "text-classification")
    weights = {name: matrix(part).clone().sign() for name, part in matrices_of(whole.model, whole.layout).items()}
    odd = [name for name in weights if ".layer.1." in name]
    for name in odd:
        weights[name][::5, 0] *= 1000
    same = ((name, torch.eye(weight.shape[1], dtype=torch.float64)) for name, weight in weights.items())
    sizes = np.array([float(weight.numel()) for weight in weights.values()])
    shares = dict(zip(weights, _owl(whole, weights, 0.7, sizes, same), strict=True))
    few, many = {shares[name] for name in odd}, {shares[name] for name in weights if name not in odd}
    assert len(few) == len(many) == 1 and many.pop() - few.pop() == pytest.approx(2 * 0.08)
    assert np.average(list(shares.values()), weights=sizes) == pytest.approx(0.7)


def test_zeros_go_where_they_cost_least() -> None:
    cheap, dear = np.array(TRIED) * 0.01, np.array(TRIED) ** 2
    shares = _least_error(np.array([cheap, dear]), np.array([100.0, 300.0]), 0.5)
    assert shares[0] == pytest.approx(TRIED[-1]) and np.average(shares, weights=[1, 3]) == pytest.approx(0.5)
    brute = min(
        (np.interp(a, TRIED, cheap) + np.interp((0.5 * 4 - a) / 3, TRIED, dear), a) for a in np.linspace(0.3, 0.98, 300)
    )
    assert brute[1] == pytest.approx(shares[0], abs=0.01)


def test_what_is_cut_off_is_spread_over_the_others() -> None:
    sizes = np.array([1.0, 1.0, 2.0])
    found = _within(np.array([1.3, 0.9, 0.6]), sizes, 0.85)
    assert found.max() <= 0.98 and np.average(found, weights=sizes) == pytest.approx(0.85)


def test_what_cannot_be_allocated() -> None:
    whole, batches = dense("bert", "text-classification")
    with pytest.raises(ParedownError, match="uniform, global, owl, measured"):
        allocate(whole, 0.5, Pattern(), batches, how="wild")
    with pytest.raises(ParedownError, match="leave the allocation at uniform"):
        allocate(whole, 0.5, Pattern.parse("2:4"), batches, how="owl")
    with pytest.raises(UnsupportedModel, match="divides into 7x1"):
        allocate(whole, 0.5, Pattern.parse("7x1"), batches)
