"""Whether what a bundle claims holds where it was measured again: the rules, on figures alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from paredown.pipeline._gate import TOLERANCE
from paredown.report import words
from paredown.types import Interval
from paredown.validation.quality import Drop, passes


def worse(claim: Mapping[str, Any], drop: Drop, gate: float | None) -> str:
    """Why the quality is not what was claimed; empty if it is. Without a gate the drop must not be above the claim's.

    A drop in another metric than the claim's, without a gate, is told and not judged.
    """
    if gate is not None:
        bound, permitted = words.drop(drop.metric, drop.bound), words.budget(drop.metric, gate)
        return "" if passes(drop, gate) else f"the bound on the drop is {bound}, above {permitted}"
    most = claim["drop"]["high"]
    if drop.metric != claim["quality_metric"] or drop.interval.low <= most:
        return ""
    lost, claimed = words.drop(drop.metric, drop.interval.value), words.drop(drop.metric, most)
    return f"the drop is {lost}, and no more than {claimed} was claimed"


def slower(claim: Mapping[str, Any], speedup: Interval, latency_ms: float) -> str:
    """Why it is not as fast as was asked for; empty if it is. Without a speed dial it must be faster than the dense
    model, if it was so when it was made.

    A factor belongs to the machine where it was measured, so another one than the claimed is told and not judged.
    """
    dial, asked = claim["objective"]["dial"], claim["objective"]["value"]
    if dial == "speedup" and speedup.value < TOLERANCE * asked:
        return f"the speed-up is {speedup.value:.2f}, below the {asked:g} asked for"
    if dial == "latency_ms" and latency_ms > asked / TOLERANCE:
        return f"the median latency is {latency_ms:.2f} ms, above the {asked:g} asked for"
    if dial == "max_drop" and speedup.value <= 1 < claim["speedup"]["value"]:
        return f"it is no faster than the dense model ({speedup.value:.2f} times)"
    return ""


def holds(claim: Mapping[str, Any], faster: Mapping[str, Any], drop: Drop) -> str:
    here, there = faster["speedup"], claim["speedup"]
    aside = f" (it was {there['value']:.2f} where it was made)" if here.high < there["low"] else ""
    return f"The claim holds here: {here.value:.2f} times{aside}, {words.change(drop.metric, drop.interval.value)}."
