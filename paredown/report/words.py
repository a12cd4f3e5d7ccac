"""How figures, verdicts and reasons are worded, the same on the page and in the terminal.

Every function takes what the fact sheet holds, which may be None or absent, and gives text; "–" stands for unknown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

UNKNOWN = "–"

# These are shares of texts or pictures: they read as per cent and their differences as points. All others are plain
# numbers.
_SHARES = ("accuracy", "top5", "macro_f1", "f1", "micro_f1", "weighted_f1")

# The mean log-likelihood of a token is shown as perplexity, and what it loses as the share by which that rises.
_LIKELIHOOD = "log_likelihood"

_METRIC_NAMES = {
    _LIKELIHOOD: "perplexity",
    "macro_f1": "macro F1",
    "micro_f1": "micro F1",
    "weighted_f1": "weighted F1",
    "f1": "F1",
    "cosine": "mean cosine to the dense model",
    "spearman": "Spearman correlation",
}

_KIND_NAMES = {
    "dense": "as it is",
    "folded": "exact folds alone",
    "whole": "as it is",
    "dense-int8": "as it is, int8",
    "pruned": "pruned",
    "pruned-int8": "pruned, int8",
    "layer-drop": "layers dropped",
    "layer-drop-int8": "layers dropped, int8",
    "tokens": "tokens dropped while it runs",
    "tokens-int8": "tokens dropped while it runs, int8",
    "sparse": "with zeros",
    "sparse-int8": "with zeros, int8",
    "tfidf": "TF-IDF control",
}

UNPRUNED = ("dense", "dense-int8", "folded", "whole", "tfidf")  # choosing one of these means: do not prune


def finite(value: object) -> float | None:
    """The value as a float; None when it is no number, or not a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def items(result: Mapping[str, Any]) -> str:
    """What the model is given: "texts" or "pictures"."""
    return "pictures" if result.get("task") == "image-classification" else "texts"


def mapping(value: object) -> Mapping[str, Any]:
    """The value when it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def mappings(value: object) -> list[Mapping[str, Any]]:
    """The mappings of a list; empty when there is no list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [item for item in value if isinstance(item, Mapping)]


def numbers(value: object) -> list[float]:
    """The finite numbers of a list; empty when there is no list."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        return []
    return [number for number in map(finite, value) if number is not None]


def whole(value: object) -> int | None:
    """The value as an integer, or None."""
    number = finite(value)
    return None if number is None else round(number)


def figure(value: object, *, digits: int = 3) -> str:
    """A number to `digits` significant digits, without an exponent: 1234.5 -> "1,234", 0.0123 -> "0.0123"."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if number == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(float(f"{number:.{digits}g}")))))
    return _minus(f"{number:,.{min(decimals, 6)}f}")


def times(value: object) -> str:
    """A ratio: 4.1 -> "4.10×"."""
    number = finite(value)
    return UNKNOWN if number is None else f"{figure(number)}×"


def faster(value: object) -> str:
    """A speed-up as a claim: "4.10× faster", "0.636× as fast"."""
    number = finite(value)
    return f"{times(value)} {'faster' if number is None or number >= 1 else 'as fast'}"


def milliseconds(value: object) -> str:
    return UNKNOWN if finite(value) is None else f"{figure(value)} ms"


def count(value: object) -> str:
    """An integer with thousands separators."""
    number = whole(value)
    return UNKNOWN if number is None else _minus(f"{number:,}")


def parameters(value: object) -> str:
    """22700000 -> "22.7 M"."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{figure(number / size)} {unit}"
    return count(number)


def metric_name(metric: object) -> str:
    name = str(metric) if metric else "quality"
    return _METRIC_NAMES.get(name, name.replace("_", " "))


def is_share(metric: object) -> bool:
    return str(metric) in _SHARES


def quality(metric: object, value: object) -> str:
    """A quality in its own unit: "92.50 %" for a share, a perplexity "6.374", "0.9850" for any other metric."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if metric == _LIKELIHOOD:
        return f"{math.exp(min(-number, 700)):.3f}"
    return f"{_minus(f'{100 * number:.2f}')} %" if is_share(metric) else _minus(f"{number:.4f}")


def drop(metric: object, value: object, *, unit: bool = True, decimals: int = 2) -> str:
    """A difference of qualities: "0.50 points" for a share, "4.10 %" of a perplexity, "0.0050" for any other metric."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if metric == _LIKELIHOOD:
        return _minus(f"{100 * math.expm1(min(number, 700)):.{decimals}f}") + (f" {drop_unit(metric)}" if unit else "")
    if is_share(metric):
        return _minus(f"{100 * number:.{decimals}f}") + (f" {drop_unit(metric)}" if unit else "")
    return _minus(f"{number:.{decimals + 2}f}")


def change(metric: object, value: object) -> str:
    """A drop as what happens to the quality: "−0.50 points of accuracy", "perplexity +4.1 %", "−0.0050 of cosine"."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if metric == _LIKELIHOOD:
        return f"perplexity {_minus(f'{100 * math.expm1(min(number, 700)):+.1f}')} %"
    name = metric_name(metric)
    if is_share(metric):
        return f"{_minus(f'{-100 * number:+.2f}')} points of {name}"
    return f"{_minus(f'{-number:+.4f}')} of {name}"


def budget(metric: object, value: object) -> str:
    """A permitted drop without trailing zeros: "1 point", "0.02"."""
    number = finite(value)
    if number is None:
        return UNKNOWN
    if metric == _LIKELIHOOD:
        return f"{100 * number:.3g} %"
    if not is_share(metric):
        return f"{number:g}"
    points = f"{100 * number:g}"
    return f"{points} point" if points == "1" else f"{points} points"


def percent(value: object) -> str:
    """A share: 0.9 -> "90 %"."""
    number = finite(value)
    return UNKNOWN if number is None else f"{100 * number:g} %"


def interval(bounds: object, word: Any) -> str:
    """ "low to high", each end put in words by the function `word`; empty when an end is unknown."""
    ends = mapping(bounds)
    low, high = finite(ends.get("low")), finite(ends.get("high"))
    return "" if low is None or high is None else f"{word(low)} to {word(high)}"


def drop_unit(metric: object) -> str:
    """What a drop is counted in; empty for a plain number."""
    return "%" if metric == _LIKELIHOOD else "points" if is_share(metric) else ""


def drop_interval(metric: object, bounds: object) -> str:
    """ "−0.20 to 1.20" in points, or in the metric's own unit."""
    return interval(bounds, lambda value: drop(metric, value, unit=False))


def kind_name(kind: object) -> str:
    return _KIND_NAMES.get(str(kind), str(kind) if kind else UNKNOWN)


def max_drop(result: Mapping[str, Any]) -> float | None:
    """The permitted drop of the run, a difference of qualities."""
    objective = mapping(result.get("objective"))
    if objective.get("max_drop") is None and objective.get("dial") == "max_drop":
        return finite(objective.get("value"))
    return finite(objective.get("max_drop"))


def asked(result: Mapping[str, Any]) -> str:
    """What the user asked for, as a phrase."""
    objective, metric = mapping(result.get("objective")), result.get("quality_metric")
    dial, value, most = objective.get("dial"), objective.get("value"), max_drop(result)
    limit = "" if most is None else f" and a loss of at most {budget(metric, most)} of {metric_name(metric)}"
    if dial == "speedup":
        return f"a speed-up of {value:g}×{limit}" if (value := finite(value)) is not None else ""
    if dial == "latency_ms":
        return f"at most {milliseconds(value)} per {items(result).removesuffix('s')}{limit}"
    if dial == "amount":
        return f"a model without so much: {value}{limit}"
    if most is None:
        return ""
    return f"the fastest candidate that loses at most {budget(metric, most)} of {metric_name(metric)}"


def zeros(result: Mapping[str, Any]) -> str:
    """ "80 % of 10,616,832 weights are zero: 4x1, by sparsegpt, uniform over the matrices"; empty where none are."""
    facts = mapping(result.get("zeros"))
    share = finite(facts.get("sparsity"))
    if share is None:
        return ""
    how = f"{facts.get('pattern')}, by {facts.get('solver')}, {facts.get('allocation')} over the matrices"
    return f"{percent(round(share, 3))} of {count(facts.get('weights'))} weights are zero: {how}"


def chosen(result: Mapping[str, Any]) -> Mapping[str, Any]:
    """The chosen candidate; empty when there is none."""
    return next((c for c in mappings(result.get("candidates")) if c.get("chosen")), {})


def status(candidate: Mapping[str, Any]) -> str:
    """One of chosen, passed, failed, reference, untried. A chosen candidate that failed is the closest, and failed."""
    passed = candidate.get("passed")
    if passed is False:
        return "failed"
    if candidate.get("chosen"):
        return "chosen"
    if passed:
        return "passed"
    return "reference" if candidate.get("kind") == "dense" else "untried"


def reason(result: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    """Why a candidate was taken or left, in plain words."""
    note = str(candidate.get("note") or "").strip()
    state = status(candidate)
    if state == "failed":
        said = _failure(result, candidate)
    elif state == "chosen":
        dial = mapping(result.get("objective")).get("dial") or "max_drop"
        rule = {"max_drop": "the fastest that passed", "amount": "the size that was asked for"}
        said = f"chosen: {rule.get(str(dial), 'fast enough, and loses least')}" if candidate.get("passed") else "chosen"
    elif state == "passed":
        said = "passed"
    elif state == "reference":
        said = "the reference"
    else:
        said = "" if note else "not tried"
    if not note:
        return said
    # A note that gives the whole verdict itself is not repeated.
    alone = not said or note.lower().startswith(("chosen", "passed", "failed", "not tried"))
    return note if alone else f"{said}; {note}"


def _failure(result: Mapping[str, Any], candidate: Mapping[str, Any]) -> str:
    metric, most, bound = result.get("quality_metric"), max_drop(result), finite(candidate.get("bound"))
    if most is None or bound is None or bound <= most:
        return "failed"
    decimals = 2
    while decimals < 5 and drop(metric, bound, decimals=decimals) == drop(metric, most, decimals=decimals):
        decimals += 1  # 1.004 against 1: rounded alike, the comparison would look wrong
    closest = ", the closest candidate" if candidate.get("chosen") else ""
    return f"failed{closest}: bound {drop(metric, bound, unit=False, decimals=decimals)} > {budget(metric, most)}"


def gate_sentence(result: Mapping[str, Any]) -> str:
    """How the gate decides, in one sentence; empty when no drop was set."""
    metric, most = result.get("quality_metric"), max_drop(result)
    if most is None:
        return ""
    confidence = finite(result.get("confidence"))
    sided = "one-sided" if confidence is None else f"one-sided {percent(confidence)}"
    return (
        f"A candidate passes when the {sided} upper bound of its drop in {metric_name(metric)}, measured on the "
        f"guardrail split, is at most {budget(metric, most)}."
    )


def verdict(result: Mapping[str, Any]) -> tuple[str, str, str]:
    """(class, badge, sentence): class is accepted, unpruned or rejected."""
    said = str(result.get("verdict") or "").strip()
    best = chosen(result)
    if not result.get("accepted"):
        return "rejected", "Rejected", said or "No candidate passed the gate."
    if best.get("kind") in UNPRUNED or said.startswith("Do not prune"):
        rest = said.removeprefix("Do not prune").lstrip(": ") or f"use {best.get('name') or 'the dense model'}."
        return "unpruned", "Do not prune", rest[0].upper() + rest[1:]
    return "accepted", "Accepted", said or "The pruned model passed the gate."


def _minus(text: str) -> str:
    """The text with a true minus sign, and none before a zero."""
    if not text.startswith("-"):
        return text
    return "−" + text[1:] if any(digit in text for digit in "123456789") else text[1:]
