"""When a bundle's claim holds where it is measured again."""

from __future__ import annotations

from typing import Any

import pytest

from paredown.pipeline._claim import holds, slower, worse
from paredown.types import Interval
from paredown.validation.quality import Drop


def claim(dial: str = "max_drop", value: float = 0.01) -> dict[str, Any]:
    return {
        "objective": {"dial": dial, "value": value, "max_drop": None},
        "quality_metric": "accuracy",
        "drop": {"value": 0.004, "low": 0.0, "high": 0.009},
        "speedup": {"value": 3.0, "low": 2.8, "high": 3.2},
    }


def drop(value: float, *, metric: str = "accuracy") -> Drop:
    return Drop(metric, 0.9, 0.9 - value, Interval(value, value - 0.003, value + 0.003), value + 0.002, 1000)


@pytest.mark.parametrize(
    ("lost", "gate", "said"),
    (
        (0.005, 0.01, ""),
        (0.009, 0.01, "the bound on the drop is 1.10 points, above 1 point"),
        (0.011, None, ""),  # it may be the claimed 0.009
        (0.013, None, "the drop is 1.30 points, and no more than 0.90 points was claimed"),
    ),
)
def test_quality(lost: float, gate: float | None, said: str) -> None:
    assert worse(claim(), drop(lost), gate) == said


def test_a_perplexity_is_told_in_percent() -> None:
    lost = drop(0.08, metric="log_likelihood")
    assert worse(claim(), lost, 0.05) == "the bound on the drop is 8.55 %, above 5 %"
    assert worse(claim(), lost, 0.09) == ""
    speedup = {"speedup": Interval(3.0, 2.8, 3.2)}
    assert holds(claim(), speedup, lost) == "The claim holds here: 3.00 times, perplexity +8.3 %."
    assert holds(claim(), speedup, drop(0.004)).endswith("3.00 times, −0.40 points of accuracy.")


def test_another_metric_is_not_judged_by_the_claim() -> None:
    assert worse(claim(), drop(0.5, metric="spearman"), None) == ""
    assert worse(claim(), drop(0.5, metric="spearman"), 0.01) != ""


@pytest.mark.parametrize(
    ("dial", "value", "speedup", "latency_ms", "said"),
    (
        ("max_drop", 0.01, 1.01, 9.0, ""),
        ("max_drop", 0.01, 0.99, 9.0, "no faster than the dense model (0.99 times)"),
        ("speedup", 2.0, 1.91, 9.0, ""),
        ("speedup", 2.0, 1.89, 9.0, "the speed-up is 1.89, below the 2 asked for"),
        ("latency_ms", 4.0, 0.5, 4.2, ""),
        ("latency_ms", 4.0, 9.0, 4.3, "the median latency is 4.30 ms, above the 4 asked for"),
    ),
)
def test_speed(dial: str, value: float, speedup: float, latency_ms: float, said: str) -> None:
    found = slower(claim(dial, value), Interval(speedup, speedup, speedup), latency_ms)
    assert found.endswith(said) and bool(found) == bool(said)


def test_a_speed_that_was_no_gain_is_not_asked_to_be_one() -> None:
    folded = claim() | {"speedup": {"value": 0.98, "low": 0.9, "high": 1.0}}
    assert slower(folded, Interval(0.9, 0.9, 0.9), 9.0) == ""


def test_a_lesser_speed_than_claimed_is_told() -> None:
    here = {"speedup": Interval(1.5, 1.4, 1.6)}
    assert "1.50 times (it was 3.00 where it was made)" in holds(claim(), here, drop(0.001))
    assert "where it was made" not in holds(claim(), {"speedup": Interval(2.9, 2.7, 3.1)}, drop(0.001))
