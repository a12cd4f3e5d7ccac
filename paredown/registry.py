"""The folder is the registry: `importance/fisher.py` IS the criterion "fisher". Nothing registers itself."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from paredown.errors import ParedownError

_HOME = Path(__file__).parent


def available(kind: str) -> tuple[str, ...]:
    """The names in the folder `paredown/<kind>`, sorted: every module whose name has no leading underscore.

    Imports none of them. Raises `ParedownError` when there is no such folder.
    """
    folder = _HOME / kind
    if not kind.isidentifier() or not (folder / "__init__.py").is_file():
        kinds = sorted(path.parent.name for path in _HOME.glob("*/__init__.py"))
        raise ParedownError(f"there is no kind {kind!r}; there are {', '.join(kinds)}")
    files = [path.stem for path in folder.glob("*.py")]
    folders = [path.parent.name for path in folder.glob("*/__init__.py")]
    return tuple(sorted(name for name in files + folders if not name.startswith("_")))


def find(kind: str, name: str) -> ModuleType:
    """The module `paredown.<kind>.<name>`; a dash in `name` stands for an underscore.

    Raises `ParedownError`, listing what there is, when the folder has no such module. An error inside the module
    itself is not hidden.
    """
    module = name.replace("-", "_")
    names = available(kind)
    if module not in names:
        raise ParedownError(f"{kind} has no {name!r}; there are {', '.join(names) or 'none'}")
    return importlib.import_module(f"paredown.{kind}.{module}")
