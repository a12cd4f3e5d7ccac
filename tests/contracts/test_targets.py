"""What every file of targets/ must pass: limits that planning can use, and the same function as torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown import registry
from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.network import network
from paredown.surgery import cut
from paredown.targets import export_stock, onnxruntime, openvino
from paredown.targets._stock import stock_forward
from paredown.types import Limits, Plan, Runner
from paredown.validation import parity
from tests.contracts.families import FAMILIES, VOCABULARY, tiny

TARGETS = registry.available("targets")
TOLERANCE = 1e-4  # the project's promise for fp32
EXPORTED = ("onnxruntime", "openvino")
IN_MEMORY = ("sparse_cpu", "torch")

ALONE = {
    "onnxruntime": """
import onnxruntime
session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
out = session.run(None, inputs)[0]
""",
    "openvino": """
import openvino
settings = {"INFERENCE_PRECISION_HINT": "f32"}
out = openvino.Core().compile_model(path, "CPU", settings)(inputs)[0]
""",
}


def pruned(family: str, task: str) -> Encoder:
    """A tiny model with other widths in every layer; the second one has no neurons left."""
    model = tiny(family, task, max_position_embeddings=80)
    anatomy = describe(model)
    keep = anatomy.identity()
    for group in anatomy.groups:
        if group.kind == "head":
            keep[group.name] = (3, 1)[: 2 - group.layer % 2] if group.layer < 2 else (0, 1, 2)
        if group.kind == "neuron":
            keep[group.name] = {0: (2, 3, 7), 1: ()}.get(group.layer, tuple(range(11)))
        keep[group.name] = tuple(sorted(keep[group.name]))
    return Encoder(cut(model, anatomy, Plan(anatomy.fingerprint, keep)), anatomy.layout).eval()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], tuple[Encoder, dict[str, Path]]]:
    """The encoder of a family and its files by target, written once."""
    done: dict[tuple[str, str], tuple[Encoder, dict[str, Path]]] = {}

    def get(family: str, task: str) -> tuple[Encoder, dict[str, Path]]:
        if (family, task) not in done:
            encoder, folder = pruned(family, task), tmp_path_factory.mktemp("exported")
            onnx_path = onnxruntime.export(encoder, folder / "model.onnx")
            xml_path = openvino.export(onnx_path, folder / "model.xml")
            done[family, task] = encoder, {"onnxruntime": onnx_path, "openvino": xml_path}
        return done[family, task]

    return get


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "text-classification"), ("mpnet", "text-embedding"), ("llama", "causal-lm")]
)
def test_a_dense_model_is_exported_as_transformers_runs_it(family: str, task: str, tmp_path: Path) -> None:
    """What speed-ups are measured against: the model's own forward pass, which knows nothing of Paredown."""
    model = tiny(family, task, max_position_embeddings=80)
    dense = network(model, describe(model, task=task).layout)
    path = export_stock(dense, tmp_path / "stock.onnx")
    for shape in ((1, 3), (5, 41)):
        ids = torch.randint(5, VOCABULARY, shape)
        whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        inputs = {name: whole[name] for name in dense.input_names}
        with torch.inference_mode():
            wanted = stock_forward(dense, inputs).numpy()
        runner = onnxruntime.load(str(path), threads=1)
        (got,) = runner.run({name: value.numpy() for name, value in inputs.items()}).values()
        runner.close()
        np.testing.assert_allclose(got, wanted, atol=TOLERANCE)


def runner_of(target: str, encoder: Encoder, files: dict[str, Path]) -> Runner:
    module = registry.find("targets", target)
    if target in files:
        runner: Runner = module.load(files[target], threads=1)
    else:
        runner = module.load_encoder(encoder, threads=torch.get_num_threads())
    return runner


def test_every_target_is_known_here() -> None:
    assert set(TARGETS) == {"huggingface", *IN_MEMORY, *EXPORTED}  # a new one: add it to the tests below


@pytest.mark.parametrize("target", TARGETS)
def test_limits_can_be_planned_with(target: str) -> None:
    limits = registry.find("targets", target).LIMITS
    assert isinstance(limits, Limits)
    assert limits.multiple_of >= 1
    assert set(limits.allowed) <= {"head", "neuron", "layer"}


def same_function(target: str, encoder: Encoder, files: dict[str, Path]) -> None:
    runner = runner_of(target, encoder, files)

    def reference(inputs: Any) -> Any:
        with torch.inference_mode():
            return encoder(**{name: torch.from_numpy(array) for name, array in inputs.items()}).numpy()

    def run(inputs: Any) -> Any:
        surplus = {"token_type_ids": np.zeros_like(inputs["input_ids"]), "other": np.zeros(1)}
        outputs = runner.run({**surplus, **inputs})
        assert list(outputs) == [encoder.output_name]
        assert outputs[encoder.output_name].dtype == np.float32
        return outputs[encoder.output_name]

    parity.check(reference, run, input_names=encoder.input_names, vocabulary=VOCABULARY, tolerance=TOLERANCE)
    runner.close()


@pytest.mark.parametrize("target", (*IN_MEMORY, *EXPORTED))
@pytest.mark.parametrize("family", FAMILIES)
def test_classifiers_compute_what_torch_computes(family: str, target: str, exported: Any) -> None:
    same_function(target, *exported(family, "text-classification"))


@pytest.mark.parametrize("target", (*IN_MEMORY, *EXPORTED))
@pytest.mark.parametrize("family", ("bert", "mpnet"))  # without and with a position bias
def test_sentence_encoders_compute_what_torch_computes(family: str, target: str, exported: Any) -> None:
    same_function(target, *exported(family, "text-embedding"))


@pytest.mark.parametrize("family", FAMILIES)
def test_another_model_of_the_architecture_takes_over_the_trace(
    family: str, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, files = exported(family, "text-classification")
    model = tiny(family, max_position_embeddings=80, seed=5)
    other = Encoder(model, describe(model).layout).eval()

    trace, traced = onnxruntime._traced, []
    monkeypatch.setattr(onnxruntime, "_traced", lambda *arguments: traced.append(1) or trace(*arguments))
    written = onnxruntime.export(other, tmp_path / "other.onnx", like=files["onnxruntime"])
    same_function("onnxruntime", other, {"onnxruntime": written})
    assert bool(traced) == (family in ("distilbert", "electra"))  # torch transposes weights of theirs as it traces


def test_the_trace_of_another_architecture_is_not_taken_over(exported: Any, tmp_path: Path) -> None:
    _, files = exported("bert", "text-classification")
    model = tiny("bert", max_position_embeddings=80, layer_norm_eps=1e-5)
    other = Encoder(model, describe(model).layout).eval()
    same_function(
        "onnxruntime",
        other,
        {"onnxruntime": onnxruntime.export(other, tmp_path / "other.onnx", like=files["onnxruntime"])},
    )


@pytest.mark.parametrize("target", EXPORTED)
def test_a_result_is_not_overwritten_by_the_next_run(target: str, exported: Any) -> None:
    encoder, files = exported("bert", "text-classification")
    runner = runner_of(target, encoder, files)
    batches = [{name: np.full((2, 5), value) for name in encoder.input_names} for value in (0, 1)]
    first = runner.run(batches[0])[encoder.output_name]
    before = first.copy()
    assert not np.array_equal(runner.run(batches[1])[encoder.output_name], before)
    np.testing.assert_array_equal(first, before)


@pytest.mark.parametrize("target", EXPORTED)
def test_the_file_runs_in_a_fresh_process_without_paredown(target: str, exported: Any, tmp_path: Path) -> None:
    encoder, files = exported("bert", "text-classification")
    code = f"""
import sys, numpy
path, result = sys.argv[1:]
ids = numpy.arange(5, 17).reshape(2, 6)
inputs = {{"input_ids": ids, "attention_mask": numpy.ones_like(ids), "token_type_ids": numpy.zeros_like(ids)}}
{ALONE[target]}
assert "paredown" not in sys.modules and "torch" not in sys.modules
numpy.save(result, out)
"""
    command = [sys.executable, "-c", code, str(files[target]), str(tmp_path / "out.npy")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(5, 17).reshape(2, 6)
    with torch.inference_mode():
        expected = encoder(ids, torch.ones_like(ids), torch.zeros_like(ids)).numpy()
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, atol=TOLERANCE)
