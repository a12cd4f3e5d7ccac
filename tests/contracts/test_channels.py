"""What every criterion that ranks channels must pass, on traced networks of several kinds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from paredown import registry
from paredown.anatomy import describe_graph
from paredown.errors import BadData
from paredown.graph import copied, trace
from paredown.importance import score_channels
from paredown.surgery import cut_graph
from paredown.types import Array, GraphAnatomy, Plan
from tests.contracts.networks import NETWORKS, example, network

CRITERIA = tuple(n for n in registry.available("importance") if "channel" in registry.find("importance", n).UNITS)
CASES = ("vgg", "cifar-resnet20", "mobilenetv2", "densenet", "se-resnet", "resnext", "twice", "corners")
EVERY = pytest.mark.parametrize(("criterion", "name"), [(c, n) for c in CRITERIA for n in CASES])


def traced(name: str) -> tuple[fx.GraphModule, GraphAnatomy, Tensor, Tensor]:
    case = NETWORKS[name]
    model = trace(network(case), example(case))
    return model, describe_graph(model), example(case, batch=12), torch.arange(12) % 5


def scores(
    model: fx.GraphModule, anatomy: GraphAnatomy, criterion: str, x: Tensor, y: Tensor, batches: int = 1
) -> dict[str, Array]:
    sizes = [12 // batches] * batches
    return dict(score_channels(model, anatomy, criterion, x.split(sizes), y.split(sizes)).values)


@EVERY
def test_a_figure_for_every_unit_the_same_each_time(criterion: str, name: str) -> None:
    model, anatomy, x, y = traced(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = scores(model, anatomy, criterion, x, y)
    assert {g.name: g.units for g in anatomy.channels} == {key: len(value) for key, value in found.items()}
    assert all(np.isfinite(value).all() for value in found.values())
    again = scores(model, anatomy, criterion, x, y)
    for key, value in found.items():
        np.testing.assert_array_equal(value, again[key])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@EVERY
def test_the_same_in_three_batches(criterion: str, name: str) -> None:
    model, anatomy, x, y = traced(name)
    once, thrice = (scores(model, anatomy, criterion, x, y, batches) for batches in (1, 3))
    for key, value in once.items():
        np.testing.assert_allclose(value, thrice[key], rtol=2e-2, atol=1e-3 * np.abs(value).max(), err_msg=key)


@EVERY
def test_a_unit_of_zeros_goes_first(criterion: str, name: str) -> None:
    model, anatomy, x, y = traced(name)
    model = copied(model)
    group = max(anatomy.channels, key=lambda one: one.units)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for part in (part for part in group.slices if part.tensor in parameters):
            parameters[part.tensor].index_fill_(part.axis, torch.from_numpy(part.positions[2]), 0.0)
    found = scores(model, anatomy, criterion, x, y)[group.name]
    assert found[2] <= found.min() + 1e-9 * found.max()  # rounding, where other units are never active


def test_without_pictures() -> None:
    model, anatomy, _, _ = traced("vgg")
    with pytest.raises(BadData, match="needs calibration pictures"):
        score_channels(model, anatomy, "fisher")
    with pytest.raises(BadData, match="does not rank channels"):
        score_channels(model, anatomy, "flap")
    assert (
        len(
            {"l1", "l2", "batch_norm", "taylor", "obs", "geometric_median", "activation_norm", "lamp", "random"}
            & set(CRITERIA)
        )
        == 9
    )


def test_scores_of_a_cut_network() -> None:
    model, anatomy, x, y = traced("cifar-resnet20")
    keep = {g.name: tuple(range(max(1, g.units // 2))) for g in anatomy.channels}
    small = cut_graph(model, anatomy, Plan(anatomy.fingerprint, {**anatomy.identity(), **keep}))
    own = describe_graph(small)
    assert all(len(v) == own.group(k).units for k, v in scores(small, own, "obs", x, y).items())
