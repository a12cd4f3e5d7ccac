"""The pictures of the page: each function gives one inline SVG for a page `width` in pixels, or "" without data.

Colours and fonts live in the page's style sheet; here are only class names, so that screen and print can differ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from markupsafe import Markup

from paredown.report import _svg as draw
from paredown.report import words

Facts = Mapping[str, Any]

WIDE, NARROW = 860.0, 360.0  # pixels: every picture is drawn for a desktop page and again for a phone
MOST_ROWS = 240  # of groups of channels: at 4 pixels each they fill a screen


def pictures(chart: Callable[[Facts, float], str], result: Facts) -> tuple[Any, Any] | None:
    """The picture for a desktop page and the one for a phone, both safe for the template; None without data."""
    # The charts escape every text themselves; nothing else of the page bypasses the template's escaping.
    wide = chart(result, WIDE)
    return (Markup(wide), Markup(chart(result, NARROW))) if wide else None


def kept(result: Facts, width: float) -> str:
    """One row per dense layer: its heads as cells (filled: kept), its FFN neurons as a bar; dropped layers empty."""
    anatomy = words.mapping(result.get("anatomy"))
    layers, heads, neurons = (words.whole(anatomy.get(name)) for name in ("layers", "heads", "neurons"))
    stays = {
        layer: row for row in words.mappings(result.get("kept")) if (layer := words.whole(row.get("layer"))) is not None
    }
    if not layers or heads is None or neurons is None or not stays:
        return ""
    narrow = width < 500
    left, gap, end = (30.0, 14.0, 40.0) if narrow else (44.0, 20.0, 96.0)
    cell = min(20.0, (width * (0.5 if narrow else 0.46) - left) / max(heads, 1))
    row, top = max(min(cell + 4, 24.0), 15.0), 24.0
    bar = left + cell * heads + gap
    full = width - bar - end
    body = [
        draw.text(left, 13, "attention heads", css="axis"),
        draw.text(bar, 13, f"FFN neurons (of {words.count(neurons)})", css="axis"),
    ]
    for layer in range(layers):
        y, facts = top + layer * row, stays.get(layer)
        middle = y + row / 2 + 3.5
        body.append(draw.text(left - 8, middle, f"L{layer}", anchor="end", css="tick"))
        if facts is None:
            body += _gone(left, y, width - left - end, row, "whole layer dropped")
            continue
        keeps = {round(v) for v in words.numbers(facts.get("heads"))}
        side = min(cell, row) - (2 if narrow else 3)
        for head in range(heads) if keeps else ():
            css, said = ("cell", "kept") if head in keeps else ("cell gone", "dropped")
            at = f"layer {layer}, head {head}: {said}"
            body.append(draw.rect(left + head * cell + 1, y + (row - side) / 2, side, side, css, title=at))
        if not keeps and heads:
            body += _gone(left, y, cell * heads, row, "no attention" if narrow else "attention removed")
        wide = min(words.whole(facts.get("neurons")) or 0, neurons)
        if wide == 0:
            body += _gone(bar, y, full, row, "no FFN" if narrow else "FFN removed")
            continue
        at = f"layer {layer}: {wide} of {neurons} neurons"
        body.append(draw.rect(bar, y + 3, full, row - 6, "bar gone", title=at))
        body.append(draw.rect(bar, y + 3, full * wide / neurons, row - 6, "bar", title=at))
        said = words.count(wide) if narrow else f"{words.count(wide)} ({100 * wide / neurons:.0f} %)"
        body.append(draw.text(bar + full + 6, middle, said, css="tick"))
    return draw.svg(width, top + layers * row + 4, "Heads and neurons kept in every layer", body)


def _gone(x: float, y: float, width: float, height: float, said: str) -> list[str]:
    """A dashed outline with a word in it, where a whole sub-layer or layer was."""
    outline = draw.rect(x, y + 2, width, height - 4, "gone-layer")
    return [outline, draw.text(x + 8, y + height / 2 + 3.5, said, css="gone-label")]


def channel_rows(result: Facts) -> list[tuple[str, int, int]]:
    """Every group of channels: its name, its channels, and how many of them stay; none where its branch is gone."""
    found = []
    for row in words.mappings(result.get("channels")):
        channels, stay = words.whole(row.get("channels")), words.whole(row.get("kept"))
        if channels is not None and stay is not None and channels > 0:
            found.append((str(row.get("group") or words.UNKNOWN), channels, min(max(stay, 0), channels)))
    return found


def channels(result: Facts, width: float) -> str:
    """One row per group of channels, a bar of what is kept. Many rows are thin, and only some of them are named."""
    every = channel_rows(result)
    if not every:
        return ""
    narrow, rows = width < 500, every[:MOST_ROWS]
    row = 20.0 if len(rows) <= 24 else min(16.0, MOST_ROWS * 4.0 / len(rows))
    named = math.ceil(13 / row)  # one row of so many has room for words
    said = [
        f"{words.count(stay)} of {words.count(of)}" + ("" if narrow else f" ({100 * stay / of:.0f} %)")
        for _, of, stay in rows
    ]
    letters = min(max(len(name) for name, _, _ in rows), 15 if narrow else 30)
    left = draw.text_width("x" * letters, size=11.5) + 10
    full = width - left - max(draw.text_width(one, size=11.5) for one in said) - 8
    top, pad = 24.0, min(3.0, 0.15 * row)
    body = [draw.text(left, 13, "channels kept of each group", css="axis")]
    for number, ((name, of, stay), figures) in enumerate(zip(rows, said, strict=True)):
        y, high = top + number * row + pad, row - 2 * pad
        baseline = y + high / 2 + 3.5
        at = f"{name}: {stay} of {of} channels" if stay else f"{name}: branch removed"
        if number % named == 0:
            # The ends of names tell them apart.
            short = name if len(name) <= letters else "…" + name[1 - letters :].lstrip(".")
            body.append(draw.text(left - 8, baseline, short, anchor="end", css="tick"))
        if not stay:
            edge = pad if named > 1 else 1.0  # words are to fit into it
            body.append(draw.rect(left, y - pad + edge, full, row - 2 * edge, "gone-layer", title=at))
            if named == 1:
                body.append(draw.text(left + 8, baseline, "branch removed", css="gone-label"))
            continue
        body.append(draw.rect(left, y, full, high, "bar gone", title=at))
        body.append(draw.rect(left, y, full * stay / of, high, "bar", title=at))
        if number % named == 0:
            body.append(draw.text(left + full + 6, baseline, figures, css="tick"))
    bottom = top + len(rows) * row + 4
    if len(every) > len(rows):
        body.append(draw.text(left, bottom + 12, f"and {words.count(len(every) - len(rows))} groups more", css="axis"))
        bottom += 18
    return draw.svg(width, bottom, "Channels kept of every group", body)


def recovery(result: Facts, width: float) -> str:
    """How far a candidate is off on held-out items over minutes of recovery, one line per candidate: texts by the
    distance to the dense model, pictures by their loss.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in words.mappings(result.get("recovery")):
        minutes, distance = words.finite(point.get("minutes")), words.finite(point.get("distance"))
        if minutes is not None and distance is not None:
            lines.setdefault(str(point.get("candidate") or "candidate"), []).append((minutes, distance))
    if not lines:
        return ""
    narrow = width < 500
    distances = [d for points in lines.values() for _, d in points]
    minutes_all = [m for points in lines.values() for m, _ in points]
    log = min(distances) > 0 and max(distances) / min(distances) > 8
    names = {name: draw.shortened(name, 16 if narrow else 30) for name in lines}
    margin = max(draw.text_width(name, size=11) for name in names.values()) + 14
    height, left, top = 260.0, 52.0, 14.0
    right, bottom = width - margin, height - 46
    low, high = draw.padded(distances, log=log)
    x = draw.Scale(min(0.0, *minutes_all), (max(minutes_all) or 1.0) * 1.02, left, right)
    y = draw.Scale(low if log else max(low, min(0.0, min(distances))), high, bottom, top, log=log)
    body = draw.axes(x, y, (left, top, right, bottom), x_words=lambda v: f"{v:g}", y_words=lambda v: f"{v:.3g}")
    scale = " (log scale)" if log else ""
    pictured = words.items(result) == "pictures"
    measure, title = ("loss", "Loss") if pictured else ("distance", "Distance to the dense model")
    body.append(
        draw.text((left + right) / 2, height - 8, f"minutes; upwards: {measure}{scale}", anchor="middle", css="axis")
    )
    ends = draw.spread([y(sorted(p)[-1][1]) for p in lines.values()], gap=13, low=top + 4, high=bottom)
    for index, ((name, points), at) in enumerate(zip(lines.items(), ends, strict=True)):
        series = f"series s{index % 6}"
        points = sorted(points)
        path = " ".join(f"{x(m):.1f},{y(d):.1f}" for m, d in points)
        body.append(f'<polyline points="{path}" class="{series}"/>')
        if len(points) <= 30:
            body += [draw.marker(x(m), y(d), "circle", f"dot s{index % 6}", radius=2.2) for m, d in points]
        last = points[-1]
        body.append(draw.line(x(last[0]) + 3, y(last[1]), right + 6, at, "leader"))
        body.append(draw.text(right + 9, at + 4, names[name], css=f"label small s{index % 6}"))
    return draw.svg(width, height, f"{title} during recovery", body)


def lengths(result: Facts, width: float) -> str:
    """The token lengths of the user's texts as a histogram."""
    facts = words.mapping(result.get("lengths"))
    edges, counts = words.numbers(facts.get("edges")), words.numbers(facts.get("counts"))
    if len(edges) == len(counts) and len(edges) > 1:
        edges = [*edges, 2 * edges[-1] - edges[-2]]  # lower edges only: the last bin is as wide as the one before
    if not counts or len(edges) != len(counts) + 1 or max(counts) <= 0 or edges[-1] <= edges[0]:
        return ""
    height, left, top, right = 160.0, 48.0, 10.0, width - 10
    bottom, total, slot = height - 38, sum(counts), (width - 58.0) / len(counts)
    y = draw.Scale(0.0, 1.08 * max(counts), bottom, top)
    # Every bin gets the same width whatever its span, and its edges are labelled: bins of unequal span drawn to
    # scale would make the wide ones look fuller than they are.
    body = draw.axes(None, y, (left, top, right, bottom), x_words=None, y_words=words.count, y_count=3)
    for index, number in enumerate(counts):
        said = f"{edges[index]:g} to {edges[index + 1]:g} tokens: {words.count(number)} texts"
        said += f" ({100 * number / total:.1f} %)"
        at = left + index * slot
        body.append(draw.rect(at + 1, y(number), slot - 2, bottom - y(number), "bar", title=said))
    step = next(s for s in (1, 2, 4, 5, 8, 10, 20, 50, 100, 10**6) if s * slot >= 30)
    for index in range(0, len(edges), step):
        body.append(draw.text(left + index * slot, bottom + 17, f"{edges[index]:g}", anchor="middle", css="tick"))
    said = "tokens per text; upwards: number of texts"
    body.append(draw.text((left + right) / 2, height - 4, said, anchor="middle", css="axis"))
    return draw.svg(width, height, "Histogram of token lengths", body)


def glyph(shape: str, state: str) -> str:
    """A marker for the legend."""
    ring = draw.marker(8, 8, "circle", f"ring {state}", radius=7.5) if state == "chosen" else ""
    inner = ring + draw.marker(8, 8, shape, f"mark {state}", radius=4.2)
    return f'<svg class="glyph" viewBox="0 0 16 16" aria-hidden="true">{inner}</svg>'
