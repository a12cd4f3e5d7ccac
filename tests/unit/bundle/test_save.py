"""What a bundle holds."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from paredown.anatomy import describe
from paredown.bundle import MANIFEST, Bundle, load, save
from paredown.errors import FingerprintMismatch
from paredown.models import load_model
from paredown.surgery import cut
from paredown.types import Plan
from tests.contracts import bundles, families
from tests.unit.bundle.conftest import EMBEDDER, content, refused


def test_the_manifest_tells_what_the_bundle_is(made: Bundle) -> None:
    manifest = made.manifest
    assert json.loads((made.folder / MANIFEST).read_text()) == manifest
    assert (manifest["format"], manifest["family"], manifest["task"]) == (1, "bert", "text-classification")
    assert (manifest["target"], manifest["precision"], manifest["file"]) == ("torch", "fp32", "model.safetensors")
    assert manifest["labels"] == {"bill": 0, "card": 1, "loan": 2}
    assert manifest["plan_id"] == made.plan.id and manifest["accepted"] is True
    assert manifest["config"]["num_hidden_layers"] == 3  # the dense model's
    assert set(manifest["files"]) == content(made.folder).keys() - {MANIFEST}
    assert manifest["folds"]
    for name in ("bundle.json", "plan.json", "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"):
        assert str(made.folder.parent.parent) not in (made.folder / name).read_text()  # no path of this machine


def test_nothing_is_left_beside_and_everyone_may_read(made: Bundle) -> None:
    assert list(made.folder.parent.iterdir()) == [made.folder]
    modes = {path.stat().st_mode for path in made.folder.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_files_are_moved_in(parts: dict[str, Any], tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text("<p>proof")
    saved = save(tmp_path / "slim", **parts, files={"report.html": page})
    assert (saved.folder / "report.html").read_text() == "<p>proof" and not page.exists()
    assert "report.html" in saved.manifest["files"]


def test_files_are_copied_where_no_second_name_can_be_given(
    parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    page = tmp_path / "page.html"
    page.write_text("<p>proof")
    saved = save(tmp_path / "slim", **parts, files={"report.html": page})
    assert (saved.folder / "report.html").read_text() == "<p>proof" and not page.exists()


def test_a_bundle_may_be_made_again_from_its_own_files(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("<p>proof")
    saved = save(tmp_path / "slim", **parts, files={"report.html": tmp_path / "page.html"})
    save(saved.folder, **parts, files={"report.html": saved.folder / "report.html"})
    load(saved.folder)


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a//b", "./a", "a\\b", "", ".", *(MANIFEST, "plan.json")])
def test_a_file_has_a_name_inside_of_its_own(name: str, parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("")
    files = {name: tmp_path / "page.html"}
    refused(lambda: save(tmp_path / "slim", **parts, files=files), "cannot be the name of a file")
    assert not (tmp_path / "slim").exists()


def test_what_serves_must_be_there(parts: dict[str, Any], tmp_path: Path) -> None:
    parts["target"] = "onnxruntime"
    refused(lambda: save(tmp_path / "slim", **parts), "needs the file model.onnx")
    refused(lambda: save(tmp_path / "slim", **parts, precision="int8"), "needs the file model-int8.onnx")
    refused(lambda: save(tmp_path / "slim", **parts, precision="int4"), "int4", "choose", "onnxruntime fp32")
    refused(lambda: save(tmp_path / "slim", **parts, files={"model.onnx": tmp_path / "no"}), "no file", str(tmp_path))
    (tmp_path / "model.xml").write_text("")
    files = {"model.onnx": tmp_path / "model.xml", "openvino/model.xml": tmp_path / "model.xml"}
    refused(lambda: save(tmp_path / "slim", **parts, files=files), "needs the file openvino/model.bin")
    assert not (tmp_path / "slim").exists()


def test_model_and_plan_must_belong_together(parts: dict[str, Any], tmp_path: Path) -> None:
    plan = parts["plan"]
    parts["plan"] = Plan(plan.fingerprint, {**plan.keep, "layer.0.neurons": (4,)})
    call = lambda: save(tmp_path / "slim", **parts)  # noqa: E731
    refused(call, "layer.0.intermediate.dense.bias", "(13,)", "(1,)", kind=FingerprintMismatch)
    parts["plan"] = dataclasses.replace(plan, fingerprint="0" * 64)
    refused(call, "plan is for the model", kind=FingerprintMismatch)
    assert not (tmp_path / "slim").exists()


def test_save_changes_nothing_of_the_caller(parts: dict[str, Any], tmp_path: Path) -> None:
    model = parts["model"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    save(tmp_path / "slim", **parts)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_half_precision_is_written_in_fp32(parts: dict[str, Any], tmp_path: Path) -> None:
    model = parts["model"].half()
    again = save(tmp_path / "slim", **parts).model()
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    assert torch.equal(again.classifier.weight, model.classifier.weight.float())


def test_tensors_that_overlap_in_memory_are_written_apart(parts: dict[str, Any], tmp_path: Path) -> None:
    head = parts["model"].classifier
    memory = torch.arange(100.0)
    head.weight = torch.nn.Parameter(memory[:72].view(3, 24))
    head.bias = torch.nn.Parameter(memory[10:13])
    saved = save(tmp_path / "slim", **parts)
    assert saved.manifest["tied"] == {}
    again = saved.model().classifier
    assert torch.equal(again.weight, head.weight) and torch.equal(again.bias, head.bias)


def test_empty_tensors_are_not_taken_for_one(parts: dict[str, Any], tmp_path: Path) -> None:
    keep = {**parts["plan"].keep, "layer.0.neurons": (), "layer.0.heads": (), "layer.2.heads": ()}
    plan = parts["plan"] = Plan(parts["plan"].fingerprint, keep)
    parts["model"] = cut(parts["loaded"].model, parts["anatomy"], plan)
    saved = save(tmp_path / "slim", **parts)
    assert saved.manifest["tied"] == {}
    inputs = families.batch(parts["model"])
    assert torch.equal(families.stock(saved.model(), inputs), families.stock(parts["model"], inputs))


def test_an_unused_pooler_is_neither_saved_nor_opened(tmp_path: Path) -> None:
    loaded = load_model(families.save(families.tiny("bert", EMBEDDER), tmp_path / "dense"))
    anatomy = describe(loaded.model)
    plan = bundles.plan_of(anatomy)
    not_folded = cut(loaded.model, anatomy, plan)
    assert not_folded.pooler is not None
    saved = save(
        tmp_path / "slim", model=not_folded, anatomy=anatomy, plan=plan, loaded=loaded, target="torch", accepted=True
    )
    assert saved.model().pooler is None
    assert b"pooler" not in (saved.folder / "model.safetensors").read_bytes()
