"""The copy that recovery works on."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

from paredown.types import Layout

Model = TypeVar("Model", bound=nn.Module)


def copied(model: Model, layout: Layout) -> Model:
    """A copy whose embeddings lie in the same memory: recovery leaves them as they are, and they are most of a model.

    They are parameters of the copy's own, so it can be frozen or trained without the model's taking notice.
    """
    tables = [table for name in layout.embeddings for table in model.get_submodule(name).parameters()]
    memo: dict[int, Any] = {id(table): nn.Parameter(table.detach(), table.requires_grad) for table in tables}
    return copy.deepcopy(model, memo)
