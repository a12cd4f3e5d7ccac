"""Scores and plans of a model that is cut already, told in units of the original."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from paredown.anatomy import describe
from paredown.planning import RANKINGS, SCHEDULES, Shares, by_shares, lifted, relative
from paredown.surgery import cut
from paredown.types import Plan, Scores
from tests.contracts.families import tiny


def plans() -> tuple[Plan, Plan]:
    """One plan, and another that keeps less of everything."""
    anatomy = describe(tiny("llama", num_hidden_layers=4))
    whole = anatomy.identity()
    first = {**whole, "layers": (0, 2, 3), "layer.0.neurons": tuple(range(2, 12)), "layer.2.heads": (1,)}
    second = {**first, "layers": (0, 3), "layer.0.neurons": (3, 7), "layer.3.queries": (1,)}
    return Plan(anatomy.fingerprint, first), Plan(anatomy.fingerprint, second)


def test_two_steps_are_one() -> None:
    model = tiny("llama", num_hidden_layers=4)
    anatomy = describe(model)
    first, second = plans()
    middle = cut(model, anatomy, first)
    small = describe(middle)
    both = cut(middle, small, relative(second, first, small)).state_dict()
    once = cut(model, anatomy, second).state_dict()
    assert both.keys() == once.keys() and all(torch.equal(both[name], once[name]) for name in once)


def test_the_one_query_head_left_of_a_group_stays() -> None:
    """No group of query heads is described where one is left, so nothing scores it."""
    model = tiny("llama")
    anatomy = describe(model)
    keep = {**anatomy.identity(), **{f"layer.{i}.queries": (1,) for i in range(3)}}
    kept = Plan(anatomy.fingerprint, keep)
    small = describe(cut(model, anatomy, kept))
    assert not any(group.kind == "query" for group in small.groups)
    values = {group.name: np.ones(group.units) for group in small.groups}
    scores = lifted(Scores("made up", values), kept, anatomy)
    plan = by_shares(anatomy, scores, Shares(queries=3, neurons=5))
    assert all(plan.keep[f"layer.{i}.queries"] == (1,) for i in range(3))
    relative(plan, kept, small)


def test_nothing_comes_back() -> None:
    model = tiny("llama", num_hidden_layers=4)
    first, second = plans()
    small = describe(cut(model, describe(model), second))
    with pytest.raises(ValueError, match="gone already"):
        relative(first, second, small)


def test_what_is_gone_ranks_last() -> None:
    model = tiny("llama", num_hidden_layers=4)
    anatomy = describe(model)
    first, _ = plans()
    small = describe(cut(model, anatomy, first))
    rng = np.random.default_rng(0)
    values = {group.name: rng.random(group.units) for group in small.groups} | {"sublayers": rng.random(6)}
    found = lifted(Scores("made up", values), first, anatomy).values
    assert found["layers"].tolist()[1] == -np.inf and np.isfinite(found["layers"][[0, 2, 3]]).all()
    assert np.array_equal(found["layer.2.neurons"], values["layer.1.neurons"])
    assert np.array_equal(found["layer.0.neurons"][2:12], values["layer.0.neurons"])
    assert (found["layer.1.heads"] == -np.inf).all() and found["layer.2.heads"][0] == -np.inf
    assert np.array_equal(found["sublayers"][[0, 1, 4, 5, 6, 7]], values["sublayers"])
    shares = Shares(heads=2, neurons=20, layers=1)
    plan = by_shares(anatomy, Scores("made up", found), shares)
    assert set(plan.keep["layers"]) == {0, 2, 3}
    relative(plan, first, small)  # it keeps nothing that is gone
    assert sum(len(plan.keep[f"layer.{i}.neurons"]) for i in (0, 2, 3)) == 3 * 20 - 20


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_rounds_only_take_away_whatever_the_scores(schedule: str, ranking: str) -> None:
    """Anew in every round, as if each knew better than the one before; sub-layers and layers go as well."""
    model = tiny("bert", num_hidden_layers=5)
    anatomy = describe(model)
    whole = Plan(anatomy.fingerprint, anatomy.identity())
    asked = Shares(heads=0.3, neurons=0.5, layers=1, sublayers=3)
    totals = {"layers": 5, "sublayers": 10, "heads": 4, "neurons": 20, "queries": 0}
    for seed in range(12):
        rng = np.random.default_rng(seed)
        kept, here, small = whole, anatomy, model
        for number in (1, 2, 3):
            values = {group.name: rng.normal(size=group.units) for group in here.groups}
            values |= {"sublayers": rng.normal(size=2 * here.group("layers").units)}
            shares = asked.at(number, 3, totals, schedule) if number < 3 else asked
            scores = lifted(Scores("made up", values), kept, anatomy)
            plan = by_shares(anatomy, scores, shares, ranking=ranking)
            small = cut(small, here, relative(plan, kept, here))
            kept, here = plan, describe(small)
        layers = kept.keep["layers"]
        gone = [(i, kind) for i in layers for kind in ("heads", "neurons") if not kept.keep[f"layer.{i}.{kind}"]]
        assert len(layers) == 4 and len(gone) == 3
        left = [len(kept.keep[f"layer.{i}.neurons"]) for i in layers if (i, "neurons") not in gone]
        assert sum(left) == 10 * len(left)
