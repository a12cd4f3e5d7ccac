"""Plans of an amount: what stays whole is settled by what the network then answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paredown.anatomy import describe_graph
from paredown.errors import InfeasibleBudget
from paredown.graph import trace
from paredown.layers import macs
from paredown.pipeline._network_amounts import Amounts
from paredown.pipeline._network_table import Table
from paredown.pipeline._settings import Settings, Silent
from paredown.surgery import cut_graph
from paredown.types import Plan, Scores
from tests.contracts.networks import NETWORKS, example, network

CASE = NETWORKS["resnet18"]


def table_of(settings: Settings, *, streams_cost: float = 0.0) -> tuple[Table, list[Plan]]:
    """The table of a residual network in which a cut costs 1 and that of a stream so much more; the plans judged."""
    model = trace(network(CASE), example(CASE))
    anatomy = describe_graph(model)
    work: Any = SimpleNamespace(json=lambda name, compute: compute())
    prepared: Any = SimpleNamespace(model=model, anatomy=anatomy)
    watch: Any = SimpleNamespace()
    table: Any = Table(prepared, settings, work, watch, Silent())
    rng = np.random.default_rng(0)
    judged: list[Plan] = []

    def lost(plan: Plan) -> float:
        judged.append(plan)
        return 1.0 + streams_cost * any(len(plan.keep[name]) < anatomy.group(name).units for name in anatomy.streams)

    table.__dict__ |= {
        "scores": Scores("obs", {group.name: rng.random(group.units) for group in anatomy.channels}),
        "lost": lost,
    }
    return table, judged


def cut_of(table: Table, plan: Plan) -> set[str]:
    anatomy = table.prepared.anatomy
    return {group.name for group in anatomy.channels if len(plan.keep[group.name]) < group.units}


def settings(**more: Any) -> Settings:
    return Settings("", "", None, "", **more)


@pytest.mark.parametrize("metric", ["macs", "parameters"])
def test_streams_stay_whole_where_that_loses_less(metric: str) -> None:
    table, judged = table_of(settings(**{metric: 0.5}), streams_cost=1.0)
    plan = Amounts(table).plan()
    assert cut_of(table, plan) and not cut_of(table, plan) & set(table.prepared.anatomy.streams)
    assert len(judged) == 2 and macs(cut_graph(table.prepared.model, table.prepared.anatomy, plan))
    table, _ = table_of(settings(**{metric: 0.5}), streams_cost=-1.0)
    assert cut_of(table, Amounts(table).plan()) & set(table.prepared.anatomy.streams)


def test_nothing_is_judged_where_it_was_said_what_stays_or_one_plan_is_all_there_is() -> None:
    for more in ({"macs": 0.75, "whole": "none"}, {"channels": 0.25}):
        table, judged = table_of(settings(**more))
        assert cut_of(table, Amounts(table).plan()) & set(table.prepared.anatomy.streams)
        assert not judged


def test_an_amount_that_only_the_streams_can_give() -> None:
    table, judged = table_of(settings(macs=0.15), streams_cost=1.0)
    assert cut_of(table, Amounts(table).plan()) & set(table.prepared.anatomy.streams) and len(judged) == 1
    table, _ = table_of(settings(macs=0.001))
    with pytest.raises(InfeasibleBudget):
        Amounts(table).plan()


def test_the_steps_are_those_asked_for() -> None:
    for more, step in (({}, 4), ({"multiple_of": 2}, 2)):  # of 8 to 16 channels nothing near to a half goes by eights
        table, _ = table_of(settings(macs=0.5, **more))
        plan = Amounts(table).plan()
        widths = [len(plan.keep[name]) for name in cut_of(table, plan)]
        assert np.gcd.reduce(widths) == step
