"""The state of a training on disk: one safetensors file that appears whole or not at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from paredown.errors import FingerprintMismatch, ParedownError
from paredown.files import replacing

MOMENTS = (("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",))  # of AdamW, of SGD
SKETCH = 32  # entries of every tensor that tell two students apart


@dataclass(frozen=True)
class Progress:
    """Where a distillation stands: seconds spent, steps done, held-out divergence of the latest check and the best."""

    seconds: float
    step: int
    distance: float
    best: float


@dataclass(frozen=True)
class State:
    """What a training goes on from: seconds spent, steps done, the checks made, and the best weights so far."""

    seconds: float
    step: int
    history: tuple[Progress, ...]
    best: dict[str, Tensor]


class Checkpoint:
    """Saves and restores the trained parameters, their best state, and the optimizer's moments.

    `task` says what is learnt from which texts. It and the first values of the starting weights tell whose a file is.
    """

    def __init__(self, path: Path, trained: Mapping[str, Tensor], optimizer: torch.optim.Optimizer, *, task: str):
        self.path, self.trained, self.optimizer = path, trained, optimizer
        self.start = {name: value.detach().flatten()[:SKETCH].clone() for name, value in trained.items()}
        shapes = [(name, list(value.shape)) for name, value in trained.items()]
        self.identity = hashlib.sha256(json.dumps([task, shapes]).encode()).hexdigest()

    def save(self, state: State) -> None:
        """Writes beside and renames. Raises ParedownError when the disk does not take it."""
        arrays: dict[str, Tensor] = {}
        for name, value in self.trained.items():
            arrays |= {
                f"now.{name}": value.detach(),
                f"best.{name}": state.best[name],
                f"start.{name}": self.start[name],
            }
            moments = self.optimizer.state.get(value, {})
            arrays |= {f"{key}.{name}": moment for key, moment in moments.items()}
        notes = {
            "identity": self.identity,
            "seconds": repr(state.seconds),
            "step": str(state.step),
            "history": json.dumps([asdict(one) for one in state.history]),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as beside:
                save_file({name: array.contiguous() for name, array in arrays.items()}, beside, metadata=notes)
        except (OSError, SafetensorError) as error:
            raise ParedownError(f"The checkpoint {self.path} cannot be written: {error}") from error

    def restore(self) -> State | None:
        """Puts the stored state into parameters and optimizer; None when there is no file.

        Raises FingerprintMismatch when the file is of another training, ParedownError when it cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                notes = file.metadata() or {}
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
        except (OSError, SafetensorError) as error:
            raise ParedownError(
                f"The checkpoint {self.path} cannot be read ({error}): delete it to start anew."
            ) from error
        if notes.get("identity") != self.identity or not self._starts_alike(stored):
            raise FingerprintMismatch(
                f"The checkpoint {self.path} is of another model, or of other texts: delete it, or name another file."
            )
        with torch.no_grad():
            for name, value in self.trained.items():
                value.copy_(stored[f"now.{name}"])
                for keys in MOMENTS:
                    moments = {key: stored.get(f"{key}.{name}") for key in keys}
                    if all(moment is not None for moment in moments.values()):
                        self.optimizer.state[value] = moments
        history = tuple(Progress(**one) for one in json.loads(notes["history"]))
        best = {name: stored[f"best.{name}"] for name in self.trained}
        return State(float(notes["seconds"]), int(notes["step"]), history, best)

    def _starts_alike(self, stored: Mapping[str, Tensor]) -> bool:
        """Whether both began from the same weights, up to what rounding does to a closed-form solution."""
        return all(
            torch.allclose(stored[f"start.{name}"], value, rtol=0.05, atol=0.05 * float(value.abs().mean()))
            for name, value in self.start.items()
        )
