"""A folder written beside its place first, then renamed, so that it appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from paredown.bundle._format import (
    MANIFEST,
    PLAN,
    REPORT,
    WEIGHTS,
    digest_of,
    file_names,
    old_place,
    pretty,
    sha256,
)
from paredown.bundle._load import Bundle
from paredown.errors import ParedownError
from paredown.types import Plan, canonical_json


def write(
    place: Path,
    manifest: dict[str, Any],
    plan: Plan,
    tensors: Mapping[str, Tensor],
    *,
    own: Callable[[Path], None],
    moved: Mapping[str, Path],
    report: Mapping[str, Any] | None,
) -> Bundle:
    """The bundle at `place`, replacing the one that lies there once the new one is whole; `manifest` gets the sha256 of
    every file.

    `own(folder)` writes what this kind of bundle has besides; `moved` are files to take in under their names. Raises
    ParedownError when it cannot be written, and has then changed nothing.
    """
    part = place.with_name(f".{place.name}.part-{os.getpid()}")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, source in moved.items():
            _take(Path(source), part / name)
        save_file(dict(tensors), part / WEIGHTS, metadata={"format": "pt"})
        own(part)
        (part / PLAN).write_text(plan.to_json(), encoding="utf-8")
        if report is not None:
            (part / REPORT).write_text(pretty(json.loads(canonical_json(report))), encoding="utf-8")
        manifest["files"] = {name: sha256(part / name) for name in file_names(part)}
        manifest["self"] = digest_of(manifest)
        (part / MANIFEST).write_text(pretty(manifest), encoding="utf-8")
        _settle(part)
        _swap(part, place)
    except BaseException as error:
        shutil.rmtree(part, ignore_errors=True)
        if _disk_full(error):
            raise ParedownError(
                f"the disk is full: the bundle was not written to {place}, and nothing there was changed; make room"
            ) from error
        if isinstance(error, OSError):
            raise ParedownError(f"the bundle cannot be written to {place}: {error.strerror or error}") from error
        raise
    for source in moved.values():
        if not Path(source).resolve().is_relative_to(place):
            with contextlib.suppress(OSError):  # the bundle is whole, and a file that was left behind is only a copy
                Path(source).unlink()
    return Bundle(place, manifest, plan)


def _take(source: Path, destination: Path) -> None:
    """`destination`, a second name of the same file where the file system can do that, and a copy elsewhere."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), destination)
    except FileNotFoundError:
        raise ParedownError(f"there is no file {source} to move into the bundle") from None
    except OSError:
        shutil.copyfile(source, destination)


def _settle(part: Path) -> None:
    """Everything under `part` on the disk, and readable to whom the manifest is."""
    mode = (part / MANIFEST).stat().st_mode
    for name in file_names(part):
        (part / name).chmod(mode)  # safetensors writes files that only their owner may read
        _sync(part / name)
    for directory in [path for path in part.rglob("*") if path.is_dir()] + [part]:
        _sync(directory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _swap(part: Path, place: Path) -> None:
    """Puts `part` at `place`; what was there is deleted last, and put back if the new one cannot take its place."""
    old = old_place(place, os.getpid())
    try:
        if place.exists():
            os.rename(place, old)
        os.rename(part, place)
    except BaseException:
        if old.exists() and not place.exists():
            os.rename(old, place)
        raise
    with contextlib.suppress(OSError):  # the bundle is in its place, whatever the folder above says
        _sync(place.parent)
    shutil.rmtree(old, ignore_errors=True)


def _disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    # safetensors and tokenizers write from Rust: their errors are no OSError, and tell the number in their text only.
    return any(f"(os error {number})" in str(error) for number in (errno.ENOSPC, errno.EDQUOT))
