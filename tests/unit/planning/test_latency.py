from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paredown.anatomy import describe
from paredown.planning import fit_latency, latency_costs, latency_probes
from paredown.planning._latency import levels, rising
from paredown.types import Limits
from tests.contracts.families import tiny

LAYERS, HEADS, NEURONS = 6, 12, 1536
PROBES = latency_probes(LAYERS, HEADS, NEURONS, Limits(multiple_of=16))


def seconds(widths: tuple[tuple[int, int], ...]) -> float:
    """An additive machine: something fixed, something per layer, and a last layer that is cheaper."""
    total = 3.0
    for i, (heads, neurons) in enumerate(widths):
        work = 0.05 * heads + 0.4 * (heads > 0) + 0.002 * neurons + 0.1 * (neurons > 0)
        total += 0.3 * work if i == len(widths) - 1 else 0.25 + work
    return total


def test_probes_are_few_and_hold_the_full_model() -> None:
    widths = len({one[0][0] for one in PROBES}) + len({one[0][1] for one in PROBES})
    assert len(PROBES) == len(set(PROBES)) == 2 * (widths - 1)
    assert {0, HEADS} < {one[0][0] for one in PROBES} and {0, NEURONS} < {one[0][1] for one in PROBES}
    assert ((HEADS, NEURONS),) * LAYERS in PROBES and ((HEADS, NEURONS),) in PROBES
    assert {len(widths) for widths in PROBES} == {1, LAYERS}
    assert all(len(set(widths)) == 1 and widths[0][1] % 16 == 0 for widths in PROBES)


def test_levels_are_what_the_target_likes() -> None:
    shares = (1, 0.75, 0.5, 0.25, 0.125, 0)
    assert levels(1536, 16, shares) == (1536, 1152, 768, 384, 192, 0)
    assert levels(20, 16, shares) == (20, 16, 0)
    assert levels(100, 32, shares) == (100, 64, 32, 0)
    assert levels(1, 1, shares) == (1, 0)
    assert levels(12, 1, shares) == (12, 9, 6, 3, 2, 0)


@pytest.mark.parametrize(
    "widths",
    [
        *PROBES,
        ((12, 1536), (6, 768), (0, 384), (6, 0), (0, 0), (3, 384)),
        ((12, 1536), (6, 768), (3, 384)),
        ((0, 0), (0, 0)),
        ((7, 1000), (5, 500), (11, 1300)),  # between the widths measured, where this machine is linear
    ],
)
def test_an_additive_machine_is_recovered_exactly(widths: tuple[tuple[int, int], ...]) -> None:
    table = fit_latency(seconds, PROBES)
    assert table.predict(widths) == pytest.approx(seconds(widths), rel=1e-9)
    twice = fit_latency(lambda one: 2 * seconds(one), PROBES)
    assert twice.predict(widths) == pytest.approx(2 * seconds(widths), rel=1e-9)


def test_one_layer_models() -> None:
    table = fit_latency(seconds, latency_probes(1, HEADS, NEURONS, Limits()))
    for widths in (((12, 1536),), ((6, 768),), ((0, 0),)):
        assert table.predict(widths) == pytest.approx(seconds(widths), rel=1e-9)


def test_noise_keeps_the_table_monotone_and_near() -> None:
    for seed in range(20):
        random = np.random.default_rng(seed)
        noisy = {widths: seconds(widths) * (1 + 0.05 * random.standard_normal()) for widths in PROBES}
        table = fit_latency(noisy.__getitem__, PROBES)
        for last in (False, True):
            for kind, full in (("heads", HEADS), ("neurons", NEURONS)):
                costs = [table.cost(kind, width, last=last) for width in range(full + 1)]
                assert costs[0] >= 0 and (np.diff(costs) >= 0).all()
        full = ((HEADS, NEURONS),) * LAYERS
        assert table.predict(full) == pytest.approx(noisy[full], rel=1e-9)


def test_narrower_than_measured_costs_what_was_measured() -> None:
    table = fit_latency(seconds, PROBES)
    least = min(one[0][1] for one in PROBES if one[0][1])
    assert table.cost("neurons", 16, last=False) == table.cost("neurons", least, last=False)


def test_rising_is_the_isotonic_fit() -> None:
    np.testing.assert_allclose(rising(np.asarray([1.0, 3.0, 2.0, 4.0])), [1, 2.5, 2.5, 4])
    np.testing.assert_allclose(rising(np.asarray([3.0, 2.0, 1.0])), [2, 2, 2])
    np.testing.assert_allclose(rising(np.asarray([0.0, 9.0, 1.0, 2.0, 8.0])), [0, 4, 4, 4, 8])


def test_costs_of_a_model() -> None:
    anatomy = describe(tiny("bert"))
    table = fit_latency(seconds, latency_probes(3, 4, 20, Limits(multiple_of=5)))
    costs = latency_costs(anatomy, table)
    assert costs.dense == pytest.approx(seconds(((4, 20),) * 3))
    kept = costs.fixed + costs.group["layer.0.heads"][2] + costs.group["layer.0.neurons"][10]
    kept += sum(costs.group[f"layer.{i}.heads"][0] + costs.group[f"layer.{i}.neurons"][5] for i in (1, 2))
    assert kept == pytest.approx(seconds(((2, 10), (0, 5), (0, 5))))


def test_the_scale_corrects_everything() -> None:
    table = replace(fit_latency(seconds, PROBES), scale=1.1)
    widths = ((6, 768),) * 4
    assert table.predict(widths) == pytest.approx(1.1 * seconds(widths))
    anatomy = describe(tiny("bert"))
    small = replace(fit_latency(seconds, latency_probes(3, 4, 20, Limits())), scale=1.1)
    assert latency_costs(anatomy, small).dense == pytest.approx(1.1 * seconds(((4, 20),) * 3))
