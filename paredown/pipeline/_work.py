"""The folder in which an unfinished run keeps what it has done, so that a second start goes on from there."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from paredown.files import replacing
from paredown.types import canonical_json


class Work:
    """Results by name, each written whole or not at all. It lies beside the bundle-to-be and goes when that is done."""

    def __init__(self, out: Path, key: str):
        self.folder = out.parent / f".{out.name}.work"
        marker = self.folder / "key"
        self.discarded = self.folder.exists() and (not marker.exists() or marker.read_text() != key)
        if self.discarded:
            shutil.rmtree(self.folder)  # another run's leftovers: other settings, other results
        self.resumed = self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.resumed:
            with replacing(marker) as beside:
                beside.write_text(key)
        self._spent, self._begun = self._spent_before(), time.time()
        with replacing(self.path("starts")) as beside:
            beside.write_text(json.dumps([self._spent, self._begun]))

    @property
    def minutes(self) -> float:
        """How long the run has worked, over all its starts."""
        return (self._spent + time.time() - self._begun) / 60

    def _spent_before(self) -> float:
        """Seconds that earlier starts worked: each until the last file that it wrote."""
        if not self.resumed or not self.path("starts").exists():
            return 0.0
        spent, begun = json.loads(self.path("starts").read_text())
        last = max(path.stat().st_mtime for path in self.folder.iterdir() if path.name != "key")
        return float(spent + max(0.0, last - begun))

    def path(self, name: str) -> Path:
        return self.folder / name

    def json(self, name: str, compute: Callable[[], Any]) -> Any:
        """What an earlier start stored under this name, or what `compute` gives now."""
        path = self.path(f"{name}.json")
        if path.exists():
            return json.loads(path.read_text())
        value = json.loads(canonical_json(compute()))
        with replacing(path) as beside:
            beside.write_text(json.dumps(value))
        return value

    def tensors(self, name: str, compute: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """The same for tensors, as safetensors."""
        path = self.path(f"{name}.safetensors")
        if path.exists():
            return load_file(path)
        value = {key: tensor.contiguous() for key, tensor in compute().items()}
        with replacing(path) as beside:
            save_file(value, beside)
        return value

    def file(self, name: str, write: Callable[[Path], object]) -> Path:
        """A file that `write` makes unless an earlier start did; the writer itself sees to it that it is whole."""
        path = self.path(name)
        if not path.exists():
            write(path)
        return path

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
