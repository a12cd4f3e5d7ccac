"""GET QUALITY BACK: in closed form (compensate, reconstruct), or by training (distill, train).

`fit_embedder` trains a sentence encoder that nothing was cut from, or only layers.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from paredown import registry
from paredown.recovery._embedder import Course, Lesson, check_installed, fit_embedder

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["Course", "Lesson", "check_installed", "fit_embedder", "recover"]


def recover(small: Model, *, method: str = "reconstruct", **settings: Any) -> Any:
    """What `recovery.<method>.recover(small, ...)` gives; the student handed in stays as it is."""
    return registry.find("recovery", method).recover(small, **settings)
