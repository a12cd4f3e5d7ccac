"""What keeping units costs, group by group: the one thing an allocator needs to know about time, memory or arithmetic.

Legend: U units of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from paredown.errors import InfeasibleBudget
from paredown.types import Anatomy, Array, Group, Limits, as_indices

TOLERANCE = 1e-9  # of the budget: sums of the same costs in another order differ by rounding


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
        entries = [(s.positions.shape[1], s.tensor.endswith("weight")) for s in part.slices]
        weights = sum(count * layout.width for count, is_weight in entries if is_weight)
        per_unit = weights + sum(count for count, is_weight in entries if not is_weight)
        if metric == "macs":
            attended = 2 * tokens * part.consumer.positions.shape[1] if part.kind == "head" else 0
            per_unit = (weights + attended) * tokens
        group[part.name] = per_unit * np.arange(part.units + 1, dtype=np.float64)
    return Costs(0.0, group)


def cuttable(anatomy: Anatomy) -> list[Group]:
    """Head and neuron groups, bottom-up."""
    return [group for group in anatomy.groups if group.kind in ("head", "neuron")]


def allowed_widths(group: Group, limits: Limits) -> tuple[int, ...]:
    """The unit counts that the target likes, narrowest first; the full width is always one of them."""
    if group.kind not in limits.allowed:
        return (group.units,)
    step = limits.multiple_of if group.kind == "neuron" else 1
    counts = {*range(0, group.units, step), group.units}
    return tuple(sorted(count for count in counts if count >= group.minimum))


def error_of_width(scores: Array) -> Array:
    """[U+1]: the summed score of the units that go when 0, 1, ... U of the best are kept."""
    ascending = np.sort(np.maximum(scores, 0))
    return np.concatenate([[0.0], np.cumsum(ascending)])[::-1]


def best_units(scores: Array, count: int) -> tuple[int, ...]:
    """The `count` units of highest score; of equal ones the first."""
    return as_indices(np.argsort(-np.asarray(scores), kind="stable")[:count])


def most(budget: float) -> float:
    """The budget with what rounding may add to it."""
    return budget + TOLERANCE * abs(budget)


def infeasible(budget: float, least: float) -> InfeasibleBudget:
    """The error that says what the least reachable cost is; both in the unit of the costs."""
    return InfeasibleBudget(
        f"No choice of widths costs at most {budget:.6g}; the least that can be reached is {least:.6g}.",
        closest=float(least),
    )
