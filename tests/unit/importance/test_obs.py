"""Elimination against restricted ridge regressions solved directly. Legend: X inputs, D width, U units, S of a unit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from paredown.importance import Evidence, obs
from paredown.importance.obs import damped, eliminate
from paredown.types import Array


def problem(inputs: int, width: int = 5, *, rows: int = 200, seed: int = 0) -> tuple[Array, Array, Array]:
    """A Gram matrix with correlated inputs and the bias column, weights with the bias row, and a curvature."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, inputs)) @ (np.eye(inputs) + 0.3 * random.standard_normal((inputs, inputs)))
    x = np.concatenate([x + 0.5, np.ones((rows, 1))], axis=1)
    g = random.standard_normal((3 * width, width)) * np.arange(1, width + 1)
    return x.T @ x, random.standard_normal((inputs + 1, width)), g.T @ g / len(g)


def singles(count: int) -> Array:
    return np.arange(count)[:, None]


def rise(gram: Array, weight: Array, gone: Any, curvature: Array | None = None) -> float:
    """The least tr(C E' H E) over weights that are zero at `gone`, H damped and E the change: solved, not updated."""
    h = damped(gram)
    keep = np.setdiff1d(np.arange(len(h)), gone)
    best = np.zeros_like(weight)
    best[keep] = np.linalg.solve(h[np.ix_(keep, keep)], (h @ weight)[keep])
    e = best - weight
    c = np.eye(weight.shape[1]) if curvature is None else curvature
    c = c + (0 if curvature is None else 1e-3 * np.diagonal(c).mean() * np.eye(len(c)))
    return float(np.trace(c @ e.T @ h @ e))


@pytest.mark.parametrize("curved", (False, True))
@pytest.mark.parametrize("size", (1, 4))
def test_every_prefix_has_the_error_of_the_restricted_solution(size: int, curved: bool) -> None:
    gram, weight, curvature = problem(24)
    positions = np.random.default_rng(1).permutation(24).reshape(-1, size)
    c = curvature if curved else None
    found = eliminate(gram, weight, positions, curvature=c)
    assert sorted(found.order) == list(range(24 // size)) and found.errors[0] == 0
    for k in range(24 // size + 1):
        expected = rise(gram, weight, positions[found.order[:k]].ravel(), c)
        assert found.errors[k] == pytest.approx(expected, rel=1e-8, abs=1e-8), k


@pytest.mark.parametrize("curved", (False, True))
@pytest.mark.parametrize("size", (1, 3))
def test_each_step_takes_the_cheapest(size: int, curved: bool) -> None:
    gram, weight, curvature = problem(12, seed=2)
    positions = np.arange(12).reshape(-1, size)
    c = curvature if curved else None
    found = eliminate(gram, weight, positions, curvature=c)
    for k in range(12 // size):
        gone = list(found.order[:k])
        left = [u for u in range(len(positions)) if u not in gone]
        rises = [rise(gram, weight, positions[[*gone, u]].ravel(), c) for u in left]
        assert left[int(np.argmin(rises))] == found.order[k]


def test_curvature_changes_the_choice() -> None:
    """The unit with the large weights writes where nobody looks."""
    gram, weight, _ = problem(6)
    weight[:] = 0.0
    weight[0, 0], weight[1:, 1] = 10.0, 1.0
    curvature = np.diag([1e-6, 1.0, 0.0, 0.0, 0.0])
    assert eliminate(gram, weight, singles(6)).order[-1] == 0
    assert eliminate(gram, weight, singles(6), curvature=curvature).order[-1] != 0


def test_joint_steps_have_exact_errors_where_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight, curvature = problem(40)
    monkeypatch.setattr(obs, "STEPS", 7)  # steps of 6 units: 6, 12, ... 36, 40
    found = eliminate(gram, weight, singles(40), curvature=curvature)
    for k in (6, 12, 18, 36, 40):
        assert found.errors[k] == pytest.approx(rise(gram, weight, found.order[:k], curvature), rel=1e-8)
    assert sorted(found.order) == list(range(40)) and (np.diff(found.errors) >= 0).all()


def test_the_bias_is_refitted() -> None:
    """Constant inputs cost nothing: the bias takes over what they gave (up to the damping)."""
    x = np.random.default_rng(0).standard_normal((500, 4))
    x[:, 2:] = [2.0, 1.0]
    found = eliminate(x.T @ x, np.ones((4, 3)), singles(3))
    assert found.order[0] == 2 and found.errors[1] < 0.05 * found.errors[2]


def test_dead_inputs_go_first_whatever_their_weights() -> None:
    gram, weight, curvature = problem(10)
    dead = [2, 7]
    gram[dead] = 0
    gram[:, dead] = 0
    weight[dead] = 1e6
    found = eliminate(gram, weight, singles(10), curvature=curvature)
    assert set(found.order[:2]) == {2, 7} and found.errors[2] == 0
    weight[dead] = 0
    assert found.errors[-1] == pytest.approx(rise(gram, weight, list(range(10)), curvature), rel=1e-8)


def test_a_zeroed_unit_costs_nothing_in_a_joint_step(monkeypatch: pytest.MonkeyPatch) -> None:
    gram, weight, _ = problem(20)
    weight[13] = 0
    monkeypatch.setattr(obs, "STEPS", 2)
    found = eliminate(gram, weight, singles(20))
    assert found.order[0] == 13 and found.errors[1] == 0 and found.errors[2] > 0


@pytest.mark.parametrize("scale", (0.0, 1e-200, 1e-30, 1.0, 1e30, 1e200))
@pytest.mark.parametrize("size", (1, 2))
def test_singular_and_extreme_grams(scale: float, size: int) -> None:
    """Two hundred inputs from three rows, duplicates among them, at any scale."""
    random = np.random.default_rng(0)
    x = random.standard_normal((3, 200))
    x[:, 100:] = x[:, :100]
    x = np.concatenate([x, np.ones((3, 1))], axis=1)
    weight = random.standard_normal((201, 4))
    found = eliminate(x.T @ x * scale, weight, np.arange(200).reshape(-1, size), curvature=np.zeros((4, 4)))
    assert sorted(found.order) == list(range(200 // size))
    assert np.isfinite(found.errors).all() and (np.diff(found.errors) >= 0).all()
    reference = eliminate(x.T @ x, weight, np.arange(200).reshape(-1, size))
    np.testing.assert_allclose(found.errors, reference.errors * scale, rtol=1e-4)


def test_long_runs_do_not_drift() -> None:
    """90 single updates of an ill-conditioned inverse, against the direct solution near the end."""
    gram, weight, _ = problem(90, rows=60, seed=3)
    found = eliminate(gram, weight, singles(90))
    for k in (45, 80, 89, 90):
        assert found.errors[k] == pytest.approx(rise(gram, weight, found.order[:k]), rel=1e-6)


def evidence(units: int, *, seed: int = 0) -> Evidence:
    gram, weight, curvature = problem(units, seed=seed)
    return Evidence(
        singles(units), weight[:-1], weight[-1], np.zeros((units, 1)), texts=8, gram=gram, curvature=curvature
    )


def test_scores_rank_units_in_the_order_of_elimination() -> None:
    one = evidence(30)
    values = obs.score(one)
    weight = np.concatenate([one.outgoing, one.bias[None]])
    found = eliminate(one.gram, weight, one.positions, curvature=one.curvature)
    np.testing.assert_array_equal(np.argsort(values), found.order)
    lost = np.concatenate([[0], np.cumsum(np.sort(values))]) * 8
    np.testing.assert_allclose(lost[-1], found.errors[-1], rtol=1e-6)
    assert (lost <= found.errors * (1 + 1e-6) + 1e-9).all()


def test_a_removal_cheaper_than_the_one_before_does_not_raise_the_rest() -> None:
    """Two units that cancel each other: the second costs nothing once the first is gone."""
    random = np.random.default_rng(0)
    x = random.standard_normal((300, 4))
    x[:, 1] = x[:, 0] + 0.01 * random.standard_normal(300)
    x = np.concatenate([x, np.ones((300, 1))], axis=1)
    weight = np.asarray([[3.0], [-3.0], [20.0], [30.0], [0.0]])
    one = Evidence(singles(4), weight[:-1], weight[-1], np.zeros((4, 1)), texts=1, gram=x.T @ x)
    found = eliminate(one.gram, weight, one.positions)
    assert np.diff(found.errors)[1] < np.diff(found.errors)[0]
    assert np.sort(obs.score(one)).sum() == pytest.approx(found.errors[-1], rel=1e-6)
    assert list(np.argsort(obs.score(one))) == list(found.order)
