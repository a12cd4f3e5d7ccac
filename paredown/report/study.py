"""What a study found, for the terminal and as one self-contained HTML page: heat maps, curves, tables.

A study is the fact sheet of `paredown.pipeline` with the rows of `score`, `sensitivity` or `compare`.
"""

from __future__ import annotations

import functools
import importlib.resources
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from paredown.files import replacing
from paredown.report import _heat as heat
from paredown.report import words
from paredown.report._pareto import pareto
from paredown.report.terminal import ratio, summary

Facts = Mapping[str, Any]

SHADES = " ░▒▓█"  # a heat map that a log file can hold
QUANTILES = 24  # columns of a layer with many neurons
MOST_INTERVALS = 4  # columns of figures that a terminal is wide enough for with their intervals


def write(facts: Facts, path: Path) -> Path:
    """The page, written whole or not at all: pictures of the study, its table, and the machine."""
    return write_page(view(facts), path)


def write_page(shown: Mapping[str, Any], path: Path) -> Path:
    """The page of what `view`, of this study or of another kind, says is shown."""
    page = str(_template().render(shown)).encode("utf-8", "replace")
    with replacing(Path(path)) as beside:
        beside.write_bytes(page)
    return Path(path)


@functools.cache
def _template() -> Any:
    import jinja2

    source = importlib.resources.files("paredown.report").joinpath("study.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def view(facts: Facts) -> dict[str, Any]:
    """What the page shows: a title, sections of (heading, words, picture), and a table."""
    from markupsafe import Markup

    title, sections = _sections(facts)
    head, rows = table_of(facts)
    return {
        "title": title,
        "about": _about(facts),
        "order": _in_order(facts),
        "sections": [(name, said, Markup(picture)) for name, said, picture in sections if picture],
        "head": head,
        "rows": rows,
        "notes": [str(note) for note in facts.get("notes") or ()],
        "machine": machine(facts),
    }


def terminal(facts: Facts) -> RenderableType:
    """The same for the terminal: shaded heat maps and a table."""
    parts: list[RenderableType] = [Text(_about(facts), style="dim")]
    for name, labels, rows, says in heat.maps(facts, columns=QUANTILES):
        parts.append(Text(f"\n{name}", style="bold"))
        wide = max([6, *map(len, labels)])
        for label, row in zip(labels, rows, strict=True):
            shaded = "".join(SHADES[0] if v is None else SHADES[min(4, int(v * 4.999))] * 2 for v in row)
            parts.append(Text(f"{label:>{wide}} {shaded}"))
        parts.append(Text(f"{'':{wide}} {says}", style="dim"))
    if "candidates" in facts:
        parts += [Text(""), summary(facts)]
        return Group(*parts)
    if "left_out" in facts:
        parts.append(Text(str(facts.get("verdict")), style="bold"))
    head, cells = table_of(facts, narrow=True)
    for unit in dict.fromkeys(row[0] for row in cells):  # a table each, that a terminal is wide enough for
        own = [line for line in cells if line[0] == unit]
        used = [i for i in range(1, len(head)) if any(line[i] for line in own)]
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column(Text(f"{heat.heading(unit)}: {head[1]}"))
        for i in used[1:]:
            table.add_column(Text(head[i]), justify="right")
        for line in own:
            table.add_row(*(Text(line[i]) for i in used))
        parts += [Text(""), table]
    if order := _in_order(facts):
        parts += [Text(""), Text(order)]
    return Group(*parts)


def table_of(facts: Facts, *, narrow: bool = False) -> tuple[list[str], list[list[str]]]:
    """Heading and cells: by criterion and fraction of a comparison, by layer of a sensitivity study; else nothing.

    Where many fractions have to be `narrow`, intervals are left out.
    """
    if "candidates" in facts:
        return _policies(facts)
    if "left_out" in facts:
        return _over_tasks(facts)
    rows = words.mappings(facts.get("rows"))
    metric = facts.get("quality_metric")
    key = "criterion" if any("criterion" in row for row in rows) else "layer"
    if not rows:
        return [], []
    fractions = sorted({row["fraction"] for row in rows})
    found: dict[tuple[str, str], dict[float, Facts]] = {}
    for row in rows:
        found.setdefault((str(row["unit"]), str(row[key])), {})[row["fraction"]] = row
    order = list(found)
    if key == "criterion":
        units = list(dict.fromkeys(unit for unit, _ in order))
        order.sort(key=lambda name: (units.index(name[0]), _mean_drop(found[name].values())))
    counted = words.drop_unit(metric) or words.metric_name(metric)
    bare = narrow and len(fractions) > MOST_INTERVALS
    dense = facts.get("macs_dense") if key == "criterion" and not bare else None
    left = " (MACs left)" if dense else ""
    head = ["unit", key, *(f"{counted} lost at {fraction:.0%}{left}" for fraction in fractions)]
    cells = [
        [*name, *(_cell(metric, found[name].get(fraction), bare=bare, dense=dense) for fraction in fractions)]
        for name in order
    ]
    return head, cells


def _policies(facts: Facts) -> tuple[list[str], list[list[str]]]:
    metric = facts.get("quality_metric")
    head = ["policy", "texts/s", "speed-up [95 %]", words.metric_name(metric), "lost [95 %]", "bound", "outcome"]
    cells = []
    for row in words.mappings(facts.get("candidates")):
        drop = row.get("drop")
        lost = f"{words.drop(metric, words.mapping(drop).get('value'))} [{words.drop_interval(metric, drop)}]"
        cells.append(
            [
                str(row.get("name")),
                words.figure(row.get("texts_per_second")),
                ratio(row.get("speedup")),
                words.quality(metric, row.get("quality")) if drop else "",
                lost if drop else "",
                words.drop(metric, row.get("bound")) if drop else "",
                words.reason(facts, row),
            ]
        )
    return head, cells


def _over_tasks(facts: Facts) -> tuple[list[str], list[list[str]]]:
    """Of a search: every task under the chosen policy, under the one that the others chose, under the published one."""
    metric = "accuracy"
    head = [
        "policy",
        "task",
        "s, q, l",
        "texts longer than s",
        "dense",
        "pruned",
        "points lost [95 %]",
        "their time, of the dense [95 %]",
    ]
    cells = []

    def line(name: str, row: Facts, policy: Facts, long: object) -> None:
        drop, said = row.get("drop"), ", ".join(f"{policy[key]:g}" for key in ("s", "q", "l") if key in policy)
        lost = (
            f"{words.drop(metric, words.mapping(drop).get('value'), unit=False)} [{words.drop_interval(metric, drop)}]"
        )
        dense, pruned = (words.quality(metric, words.mapping(row.get(key)).get("value")) for key in ("dense", "pruned"))
        found = [name, str(row.get("task")), said, words.percent(long) if long is not None else "", dense, pruned]
        taken = words.mapping(row.get("time"))
        ends = f"{taken['value']:.0%} [{taken['low']:.0%}, {taken['high']:.0%}]" if taken else ""
        cells.append([*found, lost, ends])

    for row in words.mappings(facts.get("tasks")):
        line("chosen by all tasks", row, words.mapping(facts.get("chosen")), row.get("longer_than_s"))
    for row in words.mappings(facts.get("left_out")):
        if row.get("policy"):
            line("chosen by the other tasks", row, words.mapping(row["policy"]), None)
    for row in words.mappings(facts.get("tasks")):
        if published := words.mapping(row.get("published")):
            line("published", {**published, "task": row.get("task")}, words.mapping(facts.get("published")), None)
    return head, cells


def _mean_drop(rows: Iterable[Facts]) -> float:
    drops = [float(row["drop"]["value"]) for row in rows]
    return sum(drops) / len(drops)


def _cell(metric: object, row: Facts | None, *, bare: bool, dense: int | None) -> str:
    """The drop, with its interval unless `bare`, and what is left of the `dense` network's multiply-accumulates."""
    if row is None:
        return ""
    ends = words.drop_interval(metric, row.get("drop"))
    value = words.drop(metric, words.mapping(row.get("drop")).get("value"), unit=False)
    return value + (f" [{ends}]" if ends and not bare else "") + (f" ({row['macs'] / dense:.0%})" if dense else "")


def _in_order(facts: Facts) -> str:
    """Which layers can lose most of each kind of unit, the most prunable first; empty for any other study."""
    order = words.mapping(facts.get("most_prunable_first"))
    called = {unit: heat.layer_names(sorted(layers)) for unit, layers in order.items()}
    said = [f"{heat.heading(unit)} {', '.join(called[unit][i] for i in layers)}" for unit, layers in order.items()]
    return f"Most prunable first: {'; '.join(said)}." if said else ""


def _sections(facts: Facts) -> tuple[str, list[tuple[str, str, str]]]:
    if "left_out" in facts:
        return "One token policy for several tasks", []
    if "candidates" in facts:
        said = "Up and to the right is better; the line is the gate."
        return "Tokens left out", [("Quality against speed", said, pareto(facts, 760.0))]
    if "values" in facts:
        title = f"Importance by {facts['criterion']}"
    elif any("criterion" in row for row in words.mappings(facts.get("rows"))):
        title = "Criteria compared"
    else:
        title = "What each layer can lose"
    sections = []
    for name, labels, rows, says in heat.maps(facts, columns=48):
        sections.append((name, says, heat.picture(name, labels, rows)))
    for name, picture in heat.curves(facts):
        said = "Lower is better; the band is the 95 % interval of the best one. Random is dashed."
        sections.append((name, said if "Criteria" in title else "One line per layer.", picture))
    return title, sections


def _about(facts: Facts) -> str:
    metric = facts.get("quality_metric")
    said = [str(facts.get("model"))]
    if metric is not None:
        said.append(f"{words.metric_name(metric)} {words.quality(metric, facts.get('quality_dense'))}")
    if facts.get("shots"):
        said.append(f"{facts['shots']} shots")
    if "samples" in facts:
        said.append(f"{facts['samples']} guardrail {words.items(facts)}")
    if facts.get("recover"):
        said.append("no recovery" if facts["recover"] == "none" else f"recovery: {facts['recover']}")
    if facts.get("seeds"):
        said.append(f"{facts['seeds']} seeds")
    return ", ".join(said)


def machine(facts: Facts) -> str:
    """Where it was measured, in a line."""
    card = words.mapping(facts.get("machine"))
    return ", ".join(f"{key} {card[key]}" for key in ("cpu", "cores") if key in card)
