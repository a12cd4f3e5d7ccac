"""Everything that might be the answer, the boring things included: files made, answers given, times taken."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from paredown import registry
from paredown.cores import cores
from paredown.encoder import Encoder
from paredown.files import state_of
from paredown.network import network
from paredown.pipeline import _loaders
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._policies import FITTED_TOKENS, described
from paredown.pipeline._prepare import Prepared, calibration_batches, describe_loaded, outputs_of
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import Student, nonzero
from paredown.pipeline._work import Work
from paredown.quantization import int8
from paredown.surgery import parameters
from paredown.targets import export_stock, sparse_cpu
from paredown.targets import onnxruntime as ort
from paredown.tasks import Tokens, fit_tfidf, run_batches
from paredown.tokens import Packed, fit
from paredown.types import Array, Plan, Runner, TokenPolicy
from paredown.validation.timing import Alternative

BASELINE = "dense"  # the kind of the fp32 alternatives that speed-ups are measured against


@dataclass(frozen=True)
class Candidate:
    """One possible answer. `eligible` ones run on the target asked for and are not merely a baseline or a control.

    `kind`: dense, folded, whole, dense-int8, pruned, pruned-int8, layer-drop, layer-drop-int8, tokens, tokens-int8,
    sparse, tfidf.
    `packed` is the model with its token policy, where it drops tokens while it runs.
    """

    name: str
    kind: str
    target: str
    precision: str
    alternative: Alternative | None
    plan: Plan | None = None
    model: Any = None
    file: Path | None = None
    parameters: int | None = None
    eligible: bool = False
    note: str = ""
    packed: Packed | None = None
    predictor: Any = field(default=None, compare=False)  # a control that takes texts, not tokens

    def outputs(self, prepared: Prepared, tokens: Tokens, texts: Sequence[str], threads: int | None) -> Array:
        """What it answers to every text [N, ...], in the precision and on the engine it would be served with."""
        if self.predictor is not None:
            return np.asarray(self.predictor.predict_logits(texts))
        if self.alternative is None or self.target == "torch":
            return outputs_of(self.packed or network(self.model, prepared.anatomy.layout), tokens)
        runner = self._runner(prepared, threads or cores())
        name = prepared.network.output_name
        try:
            return run_batches(lambda arrays: runner.run(arrays)[name], tokens)
        finally:
            runner.close()
            give_back_what_is_freed()

    def _runner(self, prepared: Prepared, threads: int) -> Runner:
        assert self.alternative is not None
        if self.target == "sparse_cpu":
            return sparse_cpu.load_encoder(Encoder(self.model, prepared.anatomy.layout), threads=threads)
        found: Runner = registry.find("targets", self.target).load(Path(self.alternative.path), threads=threads)
        return found


def dense_candidates(prepared: Prepared, settings: Settings, work: Work, progress: Progress) -> list[Candidate]:
    """The dense model on every runtime as anybody would export it, its int8 form, and its exact folds."""
    progress.stage("Exporting the dense model")
    loaded = prepared.loaded
    size = parameters(loaded.model)
    identity = Plan(prepared.anatomy.fingerprint, prepared.anatomy.identity(), source="nothing cut")
    about: dict[str, Any] = {"plan": identity, "model": prepared.model, "parameters": size}
    torch_dense = _dense(
        "torch", Alternative("torch dense", _loaders.STOCK, loaded.source, {"task": loaded.task}), about
    )
    if prepared.generates:
        return [torch_dense]
    plain = Encoder(loaded.model, describe_loaded(loaded, loaded.model).layout)
    stock = work.file("dense-stock.onnx", lambda path: export_stock(plain, path))
    folded = work.file("dense.onnx", lambda path: ort.export(prepared.encoder, path))
    quantized = work.file("dense-int8.onnx", lambda path: int8.quantize(folded, path))
    found = [
        torch_dense,
        _dense("onnxruntime", Alternative("onnxruntime dense", _loaders.ONNX, str(stock)), about),
    ]
    if has_openvino():
        found.append(_dense("openvino", Alternative("openvino dense", _loaders.OPENVINO, str(stock)), about))
    found.append(
        _on_target(
            Candidate(
                "dense, exact folds", "folded", settings.target, "fp32", None, **about, file=folded, eligible=True
            ),
            settings,
            loaded,
            None,
        )
    )
    found.append(
        Candidate(
            "dense int8",
            "dense-int8",
            "onnxruntime",
            "int8",
            Alternative("dense int8", _loaders.ONNX, str(quantized)),
            **about,
            file=quantized,
            eligible=not not_int8(settings),
            note=not_int8(settings),
        )
    )
    return found


def student_candidates(
    student: Student, prepared: Prepared, settings: Settings, work: Work, progress: Progress
) -> list[Candidate]:
    """A student on the target in fp32, and as ONNX Runtime int8; a language model on torch alone, and what runs on our
    own engine there alone: it needs no file.
    """
    stem = student.name.replace(" ", "-").replace(",", "")
    weights = work.path(f"{stem}-weights.safetensors")
    work.tensors(f"{stem}-weights", lambda: state_of(student.model))
    about: dict[str, Any] = {
        "plan": student.plan,
        "model": student.model,
        "parameters": nonzero(student.model) if student.zeros else parameters(student.model),
    }
    plain = Candidate(
        student.name, student.kind, settings.target, "fp32", None, eligible=True, note=student.note, **about
    )
    if prepared.generates or settings.target == "sparse_cpu":
        return [_on_target(plain, settings, prepared.loaded, weights)]
    progress.stage(f"Exporting {student.name}")
    encoder = Encoder(student.model, prepared.anatomy.layout)
    onnx = work.file(f"{stem}.onnx", lambda path: ort.export(encoder, path, like=work.path("dense.onnx")))
    plain = _on_target(replace(plain, file=onnx), settings, prepared.loaded, weights)
    return [plain, _in_int8(plain, settings, work)]


def token_candidates(
    base: Candidate, policies: Sequence[TokenPolicy], prepared: Prepared, settings: Settings, work: Work
) -> list[Candidate]:
    """A model that drops tokens while it runs, by each policy: on the target in fp32, and as ONNX Runtime int8."""
    encoder = Encoder(base.model, prepared.anatomy.layout)
    batches = calibration_batches(prepared.calibration, most_tokens=FITTED_TOKENS)
    found = []
    for policy in policies:
        name = f"{base.name}, tokens {described(policy)}"
        stem = re.sub("[^a-z0-9.]+", "-", name.lower())
        tensors = work.tensors(f"{stem}-tokens", partial(fit, encoder, policy, batches, seed=settings.seed))
        packed = Packed(encoder, policy, tensors)
        onnx = work.file(f"{stem}.onnx", partial(ort.export, packed))
        one = replace(base, name=name, kind="tokens", file=onnx, eligible=True, packed=packed)
        weights = dict(base.alternative.options).get("weights") if base.alternative is not None else None
        one = _on_target(one, settings, prepared.loaded, weights and Path(weights))
        if settings.target == "torch" and one.alternative is not None:
            more = {"policy": policy.to_json(), "tensors": str(work.path(f"{stem}-tokens.safetensors"))}
            one = replace(one, alternative=replace(one.alternative, options={**one.alternative.options, **more}))
        found += [one, _in_int8(one, settings, work)]
    return found


def _in_int8(plain: Candidate, settings: Settings, work: Work) -> Candidate:
    """The same as ONNX Runtime int8."""
    onnx = plain.file
    assert onnx is not None
    quantized = work.file(f"{onnx.stem}-int8.onnx", lambda path: int8.quantize(onnx, path))
    name = f"{plain.name} int8"
    return replace(
        plain,
        name=name,
        kind=f"{plain.kind}-int8",
        target="onnxruntime",
        precision="int8",
        alternative=Alternative(name, _loaders.ONNX, str(quantized)),
        file=quantized,
        eligible=not not_int8(settings),
        note="; ".join(filter(None, (not_int8(settings), plain.note))),
    )


def control(prepared: Prepared, settings: Settings, progress: Progress) -> list[Candidate]:
    """TF-IDF with logistic regression, where there are labels to fit it to."""
    data = prepared.splits.calibration
    if not prepared.classifies or data.labels is None or len(np.unique(data.labels)) < 2:
        return []
    progress.stage("Fitting the TF-IDF control")
    try:
        fitted = fit_tfidf(data, num_classes=prepared.model.config.num_labels)
    except ValueError as error:  # scikit-learn's for texts without a word of two letters
        progress.say(f"No TF-IDF control: {error}")
        return []
    note = "a control: not a candidate for the bundle"
    return [
        Candidate("TF-IDF + logistic regression", "tfidf", "scikit-learn", "fp64", None, note=note, predictor=fitted)
    ]


def plain_file(candidate: Candidate) -> Path:
    """The fp32 ONNX file of a candidate, also of one that is served in int8."""
    assert candidate.file is not None
    return candidate.file.with_name(candidate.file.name.replace("-int8.onnx", ".onnx"))


def has_openvino() -> bool:
    """Whether OpenVINO is installed: it is an extra, and the comparison goes on without it."""
    return importlib.util.find_spec("openvino") is not None


def _dense(target: str, alternative: Alternative, about: Mapping[str, Any]) -> Candidate:
    return Candidate(alternative.name, BASELINE, target, "fp32", alternative, **about)


def not_int8(settings: Settings) -> str:
    """Why an int8 file cannot be the answer; empty if it can."""
    if settings.target != "onnxruntime":
        return f"for comparison: it runs on ONNX Runtime, and {settings.target} was asked for"
    return "for comparison: a stock checkpoint is fp32" if settings.uniform else ""


def _on_target(candidate: Candidate, settings: Settings, loaded: Any, weights: Path | None) -> Candidate:
    """The candidate with what a worker needs to run it on the target asked for."""
    if settings.target in ("torch", "sparse_cpu"):
        assert candidate.plan is not None
        options: dict[str, Any] = {"plan": candidate.plan.to_json(), "task": loaded.task, "target": settings.target}
        if weights is not None:
            options["weights"] = str(weights)
        return replace(candidate, alternative=Alternative(candidate.name, _loaders.CUT, loaded.source, options))
    loader = _loaders.ONNX if settings.target == "onnxruntime" else _loaders.OPENVINO
    return replace(candidate, alternative=Alternative(candidate.name, loader, str(candidate.file)))
