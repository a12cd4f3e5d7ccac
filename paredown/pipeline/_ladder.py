"""Which smaller models a run tries: a ladder from careful to bold, by the dial, the task and the minutes.

Students cost training time, and the gate decides among them; so the ladder has few rungs, spread over what has been
seen to pass. A classifier's accuracy cannot be told beforehand: its rungs are speeds. An embedder's drop is a
divergence, which the scores predict: its rungs are shares of the drop that is allowed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paredown.errors import InfeasibleBudget
from paredown.pipeline._candidates import student_candidates
from paredown.pipeline._settings import Settings
from paredown.pipeline._students import Student, Workshop, drop_layers, spread
from paredown.types import Plan

LAYER_DROP_SHARE = 0.15  # of the minutes, for what anybody can script; the students share the rest
MARGIN = 1.05  # a speed that is promised is planned for with this much to spare: what machines drift from run to run

HOPELESS = 0.8  # of the speed asked for: what the fastest student misses by more is not a matter of noise
WORTH_IT = 0.97  # of the next slower time: who takes longer is not tried

# Speed-ups of a classifier before int8. On BANKING77 the boldest passed after 20 minutes, 1.3 times without training.
REFITTED = (1.3, 1.6, 2.0)
DISTILLED = (3.0, 4.5, 7.0)  # one for each minute
BRIEFLY_DISTILLED = 1.5  # with less than a minute: what is cut deeper does not come back in that time

# Predicted divergence of an embedder, in shares of the allowed drop: re-fitting leaves 1.2 times the prediction, five
# minutes of distillation take a third of that away, and int8 needs its part (all-MiniLM-L6-v2: 0.007).
REFITTED_ERRORS = (0.35, 0.7)
DISTILLED_ERRORS = (0.6, 1.2)
SPEARMAN_PER_COSINE = 0.3  # of the drops: 0.0022 on STS-B against 0.0074, all-MiniLM-L6-v2 in int8


@dataclass(frozen=True)
class Rung:
    """A student to make: the time it may take, the minutes that it learns, whether all layers stay.

    `as_measured`: the time is a goal, to be reached when measured too. Otherwise it is what the table says of the plan
    that loses as much as it may, and that plan is taken.
    """

    name: str
    seconds: float
    minutes: float = 0.0
    every_layer: bool = True
    as_measured: bool = True


def make(shop: Workshop, dense_seconds: float) -> list[Student]:
    """All students of a run; `dense_seconds` are the fastest dense model's, which speed-ups are promised against."""
    settings = shop.settings
    students: list[Student] = []
    for rung in _rungs(shop, dense_seconds):
        try:
            plan, predictions = _planned(shop, rung)
            missed = min(one["measured_ms"] for one in predictions) > shop.milliseconds * rung.seconds / HOPELESS
        except InfeasibleBudget as error:
            if settings.dial == "max_drop":
                continue
            missed = True  # in int8 it may still reach the target
            rung = Rung("as fast as pruning goes", error.closest * 1.01, rung.minutes, rung.every_layer)
            plan, predictions = _planned(shop, rung)
        if missed and rung.minutes and settings.dial != "max_drop":
            _check_reach(shop, rung.name, plan, dense_seconds)
        student = shop.refit(rung.name, plan, predictions=predictions)
        students.append(shop.distilled(student, rung.minutes) if rung.minutes else student)
    if settings.minutes:
        students += _layer_drop(shop, students)
    return students


def _rungs(shop: Workshop, dense_seconds: float) -> list[Rung]:
    settings = shop.settings
    trained = settings.minutes * (1 - LAYER_DROP_SHARE)
    if settings.dial != "max_drop":
        goal = settings.latency_ms or dense_seconds / (settings.speedup or 1.0)
        if goal / MARGIN >= shop.watch.dense:
            return []  # the dense model with its exact folds is fast enough
        return [Rung("at the target", goal / MARGIN, trained, every_layer=not trained)]
    classifies = shop.prepared.classifies
    if classifies:
        refitted, distilled = (
            [dense_seconds / speed for speed in speeds] for speeds in classifier_speeds(settings.minutes)
        )
    else:
        refitted, distilled = (_seconds(shop, errors) for errors in embedder_errors(settings.minutes))
    rungs = [Rung(f"{dense_seconds / seconds:.3g} times", seconds, as_measured=classifies) for seconds in refitted]
    return rungs + [
        Rung(
            f"{dense_seconds / seconds:.3g} times, distilled",
            seconds,
            trained / len(distilled),
            every_layer=not classifies,  # what an embedder's error was predicted for
            as_measured=classifies,
        )
        for seconds in distilled
    ]


def _seconds(shop: Workshop, shares: Sequence[float]) -> list[float]:
    """The times of students predicted to use these shares of the allowed drop, each well below the one before."""

    def find() -> list[float]:
        shop.progress.stage("Choosing what to try")
        scored = shop.prepared.task.metric_name(shop.prepared.splits.guardrail) == "spearman"
        allowed = (shop.settings.gate or 0.0) / (SPEARMAN_PER_COSINE if scored else 1.0)
        return [shop.seconds_for(share * allowed) for share in shares]

    found: list[float] = shop.work.json("times-" + "-".join(map(str, shares)), find) if shares else []
    return apart(found, shop.watch.dense)


def apart(times: Sequence[float], dense: float) -> list[float]:
    """The times, longest first, without those that save too little on the dense one or on the one before."""
    kept: list[float] = []
    for seconds in sorted(times, reverse=True):
        if seconds < WORTH_IT * (kept[-1] if kept else dense):
            kept.append(seconds)
    return kept


def classifier_speeds(minutes: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The speed-ups of students that are re-fitted alone, and of those that are distilled too."""
    if not minutes:
        return REFITTED, ()
    if minutes < 1:
        return (), (BRIEFLY_DISTILLED,)
    return REFITTED[1:2], DISTILLED[: int(minutes)]


def embedder_errors(minutes: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same for embedders, in shares of the allowed drop."""
    return (REFITTED_ERRORS[:1], DISTILLED_ERRORS) if minutes else (REFITTED_ERRORS, ())


def _planned(shop: Workshop, rung: Rung) -> tuple[Plan, tuple[dict[str, Any], ...]]:
    """The plan of a rung, and how its time was predicted. Re-fitting bridges narrower layers better than lost ones."""
    if rung.every_layer:
        with contextlib.suppress(InfeasibleBudget):
            every = shop.prepared.anatomy.group("layers").units
            return shop.plan(rung.name, rung.seconds, depth=every, as_measured=rung.as_measured)
    return shop.plan(rung.name, rung.seconds)


def _check_reach(shop: Workshop, name: str, plan: Plan, dense_seconds: float) -> None:
    """Raises InfeasibleBudget where even the smallest student misses the speed by far: before it learns, not after."""
    settings, work = shop.settings, shop.work
    student = shop.refit(f"{name}, untrained", plan)
    tried = student_candidates(student, shop.prepared, settings, work, shop.progress)
    ways = [one.alternative for one in tried if one.eligible and one.alternative is not None]
    seconds = min(work.json("fastest-seconds", lambda: shop.watch.against(ways)).values())
    if settings.speedup is not None and dense_seconds / seconds < HOPELESS * settings.speedup:
        raise out_of_reach(settings, dense_seconds / seconds)
    if settings.latency_ms is not None and settings.speedup is None and HOPELESS * seconds > settings.latency_ms:
        raise out_of_reach(settings, seconds)


def out_of_reach(settings: Settings, closest: float) -> InfeasibleBudget:
    """The error for a speed dial; `closest` is what was measured, as a factor or in milliseconds."""
    asked, unit = (
        (f"A speed-up of {settings.speedup:g}", "")
        if settings.dial == "speedup"
        else (f"A latency of {settings.latency_ms:g} ms", " ms")
    )
    return InfeasibleBudget(
        f"{asked} cannot be reached on this machine with {settings.target}; "
        f"the closest that can be reached is {closest:.2f}{unit}.",
        closest=closest,
    )


def _layer_drop(shop: Workshop, students: Sequence[Student]) -> list[Student]:
    """What anybody can script: half of the layers dropped whole, evenly spread, and what is left distilled."""
    total = shop.prepared.anatomy.group("layers").units
    if total < 2:
        return []
    layers = spread(total, max(1, total // 2))
    plan = drop_layers(shop.prepared, layers)
    name = f"layers {' '.join(map(str, layers))}, distilled"
    minutes = shop.settings.minutes * LAYER_DROP_SHARE
    student = Student(
        name, "layer-drop", plan, shop.cut(plan), note=f"whole layers dropped, then {minutes:.1f} minutes distilled"
    )
    return [shop.distilled(student, minutes)]
