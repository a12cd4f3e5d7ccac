"""One global ranking: units go in the order of score per cost until the budget is met (Molchanov et al. 2017).

Groups lose units in whole steps that the target likes, so the order is that of steps. arXiv:1611.06440.
"""

from __future__ import annotations

import heapq

import numpy as np

from paredown.errors import InfeasibleBudget
from paredown.planning._costs import Costs, allowed_widths, cuttable
from paredown.planning.knapsack import best_units, error_of_width
from paredown.types import Anatomy, Limits, Scores


def allocate(
    anatomy: Anatomy, scores: Scores, budget: float, limits: Limits, costs: Costs
) -> dict[str, tuple[int, ...]]:
    """The keep table whose total cost is at most `budget`, the cheapest loss per saving taken first."""
    groups = {group.name: group for group in cuttable(anatomy)}
    widths = {name: allowed_widths(group, limits) for name, group in groups.items()}
    errors = {name: error_of_width(scores.values[name]) for name in groups}
    level = {name: len(width) - 1 for name, width in widths.items()}
    total = costs.dense
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        if level[name] > 0:
            wide, narrow = widths[name][level[name]], widths[name][level[name] - 1]
            saved = max(float(costs.group[name][wide] - costs.group[name][narrow]), 1e-300)
            heapq.heappush(heap, (float(errors[name][narrow] - errors[name][wide]) / saved, name))

    for name in groups:
        offer(name)
    while total > budget * (1 + 1e-12) and heap:
        _, name = heapq.heappop(heap)
        before = costs.group[name][widths[name][level[name]]]
        level[name] -= 1
        total -= float(before - costs.group[name][widths[name][level[name]]])
        offer(name)
    if total > budget * (1 + 1e-9):
        raise InfeasibleBudget(
            f"No choice of widths costs at most {budget:.6g}; the least that can be reached is {total:.6g}.",
            closest=float(total),
        )
    keep = anatomy.identity()
    for name in groups:
        keep[name] = best_units(np.asarray(scores.values[name]), widths[name][level[name]])
    return keep
