"""What a run is asked to do, and how it tells how far it is."""

from __future__ import annotations

import math
import shlex
from dataclasses import dataclass
from typing import Protocol

from paredown.errors import ParedownError

TARGETS = ("onnxruntime", "openvino", "torch")
DEFAULT_DROP = 0.01
COLUMNS = ("text_column", "label_column", "pair_column", "score_column")


@dataclass(frozen=True)
class Settings:
    """One run of `prune`. At most one of `speedup` and `latency_ms` is set; without either `max_drop` is the dial.

    `max_drop` is absolute (0.01 is one point of accuracy, or 0.01 of cosine). With a speed dial it is an additional
    gate, and None asks for no bound on quality.
    """

    model: str
    data: str
    eval: str | None
    out: str
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    score_column: str | None = None
    max_drop: float | None = None
    speedup: float | None = None
    latency_ms: float | None = None
    target: str = "onnxruntime"
    uniform: bool = False
    minutes: float = 20.0
    confidence: float = 0.9
    seed: int = 0
    threads: int | None = None
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.speedup is not None and self.latency_ms is not None:
            raise ParedownError("Ask for a speed-up or for a latency, not for both.")
        if self.target not in TARGETS:
            raise ParedownError(f"There is no target {self.target!r}; choose one of {', '.join(TARGETS)}.")
        checks = (
            (self.max_drop is None or 0 <= self.max_drop < 1, "max_drop is a share from 0 to below 1, such as 0.01"),
            (self.speedup is None or 1 <= self.speedup < math.inf, "speedup is a factor of 1 or more"),
            (self.latency_ms is None or 0 < self.latency_ms < math.inf, "latency_ms is a time above 0"),
            (0 <= self.minutes < math.inf, "minutes is a time of 0 or more"),
            (0.5 <= self.confidence < 1, "confidence is a share from 0.5 to below 1"),
            (self.threads is None or self.threads >= 1, "threads is 1 or more"),
            (self.max_length is None or self.max_length >= 4, "max_length is 4 tokens or more"),
        )
        for fine, sentence in checks:
            if not fine:
                raise ParedownError(f"{sentence}.")

    @property
    def dial(self) -> str:
        """Which of the three budgets leads: "speedup", "latency_ms" or "max_drop"."""
        if self.speedup is not None:
            return "speedup"
        return "latency_ms" if self.latency_ms is not None else "max_drop"

    @property
    def gate(self) -> float | None:
        """The largest drop that passes; None when only speed was asked for."""
        if self.max_drop is not None:
            return self.max_drop
        return DEFAULT_DROP if self.dial == "max_drop" else None

    def columns(self) -> dict[str, str | None]:
        """The columns named, by what they hold; None where the file's own header decides."""
        return {name: getattr(self, name) for name in COLUMNS}

    def objective(self) -> dict[str, float | str | None]:
        """The dial, its value, and the largest drop that passes."""
        value = {"speedup": self.speedup, "latency_ms": self.latency_ms, "max_drop": self.gate}[self.dial]
        return {"dial": self.dial, "value": value, "max_drop": self.gate}

    def command(self) -> str:
        """The command line that repeats the run."""
        words = ["paredown", "prune", self.model, "--data", self.data]
        words += ["--eval", self.eval] if self.eval else []
        if self.gate is not None:
            words += ["--max-drop", f"{self.gate * 100:g}%"]
        options = {
            "speedup": self.speedup,
            "latency-ms": self.latency_ms,
            "task": self.task,
            **{name.replace("_", "-"): column for name, column in self.columns().items()},
            "target": self.target,
            "minutes": f"{self.minutes:g}",
            "confidence": None if self.confidence == 0.9 else self.confidence,
            "seed": self.seed or None,
            "threads": self.threads,
            "max-length": self.max_length,
            "out": self.out,
        }
        for name, value in options.items():
            words += [f"--{name}", f"{value}"] if value is not None else []
        return shlex.join(words + (["--uniform"] if self.uniform else []))


class Progress(Protocol):
    """Where long work tells how far it is."""

    def stage(self, name: str, total: float | None = None) -> None:
        """A new stage begins, and the one before is done; `total` is its amount of work, None where nobody knows."""

    def advance(self, amount: float = 1, note: str = "") -> None:
        """So much more of the stage's total is done; `note` replaces the note beside the bar unless it is empty."""

    def say(self, text: str) -> None:
        """Something the user should read; it stays on the screen."""


class Silent:
    """Progress that nobody looks at."""

    def stage(self, name: str, total: float | None = None) -> None:
        return None

    def advance(self, amount: float = 1, note: str = "") -> None:
        return None

    def say(self, text: str) -> None:
        return None
