from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown import bundle as module
from paredown.anatomy import describe
from paredown.bundle import FORMAT, MANIFEST, SERVING, Bundle, check_free, load, save, torch_runner
from paredown.encoder import Encoder
from paredown.errors import BadData, CorruptBundle, FingerprintMismatch, ParedownError
from paredown.models import load_model
from paredown.types import Plan
from tests.contracts import bundles, families
from tests.contracts.bundles import TEXTS, make

ROOT = Path(__file__).parent.parent.parent
EMBEDDER = "text-embedding"

KILLED = """
import os, sys
from pathlib import Path
from paredown import bundle
from tests.contracts.bundles import make
left = int(sys.argv[2])
call = getattr(bundle.os, sys.argv[3])
def dying(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os._exit(9)  # as kill -9: nothing is cleaned up
    return call(*arguments, **options)
setattr(bundle.os, sys.argv[3], dying)
make(Path(sys.argv[1]), seed=1, work=Path(sys.argv[4]))
"""


@pytest.fixture
def made(tmp_path: Path) -> Bundle:
    """A torch bundle in a folder of its own, beside which nothing else lies."""
    return make(tmp_path / "place" / "slim", work=tmp_path / "work")


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Any]:
    """The arguments of `save` for a small classifier."""
    loaded = load_model(families.save(families.tiny("bert"), tmp_path / "dense"))
    model, anatomy, plan, folds = bundles.pruned(loaded)
    same = {"model": model, "anatomy": anatomy, "plan": plan, "loaded": loaded, "folds": folds}
    return {**same, "target": "torch", "accepted": True}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes bundle.json as someone who knows the format would, its own sha256 included."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    manifest["self"] = module._self(manifest)
    (folder / MANIFEST).write_text(module._pretty(manifest))


def refused(call: Callable[[], object], *words: str, kind: type[ParedownError] = ParedownError) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


# ------------------------------------------------------------------------------------------------------------ saving


def test_the_manifest_tells_what_the_bundle_is(made: Bundle) -> None:
    manifest = made.manifest
    assert json.loads((made.folder / MANIFEST).read_text()) == manifest
    assert (manifest["format"], manifest["family"], manifest["task"]) == (FORMAT, "bert", "text-classification")
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
    parts["model"] = module.cut(parts["loaded"].model, parts["anatomy"], plan)
    saved = save(tmp_path / "slim", **parts)
    assert saved.manifest["tied"] == {}
    inputs = families.batch(parts["model"])
    assert torch.equal(families.stock(saved.model(), inputs), families.stock(parts["model"], inputs))


def test_an_unused_pooler_is_neither_saved_nor_opened(tmp_path: Path) -> None:
    loaded = load_model(families.save(families.tiny("bert", EMBEDDER), tmp_path / "dense"))
    anatomy = describe(loaded.model)
    plan = bundles.plan_of(anatomy)
    not_folded = module.cut(loaded.model, anatomy, plan)
    assert not_folded.pooler is not None
    saved = save(
        tmp_path / "slim", model=not_folded, anatomy=anatomy, plan=plan, loaded=loaded, target="torch", accepted=True
    )
    assert saved.model().pooler is None
    assert b"pooler" not in (saved.folder / "model.safetensors").read_bytes()


# --------------------------------------------------------------------------------------------- whole, or not at all


def test_an_older_bundle_is_replaced(made: Bundle, tmp_path: Path) -> None:
    before = content(made.folder)
    again = make(made.folder, seed=1, work=tmp_path / "again")
    assert content(made.folder)["model.safetensors"] != before["model.safetensors"]
    assert load(made.folder) == again
    assert list(made.folder.parent.iterdir()) == [made.folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EACCES, "Permission denied")])
@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_rename_leaves_the_old_bundle(
    error: BaseException, at: int, made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls, rename = content(made.folder), [], os.rename

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise error
        rename(*arguments)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((KeyboardInterrupt, ParedownError)):
        make(made.folder, seed=1, work=tmp_path / "again")
    assert content(made.folder) == before
    assert list(made.folder.parent.iterdir()) == [made.folder]


@pytest.mark.parametrize(("function", "at"), [("link", 1), ("fsync", 1), ("fsync", 5), ("rename", 1)])
def test_a_killed_save_leaves_the_old_bundle(function: str, at: int, made: Bundle, tmp_path: Path) -> None:
    before = content(made.folder)
    code = KILLED if function != "link" else KILLED.replace("seed=1", "seed=1, exported=['onnxruntime']")
    command = [sys.executable, "-c", code, str(made.folder), str(at), function, str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 9, done.stderr
    assert content(made.folder) == before
    load(made.folder)
    make(made.folder, seed=1, work=tmp_path / "again")  # and what the dead one left is in nobody's way
    load(made.folder)


def test_a_kill_between_the_two_renames_is_explained(made: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(made.folder), "2", "rename", str(tmp_path / "again")]
    assert subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 9
    aside = next(made.folder.parent.glob(".slim.old-*"))
    refused(lambda: load(made.folder), "no bundle", str(aside), "rename it back")
    load(aside)


@pytest.mark.parametrize("where", ["python", "rust", "moved"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(
    where: str, made: Bundle, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        if where == "rust":  # the very words of safetensors 0.8
            raise module.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = content(made.folder)
    page = tmp_path / "page.html"
    page.write_text("")
    if where == "moved":
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(module.shutil, "copyfile", full)
    else:
        monkeypatch.setattr(*((module, "save_file", full) if where == "rust" else (os, "fsync", full)))
    for folder in (made.folder, made.folder.with_name("other")):
        refused(lambda: save(folder, **parts, files={"report.html": page}), "disk is full", str(folder))  # noqa: B023
    assert content(made.folder) == before
    assert list(made.folder.parent.iterdir()) == [made.folder] and page.exists()


def test_a_folder_with_other_things_is_refused_before_the_work(made: Bundle, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    check_free(taken)
    check_free(tmp_path / "not" / "there" / "yet")
    check_free(made.folder)
    (taken / "notes.txt").write_text("mine")
    refused(lambda: check_free(taken), str(taken), "holds no bundle", kind=BadData)
    refused(lambda: check_free(taken / "notes.txt"), "is a file", kind=BadData)
    refused(lambda: check_free(taken / "notes.txt" / "slim"), "not a folder", kind=BadData)
    refused(lambda: check_free("/proc"), "mount point", kind=BadData)
    refused(lambda: make(taken, work=tmp_path / "again"), "holds no bundle", kind=BadData)
    assert content(taken) == {"notes.txt": b"mine"}
    (made.folder / "tokenizer" / "notes.txt").write_text("mine")
    refused(lambda: check_free(made.folder), "tokenizer/notes.txt", kind=BadData)
    load(made.folder)  # to load it, what else lies there does not matter
    (made.folder / "tokenizer" / "notes.txt").unlink()
    (made.folder / MANIFEST).write_text("{}")
    refused(lambda: check_free(made.folder), "holds no bundle", kind=BadData)


def test_an_empty_folder_and_a_link_to_one_are_filled(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", **parts)
    assert (tmp_path / "link").is_symlink() and load(tmp_path / "link").folder == tmp_path / "real"
    save(tmp_path / "deeper" / "still" / "slim", **parts)
    load(str(tmp_path / "deeper" / "still" / "slim"))


# ----------------------------------------------------------------------------------------------------------- opening


def test_what_is_no_bundle_is_said_in_one_sentence(made: Bundle, tmp_path: Path) -> None:
    refused(lambda: load(tmp_path / "nowhere"), "there is no bundle", "nowhere")
    refused(lambda: load(tmp_path / "work" / "dense"), "not a bundle", "bundle.json")
    refused(lambda: load(made.folder / MANIFEST), "not a folder")
    for text in ("", "[]", '{"format": "1"}', "{" * 100_000, "[" * 100_000, '{"format": NaN}'):
        (made.folder / MANIFEST).write_text(text)
        refused(lambda: load(made.folder), MANIFEST, kind=CorruptBundle)


def test_a_newer_format_asks_for_an_upgrade(made: Bundle) -> None:
    edit(made.folder, lambda manifest: manifest.update(format=FORMAT + 1))
    refused(lambda: load(made.folder), f"format {FORMAT + 1}", "pip install -U")


@pytest.mark.parametrize("name", ["../plan.json", "/etc/passwd", "tokenizer/../../x", "..", "a\\..\\b", "C:x", ""])
def test_files_outside_are_never_looked_at(name: str, made: Bundle) -> None:
    edit(made.folder, lambda manifest: manifest["files"].update({name: "0"}))
    refused(lambda: load(made.folder), "inside the bundle", kind=CorruptBundle)


def test_a_manifest_made_by_hand_is_checked(made: Bundle) -> None:
    whole = (made.folder / MANIFEST).read_bytes()
    for key in set(made.manifest) - {"format", "self"}:
        edit(made.folder, lambda manifest: manifest.pop(key))  # noqa: B023
        refused(lambda: load(made.folder), repr(key), kind=CorruptBundle)
        (made.folder / MANIFEST).write_bytes(whole)
    edit(made.folder, lambda manifest: manifest.update(file="model.onnx"))
    refused(lambda: load(made.folder), "does not list model.onnx", kind=CorruptBundle)
    (made.folder / MANIFEST).write_bytes(whole)
    edit(made.folder, lambda manifest: manifest.update(plan_id="0"))
    refused(lambda: load(made.folder), "plan.json", "id differs", kind=CorruptBundle)


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


# ----------------------------------------------------------------------------------------------------------- running


def test_predict_keeps_the_order_whatever_the_batches(made: Bundle) -> None:
    texts = [*TEXTS, *reversed(TEXTS), "bill " * 100]  # the last one is longer than the model takes
    outputs = made.predict(texts, batch_size=2)
    assert outputs.shape == (11, 3) and outputs.dtype == np.float32
    np.testing.assert_allclose(outputs[:5], outputs[9:4:-1], atol=1e-6)
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
    assert opened == [("model-int8.onnx", module._cores()), ("model.onnx", 3), ("model-int8.onnx", 1)]


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


def test_every_target_with_a_file_is_a_target() -> None:
    from paredown import registry

    assert {target for target, _ in SERVING} <= set(registry.available("targets"))


def test_encoder_has_the_widths_of_the_plan(made: Bundle) -> None:
    encoder = made.encoder()
    assert isinstance(encoder, Encoder)
    assert [(layer.num_heads, layer.num_neurons) for layer in encoder.layers] == [(2, 13), (3, 0)]
