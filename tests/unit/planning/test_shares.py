"""Plans by shares: how much goes, what is protected, and what cannot be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.anatomy import describe
from paredown.errors import InfeasibleBudget
from paredown.planning import SCHEDULES, Shares, by_shares, collapse_warnings
from paredown.types import Anatomy, Limits, Plan, Scores
from tests.contracts.families import tiny

BERT = describe(tiny("bert"))
LLAMA = describe(tiny("llama"))


def scores(anatomy: Anatomy = BERT, seed: int = 0) -> Scores:
    random = np.random.default_rng(seed)
    values = {group.name: random.random(group.units) for group in anatomy.groups if group.kind != "layer"}
    layers = anatomy.group("layers").units
    return Scores("random", {**values, "layers": random.random(layers), "sublayers": random.random(2 * layers)})


def gone(plan: Plan, anatomy: Anatomy, kind: str) -> int:
    groups = [g for g in anatomy.groups if g.name.endswith(f".{kind}") and g.layer in plan.keep["layers"]]
    return sum(g.units - len(plan.keep[g.name]) for g in groups)


@given(heads=st.floats(0, 0.7), neurons=st.floats(0, 0.9), seed=st.integers(0, 9))
def test_a_global_ranking_takes_the_share_to_the_unit(heads: float, neurons: float, seed: int) -> None:
    found = scores(seed=seed)
    plan = by_shares(BERT, found, Shares(heads=heads, neurons=neurons))
    assert gone(plan, BERT, "heads") == round(heads * 12) and gone(plan, BERT, "neurons") == round(neurons * 60)
    for kind, least in (("heads", 1), ("neurons", 1)):
        for layer in range(3):
            name = f"layer.{layer}.{kind}"
            kept, values = plan.keep[name], found.values[name]
            assert len(kept) >= least and list(kept) == sorted(kept)
            dropped = set(range(len(values))) - set(kept)
            assert not dropped or max(values[list(dropped)]) <= min(values[list(kept)])


def test_a_global_ranking_takes_the_lowest_of_all() -> None:
    values = {name: np.asarray(v) for name, v in scores().values.items()}
    for layer in range(3):
        values[f"layer.{layer}.neurons"] = np.arange(20) + 100.0 * layer
    plan = by_shares(BERT, Scores("made up", values), Shares(neurons=0.5))
    assert [len(plan.keep[f"layer.{i}.neurons"]) for i in range(3)] == [1, 9, 20]
    plan = by_shares(BERT, Scores("made up", values), Shares(neurons=0.5), ranking="layer")
    assert [plan.keep[f"layer.{i}.neurons"] for i in range(3)] == [tuple(range(10, 20))] * 3


def test_limits_are_kept() -> None:
    plan = by_shares(BERT, scores(), Shares(neurons=0.4), Limits(multiple_of=8))
    assert all(len(plan.keep[f"layer.{i}.neurons"]) in (8, 16, 20) for i in range(3))
    plan = by_shares(BERT, scores(), Shares(heads=0.5, neurons=0.5), Limits(uniform=True))
    assert len({(len(plan.keep[f"layer.{i}.heads"]), len(plan.keep[f"layer.{i}.neurons"])) for i in range(3)}) == 1


def test_layers_and_sub_layers_go_whole() -> None:
    found = scores()
    plan = by_shares(BERT, found, Shares(layers=1, sublayers=1, heads=0.25))
    assert set(range(3)) - set(plan.keep["layers"]) == {int(np.argmin(found.values["layers"]))}
    empty = [name for name, units in plan.keep.items() if not units]
    assert len(empty) == 1 and int(empty[0].split(".")[1]) in plan.keep["layers"]
    assert gone(plan, BERT, "heads") == (4 + 1 if empty[0].endswith("heads") else 2)  # a quarter of what is left


def test_protected_layers_stay_whole() -> None:
    found = {**scores().values, "layers": np.asarray([0.0, 5.0, 1.0])}
    plan = by_shares(BERT, Scores("made up", found), Shares(layers=1, neurons=0.0), protect=(1, 1))
    assert plan.keep["layers"] == (0, 2)
    plan = by_shares(BERT, Scores("made up", found), Shares(neurons=0.25, heads=0.2), protect=(1, 1))
    whole = BERT.identity()
    assert all(
        plan.keep[f"layer.{i}.{kind}"] == whole[f"layer.{i}.{kind}"] for i in (0, 2) for kind in ("heads", "neurons")
    )
    assert len(plan.keep["layer.1.neurons"]) == 5


def test_query_heads_go_out_of_every_group() -> None:
    plan = by_shares(LLAMA, scores(LLAMA), Shares(queries=0.5))
    assert all(len(plan.keep[f"layer.{i}.queries"]) == 1 and len(plan.keep[f"layer.{i}.heads"]) == 2 for i in range(3))


@pytest.mark.parametrize(
    ("shares", "protect", "closest"),
    [
        (Shares(heads=0.9), (0, 0), 9 / 12),
        (Shares(layers=3), (0, 0), 2 / 3),
        (Shares(layers=2), (1, 1), 1 / 3),
        (Shares(neurons=0.5), (1, 1), 19 / 20),
    ],
)
def test_too_much_names_the_most(shares: Shares, protect: tuple[int, int], closest: float) -> None:
    with pytest.raises(InfeasibleBudget) as caught:
        by_shares(BERT, scores(), shares, protect=protect)
    assert caught.value.closest == pytest.approx(closest)


def test_scores_that_are_not_there_are_named() -> None:
    heads = {name: values for name, values in scores().values.items() if name.endswith("heads")}
    with pytest.raises(KeyError, match=r"no scores of layer.0.neurons"):
        by_shares(BERT, Scores("attention_entropy", heads), Shares(neurons=0.3))


@pytest.mark.parametrize("value", (-0.1, 1.5))
def test_shares_are_shares_or_numbers(value: float) -> None:
    with pytest.raises(ValueError, match="heads is"):
        Shares(heads=value)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("rounds", (1, 3, 5))
def test_a_schedule_rises_to_the_whole_share_of_the_original(schedule: str, rounds: int) -> None:
    totals = {"heads": 144, "queries": 0, "neurons": 1000, "layers": 12, "sublayers": 24}
    asked = Shares(heads=0.3, neurons=0.3, layers=3)
    steps = [asked.at(done, rounds, totals, schedule) for done in range(1, rounds + 1)]
    assert steps[-1] == Shares(heads=43, neurons=300, layers=3)
    for before, after in zip(steps, steps[1:], strict=False):
        assert all(after.named()[kind] >= value for kind, value in before.named().items())


def test_schedules_differ_as_they_should() -> None:
    totals = {"heads": 0, "queries": 0, "neurons": 1000, "layers": 0, "sublayers": 0}
    first = {name: Shares(neurons=0.5).at(1, 2, totals, name).neurons for name in SCHEDULES}
    assert first == {"linear": 250, "cubic": round(500 * 7 / 8), "exponential": round(1000 * (1 - 0.5**0.5))}


def test_published_collapse_points_are_said() -> None:
    keep = {**BERT.identity(), "layers": (0,)}
    assert not collapse_warnings(BERT, Plan(BERT.fingerprint, keep), generative=False)
    assert "67%" in collapse_warnings(BERT, Plan(BERT.fingerprint, keep), generative=True)[0]
    few = {**BERT.identity(), **{f"layer.{i}.heads": () for i in (0, 1)}, "layer.2.heads": (0,)}
    assert "92%" in collapse_warnings(BERT, Plan(BERT.fingerprint, few), generative=False)[0]
