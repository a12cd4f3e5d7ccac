"""Inline SVG by hand: scales, a few elements, and labels that do not overlap. Lengths are CSS pixels."""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Box = tuple[float, float, float, float]  # left, top, right, bottom

LINE_HEIGHT = 14.0  # of the 12-pixel labels


@dataclass(frozen=True)
class Scale:
    """Data to pixels, linear or logarithmic: `low` lands on `start`, `high` on `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values inside the scale: 1, 2, 5 times a power of ten. At most about `count` of them."""
        if not self.log:
            return _linear_ticks(self.low, self.high, count)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        found: list[float] = []
        for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), range(1, 10)):
            inside = [d * 10.0**p for p in powers for d in digits if self.low <= d * 10.0**p <= self.high]
            if len(inside) <= count:
                found = inside
        if len(found) >= 2:
            return found
        return [tick for tick in _linear_ticks(self.low, self.high, count) if tick > 0]


def _linear_ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * d for d in (1, 2, 2.5, 5, 10) if power * d >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]


def padded(values: Sequence[float], *, log: bool = False, share: float = 0.06) -> tuple[float, float]:
    """The range of the values with a margin, never empty."""
    low, high = min(values), max(values)
    if log:
        margin = (high / low) ** share if high > low else 1.5
        return low / margin, high * margin
    margin = (high - low) * share or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def axes(
    x: Scale | None,
    y: Scale,
    frame: Box,
    *,
    x_words: Callable[[float], str] | None,
    y_words: Callable[[float], str],
    y_count: int = 5,
) -> list[str]:
    """Grid lines and labelled ticks; without `x` or its words the lower axis is a bare line."""
    left, _, right, bottom = frame
    body: list[str] = []
    for tick in y.ticks(y_count):
        body.append(line(left, y(tick), right, y(tick), "grid"))
        body.append(text(left - 6, y(tick) + 4, y_words(tick), anchor="end", css="tick"))
    body.append(line(left, bottom, right, bottom, "axis-line"))
    before = -math.inf
    for tick in x.ticks(7 if right - left > 420 else 5) if x else ():
        if x and x_words and x(tick) - before >= 34:  # nearer, the numbers would touch
            before = x(tick)
            body.append(line(before, bottom, before, bottom + 4, "axis-line"))
            body.append(text(before, bottom + 17, x_words(tick), anchor="middle", css="tick"))
    return body


def svg(width: float, height: float, label: str, body: Sequence[str]) -> str:
    """One <svg> element that scales with the page; `label` is what a screen reader says."""
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" style="max-width:{width:g}px" role="img" '
        f'aria-label="{html.escape(label)}">{"".join(body)}</svg>'
    )


def text(x: float, y: float, words: str, *, anchor: str = "start", css: str = "") -> str:
    """A line of text whose baseline is at y."""
    name = f' class="{css}"' if css else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}>{html.escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{css}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, *, title: str = "") -> str:
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{max(height, 0):.1f}" rx="1.5" '
        f'class="{css}">{inner}</rect>'
    )


def marker(x: float, y: float, shape: str, css: str, *, radius: float = 5.5, title: str = "") -> str:
    """A circle, diamond, square or triangle about (x, y)."""
    inner = f"<title>{html.escape(title)}</title>" if title else ""
    if shape == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" class="{css}">{inner}</circle>'
    sides, turn, grow = {"diamond": (4, 0.0, 1.25), "square": (4, 45.0, 1.3), "triangle": (3, -90.0, 1.3)}[shape]
    angles = [math.radians(turn + 360 * i / sides) for i in range(sides)]
    points = " ".join(f"{x + grow * radius * math.cos(a):.1f},{y + grow * radius * math.sin(a):.1f}" for a in angles)
    return f'<polygon points="{points}" class="{css}">{inner}</polygon>'


def text_width(words: str, *, size: float = 12.0) -> float:
    """About how wide a text is drawn: on the generous side, because the reader's font is not known."""
    wide = sum(unicodedata.east_asian_width(character) in "WF" for character in words)
    return size * (0.58 * (len(words) - wide) + 1.05 * wide)


def shortened(words: str, length: int) -> str:
    return words if len(words) <= length else words[: length - 1].rstrip() + "…"


@dataclass(frozen=True)
class Label:
    """A placed label: its box, and whether it is far enough from its point to need a leader line."""

    words: str
    box: Box
    far: bool


def place(
    points: Sequence[tuple[float, float, str, str]], *, frame: Box, solid: Sequence[Box], soft: Sequence[Box]
) -> list[Label | None]:
    """A label for each point (x, y, words, short words), inside `frame`, none over another or over a `solid` box.

    Greedy, in the order given: of rings of positions about the point, the one that covers least of the `soft`
    boxes and lies nearest. Where the words fit nowhere the short words are tried, then None is given.
    """
    placed: list[Box] = []
    labels: list[Label | None] = []
    for index, (x, y, *both) in enumerate(points):
        others = [(p[0], p[1]) for i, p in enumerate(points) if i != index]
        taken = [*solid, *placed]
        spots = (_spot((x, y), words, frame=frame, solid=taken, soft=soft, others=others) for words in both)
        found = next((spot for spot in spots if spot), None)
        labels.append(found)
        if found:
            left, top, right, bottom = found.box
            placed.append((left - 3, top, right + 3, bottom))  # two numbers side by side must not read as one
    return labels


def _spot(
    point: tuple[float, float],
    words: str,
    *,
    frame: Box,
    solid: Sequence[Box],
    soft: Sequence[Box],
    others: Sequence[tuple[float, float]],
) -> Label | None:
    x, y = point
    width, best, lowest = text_width(words), None, math.inf
    for distance in (10, 14, 20, 28, 38, 50, 64, 80):
        for turn in range(16):
            cosine, sine = math.cos(math.pi * turn / 8), math.sin(math.pi * turn / 8)
            # The label's own extent counts, so that "left of the point" ends there rather than starts there.
            centre_x = x + cosine * (distance + width / 2)
            centre_y = y + sine * (distance + LINE_HEIGHT / 2)
            box = (centre_x - width / 2, centre_y - LINE_HEIGHT / 2, centre_x + width / 2, centre_y + LINE_HEIGHT / 2)
            outside = box[0] < frame[0] or box[1] < frame[1] or box[2] > frame[2] or box[3] > frame[3]
            if outside or any(overlap(box, other) > 0 for other in solid):
                continue
            own = _gap(box, x, y)
            nearer = sum(_gap(box, *other) <= own + 3 for other in others)  # it would be read as that point's label
            cost = distance + 30 * nearer + 0.35 * sum(overlap(box, other) for other in soft) + 3 * abs(sine)
            if cost < lowest:
                best, lowest = Label(words, box, own > 20), cost
    return best


def _gap(box: Box, x: float, y: float) -> float:
    """How far a point lies from a box."""
    return math.hypot(max(box[0] - x, 0, x - box[2]), max(box[1] - y, 0, y - box[3]))


def overlap(a: Box, b: Box) -> float:
    """The area that two boxes share."""
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def spread(wanted: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Positions near the wanted ones, at least `gap` apart where there is room, from `low` to `high`."""
    if len(wanted) > 1:
        gap = min(gap, (high - low) / (len(wanted) - 1))
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    found = [0.0] * len(wanted)
    at = low - gap
    for i in order:
        at = found[i] = max(wanted[i], at + gap, low)
    at = high + gap
    for i in reversed(order):
        at = found[i] = min(found[i], at - gap)
    return found
