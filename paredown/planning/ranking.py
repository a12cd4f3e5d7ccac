"""One global ranking: units go in the order of score per cost until the budget is met (Molchanov et al. 2017).

Groups lose units in whole steps that the target likes, so the order is that of steps. arXiv:1611.06440.
"""

from __future__ import annotations

import heapq

import numpy as np

from paredown.planning._costs import Costs, allowed_widths, best_units, cuttable, error_of_width, infeasible, most
from paredown.types import Anatomy, Limits, Scores


def allocate(
    anatomy: Anatomy, scores: Scores, budget: float, limits: Limits, costs: Costs
) -> dict[str, tuple[int, ...]]:
    """The keep table whose total cost is at most `budget`, the cheapest loss per saving taken first."""
    groups = {group.name: group for group in cuttable(anatomy)}
    widths = {name: np.asarray(allowed_widths(group, limits)) for name, group in groups.items()}
    errors = {name: error_of_width(scores.values[name])[widths[name]] for name in groups}
    prices = {name: costs.group[name][widths[name]] for name in groups}
    level = {name: len(width) - 1 for name, width in widths.items()}
    heap: list[tuple[float, str, int]] = []

    def offer(name: str) -> None:
        """The narrower level of least loss per saving: a step that saves nothing must not hide one that does."""
        here = level[name]
        saved = prices[name][here] - prices[name][:here]
        if (saved > 0).any():
            loss = np.where(saved > 0, errors[name][:here] - errors[name][here], np.inf)
            ratios = loss / np.where(saved > 0, saved, 1.0)
            goal = int(np.flatnonzero(ratios == ratios.min())[-1])
            heapq.heappush(heap, (float(ratios[goal]), name, goal))

    def total() -> float:
        return costs.fixed + sum(float(prices[name][at]) for name, at in level.items())

    for name in groups:
        offer(name)
    while total() > most(budget):
        if not heap:
            raise infeasible(budget, total())
        _, name, level[name] = heapq.heappop(heap)
        offer(name)
    keep = anatomy.identity()
    for name in groups:
        keep[name] = best_units(scores.values[name], int(widths[name][level[name]]))
    return keep
