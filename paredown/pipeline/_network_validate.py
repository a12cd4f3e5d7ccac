"""Proving the bundle of an image classifier again, and timing such networks side by side."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx

from paredown import bundle as bundles
from paredown.anatomy import describe_graph
from paredown.bundle import Bundle
from paredown.cores import cores
from paredown.errors import BadData, FingerprintMismatch, ParedownError
from paredown.graph import trace
from paredown.networks import load_network
from paredown.pipeline import _loaders
from paredown.pipeline._candidates import has_openvino
from paredown.pipeline._claim import holds, slower, worse
from paredown.pipeline._facts import plain, quality, speed
from paredown.pipeline._memory import at_once
from paredown.pipeline._network_run import parity_of
from paredown.pipeline._network_stopwatch import on_target
from paredown.pipeline._networks import BATCH, TIMED_SINGLES, check_classes, named_alike
from paredown.pipeline._settings import Progress
from paredown.targets import PICTURES, export_graph
from paredown.tasks import image_classification as task
from paredown.tasks.image_classification import ImageData, normalized
from paredown.types import Array, Runner
from paredown.validation.machine import card
from paredown.validation.quality import paired_drop
from paredown.validation.timing import Alternative, measure

ROUNDS = 9
SIZE = (224, 224)  # of the random pictures that a network is timed with where nothing tells its own


def validate_network(
    opened: Bundle,
    *,
    eval: str,
    reference: str | None,
    weights: str | None,
    max_drop: float | None,
    confidence: float | None,
    threads: int | None,
    seed: int,
    progress: Progress,
) -> dict[str, Any]:
    """As `paredown.pipeline.validate`."""
    claim, manifest = opened.report(), opened.manifest
    source, weights = reference or claim["model"], weights or (None if reference else claim.get("weights"))
    confidence, threads = confidence or claim["confidence"], threads or claim.get("threads")
    size = (int(manifest["size"][0]), int(manifest["size"][1]))
    try:
        loaded = load_network(source, weights=weights)
    except ParedownError as error:
        raise ParedownError(
            f"The dense network is needed to compare with ({error}); name it with --reference, and --weights."
        ) from error
    dense = trace(loaded.module, torch.zeros(2, 3, *size))
    if describe_graph(dense).fingerprint != opened.plan.fingerprint:
        raise FingerprintMismatch(f"{source} is not the network that {opened.folder} was made from.")
    data = named_alike(task.load(eval, part="test", size=size, middle=loaded.middle), loaded)
    check_classes(data, loaded, len(dense(torch.zeros(1, 3, *size))[0]))
    progress.stage("Comparing answers")
    mean, std = manifest["mean"], manifest["std"]
    runner = opened.runner(threads=threads)
    try:
        small = _answers(runner, data, mean, std)
    finally:
        runner.close()
    with torch.inference_mode():
        whole = np.concatenate([dense(torch.from_numpy(x)).numpy() for x in _batches(data, mean, std)])
    plain_file = opened.folder / bundles.SERVING["onnxruntime", "fp32"]
    some = normalized(data.pixels[:BATCH], mean, std)
    served_model = opened.model()
    assert isinstance(served_model, fx.GraphModule)
    parity = parity_of(plain_file, served_model, some) if plain_file.exists() else None
    drop = paired_drop(task, whole, small, data, confidence=confidence, seed=seed)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        progress.stage("Timing, interleaved", ROUNDS)
        served = {"served": _served(opened, "served")}
        ways = [*served.values(), *_everywhere(dense, "dense", Path(folder), None)]
        timed = _timed(ways, data, mean, std, threads, at_once(dense), progress)
    small_timing = timed.pop("served")
    faster = speed({f"{name.removeprefix('dense ')} fp32": timing for name, timing in timed.items()}, small_timing)
    gate = max_drop if max_drop is not None else claim["objective"]["max_drop"]
    reasons = [worse(claim, drop, gate), slower(claim, faster["speedup"], small_timing.latency_ms_p50)]
    reasons += [] if manifest["accepted"] else ["the run that made it did not accept it"]
    reasons = [reason for reason in reasons if reason]
    facts = {
        "accepted": not reasons,
        "bundle": str(opened.folder),
        "task": task.NAME,
        "target": manifest["target"],
        "precision": manifest["precision"],
        **quality(task, data, whole, small, drop),  # type: ignore[arg-type]
        "bound": drop.bound,
        "max_drop": gate,
        "parity": parity,
        **faster,
        "samples": len(data),
        "claimed": {key: claim[key] for key in ("speedup", "drop", "quality_pruned")},
        "machine": card(),
    }
    facts["verdict"] = f"The claim does not hold here: {'; '.join(reasons)}." if reasons else holds(claim, faster, drop)
    return plain(facts)


def network_side(
    path: str, folder: Path, target: str | None, weights: str | None, size: tuple[int, int] | None
) -> tuple[list[Alternative], tuple[int, int], int]:
    """What to time for one path of `bench`; the size of its pictures, `size` unless it says its own; and how many
    processes may be alive at once.
    """
    if (Path(path) / bundles.MANIFEST).is_file():
        opened = bundles.load(Path(path))
        size = (int(opened.manifest["size"][0]), int(opened.manifest["size"][1]))
        return [_served(opened, path, target)], size, at_once(opened.model())
    loaded = load_network(path, weights=weights)
    size = size or loaded.size or SIZE
    model = trace(loaded.module, torch.zeros(2, 3, *size))
    return _everywhere(model, path, folder, target), size, at_once(model)


def bench_pictures(
    size: tuple[int, int], batch_size: int
) -> tuple[list[Mapping[str, Array]], list[Mapping[str, Array]]]:
    """A batch and single pictures of noise: what is in them does not change the time."""
    random = np.random.default_rng(0)
    batch = random.standard_normal((batch_size, 3, *size)).astype(np.float32)
    return [{PICTURES: batch}], [{PICTURES: batch[:1]}] * TIMED_SINGLES


def _everywhere(model: fx.GraphModule, name: str, folder: Path, target: str | None) -> list[Alternative]:
    """The network as it is on every runtime, or on one."""
    folder.mkdir(exist_ok=True)
    file = export_graph(model, folder / "dense.onnx")
    runtimes = ("torch", "onnxruntime", *(("openvino",) if has_openvino() else ()))
    if target is not None and target not in runtimes:
        raise ParedownError(f"{target} is not among {', '.join(runtimes)}, where image classifiers run here.")
    return [on_target(one, model, f"{name} {one}", file) for one in runtimes if target in (None, one)]


def _served(opened: Bundle, name: str, target: str | None = None) -> Alternative:
    """The bundle as it serves, or by its fp32 file for another target."""
    target = target or opened.manifest["target"]
    if target == "torch":
        return Alternative(name, _loaders.TORCH, str(opened.folder), {"target": target})
    same = target == opened.manifest["target"]
    file = opened.manifest["file"] if same else bundles.SERVING[target, "fp32"]
    return Alternative(name, _loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO, str(opened.folder / file))


def _timed(
    ways: list[Alternative],
    data: ImageData,
    mean: Any,
    std: Any,
    threads: int | None,
    together: int,
    progress: Progress,
) -> dict[str, Any]:
    batches = [{PICTURES: x} for x in _batches(data.take(np.arange(min(BATCH, len(data)))), mean, std)]
    singles = [{PICTURES: normalized(data.pixels[i : i + 1], mean, std)} for i in range(min(TIMED_SINGLES, len(data)))]
    return measure(
        ways,
        batches,
        singles=singles,
        rounds=ROUNDS,
        threads=threads or cores(),
        seconds=120,
        together=together,
        progress=lambda done, of: progress.advance(ROUNDS / of),
    )


def _batches(data: ImageData, mean: Any, std: Any) -> Any:
    for start in range(0, len(data), BATCH):
        yield normalized(data.pixels[start : start + BATCH], mean, std)


def _answers(runner: Runner, data: ImageData, mean: Any, std: Any) -> Array:
    if not len(data):
        raise BadData("There are no pictures to judge by.")
    return np.concatenate([next(iter(runner.run({PICTURES: x}).values())) for x in _batches(data, mean, std)])
