"""Proving a bundle again on this machine, and timing any two models side by side."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from paredown import bundle as bundles
from paredown.bundle import Bundle
from paredown.decoder import Decoder
from paredown.encoder import Encoder
from paredown.errors import BadData, FingerprintMismatch, MissingExtra, ParedownError
from paredown.models import LoadedModel, load_model
from paredown.network import Network, network
from paredown.networks import is_network
from paredown.pipeline import _loaders
from paredown.pipeline._candidates import has_openvino
from paredown.pipeline._claim import holds, slower, worse
from paredown.pipeline._facts import parity_of, quality, speed
from paredown.pipeline._memory import at_once
from paredown.pipeline._network_validate import bench_pictures, network_side, validate_network
from paredown.pipeline._prepare import describe_loaded, load_data, outputs_of, task_of, timing_batches
from paredown.pipeline._settings import COLUMNS, Progress, Silent
from paredown.targets import export_stock
from paredown.tasks import TextData, Tokens, run_batches, tokenize
from paredown.tasks.causal_lm import windows
from paredown.tokens import Packed
from paredown.types import Array, canonical_json, finite
from paredown.validation.machine import card
from paredown.validation.quality import paired_drop
from paredown.validation.timing import Alternative, Timing, latency_ratio, measure, ratio

ROUNDS = 9


def validate(
    bundle: str,
    *,
    eval: str,
    reference: str | None = None,
    text_column: str | None = None,
    label_column: str | None = None,
    pair_column: str | None = None,
    score_column: str | None = None,
    max_drop: float | None = None,
    confidence: float | None = None,
    threads: int | None = None,
    weights: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What the bundle claims, measured again here: quality on `eval` against the dense model, speed, and parity.

    `accepted` says whether quality and speed are what was claimed, by the rules of `_claim`; `max_drop` is by default
    the bundle's own, if it is of the same metric. Columns, confidence and threads that are not named are those of the
    run that made it. The dense model is `reference`, or the one that the bundle's report names; `weights` go with a
    network that is named by its function.
    """
    if confidence is not None and not 0.5 <= confidence < 1:
        raise ParedownError("confidence is a share from 0.5 to below 1")
    progress = progress or Silent()
    bundle, eval = str(bundle), str(eval)  # paths are welcome too
    progress.stage("Opening the bundle")
    opened = bundles.load(Path(bundle))
    if opened.is_network:
        return validate_network(
            opened,
            eval=eval,
            reference=reference,
            weights=weights,
            max_drop=max_drop,
            confidence=confidence,
            threads=threads,
            seed=seed,
            progress=progress,
        )
    claim = opened.report()
    source = reference or claim["model"]
    confidence, threads = confidence or claim["confidence"], threads or claim.get("threads")
    try:
        loaded = load_model(source, task=opened.manifest["task"])
    except ParedownError as error:
        raise ParedownError(
            f"The dense model is needed to compare with ({error}); name it with --reference."
        ) from error
    anatomy = describe_loaded(loaded, loaded.model)
    if anatomy.fingerprint != opened.plan.fingerprint:
        raise FingerprintMismatch(f"{source} is not the model that {bundle} was made from: other tensors or shapes.")
    named = zip(COLUMNS, (text_column, label_column, pair_column, score_column), strict=True)
    columns = SimpleNamespace(**{name: given or claim.get("columns", {}).get(name) for name, given in named})
    data = load_data(eval, loaded, columns, evaluation=True, part="test")
    task = task_of(loaded.task)
    whole = network(loaded.model, anatomy.layout)
    tokens = _tokens(loaded, data, whole, opened.manifest["max_length"])
    if tokens.truncated:
        progress.say(f"{tokens.truncated} texts are longer than the model takes and were truncated.")
    progress.stage("Comparing answers")
    dense, small = outputs_of(whole, tokens), _answers(opened, tokens, threads)
    drop = paired_drop(task, dense, small, data, confidence=confidence, seed=seed)
    difference = _parity(opened)
    with tempfile.TemporaryDirectory() as folder:
        progress.stage("Timing, interleaved", ROUNDS)
        timed = _timed(loaded, whole, source, Path(folder), [_served(opened, bundle)], tokens, threads, progress)
    small_timing = timed.pop(bundle)
    faster = speed({f"{name} fp32": timing for name, timing in timed.items()}, small_timing)
    gate = max_drop
    if gate is None and drop.metric == claim["quality_metric"]:  # a budget of cosine says nothing of Spearman
        gate = claim["objective"]["max_drop"]
    reasons = [worse(claim, drop, gate), slower(claim, faster["speedup"], small_timing.latency_ms_p50)]
    reasons += [] if opened.manifest["accepted"] else ["the run that made it did not accept it"]
    reasons = [reason for reason in reasons if reason]
    facts = {
        "accepted": not reasons,
        "bundle": bundle,
        "task": task.NAME,
        "target": opened.manifest["target"],
        "precision": opened.manifest["precision"],
        **quality(task, data, dense, small, drop),
        "bound": drop.bound,
        "max_drop": gate,
        **faster,
        "parity": difference,
        "samples": len(data),
        "claimed": {key: claim[key] for key in ("speedup", "drop", "quality_pruned")},
        "machine": card(),
        "truncated": tokens.truncated,
    }
    facts["verdict"] = f"The claim does not hold here: {'; '.join(reasons)}." if reasons else holds(claim, faster, drop)
    plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    return plain


def bench(
    a: str,
    b: str,
    *,
    eval: str | None = None,
    text_column: str | None = None,
    target: str | None = None,
    threads: int | None = None,
    batch_size: int = 64,
    weights: str | None = None,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Two models or bundles timed side by side, interleaved: rows, and how many times as fast as `a` is `b`.

    A bundle runs as it serves, a model as it is on every runtime (or on `target`), of which its fastest counts.
    Without `eval` the texts are random tokens of 4 to 64 tokens. Image classifiers are timed with noise of their `size`
    of pictures; `weights` go with one that is named by its function.
    """
    progress = progress or Silent()
    a, b = str(a), str(b)  # paths are welcome too
    progress.stage("Opening")
    pictured = [_is_pictured(path) for path in (a, b)]
    if any(pictured) != all(pictured):
        raise ParedownError(f"{a} and {b} cannot be timed side by side: one takes pictures, the other texts.")
    with tempfile.TemporaryDirectory() as folder:
        if all(pictured):
            side_b, size_b, most_b = network_side(b, Path(folder) / "b", target, weights, size)
            side_a, size_a, most_a = network_side(a, Path(folder) / "a", target, weights, size or size_b)
            if size_a != size_b:
                raise ParedownError(f"{a} takes pictures of {size_a}, {b} of {size_b}; name one size with --size.")
            batches, singles = bench_pictures(size_a, batch_size)
            together = min(most_a, most_b)
        else:
            side_a, about, model_a = _side(a, Path(folder) / "a", target)
            side_b, other, model_b = _side(b, Path(folder) / "b", target)
            if eval is not None and about[0].get_vocab() != other[0].get_vocab():
                raise ParedownError(f"{a} and {b} have different vocabularies; without --eval both get random tokens.")
            tokens = _bench_tokens((*about[:2], min(about[2], other[2])), eval, text_column)
            if tokens.truncated:
                progress.say(f"{tokens.truncated} texts are longer than the models take and were truncated.")
            batches, singles = timing_batches(tokens, batch_size=batch_size)
            together = min(at_once(model_a), at_once(model_b))
        if a == b:
            side_b = [replace(one, name=f"{one.name} (again)") for one in side_b]
        alternatives = [*side_a, *side_b]
        progress.stage(f"Timing {len(alternatives)} alternatives, interleaved", ROUNDS)
        timed = measure(
            alternatives,
            batches,
            singles=singles,
            rounds=ROUNDS,
            threads=threads,
            seconds=120,
            together=together,
            progress=lambda done, of: progress.advance(ROUNDS / of),
        )
    fastest_a, fastest_b = (
        max((timed[one.name] for one in side), key=lambda timing: timing.texts_per_second) for side in (side_a, side_b)
    )
    rows = [
        {
            "name": name,
            "texts_per_second": timing.texts_per_second,
            "latency_ms_p50": timing.latency_ms_p50,
            "latency_ms_p90": timing.latency_ms_p90,
            "speedup": ratio(fastest_a, timing),
        }
        for name, timing in timed.items()
    ]
    facts = {
        "a": a,
        "b": b,
        "items": "pictures" if all(pictured) else "texts",
        "rows": rows,
        "speedup": ratio(fastest_a, fastest_b),
        "speedup_against": fastest_a.name,
        "latency_speedup": latency_ratio(fastest_a, fastest_b),
        "batch_size": batch_size,
        "machine": card(),
    }
    plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    return plain


def _is_pictured(path: str) -> bool:
    """Whether a path, or a name, is an image classifier or the bundle of one."""
    if (Path(path) / bundles.MANIFEST).is_file():
        return bundles.load(Path(path), verify=False).is_network
    return is_network(path, None)


def _side(path: str, folder: Path, target: str | None) -> tuple[list[Alternative], tuple[Any, Any, int], Any]:
    """What to time for one path; its tokenizer, input names and longest text; and its model."""
    folder.mkdir()
    if (Path(path) / bundles.MANIFEST).is_file():
        opened = bundles.load(Path(path))
        names = ("input_ids", "attention_mask", "token_type_ids")
        about = opened.tokenizer(), names, opened.manifest["max_length"]
        return [_served(opened, path, target)], about, opened.model()
    loaded = load_model(path)
    whole = network(loaded.model, describe_loaded(loaded, loaded.model).layout)
    found = _dense(loaded, whole, path, folder, target)
    return found, (loaded.tokenizer, ("input_ids", "attention_mask", "token_type_ids"), loaded.max_length), loaded.model


def _dense(loaded: LoadedModel, whole: Network, path: str, folder: Path, target: str | None) -> list[Alternative]:
    """The model as it is on every runtime; a language model on torch alone."""
    found = [Alternative(f"{path} torch", _loaders.STOCK, path, {"task": loaded.task})]
    if not isinstance(whole, Encoder):
        if target not in (None, "torch"):
            raise ParedownError(f"{path} is a language model, and those run on torch here; {target} was asked for.")
        return found
    onnx = export_stock(whole, folder / "dense.onnx")
    found.append(Alternative(f"{path} onnxruntime", _loaders.ONNX, str(onnx)))
    if has_openvino():
        found.append(Alternative(f"{path} openvino", _loaders.OPENVINO, str(onnx)))
    asked = [one for one in found if target is None or one.name.endswith(f" {target}")]
    if not asked:
        raise MissingExtra("openvino", "openvino")
    return asked


def _timed(
    loaded: LoadedModel,
    whole: Network,
    source: str,
    folder: Path,
    others: Sequence[Alternative],
    tokens: Tokens,
    threads: int | None,
    progress: Progress,
) -> dict[str, Timing]:
    batches, singles = timing_batches(tokens)
    return measure(
        [*others, *_dense(loaded, whole, source, folder, None)],
        batches,
        singles=singles,
        rounds=ROUNDS,
        threads=threads,
        seconds=120,
        together=at_once(loaded.model),
        progress=lambda done, of: progress.advance(ROUNDS / of),
    )


def _served(opened: Bundle, name: str, target: str | None = None) -> Alternative:
    """The bundle as it serves, or by its fp32 file for another target."""
    target = target or opened.manifest["target"]
    if target in ("torch", "sparse_cpu"):
        return Alternative(name, _loaders.TORCH, str(opened.folder), {"target": target})
    same = target == opened.manifest["target"]
    file = opened.manifest["file"] if same else bundles.SERVING[target, "fp32"]
    return Alternative(name, _loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO, str(opened.folder / file))


def _answers(opened: Bundle, tokens: Tokens, threads: int | None) -> Array:
    """What the bundle's file answers as it serves; of a language model how likely its network finds the texts."""
    served = opened.network()
    if isinstance(served, Decoder):
        return outputs_of(served, tokens)
    runner = opened.runner(threads=threads)
    try:
        return run_batches(lambda arrays: next(iter(runner.run(arrays).values())), tokens)
    finally:
        runner.close()


def _tokens(loaded: LoadedModel, data: TextData, whole: Network, max_length: int) -> Tokens:
    texts = task_of(loaded.task).all_texts(data)
    if isinstance(whole, Decoder):
        return windows(loaded.tokenizer, texts, max_length=max_length)
    return tokenize(loaded.tokenizer, texts, max_length=max_length, input_names=whole.input_names)


def _bench_tokens(about: tuple[Any, Any, int], path: str | None, text_column: str | None) -> Tokens:
    import numpy as np

    from paredown.tasks import TEXT_COLUMNS, read_table

    tokenizer, names, longest = about
    if path is None:
        rng = np.random.default_rng(0)
        lengths = rng.integers(4, min(64, longest) + 1, 512)
        known = len(tokenizer)
        ids = tuple(rng.integers(min(5, known - 1), min(100, known), n) for n in lengths)
        return Tokens(ids, int(tokenizer.pad_token_id or 0), names, 0)
    table = read_table(path, wanted=(text_column,), part="test")
    column = text_column or table.first_of((*TEXT_COLUMNS, "sentence1", "text_a"))
    if column is None:
        raise BadData(f"{path}: no column of texts found among {table.listed}; name it with --text-column.")
    texts = [text for text in table.column(column) if text.strip()]
    if not texts:
        raise BadData(f"{path}: every row's {column!r} is empty.")
    return tokenize(tokenizer, texts, max_length=longest, input_names=names)


def _parity(opened: Bundle) -> float | None:
    """Of the bundle's fp32 ONNX file, if it holds one."""
    name = bundles.SERVING["onnxruntime", "fp32"]
    if name not in opened.manifest["files"]:
        return None
    return parity_of(
        opened.folder / name, cast(Encoder | Packed, opened.network()), longest=opened.manifest["max_length"]
    )
