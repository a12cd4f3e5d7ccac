"""Small bundles and the parts of one, and ways to change what lies on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paredown.bundle import MANIFEST, Bundle
from paredown.bundle._format import digest_of, pretty
from paredown.errors import ParedownError
from paredown.models import load_model
from tests.contracts import bundles, families
from tests.contracts.bundles import make

EMBEDDER = "text-embedding"


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
    manifest["self"] = digest_of(manifest)
    (folder / MANIFEST).write_text(pretty(manifest))


def refused(call: Callable[[], object], *words: str, kind: type[ParedownError] = ParedownError) -> None:
    with pytest.raises(kind) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
