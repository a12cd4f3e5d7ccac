"""Bundles of tiny cut models, for the tests of the artefact and for the golden files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from paredown.anatomy import describe
from paredown.bundle import Bundle, save
from paredown.encoder import Encoder
from paredown.models import LoadedModel, load_model
from paredown.network import network
from paredown.quantization import int8
from paredown.sparsity import Pattern, matrices_of, matrix, solve
from paredown.surgery import cut, fold
from paredown.targets import onnxruntime, openvino
from paredown.tasks import pad, run_batches, tokenize
from paredown.tokens import Packed, applied, fit
from paredown.types import Anatomy, Array, Plan, TokenPolicy
from tests.contracts import families

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
TEXTS = ("My card is lost", "pay the bill", "want", "new loan to pay the new bill", "help help my w3 7 w4 is lost")


def plan_of(anatomy: Anatomy) -> Plan:
    """The middle layer gone, other widths in the rest, the last one without neurons; queries gone from groups."""
    whole = anatomy.identity()
    heads = [(1, 3), (0,), (0, 1, 2)] if len(whole["layer.0.heads"]) == 4 else [(1,), (0,), (0, 1)]
    keep: dict[str, tuple[int, ...]] = {"layers": (0, 2)}
    keep |= {f"layer.{i}.heads": units for i, units in enumerate(heads)}
    keep |= {f"layer.{i}.neurons": neurons for i, neurons in enumerate([tuple(range(2, 15)), (1, 2), ()])}
    queries = {name: units for name, units in whole.items() if name.endswith(".queries")}
    keep |= {name: units[-1:] if name == "layer.2.queries" else units for name, units in queries.items()}
    return Plan(anatomy.fingerprint, keep, "a test")


def pruned(loaded: LoadedModel) -> tuple[PreTrainedModel, Anatomy, Plan, tuple[str, ...]]:
    """The cut model, the anatomy of the dense one, the plan and the folds."""
    anatomy = describe(loaded.model, task=loaded.task, pooling=loaded.pooling, normalize=loaded.normalize)
    plan = plan_of(anatomy)
    folded, folds = fold(loaded.model, anatomy)
    return cut(folded, anatomy, plan), anatomy, plan, folds


def export(encoder: Encoder | Packed, work: Path, *, targets: Sequence[str]) -> dict[str, Path]:
    """The files that serve on the targets ("int8" is one here), written under `work`, by their names in a bundle."""
    (work / "openvino").mkdir(parents=True, exist_ok=True)
    names = ["report.html", "model.onnx"]
    (work / "report.html").write_text("<!doctype html><title>report</title>\n", encoding="utf-8")
    onnxruntime.export(encoder, work / "model.onnx")
    if "int8" in targets:
        int8.quantize(work / "model.onnx", work / "model-int8.onnx", reduce_range=True)  # the same on every CPU
        names += ["model-int8.onnx"]
    if "openvino" in targets:
        openvino.export(work / "model.onnx", work / "openvino" / "model.xml")
        names += ["openvino/model.xml", "openvino/model.bin"]
    return {name: work / name for name in names}


def make(
    folder: Path,
    family: str = "bert",
    task: str = "text-classification",
    *,
    exported: Sequence[str] = (),
    target: str = "torch",
    tokens: TokenPolicy | None = None,
    zeros: float = 0.0,
    work: Path | None = None,
    **changes: Any,
) -> Bundle:
    """A bundle at `folder` of a tiny cut model of the family; `exported`: with files for these targets; `tokens`: with
    this policy, fitted to TEXTS; `zeros`: with so many of its layers' weights zero.
    """
    work = work or folder.parent / f"{folder.name}-work"
    loaded = load_model(families.save(families.tiny(family, task, **changes), work / "dense"))
    model, anatomy, plan, folds = pruned(loaded)
    if zeros:
        whole = network(model, anatomy.layout)
        shares = {name: zeros for name, one in matrices_of(model, anatomy.layout).items() if matrix(one).numel()}
        model = solve(whole, shares, Pattern(), "magnitude", [])
    learnt: dict[str, Tensor] = {}
    files: dict[str, Path] = {}
    if tokens is not None:
        learnt = fit(Encoder(model, anatomy.layout), tokens, [inputs_of(loaded)])
    if exported:
        encoder = Encoder(model, anatomy.layout)
        files = export(encoder if tokens is None else applied(encoder, tokens, learnt), work, targets=exported)
    report = {"accepted": True, "speedup": {"value": 2.0, "low": 1.9, "high": 2.1}}
    return save(
        folder,
        model=model,
        anatomy=anatomy,
        plan=plan,
        loaded=loaded,
        target=target,
        accepted=True,
        folds=folds,
        tokens=tokens,
        token_tensors=learnt,
        files=files,
        report=report,
    )


def inputs_of(loaded: LoadedModel) -> dict[str, Array]:
    """TEXTS as one batch."""
    found = tokenize(loaded.tokenizer, TEXTS, max_length=loaded.max_length, input_names=INPUTS)
    return pad(found.ids, pad_id=found.pad_id, input_names=INPUTS)


def outputs_of(bundle: Bundle, texts: Sequence[str], target: str, precision: str = "fp32") -> Array:
    """What one of the bundle's files computes for the texts, as `predict` would if that file served."""
    tokens = tokenize(bundle.tokenizer(), texts, max_length=bundle.manifest["max_length"], input_names=INPUTS)
    runner = bundle.runner(target=target, precision=precision, threads=1)
    try:
        return run_batches(lambda inputs: next(iter(runner.run(inputs).values())), tokens)
    finally:
        runner.close()
