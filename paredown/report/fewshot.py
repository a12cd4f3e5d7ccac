"""What few-shot learning found, for the terminal and as a page: curves over shots, embedding time, a table.

`facts` is the fact sheet of `paredown.pipeline.fewshot`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paredown.report import _svg as draw
from paredown.report import study, terminal, words

Facts = Mapping[str, Any]

METRICS = ("accuracy", "weighted_f1")
WIDTH, ROW = 860.0, 30.0


def write(facts: Facts, path: Path) -> Path:
    """The page, written whole or not at all."""
    return study.write_page(view(facts), path)


def view(facts: Facts) -> dict[str, Any]:
    """What the page shows: a curve for each metric, the embedding time, and every figure."""
    from markupsafe import Markup

    head, rows = table_of(facts)
    said = "Mean over draws of shots; the bands are 95 % intervals over draws and test texts."
    name = {metric: words.metric_name(metric) for metric in METRICS}
    pictures = [(f"{name[m][0].upper()}{name[m][1:]} over shots", said, curve(facts, m)) for m in METRICS]
    pictures.append(("Embedding", _about_time(facts), bars(facts)))
    return {
        "title": "Few-shot intents",
        "about": about(facts),
        "order": compared_with(facts),
        "sections": [(title, text, Markup(picture)) for title, text, picture in pictures if picture],
        "head": head,
        "rows": rows,
        "notes": [str(note) for note in facts.get("notes") or ()],
        "machine": study.machine(facts),
    }


def table(facts: Facts) -> RenderableType:
    """The table of accuracy and weighted F1, that of texts per second, and what was said on the way."""
    head, rows = table_of(facts)
    grid = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for i, title in enumerate(head):
        grid.add_column(Text(title), justify="left" if i == 1 else "right", no_wrap=i > 1, overflow="fold")
    before = ""
    for row in rows:
        grid.add_row(*(Text(cell) for cell in (["" if row[0] == before else row[0], *row[1:]])))
        before = row[0]
    timing = words.mapping(facts.get("timing"))
    parts: list[RenderableType] = [Text(about(facts), style="dim"), Text(""), grid]
    parts += [Text(said, style="dim") for said in [compared_with(facts)] if said]
    parts.append(Text(""))
    parts.append(terminal.bench_table(words.mappings(timing.get("rows")), against=timing.get("against")))
    parts += [Text(str(note), style="dim") for note in facts.get("notes") or ()]
    return Group(*parts)


def table_of(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Heading and cells, a row per number of shots and model; the differences only where models are compared."""
    rows = words.mappings(facts.get("rows"))
    compared = any(row.get("difference") for row in rows)
    head = ["shots", "model", *(f"{words.metric_name(metric)}, %" for metric in METRICS)]
    head += [f"Δ {words.metric_name(metric)}" for metric in METRICS] if compared else []
    cells = []
    for row in rows:
        difference = words.mapping(row.get("difference"))
        apart = [_cell(metric, difference.get(metric)) for metric in METRICS] if compared else []
        cells.append(
            [str(row["shots"]), str(row["model"]), *(_cell(metric, row[metric]) for metric in METRICS), *apart]
        )
    return head, cells


def compared_with(facts: Facts) -> str:
    """What the differences in the table are; empty where there are none."""
    rows = words.mappings(facts.get("rows"))
    if not any(row.get("difference") for row in rows):
        return ""
    return f"Δ is in points, against {rows[0]['model']} on the same draws and texts; all intervals are at 95 %."


def _cell(metric: str, found: object) -> str:
    ends = words.drop_interval(metric, found).replace(" to ", ", ")  # four of these must fit beside a name
    value = words.mapping(found).get("value")
    return f"{words.drop(metric, value, unit=False)} [{ends}]" if ends else ""


def about(facts: Facts) -> str:
    """What was done, in a line."""
    said = [str(facts.get("data"))]
    said += [f"tested on {facts['eval']}"] if facts.get("eval") else []
    said += [f"{words.count(facts.get('classes'))} labels", f"{words.count(facts.get('pool'))} texts to draw from"]
    said += [f"{words.count(facts.get('samples'))} test texts", f"{words.count(facts.get('seeds'))} draws"]
    return ", ".join(said)


def _about_time(facts: Facts) -> str:
    timing = words.mapping(facts.get("timing"))
    said = f"Texts per second, {words.count(timing.get('texts'))} texts in batches of similar length, measured in turn"
    return said + (f"; factors are against {timing['against']}." if timing.get("against") else ".")


def curve(facts: Facts, metric: str) -> str:
    """The metric over the number of shots, a line with its band for each model; empty for one number of shots."""
    rows = words.mappings(facts.get("rows"))
    lines: dict[str, list[Facts]] = {}
    for row in rows:
        lines.setdefault(str(row["model"]), []).append(row)
    shots = sorted({int(row["shots"]) for row in rows})
    if len(shots) < 2:
        return ""
    names = {name: draw.shortened(name, 24) for name in lines}
    margin = max(draw.text_width(name) for name in names.values()) + 20
    frame = (64.0, 12.0, WIDTH - margin, 320.0)
    bounds = [float(row[metric][key]) for row in rows for key in ("low", "high", "value")]
    x = draw.Scale(*draw.padded([float(k) for k in shots], log=True), frame[0], frame[2], log=True)
    y = draw.Scale(*draw.padded(bounds), frame[3], frame[1])
    body = draw.axes(None, y, frame, x_words=None, y_words=lambda v: f"{100 * v:g} %")
    for k in shots:
        body.append(draw.line(x(k), frame[3], x(k), frame[3] + 4, "axis-line"))
        body.append(draw.text(x(k), frame[3] + 17, f"{k}", anchor="middle", css="tick"))
    body.append(draw.text((frame[0] + frame[2]) / 2, 354, "shots of each label", anchor="middle", css="tick"))
    for index, own in enumerate(lines.values()):
        edges = [(row["shots"], row[metric]["high"]) for row in own]
        edges += [(row["shots"], row[metric]["low"]) for row in reversed(own)]
        body.append(f'<polygon points="{_points(edges, x, y)}" class="band s{index % 6}"/>')
    heights = [y(own[-1][metric]["value"]) for own in lines.values()]
    heights = draw.spread(heights, gap=14, low=frame[1] + 4, high=frame[3])
    for index, ((name, own), height) in enumerate(zip(lines.items(), heights, strict=True)):
        css, last = f"s{index % 6}", own[-1]
        points = _points([(row["shots"], row[metric]["value"]) for row in own], x, y)
        body.append(f'<polyline points="{points}" class="series {css}"/>')
        body.append(draw.line(x(last["shots"]), y(last[metric]["value"]), frame[2] + 8, height, "leader"))
        body.append(draw.text(frame[2] + 12, height + 4, names[name], css=f"name {css}"))
    return draw.svg(WIDTH, 362, f"{words.metric_name(metric)} over shots", body)


def _points(places: Sequence[tuple[float, float]], x: draw.Scale, y: draw.Scale) -> str:
    return " ".join(f"{x(at):.1f},{y(value):.1f}" for at, value in places)


def bars(facts: Facts) -> str:
    """Texts per second of everything that was timed."""
    rows = words.mappings(words.mapping(facts.get("timing")).get("rows"))
    if not rows:
        return ""
    names = [draw.shortened(str(row["name"]), 40) for row in rows]
    left = max(draw.text_width(name) for name in names) + 14
    most, room = max(float(row["texts_per_second"]) for row in rows), WIDTH - left - 230
    body = []
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        length, middle = room * float(row["texts_per_second"]) / most, i * ROW + ROW / 2 + 4
        said = f"{words.figure(row['texts_per_second'])} texts/s"
        if row.get("speedup"):
            ends = words.interval(row["speedup"], words.figure)
            said += f", {words.times(row['speedup']['value'])} [{ends}]"
        body.append(draw.text(left - 8, middle, name, anchor="end", css="tick"))
        body.append(draw.rect(left, i * ROW + 5, length, ROW - 10, "h6"))
        body.append(draw.text(left + length + 8, middle, said))
    return draw.svg(WIDTH, len(rows) * ROW + 4, "Texts per second", body)
