"""The main job: the order of the stages, from a model and a table of texts to a bundle that carries its proof."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from paredown import bundle as bundles
from paredown.bundle import Bundle
from paredown.errors import GateFailed, InfeasibleBudget
from paredown.pipeline import _facts
from paredown.pipeline._candidates import Candidate, control, dense_candidates, student_candidates
from paredown.pipeline._gate import Judged, chosen, closest, judge, pictured, timed, timed_control
from paredown.pipeline._latency import Stopwatch
from paredown.pipeline._prepare import Prepared, outputs_of, prepare
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import Student, Workshop, drop_layers, spread
from paredown.pipeline._work import Work
from paredown.surgery import cut
from paredown.targets import huggingface
from paredown.types import Limits
from paredown.validation.machine import cores

# Speed-ups asked of students before int8, and the share of the minutes each is distilled for. Without training a model
# loses quality beyond twice its speed; with it, four times is reached by most and eight by some: the gate decides.
UNTRAINED = (1.3, 1.6, 2.0)
TRAINED = ((3.0, 0.2), (6.0, 0.35), (12.0, 0.3))
LAYER_DROP_SHARE = 0.15
MARGIN = 1.02  # a speed that is promised is planned for with this much to spare


def run(settings: Settings, progress: Progress) -> Bundle:
    """See `paredown.pipeline.prune`."""
    begun = time.monotonic()
    out = Path(settings.out)
    bundles.check_free(out)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.threads or cores())
    try:
        progress.stage("Reading model and data")
        prepared = prepare(settings)
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Work(out, settings.key)
        if work.resumed:
            progress.say("Going on from where an earlier run with the same settings stopped.")
        try:
            return _run(settings, prepared, work, progress, begun)
        except InfeasibleBudget:
            work.discard()  # other settings will be tried next, and they begin anew
            raise
    finally:
        torch.set_num_threads(before)


def _run(settings: Settings, prepared: Prepared, work: Work, progress: Progress, begun: float) -> Bundle:
    for note in prepared.notes:
        progress.say(note)
    candidates = dense_candidates(prepared, settings, work, progress)
    watch = Stopwatch(
        prepared, settings, work, work.path("dense.onnx"), "single" if settings.dial == "latency_ms" else "offline"
    )
    limits = huggingface.LIMITS if settings.uniform else watch.limits
    shop = Workshop(prepared, settings, work, watch, progress, _joined(limits, watch.limits))
    fastest_dense = _fastest_dense(candidates, watch, work)
    students = _students(shop, fastest_dense)
    for student in students:
        candidates += student_candidates(student, prepared, settings, work, progress)
    candidates += control(prepared, settings, progress)

    judged, baseline, reference = _judged(candidates, prepared, settings, progress)
    best = chosen(judged, settings)
    shown = best or closest(judged, settings)
    names = [j.candidate.name for j in judged]
    judged = pictured(judged, prepared, settings, reference, progress)
    shown = judged[names.index(shown.candidate.name)]
    facts = _facts.gather(
        settings,
        prepared,
        judged,
        shown,
        baseline,
        students,
        progress,
        accepted=best is not None,
        minutes=(time.monotonic() - begun) / 60,
    )
    facts["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    facts["created"] = datetime.now(UTC).isoformat(timespec="seconds")
    progress.stage("Writing the bundle")
    saved = _facts.write_bundle(settings, prepared, work, shown.candidate, facts)
    work.discard()
    if best is None:
        raise GateFailed(facts["verdict"], result=facts)
    return saved


def _judged(
    candidates: Sequence[Candidate], prepared: Prepared, settings: Settings, progress: Progress
) -> tuple[list[Judged], Judged, Any]:
    judged, fastest = timed(candidates, prepared, settings, progress)
    baseline = next(j for j in judged if j.candidate is fastest)
    assert baseline.timing is not None
    texts = prepared.task.all_texts(prepared.splits.guardrail)
    judged = [timed_control(j, texts, baseline.timing) if j.candidate.predictor is not None else j for j in judged]
    reference = outputs_of(prepared.encoder, prepared.guardrail)
    verdicts = judge(judged, prepared, settings, reference, baseline.seconds, progress)
    return verdicts, next(j for j in verdicts if j.candidate is fastest), reference


def _joined(wanted: Limits, engine: Limits) -> Limits:
    """What both the stock config and the engine accept."""
    return Limits(max(wanted.multiple_of, engine.multiple_of), wanted.uniform, wanted.allowed)


def _fastest_dense(candidates: Sequence[Candidate], watch: Stopwatch, work: Work) -> float:
    """By the stopwatch: what the fastest dense fp32 alternative takes, which speed-ups are promised against."""
    stored = work.json(
        "fastest-dense",
        lambda: watch.against([c.alternative for c in candidates if c.kind == "dense" and c.alternative]),
    )
    return float(stored)


def _students(shop: Workshop, dense_seconds: float) -> list[Student]:
    """The smaller models that this run tries, by its dial and its minutes."""
    settings = shop.settings
    if settings.dial == "max_drop":
        wanted = [(f"{s:g} times", dense_seconds / s, 0.0) for s in UNTRAINED]
        if settings.minutes:
            wanted = [wanted[1]] + [(f"{s:g} times, distilled", dense_seconds / s, share) for s, share in TRAINED]
    else:
        goal = settings.latency_ms or dense_seconds / (settings.speedup or 1.0)
        if goal >= shop.watch.dense and settings.dial == "speedup":
            return []
        share = 1 - LAYER_DROP_SHARE if settings.minutes else 0.0
        wanted = [("at the target", goal / MARGIN, share)]
    students, missed = [], None
    for name, seconds, share in wanted:
        try:
            plan, predictions = shop.plan(name, seconds, depth=_depth(shop, share))
        except InfeasibleBudget as error:
            missed = error
            continue
        student = shop.refit(name, plan, predictions=predictions)
        if share and settings.minutes:
            student = shop.distilled(student, settings.minutes * share)
        students.append(student)
    if missed is not None and settings.dial != "max_drop":
        raise _infeasible(settings, dense_seconds, missed)
    if settings.minutes:
        students += _layer_drop(shop, students)
    return students


def _depth(shop: Workshop, share: float) -> int | None:
    """Untrained students keep every layer: closed-form recovery bridges narrower layers, not missing ones."""
    return None if share else shop.prepared.anatomy.group("layers").units


def _layer_drop(shop: Workshop, students: Sequence[Student]) -> list[Student]:
    """What anybody can script: half of the layers dropped whole, evenly spread, and what is left distilled."""
    total = shop.prepared.anatomy.group("layers").units
    if total < 2:
        return []
    layers = spread(total, max(1, total // 2))
    plan = drop_layers(shop.prepared, layers)
    small = cut(shop.prepared.model, shop.prepared.anatomy, plan)
    name = f"layers {' '.join(map(str, layers))}, distilled"
    student = Student(name, "layer-drop", plan, small, note="whole layers dropped, what is left distilled")
    return [shop.distilled(student, shop.settings.minutes * LAYER_DROP_SHARE)]


def _infeasible(settings: Settings, dense_seconds: float, error: InfeasibleBudget) -> InfeasibleBudget:
    if settings.dial == "speedup":
        reach = dense_seconds / error.closest
        return InfeasibleBudget(
            f"A speed-up of {settings.speedup:g} cannot be reached by pruning on this machine with "
            f"{settings.target}; the closest that can be reached is {reach:.2f}.",
            closest=reach,
        )
    return InfeasibleBudget(
        f"A latency of {settings.latency_ms:g} ms cannot be reached by pruning on this machine with "
        f"{settings.target}; the closest that can be reached is {error.closest:.2f} ms.",
        closest=error.closest,
    )
