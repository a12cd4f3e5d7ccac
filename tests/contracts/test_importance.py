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
from paredown.importance import criteria, score
from paredown.surgery import cut
from paredown.types import Anatomy, Group, Plan
from tests.contracts.families import CASES, batch, tiny

CRITERIA = registry.available("importance")
UNITS = {criterion: registry.find("importance", criterion).UNITS for criterion in CRITERIA}
OF_UNITS = tuple(c for c in CRITERIA if {"head", "neuron"} & set(UNITS[c]))
OF_DEPTH = tuple(c for c in CRITERIA if {"layer", "sublayer"} & set(UNITS[c]))
OF_TEXT = tuple(c for c in CRITERIA if set(UNITS[c]) != {"channel"})  # test_channels.py has the others
EVERY = pytest.mark.parametrize(("criterion", "family", "task"), [(c, f, t) for c in OF_TEXT for f, t in CASES])
EVERY_OF_UNITS = pytest.mark.parametrize(
    ("criterion", "family", "task"), [(c, f, t) for c in OF_UNITS for f, t in CASES]
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


def ranked(anatomy: Anatomy, criterion: str) -> Iterator[Group]:
    """The groups that a criterion scores; query heads as heads, unless it looks at heads in ways of their own."""
    kinds = {*UNITS[criterion]} - {"layer"}
    if "head" in kinds and not {"attention", "learned"} & set(registry.find("importance", criterion).NEEDS):
        kinds.add("query")
    return (group for group in anatomy.groups if group.kind in kinds)


def sizes(anatomy: Anatomy, criterion: str) -> dict[str, int]:
    """How many scores there must be under each name."""
    found = {group.name: group.units for group in ranked(anatomy, criterion)}
    layers = anatomy.group("layers").units
    depth = {"layer": ("layers", layers), "sublayer": ("sublayers", 2 * layers)}
    return found | dict(depth[unit] for unit in UNITS[criterion] if unit in depth)


def close(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for name, values in ours.items():
        np.testing.assert_allclose(values, theirs[name], rtol=1e-3, atol=1e-4 * np.abs(values).max(), err_msg=name)


def test_the_first_criteria_are_there() -> None:
    assert {"magnitude", "fisher", "random", "obs"} <= set(CRITERIA)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_criterion_says_what_it_ranks_and_needs(criterion: str) -> None:
    module = registry.find("importance", criterion)
    assert set(module.UNITS) <= {"head", "neuron", "layer", "sublayer", "channel"} and module.UNITS
    assert hasattr(module, "score") == bool({"head", "neuron", "channel"} & set(module.UNITS))
    assert hasattr(module, "score_depth") == bool({"layer", "sublayer"} & set(module.UNITS))
    assert all(criterion in criteria(unit) for unit in module.UNITS)
    assert module.__doc__ and isinstance(module.NEEDS, tuple)


@EVERY
def test_scores_are_finite_one_per_unit_and_repeatable(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    first = score(model, anatomy, batches, criterion, seed=3)
    again = score(model, anatomy, batches, criterion, seed=3)
    assert first.criterion == criterion
    assert {name: len(values) for name, values in first.values.items()} == sizes(anatomy, criterion)
    for name, values in first.values.items():
        assert values.ndim == 1 and np.isfinite(values).all() and (values >= 0).all()
        assert len(np.unique(values)) == len(values), f"{name}: units of a random model do not all matter alike"
        np.testing.assert_array_equal(values, again.values[name])
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@EVERY
def test_one_or_three_batches(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    whole = score(model, anatomy, batches, criterion, seed=1).values
    close(dict(whole), dict(score(model, anatomy, in_three(batches[0]), criterion, seed=1).values))


@EVERY_OF_UNITS
def test_permuting_units_permutes_the_scores(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    random = np.random.default_rng(5)
    heads = random.permutation(anatomy.group("layer.0.heads").units)
    orders = {"head": heads}  # the same in every layer, for MPNet's heads share one position bias
    permuted = copy.deepcopy(model)
    tensors = permuted.state_dict()
    expected = dict(score(model, anatomy, batches, criterion).values)
    if criterion == "random":  # its order of layers is tied to nothing that a permutation moves
        expected = {name: values for name, values in expected.items() if name not in ("layers", "sublayers")}
    for group in (group for group in anatomy.groups if group.kind != "layer"):
        order = orders.get(group.kind, random.permutation(group.units))
        if group.name in expected:
            expected[group.name] = expected[group.name][order]
        for part in group.slices:
            where = torch.arange(part.positions.size)
            where[torch.from_numpy(part.positions.reshape(-1))] = torch.from_numpy(part.positions[order].reshape(-1))
            tensors[part.tensor].copy_(tensors[part.tensor].clone().index_select(part.axis, where))
    if anatomy.layout.position_bias:
        table = permuted.get_submodule(anatomy.layout.position_bias).relative_attention_bias.weight.detach()
        table.copy_(table[:, torch.from_numpy(orders["head"])].clone())
    inputs = batch(model)
    with torch.no_grad():
        torch.testing.assert_close(permuted(**inputs)[0], model(**inputs)[0], rtol=1e-3, atol=1e-4)
    found = score(permuted, anatomy, batches, criterion).values
    close(expected, dict(found))


@EVERY_OF_UNITS
def test_a_zeroed_unit_scores_lowest(criterion: str, family: str, task: str) -> None:
    model, anatomy, batches = example(family, task)
    tensors = model.state_dict()
    planted = {group.name: (1 + group.layer % 2) % group.units for group in ranked(anatomy, criterion)}
    for group in ranked(anatomy, criterion):
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


@pytest.mark.parametrize(("criterion", "family", "task"), [(c, f, t) for c in OF_DEPTH for f, t in CASES])
def test_a_layer_that_does_nothing_scores_lowest(criterion: str, family: str, task: str) -> None:
    """A pre-norm layer that adds nothing hands its input on; with plain norms a post-norm one does too."""
    if not registry.find("importance", criterion).NEEDS:
        pytest.skip("this criterion looks at no data")
    model, anatomy, batches = example(family, task)
    if task == "text-classification":
        pytest.skip("the last layer computes one row alone")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "LayerNorm" in name or "layer_norm" in name:
                parameter.fill_(float(name.endswith("weight")))
        block = model.get_submodule(f"{anatomy.layout.layers}.1")
        for role in ("output", "down"):
            for parameter in block.get_submodule(anatomy.layout.layer_names[role]).parameters():
                parameter.zero_()
    found = score(model, anatomy, batches, criterion).values
    assert int(np.argmin(found["layers"])) == 1 and np.sort(found["layers"])[1] > 1e-4
    assert "sublayers" not in found or set(np.argsort(found["sublayers"])[:2]) == {2, 3}


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_model_with_sub_layers_gone(criterion: str) -> None:
    model, anatomy, batches = example("bert", "text-classification")
    keep = {**anatomy.identity(), "layer.0.heads": (), "layer.1.neurons": (), "layer.2.neurons": (3,)}
    small = cut(model, anatomy, Plan(anatomy.fingerprint, keep))
    found = score(small, describe(small), batches, criterion).values
    assert {name: len(values) for name, values in found.items()} == sizes(describe(small), criterion)
    assert all(np.isfinite(values).all() for values in found.values())


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
    with pytest.raises(ParedownError, match="no 'hessian'; there are ablation, activation_frequency"):
        score(model, anatomy, batches, "hessian")


def test_random_differs_by_seed_and_by_layer() -> None:
    model, anatomy, batches = example("bert", "text-classification")
    one, two = (score(model, anatomy, batches, "random", seed=seed).values for seed in (0, 1))
    assert not np.array_equal(one["layer.0.neurons"], two["layer.0.neurons"])
    assert not np.array_equal(np.sort(one["layer.0.neurons"]), np.sort(one["layer.1.neurons"]))
