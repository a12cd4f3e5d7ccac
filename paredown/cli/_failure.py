"""What the user is told when something goes wrong: one sentence and an exit code, never a traceback."""

from __future__ import annotations

import errno
import os
import tempfile
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import typer

from paredown.errors import GateFailed, InfeasibleBudget, ParedownError

STOPPED = 130  # 128 + SIGINT, as shells count


class Interrupted(ParedownError):
    """Ctrl-C or SIGTERM, turned into an error before typer can swallow it. The message says how to go on."""

    exit_code = STOPPED


@dataclass(frozen=True)
class Failure:
    """One sentence, the exit code, and the facts that the run found before it failed (empty where there are none)."""

    sentence: str
    exit_code: int
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def explain(error: BaseException) -> Failure:
    """The failure that an exception means to the user. A bug's traceback is written to a log file in the temp folder.

    With PAREDOWN_DEBUG=1 the traceback is shown on stderr too, whatever the error is.
    """
    if os.environ.get("PAREDOWN_DEBUG") == "1":
        traceback.print_exception(error)
    kind = type(error).__name__
    if isinstance(error, KeyboardInterrupt):
        return Failure("stopped", STOPPED, "Interrupted")
    if _disk_is_full(error) and isinstance(error, ParedownError):  # it says what was being written
        return Failure(_one_line(error), error.exit_code, "DiskFull")
    if _disk_is_full(error):
        where = f" while writing {error.filename}" if isinstance(error, OSError) and error.filename else ""
        return Failure(f"the disk is full{where}: make room, then start the same command again", 2, "DiskFull")
    if isinstance(error, ParedownError):
        return Failure(_one_line(error), error.exit_code, kind, _facts(error))
    if isinstance(error, typer.TyperException):
        said = _one_line(error.format_message()).replace(": Value error, ", ": ").rstrip(".")  # as pydantic puts it
        return Failure(said + _help_hint(error), 2, "UsageError")
    if isinstance(error, OSError):
        said = f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
        return Failure(_one_line(said) or kind, 2, kind)
    said = f"{kind}: {_one_line(error)}" if _one_line(error) else kind
    return Failure(f"this is a bug in Paredown, please report it: {said}{_log(error)}", 1, kind)


def _facts(error: ParedownError) -> Mapping[str, Any]:
    if isinstance(error, GateFailed) and isinstance(error.result, Mapping):
        return error.result
    return {"closest": error.closest} if isinstance(error, InfeasibleBudget) else {}


def _disk_is_full(error: BaseException) -> bool:
    """Also where a library (safetensors, onnx) wrapped the system's error in one of its own."""
    cause = error.__cause__
    return (
        (isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT))
        or os.strerror(errno.ENOSPC).lower() in str(error).lower()
        or (cause is not None and _disk_is_full(cause))
    )


def _help_hint(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    return f" (see '{context.command_path} --help')" if context is not None else ""


def _log(error: BaseException) -> str:
    """ "; the traceback is in FILE"; empty when no file can be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="paredown-bug-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.writelines(traceback.format_exception(error))
    except OSError:
        return " (PAREDOWN_DEBUG=1 shows the traceback)"
    return f" (the traceback is in {file.name})"


def _one_line(said: object) -> str:
    return " ".join(str(said).split())
