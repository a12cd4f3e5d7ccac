"""Heat maps and curves of a study. Values in a map run from 0 (least) to 1 (most); None is an empty cell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from paredown.report import _svg as draw
from paredown.report import words

Facts = Mapping[str, Any]
Rows = list[list[float | None]]

WIDTH, ROW, LEFT = 860.0, 22.0, 60.0
STANDING_OUT = 5  # curves with a colour of their own; the others are grey


def heading(unit: str) -> str:
    """The name of a kind of unit at the beginning of a line."""
    return unit.upper() if unit == "ffn" else unit.capitalize()


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
            table.append([float(np.sqrt(max(v, 0.0) / most)) for v in row])
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


def _drops(facts: Facts, rows: Sequence[Facts]) -> Iterator[tuple[str, list[str], Rows, str]]:
    metric = facts.get("quality_metric")
    for unit in dict.fromkeys(str(row["unit"]) for row in rows):
        own = [row for row in rows if row["unit"] == unit]
        most = max(max(row["drop"]["value"] for row in own), 0.0) or 1.0
        fractions = sorted({row["fraction"] for row in own})
        layers = sorted({row["layer"] for row in own})
        shades = [float(np.sqrt(max(row["drop"]["value"], 0.0) / most)) for row in own]
        lost = {(row["layer"], row["fraction"]): shade for row, shade in zip(own, shades, strict=True)}
        table: Rows = [[lost.get((layer, fraction)) for fraction in fractions] for layer in layers]
        shares = ", ".join(f"{fraction:.0%}" for fraction in fractions)
        says = f"{shares} gone of that layer alone; darkest: {words.drop(metric, most)} lost"
        yield heading(unit), [f"L{layer}" for layer in layers], table, says


def picture(name: str, labels: Sequence[str], rows: Rows) -> str:
    """One heat map as inline SVG."""
    cell = min(40.0, (WIDTH - LEFT) / max(len(rows[0]), 1))
    body = []
    for i, (label, row) in enumerate(zip(labels, rows, strict=True)):
        body.append(draw.text(LEFT - 8, i * ROW + ROW / 2 + 4, label, anchor="end", css="tick"))
        for j, value in enumerate(row):
            if value is not None:
                shade = f"h{min(9, int(value * 9.999))}"
                body.append(draw.rect(LEFT + j * cell, i * ROW + 1, cell - 1, ROW - 2, shade, title=f"{value:.3f}"))
    return draw.svg(WIDTH, len(rows) * ROW + 4, name, body)


def curves(facts: Facts) -> Iterator[tuple[str, str]]:
    """(name, SVG) for each kind of unit: the drop over the share that went, a line per criterion or per layer."""
    rows = words.mappings(facts.get("rows"))
    key = "criterion" if any("criterion" in row for row in rows) else "layer"
    for unit in dict.fromkeys(str(row["unit"]) for row in rows):
        own = [row for row in rows if row["unit"] == unit]
        if len({row["fraction"] for row in own}) > 1:
            what = "the share that went" if key == "criterion" else "the share of one layer that went"
            yield f"{heading(unit)}: drop over {what}", _curve(facts, own, key)


def _curve(facts: Facts, rows: Sequence[Facts], key: str) -> str:
    metric = facts.get("quality_metric")
    lines: dict[str, list[Facts]] = {}
    for row in sorted(rows, key=lambda row: float(row["fraction"])):
        name = f"L{row[key]}" if key == "layer" else str(row[key])
        lines.setdefault(name, []).append(row)
    best = sorted(lines, key=lambda name: sum(row["drop"]["value"] for row in lines[name]))
    strong = best[:STANDING_OUT] if key == "criterion" else best
    frame = (72.0, 12.0, WIDTH - 190, 320.0)
    drops = [row["drop"]["value"] for row in rows]
    x = draw.Scale(*draw.padded([float(row["fraction"]) for row in rows]), frame[0], frame[2])
    y = draw.Scale(*draw.padded([0.0, *drops]), frame[3], frame[1])
    body = draw.axes(x, y, frame, x_words=lambda v: f"{v:.0%}", y_words=lambda v: words.drop(metric, v))
    if key == "criterion" and best:
        band = [(x(row["fraction"]), row["drop"]) for row in lines[best[0]]]
        points = [f"{at:.1f},{y(d['high']):.1f}" for at, d in band] + [
            f"{at:.1f},{y(d['low']):.1f}" for at, d in reversed(band)
        ]
        body.append(f'<polygon points="{" ".join(points)}" class="band"/>')
    ends = [lines[name][-1]["drop"]["value"] for name in lines]
    heights = draw.spread([y(v) for v in ends], gap=14, low=frame[1] + 4, high=frame[3])
    for (name, own), height in zip(lines.items(), heights, strict=True):
        css = f"s{strong.index(name) % 6}" if name in strong else "rest"
        css = "random" if name == "random" else css
        points = [f"{x(row['fraction']):.1f},{y(row['drop']['value']):.1f}" for row in own]
        body.append(f'<polyline points="{" ".join(points)}" class="series {css}"><title>{name}</title></polyline>')
        body.append(draw.line(x(own[-1]["fraction"]), y(own[-1]["drop"]["value"]), frame[2] + 8, height, "leader"))
        body.append(draw.text(frame[2] + 12, height + 4, name, css=f"name {css}"))
    return draw.svg(WIDTH, 350, "Drop of quality over the share removed", body)
