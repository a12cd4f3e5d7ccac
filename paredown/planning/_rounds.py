"""From a model that is cut already to the one it came from, and back: what pruning in rounds needs.

Units are told by their indices in the ORIGINAL model, whatever is left of it. Legend: U units of a group, L layers.
"""

from __future__ import annotations

import numpy as np

from paredown.types import Anatomy, Array, Plan, Scores

PARTS = ("heads", "neurons")  # of a layer, in the order of sub-layers


def lifted(scores: Scores, kept: Plan, anatomy: Anatomy) -> Scores:
    """The scores of a cut model as scores of the original that `anatomy` describes; what is gone has -inf.

    `kept` is the plan by which the cut model was made: its layer j is layer `kept.keep["layers"][j]`.
    """
    layers = kept.keep["layers"]
    total = anatomy.group("layers").units
    values: dict[str, Array] = {}
    for name, units, at in (
        ("layers", total, list(layers)),
        ("sublayers", 2 * total, [2 * i + part for i in layers for part in (0, 1)]),
    ):
        if name in scores.values:
            values[name] = _spread(scores.values[name], units, at)
    if "sublayers" in values:
        empty = [2 * i + part for i in layers for part, kind in enumerate(PARTS) if not kept.keep[f"layer.{i}.{kind}"]]
        values["sublayers"][empty] = -np.inf
    for group in anatomy.groups:
        if group.kind == "layer":
            continue
        kind = group.name.rpartition(".")[2]
        here = f"layer.{layers.index(group.layer)}.{kind}" if group.layer in layers else ""
        if here in scores.values:
            values[group.name] = _spread(scores.values[here], group.units, list(kept.keep[group.name]))
        elif kind == "queries" or any(name.endswith(f".{kind}") for name in scores.values):
            values[group.name] = np.full(group.units, -np.inf)
            if group.layer in layers and kind == "queries":  # the one query head left of a group is none to choose from
                values[group.name][list(kept.keep[group.name])] = 0.0
    return Scores(scores.criterion, values, scores.source)


def _spread(values: Array, units: int, at: list[int]) -> Array:
    found = np.full(units, -np.inf)
    found[at] = values
    return found


def relative(plan: Plan, kept: Plan, small: Anatomy) -> Plan:
    """The plan that turns the model cut by `kept`, which `small` describes, into the one cut by `plan`.

    Raises ValueError when `plan` keeps what `kept` has not.
    """
    layers = kept.keep["layers"]
    keep = {"layers": _places(plan.keep["layers"], layers)}
    for group in small.groups:
        if group.kind != "layer":
            original = f"layer.{layers[group.layer]}.{group.name.rpartition('.')[2]}"
            staying = layers[group.layer] in plan.keep["layers"]
            own = tuple(range(group.units))  # a layer that goes takes its units along
            keep[group.name] = _places(plan.keep[original], kept.keep[original]) if staying else own
    return Plan(small.fingerprint, keep, source=plan.source)


def _places(wanted: tuple[int, ...], there: tuple[int, ...]) -> tuple[int, ...]:
    place = {unit: i for i, unit in enumerate(there)}
    if not place.keys() >= set(wanted):
        raise ValueError(f"{sorted(set(wanted) - place.keys())} is kept by the plan and gone already")
    return tuple(place[unit] for unit in wanted)
