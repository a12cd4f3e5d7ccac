"""The main job on an image classifier: what is its own of the order of the stages, of the facts and of the bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from paredown import bundle as bundles
from paredown.bundle import Bundle
from paredown.errors import ParedownError, ParityFailure
from paredown.layers import macs
from paredown.pipeline import _facts
from paredown.pipeline._candidates import BASELINE, Candidate, has_openvino
from paredown.pipeline._gate import Judged
from paredown.pipeline._memory import peak_mib
from paredown.pipeline._network_candidates import dense_candidates, plain_onnx, student_candidates
from paredown.pipeline._network_stopwatch import NetworkStopwatch
from paredown.pipeline._network_students import NetworkWorkshop
from paredown.pipeline._network_table import Table
from paredown.pipeline._networks import Pictured, runners
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import Student
from paredown.pipeline._work import Work
from paredown.report import html
from paredown.targets import PICTURES, export_graph
from paredown.targets import openvino as ov
from paredown.types import Array, GraphAnatomy, Plan
from paredown.validation.timing import measure

RECOVERIES = ("none", "reconstruct", "distill", "finetune")
GRID = (1, 8, 64)  # pictures of a batch
PARITY = 1e-4  # largest difference of an fp32 file from torch, of the largest logit


def for_network(settings: Settings) -> Settings:
    """The settings with a target. Raises ParedownError for what is not for pictures."""
    settings.only_for(pictures=True)
    if settings.recover not in RECOVERIES:
        raise ParedownError(f"recover is one of {', '.join(RECOVERIES)} for an image classifier.")
    return replace(settings, target=settings.target or "onnxruntime")


def made_of(
    settings: Settings, prepared: Pictured, work: Work, progress: Progress
) -> tuple[list[Candidate], list[Student]]:
    """All candidates for pictures, and the students among them."""
    for note in prepared.notes:
        progress.say(note)
    watch = NetworkStopwatch(prepared, settings, work, "single" if settings.dial == "latency_ms" else "offline")
    table = Table(prepared, settings, work, watch, progress)
    table.check()
    candidates = dense_candidates(prepared, settings, work, progress)
    shop = NetworkWorkshop(prepared, settings, work, progress, table)
    if settings.sized:
        students = shop.for_amount()
        candidates = [
            replace(one, eligible=False) for one in candidates
        ]  # the network that was asked for is the answer
    else:
        progress.stage("Timing the dense network on every runtime")
        runnable = [one for one in candidates if one.alternative is not None]
        dense = [one for one in runnable if one.kind == BASELINE]
        quantized = [one for one in runnable if one.precision == "int8" and one.eligible]
        ways = [one.alternative for one in (*dense, *quantized) if one.alternative]
        stored = work.json("dense-and-int8-seconds", lambda: [watch.against(ways), watch.dense])
        seconds: dict[str, float] = stored[0]
        watch.dense = watch.dense or float(stored[1])
        watch.dense_int8 = next((seconds[one.name] for one in quantized), None)
        fastest = min((one.name for one in dense), key=seconds.__getitem__)
        candidates.sort(key=lambda one: one.name != fastest)
        students = shop.for_speed(seconds[fastest])
    for student in students:
        made = student_candidates(student, prepared, settings, work, progress)
        if settings.sized and settings.gate is None:
            why = "for comparison: say with --max-drop what int8 may lose"
            made = [one if one.precision == "fp32" else replace(one, eligible=False, note=why) for one in made]
        candidates += made
    return candidates, students


def gather_network(
    settings: Settings,
    prepared: Pictured,
    judged: Sequence[Judged],
    shown: Judged,
    baseline: Judged,
    students: Sequence[Student],
    progress: Progress,
    *,
    accepted: bool,
    minutes: float,
) -> dict[str, Any]:
    """As `_facts.gather`, for pictures."""
    candidate = shown.candidate
    assert candidate.plan is not None
    return _facts.plain(
        {
            **_facts.common(
                settings, prepared, judged, shown, baseline, students, progress, accepted=accepted, minutes=minutes
            ),
            **channels_kept(prepared.anatomy, candidate.plan),
            "weights": settings.weights,
            "normalization": {"mean": prepared.mean, "std": prepared.std},
            "picture": list(prepared.splits.calibration.pixels.shape[1:3]),
            "macs_dense": prepared.macs,
            "macs_pruned": macs(candidate.model),
            "whole": dict(prepared.anatomy.whole),
            "timings": _grid(prepared, settings, baseline.candidate, candidate, progress),
            "parity": parity_of(plain_onnx(candidate), candidate.model, _judged_by(prepared)),
        }
    )


def channels_kept(anatomy: GraphAnatomy, plan: Plan) -> dict[str, Any]:
    """Of every group of channels how many a plan keeps of how many; and the branches, and which are gone."""
    gone = {branch.name for branch in anatomy.gone(plan)}
    lost = {name for branch in anatomy.gone(plan) for name in branch.groups}
    rows = [
        {"group": g.name, "channels": g.units, "kept": 0 if g.name in lost else len(plan.keep[g.name])}
        for g in anatomy.channels
    ]
    return {"channels": rows, "branches": [{"name": b.name, "gone": b.name in gone} for b in anatomy.branches]}


def _grid(
    prepared: Pictured, settings: Settings, dense: Candidate, small: Candidate, progress: Progress
) -> list[dict[str, Any]]:
    """Milliseconds of a batch by its size, dense and pruned interleaved."""
    if dense.alternative is None or small.alternative is None:
        return []
    data = prepared.splits.guardrail
    batches = [{PICTURES: prepared.pictures(data.take(np.arange(size) % len(data)))} for size in GRID]
    progress.stage("Timing by batch")
    pair = [replace(dense.alternative, name="dense"), replace(small.alternative, name="pruned")]
    found = measure(pair, batches[:1], singles=batches, rounds=9, threads=settings.threads, seconds=8)
    return [
        {"batch": size, **{f"{name}_ms": float(np.median(found[name].single_ms[:, i])) for name in ("dense", "pruned")}}
        for i, size in enumerate(GRID)
    ]


def parity_of(
    file: Path, model: fx.GraphModule, pictures: Array, *, target: str = "onnxruntime", threads: int = 1
) -> float:
    """The largest difference of an fp32 file's outputs from torch's, as a share of the largest logit, on up to 64
    pictures as the network takes them, in batches of 1, 7 and 64. Raises ParityFailure above 1e-4.
    """
    worst, runner = 0.0, runners(target, file, threads)
    try:
        for size in (1, 7, 64):
            x = pictures[np.arange(size) % len(pictures)]
            ours = next(iter(runner.run({PICTURES: x}).values()))
            with torch.inference_mode():
                theirs = model(torch.from_numpy(x)).float().numpy()
            apart = float(np.abs(ours - theirs).max() / max(1.0, float(np.abs(theirs).max())))
            worst = max(worst, apart)
            if not apart <= PARITY:
                raise ParityFailure(f"{target}, batch of {size}: the outputs differ by {apart:.3g}, above {PARITY:g}")
    finally:
        runner.close()
    return worst


def _judged_by(prepared: Pictured) -> Array:
    data = prepared.splits.guardrail
    return prepared.pictures(data.take(np.arange(min(64, len(data)))))


def write_network(
    settings: Settings, prepared: Pictured, work: Work, best: Candidate, facts: Mapping[str, Any]
) -> Bundle:
    """The bundle of the candidate with its files and its report, at the folder the settings name."""
    assert best.plan is not None
    files = {"model.onnx": plain_onnx(best)}
    if not files["model.onnx"].exists():
        export_graph(best.model, files["model.onnx"])
    if best.precision == "int8" and best.file is not None:
        files["model-int8.onnx"] = best.file
    if has_openvino():
        xml = ov.export(files["model.onnx"], work.path("model.xml"))
        parity_of(xml, best.model, _judged_by(prepared), target="openvino")
        files |= {"openvino/model.xml": xml, "openvino/model.bin": xml.with_suffix(".bin")}
    facts = {**facts, "peak_memory_mib": peak_mib()}
    files["report.html"] = html.write(facts, work.path("report.html"))
    size = prepared.splits.calibration.pixels.shape[1:3]
    return bundles.save_network(
        settings.out,
        model=best.model,
        dense=prepared.model,
        anatomy=prepared.anatomy,
        plan=best.plan,
        loaded=replace(prepared.loaded, mean=prepared.mean, std=prepared.std, size=(int(size[0]), int(size[1]))),
        target=best.target,
        precision=best.precision,
        accepted=bool(facts["accepted"]),
        files=files,
        report=facts,
    )
