"""What goes to stdout and stderr at the end of a verb: a table for people, or one line of JSON for programs."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paredown.cli._failure import STOPPED, Failure

if TYPE_CHECKING:
    from rich.console import RenderableType


def finished(facts: Mapping[str, Any], table: RenderableType, *, as_json: bool, folder: str | None = None) -> int:
    """Exit code 0, once the facts are printed as JSON, or else the table and where the report in `folder` is."""
    if as_json:
        print(json_line(facts), flush=True)
    else:
        show(table)
        _say_report(folder)
    return 0


def show_run(facts: Mapping[str, Any], *, as_json: bool) -> int:
    """The same for a run that wrote a bundle."""
    from paredown.report import terminal

    return finished(facts, terminal.summary(facts), as_json=as_json, folder=facts.get("bundle"))


def failed(failure: Failure, *, as_json: bool) -> None:
    """The sentence on stderr; on stdout what the run had found: as JSON when asked, else as a table."""
    if failure.facts.get("verdict") and not as_json:
        from paredown.report import terminal

        show(terminal.summary(failure.facts))
        _say_report(failure.facts.get("bundle"))
    print(failure.sentence if failure.exit_code == STOPPED else f"error: {failure.sentence}", file=sys.stderr)
    if as_json:
        told = {"error": failure.sentence, "error_type": failure.kind, "exit_code": failure.exit_code}
        print(json_line({**failure.facts, "accepted": False, **told}), flush=True)


def show(what: RenderableType) -> None:
    """Prints to stdout, as wide as the terminal; 120 columns into a file or pipe."""
    from rich.console import Console

    Console(highlight=False, width=None if sys.stdout.isatty() else 120).print(what)


def _say_report(folder: object) -> None:
    page = Path(str(folder)) / "report.html" if folder else None
    if page is not None and page.is_file():
        print(f"  report: {page}")


def json_line(value: Mapping[str, Any]) -> str:
    """One line of ASCII JSON. What JSON cannot say (NaN, infinity) becomes null."""
    return json.dumps(_plain(value), separators=(",", ":"), allow_nan=False)


def _plain(value: object) -> object:
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy arrays and scalars, without importing numpy
        return _plain(value.tolist())
    return str(value)
