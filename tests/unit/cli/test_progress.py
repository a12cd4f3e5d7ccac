"""What is seen of a run while it goes on: on a terminal, and in a log file."""

from __future__ import annotations

import io
import sys

import pytest

from paredown.cli import _progress
from paredown.cli._failure import Interrupted
from paredown.cli._progress import shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A stderr that is a terminal. No fixture: pytest puts its own stderr back between set-up and test."""
    stream = Terminal()
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def work(progress: _progress.Progress) -> None:
    progress.stage("Reading [data]")
    progress.stage("Distilling", 2)
    progress.advance(1.5, "distance [0.1]")
    progress.say("3 texts [of 9] were cut")
    print("chatter")


def test_a_log_file_gets_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    with shown() as progress:
        work(progress)
    out, err = capsys.readouterr()
    assert out == ""
    stages = ["0:00  Starting", "0:00  Reading [data]", "0:00  Distilling"]
    assert err.splitlines() == [*stages, "0:00  3 texts [of 9] were cut", "chatter"]


def test_a_terminal_gets_a_bar_and_keeps_a_line_per_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = a_terminal(monkeypatch)
    with shown() as progress:
        work(progress)
        assert isinstance(progress, _progress.Bars)
        progress._live.refresh()  # rather than wait for the next of ten a second
        assert "✓ Distilling" not in terminal.getvalue()
    said = terminal.getvalue()
    assert "━" in said
    assert "left" in said
    assert "distance [0.1]" in said
    for kept in ("✓ Reading [data]  0:00", "✓ Distilling  0:00", "3 texts [of 9] were cut", "chatter"):
        assert kept in said
    assert "\x1b[?25h" in said  # the cursor is back
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("resumable", [True, False])
def test_ctrl_c_leaves_as_an_error_that_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch, resumable: bool) -> None:
    terminal = a_terminal(monkeypatch)
    with pytest.raises(Interrupted, match="goes on where it stopped" if resumable else "^stopped$") as caught:
        stop(resumable)
    assert caught.value.exit_code == 130
    assert "✓ Distilling" not in terminal.getvalue()  # it was begun, not done
    assert "\x1b[?25h" in terminal.getvalue()


def stop(resumable: bool) -> None:
    with shown(resumable=resumable) as progress:
        progress.stage("Distilling", 2)
        raise KeyboardInterrupt


@pytest.mark.parametrize(("seconds", "clock"), [(0.9, "0:00"), (61, "1:01"), (3599, "59:59"), (3723, "1:02:03")])
def test_the_clock(seconds: float, clock: str) -> None:
    assert _progress._clock(seconds) == clock
