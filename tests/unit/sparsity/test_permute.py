"""Neurons and value dimensions change places: the same function, and n:m keeps more of it."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch

from paredown.anatomy import describe
from paredown.sparsity import Pattern, matrices_of, matrix, permuted
from paredown.sparsity._permute import swaps
from tests.contracts.families import CASES, batch, stock, tiny


def kept(weight: torch.Tensor, pattern: Pattern) -> float:
    scores = weight.abs()
    return float((scores * pattern.kept(scores, 0)).sum())


@pytest.mark.parametrize("name", ["2:4", "1:4"])
@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_same_function_with_more_magnitude_kept(family: str, task: str, name: str) -> None:
    model = tiny(family, task).double()
    layout, pattern = describe(model).layout, Pattern.parse(name)
    before = {key: matrix(part).clone() for key, part in matrices_of(model, layout).items()}
    found = permuted(model, layout, pattern)
    after = {key: matrix(part) for key, part in matrices_of(found, layout).items()}
    ours, theirs = stock(found, batch(model)), stock(model, batch(model))  # padding may give nan
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-10, equal_nan=True) and theirs.isfinite().any()
    assert all(torch.equal(matrix(part), before[key]) for key, part in matrices_of(model, layout).items())
    gains = [
        kept(after[key], pattern) - kept(before[key], pattern)
        for key in before
        if key.endswith(layout.layer_names["down"]) and pattern.fits((before[key].shape[0], before[key].shape[1]))
    ]
    assert gains and min(gains) >= 0 and max(gains) > 0


def test_swaps_find_what_trying_everything_finds() -> None:
    random = np.random.default_rng(3)
    pattern = Pattern.parse("1:2")
    scores = torch.from_numpy(random.random((3, 6)))
    best = max(kept(scores[:, list(order)], pattern) for order in permutations(range(6)))
    found = swaps(scores, pattern, random)
    assert sorted(found.tolist()) == list(range(6))
    assert kept(scores[:, found], pattern) >= 0.99 * best > kept(scores, pattern)


def test_one_group_stays() -> None:
    assert swaps(torch.rand(3, 4), Pattern.parse("2:4"), np.random.default_rng(0)).tolist() == [0, 1, 2, 3]
