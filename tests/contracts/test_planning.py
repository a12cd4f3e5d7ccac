"""What every allocator, every public file of planning/, must pass."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown import registry
from paredown.anatomy import describe
from paredown.errors import InfeasibleBudget, ParedownError
from paredown.planning import Costs, arithmetic, knapsack, plan
from paredown.planning.knapsack import solve
from paredown.types import Anatomy, Budget, Limits, Scores
from tests.contracts.families import FAMILIES, tiny

ALLOCATORS = registry.available("planning")
ANATOMY = describe(tiny("bert"))
EVERY = pytest.mark.parametrize("allocator", ALLOCATORS)
LIMITS = (
    Limits(),
    Limits(multiple_of=8),
    Limits(allowed=("neuron",)),
    Limits(allowed=("head",)),
    Limits(uniform=True),
    Limits(uniform=True, multiple_of=3, allowed=("neuron", "layer")),
)


def cuttable(anatomy: Anatomy) -> list[str]:
    return [group.name for group in anatomy.groups if group.kind != "layer"]


def random_scores(anatomy: Anatomy, seed: int = 0, *, dead: bool = False) -> Scores:
    random = np.random.default_rng(seed)
    values = {name: random.exponential(size=anatomy.group(name).units) for name in cuttable(anatomy)}
    if dead:
        for one in values.values():
            one[random.random(len(one)) < 0.3] = 0
    return Scores("random", values)


def bumpy_costs(anatomy: Anatomy, seed: int = 0) -> Costs:
    """Never falling costs with plateaus and jumps, as a machine shows them, and a part that no plan can change."""
    random = np.random.default_rng(seed)
    group = {}
    for name in cuttable(anatomy):
        rises = random.exponential(size=anatomy.group(name).units) * (random.random(anatomy.group(name).units) < 0.4)
        group[name] = np.concatenate([[0.0], np.cumsum(rises)]) + random.random()
    return Costs(1.7, group)


def cost_of(costs: Costs, keep: dict[str, tuple[int, ...]]) -> float:
    return costs.fixed + sum(float(cost[len(keep[name])]) for name, cost in costs.group.items())


def respected(anatomy: Anatomy, keep: dict[str, tuple[int, ...]], limits: Limits, *, uniform: bool) -> None:
    for name in cuttable(anatomy):
        group, units = anatomy.group(name), keep[name]
        assert list(units) == sorted(set(units)) and all(0 <= unit < group.units for unit in units)
        if group.kind not in limits.allowed:
            assert len(units) == group.units
        if group.kind == "neuron" and len(units) < group.units:
            assert len(units) % limits.multiple_of == 0
    if uniform:
        for kind in ("heads", "neurons"):
            assert len({len(units) for name, units in keep.items() if name.endswith(kind)}) == 1


def test_the_first_allocators_are_there() -> None:
    assert {"knapsack", "ranking", "uniform"} <= set(ALLOCATORS)


@EVERY
@pytest.mark.parametrize("limits", LIMITS)
def test_the_budget_is_met_or_the_closest_is_named(allocator: str, limits: Limits) -> None:
    for seed, (metric, share) in enumerate(itertools.product(("params", "macs", "latency"), (0.9, 0.5, 0.2, 0.01))):
        costs = bumpy_costs(ANATOMY, seed) if metric == "latency" else arithmetic(ANATOMY, metric)
        scores = random_scores(ANATOMY, seed, dead=seed % 2 == 1)
        budget = Budget(metric, share)
        try:
            found = plan(ANATOMY, scores, budget, limits, allocator=allocator, costs=costs)
        except InfeasibleBudget as error:
            assert share * costs.dense < error.closest <= costs.dense
            assert f"{error.closest:.6g}" in str(error)
            narrow = Budget(metric, error.closest / costs.dense)
            found = plan(ANATOMY, scores, narrow, limits, allocator=allocator, costs=costs)
            assert cost_of(costs, dict(found.keep)) == pytest.approx(error.closest)
        else:
            assert cost_of(costs, dict(found.keep)) <= share * costs.dense * (1 + 1e-8)
        assert found.fingerprint == ANATOMY.fingerprint and found.keep["layers"] == (0, 1, 2)
        respected(ANATOMY, dict(found.keep), limits, uniform=allocator == "uniform")


@EVERY
@pytest.mark.parametrize("family", FAMILIES)
def test_the_identity_budget_gives_the_identity_plan(allocator: str, family: str) -> None:
    anatomy = describe(tiny(family))
    for seed in range(3):
        for costs in (bumpy_costs(anatomy, seed), arithmetic(anatomy, "params"), arithmetic(anatomy, "macs")):
            for limits in LIMITS:
                scores = random_scores(anatomy, seed, dead=True)
                found = plan(anatomy, scores, Budget("latency", 1.0), limits, allocator=allocator, costs=costs)
                assert found.keep == anatomy.identity()


@EVERY
def test_the_best_units_stay(allocator: str) -> None:
    scores = random_scores(ANATOMY)
    found = plan(ANATOMY, scores, Budget("params", 0.5), allocator=allocator)
    for name in cuttable(ANATOMY):
        kept = list(found.keep[name])
        gone = [unit for unit in range(ANATOMY.group(name).units) if unit not in kept]
        if kept and gone:
            assert scores.values[name][kept].min() >= scores.values[name][gone].max()


@EVERY
def test_one_dear_group_is_spared(allocator: str) -> None:
    values = dict(random_scores(ANATOMY).values)
    for name in values:
        if name.endswith("heads"):
            values[name] = values[name] + 1000.0
    found = plan(ANATOMY, Scores("planted", values), Budget("params", 0.8), allocator=allocator)
    assert all(len(found.keep[f"layer.{i}.heads"]) == 4 for i in range(3))
    assert sum(len(found.keep[f"layer.{i}.neurons"]) for i in range(3)) < 60


@EVERY
def test_a_step_that_saves_nothing_hides_no_later_one(allocator: str) -> None:
    """A plateau down to nothing: only dropping the whole sub-layer saves."""
    flat = {name: np.where(np.arange(ANATOMY.group(name).units + 1) > 0, 1.0, 0.0) for name in cuttable(ANATOMY)}
    found = plan(ANATOMY, random_scores(ANATOMY), Budget("latency", 0.5), allocator=allocator, costs=Costs(0.0, flat))
    assert sum(bool(units) for name, units in found.keep.items() if name != "layers") == 3


@EVERY
def test_a_minimum_is_kept(allocator: str) -> None:
    groups = tuple(replace(group, minimum=max(group.minimum, 2)) for group in ANATOMY.groups)
    anatomy = replace(ANATOMY, groups=groups)
    with pytest.raises(InfeasibleBudget) as caught:
        plan(anatomy, random_scores(anatomy), Budget("params", 1e-6), allocator=allocator)
    costs = arithmetic(anatomy, "params")
    assert caught.value.closest == pytest.approx(sum(float(cost[2]) for cost in costs.group.values()))


@EVERY
def test_a_model_whose_layers_differ(allocator: str) -> None:
    anatomy = describe(tiny("bert"))
    widths = {"layer.1.heads": 0, "layer.2.neurons": 12}
    groups = tuple(replace(g, units=widths.get(g.name, g.units)) for g in anatomy.groups)
    anatomy = replace(anatomy, groups=groups)
    found = plan(anatomy, random_scores(anatomy), Budget("params", 0.5), allocator=allocator)
    respected(anatomy, dict(found.keep), Limits(), uniform=allocator == "uniform")


def test_layers_that_share_no_width_cannot_be_made_uniform() -> None:
    groups = tuple(replace(g, units=12 if g.name == "layer.2.neurons" else g.units) for g in ANATOMY.groups)
    anatomy = replace(ANATOMY, groups=groups)
    with pytest.raises(ParedownError, match="different numbers of neurons"):
        plan(anatomy, random_scores(anatomy), Budget("params", 0.5), Limits(uniform=True, allowed=("head",)))


def test_the_default_allocators() -> None:
    scores = random_scores(ANATOMY)
    assert "by knapsack" in plan(ANATOMY, scores, Budget("params", 0.5)).source
    assert "by uniform" in plan(ANATOMY, scores, Budget("params", 0.5), Limits(uniform=True)).source


def test_latency_needs_a_table() -> None:
    with pytest.raises(ValueError, match="pass costs="):
        plan(ANATOMY, random_scores(ANATOMY), Budget("latency", 0.5))


def test_parameters_are_counted_right() -> None:
    """One head of 6 at width 24: q, k, v rows with biases, and columns of the output; one neuron likewise."""
    costs = arithmetic(ANATOMY, "params")
    assert costs.group["layer.0.heads"][1] == 3 * (6 * 24 + 6) + 24 * 6
    assert costs.group["layer.0.neurons"][1] == 24 + 1 + 24
    assert arithmetic(ANATOMY, "macs", tokens=10).group["layer.0.neurons"][1] == 2 * 24 * 10


# ------------------------------------------------------------------------------------------------ the knapsack's solver

LEVELS = st.lists(st.tuples(st.floats(0, 100), st.floats(0, 10)), min_size=1, max_size=5)
PROBLEMS = st.lists(LEVELS, min_size=1, max_size=4)


@given(problem=PROBLEMS, share=st.floats(0, 1.2))
def test_small_problems_are_solved_exactly(problem: list[list[tuple[float, float]]], share: float) -> None:
    costs = [np.asarray([cost for cost, _ in levels]) for levels in problem]
    errors = [np.asarray([error for _, error in levels]) for levels in problem]
    budget = share * sum(float(cost.max()) for cost in costs)
    choices = list(itertools.product(*(range(len(levels)) for levels in problem)))
    spent = [sum(float(cost[i]) for cost, i in zip(costs, choice, strict=True)) for choice in choices]
    lost = [sum(float(error[i]) for error, i in zip(errors, choice, strict=True)) for choice in choices]
    fits = [error for cost, error in zip(spent, lost, strict=True) if cost <= budget * (1 + 1e-9)]
    if not fits:
        with pytest.raises(InfeasibleBudget) as caught:
            solve(costs, errors, budget)
        assert caught.value.closest == pytest.approx(min(spent))
        return
    levels = solve(costs, errors, budget)
    assert sum(float(cost[i]) for cost, i in zip(costs, levels, strict=True)) <= budget * (1 + 2e-9)
    assert sum(float(error[i]) for error, i in zip(errors, levels, strict=True)) <= min(fits) + 1e-9


def test_a_tight_budget_is_met_however_few_pairs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest choice alone fits; beside it, in its class of costs, lies a better pair that leads nowhere."""
    monkeypatch.setattr(knapsack, "WORK", 0)
    random = np.random.default_rng(0)
    costs = [np.sort(random.random(600)) for _ in range(3)]
    errors = [np.sort(random.random(600))[::-1] for _ in range(3)]
    costs[0][1] = costs[0][0] + 1e-6
    costs[2] += 10  # what the last group needs at least must be set aside from the start
    assert solve(costs, errors, sum(float(cost[0]) for cost in costs)) == (0, 0, 0)


def test_large_problems_keep_the_promise_and_lose_little() -> None:
    """24 groups of 97 levels, with costs that never coincide: checked against the bound of the convex relaxation."""
    random = np.random.default_rng(0)
    costs = [np.concatenate([[0.0], np.cumsum(random.random(96))]) for _ in range(24)]
    errors = [np.concatenate([np.cumsum(np.sort(random.exponential(size=96)))[::-1], [0.0]]) for _ in range(24)]
    budget = 0.4 * sum(cost[-1] for cost in costs)
    levels = solve(costs, errors, budget)
    assert sum(cost[i] for cost, i in zip(costs, levels, strict=True)) <= budget * (1 + 1e-9)
    found = sum(error[i] for error, i in zip(errors, levels, strict=True))
    bound = max(
        sum(float((error + price * cost).min()) for cost, error in zip(costs, errors, strict=True)) - price * budget
        for price in np.linspace(0, 5, 501)
    )
    assert bound <= found <= bound * 1.01
