"""What a user sees at the end of a run, good or bad: streams, exit codes, JSON."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import paredown
from paredown.cli import main
from paredown.errors import BadData, GateFailed, InfeasibleBudget, MissingExtra, ParedownError

if TYPE_CHECKING:
    from conftest import Fake

PRUNE = ["prune", "./model", "--data", "train.csv", "--out", "slim"]
HOME = Path(paredown.__file__).parent.parent


def raising(error: BaseException) -> Any:
    def act(_progress: Any) -> None:
        raise error

    return act


def last_line(out: str) -> dict[str, Any]:
    """The JSON object in the last line of stdout; NaN, which is no JSON, is an error."""

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    found: dict[str, Any] = json.loads(out.splitlines()[-1], parse_constant=refuse)
    return found


# ---------------------------------------------------------------------------------------------------------- all is well


def test_json_is_the_only_line_of_stdout(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    def act(progress: Any) -> None:
        progress.stage("Cutting", 3)
        progress.advance(1, "head")
        progress.say("2 texts were cut")
        print("a library's chatter")

    fake.act = act
    fake.facts |= {"figures": np.array([1.0, np.inf]), "where": Path("a"), "size": np.int64(3), "kept": {1: (2,)}}
    assert main([*PRUNE, "--json"]) == 0
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 1
    found = last_line(shown.out)
    assert found["speedup"]["value"] == 3.0
    assert found["drop"]["high"] is None
    assert (found["figures"], found["where"], found["size"], found["kept"]) == ([1.0, None], "a", 3, {"1": [2]})
    for said in ("Cutting", "2 texts were cut", "a library's chatter"):
        assert said in shown.err


def test_without_json_there_is_a_summary(
    fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("slim").mkdir()
    Path("slim/report.html").touch()
    assert main(PRUNE) == 0
    out = capsys.readouterr().out
    assert "Accepted: 3 times as many texts per second" in out
    assert "bundle: slim" in out
    assert "report: slim/report.html" in out


def test_no_report_is_named_that_is_not_there(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(PRUNE) == 0
    assert "report.html" not in capsys.readouterr().out


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"paredown {paredown.__version__}\n"
    for words in (["--help"], ["-h"], []):
        assert main(words) == 0
        assert "validate" in capsys.readouterr().out
    assert main(["prune", "--help"]) == 0
    out = capsys.readouterr().out
    assert [panel for panel in ("Data", "Budget", "Target", "Run") if f"─ {panel} ─" not in out] == []


# --------------------------------------------------------------------------------------------------- something is wrong


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BadData("train.csv has no column 'text'"), 2, "error: train.csv has no column 'text'"),
        (MissingExtra("onnx", "onnx"), 2, "error: onnx is not installed."),
        (ParedownError("two\n  lines"), 2, "error: two lines"),
        (GateFailed("nothing passed"), 3, "error: nothing passed"),
        (OSError(errno.ENOSPC, "No space left on device", "slim/x"), 2, "error: the disk is full while writing slim/x"),
        (ValueError("I/O error: No space left on device (os error 28)"), 2, "error: the disk is full: make room"),
        (PermissionError(errno.EACCES, "Permission denied", "slim"), 2, "error: slim: Permission denied"),
        (OSError("no model\nof that name"), 2, "error: no model of that name"),
        (KeyboardInterrupt(), 130, "stopped: start the same command again and it goes on where it stopped"),
    ],
)
def test_an_error_is_one_sentence(
    fake: Fake, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    fake.act = raising(error)
    assert main(PRUNE) == code
    shown = capsys.readouterr()
    assert shown.err.removeprefix("0:00  Starting\n").startswith(said)
    assert (shown.err.count("\n"), shown.out) == (2, "")

    assert main([*PRUNE, "--json"]) == code
    found = last_line(capsys.readouterr().out)
    assert (found["accepted"], found["exit_code"]) == (False, code)
    assert said.removeprefix("error: ") in found["error"]


def test_a_full_disk_behind_another_error(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    error = RuntimeError("could not export")
    error.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    fake.act = raising(error)
    assert main(PRUNE) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_failed_gate_shows_what_was_found(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"accepted": False, "verdict": "the closest is pruned 2x", "candidates": [{"name": "pruned 2x"}]}
    fake.act = raising(GateFailed("nothing passed; the closest is pruned 2x", result={**facts, "bundle": None}))
    assert main(PRUNE) == 3
    shown = capsys.readouterr()
    assert "Rejected: the closest is pruned 2x" in shown.out
    assert shown.err.splitlines()[-1] == "error: nothing passed; the closest is pruned 2x"

    assert main([*PRUNE, "--json"]) == 3
    out = capsys.readouterr().out
    assert len(out.splitlines()) == 1
    assert facts.items() <= last_line(out).items()
    assert last_line(out)["error"] == "nothing passed; the closest is pruned 2x"


def test_an_impossible_budget_tells_the_closest(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.act = raising(InfeasibleBudget("9 times cannot be reached; 7.5 can", closest=7.5))
    assert main([*PRUNE, "--speedup", "9", "--json"]) == 2
    found = last_line(capsys.readouterr().out)
    assert (found["closest"], found["error_type"], found["accepted"]) == (7.5, "InfeasibleBudget", False)


def test_a_bundle_that_does_not_validate(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    fake.facts |= {"accepted": False, "verdict": "it is slower than dense here"}
    assert main(["validate", "slim", "--eval", "t.csv", "--json"]) == 3
    shown = capsys.readouterr()
    found = last_line(shown.out)
    assert (found["accepted"], found["exit_code"], found["quality_dense"]) == (False, 3, 0.93)
    assert shown.err.endswith("error: it is slower than dense here\n")


@pytest.mark.parametrize("words", [["prun"], ["prune"], [*PRUNE, "--nope"], [*PRUNE, "--minutes", "ten"]])
def test_a_mistyped_command_is_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--json"]) == 2
    shown = capsys.readouterr()
    assert (shown.err.count("\n"), shown.err[:7]) == (1, "error: ")
    assert last_line(shown.out)["exit_code"] == 2


def test_a_bug_leaves_a_log(
    fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    fake.act = raising(KeyError("layer.7"))
    assert main(PRUNE) == 1
    _starting, err = capsys.readouterr().err.splitlines()
    (log,) = tmp_path.iterdir()
    assert err == (
        f"error: this is a bug in Paredown, please report it: KeyError: 'layer.7' (the traceback is in {log})"
    )
    assert "Traceback" in log.read_text()
    assert "KeyError: 'layer.7'" in log.read_text()


def test_a_bug_on_a_full_disk(
    fake: Fake, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "not there"))
    fake.act = raising(RuntimeError())
    assert main(PRUNE) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: this is a bug in Paredown, please report it: RuntimeError (PAREDOWN_DEBUG=1 shows the traceback)"
    )


@pytest.mark.parametrize("error", [BadData("no such column"), RuntimeError("a bug")])
def test_debugging_shows_the_traceback(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, error: Exception
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("PAREDOWN_DEBUG", "1")
    fake.act = raising(error)
    main(PRUNE)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["validate slim --eval t.csv", "bench a b"])
def test_what_cannot_be_resumed_does_not_promise_it(fake: Fake, capsys: pytest.CaptureFixture[str], words: str) -> None:
    fake.act = raising(KeyboardInterrupt())
    assert main(words.split()) == 130
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"


# ----------------------------------------------------------------------------------------------------- the surroundings


def test_sigterm_stops_like_ctrl_c(fake: Fake, capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGTERM)
    fake.act = lambda _progress: os.kill(os.getpid(), signal.SIGTERM)
    assert main(PRUNE) == 130
    assert "goes on where it stopped" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_libraries_are_quiet_unless_told_otherwise(
    fake: Fake, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    fake.act = lambda _progress: warnings.warn("advice for programmers", stacklevel=1)
    assert main([*PRUNE, "--json"]) == 0
    assert "advice" not in capsys.readouterr().err
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "info"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *words]
    surroundings = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=HOME, env=surroundings)


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from paredown.cli import main; code = main(['--help']); "
        "heavy = {'torch', 'transformers', 'onnxruntime', 'openvino', 'numpy', 'sklearn', 'matplotlib', 'scipy'}; "
        "print(*sorted(heavy & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = run("-c", code)
    assert (done.returncode, done.stderr.strip()) == (0, "")
    assert "prune" in done.stdout


def test_python_m_paredown_on_a_terminal_of_plain_letters() -> None:
    done = run("-m", "paredown", "prune", "--help", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--max-drop" in done.stdout


@pytest.mark.parametrize("words", [["--help"], ["inspect", "no such folder", "--json"]])
def test_a_closed_pipe_is_no_error(words: list[str]) -> None:
    command = [sys.executable, "-m", "paredown", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=HOME) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert "Traceback" not in said
    assert "bug" not in said
    assert "BrokenPipe" not in said
