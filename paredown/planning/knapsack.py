"""Exact choice of one width per group under a budget of measured cost: the dynamic programme of SPDY.

Frantar and Alistarh 2022 (arXiv:2201.13096). Costs are rounded up to 1/10000 of the budget, so a promise is kept.

Legend: U units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paredown.errors import InfeasibleBudget
from paredown.planning._costs import Costs, allowed_widths, cuttable
from paredown.types import Anatomy, Array, Limits, Scores, as_indices

BUCKETS = 10_000


def allocate(
    anatomy: Anatomy, scores: Scores, budget: float, limits: Limits, costs: Costs
) -> dict[str, tuple[int, ...]]:
    """The keep table whose total cost is at most `budget`; the error of a width is the score of all that goes."""
    groups = cuttable(anatomy)
    widths = [allowed_widths(group, limits) for group in groups]
    errors = [error_of_width(scores.values[g.name])[list(w)] for g, w in zip(groups, widths, strict=True)]
    prices = [costs.group[g.name][list(w)] for g, w in zip(groups, widths, strict=True)]
    levels = solve(prices, errors, budget - costs.fixed)
    keep = anatomy.identity()
    for group, width, level in zip(groups, widths, levels, strict=True):
        keep[group.name] = best_units(scores.values[group.name], width[level])
    return keep


def error_of_width(scores: Array) -> Array:
    """[U+1]: the summed score of the units that go when 0, 1, ... U of the best are kept."""
    ascending = np.sort(np.maximum(scores, 0))
    return np.concatenate([[0.0], np.cumsum(ascending)])[::-1]


def best_units(scores: Array, count: int) -> tuple[int, ...]:
    """The `count` units of highest score; of equal ones the first."""
    return as_indices(np.argsort(-scores, kind="stable")[:count])


def solve(costs: Sequence[Array], errors: Sequence[Array], budget: float) -> tuple[int, ...]:
    """The level of each group that minimises the sum of errors with the sum of costs at most `budget`.

    `costs[g]` and `errors[g]` have one entry per level. Raises InfeasibleBudget with the least reachable cost.
    """
    least = float(sum(np.min(cost) for cost in costs))
    if budget < least or budget < 0:
        raise InfeasibleBudget(
            f"No choice of widths costs at most {budget:.6g}; the least that can be reached is {least:.6g}.",
            closest=least,
        )
    unit = max(budget, 1e-300) / BUCKETS
    best = np.zeros(BUCKETS + 1)  # best[b]: least error with at most b buckets spent on the groups so far
    steps: list[Array] = []
    picks: list[Array] = []
    for cost, error in zip(costs, errors, strict=True):
        step = np.ceil(np.minimum(np.asarray(cost) / unit, BUCKETS + 1) - 1e-9).astype(int)
        table = np.full((len(step), BUCKETS + 1), np.inf)
        for level, taken in enumerate(step):
            if taken <= BUCKETS:
                table[level, taken:] = best[: BUCKETS + 1 - taken] + error[level]
        steps.append(step)
        picks.append(table.argmin(axis=0))
        best = table.min(axis=0)
    if not np.isfinite(best[-1]):  # rounding up alone broke the budget: the cheapest choice is all that fits
        return tuple(int(np.argmin(cost)) for cost in costs)
    levels: list[int] = []
    left = BUCKETS
    for step, pick in zip(reversed(steps), reversed(picks), strict=True):
        levels.append(int(pick[left]))
        left -= int(step[levels[-1]])
    return tuple(reversed(levels))
