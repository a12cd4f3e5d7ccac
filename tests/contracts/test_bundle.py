"""What every bundle must pass: it reopens anywhere, notices a changed byte, holds no pickle; old ones still load."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown.bundle import FORMAT, MANIFEST, Bundle, load
from paredown.bundle import save as save_bundle
from paredown.errors import CorruptBundle, ParedownError
from paredown.models import load_model
from paredown.tokens import Packed
from tests.contracts.bundles import INPUTS, TEXTS, make, outputs_of, pruned
from tests.contracts.families import CASES, TASKS, batch, save, stock, tiny

CLASSIFIER, EMBEDDER = TASKS
ROOT = Path(__file__).parent.parent.parent
GOLDEN = sorted(path.parent for path in (ROOT / "tests" / "golden").glob("*/expected.json"))
KINDS = {"classifier": ("bert", CLASSIFIER), "embedder": ("mpnet", EMBEDDER)}
TARGETS = ("torch", "onnxruntime", "openvino")

FRESH = """
import json, sys
import paredown
bundle = paredown.load(sys.argv[1])
texts = json.loads(sys.argv[2])
outputs = [bundle.predict(texts).tolist()]
from paredown.tasks import run_batches, tokenize
tokens = tokenize(bundle.tokenizer(), texts, max_length=bundle.manifest["max_length"], input_names=("input_ids", "attention_mask", "token_type_ids"))
runner = bundle.runner(target="torch", threads=1)
outputs.append(run_batches(lambda inputs: next(iter(runner.run(inputs).values())), tokens).tolist())
print(json.dumps(outputs))
"""  # noqa: E501

ALONE = """
import json, sys
for name in ("paredown", "torch", "transformers"):
    sys.modules[name] = None  # importing it raises ImportError
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
inputs = {name: numpy.array(rows, numpy.int64) for name, rows in json.loads(sys.argv[2]).items()}
inputs = {entry.name: inputs.pop(entry.name) for entry in session.get_inputs()}
print(json.dumps({entry.name: out.tolist() for entry, out in zip(session.get_outputs(), session.run(None, inputs))}))
"""


def has(golden: Path, key: str) -> bool:
    """Whether a golden bundle is fed with "texts" or "pictures"."""
    return key in json.loads((golden / "expected.json").read_text())


def run_fresh(code: str, *arguments: str, cwd: Path) -> Any:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """A bundle with a file for every target, made once."""
    made: dict[str, Bundle] = {}

    def get(kind: str) -> Bundle:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind) / "bundle"
            exported = (*TARGETS, "int8")
            made[kind] = make(folder, *KINDS[kind], exported=exported, target="onnxruntime")
        return made[kind]

    return get


@pytest.mark.parametrize(("family", "task"), CASES)
def test_every_family_comes_back_as_it_was_saved(family: str, task: str, tmp_path: Path) -> None:
    saved = make(tmp_path / "bundle", family, task, vocab_size=64)  # Qwen2's tokenizer adds a token
    bundle = load(tmp_path / "bundle")
    assert bundle == saved
    expected, *_ = pruned(load_model(tmp_path / "bundle-work" / "dense"))
    model, inputs = bundle.model(), batch(expected)
    assert torch.equal(stock(model, inputs), stock(expected, inputs))
    assert not model.training and {str(parameter.dtype) for parameter in model.parameters()} == {"torch.float32"}
    assert not [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    with torch.inference_mode():
        out = bundle.network()(**inputs)
    torch.testing.assert_close(out, stock(expected, inputs), atol=1e-5, rtol=0)
    assert bundle.report()["speedup"]["value"] == 2.0
    assert (bundle.manifest["labels"] is not None) == (task == CLASSIFIER)


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_process_computes_the_same(kind: str, whole: Callable[[str], Bundle]) -> None:
    bundle = whole(kind)
    served, eager = run_fresh(FRESH, str(bundle.folder), json.dumps(TEXTS), cwd=ROOT)
    np.testing.assert_allclose(served, bundle.predict(TEXTS), atol=1e-6)
    np.testing.assert_allclose(eager, outputs_of(bundle, TEXTS, "torch"), atol=1e-6)
    np.testing.assert_allclose(served, eager, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_that_serves_computes_the_same(kind: str, whole: Callable[[str], Bundle]) -> None:
    outputs = {target: outputs_of(whole(kind), TEXTS, target) for target in TARGETS}
    for target in TARGETS:
        np.testing.assert_allclose(outputs[target], outputs["torch"], atol=1e-4, err_msg=target)
    quantized = outputs_of(whole(kind), TEXTS, "onnxruntime", "int8")
    difference = np.abs(quantized - outputs["torch"]).max() / np.abs(outputs["torch"]).max()
    assert 1e-6 < difference < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_the_onnx_file_runs_alone(kind: str, whole: Callable[[str], Bundle], tmp_path: Path) -> None:
    bundle = whole(kind)
    inputs = batch(bundle.model(), lengths=(9, 4, 1))
    inputs.setdefault("token_type_ids", torch.zeros_like(inputs["input_ids"]))
    rows = json.dumps({name: inputs[name].tolist() for name in INPUTS})
    found = run_fresh(ALONE, str(bundle.folder / "model.onnx"), rows, cwd=tmp_path)
    encoder = bundle.network()
    with torch.inference_mode():
        expected = encoder(*(inputs[name] for name in encoder.input_names))
    assert list(found) == [encoder.output_name]
    np.testing.assert_allclose(found[encoder.output_name], expected, atol=1e-4)


def test_a_flipped_byte_in_any_file_is_noticed(whole: Callable[[str], Bundle]) -> None:
    folder = whole("classifier").folder
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.name for path in paths} >= {MANIFEST, "plan.json", "model.onnx", "model.bin", "tokenizer.json"}
    for path in paths:
        original = path.read_bytes()
        for at in (0, len(original) // 2, len(original) - 1):
            path.write_bytes(original[:at] + bytes([original[at] ^ 1]) + original[at + 1 :])
            with pytest.raises(CorruptBundle, match=path.name):
                load(folder)
        path.write_bytes(original[:-1])
        with pytest.raises(CorruptBundle, match=path.name):
            load(folder)
        path.unlink()
        with pytest.raises(ParedownError, match=path.name):
            load(folder)
        path.write_bytes(original)
    load(folder)


def test_every_byte_of_the_manifest_counts(tmp_path: Path) -> None:
    folder = make(tmp_path / "bundle").folder
    path = folder / MANIFEST
    original = path.read_bytes()
    for at in range(len(original)):  # every bit has its turn: some only turn a blank into another one
        path.write_bytes(original[:at] + bytes([original[at] ^ (1 << at % 8)]) + original[at + 1 :])
        with pytest.raises(ParedownError):
            load(folder, verify=False)
    for changed in (original.replace(b"\n", b"\r\n"), original.rstrip(), original.replace(b"  ", b"\t", 1)):
        path.write_bytes(changed)  # the same values in other words
        with pytest.raises(CorruptBundle, match=MANIFEST):
            load(folder)


def test_nothing_is_a_pickle(whole: Callable[[str], Bundle]) -> None:
    for kind in KINDS:
        folder = whole(kind).folder
        for path in folder.rglob("*"):
            if path.is_dir() or path == folder / "openvino" / "model.bin":  # raw weights, by OpenVINO's own name
                continue
            start = path.read_bytes()[:4]
            assert path.suffix in (".json", ".safetensors", ".onnx", ".xml", ".html"), path
            assert start[:1] != b"\x80", f"{path} starts as a pickle does"
            assert start != b"PK\x03\x04", f"{path} is an archive, as torch.save writes it"


@pytest.mark.parametrize("kind", KINDS)
def test_tied_weights_stay_tied(kind: str, tmp_path: Path) -> None:
    family, task = KINDS[kind]
    loaded = load_model(save(tiny(family, task), tmp_path / "dense"))
    model, anatomy, plan, _ = pruned(loaded)
    first, second = (model.get_submodule(f"{anatomy.layout.layers}.{i}") for i in range(2))
    norm = anatomy.layout.layer_names["ffn_norm"]
    first.get_submodule(norm).weight = second.get_submodule(norm).weight
    bundle = save_bundle(
        tmp_path / "bundle", model=model, anatomy=anatomy, plan=plan, loaded=loaded, target="torch", accepted=False
    )
    assert len(bundle.manifest["tied"]) == 1
    again = load(bundle.folder).model()
    first, second = (again.get_submodule(f"{anatomy.layout.layers}.{i}") for i in range(2))
    assert first.get_submodule(norm).weight is second.get_submodule(norm).weight
    assert torch.equal(stock(again, batch(model)), stock(model, batch(model)))


def test_there_is_a_golden_bundle_of_every_format() -> None:
    found = {json.loads((golden / "bundle" / MANIFEST).read_text())["format"] for golden in GOLDEN}
    assert found == set(range(1, FORMAT + 1))


@pytest.mark.parametrize("golden", [path for path in GOLDEN if has(path, "texts")], ids=lambda path: path.name)
def test_a_golden_bundle_still_loads(golden: Path) -> None:
    expected = json.loads((golden / "expected.json").read_text())
    bundle = load(golden / "bundle")
    assert bundle.plan.id == expected["plan_id"]
    policy = bundle.token_policy
    assert (policy and policy.id) == expected.get("token_policy_id")
    assert isinstance(bundle.network(), Packed) == (policy is not None)
    np.testing.assert_allclose(bundle.predict(expected["texts"]), expected["outputs"]["onnxruntime"], atol=1e-5)
    for target, outputs in expected["outputs"].items():
        np.testing.assert_allclose(outputs_of(bundle, expected["texts"], target), outputs, atol=1e-5, err_msg=target)
    assert bundle.labels_of(bundle.predict(expected["texts"])) == expected["labels"]
    assert len(set(expected["labels"])) > 1
