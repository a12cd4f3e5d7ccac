"""What studies are asked, and what those of texts and of pictures have in common."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paredown.cores import cores
from paredown.errors import ParedownError
from paredown.networks import LoadedNetwork, is_network
from paredown.pipeline._settings import Settings
from paredown.types import Array, canonical_json, finite
from paredown.validation.machine import card


@dataclass(frozen=True)
class StudySettings:
    """What the three verbs have in common. `labels`: gradients are those of the task loss, not of the divergence.

    Texts have columns and a `max_length`. An image classifier may be a module, or have `weights`; pictures / 255 are
    normalized by `mean` and `std`, those of a folder brought to `size` (height, width), as in `Settings`.
    """

    model: str | nn.Module
    data: str
    eval: str | None = None
    task: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    pair_column: str | None = None
    score_column: str | None = None
    labels: bool = False
    seed: int = 0
    threads: int | None = None
    max_length: int | None = None
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    size: tuple[int, int] | None = None

    def settings(self) -> Settings:
        """The same, as the main job takes it."""
        shared = {name: value for name, value in vars(self).items() if name not in ("model", "labels")}
        return Settings(self.name, **shared, out="")

    @property
    def given(self) -> LoadedNetwork | None:
        """The module, where the model is one."""
        return LoadedNetwork(self.name, self.model) if isinstance(self.model, nn.Module) else None

    @property
    def name(self) -> str:
        """The model's name."""
        return type(self.model).__name__ if isinstance(self.model, nn.Module) else str(self.model)

    @property
    def of_pictures(self) -> bool:
        """Whether the model is an image classifier."""
        return isinstance(self.model, nn.Module) or is_network(self.name, self.task)


@contextmanager
def with_threads(asked: StudySettings) -> Iterator[None]:
    """Inside, torch computes with the threads that are asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(asked.threads or cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


def facts_of(
    asked: StudySettings, *, task: Any, data: Any, dense: Array, family: str, parameters: int, notes: Sequence[str]
) -> dict[str, Any]:
    """What every study says of itself; `dense` is what the dense model answers to `data`, which judges."""
    metric = task.metric_name(data)
    return {
        "model": asked.name,
        "task": task.NAME,
        "family": family,
        "quality_metric": metric,
        "quality_dense": task.metrics(dense, data, dense).get(metric, 1.0),
        "samples": len(data),
        "loss": "task" if asked.labels else "divergence",
        "parameters_dense": parameters,
        "notes": list(notes),
        "machine": card(),
    }


def check(
    units: Sequence[str], fractions: Sequence[float], recover: str, kinds: Sequence[str], ways: Sequence[str]
) -> None:
    """Raises ParedownError for a unit that is none of these kinds, a share that is none, a recovery that is no way."""
    for unit in units:
        if unit not in kinds:
            raise ParedownError(f"There is no unit {unit!r}; choose among {', '.join(kinds)}.")
    if not all(0 < fraction < 1 for fraction in fractions):
        raise ParedownError("Fractions are shares above 0 and below 1, such as 0.3.")
    if recover not in ways:
        raise ParedownError(f"There is no recovery {recover!r} here; choose {', '.join(ways)}.")


def plain(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts as JSON has them."""
    found: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    return found
