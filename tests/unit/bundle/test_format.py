"""The manifest, damaged and made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from paredown import registry
from paredown.bundle import FORMAT, MANIFEST, SERVING, Bundle, load
from paredown.errors import CorruptBundle
from tests.unit.bundle.conftest import edit, refused


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


def test_every_target_with_a_file_is_a_target() -> None:
    assert {target for target, _ in SERVING} <= set(registry.available("targets"))
