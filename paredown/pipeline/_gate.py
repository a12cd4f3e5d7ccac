"""Which candidate is the answer: timed together, then judged on the guardrail texts, fastest first."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np

from paredown.pipeline._candidates import BASELINE, Candidate
from paredown.pipeline._settings import Progress, Settings
from paredown.types import Array, Interval
from paredown.validation.quality import Drop, paired_drop, passes
from paredown.validation.timing import Timing, latency_ratio, measure, ratio

ROUNDS = 11
SECONDS = 20.0  # of the final timing at most, once three rounds are done,
SECONDS_PER_MINUTE = 2.0  # and so much more for every minute of training, up to twenty
TOLERANCE = 0.95  # of a speed target: what counts as reaching it


class Subject(Protocol):
    """What is judged: a dense model with its splits, of texts or of pictures."""

    @property
    def task(self) -> Any:
        """The task's module."""

    @property
    def anatomy(self) -> Any:
        """With the `family`."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of the data."""

    @property
    def splits(self) -> Any:
        """With `guardrail` and `test`."""

    @property
    def together(self) -> int:
        """How many processes that time its candidates may be alive at once."""

    def timing(self) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
        """Batches and single examples to time with."""

    def answers(self, candidate: Candidate, part: str, threads: int | None) -> Array:
        """A candidate's outputs [N, ...] on the "guardrail" or "test" examples."""

    def dense_answers(self, part: str) -> Array:
        """The dense model's own."""


@dataclass(frozen=True)
class Judged:
    """A candidate with its time and, where it was tried, its drop on the guardrail texts.

    `passed` is None for a candidate that was not tried.
    """

    candidate: Candidate
    timing: Timing | None
    speedup: Interval | None
    drop: Drop | None = None
    passed: bool | None = None
    reason: str = ""

    @property
    def seconds(self) -> float:
        return float(np.median(self.timing.offline_seconds)) if self.timing else float("inf")


def timed(
    candidates: Sequence[Candidate], prepared: Subject, settings: Settings, progress: Progress
) -> tuple[list[Judged], Candidate]:
    """All candidates timed in one interleaved run, and the fastest dense fp32 one, which speed-ups are against.

    The first of them should be that one, as far as is known: see `measure`'s `together`.
    """
    batches, singles = prepared.timing()
    runnable = [c for c in candidates if c.alternative is not None]
    progress.stage(f"Timing {len(runnable)} candidates, interleaved", ROUNDS)
    timings = measure(
        [c.alternative for c in runnable if c.alternative is not None],
        batches,
        singles=singles,
        rounds=ROUNDS,
        threads=settings.threads,
        seconds=SECONDS + SECONDS_PER_MINUTE * min(settings.minutes, 20),
        together=prepared.together,
        progress=lambda done, of: progress.advance(ROUNDS / of),
    )
    by_name = {c.name: timings[c.alternative.name] for c in runnable if c.alternative is not None}
    dense = [c for c in runnable if c.kind == BASELINE]
    fastest = min(dense, key=lambda c: float(np.median(by_name[c.name].offline_seconds)))
    judged = [
        Judged(c, by_name.get(c.name), ratio(by_name[fastest.name], by_name[c.name]) if c.name in by_name else None)
        for c in candidates
    ]
    return judged, fastest


def timed_control(judged: Judged, texts: Sequence[str], baseline: Timing) -> Judged:
    """A control that reads texts itself, timed here on the same number of texts."""
    sample = list(texts)[: baseline.texts]
    predictor = judged.candidate.predictor
    predictor.predict_logits(sample[:8])
    seconds = []
    for _ in range(len(baseline.offline_seconds)):
        begun = time.perf_counter()
        predictor.predict_logits(sample)
        seconds.append(time.perf_counter() - begun)
    singles = []
    for text in sample[:40]:
        begun = time.perf_counter()
        predictor.predict_logits([text])
        singles.append((time.perf_counter() - begun) * 1e3)
    rounds = len(seconds)
    timing = Timing(judged.candidate.name, np.asarray(seconds), np.tile(singles, (rounds, 1)), len(sample))
    return Judged(judged.candidate, timing, ratio(baseline, timing))


def judge(
    judged: Sequence[Judged],
    prepared: Subject,
    settings: Settings,
    reference: Array,
    progress: Progress,
) -> list[Judged]:
    """Every candidate with its verdict: the guardrail texts decide, fastest first, and the first to pass ends it.

    With a quality budget, those slower than the one that passed are not tried. With a speed dial all that are fast
    enough are tried, since the best of them is wanted.
    """
    order = sorted((j for j in judged if j.candidate.eligible), key=lambda j: j.seconds)
    progress.stage("Judging on the guardrail texts", len(order))
    verdicts: dict[str, Judged] = {}
    done = False
    for one in order:
        if done:
            verdicts[one.candidate.name] = replace(one, reason="not tried: a faster one passed")
            continue
        slow = too_slow(one, settings)
        if slow:
            verdicts[one.candidate.name] = replace(one, reason=f"not tried: {slow}")
            continue
        drop = drop_of(one.candidate, prepared, settings, reference)
        gate = settings.gate
        passed = True if gate is None else passes(drop, gate)
        verdicts[one.candidate.name] = replace(one, drop=drop, passed=passed)
        progress.advance(note=one.candidate.name)
        done = passed and settings.dial == "max_drop"
    for one in judged:
        if not one.candidate.eligible:
            measured = None if one.candidate.kind == BASELINE else drop_of(one.candidate, prepared, settings, reference)
            fine = None if measured is None or settings.gate is None else passes(measured, settings.gate)
            verdicts[one.candidate.name] = replace(one, drop=measured, passed=fine)
    return [verdicts[j.candidate.name] for j in judged]


def pictured(
    judged: Sequence[Judged], prepared: Subject, settings: Settings, reference: Array, progress: Progress
) -> list[Judged]:
    """The drop of those that were not tried too, now that all is decided: so that the report shows every candidate."""
    progress.stage("Measuring the others for the report", len(judged))
    shown = []
    for one in judged:
        progress.advance()
        if one.drop is None:
            exact = one.candidate.kind in (BASELINE, "folded", "whole")
            outputs = reference if exact else None
            one = replace(one, drop=drop_of(one.candidate, prepared, settings, reference, outputs=outputs))
        shown.append(one)
    return shown


def chosen(judged: Sequence[Judged], settings: Settings) -> Judged | None:
    """The fastest that passed; with a speed dial, of those that are fast enough the one that loses least."""
    passed = [j for j in judged if j.candidate.eligible and j.passed]
    if not passed:
        return None
    if settings.dial in ("max_drop", "amount"):
        return min(passed, key=lambda j: j.seconds)
    return min(passed, key=lambda j: (j.drop.bound if j.drop else 0.0, j.seconds))


def closest(judged: Sequence[Judged], settings: Settings) -> Judged:
    """Of those that did not pass, the one that missed by least: in quality if it was tried, else in speed."""
    eligible = [j for j in judged if j.candidate.eligible]
    pruned = [j for j in eligible if j.candidate.kind not in ("folded", "whole")] or eligible
    tried = [j for j in pruned if j.drop is not None]
    if tried:
        return min(tried, key=lambda j: j.drop.bound if j.drop else float("inf"))
    return min(pruned, key=lambda j: j.seconds)


def too_slow(one: Judged, settings: Settings) -> str:
    """Why a candidate misses the speed dial; empty if it does not, or if quality is the dial."""
    if settings.speedup is not None and one.speedup is not None:
        reached = one.speedup.value
        return "" if reached >= TOLERANCE * settings.speedup else f"{reached:.2f} times is too slow"
    if settings.dial == "latency_ms" and settings.latency_ms is not None and one.timing is not None:
        p50 = one.timing.latency_ms_p50
        return "" if p50 <= settings.latency_ms / TOLERANCE else f"{p50:.2f} ms is too slow"
    return ""


def drop_of(
    candidate: Candidate, prepared: Subject, settings: Settings, reference: Array, *, outputs: Array | None = None
) -> Drop:
    """The candidate's drop on the guardrail texts, paired with the dense model's answers `reference`.

    `outputs` are its answers where they are known already.
    """
    data = prepared.splits.guardrail
    if outputs is None:
        outputs = prepared.answers(candidate, "guardrail", settings.threads)
    return paired_drop(prepared.task, reference, outputs, data, confidence=settings.confidence, seed=settings.seed)


def as_row(one: Judged, baseline: Timing) -> Mapping[str, Any]:
    """The candidate as a row of the report."""
    timing, drop = one.timing, one.drop
    return {
        "name": one.candidate.name,
        "kind": one.candidate.kind,
        "target": one.candidate.target,
        "precision": one.candidate.precision,
        "parameters": one.candidate.parameters,
        "texts_per_second": timing.texts_per_second if timing else None,
        "latency_ms_p50": timing.latency_ms_p50 if timing else None,
        "latency_ms_p90": timing.latency_ms_p90 if timing else None,
        "speedup": one.speedup,
        "latency_speedup": latency_ratio(baseline, timing) if timing else None,
        "quality": drop.pruned if drop else None,
        "drop": drop.interval if drop else None,
        "bound": drop.bound if drop else None,
        "passed": one.passed,
        "chosen": False,
        "note": one.reason or one.candidate.note,
    }
