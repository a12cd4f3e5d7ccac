"""Everything that might be the answer for an image classifier, the boring things included."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from paredown.pipeline import _loaders
from paredown.pipeline._candidates import BASELINE, Candidate, has_openvino, not_int8
from paredown.pipeline._network_stopwatch import in_int8, on_target
from paredown.pipeline._networks import Pictured
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import Student
from paredown.pipeline._work import Work
from paredown.surgery import parameters
from paredown.targets import export_graph
from paredown.types import Plan
from paredown.validation.timing import Alternative


def dense_candidates(prepared: Pictured, settings: Settings, work: Work, progress: Progress) -> list[Candidate]:
    """The dense network on every runtime, as it is on the target, and in int8."""
    progress.stage("Exporting the dense network")
    model = prepared.model
    plan = Plan(prepared.anatomy.fingerprint, prepared.anatomy.identity(), source="nothing cut")
    about: dict[str, Any] = {"plan": plan, "model": model, "parameters": parameters(model)}
    file = work.file("dense.onnx", lambda path: export_graph(model, path))

    def dense(target: str) -> Candidate:
        name = f"{target} dense"
        return Candidate(name, BASELINE, target, "fp32", on_target(target, model, name, file), **about)

    found = [dense("torch"), dense("onnxruntime"), *([dense("openvino")] if has_openvino() else [])]
    name = f"dense on {settings.target}"
    whole = on_target(settings.target, model, name, file)
    found.append(Candidate(name, "whole", settings.target, "fp32", whole, file=file, eligible=True, **about))
    quantized = _in_int8(replace(found[-1], name="dense"), prepared, settings, work)
    return [*found, replace(quantized, name="dense int8", kind="dense-int8")]


def student_candidates(
    student: Student, prepared: Pictured, settings: Settings, work: Work, progress: Progress
) -> list[Candidate]:
    """A student on the target in fp32, and as ONNX Runtime int8."""
    progress.stage(f"Exporting {student.name}")
    file = work.file(f"{_stem(student.name)}.onnx", lambda path: export_graph(student.model, path))
    plain = Candidate(
        student.name,
        student.kind,
        settings.target,
        "fp32",
        on_target(settings.target, student.model, student.name, file),
        plan=student.plan,
        model=student.model,
        file=file,
        parameters=parameters(student.model),
        eligible=True,
        note=student.note,
    )
    return [plain, _in_int8(plain, prepared, settings, work)]


def _in_int8(plain: Candidate, prepared: Pictured, settings: Settings, work: Work) -> Candidate:
    """The same as ONNX Runtime int8, its ranges those of calibration pictures."""
    source = plain.file
    assert source is not None
    quantized = work.file(f"{source.stem}-int8.onnx", lambda path: in_int8(prepared, source, path))
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
        note=not_int8(settings),
    )


def _stem(name: str) -> str:
    return "".join(letter if letter.isalnum() or letter in "-." else "-" for letter in name)


def plain_onnx(candidate: Candidate) -> Path:
    """The fp32 ONNX file of a candidate, also of one that is served in int8."""
    assert candidate.file is not None
    return candidate.file.with_name(candidate.file.name.replace("-int8.onnx", ".onnx"))
