"""What the terminal shows of a run: tables for rich. Texts are never read as rich markup."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from paredown.report import words

_VERDICT_STYLES = {"accepted": "bold green", "unpruned": "bold yellow", "rejected": "bold red"}
_STATUS_STYLES = {"chosen": "bold green", "passed": "green", "failed": "red", "untried": "dim", "reference": "dim"}


def summary(result: Mapping[str, Any]) -> RenderableType:
    """A table of the candidates, the verdict sentence, and the figures that carry it.

    `result` is the fact sheet that `paredown.report.html.write` takes; whatever is absent is left out.
    """
    css, badge, sentence = words.verdict(result)
    parts: list[RenderableType] = []
    if words.mappings(result.get("candidates")):
        parts.append(_candidates(result))
    parts.append(Text.assemble((badge, _VERDICT_STYLES[css]), ": ", sentence))
    parts += [Padding(Text(said), (0, 0, 0, 2)) for said in _figures(result)]
    return Group(*parts)


def bench_table(
    rows: Sequence[Mapping[str, Any]], *, metric: str | None = None, against: str | None = None, items: str = "texts"
) -> RenderableType:
    """A table of models timed side by side.

    A row holds `name` and any of `target`, `texts_per_second`, `latency_ms_p50`, `latency_ms_p90`, `speedup`
    {value, low, high} (throughput), `quality` (in `metric`) and `parameters`; a column that no row fills is left out.
    `against` names what the speed-up is measured against, `items` what is counted per second.
    """
    columns: tuple[tuple[str, str, Callable[[Mapping[str, Any]], str]], ...] = (
        ("", "name", lambda row: str(row.get("name") or words.UNKNOWN)),
        ("target", "target", lambda row: str(row.get("target") or words.UNKNOWN)),
        (f"{items}/s", "texts_per_second", lambda row: words.figure(row.get("texts_per_second"))),
        ("p50 ms", "latency_ms_p50", lambda row: words.figure(row.get("latency_ms_p50"))),
        ("p90 ms", "latency_ms_p90", lambda row: words.figure(row.get("latency_ms_p90"))),
        ("speed-up [95 %]", "speedup", lambda row: ratio(row.get("speedup"))),
        (words.metric_name(metric), "quality", lambda row: words.quality(metric, row.get("quality"))),
        ("parameters", "parameters", lambda row: words.parameters(row.get("parameters"))),
    )
    used = [c for c in columns if c[1] == "name" or any(row.get(c[1]) is not None for row in rows)]
    table = _table()
    for title, key, _ in used:
        _column(table, title, right=key not in ("name", "target"))
    for row in rows:
        table.add_row(*(Text(word(row)) for _, _, word in used))
    if not against:
        return table
    return Group(table, Text(f"Speed-up in {items} per second against {against}; measured in turn.", style="dim"))


def _candidates(result: Mapping[str, Any]) -> Table:
    metric = result.get("quality_metric")
    table = _table()
    _column(table, "candidate")
    rate, quality = f"{words.items(result)}/s", words.metric_name(metric).split(" to ")[0]
    for title in (rate, "speed-up", "p50 ms", quality, "bound"):
        _column(table, title, right=True)
    _column(table, "outcome")
    for candidate in words.mappings(result.get("candidates")):
        state = words.status(candidate)
        name = str(candidate.get("name") or words.UNKNOWN)
        target = candidate.get("target")
        if target and target != result.get("target") and str(target) not in name:
            name += f" ({target})"
        table.add_row(
            Text(name, style="bold" if candidate.get("chosen") else ""),
            Text(words.figure(candidate.get("texts_per_second"))),
            Text(words.times(words.mapping(candidate.get("speedup")).get("value"))),
            Text(words.figure(candidate.get("latency_ms_p50"))),
            Text(words.quality(metric, candidate.get("quality"))),
            Text(words.drop(metric, candidate.get("bound"), unit=False)),
            Text(words.reason(result, candidate), style=_STATUS_STYLES[state]),
        )
    return table


def _figures(result: Mapping[str, Any]) -> list[str]:
    metric, speed, lost = result.get("quality_metric"), words.mapping(result.get("speedup")), result.get("drop")
    latency = words.mapping(result.get("latency_ms_p50"))
    found = []
    if words.finite(speed.get("value")) is not None:
        against = result.get("speedup_against")
        said = f" the {words.items(result)} per second of {against}" if against else ""
        found.append(f"{ratio(speed)}{said}")
    if words.finite(result.get("quality_pruned")) is not None:
        said = f"{words.metric_name(metric)} {words.quality(metric, result.get('quality_dense'))} → "
        said += words.quality(metric, result["quality_pruned"])
        value, ends = words.mapping(lost).get("value"), words.drop_interval(metric, lost)
        said += f", drop {words.drop(metric, value)}" if words.finite(value) is not None else ""
        where = " (evaluation file)" if "samples" in result else " (test split)"
        found.append(said + (f" [{ends}]" if ends else "") + where)
    if words.finite(latency.get("pruned")) is not None:
        found.append(f"p50 latency {words.figure(latency.get('dense'))} → {words.milliseconds(latency['pruned'])}")
    if words.finite(result.get("parameters_pruned")) is not None:
        before, after = words.parameters(result.get("parameters_dense")), words.parameters(result["parameters_pruned"])
        found.append(f"parameters {before} → {after}")
    if words.finite(result.get("macs_pruned")) is not None:
        before, after = words.parameters(result.get("macs_dense")), words.parameters(result["macs_pruned"])
        found.append(f"multiply-accumulates {before} → {after} (reported, never called speed)")
    if result.get("bundle") and result.get("accepted"):
        found.append(f"bundle: {result['bundle']}")
    return found


def ratio(interval: object) -> str:
    """ "4.10× [4.00 to 4.20]"."""
    ends = words.interval(interval, words.figure)
    return words.times(words.mapping(interval).get("value")) + (f" [{ends}]" if ends else "")


def _table() -> Table:
    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))


def _column(table: Table, title: str, *, right: bool = False) -> None:
    table.add_column(Text(title), justify="right" if right else "left", no_wrap=right, overflow="fold")
