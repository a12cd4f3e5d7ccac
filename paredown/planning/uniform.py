"""The same width in every layer: what a stock transformers config can express, and what some engines insist on."""

from __future__ import annotations

import itertools

import numpy as np

from paredown.errors import ParedownError
from paredown.planning._costs import Costs, allowed_widths, best_units, cuttable, error_of_width, infeasible, most
from paredown.types import Anatomy, Limits, Scores


def allocate(
    anatomy: Anatomy, scores: Scores, budget: float, limits: Limits, costs: Costs
) -> dict[str, tuple[int, ...]]:
    """The keep table with one head count and one neuron count for all layers, of least error within `budget`.

    Raises ParedownError for a model whose layers differ already and share no allowed width.
    """
    alike = len({(group.kind, group.units) for group in cuttable(anatomy)}) == 2
    if alike and costs.dense <= most(budget):
        return anatomy.identity()
    kinds = {kind: [g for g in cuttable(anatomy) if g.kind == kind] for kind in ("head", "neuron")}
    widths = {
        kind: sorted(set.intersection(*(set(allowed_widths(group, limits)) for group in groups)))
        for kind, groups in kinds.items()
    }
    for kind, shared in widths.items():
        if not shared:
            raise ParedownError(f"The layers have different numbers of {kind}s and share none that the target allows.")
    price = {k: sum(costs.group[g.name][widths[k]] for g in groups) for k, groups in kinds.items()}
    error = {k: sum(error_of_width(scores.values[g.name])[widths[k]] for g in groups) for k, groups in kinds.items()}
    total = costs.fixed + np.add.outer(price["head"], price["neuron"])
    if total.min() > most(budget):
        raise infeasible(budget, float(total.min()))
    lost = np.where(total <= most(budget), np.add.outer(error["head"], error["neuron"]), np.inf)
    at = min(itertools.product(*map(range, total.shape)), key=lambda pair: (lost[pair], total[pair]))
    keep = anatomy.identity()
    for kind, level in zip(kinds, at, strict=True):
        for group in kinds[kind]:
            keep[group.name] = best_units(scores.values[group.name], widths[kind][level])
    return keep
