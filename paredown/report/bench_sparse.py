"""Where sparsity begins to pay, for the terminal and as a page: a curve per engine over the sparsity, and a table.

`facts` is the fact sheet of `paredown.pipeline.bench_sparse`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paredown.report import _svg as draw
from paredown.report import study, words

Facts = Mapping[str, Any]

HEAD = ("matrix", "engine", "zeros", "ms", "times dense [95 %]", "GFLOP/s", "as if dense", "of the peak")
WIDTH, BOTTOM = 860.0, 300.0


def write(facts: Facts, path: Path) -> Path:
    """The page, written whole or not at all."""
    return study.write_page(view(facts), path)


def table(facts: Facts) -> RenderableType:
    """All figures, and a sentence for every size and engine."""
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, title in enumerate(HEAD):
        grid.add_column(Text(title), justify="left" if i < 2 else "right", no_wrap=True)
    before: list[str] = ["", ""]
    for row in cells(facts):
        matrix, engine = ("" if row[0] == before[0] else row[0]), ("" if row[:2] == before else row[1])
        grid.add_row(*(Text(cell) for cell in (matrix, engine, *row[2:])))
        before = row[:2]
    return Group(Text(about(facts), style="bold"), grid, *(Text(one) for one in sentences(facts)))


def view(facts: Facts) -> dict[str, Any]:
    """What the page shows: a picture per matrix, and every figure."""
    from markupsafe import Markup

    sizes = dict.fromkeys((row["inputs"], row["outputs"]) for row in words.mappings(facts["rows"]))
    said = "Above 1 is faster than torch's dense product; the intervals are in the table."
    sections = [(_name(k, o), said, Markup(curve(facts, k, o))) for k, o in sizes]
    return {
        "title": "Where sparsity begins to pay",
        "about": about(facts),
        "order": " ".join(sentences(facts)),
        "sections": sections,
        "head": list(HEAD),
        "rows": cells(facts),
        "notes": [],
        "machine": study.machine(facts),
    }


def about(facts: Facts) -> str:
    """What was timed, and on what."""
    parts = [f"{facts['tokens']} tokens"]
    if facts.get("level"):
        peak = words.figure(facts.get("peak_gflops"))
        parts += [f"{facts['threads']} threads", f"{facts['level']} kernels", f"measured peak {peak} GFLOP/s"]
    parts += ["on a GPU, float16"] if facts.get("device") == "cuda" else []
    return ", ".join(parts)


def cells(facts: Facts) -> list[list[str]]:
    """A row per matrix, engine and sparsity, in words."""
    found = []
    for row in words.mappings(facts["rows"]):
        share = words.finite(row.get("share_of_peak"))
        found.append(
            [
                _name(row["inputs"], row["outputs"]),
                str(row["engine"]),
                words.percent(row["sparsity"]),
                f"{row['milliseconds']:.3g}",
                _interval(row["speedup"]),
                words.figure(row["gflops"]),
                words.figure(row["dense_gflops"]),
                "" if share is None else f"{share:.0%}",
            ]
        )
    return found


def sentences(facts: Facts) -> list[str]:
    """Of every matrix and engine, from which sparsity on it is faster than dense, or that it never is."""
    found = []
    for one in words.mappings(facts.get("breaks_even")):
        name, least = f"{_name(one['inputs'], one['outputs'])}: {one['engine']}", words.finite(one.get("sparsity"))
        if least is None:
            found.append(f"{name} is slower than dense at every sparsity tried.")
        else:
            found.append(f"{name} is faster than dense from {words.percent(least)} zeros on.")
    return found


def curve(facts: Facts, inputs: int, outputs: int) -> str:
    """Times dense over the share of zeros, a line per engine, as inline SVG."""
    rows = [row for row in words.mappings(facts["rows"]) if (row["inputs"], row["outputs"]) == (inputs, outputs)]
    lines: dict[str, list[Facts]] = {}
    for row in sorted(rows, key=lambda row: float(row["sparsity"])):
        lines.setdefault(str(row["engine"]), []).append(row)
    lines.pop("torch dense", None)
    frame = (64.0, 12.0, WIDTH - 190, BOTTOM)
    values = [_value(row) for own in lines.values() for row in own]
    x = draw.Scale(*draw.padded([float(row["sparsity"]) for row in rows]), frame[0], frame[2])
    y = draw.Scale(*draw.padded([1.0, *values], log=True), frame[3], frame[1], log=True)
    body = draw.axes(x, y, frame, x_words=lambda v: f"{v:.0%}", y_words=lambda v: f"{v:g}×")
    body.append(draw.line(frame[0], y(1.0), frame[2], y(1.0), "gate"))
    body.append(draw.text(frame[0] + 4, y(1.0) - 5, "dense", css="gate-label"))
    ends = [y(_value(own[-1])) for own in lines.values()]
    heights = draw.spread(ends, gap=14, low=frame[1] + 4, high=frame[3])
    for number, ((name, own), height) in enumerate(zip(lines.items(), heights, strict=True)):
        found = [(x(float(row["sparsity"])), _value(row)) for row in own]
        points = " ".join(f"{at:.1f},{y(one):.1f}" for at, one in found)
        css = f"s{number % 6}"
        body.append(f'<polyline points="{points}" class="series {css}"><title>{name}</title></polyline>')
        for at, one in found:
            body.append(draw.marker(at, y(one), "circle", f"mark {css}", radius=3, title=f"{one:.2f}×"))
        body.append(draw.line(found[-1][0], y(found[-1][1]), frame[2] + 8, height, "leader"))
        body.append(draw.text(frame[2] + 12, height + 4, name, css=f"name {css}"))
    return draw.svg(WIDTH, BOTTOM + 30, f"Times dense over sparsity, {_name(inputs, outputs)}", body)


def _value(row: Facts) -> float:
    return float(words.mapping(row["speedup"])["value"])


def _interval(found: object) -> str:
    value, low, high = (float(words.mapping(found)[key]) for key in ("value", "low", "high"))
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def _name(inputs: object, outputs: object) -> str:
    return f"{inputs} to {outputs}"
