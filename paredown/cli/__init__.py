"""The command line: one subcommand per verb; parses, calls, prints; no logic.

Nothing heavy is imported here: `paredown --help` answers before torch could have been loaded.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from paredown.cli import _failure, _output
from paredown.cli._app import command

__all__ = ["main"]

# What the libraries below would say on their own: advice for programmers, and bars that fight with ours.
_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0 done, 1 a bug, 2 bad input, 3 the gate said no, 130 stopped.

    `arguments` are those of the command line unless told otherwise. Never raises: any error is one sentence on
    stderr, and, with --json, an object on stdout as well.
    """
    given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without "×" shows "?" rather than nothing at all
    with warnings.catch_warnings(), _sigterm_as_ctrl_c():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        try:
            # Not standalone: typer hands back the exit code or the exception instead of ending the process.
            code = command().main(given, prog_name="paredown", standalone_mode=False)
            return code if isinstance(code, int) else 0
        except (Exception, KeyboardInterrupt) as error:
            failure = _failure.explain(error)
    try:
        _output.failed(failure, as_json="--json" in given)
    except OSError:  # nobody reads stdout any more, or its disk is full: Python would complain once more when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return failure.exit_code


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Inside, SIGTERM raises KeyboardInterrupt: what is begun is cleared away, what is done is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return

    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
