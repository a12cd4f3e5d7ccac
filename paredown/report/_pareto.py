"""The plot of quality against speed, with every candidate and the gate. See `_charts` for the other pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from paredown.report import _svg as draw
from paredown.report import words

SHAPES = {
    "dense": "circle",
    "dense-int8": "diamond",
    "pruned": "circle",
    "pruned-int8": "diamond",
    "layer-drop": "square",
    "layer-drop-int8": "diamond",
    "folded": "circle",
    "tokens": "circle",
    "tokens-int8": "diamond",
    "tfidf": "triangle",
}


@dataclass(frozen=True)
class _Point:
    """A candidate that was measured. `low`, `high` and `bound` are drops; any of them may be unknown."""

    number: int
    name: str
    title: str
    shape: str
    state: str
    chosen: bool
    rate: float
    quality: float
    low: float | None
    high: float | None
    bound: float | None


def pareto(result: Mapping[str, Any], width: float) -> str:
    """Quality on the guardrail split against texts, or pictures, per second, with the gate line, as an inline SVG.

    Wide, each point carries its name; narrow, its number in the table of candidates. A whisker is the 95 % interval
    of the drop hung on the dense model's quality; the bar across it is the bound that the gate compares.
    """
    points = _points(result)
    if not points:
        return ""
    metric, most, dense = result.get("quality_metric"), words.max_drop(result), dense_quality(result)
    gate = None if dense is None or most is None else dense - most
    floor = _floor(points, dense, most)
    below = [p for p in points if floor is not None and p.quality < floor]
    narrow = width < 500
    height = 340.0 if narrow else 420.0
    left, top, right, bottom = 58.0, 14.0, width - 12, height - 46
    x = draw.Scale(*draw.padded([p.rate for p in points], log=True, share=0.14), left, right, log=True)
    y = draw.Scale(*_levels(points, dense, gate, floor), bottom - (30 if below else 0), top)

    body = draw.axes(x, y, (left, top, right, bottom), x_words=lambda v: f"{v:,g}", y_words=lambda v: level(metric, v))
    items = words.items(result)
    said = f"{items} per second (log scale; faster to the right)"
    body.append(draw.text((left + right) / 2, height - 8, said, anchor="middle", css="axis"))
    solid: list[draw.Box] = []  # what a label may not cover
    soft: list[draw.Box] = []  # what it had better not cover
    if dense is not None:
        body.append(draw.line(left, y(dense), right, y(dense), "dense-line"))
        said = f"dense {level(metric, dense)}"
        body.append(draw.text(right - 4, y(dense) - 5, said, anchor="end", css="dense-label"))
        solid.append((right - draw.text_width(said) - 6, y(dense) - 18, right, y(dense) - 1))
        soft.append((left, y(dense) - 3, right, y(dense) + 3))
    if gate is not None:
        body.insert(0, draw.rect(left, y(gate), right - left, bottom - y(gate), "below-gate"))
        body.append(draw.line(left, y(gate), right, y(gate), "gate"))
        said = f"gate {level(metric, gate)}" + ("" if narrow else f": dense − {words.budget(metric, most)}")
        body.append(draw.text(right - 4, y(gate) + 15, said, anchor="end", css="gate-label"))
        solid.append((right - draw.text_width(said) - 6, y(gate) + 2, right, y(gate) + 19))
        soft.append((left, y(gate) - 3, right, y(gate) + 3))

    marks: list[str] = []
    tags: list[tuple[float, float, str, str]] = []
    ordered = sorted(points, key=lambda p: not p.chosen)  # the chosen one picks the place of its label first
    for p in ordered:
        px, py = x(p.rate), y(p.quality)
        if p in below:
            py = bottom - 20
            body.append(draw.text(px, bottom - 3, "↓", anchor="middle", css=f"arrow {p.state}"))
        elif dense is not None and p.low is not None and p.high is not None:
            up, down = max(y(dense - p.low), top), min(y(dense - p.high), bottom)
            body.append(draw.line(px, up, px, down, f"whisker {p.state}"))
            soft.append((px - 3, up, px + 3, down))
            if p.bound is not None and y(dense - p.bound) <= bottom:
                body.append(draw.line(px - 6, y(dense - p.bound), px + 6, y(dense - p.bound), f"bound {p.state}"))
                soft.append((px - 7, y(dense - p.bound) - 3, px + 7, y(dense - p.bound) + 3))
        reach = 15 if p.chosen else 7
        if p.chosen:
            marks.append(draw.marker(px, py, "circle", f"ring {p.state}", radius=11))
        marks.append(draw.marker(px, py, p.shape, f"mark {p.state}", title=p.title))
        solid.append((px - reach, py - reach, px + reach, py + reach))
        name = draw.shortened(p.name, 34) + (f" ({level(metric, p.quality)})" if p in below else "")
        tags.append((px, py, str(p.number) if narrow else name, str(p.number)))

    places = draw.place(tags, frame=(left + 2, top - 8, right, bottom), solid=solid, soft=soft)
    for p, (px, py, _, _), label in zip(ordered, tags, places, strict=True):
        if label is None:
            continue
        start, upper, end, lower = label.box
        if label.far:
            nearest = min(max(px, start), end), min(max(py, upper + 2), lower - 2)
            body.append(draw.line(px, py, *nearest, "leader"))
        css = f"label {p.state}{' strong' if p.chosen else ''}"
        marks.append(draw.text((start + end) / 2, lower - 3.5, label.words, anchor="middle", css=css))
    return draw.svg(width, height, f"Quality against {items} per second, every candidate", [*body, *marks])


def unplotted(result: Mapping[str, Any]) -> int:
    """How many candidates lack a measured speed or quality, and so a place in the plot."""
    return len(words.mappings(result.get("candidates"))) - len(_points(result))


def dense_quality(result: Mapping[str, Any]) -> float | None:
    """The dense model's quality on the guardrail split; that on the test split when the first is not known."""
    found = [
        words.finite(c.get("quality")) for c in words.mappings(result.get("candidates")) if c.get("kind") == "dense"
    ]
    return next((q for q in found if q is not None), words.finite(result.get("quality_dense")))


def level(metric: object, value: float) -> str:
    """A quality on an axis: short, yet exact enough to tell ticks apart."""
    return f"{100 * value:.4g} %" if words.is_share(metric) else f"{value:.4g}"


def _points(result: Mapping[str, Any]) -> list[_Point]:
    found = []
    for number, c in enumerate(words.mappings(result.get("candidates")), 1):
        rate, quality = words.finite(c.get("texts_per_second")), words.finite(c.get("quality"))
        if rate is None or rate <= 0 or quality is None:
            continue
        name, lost = str(c.get("name") or f"candidate {number}"), words.mapping(c.get("drop"))
        shown = words.quality(result.get("quality_metric"), quality)
        title = f"{name}: {words.figure(rate)} {words.items(result)}/s, {shown}, {words.reason(result, c)}"
        low, high = words.finite(lost.get("low")), words.finite(lost.get("high"))
        if c.get("kind") == "dense":
            low = high = None  # the reference has no drop of its own
        found.append(
            _Point(
                number, name, title, SHAPES.get(str(c.get("kind")), "circle"), words.status(c), bool(c.get("chosen")),
                rate, quality, low, high, words.finite(c.get("bound")),
            )
        )  # fmt: skip
    return found


def _floor(points: Sequence[_Point], dense: float | None, most: float | None) -> float | None:
    """Below this quality a point sits on the lower edge, so that the scale serves those that are near the gate.

    Never more than half of the points do.
    """
    if dense is None or most is None or most <= 0:
        return None
    drops = [dense - p.quality for p in points]
    return dense - max(3.5 * most, 1.2 * statistics.median(drops))


def _levels(
    points: Sequence[_Point], dense: float | None, gate: float | None, floor: float | None
) -> tuple[float, float]:
    """The range of the quality axis: points, whiskers, the gate and the dense model."""
    inside = [p for p in points if floor is None or p.quality >= floor]
    values = [p.quality for p in inside] + [v for v in (gate, dense) if v is not None]
    if dense is not None:
        ends = [dense - end for p in inside for end in (p.low, p.high) if end is not None]
        values += [end if floor is None else max(end, floor) for end in ends]
    return draw.padded(values or [floor or 0.0])
