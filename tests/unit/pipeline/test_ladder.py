"""Which students are tried, and how a time is found for an error."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paredown.anatomy import describe
from paredown.pipeline._ladder import apart, classifier_speeds, embedder_errors
from paredown.pipeline._settings import Silent
from paredown.pipeline._students import Workshop
from paredown.planning import LatencyTable
from paredown.types import Limits, Scores
from tests.contracts.families import tiny


def workshop() -> Workshop:
    """On a tiny model whose heads and neurons cost what a made-up table says; nothing is timed or scored."""
    anatomy = describe(tiny("bert", "text-embedding"))
    random = np.random.default_rng(0)
    curves = {"heads": {0: 0.0, 1: 1.0, 2: 1.8, 3: 2.5}, "neurons": {0: 0.0, 10: 1.0, 20: 2.2}}
    shop: Any = object.__new__(Workshop)
    shop.prepared = SimpleNamespace(anatomy=anatomy)
    shop.limits = Limits(1)
    shop.table = LatencyTable(0.5, curves, curves)
    shop.scores = Scores("obs", {g.name: random.random(g.units) for g in anatomy.groups if g.kind != "layer"})
    full = tuple((anatomy.group(f"layer.{i}.heads").units, anatomy.group(f"layer.{i}.neurons").units) for i in range(3))
    shop.watch = SimpleNamespace(full=full)
    found: Workshop = shop
    return found


@pytest.mark.parametrize("error", (0.3, 1.5, 6.0))
def test_the_time_for_an_error_is_the_least(error: float) -> None:
    shop = workshop()
    seconds = shop.seconds_for(error)
    dense = shop.table.predict(shop.watch.full)
    assert seconds < dense
    assert shop._predicted_error(shop._at_depth(shop.table, seconds, 3)) <= error
    assert shop._predicted_error(shop._at_depth(shop.table, seconds - dense / 1000, 3)) > error


def test_no_error_takes_the_dense_time() -> None:
    shop = workshop()
    assert shop.seconds_for(0.0) == pytest.approx(shop.table.predict(shop.watch.full), rel=1e-3)


def test_a_plan_for_an_error_is_not_bent_to_a_time() -> None:
    """Where the table is wrong by half, a plan that promises a time is cut deeper; one that spends an error is not."""
    shop: Any = workshop()
    shop.progress = Silent()
    shop.work = SimpleNamespace(json=lambda _, compute: compute())
    shop.watch.time = lambda shapes, rounds: {shape: 1.5 * shop.table.predict(shape) for shape in shapes}
    shop.watch.metric = "single"
    seconds = shop.seconds_for(1.5)
    spends, once = shop.plan("spends", seconds, depth=3, as_measured=False)
    assert shop._predicted_error(spends) <= 1.5 and len(once) == 1
    assert once[0]["measured_ms"] == pytest.approx(1.5 * once[0]["predicted_ms"])
    promises, rounds = shop.plan("promises", seconds, depth=3)
    assert shop._predicted_error(promises) > 1.5 and len(rounds) > 1


def test_times_are_apart() -> None:
    """Else two students would be the same, under the same name."""
    assert apart([0.99, 0.90, 0.885, 0.85, 0.2], 1.0) == [0.90, 0.85, 0.2]
    assert apart([], 1.0) == [] and apart([1.0, 0.98], 1.0) == []


def test_the_ladder_grows_with_the_minutes() -> None:
    assert classifier_speeds(0)[1] == () and len(classifier_speeds(0)[0]) == 3
    assert [len(classifier_speeds(minutes)[1]) for minutes in (0.5, 1, 2.5, 20)] == [1, 1, 2, 3]
    assert all(sum(map(len, classifier_speeds(minutes))) <= 4 for minutes in (0.0, 0.5, 3.0, 60.0))
    assert embedder_errors(0)[1] == () and embedder_errors(5)[1]
