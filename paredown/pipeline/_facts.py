"""The facts of a run: what the report shows, `--json` prints, and the bundle keeps as its evidence."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from paredown import __version__, registry
from paredown import bundle as bundles
from paredown.bundle import Bundle
from paredown.encoder import Encoder
from paredown.pipeline._candidates import BASELINE, Candidate, has_openvino, plain_file
from paredown.pipeline._gate import Judged, Subject, as_row
from paredown.pipeline._latency import widths_of
from paredown.pipeline._memory import give_back_what_is_freed, peak_mib
from paredown.pipeline._prepare import Prepared, too_few
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import Student
from paredown.pipeline._work import Work
from paredown.report import html, words
from paredown.targets import huggingface, sparse_cpu
from paredown.targets import openvino as ov
from paredown.tasks import Task, TextData, Tokens
from paredown.tokens import Packed
from paredown.types import Array, Runner, canonical_json, finite
from paredown.validation import generation, parity
from paredown.validation.machine import card
from paredown.validation.quality import Drop, paired_drop
from paredown.validation.timing import Alternative, Timing, latency_ratio, measure, ratio

GRID = tuple((batch, length) for batch in (1, 8, 32) for length in (16, 64, 128))
PROMPTS, PROMPT_TOKENS, GENERATED = 16, 32, 256  # of the generation checks
STRAYS = 0.02  # of the texts: tokens' scores lie a hundredth apart, and rounding is a millionth
PARITY = 1e-4  # largest difference of an fp32 file from torch, at batch 1, 7 and 64


def gather(
    settings: Settings,
    prepared: Prepared,
    judged: Sequence[Judged],
    shown: Judged,
    baseline: Judged,
    students: Sequence[Student],
    progress: Progress,
    *,
    accepted: bool,
    minutes: float,
) -> dict[str, Any]:
    """Everything known about `shown`, the candidate chosen or, if none was, the closest. Opens the test split, once."""
    found = {
        **common(settings, prepared, judged, shown, baseline, students, progress, accepted=accepted, minutes=minutes),
        "columns": settings.columns(),
        "anatomy": _anatomy(prepared),
        "kept": _kept(shown.candidate),
        "zeros": _zeros(settings, shown.candidate, students),
        "token_policy": shown.candidate.packed.policy if shown.candidate.packed is not None else None,
        "timings": _grid(prepared, settings, baseline.candidate, shown.candidate, progress),
        "lengths": _lengths(prepared.guardrail),
        "generation": _generation(prepared, shown.candidate, progress) if prepared.generates else None,
        "parity": _parity(prepared, shown.candidate),
        "folds": list(prepared.folds),
    }
    found["data"]["truncated"] = sum(t.truncated for t in (prepared.calibration, prepared.guardrail, prepared.test))
    return plain(found)


def common(
    settings: Settings,
    prepared: Subject,
    judged: Sequence[Judged],
    shown: Judged,
    baseline: Judged,
    students: Sequence[Student],
    progress: Progress,
    *,
    accepted: bool,
    minutes: float,
) -> dict[str, Any]:
    """What is known of every run, on texts or on pictures; opens the test split."""
    progress.stage("Opening the test split")
    task, data = prepared.task, prepared.splits.test
    dense = prepared.dense_answers("test")
    small = prepared.answers(shown.candidate, "test", settings.threads)
    drop = paired_drop(task, dense, small, data, confidence=settings.confidence, seed=settings.seed)
    assert baseline.timing is not None and shown.timing is not None
    served = {f"{j.candidate.target} fp32 dense": j.timing for j in judged if j.candidate.kind == BASELINE and j.timing}
    machine = card()
    found: dict[str, Any] = {
        "accepted": accepted,
        "task": task.NAME,
        "model": settings.model,
        "family": prepared.anatomy.family,
        "target": settings.target,
        "precision": shown.candidate.precision,
        "candidate": shown.candidate.name,
        "objective": settings.objective(),
        "confidence": settings.confidence,
        "threads": settings.threads,
        **quality(task, data, dense, small, drop),
        **speed(served, shown.timing),
        "rounds": len(shown.timing.offline_seconds),
        "parameters_dense": baseline.candidate.parameters,
        "parameters_pruned": shown.candidate.parameters,
        "minutes": minutes,
        "bundle": settings.out,
        "plan_id": shown.candidate.plan.id if shown.candidate.plan else None,
        "candidates": [dict(as_row(j, baseline.timing)) | {"chosen": j is shown} for j in judged],
        "prediction": [one for student in students for one in student.predictions],
        "recovery": [one for student in students for one in student.recovery],
        "pruning_rounds": [one for student in students for one in student.rounds],
        "machine": machine,
        "data": {
            "calibration": len(prepared.splits.calibration),
            "guardrail": len(prepared.splits.guardrail),
            "test": len(data),
            "notes": list(prepared.notes),
        },
        "command": settings.command(),
        "versions": {"paredown": __version__, **machine["libraries"]},
    }
    found["verdict"] = _verdict(found, shown, judged, settings)
    if not accepted:
        found["verdict"] += f" {too_few(settings, task, prepared.splits.guardrail)}".rstrip()
    return found


def plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """The facts as plain JSON types."""
    written: dict[str, Any] = json.loads(canonical_json(finite(found)))
    return written


def quality(task: Task, data: TextData, dense: Array, small: Array, drop: Drop) -> dict[str, Any]:
    """What the dense model's outputs [N, ...] and the smaller one's are worth on the same texts."""
    return {
        "quality_metric": drop.metric,
        "quality_dense": drop.dense,
        "quality_pruned": drop.pruned,
        "metrics_dense": task.metrics(dense, data, dense),
        "metrics_pruned": task.metrics(small, data, dense),
        "drop": drop.interval,
    }


def speed(dense: Mapping[str, Timing], small: Timing) -> dict[str, Any]:
    """`small` against the fastest of the dense alternatives by name, and against the quickest with one text."""
    fastest = max(dense, key=lambda name: dense[name].texts_per_second)
    quickest = min(dense, key=lambda name: dense[name].latency_ms_p50)
    return {
        "speedup": ratio(dense[fastest], small),
        "speedup_against": fastest,
        "latency_ms_p50": {"dense": dense[quickest].latency_ms_p50, "pruned": small.latency_ms_p50},
        "latency_speedup": latency_ratio(dense[quickest], small),
        "latency_against": quickest,
        "texts_per_second": {"dense": dense[fastest].texts_per_second, "pruned": small.texts_per_second},
    }


def parity_of(file: Path, encoder: Encoder | Packed, *, longest: int, target: str = "onnxruntime") -> float:
    """Largest difference of an fp32 file's outputs from the torch model's; ParityFailure above 1e-4.

    Where tokens are dropped, rounding may decide between two of them: two texts in a hundred may differ.
    """
    runner = registry.find("targets", target).load(file, threads=torch.get_num_threads())
    return _agreement(runner, encoder, longest)


def _agreement(runner: Runner, encoder: Encoder | Packed, longest: int) -> float:
    from paredown.targets.torch import load_encoder

    name, config = encoder.output_name, cast(Any, encoder.model.config)
    plain = load_encoder(encoder, threads=torch.get_num_threads())
    try:
        return parity.check(
            lambda arrays: runner.run(arrays)[name],
            lambda arrays: plain.run(arrays)[name],
            input_names=encoder.input_names,
            vocabulary=config.vocab_size,
            tolerance=PARITY,
            longest=longest,
            strays=STRAYS if isinstance(encoder, Packed) else 0.0,
        )
    finally:
        runner.close()
        plain.close()
        give_back_what_is_freed()


def write_bundle(
    settings: Settings, prepared: Prepared, work: Work, best: Candidate, facts: Mapping[str, Any]
) -> Bundle:
    """The bundle of the candidate with its files and its report, at the folder the settings name."""
    assert best.plan is not None
    files = {} if best.file is None else {"model.onnx": plain_file(best)}
    if best.precision == "int8" and best.file is not None:
        files["model-int8.onnx"] = best.file
    if files and has_openvino():
        xml = ov.export(files["model.onnx"], work.path("model.xml"))
        small = best.packed or Encoder(best.model, prepared.anatomy.layout)
        parity_of(xml, small, longest=prepared.loaded.max_length, target="openvino")
        files |= {"openvino/model.xml": xml, "openvino/model.bin": xml.with_suffix(".bin")}
    if settings.uniform:
        folder = work.path(f"huggingface-{best.plan.id[:12]}-{best.precision}")
        if not folder.exists():
            loaded = prepared.loaded
            huggingface.export(
                best.model,
                loaded.tokenizer,
                folder,
                anatomy=prepared.anatomy,
                plan=best.plan,
                max_length=loaded.max_length,
            )
        files |= {f"huggingface/{path.relative_to(folder)}": path for path in folder.rglob("*") if path.is_file()}
    facts = {**facts, "peak_memory_mib": peak_mib()}
    files["report.html"] = html.write(facts, work.path("report.html"))
    return bundles.save(
        settings.out,
        model=best.model,
        anatomy=prepared.anatomy,
        plan=best.plan,
        loaded=prepared.loaded,
        target=best.target,
        precision=best.precision,
        accepted=bool(facts["accepted"]),
        folds=prepared.folds,
        tokens=best.packed.policy if best.packed is not None else None,
        token_tensors=best.packed.tensors if best.packed is not None else None,
        files=files,
        report=facts,
    )


def _verdict(found: Mapping[str, Any], shown: Judged, judged: Sequence[Judged], settings: Settings) -> str:
    speedup, metric = found["speedup"], found["quality_metric"]
    changed = words.change(metric, found["drop"].value)
    figures = (
        f"{speedup.value:.2f} times the {words.items(found)} per second of {found['speedup_against']}, "
        f"{changed} on the test split"
    )
    if not found["accepted"]:
        why = f" ({shown.reason.removeprefix('not tried: ')})" if shown.reason else ""
        if shown.passed is False and shown.drop is not None and settings.gate is not None:
            bound, most = words.drop(metric, shown.drop.bound), words.budget(metric, settings.gate)
            why = f" (bound on its drop {bound}, above the permitted {most})"
        return f"No candidate passed. The closest is {shown.candidate.name}{why}: {figures}."
    faster = [
        j
        for j in judged
        if not j.candidate.eligible and j.seconds < shown.seconds and (j.candidate.kind == BASELINE or j.passed)
        if j.candidate.kind != BASELINE or f"{j.candidate.target} fp32 dense" != found["speedup_against"]
    ]
    names = " and ".join(j.candidate.name for j in sorted(faster, key=lambda j: j.seconds))
    aside = f" Faster at no more loss than permitted: {names}; consider that first." if names else ""
    one = words.items(found).removesuffix("s")
    if settings.dial == "latency_ms":
        figures = f"a median of {shown.timing.latency_ms_p50 if shown.timing else 0:.2f} ms for one {one}, {figures}"
    elif speedup.value <= 1 and settings.dial != "amount":
        return (
            f"Do not prune for {found['target']}: nothing that passed is faster than {found['speedup_against']}.{aside}"
        )
    kind = shown.candidate.kind
    advice = {
        "folded": "Do not prune: use the dense model with its exact folds",
        "whole": "Do not prune: use the dense model",
        "dense-int8": "Do not prune: use the dense model in int8",
    }.get(
        kind, f"Made as asked, {shown.candidate.name}" if settings.dial == "amount" else f"Use {shown.candidate.name}"
    )
    return f"{advice}: {figures}.{aside}"


def _anatomy(prepared: Prepared) -> dict[str, int]:
    groups = prepared.anatomy.groups
    return {
        "layers": prepared.anatomy.group("layers").units,
        "heads": max(g.units for g in groups if g.kind == "head"),
        "neurons": max(g.units for g in groups if g.kind == "neuron"),
    }


def _generation(prepared: Prepared, candidate: Candidate, progress: Progress) -> dict[str, Any]:
    """How both models go on from the beginnings of test texts: figures of each, and warnings of repetition."""
    progress.stage("Generating", 2 * PROMPTS)
    ids, owner = prepared.test.ids, prepared.test.owner
    assert owner is not None
    first = [int(np.flatnonzero(owner == text)[0]) for text in range(min(PROMPTS, int(owner.max()) + 1))]
    prompts = [ids[i][:PROMPT_TOKENS].tolist() for i in first]
    count = min(GENERATED, prepared.model.config.max_position_embeddings // 2)
    found = {}
    for name, model in (("dense", prepared.model), ("pruned", candidate.model)):
        made, seconds = generation.generate(model, prompts, num_tokens=count, progress=lambda _: progress.advance())
        found[name] = generation.measure(made, seconds)
    warnings = generation.compare(found["dense"], found["pruned"])
    for warning in warnings:
        progress.say(warning)
    return {**{name: vars(one) for name, one in found.items()}, "prompts": len(prompts), "warnings": list(warnings)}


def _kept(candidate: Candidate) -> list[dict[str, Any]]:
    """What each layer keeps; nothing to show where nothing was cut."""
    plan = candidate.plan
    if plan is None or candidate.kind in ("folded", "dense-int8"):
        return []
    return [
        {"layer": i, "heads": plan.keep[f"layer.{i}.heads"], "neurons": neurons}
        for i, (_, neurons) in zip(plan.keep["layers"], widths_of(plan), strict=True)
    ]


def _zeros(settings: Settings, candidate: Candidate, students: Sequence[Student]) -> dict[str, Any] | None:
    """Where the zeros are and how they came there; None where there are none."""
    own = [student for student in students if student.zeros and candidate.name.startswith(student.name)]
    if not own:
        return None
    matrices = own[0].zeros
    sizes = [float(np.prod(one["shape"])) for one in matrices]
    share = float(np.average([one["sparsity"] for one in matrices], weights=sizes))
    how = {name: getattr(settings, name) for name in ("pattern", "solver", "allocation", "rounds", "schedule")}
    return {**how, "asked": settings.share, "sparsity": share, "weights": int(sum(sizes)), "matrices": matrices}


def _lengths(tokens: Tokens) -> dict[str, Any]:
    longest = int(tokens.lengths.max())
    step = max(1, -(-longest // 24))
    counts, edges = np.histogram(tokens.lengths, bins=np.arange(0, longest + step + 1, step))
    return {"edges": edges.tolist(), "counts": counts.tolist()}


def _grid(
    prepared: Prepared, settings: Settings, dense: Candidate, small: Candidate, progress: Progress
) -> list[dict[str, Any]]:
    """Milliseconds of one batch by batch size and length, dense and pruned interleaved."""
    if dense.alternative is None or small.alternative is None:
        return []
    longest = prepared.loaded.max_length
    grid = [(batch, length) for batch, length in GRID if length <= longest]
    if not grid:
        return []
    names, vocabulary = prepared.network.input_names, prepared.model.config.vocab_size
    batches = [_filled(batch, length, names, vocabulary) for batch, length in grid]
    progress.stage("Timing by length and batch")
    pair = [Alternative("dense", dense.alternative.loader, dense.alternative.path, dense.alternative.options)]
    pair.append(Alternative("pruned", small.alternative.loader, small.alternative.path, small.alternative.options))
    # as "singles" every batch keeps a time of its own
    found = measure(pair, batches[:1], singles=batches, rounds=7, threads=settings.threads, seconds=4)
    rows = []
    for i, (batch, length) in enumerate(grid):
        ms = {name: float(np.median(found[name].single_ms[:, i])) for name in ("dense", "pruned")}
        rows.append({"batch": batch, "length": length, "dense_ms": ms["dense"], "pruned_ms": ms["pruned"]})
    return rows


def _filled(batch: int, length: int, names: Sequence[str], vocabulary: int) -> dict[str, Array]:
    ids = np.random.default_rng(0).integers(min(5, vocabulary - 1), min(100, vocabulary), (batch, length))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: arrays[name] for name in names}


def _parity(prepared: Prepared, candidate: Candidate) -> float | None:
    """Of the fp32 ONNX file that the bundle holds, also where int8 is what serves."""
    longest = prepared.loaded.max_length
    if candidate.target == "sparse_cpu":
        small = Encoder(candidate.model, prepared.anatomy.layout)
        return _agreement(sparse_cpu.load_encoder(small, threads=torch.get_num_threads()), small, longest)
    if candidate.file is None:  # it serves from torch
        return None
    encoder = candidate.packed or Encoder(candidate.model, prepared.anatomy.layout)
    return parity_of(plain_file(candidate), encoder, longest=longest)
