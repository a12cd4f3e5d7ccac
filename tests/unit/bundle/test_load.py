"""What an opened bundle gives, and what it refuses to open."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown.bundle import Bundle, load, save, torch_runner
from paredown.cores import cores
from paredown.encoder import Encoder
from paredown.errors import BadData, CorruptBundle
from tests.contracts import families
from tests.contracts.bundles import TEXTS, make
from tests.unit.bundle.conftest import EMBEDDER, edit, refused


def test_without_verify_only_sizes_of_work_differ(made: Bundle) -> None:
    weights = made.folder / "model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    refused(lambda: load(made.folder), "model.safetensors", "sha256", kind=CorruptBundle)
    load(made.folder, verify=False).model()
    weights.write_bytes(original[:-9])
    refused(load(made.folder, verify=False).model, "model.safetensors", kind=CorruptBundle)
    weights.unlink()
    refused(lambda: load(made.folder, verify=False), "lacks model.safetensors", kind=CorruptBundle)


def test_weights_of_another_model_are_refused(made: Bundle, tmp_path: Path) -> None:
    (made.folder / "model.safetensors").write_bytes((tmp_path / "work" / "dense" / "model.safetensors").read_bytes())
    refused(load(made.folder, verify=False).model, "model.safetensors", kind=CorruptBundle)
    (made.folder / "tokenizer" / "tokenizer.json").write_text("{}")
    refused(load(made.folder, verify=False).tokenizer, "tokenizer", kind=CorruptBundle)


def test_a_report_may_be_missing(made: Bundle, parts: dict[str, Any], tmp_path: Path) -> None:
    assert made.report()["accepted"] is True
    refused(save(tmp_path / "slim", **parts).report, "without a report")


def test_predict_keeps_the_order_whatever_the_batches(made: Bundle) -> None:
    texts = [*TEXTS, *reversed(TEXTS), "bill " * 100]  # the last one is longer than the model takes
    outputs = made.predict(texts, batch_size=2)
    assert outputs.shape == (11, 3) and outputs.dtype == np.float32
    np.testing.assert_allclose(outputs[:5], outputs[9:4:-1], atol=1e-5)  # other batches pad and round otherwise
    model, tokenizer = made.model(), made.tokenizer()
    for text, row in zip(texts, outputs, strict=True):
        inputs = tokenizer(text, truncation=True, max_length=made.manifest["max_length"], return_tensors="pt")
        with torch.no_grad():
            np.testing.assert_allclose(model(**inputs).logits[0], row, atol=1e-5)
    for nothing in ([], "a text", [1]):
        refused(lambda: made.predict(nothing), "list of texts", kind=BadData)  # type: ignore[arg-type]  # noqa: B023


def test_labels_are_those_of_the_largest_logits(made: Bundle, tmp_path: Path) -> None:
    assert made.labels_of(np.array([[0, 2, 1], [3, 0, 0], [-3, -2, -1]])) == ["card", "bill", "loan"]
    embedder = make(tmp_path / "embedder", "distilbert", EMBEDDER)
    assert embedder.predict(TEXTS).shape == (5, 24)
    refused(lambda: embedder.labels_of(np.zeros((1, 24))), "no labels", kind=BadData)


def test_a_runner_that_is_not_there_is_named(made: Bundle) -> None:
    refused(lambda: made.runner(target="onnxruntime"), "no fp32 file for onnxruntime", "it has torch fp32")
    refused(lambda: made.runner(precision="int8"), "no int8 file for torch")
    refused(lambda: made.runner(target="tensorrt"), "tensorrt")


def test_the_file_that_serves_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = make(tmp_path / "slim", exported=("onnxruntime", "int8"), target="onnxruntime")
    edit(saved.folder, lambda manifest: manifest.update(precision="int8", file="model-int8.onnx"))
    bundle = load(saved.folder)
    opened: list[tuple[str, int]] = []
    from paredown.targets import onnxruntime

    monkeypatch.setattr(onnxruntime, "load", lambda path, *, threads: opened.append((path.name, threads)))
    bundle.runner()
    bundle.runner(precision="fp32", threads=3)
    bundle.runner(target="onnxruntime", precision="int8", threads=1)
    bundle.runner(target="torch", threads=torch.get_num_threads()).close()  # torch has fp32 only
    assert opened == [("model-int8.onnx", cores()), ("model.onnx", 3), ("model-int8.onnx", 1)]


def test_torch_runner_takes_bundles_and_dense_models(made: Bundle, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    inputs = {name: value.numpy() for name, value in families.batch(made.model()).items()}
    found = torch_runner(str(made.folder), threads=threads).run(inputs)["logits"]
    np.testing.assert_allclose(found, families.stock(made.model(), families.batch(made.model())), atol=1e-5)
    dense = families.tiny("mpnet", EMBEDDER)
    runner = torch_runner(str(families.save(dense, tmp_path / "plain")), threads=threads)
    expected = families.stock(dense, families.batch(dense))
    batch = {name: value.numpy() for name, value in families.batch(dense).items()}
    np.testing.assert_allclose(runner.run(batch)["embeddings"], expected, atol=1e-5)


def test_encoder_has_the_widths_of_the_plan(made: Bundle) -> None:
    encoder = made.network()
    assert isinstance(encoder, Encoder)
    assert [(layer.num_heads, layer.num_neurons) for layer in encoder.layers] == [(2, 13), (3, 0)]
