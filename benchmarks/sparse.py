"""Sparse models: a whole encoder on every engine, what solvers lose at once, and what training brings back."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepsparse_engine
import numpy as np

SHAPES = ((8, 128), (64, 16), (1, 16), (1, 128))  # texts x tokens
SOLVERS = ("magnitude", "wanda", "sparsegpt", "alps", "random")
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
TOLD = SimpleNamespace(stage=lambda *_: None, advance=lambda *_, **__: None, say=lambda *_: None)


def encoder(model: str, work: Path, *, rounds: int = 15) -> dict[str, Any]:
    """Milliseconds of one batch of the dense model and of 90 % zeros, every engine in turn; against dense ONNX Runtime.

    The zeros are by magnitude: what they do to quality changes no time.
    """
    import torch

    from paredown import sparsity
    from paredown.anatomy import describe
    from paredown.cores import cores
    from paredown.files import state_of
    from paredown.models import load_model
    from paredown.network import network
    from paredown.pipeline import _loaders
    from paredown.sparsity import Pattern
    from paredown.surgery import fold
    from paredown.targets import export_stock
    from paredown.types import Plan
    from paredown.validation import timing
    from paredown.validation.machine import card

    loaded = load_model(model)
    told = {"task": loaded.task, "pooling": loaded.pooling, "normalize": loaded.normalize}
    stock = export_stock(network(loaded.model, describe(loaded.model, **told).layout), work / "sparse-dense.onnx")
    folded, _ = fold(loaded.model, describe(loaded.model, **told))
    anatomy = describe(folded, **told)
    plan = Plan(anatomy.fingerprint, anatomy.identity()).to_json()
    cut = {"plan": plan, "task": loaded.task, "target": "sparse_cpu"}
    engines = [
        timing.Alternative("onnxruntime dense", _loaders.ONNX, str(stock)),
        timing.Alternative("torch dense", _loaders.STOCK, model, {"task": loaded.task}),
        timing.Alternative("openvino dense", _loaders.OPENVINO, str(stock)),
        timing.Alternative("paredown dense", _loaders.CUT, model, cut),
    ]
    for pattern in ("unstructured", "4x1"):
        layout = anatomy.layout
        shares = dict.fromkeys(sparsity.matrices_of(folded, layout), 0.9)
        sparse = sparsity.solve(network(folded, layout), shares, Pattern.parse(pattern), "magnitude", [])
        from safetensors.torch import save_file

        weights = work / f"sparse-{pattern}.safetensors"
        save_file(state_of(sparse), weights)
        options = {**cut, "weights": str(weights)}
        engines.append(timing.Alternative(f"paredown 90% {pattern}", _loaders.CUT, model, options))
        if pattern == "unstructured" and os.environ.get(deepsparse_engine.PYTHON):
            classic = _classic(sparse, model, work / "sparse-classic.onnx")
            engines.append(timing.Alternative("deepsparse 90% unstructured", "deepsparse_engine:load", str(classic)))
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    random = np.random.default_rng(0)
    batches = []
    for batch, length in SHAPES:
        ids = random.integers(5, 20_000, (batch, length))
        batches.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)})
    own = cores()
    torch.set_num_threads(own)
    taken = timing.measure(engines, batches[:1], singles=batches, rounds=rounds, threads=own)
    rows = []
    for name, found in taken.items():
        for i, (batch, length) in enumerate(SHAPES):
            dense, its = (timing.Timing(one.name, one.offline_seconds, one.single_ms[:, [i]], 1) for one in (
                taken["onnxruntime dense"], found
            ))  # fmt: skip
            milliseconds = float(np.median(its.single_ms))
            row = {"engine": name, "batch": batch, "length": length, "milliseconds": milliseconds}
            rows.append({**row, "speedup": vars(timing.latency_ratio(dense, its))})
    from paredown.kernels.encoder import LEVEL

    return {"model": Path(model).name, "rows": rows, "threads": own, "level": LEVEL, "machine": card()}


def _classic(sparse: Any, model: str, path: Path) -> Path:
    """The encoder as DeepSparse's users exported theirs: eager attention, traced, opset 14; its hidden states."""
    import torch
    from transformers import AutoModel

    plain: Any = AutoModel.from_pretrained(model, attn_implementation="eager", dtype=torch.float32).eval()
    plain.load_state_dict(sparse.state_dict(), strict=False)
    names = ("input_ids", "attention_mask", "token_type_ids")

    class Hidden(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = plain

        def forward(self, *given: Any) -> Any:
            return self.model(**dict(zip(names, given, strict=True))).last_hidden_state

    ids = torch.ones(8, 128, dtype=torch.long)
    axes = {name: {0: "batch", 1: "length"} for name in names}
    torch.onnx.export(
        Hidden(), (ids, ids, ids * 0), str(path), input_names=list(names), output_names=["hidden"],
        opset_version=14, dynamo=False, dynamic_axes=axes,
    )  # fmt: skip
    return path


def curve(arguments: Sequence[str], work: Path) -> Iterator[dict[str, Any]]:
    """Accuracy on the test file of a classifier with zeros and no training, by solver and share, and by allocation."""
    asked: list[dict[str, Any]] = [{"solver": solver, "sparsity": share} for share in SHARES for solver in SOLVERS]
    asked += [{"solver": solver, "pattern": "2:4"} for solver in SOLVERS[:-1]]
    asked += [{"solver": "sparsegpt", "pattern": "2:4", "permute": True}, {"solver": "sparsegpt", "pattern": "1:4"}]
    asked += [{"solver": "sparsegpt", "pattern": "4x1", "sparsity": share} for share in (0.5, 0.7, 0.8)]
    for how in ("global", "owl", "measured"):
        asked += [{"solver": "sparsegpt", "allocation": how, "sparsity": share} for share in (0.7, 0.8, 0.9)]
    yield from _made(arguments, work, [{**one, "minutes": 0.0} for one in asked])


def recovered(arguments: Sequence[str], work: Path, *, minutes: float = 1.0) -> Iterator[dict[str, Any]]:
    """The same after as many minutes of distillation that keeps the zeros: at once, and in rounds."""
    asked: list[dict[str, Any]] = []
    for share in (0.5, 0.7, 0.8, 0.9, 0.95):
        for solver in ("sparsegpt", "magnitude"):
            asked.append({"solver": solver, "sparsity": share})
        asked.append({"solver": "sparsegpt", "sparsity": share, "rounds": 4, "schedule": "cubic"})
    asked.append({"solver": "sparsegpt", "sparsity": 0.9, "rounds": 4, "schedule": "exponential"})
    asked.append({"solver": "sparsegpt", "sparsity": 0.8, "pattern": "4x1"})
    yield from _made(arguments, work, [{**one, "minutes": minutes} for one in asked])


def _made(arguments: Sequence[str], work: Path, asked: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A row per run: the stages of `sparsify` without its timing, judged on the whole test file."""
    import torch

    from paredown.cores import cores
    from paredown.network import network
    from paredown.pipeline._prepare import outputs_of, prepare
    from paredown.pipeline._settings import Settings
    from paredown.pipeline._sparsify import Zeroing
    from paredown.pipeline._work import Work
    from paredown.types import Limits

    torch.set_num_threads(cores())
    model, data, test = arguments[0], arguments[2], arguments[4]
    base = Settings(model=model, data=data, eval=test, out=str(work / "sparse"), pattern="unstructured", sparsity=0.5)
    prepared = prepare(base)
    labels = prepared.splits.test.labels
    kept = Work(work / "sparse-lessons", "lessons")  # what the teacher says is the same for all
    dense = float((outputs_of(prepared.network, prepared.test).argmax(1) == labels).mean())
    for number, one in enumerate(asked):
        settings = replace(base, **{"sparsity": None, **one})
        place = Work(work / f"sparse-{number}", "one")
        for name in ("taught.safetensors", "taught-extra.safetensors"):
            if kept.path(name).exists():
                os.link(kept.path(name), place.path(name))
        student = Zeroing(prepared, settings, place, TOLD, Limits()).student()  # type: ignore[arg-type]
        for name in ("taught.safetensors", "taught-extra.safetensors"):
            if place.path(name).exists() and not kept.path(name).exists():
                os.link(place.path(name), kept.path(name))
        place.discard()
        outputs = outputs_of(network(student.model, prepared.anatomy.layout), prepared.test)
        accuracy = float((outputs.argmax(1) == labels).mean())
        yield {**{"pattern": "unstructured", "rounds": 1, "allocation": "uniform"}, **one, "sparsity": settings.share,
               "accuracy": accuracy, "dense": dense, "texts": len(outputs)}  # fmt: skip
    kept.discard()


def perplexity(model: str, text: Path) -> dict[str, Any]:
    """Perplexity of a language model with zeros, by solver and pattern; calibration and judging texts are apart."""
    import torch

    from paredown import sparsity
    from paredown.anatomy import describe
    from paredown.models import load_model
    from paredown.network import network
    from paredown.sparsity import Pattern

    loaded = load_model(model)
    layout = describe(loaded.model).layout
    whole: Any = network(loaded.model, layout)
    ids = loaded.tokenizer(text.read_text(encoding="utf-8")[:600_000])["input_ids"]
    windows = np.array(ids[: len(ids) // 256 * 256]).reshape(-1, 256)
    batches, judged = [_batch(windows[i : i + 16]) for i in range(0, 96, 16)], windows[-256:]

    def of(one: Any) -> float:
        with torch.inference_mode():
            found = [
                one.log_likelihood(**{k: torch.from_numpy(v) for k, v in _batch(judged[i : i + 32]).items()})
                for i in range(0, len(judged), 32)
            ]
        return float(np.exp(-torch.cat([part.flatten() for part in found]).sum().item() / (judged.size - len(judged))))

    rows = []
    for name, share in (("unstructured", 0.3), ("unstructured", 0.5), ("2:4", 0.5)):
        for solver in SOLVERS:
            shares = dict.fromkeys(sparsity.matrices_of(loaded.model, layout), share)
            sparse = sparsity.solve(whole, shares, Pattern.parse(name), solver, batches)
            rows.append(
                {"pattern": name, "sparsity": share, "solver": solver, "perplexity": of(network(sparse, layout))}
            )
    return {"model": Path(model).name, "dense": of(whole), "rows": rows, "tokens": int(judged.size)}


def _batch(windows: Any) -> dict[str, Any]:
    return {"input_ids": windows.astype(np.int64), "attention_mask": np.ones_like(windows, dtype=np.int64)}
