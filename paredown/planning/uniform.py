"""The same width in every layer: what a stock transformers config can express, and what some engines insist on."""

from __future__ import annotations

import itertools

import numpy as np

from paredown.errors import InfeasibleBudget
from paredown.planning._costs import Costs, allowed_widths, cuttable
from paredown.planning.knapsack import best_units, error_of_width
from paredown.types import Anatomy, Limits, Scores


def allocate(
    anatomy: Anatomy, scores: Scores, budget: float, limits: Limits, costs: Costs
) -> dict[str, tuple[int, ...]]:
    """The keep table with one head count and one neuron count for all layers, of least error within `budget`."""
    kinds = {kind: [g for g in cuttable(anatomy) if g.kind == kind] for kind in ("head", "neuron")}
    widths = {kind: allowed_widths(groups[0], limits) for kind, groups in kinds.items()}
    best: tuple[float, float, tuple[int, int]] | None = None
    least = np.inf
    for pair in itertools.product(widths["head"], widths["neuron"]):
        chosen = dict(zip(("head", "neuron"), pair, strict=True))
        cost = costs.fixed + sum(float(costs.group[g.name][chosen[k]]) for k, gs in kinds.items() for g in gs)
        least = min(least, cost)
        if cost <= budget * (1 + 1e-9):
            lost = sum(error_of_width(scores.values[g.name])[chosen[k]] for k, gs in kinds.items() for g in gs)
            if best is None or (lost, cost) < best[:2]:
                best = (float(lost), cost, pair)
    if best is None:
        raise InfeasibleBudget(
            f"No uniform width costs at most {budget:.6g}; the least that can be reached is {least:.6g}.",
            closest=float(least),
        )
    keep = anatomy.identity()
    for kind, count in zip(("head", "neuron"), best[2], strict=True):
        for group in kinds[kind]:
            keep[group.name] = best_units(scores.values[group.name], count)
    return keep
