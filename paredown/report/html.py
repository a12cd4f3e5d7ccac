"""The evidence of one run as one self-contained HTML page: no script, no external file, readable in print."""

from __future__ import annotations

import functools
import importlib.resources
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from paredown.errors import ParedownError
from paredown.files import replacing
from paredown.report import _charts as charts
from paredown.report import _kept as kept
from paredown.report import _pareto, words

Facts = Mapping[str, Any]


def write(result: Mapping[str, Any], path: Path) -> Path:
    """The path of the page, written whole or not at all.

    `result` is the plain-JSON fact sheet of a run; whatever of it is absent, None or empty is left out of the page.
    Raises ParedownError when the file cannot be written.
    """
    path = Path(path)
    page = render(result).encode("utf-8", "replace")
    try:
        with replacing(path) as beside:
            beside.write_bytes(page)
    except OSError as error:
        raise ParedownError(f"The report {path} cannot be written: {error.strerror or error}.") from error
    return path


def render(result: Mapping[str, Any]) -> str:
    """The HTML text of the page. Everything that comes from `result` is escaped."""
    return str(_template().render(view(result)))


@functools.cache
def _template() -> Any:
    import jinja2

    source = importlib.resources.files("paredown.report").joinpath("template.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)


def view(result: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the template shows, put in words: texts, rows of texts, and pictures."""
    css, badge, sentence = words.verdict(result)
    no_cut = kept.no_cut(result)
    data = words.mapping(result.get("data"))
    return {
        "css": css,
        "badge": badge,
        "sentence": sentence,
        "asked": words.asked(result),
        "effort": _effort(result),
        "gate": words.gate_sentence(result),
        "subtitle": _subtitle(result),
        "figures": _figures(result),
        "new_name": _new_name(result),
        "metrics": _metrics(result),
        "metric": words.metric_name(result.get("quality_metric")),
        "rejected": css == "rejected",
        "no_cut": no_cut,
        "kept": "" if no_cut else charts.pictures(charts.kept, result),
        "kept_summary": kept.summary(result),
        "channels": kept.channels(result),
        "zeros": kept.zeros(result),
        "folds": _texts(result.get("folds")),
        "pareto": charts.pictures(_pareto.pareto, result),
        "unplotted": _pareto.unplotted(result),
        "legend": _legend(result),
        "candidates": [_candidate(result, number, c) for number, c in _numbered(result)],
        "timings": _timings(result),
        "lengths": charts.pictures(charts.lengths, result),
        "prediction": _prediction(result),
        "rounds": _rounds(result),
        "recovery": charts.pictures(charts.recovery, result),
        "generation": _generation(result),
        "splits": [
            (name, words.count(data[name]), use)
            for name, use in (
                ("calibration", "to score, re-fit and recover"),
                ("guardrail", "to choose: the gate looks here"),
                ("test", "for the headline figures, opened once"),
            )
            if words.finite(data.get(name)) is not None
        ],
        "notes": _texts(data.get("notes")),
        "machine": _pairs(result.get("machine")),
        "versions": _pairs(result.get("versions")),
        "command": str(result.get("command") or ""),
        "bundle": str(result.get("bundle") or ""),
        "created": str(result.get("created") or ""),
        "model": str(result.get("model") or ""),
        "items": words.items(result),
    }


def _texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [str(item) for item in value] if isinstance(value, Sequence) else []


def _pairs(value: object) -> list[tuple[str, str]]:
    """The entries of a mapping as texts; those of a mapping within it get "outer inner" as name."""
    found: list[tuple[str, str]] = []
    for name, item in words.mapping(value).items():
        title = str(name).replace("_", " ")
        if isinstance(item, Mapping):
            found += [(f"{title} {inner}", said) for inner, said in _pairs(item)]
        elif isinstance(item, Sequence) and not isinstance(item, str):
            found.append((title, ", ".join(str(part) for part in item)))
        elif item is not None and item != "":
            found.append((title, str(item)))
    return found


def _subtitle(result: Facts) -> str:
    family = f"{result['family']} model" if result.get("family") not in (None, "", "graph") else ""
    parts = (result.get("task"), family, f"served by {result['target']}" if result.get("target") else "")
    return " · ".join(str(part) for part in parts if part)


def _new_name(result: Facts) -> str:
    if words.verdict(result)[0] == "rejected":
        return "closest candidate"
    return str(words.chosen(result).get("name") or "chosen")


def _effort(result: Facts) -> str:
    """What the run cost, as a sentence."""
    minutes, peak = words.finite(result.get("minutes")), words.finite(result.get("peak_memory_mib"))
    said = "" if minutes is None else f"The run took {words.figure(minutes)} minutes"
    if peak is None or not said:
        return f"{said}." if said else ""
    return f"{said} and at most {words.count(peak)} MiB of memory."


def _figures(result: Facts) -> list[dict[str, Any]]:
    """The key figures: its name, the figure, what it was before, and what is needed to read it honestly."""
    metric, lost = result.get("quality_metric"), words.mapping(result.get("drop"))
    speed, latency, rate = (words.mapping(result.get(n)) for n in ("speedup", "latency_ms_p50", "texts_per_second"))
    items = words.items(result)
    found: list[tuple[str, str, object, list[str]]] = []
    if words.finite(speed.get("value")) is not None:
        against = result.get("speedup_against")
        found.append(
            (
                "Speed-up",
                words.times(speed["value"]),
                f"the {items} per second of {against}" if against else f"in {items} per second",
                [_ninety_five(words.interval(speed, words.figure)), _rates(rate, items)],
            )
        )
    before, after = result.get("quality_dense"), result.get("quality_pruned")
    if words.finite(before) is not None or words.finite(after) is not None:
        loss = f"drop {words.drop(metric, lost['value'])}" if words.finite(lost.get("value")) is not None else ""
        figure, was = _change(before, after, lambda v: words.quality(metric, v))
        name = "Mean cosine" if metric == "cosine" else words.metric_name(metric)
        lines = [loss, _ninety_five(words.drop_interval(metric, lost)), "test split"]
        found.append((name[0].upper() + name[1:], figure, was, lines))
    before, after = latency.get("dense"), latency.get("pruned")
    if words.finite(before) is not None or words.finite(after) is not None:
        gain = words.mapping(result.get("latency_speedup"))
        ratio = words.faster(gain["value"]) if words.finite(gain.get("value")) is not None else ""
        figure, was = _change(before, after, words.milliseconds)
        lines = [ratio, _ninety_five(words.interval(gain, words.figure)), f"one {items.removesuffix('s')} at a time"]
        found.append(("Median latency (p50)", figure, was, lines))
    old, new = (words.finite(result.get(name)) for name in ("parameters_dense", "parameters_pruned"))
    if old is not None or new is not None:
        figure, was = _change(old, new, words.parameters)
        found.append(("Parameters", figure, was, [_removed(old, new)]))
    old, new = (words.finite(result.get(name)) for name in ("macs_dense", "macs_pruned"))
    if old is not None or new is not None:
        figure, was = _change(old, new, words.parameters)
        about = f"multiply-accumulates of one {items.removesuffix('s')}; reported, never called speed"
        found.append(("MACs", figure, was, [_removed(old, new), about]))
    return [
        {"name": name, "figure": figure, "was": was, "lines": "\n".join(line for line in lines if line)}
        for name, figure, was, lines in found
    ]


def _removed(before: float | None, after: float | None) -> str:
    return f"{100 * (1 - after / before):.0f} % removed" if before and after is not None and after < before else ""


def _rates(rate: Facts, items: str) -> str:
    if words.finite(rate.get("dense")) is None or words.finite(rate.get("pruned")) is None:
        return ""
    return f"{words.figure(rate['dense'])} → {words.figure(rate['pruned'])} {items}/s"


def _change(before: object, after: object, word: Callable[[object], str]) -> tuple[str, str]:
    """The figure to show, and what it was: ("92.50 %", "dense: 93.00 %")."""
    old, new = word(before), word(after)
    if new == words.UNKNOWN:
        return old, "dense"
    return new, "unchanged" if old == new else f"dense: {old}"


def _ninety_five(said: str) -> str:
    return f"95 % interval {said}" if said else ""


def _metrics(result: Facts) -> list[tuple[str, str, str, str]]:
    before, after = words.mapping(result.get("metrics_dense")), words.mapping(result.get("metrics_pruned"))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        old, new = words.finite(before.get(name)), words.finite(after.get(name))
        lost = "" if old is None or new is None else words.drop(name, old - new)
        rows.append((words.metric_name(name), words.quality(name, old), words.quality(name, new), lost))
    return rows


def _numbered(result: Facts) -> list[tuple[int, Facts]]:
    return list(enumerate(words.mappings(result.get("candidates")), 1))


def _candidate(result: Facts, number: int, candidate: Facts) -> dict[str, Any]:
    metric, speed, lost = result.get("quality_metric"), candidate.get("speedup"), candidate.get("drop")
    lost_value = words.mapping(lost).get("value")
    return {
        "number": number,
        "name": str(candidate.get("name") or f"candidate {number}"),
        "kind": " · ".join(
            str(part) for part in (words.kind_name(candidate.get("kind")), candidate.get("target")) if part
        ),
        "rate": words.figure(candidate.get("texts_per_second")),
        "p50": words.figure(candidate.get("latency_ms_p50")),
        "p90": words.figure(candidate.get("latency_ms_p90")),
        "speedup": words.times(words.mapping(speed).get("value")),
        "speedup_interval": words.interval(speed, words.figure),
        "quality": words.quality(metric, candidate.get("quality")),
        "drop": words.drop(metric, lost_value, unit=False),
        "drop_interval": words.drop_interval(metric, lost),
        "bound": words.drop(metric, candidate.get("bound"), unit=False),
        "parameters": words.parameters(candidate.get("parameters")),
        "status": words.status(candidate),
        "reason": words.reason(result, candidate),
        "chosen": bool(candidate.get("chosen")),
    }


def _legend(result: Facts) -> list[tuple[Any, str]]:
    """A marker and its meaning, for those kinds and states only that the plot shows."""
    kinds = [str(c.get("kind")) for _, c in _numbered(result)]
    states = [words.status(c) for _, c in _numbered(result)]
    shapes = (
        ("circle", "fp32", ("dense", "pruned", "tokens")),
        ("diamond", "int8", ("dense-int8", "pruned-int8", "layer-drop-int8", "tokens-int8")),
        ("square", "layers dropped", ("layer-drop",)),
        ("triangle", "TF-IDF control", ("tfidf",)),
    )
    meanings = (("chosen", "chosen"), ("passed", "passed"), ("failed", "failed the gate"), ("untried", "not tried"))
    found = [(charts.glyph(shape, "plain"), said) for shape, said, of in shapes if any(k in of for k in kinds)]
    found += [(charts.glyph("circle", state), said) for state, said in meanings if state in states]
    if "reference" in states:
        found.append((charts.glyph("circle", "reference"), "dense reference"))
    return [(Markup(svg), said) for svg, said in found]


def _timings(result: Facts) -> dict[str, Any] | None:
    """A table of ratios, lengths down and batches across; `shade` is 0 to 1 by the logarithm of the ratio.

    Pictures have no length: theirs is a table of one row.
    """
    pictured = words.items(result) == "pictures"
    cells: dict[tuple[int, int], tuple[float, float]] = {}
    for row in words.mappings(result.get("timings")):
        batch, length = words.whole(row.get("batch")), 0 if pictured else words.whole(row.get("length"))
        dense, pruned = words.finite(row.get("dense_ms")), words.finite(row.get("pruned_ms"))
        if batch is not None and length is not None and dense and pruned and dense > 0 and pruned > 0:
            cells[length, batch] = (dense, pruned)
    if not cells:
        return None
    most = max(2.0, *(dense / pruned for dense, pruned in cells.values()), 2.0)
    batches = sorted({batch for _, batch in cells})

    def cell(length: int, batch: int) -> dict[str, str] | None:
        if (length, batch) not in cells:
            return None
        dense, pruned = cells[length, batch]
        ratio = dense / pruned
        return {
            "ratio": words.times(ratio),
            "both": f"{words.figure(dense)} → {words.figure(pruned)} ms",
            "css": "slower" if ratio < 1 else "",
            "shade": f"{0.06 + 0.34 * max(0.0, math.log(ratio)) / math.log(most):.2f}",
        }

    rows = [(length, [cell(length, batch) for batch in batches]) for length in sorted({length for length, _ in cells})]
    return {"batches": batches, "rows": rows, "lengths": not pictured}


def _rounds(result: Facts) -> list[dict[str, str]]:
    metric = result.get("quality_metric")
    return [
        {
            "round": words.count(row.get("round")),
            "parameters": words.parameters(row.get("parameters")),
            "cut": words.quality(metric, row.get("quality_cut")),
            "recovered": words.quality(metric, row.get("quality")),
        }
        for row in words.mappings(result.get("pruning_rounds"))
    ]


def _generation(result: Facts) -> dict[str, Any] | None:
    """How both models write: a row per figure, and what is warned of."""
    facts = words.mapping(result.get("generation"))
    dense, pruned = words.mapping(facts.get("dense")), words.mapping(facts.get("pruned"))
    if not dense or not pruned:
        return None
    named = {
        "repeated_ngrams": "4-grams that occurred before",
        "longest_loop": "longest loop, tokens",
        "distinct_1": "different tokens, of all",
        "distinct_2": "different 2-grams, of all",
        "distinct_3": "different 3-grams, of all",
        "tokens_per_second": "tokens per second",
    }
    rows = [(said, words.figure(dense.get(key)), words.figure(pruned.get(key))) for key, said in named.items()]
    about = f"{words.count(facts.get('prompts'))} texts of {words.count(pruned.get('tokens'))} tokens"
    return {"rows": rows, "about": about, "warnings": _texts(facts.get("warnings"))}


def _prediction(result: Facts) -> list[dict[str, str]]:
    rows = []
    for row in words.mappings(result.get("prediction")):
        predicted, measured = words.finite(row.get("predicted_ms")), words.finite(row.get("measured_ms"))
        off = None if predicted is None or not measured else predicted / measured - 1
        close = off is not None and abs(off) <= 0.03  # the planner solves again above this
        rows.append(
            {
                "round": words.count(row.get("round")),
                "what": str(row.get("what") or ""),
                "predicted": words.figure(predicted),
                "measured": words.figure(measured),
                "off": words.UNKNOWN if off is None else f"{100 * off:+.1f} %".replace("-", "−"),
                "css": "" if off is None else ("close" if close else "apart"),
                "said": "" if off is None else ("within 3 %" if close else "over 3 %"),
            }
        )
    return rows
