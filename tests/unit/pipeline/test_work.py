"""What an unfinished run keeps, and where a run that must not replace an accepted bundle goes."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from paredown.pipeline._run import _rejected
from paredown.pipeline._work import Work


def test_results_are_computed_once(tmp_path: Path) -> None:
    calls = []
    for _ in range(2):
        work = Work(tmp_path / "slim", "one key")
        assert work.json("a", lambda: calls.append(1) or {"x": 1.5}) == {"x": 1.5}
    assert calls == [1]
    assert work.resumed


def test_minutes_add_up_over_starts_but_not_the_time_between(tmp_path: Path) -> None:
    first = Work(tmp_path / "slim", "one key")
    first.json("a", lambda: 1)
    later = time.time() + 120
    os.utime(first.path("a.json"), (later, later))  # as if the first start had worked for two minutes
    assert Work(tmp_path / "slim", "one key").minutes == pytest.approx(2.0, abs=0.1)


def test_another_key_begins_anew(tmp_path: Path) -> None:
    Work(tmp_path / "slim", "one key").json("a", lambda: 1)
    other = Work(tmp_path / "slim", "another")
    assert other.discarded and not other.resumed and other.json("a", lambda: 2) == 2


def test_a_start_without_room_on_the_disk_keeps_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Work(tmp_path / "slim", "one key").json("a", lambda: 1)

    def full(self: Path, text: str) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(OSError, match="No space"):
            Work(tmp_path / "slim", "one key")
    assert Work(tmp_path / "slim", "one key").json("a", lambda: 2) == 1


@pytest.mark.parametrize("out", ["slim", "slim/", "deep/slim"])
def test_a_rejected_bundle_goes_beside_an_accepted_one(out: str) -> None:
    assert _rejected(out).name == "slim-rejected"
    assert _rejected(out).parent == Path(out).resolve().parent
