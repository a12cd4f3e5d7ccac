"""GET QUALITY BACK: in closed form (compensate, reconstruct), or by training (distill, train).

`fit_embedder` trains a sentence encoder that nothing was cut from, or only layers. Traced networks have
`refit_graph` and `train_on_pictures`.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from paredown import registry
from paredown.recovery._embedder import Course, Lesson, check_installed, fit_embedder
from paredown.recovery._pictures import train_on_pictures
from paredown.recovery._refit import refit_graph, refit_inputs

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["Course", "Lesson", "check_installed", "fit_embedder", "recover"]
__all__ += ["refit_graph", "refit_inputs", "train_on_pictures"]


def recover(small: Model, *, method: str = "reconstruct", **settings: Any) -> Any:
    """What `recovery.<method>.recover(small, ...)` gives; the student handed in stays as it is."""
    return registry.find("recovery", method).recover(small, **settings)
