"""How far a run is, on stderr: a bar with elapsed and remaining time on a terminal, a line per stage elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from paredown.cli._failure import Interrupted

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

    from paredown.pipeline import Progress

AGAIN = "stopped: start the same command again and it goes on where it stopped"


@contextmanager
def shown(*, resumable: bool = False) -> Iterator[Progress]:
    """The progress to hand to a verb. Inside, whatever libraries print to stdout goes to stderr.

    Ctrl-C and SIGTERM leave the block as `Interrupted`, whose message says so when the verb is `resumable`.
    """
    try:
        with _bars() if sys.stderr.isatty() else _lines() as progress, redirect_stdout(sys.stderr):
            progress.stage("Starting")  # importing torch takes seconds
            yield progress
    except KeyboardInterrupt:
        raise Interrupted(AGAIN if resumable else "stopped") from None


@contextmanager
def _lines() -> Iterator[Progress]:
    yield Lines()


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
    )
    # Some steps take a minute each: an estimate over rich's usual 30 seconds would never see two of them.
    live = RichProgress(
        *columns,
        console=Console(stderr=True, highlight=False),
        redirect_stdout=False,
        transient=True,
        speed_estimate_period=600,
    )
    with live:
        bars = Bars(live)
        yield bars
        bars.done()


class Bars:
    """One bar at a time; a stage that is done leaves a line with the time it took."""

    def __init__(self, live: RichProgress):
        self._live = live
        self._task: TaskID | None = None
        self._name = ""
        self._began = 0.0

    def stage(self, name: str, total: float | None = None) -> None:
        self.done()
        self._name, self._began = name, time.monotonic()
        self._task = self._live.add_task(name, total=total, note="")

    def advance(self, amount: float = 1, note: str = "") -> None:
        if self._task is None:
            return
        self._live.advance(self._task, amount)
        if note:
            self._live.update(self._task, note=note)

    def say(self, text: str) -> None:
        self._print(text, "yellow")

    def done(self) -> None:
        """Ends the stage that is shown, if any."""
        if self._task is None:
            return
        self._live.remove_task(self._task)
        self._task = None
        self._print(f"✓ {self._name}  {_clock(time.monotonic() - self._began)}", "dim")

    def _print(self, text: str, style: str) -> None:
        from rich.text import Text

        self._live.console.print(Text(text, style=style))  # a style given to print() would colour the bar as well


class Lines:
    """For a log file: one line when a stage begins, with the time since the start, and whatever is said."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def stage(self, name: str, total: float | None = None) -> None:
        self.say(name)

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Says nothing: a line per step would fill the log."""

    def say(self, text: str) -> None:
        print(f"{_clock(time.monotonic() - self._start)}  {text}", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """ "0:07", "12:30" or "1:02:03"."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
