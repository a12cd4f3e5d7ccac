"""Which channels of a traced network stay, so that its arithmetic or its parameters fit a budget.

What a layer costs is the product of the channels it reads and those it makes, so no group has a price of its own: the
share that goes is found by bisection on the whole network's cost.

Legend: U units of a group.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paredown.errors import InfeasibleBudget, ParedownError
from paredown.planning._costs import best_units, infeasible, most
from paredown.types import Array, Budget, GraphAnatomy, Limits, Plan, Scores

HALVINGS = 40
MULTIPLES = (8, 4, 2, 1)  # of channels: engines pack them by registers of floats
NEAR = 0.97  # of what the finest steps use of a budget: a coarse one that uses as much is taken


@dataclass(frozen=True)
class Product:
    """A layer's weight [O, C, ...]: `places` positions of its output, `shape` that of the weight."""

    tensor: str
    shape: tuple[int, ...]
    places: int


class ChannelCosts:
    """Multiply-accumulates of one picture, parameters, or channels, by how many units each group keeps."""

    def __init__(self, anatomy: GraphAnatomy, products: Sequence[Product], metric: str, free: Sequence[str] = ()):
        if metric not in ("macs", "params", "channels"):
            raise ValueError(f"metric is {metric!r}; choose macs, params or channels")
        self._free = free if metric == "channels" else ()  # channels count where they may go
        self._terms: list[tuple[int, list[tuple[int, dict[str, int]]]]] = []
        if metric == "channels":
            return
        owned: dict[tuple[str, int], dict[str, int]] = {}
        units = {group.name: group.units for group in anatomy.channels}
        for group in anatomy.channels:
            for part in group.slices:
                owned.setdefault((part.tensor, part.axis), {})[group.name] = part.positions.shape[1]
        for one in products:
            sides = []
            for axis in (0, 1):
                each = owned.get((one.tensor, axis), {})
                fixed = one.shape[axis] - sum(units[name] * count for name, count in each.items())
                sides.append((fixed, each))
            window = int(np.prod(one.shape[2:]))
            self._terms.append((window * (one.places if metric == "macs" else 1), sides))

    def __call__(self, widths: Mapping[str, int]) -> float:
        total = float(sum(widths[name] for name in self._free))
        for weight, sides in self._terms:
            sizes = [fixed + sum(widths[name] * count for name, count in each.items()) for fixed, each in sides]
            total += weight * sizes[0] * sizes[1]
        return total


def channel_plan(
    anatomy: GraphAnatomy,
    scores: Scores,
    budget: Budget,
    products: Sequence[Product],
    limits: Limits | None = None,
    *,
    ranking: str = "global",
    protect: Sequence[str] = (),
    shares: Mapping[str, float] | None = None,
    minimum: float = 0.1,
    inexact: bool = False,
) -> Plan:
    """The plan that keeps `budget.keep` of the network's macs or params, or of the channels that may be cut.

    With the "global" `ranking` one threshold on the scores parts what goes; with "local" every group loses the same
    share, its own lowest. `protect` names groups that stay whole, `shares` what others lose, whatever the ranking says.
    A group keeps a share of `minimum` at least, and a multiple of `limits.multiple_of` units. Groups that are not exact
    (a norm takes its statistics over them) stay whole unless `inexact`. Raises InfeasibleBudget, ParedownError for a
    group that does not exist.
    """
    limits, shares = limits or Limits(), dict(shares or {})
    names = {group.name for group in anatomy.channels}
    for name in (*protect, *shares):
        if name not in names:
            raise ParedownError(f"there is no group of channels {name!r}; there are {', '.join(sorted(names))}")
    if ranking not in ("global", "local"):
        raise ValueError(f"ranking is {ranking!r}; choose global or local")
    whole = {group.name: group.units for group in anatomy.channels}
    free = [g for g in anatomy.channels if g.name not in protect and g.name not in shares and (g.exact or inexact)]
    cost = ChannelCosts(anatomy, products, budget.metric, [group.name for group in free])
    fixed = {name: _liked(whole[name] * (1 - share), whole[name], limits, minimum) for name, share in shares.items()}
    places = _in_one_order([scores.values[group.name] for group in free])
    total = sum(group.units for group in free)

    def widths(gone: float) -> dict[str, int]:
        """Where a share of `gone` of the free units is to go."""
        found = {**whole, **fixed}
        for group, own in zip(free, places, strict=True):
            if ranking == "local":
                stay = group.units * (1 - gone)
            else:
                stay = float((own >= min(int(gone * total), total - 1)).sum())
            found[group.name] = _liked(stay, group.units, limits, minimum)
        return found

    allowed = budget.keep * cost(whole)
    chosen = _bisected(widths, cost, allowed)
    best = {group.name: np.sort(own)[::-1] for group, own in zip(free, places, strict=True)}

    def next_worth(name: str, width: int) -> float:
        """Of the best unit that a group lacks at this width: its place among all, or the share that is gone."""
        return 1 - width / whole[name] if ranking == "local" else float(best[name][width])

    _widened(chosen, whole, list(best), next_worth, cost, most(allowed), limits.multiple_of)
    keep = {name: best_units(scores.values[name], count) for name, count in chosen.items()}
    return Plan(
        anatomy.fingerprint,
        {**anatomy.identity(), **keep},
        source=f"{scores.criterion}, {ranking}, {budget.metric} {budget.keep:.4g}",
    )


def aligned_plan(
    anatomy: GraphAnatomy, scores: Scores, budget: Budget, products: Sequence[Product], **how: Any
) -> Plan:
    """The plan of `channel_plan` in the coarsest steps of 8, 4, 2 or 1 channels that use the budget nearly as well as
    the finest. Raises what that raises.
    """
    free = [group.name for group in anatomy.channels if group.name not in how.get("protect", ())]
    cost = ChannelCosts(anatomy, products, budget.metric, free)

    def made(multiple: int) -> Plan:
        return channel_plan(anatomy, scores, budget, products, Limits(multiple_of=multiple), **how)

    def used(plan: Plan) -> float:
        return cost({group.name: len(plan.keep[group.name]) for group in anatomy.channels})

    finest = made(MULTIPLES[-1])
    for multiple in MULTIPLES[:-1]:
        with contextlib.suppress(InfeasibleBudget):  # in steps as coarse as these, not in finer ones
            plan = made(multiple)
            if used(plan) >= NEAR * used(finest):
                return plan
    return finest


def _in_one_order(values: Sequence[Array]) -> list[Array]:
    """Of each group [U], at which place of all units each one goes, the lowest first; of units with the same score,
    the groups lose the same shares.
    """
    if not values:
        return []
    inside = [np.argsort(np.argsort(own, kind="stable"), kind="stable") / len(own) for own in values]
    order = np.lexsort((np.concatenate(inside), np.concatenate(values)))
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    return np.split(place, np.cumsum([len(own) for own in values])[:-1])


def _bisected(
    widths: Callable[[float], dict[str, int]], cost: Callable[[Mapping[str, int]], float], allowed: float
) -> dict[str, int]:
    """The widest that costs no more than is allowed."""
    if cost(widths(0.0)) <= most(allowed):
        return widths(0.0)
    if cost(widths(1.0)) > most(allowed):
        raise infeasible(allowed, cost(widths(1.0)))
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if cost(widths(middle)) <= most(allowed) else (middle, high)
    return widths(high)


def _widened(
    chosen: dict[str, int],
    whole: Mapping[str, int],
    names: Sequence[str],
    next_worth: Callable[[str, int], float],
    cost: Callable[[Mapping[str, int]], float],
    most_cost: float,
    step: int,
) -> None:
    """Gives back, in place, what a coarse step left of the budget: a step at a time, the worthiest that fits first."""
    while True:
        short = [name for name in names if chosen[name] < whole[name]]
        for name in sorted(short, key=lambda name: -next_worth(name, chosen[name])):
            wider = {**chosen, name: min(whole[name], chosen[name] + step)}
            if cost(wider) <= most_cost:
                chosen.update(wider)
                break
        else:
            return


def _liked(stay: float, units: int, limits: Limits, minimum: float) -> int:
    """The nearest count that the target likes, at least the minimum and one step."""
    step = limits.multiple_of
    least = max(1, int(np.ceil(units * minimum)))
    count = int(step * max(1, round(stay / step)))
    return min(units, max(count, int(step * np.ceil(least / step))))
