"""What every criterion, every public file of importance/, must pass, on the tiny models of every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from paredown import registry
from paredown.anatomy import describe
from paredown.errors import BadData, ParedownError
from paredown.importance import score
from paredown.surgery import cut
from paredown.types import Anatomy, Group, Plan
from tests.contracts.families import FAMILIES, TASKS, batch, tiny

CRITERIA = registry.available("importance")
EVERY = pytest.mark.parametrize(
    ("criterion", "family", "task"), [(c, f, t) for c in CRITERIA for f in FAMILIES for t in TASKS]
)
LENGTHS = (11, 9, 9, 8, 7, 7, 6, 5, 4, 3, 2, 1)


def example(family: str, task: str) -> tuple[PreTrainedModel, Anatomy, list[dict[str, Any]]]:
    model = tiny(family, task)
    return model, describe(model), [arrays(model, LENGTHS)]


def arrays(model: PreTrainedModel, lengths: tuple[int, ...]) -> dict[str, Any]:
    return {name: tensor.numpy() for name, tensor in batch(model, lengths=lengths).items()}


def in_three(one: dict[str, Any]) -> list[dict[str, Any]]:
    """The same texts in the same order in three batches, each padded no further than it needs."""
    parts = []
    for start, stop in ((0, 5), (5, 6), (6, len(LENGTHS))):
        longest = max(LENGTHS[start:stop])
        parts.append({name: array[start:stop, :longest] for name, array in one.items()})
    return parts


def cuttable(anatomy: Anatomy) -> Iterator[Group]:
    return (group for group in anatomy.groups if group.kind != "layer")


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=1e-4 * np.abs(values).max(), err_msg=name)


def test_the_first_criteria_are_there() -> None:
    assert {"magnitude", "fisher", "random", "obs"} <= set(CRITERIA)


@EVERY
def test_scores_are_finite_one_per_unit_and_repeatable(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first = score(model, anatomy, batches, criterion, seed=3)
    again = score(model, anatomy, batches, criterion, seed=3)
    assert first.criterion == criterion
    assert set(first.values) == {group.name for group in cuttable(anatomy)}
    for group in cuttable(anatomy):
        values = first.values[group.name]
        assert values.shape == (group.units,) and np.isfinite(values).all() and (values >= 0).all()
        assert len(np.unique(values)) == group.units, "units of a random model do not all matter alike"
        np.testing.assert_array_equal(values, again.values[group.name])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@EVERY
def test_one_or_three_batches(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    whole = score(model, anatomy, batches, criterion, seed=1).values
    close(dict(whole), dict(score(model, anatomy, in_three(batches[0]), criterion, seed=1).values))


@EVERY
def test_permuting_units_permutes_the_scores(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    random = np.random.default_rng(5)
    orders = {"head": random.permutation(4)}  # the same in every layer, for MPNet's heads share one position bias
    permuted = copy.deepcopy(model)
    tensors = permuted.state_dict()
    expected = dict(score(model, anatomy, batches, criterion).values)
    for group in cuttable(anatomy):
        order = orders.get(group.kind, random.permutation(group.units))
        expected[group.name] = expected[group.name][order]
        for part in group.slices:
            where = torch.from_numpy(part.positions[order].reshape(-1))
            tensors[part.tensor].copy_(tensors[part.tensor].clone().index_select(part.axis, where))
    if anatomy.layout.position_bias:
        table = permuted.get_submodule(anatomy.layout.position_bias).relative_attention_bias.weight.detach()
        table.copy_(table[:, torch.from_numpy(orders["head"])].clone())
    inputs = batch(model)
    with torch.no_grad():
        torch.testing.assert_close(permuted(**inputs)[0], model(**inputs)[0], rtol=1e-3, atol=1e-4)
    found = score(permuted, anatomy, batches, criterion).values
    close(expected, dict(found))


@EVERY
def test_a_zeroed_unit_scores_lowest(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    tensors = model.state_dict()
    planted = {group.name: 1 + group.layer % 2 for group in cuttable(anatomy)}
    for group in cuttable(anatomy):
        for part in group.slices:
            tensors[part.tensor].index_fill_(part.axis, torch.from_numpy(part.positions[planted[group.name]]), 0)
    found = score(model, anatomy, batches, criterion).values
    for name, unit in planted.items():
        assert found[name][unit] < np.delete(found[name], unit).min(), name


@EVERY
def test_modes_and_frozen_parameters_do_not_matter(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    expected = score(model, anatomy, batches, criterion).values
    model.requires_grad_(False)
    model.train()
    found = score(model, anatomy, batches, criterion).values
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    close(dict(expected), dict(found))


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_model_with_sub_layers_gone(criterion: str) -> None:
    model, anatomy, batches = example("bert", "text-classification")
    keep = {**anatomy.identity(), "layer.0.heads": (), "layer.1.neurons": (), "layer.2.neurons": (3,)}
    small = cut(model, anatomy, Plan(anatomy.fingerprint, keep))
    found = score(small, describe(small), batches, criterion).values
    assert {name: len(values) for name, values in found.items()} == {
        name: len(units) for name, units in keep.items() if name != "layers"
    }


@pytest.mark.parametrize("criterion", CRITERIA)
def test_no_texts(criterion: str) -> None:
    model, anatomy, _ = example("bert", "text-classification")
    if registry.find("importance", criterion).NEEDS:
        with pytest.raises(BadData, match=f"'{criterion}' needs calibration texts"):
            score(model, anatomy, [], criterion)
    else:
        score(model, anatomy, [], criterion)


def test_an_unknown_criterion() -> None:
    model, anatomy, batches = example("bert", "text-classification")
    with pytest.raises(ParedownError, match="no 'taylor'; there are fisher"):
        score(model, anatomy, batches, "taylor")


def test_random_differs_by_seed_and_by_layer() -> None:
    model, anatomy, batches = example("bert", "text-classification")
    one, two = (score(model, anatomy, batches, "random", seed=seed).values for seed in (0, 1))
    assert not np.array_equal(one["layer.0.neurons"], two["layer.0.neurons"])
    assert not np.array_equal(np.sort(one["layer.0.neurons"]), np.sort(one["layer.1.neurons"]))
