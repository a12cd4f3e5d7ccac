"""The table of contents of the package: what it promises is there, and said once the same way everywhere."""

from __future__ import annotations

import ast
import importlib
import tomllib
from pathlib import Path

import pytest

import paredown

HOME = Path(paredown.__file__).parent


def test_the_three_lists_of_names_agree() -> None:
    tree = ast.parse((HOME / "__init__.py").read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    typed = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == paredown._HOMES
    assert sorted(paredown.__all__) == sorted(typed)


@pytest.mark.parametrize("name", paredown.__all__)
def test_every_name_is_found_where_it_is_said_to_live(name: str) -> None:
    home = importlib.import_module(paredown._HOMES[name])
    assert getattr(paredown, name) is getattr(home, name)
    assert name in dir(paredown)


def test_no_public_name_is_also_a_module() -> None:
    """Importing `paredown/plan.py` would overwrite the verb `paredown.plan` with the module."""
    modules = {path.stem for path in HOME.iterdir() if not path.name.startswith("_")}
    assert not modules & set(paredown.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'paredown' has no attribute 'prun'"):
        paredown.prun  # noqa: B018


def test_the_version_is_the_packages() -> None:
    project = tomllib.loads((HOME.parent / "pyproject.toml").read_text())["project"]
    assert paredown.__version__ == project["version"]
