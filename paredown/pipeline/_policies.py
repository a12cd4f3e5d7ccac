"""Token policies as the pipeline makes them: which tokens are special, which policies a run tries, from what length on
they pay.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from paredown import registry
from paredown.cores import cores
from paredown.encoder import Encoder
from paredown.errors import ParedownError
from paredown.files import replacing
from paredown.models import LoadedModel
from paredown.pipeline import _loaders
from paredown.pipeline._prepare import Prepared
from paredown.pipeline._settings import POLICY, Progress
from paredown.targets import export_stock
from paredown.targets import onnxruntime as ort
from paredown.tokens import Packed
from paredown.types import Anatomy, Array, Plan, Runner, TokenPolicy, TokenStage
from paredown.validation.timing import Alternative

TENSORS = "policy.safetensors"  # what it has learnt, beside POLICY
FITTED_TOKENS = 60_000  # that gates and exits learn from: three hundred posts, or four thousand questions
PROBED_LENGTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192)  # where it is measured whether dropping pays
PROBED_BATCH, PROBED_ROUNDS = 8, 7
PAYS = 1.02  # times as fast: what is gained by less may be noise

# Of a run of `prune`: careful and bold, as (share of the layers, share of tokens that stays).
CAREFUL, BOLD = (1 / 3, 0.7), (1 / 6, 0.5)
WORTH_TRYING = 48.0  # mean tokens of a text; below, the gather costs what it saves


class Dense(Protocol):
    """A dense model with its exact folds; `Prepared` is one."""

    @property
    def loaded(self) -> LoadedModel: ...

    @property
    def anatomy(self) -> Anatomy: ...

    @property
    def encoder(self) -> Encoder: ...


def policies_for(prepared: Prepared, layers: int, *, bold: bool, asked: TokenPolicy | None = None) -> list[TokenPolicy]:
    """What a run tries on a model of so many layers, `bold` policies too or careful ones alone; none on short texts.

    A policy that was `asked` for is tried instead, whatever the texts, if there are layers behind it.
    """
    if asked is not None:
        return [asked] if asked.stages and asked.stages[-1].after < layers else []
    if layers < 2 or prepared.guardrail.lengths.mean() < WORTH_TRYING:
        return []
    special = special_ids(prepared.loaded.tokenizer)
    return [
        TokenPolicy("learned", (TokenStage(max(1, round(depth * layers)), keep),), special_ids=special)
        for depth, keep in ((CAREFUL, BOLD) if bold else (CAREFUL,))
    ]


def special_ids(tokenizer: Any) -> tuple[int, ...]:
    """The ids of tokens that mark the ends of texts and sentences: they stay, whatever they score."""
    named = (getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep", "bos", "eos"))
    return tuple(sorted({int(one) for one in named if one is not None}))


def read_policy(folder: str | Path, encoder: Encoder) -> Packed:
    """What `write_policy` wrote, on this model. ParedownError where it cannot be read, or was learnt on another."""
    path, tensors = Path(folder) / POLICY, Path(folder) / TENSORS
    try:
        policy = TokenPolicy.from_json(path.read_text(encoding="utf-8"))
        learnt = load_file(tensors) if tensors.exists() else {}
    except FileNotFoundError as error:
        raise ParedownError(f"{folder} holds no {POLICY}: name what --out of a sweep or search made") from error
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ParedownError(f"{folder} holds a token policy that cannot be read: {error}") from error
    return Packed(encoder, policy, learnt)


def write_policy(folder: Path, packed: Packed) -> None:
    """The policy, and the tensors that it has learnt, as files of the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    if packed.tensors:
        with replacing(folder / TENSORS) as beside:
            save_file(packed.tensors, beside)
    with replacing(folder / POLICY) as beside:
        beside.write_text(packed.policy.to_json() + "\n", encoding="utf-8")


def described(policy: TokenPolicy) -> str:
    """A policy in words: "learned, 60% after 2"."""
    how = {"ratio": "{:.0%}", "quantile": "above the {:.2g}-quantile", "threshold": "above {:.3g}"}[policy.rule]
    stages = " and ".join(f"{how.format(stage.keep)} after {stage.after}" for stage in policy.stages)
    name = "merged" if policy.action == "merge" else policy.scorer.replace("_", " ")
    least = f", {policy.least} at least" if policy.least > 1 else ""
    return f"{name}, {stages}{least}{', exit' if policy.exit else ''}"


def switched_off(
    packed: Packed,
    prepared: Prepared,
    target: str,
    folder: Path,
    threads: int | None,
    progress: Progress,
    *,
    precision: str = "fp32",
) -> tuple[Packed, list[dict[str, float]]]:
    """The policy that leaves texts alone up to the length where dropping does not pay, measured here; and the ratios
    of times by length, dense against pruned.

    Both run in this process, in turn, on eight texts of random tokens of one length.
    """
    lengths = [n for n in PROBED_LENGTHS if packed.policy.least < n <= prepared.loaded.max_length]
    progress.stage("Finding the length from which it pays", len(lengths))
    count = threads or cores()
    dense = _runner(None, prepared, target, folder, count, precision)
    pruned = _runner(packed, prepared, target, folder, count, precision)
    curve: list[dict[str, float]] = []
    try:
        for n in lengths:
            batch = _random_texts(prepared, n)
            times = _in_turn([dense, pruned], batch)
            curve.append({"length": n, "ratio": float(np.median(times[0] / times[1]))})
            progress.advance(note=f"{n} tokens: {curve[-1]['ratio']:.2f}x")
    finally:
        dense.close()
        pruned.close()
    policy = replace(packed.policy, off_below=pays_above([(int(one["length"]), one["ratio"]) for one in curve]))
    return Packed(packed.encoder, policy, packed.tensors), curve


def pays_above(ratios: Sequence[tuple[int, float]]) -> int:
    """The length up to which dropping does not pay, from measured (length, times as fast): 0 where it always does.

    Single ratios are noisy: taken is the length that contradicts fewest of them.
    """

    def contradicted(off: int) -> int:
        return sum((ratio >= PAYS) != (length > off) for length, ratio in ratios)

    return min((0, *(length for length, _ in ratios)), key=contradicted)


def _runner(
    packed: Packed | None, prepared: Prepared, target: str, folder: Path, threads: int, precision: str
) -> Runner:
    if target == "torch":
        from paredown.targets.torch import load_encoder

        return load_encoder(packed or Packed(prepared.encoder), threads=threads, precision=precision)
    name = "plain.onnx" if packed is None else f"{packed.policy.id[:12]}.onnx"
    path = folder / name
    if not path.exists():
        ort.export(packed or prepared.encoder, path)
    runner: Runner = registry.find("targets", target).load(path, threads=threads)
    return runner


def _random_texts(prepared: Prepared, length: int) -> dict[str, Array]:
    random = np.random.default_rng(length)
    vocabulary = prepared.model.config.vocab_size
    ids = random.integers(min(1000, vocabulary // 2), vocabulary, (PROBED_BATCH, length))
    arrays = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: arrays[name] for name in prepared.network.input_names}


def _in_turn(runners: Sequence[Runner], batch: Mapping[str, Array]) -> Array:
    """[2, R] seconds, a first turn discarded."""

    times = np.zeros((len(runners), PROBED_ROUNDS + 1))
    for turn in range(PROBED_ROUNDS + 1):
        for i, runner in enumerate(runners):
            begun = time.perf_counter()
            runner.run(batch)
            times[i, turn] = time.perf_counter() - begun
    return times[:, 1:]


def dense_alternative(model: Dense, target: str, folder: Path) -> Alternative:
    """The dense model on a target as anybody would run it."""
    loaded = model.loaded
    if target == "torch":
        return Alternative("dense", _loaders.STOCK, loaded.source, {"task": loaded.task})
    path = folder / "dense.onnx"
    if not path.exists():
        export_stock(model.encoder, path)
    return Alternative("dense", _loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO, str(path))


def alternative_of(
    packed: Packed | None, name: str, model: Dense, target: str, folder: Path, precision: str = "fp32"
) -> Alternative:
    """What a worker needs to run a policy on a target; without a policy, to run without padding on torch."""
    loaded = model.loaded
    if target == "torch":
        policy = packed.policy if packed is not None else TokenPolicy("norm")
        identity = Plan(model.anatomy.fingerprint, model.anatomy.identity())
        options = {"task": loaded.task, "plan": identity.to_json(), "policy": policy.to_json(), "precision": precision}
        if packed is not None and packed.tensors:
            options["tensors"] = str(folder / f"{policy.id[:12]}.safetensors")
            save_file(packed.tensors, options["tensors"])
        return Alternative(name, _loaders.CUT, loaded.source, options)
    assert packed is not None
    path = ort.export(packed, folder / f"{packed.policy.id[:12]}.onnx")
    return Alternative(name, _loaders.ONNX if target == "onnxruntime" else _loaders.OPENVINO, str(path))
