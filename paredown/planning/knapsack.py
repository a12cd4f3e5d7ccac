"""The best choice of one width per group under a budget of measured cost: a dynamic programme over exact costs.

The programme of SPDY (Frantar and Alistarh 2022, arXiv:2201.13096) rounds costs to 1/10000 of the budget; here the
undominated (cost, error) pairs are kept as they are, so a small problem is solved exactly and no promise is broken.

Legend: U units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from paredown.planning._costs import Costs, allowed_widths, best_units, cuttable, error_of_width, infeasible, most
from paredown.types import Anatomy, Array, Limits, Scores

WORK = 400_000  # (pair, level) combinations per group: thousands of pairs at a hundred levels, in a tenth of a second


def allocate(
    anatomy: Anatomy, scores: Scores, budget: float, limits: Limits, costs: Costs
) -> dict[str, tuple[int, ...]]:
    """The keep table whose total cost is at most `budget`; the error of a width is the score of all that goes."""
    if costs.dense <= most(budget):
        return anatomy.identity()
    groups = cuttable(anatomy)
    widths = [allowed_widths(group, limits) for group in groups]
    errors = [error_of_width(scores.values[g.name])[list(w)] for g, w in zip(groups, widths, strict=True)]
    prices = [costs.group[g.name][list(w)] for g, w in zip(groups, widths, strict=True)]
    least = costs.fixed + sum(float(np.min(price)) for price in prices)
    if least > most(budget):
        raise infeasible(budget, least)
    levels = solve(prices, errors, most(budget) - costs.fixed)
    keep = anatomy.identity()
    for group, width, level in zip(groups, widths, levels, strict=True):
        keep[group.name] = best_units(scores.values[group.name], width[level])
    return keep


def solve(costs: Sequence[Array], errors: Sequence[Array], budget: float) -> tuple[int, ...]:
    """The level of each group that minimises the sum of errors with the sum of costs at most `budget`.

    `costs[g]` and `errors[g]` have one entry per level. Exact while the undominated pairs are few (see WORK); beyond
    that the best pair of each of some thousand cost classes goes on. Raises InfeasibleBudget with the least cost.
    """
    cheapest = np.asarray([np.min(cost) for cost in costs], dtype=np.float64)
    rest = np.append(np.cumsum(cheapest[::-1])[::-1], 0.0)  # rest[g]: the least that groups g, g+1, ... cost
    if rest[0] > most(budget):
        raise infeasible(budget, float(rest[0]))
    classes = max(500, WORK // max(len(cost) for cost in costs))
    spent, lost = np.zeros(1), np.zeros(1)  # the undominated pairs: cost rising, error falling
    trail: list[tuple[Array, Array]] = []  # per group and pair: the pair it came from, the level taken
    for g, (cost, error) in enumerate(zip(costs, errors, strict=True)):
        total = np.add.outer(spent, cost).ravel()
        loss = np.add.outer(lost, error).ravel()
        order = np.flatnonzero(total <= most(budget) - rest[g + 1])  # every pair kept leads to an end
        order = order[np.lexsort((loss[order], total[order]))]
        lowest = np.minimum.accumulate(loss[order])
        order = order[np.append(True, lowest[1:] < lowest[:-1])]
        if len(order) > classes:
            kind = (total[order] * (classes / total[order[-1]])).astype(np.int64)
            order = order[np.append(kind[1:] != kind[:-1], True)]  # of each class the pair of least error
        spent, lost = total[order], loss[order]
        trail.append((order // len(cost), order % len(cost)))
    pair = len(spent) - 1
    levels: list[int] = []
    for origin, taken in reversed(trail):
        levels.append(int(taken[pair]))
        pair = int(origin[pair])
    return tuple(reversed(levels))
