"""What the training of a sentence encoder brought, for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paredown.report import terminal as tables
from paredown.report import words

NAMES = {
    "cosine": "cosine to the teacher",
    "neighbour_overlap_at_10": "of 10 neighbours shared",
    "spearman": "Spearman of the scores",
    "partner_nearest": "nearest text is the partner",
    "label_of_nearest": "nearest text has the label",
}


def terminal(facts: Mapping[str, Any]) -> RenderableType:
    """A table of the figures before and after, the timings, and what was made of what. Texts are not read as markup."""
    rows = words.mappings(facts.get("figures"))
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column(Text("on texts held out"))
    sides = [side for side in ("teacher", "before", "after") if any(side in row for row in rows)]
    for side in sides:
        table.add_column(side, justify="right")
    table.add_column(Text("change [95 %]"), justify="right")
    for row in rows:
        name = NAMES.get(str(row.get("metric")), str(row.get("metric")))
        figures = [_figure(row.get(side)) for side in sides]
        table.add_row(Text(name), *(Text(one) for one in figures), Text(_change(row.get("change"))))
    parts: list[RenderableType] = [table]
    if facts.get("timing"):
        parts += [Text(""), tables.bench_table(facts["timing"], against="the teacher")]
    before, after = words.parameters(facts.get("parameters_before")), words.parameters(facts.get("parameters"))
    kept = ", ".join(str(layer) for layer in facts.get("layers") or ())
    said = f"layers {kept}; parameters {before} → {after}" if facts.get("verb") == "distill" else f"parameters {after}"
    if not facts.get("improved"):
        said += "; training made it no better, so it is as it was at the start"
    parts += [Text(""), Text(f"{said}; {words.count(facts.get('steps'))} steps"), Text(f"model: {facts.get('out')}")]
    return Group(*parts)


def _figure(value: object) -> str:
    number = words.finite(value)
    return words.UNKNOWN if number is None else f"{number:.4f}"


def _change(interval: object) -> str:
    """ "+0.0420 [+0.0380 to +0.0460]"; empty where there is none."""
    found = [words.finite(words.mapping(interval).get(key)) for key in ("value", "low", "high")]
    if any(one is None for one in found):
        return ""
    value, low, high = (f"{one:+.4f}" for one in found)
    return f"{value} [{low} to {high}]"
