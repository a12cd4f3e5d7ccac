"""Which channels stay."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.anatomy import describe_graph
from paredown.errors import InfeasibleBudget
from paredown.graph import trace
from paredown.layers import places_of
from paredown.planning import Product, aligned_plan, channel_plan
from paredown.planning._channels import ChannelCosts
from paredown.types import Budget, GraphAnatomy, Group, Limits, Scores
from tests.contracts.networks import NETWORKS, example, network


def anatomy(*units: int) -> GraphAnatomy:
    return GraphAnatomy("traced", "f", tuple(Group(f"g{i}", "channel", count) for i, count in enumerate(units)))


@pytest.mark.parametrize("ranking", ["global", "local"])
def test_channels_of_the_same_score_go_evenly(ranking: str) -> None:
    found = anatomy(8, 16)
    scores = Scores("s", {"g0": np.ones(8), "g1": np.ones(16)})
    keep = channel_plan(found, scores, Budget("channels", 0.5), [], ranking=ranking).keep
    assert {name: len(units) for name, units in keep.items()} == {"g0": 4, "g1": 8}


def test_one_threshold_parts_all_groups() -> None:
    scores = Scores("s", {"g0": np.arange(8.0), "g1": np.arange(16.0) + 4})
    keep = channel_plan(anatomy(8, 16), scores, Budget("channels", 0.5), []).keep
    assert keep == {"g0": (7,), "g1": tuple(range(5, 16))}  # at 9 and above, but for the one that stays


@pytest.mark.parametrize("ranking", ["global", "local"])
@pytest.mark.parametrize("name", ["vgg", "resnet18", "mobilenetv2"])
def test_coarse_steps_leave_nothing_of_the_budget_that_would_hold_another(name: str, ranking: str) -> None:
    case = NETWORKS[name]
    model = trace(network(case), example(case))
    found, products = describe_graph(model), [Product(one, *about) for one, about in places_of(model).items()]
    rng = np.random.default_rng(0)
    scores = Scores("s", {group.name: rng.random(group.units) for group in found.channels})
    cost, sizes = ChannelCosts(found, products, "macs"), {group.name: group.units for group in found.channels}
    for share in (0.4, 0.6, 0.8):
        plan = channel_plan(found, scores, Budget("macs", share), products, Limits(multiple_of=4), ranking=ranking)
        widths = {name: len(plan.keep[name]) for name in sizes}
        assert cost(widths) <= share * cost(sizes)
        for name, width in widths.items():
            wider = {**widths, name: width + 4}
            assert width + 4 > sizes[name] or cost(wider) > share * cost(sizes)


def test_steps_are_as_coarse_as_the_budget_allows() -> None:
    scores = Scores("s", {"g0": np.arange(64.0), "g1": np.arange(64.0)})
    wide = aligned_plan(anatomy(64, 64), scores, Budget("channels", 0.5), []).keep
    assert [len(units) for units in wide.values()] == [32, 32]
    wide = aligned_plan(anatomy(64, 64), scores, Budget("channels", 0.7), []).keep  # 89.6
    assert sorted(len(units) for units in wide.values()) == [40, 48]
    few = Scores("s", {"g0": np.arange(16.0), "g1": np.arange(16.0)})
    narrow = aligned_plan(anatomy(16, 16), few, Budget("channels", 0.65), []).keep  # 20.8: by eights 16
    assert sorted(len(units) for units in narrow.values()) == [8, 12]
    least = aligned_plan(anatomy(16, 16), few, Budget("channels", 0.13), []).keep  # by eights no plan at all
    assert [len(units) for units in least.values()] == [2, 2]
    with pytest.raises(InfeasibleBudget):
        aligned_plan(anatomy(16, 16), few, Budget("channels", 0.05), [])
