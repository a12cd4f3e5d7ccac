"""Small students and teachers to distil, and a clock that the tests wind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from paredown.anatomy import describe
from paredown.calibration import distance, tensors
from paredown.encoder import Encoder
from paredown.recovery import distill
from paredown.recovery.distill import Progress
from paredown.surgery import cut
from paredown.tasks import Tokens, pad
from paredown.types import Layout, Plan
from tests.contracts.families import VOCABULARY, tiny


@dataclass
class Clock:
    """`seconds` since the start; every look at it moves it by `tick`."""

    seconds: float = 0.0
    tick: float = 0.1

    def monotonic(self) -> float:
        self.seconds += self.tick
        return self.seconds


@dataclass(frozen=True)
class Case:
    teacher: Encoder
    small: nn.Module
    layout: Layout
    tokens: Tokens
    wanted: Tensor

    def run(self, minutes: float = 0.5, **settings: Any) -> tuple[nn.Module, list[Progress]]:
        settings = {"tokens": self.tokens, "wanted": self.wanted, **settings}
        return distill.recover(self.small, layout=self.layout, minutes=minutes, **settings)

    def far(self, model: nn.Module, held: Any) -> float:
        """Mean distance to the teacher over some texts, one by one."""
        encoder, total = Encoder(model, self.layout), 0.0
        for i in held:
            inputs = pad([self.tokens.ids[i]], pad_id=self.tokens.pad_id, input_names=self.tokens.input_names)
            with torch.no_grad():
                output = encoder(**tensors(inputs, encoder))
            total += float(distance(output, self.wanted[i : i + 1], encoder.output_name))
        return total / len(held)


def texts(count: int, names: tuple[str, ...], pad_id: int, *, seed: int = 0) -> Tokens:
    random = np.random.default_rng(seed)
    ids = tuple(random.integers(5, VOCABULARY, random.integers(1, 12)) for _ in range(count))
    return Tokens(ids, pad_id, names, 0)


def case(family: str = "bert", task: str = "text-classification", *, count: int = 200, seed: int = 0) -> Case:
    model = tiny(family, task, seed=seed)
    anatomy = describe(model)
    keep = {**anatomy.identity(), "layer.0.heads": (1, 2), "layer.1.neurons": (0, 4, 9), "layer.2.heads": ()}
    small = cut(model, anatomy, Plan(anatomy.fingerprint, keep))
    encoder = Encoder(model, anatomy.layout)
    tokens = texts(count, encoder.input_names, int(model.config.pad_token_id))
    wanted = distill.teach(encoder, tokens) if count else torch.empty(0, 3)
    return Case(encoder, small, anatomy.layout, tokens, wanted)


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(at: Progress) -> None:
        if at.step == step:
            raise KeyboardInterrupt

    return report


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
