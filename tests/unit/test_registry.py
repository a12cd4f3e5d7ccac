from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import paredown
from paredown import registry
from paredown.errors import ParedownError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of three criteria, a private helper and a folder module, in place of the package's own."""
    kind = tmp_path / "shapes"
    (kind / "round_ones").mkdir(parents=True)
    (kind / "__init__.py").touch()
    (kind / "square_root.py").write_text("SIDES = 4\n")
    (kind / "broken.py").write_text("raise RuntimeError('imported')\n")
    (kind / "_helper.py").touch()
    (kind / "notes.txt").touch()
    (kind / "round_ones" / "__init__.py").touch()
    monkeypatch.setattr(registry, "_HOME", tmp_path)
    monkeypatch.setattr(paredown, "__path__", [str(tmp_path)])
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("paredown.shapes")]:
        del sys.modules[name]


def test_available_lists_public_modules_and_imports_none(folder: Path) -> None:
    assert registry.available("shapes") == ("broken", "round_ones", "square_root")
    assert not [name for name in sys.modules if name.startswith("paredown.shapes")]


@pytest.mark.parametrize("name", ["square_root", "square-root"])
def test_find_imports_the_module(folder: Path, name: str) -> None:
    assert registry.find("shapes", name).SIDES == 4


@pytest.mark.parametrize("name", ["triangle", "_helper", "__init__", "", "../errors", "round_ones.x"])
def test_an_unknown_name_lists_what_there_is(folder: Path, name: str) -> None:
    with pytest.raises(ParedownError, match="shapes has no .*broken, round_ones, square_root"):
        registry.find("shapes", name)


@pytest.mark.parametrize("kind", ["colours", "..", "", "shapes/round_ones"])
def test_an_unknown_kind_lists_the_kinds(folder: Path, kind: str) -> None:
    with pytest.raises(ParedownError, match="no kind .*; there are shapes"):
        registry.available(kind)


def test_an_error_inside_a_module_is_not_hidden(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="imported"):
        registry.find("shapes", "broken")
