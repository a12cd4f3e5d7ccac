"""What a layer costs on the target: a table filled by timing whole graphs with their widths changed.

Legend: h heads and f neurons kept in a layer; "inner" layers come before the "last" one, which is cheaper where only
its first row is read ([CLS] pooling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from paredown.planning._costs import Costs, cuttable
from paredown.types import Anatomy, Array, Limits

Widths = tuple[tuple[int, int], ...]  # (heads, neurons) of every layer that is left


@dataclass(frozen=True)
class LatencyTable:
    """Seconds per pass over the timing texts. `inner` and `last` map "heads" and "neurons" to seconds by width.

    The cost of a layer is heads[h] + neurons[f]; `base` is everything outside the layers. Widths between the measured
    ones are interpolated. `scale` corrects the whole by the latest re-measurement.
    """

    base: float
    inner: dict[str, dict[int, float]]
    last: dict[str, dict[int, float]]
    scale: float = 1.0

    def cost(self, kind: str, width: int, *, last: bool) -> float:
        """Seconds of one sub-layer (`kind` is "heads" or "neurons") at one width."""
        table = (self.last if last else self.inner)[kind]
        if width == 0:
            return table[0] * self.scale
        known = sorted(w for w in table if w)
        return float(np.interp(width, known, [table[w] for w in known])) * self.scale

    def predict(self, widths: Widths) -> float:
        """Seconds of a whole model with these widths."""
        total = self.base * self.scale
        for i, (heads, neurons) in enumerate(widths):
            last = i == len(widths) - 1
            total += self.cost("heads", heads, last=last) + self.cost("neurons", neurons, last=last)
        return total


def levels(full: int, limit: int, shares: Sequence[float] = (1, 0.5, 0.25, 0)) -> tuple[int, ...]:
    """Widths worth timing, widest first: shares of the full width in the multiples that the target likes."""

    def width(share: float) -> int:
        if share in (0, 1):  # the full width is timed as it is, also where it is no multiple
            return int(share * full)
        return min(full, max(limit, round(share * full / limit) * limit))

    return tuple(sorted({width(share) for share in shares}, reverse=True))


def latency_probes(num_layers: int, num_heads: int, num_neurons: int, limits: Limits) -> tuple[Widths, ...]:
    """The graphs to time: all layers alike at every level of one kind, and the same with the last layer alone."""
    singles = [(h, num_neurons) for h in levels(num_heads, 1)]
    singles += [(num_heads, f) for f in levels(num_neurons, limits.multiple_of) if f != num_neurons]
    depths = (num_layers, 1) if num_layers > 1 else (1,)
    return tuple((single,) * depth for depth in depths for single in singles)


def rising(values: Array) -> Array:
    """The nearest non-decreasing values in least squares: max over i <= k of min over j >= k of the mean of i..j."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    n = len(values)
    means = np.asarray([[(sums[j] - sums[i]) / max(j - i, 1) for j in range(1, n + 1)] for i in range(n)])
    return np.asarray([means[: k + 1, k:].min(axis=1).max() for k in range(n)])


def _within(curves: dict[str, dict[int, float]], whole: float) -> tuple[dict[str, dict[int, float]], float]:
    """The curves, scaled down where noise makes their ends add up to more than the whole, and what of it is left."""
    ends = sum(max(curve.values()) for curve in curves.values())
    share = min(1.0, max(0.0, whole) / ends) if ends > 0 else 1.0
    scaled = {kind: {w: v * share for w, v in curve.items()} for kind, curve in curves.items()}
    return scaled, max(0.0, whole - ends)


def fit_latency(measured: Callable[[Widths], float], shapes: Sequence[Widths]) -> LatencyTable:
    """The table that explains the timed graphs, the full one exactly; `measured` gives the seconds of a shape."""
    depth = max(len(s) for s in shapes)
    num_heads, num_neurons = max(s[0][0] for s in shapes), max(s[0][1] for s in shapes)
    full = (num_heads, num_neurons)

    def curve(seconds: Callable[[tuple[int, int]], float], kind: int) -> dict[int, float]:
        """What each width of a kind costs beside the full width of the other kind, nothing costing nothing."""
        widths = sorted({s[0][kind] for s in shapes})
        # wider never costs less: what says otherwise is noise
        values = rising(np.asarray([seconds((num_heads, w) if kind else (w, num_neurons)) for w in widths]))
        return {w: float(v - values[0]) for w, v in zip(widths, values, strict=True)}

    one = {single: measured((single,)) for single in {s[0] for s in shapes}}
    last, base = _within({"heads": curve(lambda s: one[s], 0), "neurons": curve(lambda s: one[s], 1)}, one[full])
    if depth > 1:
        per_layer = {s: (measured((s,) * depth) - one[s]) / (depth - 1) for s in one}
        curves = {"heads": curve(lambda s: per_layer[s], 0), "neurons": curve(lambda s: per_layer[s], 1)}
        curves, rest = _within(curves, per_layer[full])
        # norms and residuals of a layer remain when both sub-layers are gone: half of the rest to each
        inner = {kind: {w: v + rest / 2 for w, v in table.items()} for kind, table in curves.items()}
    else:
        inner = last
    return LatencyTable(base, inner, last)


def latency_costs(anatomy: Anatomy, table: LatencyTable) -> Costs:
    """Seconds of keeping 0, 1, ... U units of every group; the anatomy's topmost layer costs what a last one does."""
    groups = cuttable(anatomy)
    top = max(group.layer for group in groups)
    return Costs(
        table.base * table.scale,
        {
            g.name: np.asarray([table.cost(f"{g.kind}s", w, last=g.layer == top) for w in range(g.units + 1)])
            for g in groups
        },
    )
