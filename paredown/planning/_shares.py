"""What goes by shares of a model's units, as a paper or a guide names them: 40 % of the heads, 2 layers of 12.

Legend: U units of a group, L layers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from paredown.errors import InfeasibleBudget
from paredown.planning._costs import best_units
from paredown.types import Anatomy, Array, Group, Limits, Plan, Scores, as_indices

RANKINGS = ("global", "layer")
SCHEDULES = ("linear", "cubic", "exponential")
COLLAPSE = {"layers": 0.35, "heads": 0.85}  # shares beyond which published models stop working


@dataclass(frozen=True)
class Shares:
    """How much of each kind goes: below 1 a share of the ORIGINAL model's, from 1 on a number.

    Heads and neurons are counted in the layers that stay. Where query heads share keys and values, `heads` are whole
    groups and `queries` query heads out of every group. `sublayers` are attention or FFN alone.
    """

    heads: float = 0.0
    queries: float = 0.0
    neurons: float = 0.0
    layers: float = 0.0
    sublayers: float = 0.0

    def __post_init__(self) -> None:
        for kind, value in self.named().items():
            if value < 0 or (value >= 1 and value != int(value)):
                raise ValueError(f"{kind} is {value:g}; give a share from 0 to below 1, or a whole number")

    def named(self) -> dict[str, float]:
        return {field.name: float(getattr(self, field.name)) for field in fields(self)}

    def count(self, kind: str, total: int) -> int:
        """How many of `total` units of a kind go."""
        value = self.named()[kind]
        return round(value * total) if value < 1 else int(value)

    def at(self, done: int, rounds: int, totals: Mapping[str, int], schedule: str = "cubic") -> Shares:
        """What is gone after so many of all rounds, as numbers; after the last one, all of it.

        "linear" takes the same in every round, "cubic" most in the first ones: s (1 - (1 - t)^3) (Zhu and Gupta 2017,
        arXiv:1710.01878, equation 1), "exponential" the same share of what is left: 1 - (1 - s)^t.
        """
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}; choose {', '.join(SCHEDULES)}")

        def gone(kind: str) -> int:
            most = self.count(kind, totals[kind])
            share = most / totals[kind] if totals[kind] else 0.0
            return min(most, round(gone_by(share, done / rounds, schedule) * totals[kind])) if done < rounds else most

        return Shares(**{kind: gone(kind) for kind in self.named()})


def gone_by(share: float, time: float, schedule: str) -> float:
    """Of the original, what is gone at a `time` from 0 to 1 when `share` is at the end; see `Shares.at`."""
    left = 1 - time
    if schedule == "linear":
        return share * time
    return share * (1 - left * left * left) if schedule == "cubic" else 1 - math.pow(max(1 - share, 0.0), time)


def by_shares(
    anatomy: Anatomy,
    scores: Scores,
    shares: Shares,
    limits: Limits | None = None,
    *,
    ranking: str = "global",
    protect: tuple[int, int] = (0, 0),
    minimum: Mapping[str, int] | None = None,
) -> Plan:
    """The plan without the lowest-ranked units: layers first, then sub-layers, then heads and neurons of what is left.

    `ranking` is "global" over all layers or "layer" for the same share in each. The first and last layers of `protect`
    stay whole. `minimum` (by default 1 head and 1 neuron) stay in every sub-layer that is not dropped as a whole.
    Widths of neurons are multiples that the `limits` like; uniform limits take the same number from each layer.
    Raises InfeasibleBudget, whose `closest` is the largest share of that kind, when so much cannot go, and KeyError
    without scores of what is to go. Units whose score is -inf are gone already, and go even beyond the share.
    """
    if ranking not in RANKINGS:
        raise ValueError(f"ranking is {ranking!r}; choose {' or '.join(RANKINGS)}")
    limits = limits or Limits()
    least = {"heads": 1, "queries": 1, "neurons": 1, **(minimum or {})}
    total = anatomy.group("layers").units
    free = range(protect[0], total - protect[1])
    keep = anatomy.identity()
    layers = _without("layers", shares.count("layers", total), scores, free, total)
    keep["layers"] = layers
    open_places = [2 * i + part for i in layers if i in free for part in (0, 1)]
    places = [2 * i + part for i in layers for part in (0, 1)]
    kept = _without("sublayers", shares.count("sublayers", 2 * total), scores, open_places, 2 * total, among=places)
    gone = set(places) - set(kept)
    keep |= {f"layer.{place // 2}.{('heads', 'neurons')[place % 2]}": () for place in gone}
    for kind in ("heads", "queries", "neurons"):
        part = int(kind == "neurons")
        names = {f"layer.{i}.{kind}" for i in layers if 2 * i + part not in gone}
        groups = [group for group in anatomy.groups if group.name in names]
        count = shares.count(kind, sum(group.units for group in groups))
        if count:
            loose = [group for group in groups if group.layer in free]
            step = limits.multiple_of if kind == "neurons" else 1
            if limits.uniform and len(loose) < len(groups):
                raise InfeasibleBudget("Uniform widths and protected layers exclude each other.", closest=0.0)
            widths = _widths(kind, loose, count, scores, step, least[kind], limits.uniform, ranking)
            for group, width in zip(loose, widths, strict=True):
                keep[group.name] = best_units(scores.values[group.name], width)
    said = ", ".join(f"{kind} {value:g}" for kind, value in shares.named().items() if value)
    return Plan(anatomy.fingerprint, keep, source=f"{scores.criterion}, {ranking} ranking, without {said or 'nothing'}")


def collapse_warnings(anatomy: Anatomy, plan: Plan, *, generative: bool) -> tuple[str, ...]:
    """What published work says of a plan that takes this much; empty where it says nothing."""
    found = []
    total = anatomy.group("layers").units
    gone = 1 - len(plan.keep["layers"]) / total
    if generative and gone > COLLAPSE["layers"]:
        found.append(f"{gone:.0%} of the layers go: published decoders stop generating sense beyond 35 %.")
    heads = [group for group in anatomy.groups if group.kind == "head" and group.layer in plan.keep["layers"]]
    count = sum(group.units for group in heads)
    gone = 1 - sum(len(plan.keep[group.name]) for group in heads) / max(count, 1)
    if gone > COLLAPSE["heads"]:
        found.append(f"{gone:.0%} of the heads go: published models collapse beyond 85 %.")
    return tuple(found)


def _without(
    kind: str, count: int, scores: Scores, free: Sequence[int], total: int, *, among: Sequence[int] | None = None
) -> tuple[int, ...]:
    """The units left when the `count` lowest of those that are free have gone."""
    among = range(total) if among is None else among
    if not count:
        return as_indices(among)
    most = len(free) if kind == "sublayers" else min(len(free), total - 1)
    if count > most:
        raise InfeasibleBudget(
            f"{count} of {total} {kind} cannot go; {most} is the most that is left unprotected.", closest=most / total
        )
    values = _scores(scores, kind)
    order = sorted(free, key=lambda unit: (values[unit], unit))
    return as_indices([unit for unit in among if unit not in set(order[:count])])


def _scores(scores: Scores, name: str) -> Array:
    if name not in scores.values:
        raise KeyError(f"the criterion {scores.criterion!r} has no scores of {name}")
    return scores.values[name]


def _widths(
    kind: str,
    groups: Sequence[Group],
    count: int,
    scores: Scores,
    step: int,
    least: int,
    uniform: bool,
    ranking: str,
) -> list[int]:
    """How many units each group keeps, when about `count` go altogether: exactly so many where any width is allowed."""
    fewest = [min(group.units, -(-least // step) * step) for group in groups]
    room = sum(group.units - few for group, few in zip(groups, fewest, strict=True))
    total = sum(group.units for group in groups)
    if count > room:
        raise InfeasibleBudget(
            f"{count} of {total} {kind} cannot go; {room} is the most, with {least} left in every layer that is free.",
            closest=room / max(total, 1),
        )
    if uniform or ranking == "layer":
        wanted = [group.units - count * group.units / total for group in groups]
        nearest = [max(few, round(w / step) * step) for w, few in zip(wanted, fewest, strict=True)]
        alive = [int(np.sum(_scores(scores, group.name) > -np.inf)) for group in groups]
        return [min(left, width) for left, width in zip(alive, nearest, strict=True)]
    pieces: list[tuple[float, int, int, int]] = []  # mean score, group, order within it, units
    for g, (group, few) in enumerate(zip(groups, fewest, strict=True)):
        rising = np.sort(_scores(scores, group.name))[: group.units - few]
        starts = [0, *range((group.units % step) or step, len(rising) + 1, step)]
        height = -np.inf
        for k, (start, stop) in enumerate(zip(starts, starts[1:], strict=False)):
            height = max(height, float(np.mean(rising[start:stop])))  # the order within a group is fixed
            pieces.append((height, g, k, stop - start))
    widths, gone = [group.units for group in groups], 0
    for height, g, _, units in sorted(pieces):
        if gone + units / 2 > count and height > -np.inf:
            break
        widths[g] -= units
        gone += units
    return widths
