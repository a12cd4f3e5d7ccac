"""What keeping units costs, group by group: the one thing an allocator needs to know about time, memory or arithmetic.

Legend: U units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paredown.types import Anatomy, Array, Group, Limits


@dataclass(frozen=True)
class Costs:
    """`group[name]` [U+1] is the cost of keeping 0, 1, ... U units; `fixed` what no plan can change."""

    fixed: float
    group: Mapping[str, Array]

    @property
    def dense(self) -> float:
        """The cost of the model as it is."""
        return self.fixed + sum(float(cost[-1]) for cost in self.group.values())


def arithmetic(anatomy: Anatomy, metric: str, *, tokens: int = 32) -> Costs:
    """Parameters of the layers, or multiply-accumulates per text of `tokens` tokens. Embeddings and head left out."""
    layout = anatomy.layout
    group: dict[str, Array] = {}
    for part in cuttable(anatomy):
        per_unit = 2 * layout.width + 1 if part.kind == "neuron" else layout.head_dim * (4 * layout.width + 3)
        if metric == "macs":
            per_unit = 2 * layout.width * tokens
            if part.kind == "head":
                per_unit = (4 * layout.width + 2 * tokens) * layout.head_dim * tokens
        group[part.name] = per_unit * np.arange(part.units + 1, dtype=np.float64)
    return Costs(0.0, group)


def cuttable(anatomy: Anatomy) -> list[Group]:
    """Head and neuron groups, bottom-up."""
    return [group for group in anatomy.groups if group.kind != "layer"]


def allowed_widths(group: Group, limits: Limits) -> tuple[int, ...]:
    """The unit counts that the target likes, narrowest first; the full width is always one of them."""
    if group.kind not in limits.allowed:
        return (group.units,)
    step = limits.multiple_of if group.kind == "neuron" else 1
    counts = {*range(0, group.units, step), group.units}
    return tuple(sorted(count for count in counts if count >= group.minimum))
