"""A bundle is there whole, or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from paredown.bundle import MANIFEST, Bundle, _write, check_free, load, save
from paredown.errors import BadData, ParedownError
from tests.contracts.bundles import make
from tests.unit.bundle.conftest import content, refused

ROOT = Path(__file__).parents[3]

KILLED = """
import os, sys
from pathlib import Path
from tests.contracts.bundles import make
left = int(sys.argv[2])
call = getattr(os, sys.argv[3])
def dying(*arguments, **options):
    global left
    left -= 1
    if left == 0:
        os._exit(9)  # as kill -9: nothing is cleaned up
    return call(*arguments, **options)
setattr(os, sys.argv[3], dying)
make(Path(sys.argv[1]), seed=1, work=Path(sys.argv[4]))
"""


def test_an_older_bundle_is_replaced(made: Bundle, tmp_path: Path) -> None:
    before = content(made.folder)
    again = make(made.folder, seed=1, work=tmp_path / "again")
    assert content(made.folder)["model.safetensors"] != before["model.safetensors"]
    assert load(made.folder) == again
    assert list(made.folder.parent.iterdir()) == [made.folder]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EACCES, "Permission denied")])
@pytest.mark.parametrize("at", [1, 2])
def test_a_failed_rename_leaves_the_old_bundle(
    error: BaseException, at: int, made: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, calls, rename = content(made.folder), [], os.rename

    def failing(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == at:
            raise error
        rename(*arguments)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises((KeyboardInterrupt, ParedownError)):
        make(made.folder, seed=1, work=tmp_path / "again")
    assert content(made.folder) == before
    assert list(made.folder.parent.iterdir()) == [made.folder]


@pytest.mark.parametrize(("function", "at"), [("link", 1), ("fsync", 1), ("fsync", 5), ("rename", 1)])
def test_a_killed_save_leaves_the_old_bundle(function: str, at: int, made: Bundle, tmp_path: Path) -> None:
    before = content(made.folder)
    code = KILLED if function != "link" else KILLED.replace("seed=1", "seed=1, exported=['onnxruntime']")
    command = [sys.executable, "-c", code, str(made.folder), str(at), function, str(tmp_path / "again")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 9, done.stderr
    assert content(made.folder) == before
    load(made.folder)
    make(made.folder, seed=1, work=tmp_path / "again")  # and what the dead one left is in nobody's way
    load(made.folder)


def test_a_kill_between_the_two_renames_is_explained(made: Bundle, tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(made.folder), "2", "rename", str(tmp_path / "again")]
    assert subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 9
    aside = next(made.folder.parent.glob(".slim.old-*"))
    refused(lambda: load(made.folder), "no bundle", str(aside), "rename it back")
    load(aside)


@pytest.mark.parametrize("where", ["python", "rust", "moved"])
def test_a_full_disk_is_one_sentence_and_changes_nothing(
    where: str, made: Bundle, parts: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        if where == "rust":  # the very words of safetensors 0.8
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(errno.ENOSPC, "No space left on device")

    before = content(made.folder)
    page = tmp_path / "page.html"
    page.write_text("")
    if where == "moved":
        monkeypatch.setattr(os, "link", full)
        monkeypatch.setattr(shutil, "copyfile", full)
    else:
        monkeypatch.setattr(*((_write, "save_file", full) if where == "rust" else (os, "fsync", full)))
    for folder in (made.folder, made.folder.with_name("other")):
        refused(lambda: save(folder, **parts, files={"report.html": page}), "disk is full", str(folder))  # noqa: B023
    assert content(made.folder) == before
    assert list(made.folder.parent.iterdir()) == [made.folder] and page.exists()


def test_a_folder_with_other_things_is_refused_before_the_work(made: Bundle, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    check_free(taken)
    check_free(tmp_path / "not" / "there" / "yet")
    check_free(made.folder)
    (taken / "notes.txt").write_text("mine")
    refused(lambda: check_free(taken), str(taken), "holds no bundle", kind=BadData)
    refused(lambda: check_free(taken / "notes.txt"), "is a file", kind=BadData)
    refused(lambda: check_free(taken / "notes.txt" / "slim"), "not a folder", kind=BadData)
    refused(lambda: check_free("/proc"), "mount point", kind=BadData)
    refused(lambda: make(taken, work=tmp_path / "again"), "holds no bundle", kind=BadData)
    assert content(taken) == {"notes.txt": b"mine"}
    (made.folder / "tokenizer" / "notes.txt").write_text("mine")
    refused(lambda: check_free(made.folder), "tokenizer/notes.txt", kind=BadData)
    load(made.folder)  # to load it, what else lies there does not matter
    (made.folder / "tokenizer" / "notes.txt").unlink()
    (made.folder / MANIFEST).write_text("{}")
    refused(lambda: check_free(made.folder), "holds no bundle", kind=BadData)


def test_an_empty_folder_and_a_link_to_one_are_filled(parts: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    save(tmp_path / "link", **parts)
    assert (tmp_path / "link").is_symlink() and load(tmp_path / "link").folder == tmp_path / "real"
    save(tmp_path / "deeper" / "still" / "slim", **parts)
    load(str(tmp_path / "deeper" / "still" / "slim"))
