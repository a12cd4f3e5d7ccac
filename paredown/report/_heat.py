"""Heat maps and curves of a study. Values in a map run from 0 (least) to 1 (most); None is an empty cell."""

from __future__ import annotations

import html
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paredown.report import _svg as draw
from paredown.report import words

Facts = Mapping[str, Any]
Rows = list[list[float | None]]

WIDTH, ROW, LEFT = 860.0, 22.0, 60.0
STANDING_OUT = 5  # curves with a colour of their own; the others are grey
MOST_NAMES = 12  # lines that all have their names; of more layers only those at both ends of the order
LONGEST_NAME = 26  # characters of a layer's name that a picture has room for


def heading(unit: str) -> str:
    """The name of a kind of unit at the beginning of a line."""
    return unit.upper() if unit == "ffn" else unit.capitalize()


def layer_names(layers: Iterable[object]) -> dict[object, str]:
    """What each layer is called in a picture: L3, or its name without what all names begin with, and where that is long
    with first letters for all parts but the last; no two alike.
    """
    found = list(dict.fromkeys(layers))
    parts = [str(layer).split(".") for layer in found]
    same = len(os.path.commonprefix(parts)) if len(parts) > 1 else 0  # a layer is never called by nothing
    same = min([same, *(len(part) - 1 for part in parts)])
    called = {}
    for layer, part in zip(found, parts, strict=True):
        name = f"L{layer}" if isinstance(layer, int) else ".".join(part[same:])
        if len(name) > LONGEST_NAME:
            *before, last = part[same:]
            name = ".".join([*(one if one.isdecimal() else one[:1] for one in before), last])
        called[layer] = name if len(name) <= LONGEST_NAME else "…" + name[1 - LONGEST_NAME :]
    often = Counter(called.values())
    return {layer: name if often[name] == 1 else str(layer) for layer, name in called.items()}


def maps(facts: Facts, *, columns: int) -> Iterator[tuple[str, list[str], Rows, str]]:
    """(name, a label per row, values, what the shades mean) of every heat map there is."""
    if "values" in facts:
        yield from _scores(facts, columns)
    rows = words.mappings(facts.get("rows"))
    if rows and "layer" in rows[0]:
        yield from _drops(facts, rows)


def _scores(facts: Facts, columns: int) -> Iterator[tuple[str, list[str], Rows, str]]:
    values = words.mapping(facts["values"])
    dark = "dark: matters more; a unit's share of the largest score"
    if facts.get("unit") == "channels":
        named = {name: words.numbers(found) for name, found in values.items()}
        most = max((max(found) for found in named.values()), default=0.0) or 1.0
        quantiles = np.linspace(0, 1, columns)
        shades: Rows = [[_shade(q, most) for q in np.quantile(found, quantiles)] for found in named.values()]
        says = f"each layer's channels from the least to the most important, as quantiles; {dark}"
        yield "Channels", list(layer_names(named).values()), shades, says
        return
    for kind in ("heads", "neurons"):
        named = {name: words.numbers(v) for name, v in values.items() if name.endswith(f".{kind}")}
        named = {name: v for name, v in named.items() if v}
        if not named:
            continue
        order = sorted(named, key=lambda name: int(name.split(".")[1]))
        most = max(max(v) for v in named.values()) or 1.0
        table, says = [], dark
        for name in order:
            row = named[name]
            if kind == "neurons":  # too many for a cell each: sorted, and shown as quantiles
                row = [float(q) for q in np.quantile(row, np.linspace(0, 1, columns))]
                says = f"each layer's neurons from the least to the most important, as quantiles; {dark}"
            table.append([_shade(v, most) for v in row])
        width = max(len(row) for row in table)
        full: Rows = [[*row, *[None] * (width - len(row))] for row in table]
        yield kind.capitalize(), [f"L{name.split('.')[1]}" for name in order], full, says
    for key, per_layer in (("layers", 1), ("sublayers", 2)):
        if key in values:
            found = words.numbers(values[key])
            most = max(found) or 1.0
            rows: Rows = [[v / most for v in found[i : i + per_layer]] for i in range(0, len(found), per_layer)]
            says = dark if per_layer == 1 else f"attention, FFN; {dark}"
            yield key.capitalize(), [f"L{i}" for i in range(len(rows))], rows, says


def _shade(value: float, most: float) -> float:
    return float(np.sqrt(max(value, 0.0) / most))


def _drops(facts: Facts, rows: Sequence[Facts]) -> Iterator[tuple[str, list[str], Rows, str]]:
    metric = facts.get("quality_metric")
    for unit in dict.fromkeys(str(row["unit"]) for row in rows):
        own = [row for row in rows if row["unit"] == unit]
        most = max(max(row["drop"]["value"] for row in own), 0.0) or 1.0
        fractions = sorted({row["fraction"] for row in own})
        layers = list(dict.fromkeys(row["layer"] for row in own))  # in the order in which they run
        shades = [_shade(row["drop"]["value"], most) for row in own]
        lost = {(row["layer"], row["fraction"]): shade for row, shade in zip(own, shades, strict=True)}
        table: Rows = [[lost.get((layer, fraction)) for fraction in fractions] for layer in layers]
        shares = ", ".join(f"{fraction:.0%}" for fraction in fractions)
        says = f"{shares} gone of that layer alone; darkest: {words.drop(metric, most)} lost"
        yield heading(unit), list(layer_names(layers).values()), table, says


def picture(name: str, labels: Sequence[str], rows: Rows) -> str:
    """One heat map as inline SVG."""
    left = max([LEFT, *(draw.text_width(label) + 12 for label in labels)])
    cell = min(40.0, (WIDTH - left) / max(len(rows[0]), 1))
    body = []
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        body.append(draw.text(left - 8, i * ROW + ROW / 2 + 4, label, anchor="end", css="tick"))
        for j, value in enumerate(row):
            if value is not None:
                shade = f"h{min(9, int(value * 9.999))}"
                body.append(draw.rect(left + j * cell, i * ROW + 1, cell - 1, ROW - 2, shade, title=f"{value:.3f}"))
    return draw.svg(WIDTH, len(rows) * ROW + 4, name, body)


def curves(facts: Facts) -> Iterator[tuple[str, str]]:
    """(name, SVG) for each kind of unit: the drop over the share that went, a line per criterion or per layer; of
    channels also over the share of the arithmetic, which equal shares of channels do not take alike.
    """
    rows = words.mappings(facts.get("rows"))
    key = "criterion" if any("criterion" in row for row in rows) else "layer"
    for unit in dict.fromkeys(str(row["unit"]) for row in rows):
        own = [row for row in rows if row["unit"] == unit]
        if len({row["fraction"] for row in own}) > 1:
            what = "the share that went" if key == "criterion" else "the share of one layer that went"
            yield f"{heading(unit)}: drop over {what}", _curve(facts, own, key, [row["fraction"] for row in own])
            if key == "criterion" and facts.get("macs_dense"):
                gone = [1 - row["macs"] / facts["macs_dense"] for row in own]
                yield f"{heading(unit)}: drop over the multiply-accumulates that went", _curve(facts, own, key, gone)


def _curve(facts: Facts, rows: Sequence[Facts], key: str, shares: Sequence[float]) -> str:
    metric = facts.get("quality_metric")
    lines: dict[str, list[tuple[float, Facts]]] = {}
    called = layer_names(row[key] for row in rows) if key == "layer" else {}
    for share, row in sorted(zip(shares, rows, strict=True), key=lambda pair: pair[0]):
        lines.setdefault(called.get(row[key], str(row[key])), []).append((share, row["drop"]))
    best = sorted(lines, key=lambda name: sum(drop["value"] for _, drop in lines[name]))
    strong = best
    if key == "criterion":
        strong = best[:STANDING_OUT]
    elif len(best) > MOST_NAMES:
        strong = [*best[:STANDING_OUT], *best[-STANDING_OUT:]]
    named = lines if key == "criterion" else {name: lines[name] for name in lines if name in strong}
    room = max(draw.text_width(name) for name in named) + 24
    top, bottom = 12.0, 320.0
    y = draw.Scale(*draw.padded([0.0, *(row["drop"]["value"] for row in rows)]), bottom, top)
    ticks = [words.drop(metric, value) for value in y.ticks(5)]
    frame = (max(72.0, *map(draw.text_width, ticks)) + 8, top, WIDTH - max(190.0, room), bottom)
    x = draw.Scale(*draw.padded(shares), frame[0], frame[2])
    body = draw.axes(x, y, frame, x_words=lambda v: f"{v:.0%}", y_words=lambda v: words.drop(metric, v))
    if key == "criterion" and best:
        band = [(x(share), drop) for share, drop in lines[best[0]]]
        points = [f"{at:.1f},{y(d['high']):.1f}" for at, d in band] + [
            f"{at:.1f},{y(d['low']):.1f}" for at, d in reversed(band)
        ]
        body.append(f'<polygon points="{" ".join(points)}" class="band"/>')
    for name, own in lines.items():
        css = _style(name, strong)
        points = [f"{x(share):.1f},{y(drop['value']):.1f}" for share, drop in own]
        said = html.escape(name)
        body.append(f'<polyline points="{" ".join(points)}" class="series {css}"><title>{said}</title></polyline>')
    heights = draw.spread([y(own[-1][1]["value"]) for own in named.values()], gap=14, low=frame[1] + 4, high=frame[3])
    for (name, own), height in zip(named.items(), heights, strict=True):
        css = _style(name, strong)
        share, drop = own[-1]
        body.append(draw.line(x(share), y(drop["value"]), frame[2] + 8, height, "leader"))
        body.append(draw.text(frame[2] + 12, height + 4, name, css=f"name {css}"))
    return draw.svg(WIDTH, 350, "Drop of quality over the share removed", body)


def _style(name: str, strong: Sequence[str]) -> str:
    if name == "random":
        return "random"
    return f"s{strong.index(name) % 6}" if name in strong else "rest"
