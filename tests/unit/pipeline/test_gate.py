"""Which candidate is the answer, on made-up times and answers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from paredown.pipeline import Settings, Silent
from paredown.pipeline._candidates import Candidate
from paredown.pipeline._gate import Judged, chosen, closest, judge
from paredown.tasks import TextData, text_classification
from paredown.types import Array, Interval
from paredown.validation.timing import Timing

COUNT = 1000
LABELS = np.zeros(COUNT, dtype=np.int64)
REFERENCE = np.tile([1.0, 0.0], (COUNT, 1))  # all right


class Made(Candidate):
    """A candidate that answers so many of the texts wrongly."""

    def outputs(self, *_: Any) -> Array:
        assert isinstance(self.model, int), f"{self.name} was tried"
        wrong = np.tile([0.0, 1.0], (COUNT, 1))
        return np.where(np.arange(COUNT)[:, None] < self.model, wrong, REFERENCE)


def made(name: str, speed: float, wrong: int | None, *, eligible: bool = True, kind: str = "pruned") -> Judged:
    candidate = Made(name, kind, "onnxruntime", "fp32", None, model=wrong, eligible=eligible)
    timing = Timing(name, np.full(5, 1 / speed), np.full((5, 2), 10 / speed), COUNT)
    return Judged(candidate, timing, Interval(speed, speed, speed))


def verdicts(judged: list[Judged], **dial: Any) -> tuple[dict[str, Judged], Settings]:
    settings = Settings("m", "d", None, "o", **dial)
    data = TextData(("x",) * COUNT, LABELS)
    prepared: Any = SimpleNamespace(
        task=text_classification,
        splits=SimpleNamespace(guardrail=data),
        answers=lambda candidate, part, threads: candidate.outputs(),
    )
    found = judge(judged, prepared, settings, REFERENCE, Silent())
    assert [one.candidate.name for one in found] == [one.candidate.name for one in judged]
    return {one.candidate.name: one for one in found}, settings


def test_the_fastest_that_passes_is_taken_and_slower_ones_are_not_tried() -> None:
    found, settings = verdicts(
        [made("slow", 1.5, None), made("bold", 5.0, 30), made("right", 3.0, 2), made("dense", 1.0, 0, kind="dense")],
        max_drop=0.01,
    )
    best = chosen(list(found.values()), settings)
    assert best is found["right"] and found["bold"].passed is False
    assert found["slow"].passed is None and found["slow"].reason == "not tried: a faster one passed"


def test_a_candidate_for_another_target_is_measured_and_never_taken() -> None:
    found, settings = verdicts([made("other", 9.0, 0, eligible=False), made("ours", 2.0, 1)], max_drop=0.01)
    assert found["other"].passed is True
    assert chosen(list(found.values()), settings) is found["ours"]


def test_with_a_speed_dial_the_one_that_loses_least_of_those_fast_enough_is_taken() -> None:
    found, settings = verdicts(
        [made("slow", 1.8, None), made("good", 2.0, 3), made("fast", 4.0, 20), made("nearly", 1.95, 10)], speedup=2.0
    )
    assert chosen(list(found.values()), settings) is found["good"]
    assert "1.80 times is too slow" in found["slow"].reason and found["nearly"].drop is not None


@pytest.mark.parametrize("dial", ({"speedup": 2.0}, {"latency_ms": 5.0}))
def test_a_gate_beside_a_speed_dial_is_asked_of_all(dial: dict[str, float]) -> None:
    found, settings = verdicts([made("good", 2.0, 30), made("fast", 4.0, 40)], max_drop=0.01, **dial)
    assert chosen(list(found.values()), settings) is None
    assert closest(list(found.values()), settings) is found["good"]
