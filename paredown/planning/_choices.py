"""The best way to have every part of a network under a budget of measured time.

A part is a residual branch with the groups of channels inside it, or one group of channels elsewhere. Whatever is
chosen for one part, times and errors of the others are taken as they were when that part alone was changed: the
programme is exact for such sums (HALP, Shen et al. 2022, arXiv:2110.10811, solves the same knapsack over chunks of
channels), and what they miss is measured afterwards.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paredown.errors import InfeasibleBudget
from paredown.planning._costs import best_units, most
from paredown.planning.knapsack import solve
from paredown.types import BRANCHES, GraphAnatomy, Limits, Plan, Scores

MOST_WAYS = 64  # in which a part with several groups of channels is offered: above, all have the same level


@dataclass(frozen=True)
class Way:
    """One way to have a part: `widths` of its groups that are not whole, or its branch `gone`; `saved` seconds against
    the dense network, and the `error` that comes of it.
    """

    widths: Mapping[str, int]
    gone: int | None = None
    saved: float = 0.0
    error: float = 0.0


def channel_levels(units: int, limits: Limits, minimum: float = 0.1) -> tuple[int, ...]:
    """Widths of a group worth trying, narrowest first, without the full one: quarters, in the target's multiples."""
    step = limits.multiple_of if units > limits.multiple_of else max(1, units // 4)
    least = max(1, int(np.ceil(units * minimum)))
    found = {min(units, max(step, round(units * share / step) * step)) for share in (0.25, 0.5, 0.75)}
    return tuple(sorted(width for width in found if least <= width < units))


def ways_of(
    anatomy: GraphAnatomy,
    seconds: Mapping[tuple[str, int], float],
    errors: Mapping[tuple[str, int], float],
) -> list[list[Way]]:
    """All parts, each with its ways; the first is the dense one.

    `seconds` and `errors` tell, for (group, width), what that group alone saves and costs at that width, and for
    ("branches", number) what a branch does that is gone. What they do not name is not offered.
    """
    inside = {name: number for number, branch in enumerate(anatomy.branches) for name in branch.groups}
    parts: list[list[Way]] = []
    for number, branch in enumerate(anatomy.branches):
        parts.append([*_within(branch.groups, seconds, errors)])
        if (BRANCHES, number) in errors:
            key = (BRANCHES, number)
            parts[-1].append(Way({}, number, seconds[key], errors[key]))
    parts += [[*_within((group.name,), seconds, errors)] for group in anatomy.channels if group.name not in inside]
    return [part for part in parts if len(part) > 1]


def _within(
    groups: Sequence[str], seconds: Mapping[tuple[str, int], float], errors: Mapping[tuple[str, int], float]
) -> list[Way]:
    """All groups at all levels, or at the same level where those would be too many."""
    offered = [[None, *sorted((key for key in errors if key[0] == name), key=lambda key: -key[1])] for name in groups]
    if np.prod([len(one) for one in offered], dtype=float) <= MOST_WAYS:
        chosen = [*itertools.product(*offered)]
    else:
        deepest = max(map(len, offered))
        chosen = [tuple(one[min(level, len(one) - 1)] for one in offered) for level in range(deepest)]
    found = []
    for keys in chosen:
        named = [key for key in keys if key is not None]
        saved, error = (sum(table[key] for key in named) for table in (seconds, errors))
        found.append(Way(dict(named), None, float(saved), float(error)))
    return found


def choose(parts: Sequence[Sequence[Way]], to_save: float) -> list[Way]:
    """A way for every part, that together save so many seconds at the least error. InfeasibleBudget, whose `closest` is
    the most that can be saved.
    """
    best = [max(way.saved for way in part) for part in parts]
    if to_save > most(sum(best)):
        raise InfeasibleBudget(
            f"No choice of channels and branches saves {to_save:.6g} s; the most is {sum(best):.6g} s.",
            closest=sum(best),
        )
    costs = [np.array([top - way.saved for way in part]) for top, part in zip(best, parts, strict=True)]
    errors = [np.array([way.error for way in part]) for part in parts]
    taken = solve(costs, errors, max(0.0, sum(best) - to_save))
    return [part[level] for part, level in zip(parts, taken, strict=True)]


def plan_of(anatomy: GraphAnatomy, scores: Scores, ways: Sequence[Way], source: str = "") -> Plan:
    """The plan of these ways: of every narrower group the units of highest score."""
    keep = anatomy.identity()
    for way in ways:
        for name, width in way.widths.items():
            keep[name] = best_units(scores.values[name], width)
    gone = {way.gone for way in ways}
    if BRANCHES in keep:
        keep[BRANCHES] = tuple(number for number in keep[BRANCHES] if number not in gone)
    return Plan(anatomy.fingerprint, keep, source=source)
