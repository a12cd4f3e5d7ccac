"""What a run left of the dense model, in words and pictures of the report."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from paredown.report import _charts as charts
from paredown.report import _heat, words

Facts = Mapping[str, Any]


def no_cut(result: Mapping[str, Any]) -> str:
    """What to say where the answer, or the closest to one, is a dense model, or one that only has zeros; empty where
    something was cut.
    """
    name = words.chosen(result).get("name")
    if words.zeros(result) and _keeps_all(result):
        return "No layer, head or neuron was cut: weights were made zero."
    if words.mappings(result.get("kept")) or _narrowed(result) or not name:
        return ""
    return f"Nothing was cut: {name} is {'recommended' if result.get('accepted') else 'the closest candidate'}."


def _keeps_all(result: Facts) -> bool:
    """Whether every layer of the dense model stays, with all its heads and neurons."""
    anatomy, stays = words.mapping(result.get("anatomy")), words.mappings(result.get("kept"))
    return len(stays) == words.whole(anatomy.get("layers")) and all(
        len(words.numbers(row.get("heads"))) == words.whole(anatomy.get("heads"))
        and words.whole(row.get("neurons")) == words.whole(anatomy.get("neurons"))
        for row in stays
    )


def _narrowed(result: Facts) -> bool:
    """Whether channels or residual branches were cut."""
    return _gone(result) > 0 or any(stay < of for _, of, stay in charts.channel_rows(result))


def _gone(result: Facts) -> int:
    """How many residual branches are gone."""
    return sum(branch.get("gone") is True for branch in words.mappings(result.get("branches")))


def summary(result: Facts) -> list[str]:
    """ "5 of 6 layers", "41 of 72 heads", ...: what stays of the dense model."""
    anatomy, stays = words.mapping(result.get("anatomy")), words.mappings(result.get("kept"))
    layers, heads, neurons = (words.whole(anatomy.get(name)) for name in ("layers", "heads", "neurons"))
    if not layers or not stays:
        return []
    found = [f"{len(stays)} of {layers} layers"]
    if heads:
        found.append(f"{sum(len(words.numbers(row.get('heads'))) for row in stays)} of {layers * heads} heads")
    if neurons:
        total, left = layers * neurons, sum(words.whole(row.get("neurons")) or 0 for row in stays)
        found.append(f"{left:,} of {total:,} FFN neurons ({100 * left / total:.0f} %)")
    return found


def channels(result: Facts) -> dict[str, Any] | None:
    """What stays of a network's channels: a sentence, the picture of it, and what is left whole; None where nothing
    was cut.
    """
    if not _narrowed(result):
        return None
    rows, branches = charts.channel_rows(result), words.mappings(result.get("branches"))
    said = []
    if rows:
        narrower, stay, of = (sum(values) for values in zip(*((0 < s < c, s, c) for _, c, s in rows), strict=True))
        groups = f"{narrower} of {_counted(len(rows), 'group')} of channels"
        said += [f"{groups} {_are(narrower)} narrower", f"{stay:,} of {_counted(of, 'channel')} stay"]
    if branches:
        said.append(f"{_gone(result)} of {len(branches)} residual branches {_are(_gone(result))} gone")
    dense, pruned = (words.finite(result.get(name)) for name in ("macs_dense", "macs_pruned"))
    if dense and pruned is not None:
        said.append(f"{100 * pruned / dense:.0f} % of the multiply-accumulates stay")
    return {
        "sentence": ", ".join(said),
        "picture": charts.pictures(charts.channels, result),
        "gone": _gone(result) > 0,
        "whole": _whole(result),
    }


def _counted(number: int, name: str) -> str:
    return f"{number:,} {name}" + ("" if number == 1 else "s")


def _are(number: int) -> str:
    return "is" if number == 1 else "are"


def _whole(result: Facts, most: int = 3) -> list[str]:
    """Why tensors were left whole, and which, some of each: "the network's answer: fc.weight"."""
    reasons: dict[str, list[str]] = {}
    for tensor, why in words.mapping(result.get("whole")).items():
        reasons.setdefault(re.sub(r" \([^()]*\)$", "", str(why)), []).append(str(tensor))  # without the node's name
    ordered = sorted(reasons.items(), key=lambda item: -len(item[1]))
    found = []
    for why, tensors in ordered[:most]:
        rest = f" and {len(tensors) - most:,} more" if len(tensors) > most else ""
        found.append(f"{why}: {', '.join(tensors[:most])}{rest}")
    others = sum(len(tensors) for _, tensors in ordered[most:])
    return [*found, f"{_counted(others, 'tensor')} for other reasons"] if others else found


def zeros(result: Facts) -> dict[str, Any] | None:
    """How many weights of each matrix are zero: a sentence and a map, a row per layer."""
    facts = words.mapping(result.get("zeros"))
    matrices = words.mappings(facts.get("matrices"))
    if not matrices:
        return None
    rows: dict[str, dict[str, float | None]] = {}
    for one in matrices:
        layer, _, part = re.sub(r"^.*?\.(\d+)\.", r"\1 ", str(one["matrix"])).partition(" ")
        rows.setdefault(layer, {})[part] = words.finite(one["sparsity"])
    parts = list(dict.fromkeys(part for row in rows.values() for part in row))
    values = [[row.get(part) for part in parts] for row in rows.values()]
    sentence = f"{words.zeros(result)}. What is not zero is stored and multiplied, nothing else."
    picture = Markup(_heat.picture("Share of zeros by layer and matrix", [f"L{layer}" for layer in rows], values))
    return {"sentence": sentence, "columns": ", ".join(parts), "picture": picture}
