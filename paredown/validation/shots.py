"""How right answers are when classes were learnt from a few texts, and what chance, of texts and of draws, adds.

Legend: N test texts, C classes, S draws of shots, M sets of answers, R resamples, r of them at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from paredown.types import Array, Interval

METRICS = ("accuracy", "weighted_f1")
RESAMPLES = 1000  # of the bootstrap; the bounds then move by a twentieth of their distance
_CHUNK = 4_000_000  # counts held at a time: 32 MB


@dataclass(frozen=True)
class Judged:
    """One metric of M sets of answers: over all test texts [M], and over resamples of them [M, R]."""

    values: Array
    resampled: Array

    def take(self, rows: Array) -> Judged:
        return Judged(self.values[rows], self.resampled[rows])

    def minus(self, other: Judged) -> Judged:
        """The differences, set by set and resample by resample: what both get wrong alike cancels."""
        return Judged(self.values - other.values, self.resampled - other.resampled)


def judge(answers: Array, labels: Array, *, resamples: int = RESAMPLES, seed: int = 0) -> dict[str, Judged]:
    """Accuracy and weighted F1 of answers [M, N] against labels [N]; the texts are drawn alike for all M (Efron 1979).

    Weighted F1 is the mean over classes of 2 TP / (labels + answers of the class), each with the class's share of the
    labels as its weight: what scikit-learn calls "weighted".
    """
    rng = np.random.default_rng(seed)
    size = max(1, _CHUNK // len(labels))
    values = _metrics(answers, labels, np.ones((1, len(labels))))
    parts: list[dict[str, Array]] = []
    for start in range(0, resamples, size):
        counts = rng.multinomial(len(labels), np.full(len(labels), 1 / len(labels)), size=min(size, resamples - start))
        parts.append(_metrics(answers, labels, counts.astype(np.float64)))
    return {
        name: Judged(values[name][:, 0], np.concatenate([part[name] for part in parts], axis=1)) for name in METRICS
    }


def _metrics(answers: Array, labels: Array, counts: Array) -> dict[str, Array]:
    """Every metric [M, r] of the test texts, each taken counts [r, N] times."""
    num_classes = int(max(labels.max(), answers.max())) + 1
    times = np.ascontiguousarray(counts.T)  # [N, r]
    support = _summed(labels, num_classes, times)
    total = times.sum(0)
    found: dict[str, list[Array]] = {name: [] for name in METRICS}
    for given in answers:
        right = _summed(labels, num_classes, times, np.flatnonzero(given == labels))
        both = support + _summed(given, num_classes, times)
        f1 = np.divide(2 * right, both, out=np.zeros_like(right), where=both > 0)
        found["accuracy"].append(right.sum(0) / total)
        found["weighted_f1"].append((f1 * support).sum(0) / total)
    return {name: np.stack(rows) for name, rows in found.items()}


def _summed(classes: Array, num_classes: int, times: Array, rows: Array | None = None) -> Array:
    """[C, r]: the sums of times [N, r] over the texts of each class; with `rows` over those of them alone."""
    from scipy.sparse import csr_array

    rows = np.arange(len(classes)) if rows is None else rows
    ones = np.ones(len(rows))
    table: Any = csr_array((ones, (classes[rows], rows)), shape=(num_classes, len(classes)))
    sums: Array = table @ times
    return sums


def over_draws(judged: Judged, *, confidence: float = 0.95, seed: int = 0) -> Interval:
    """The mean over S draws of shots, with an interval that holds for other texts and other draws.

    A bootstrap of two levels: texts are resampled alike for all draws, and the draws are. Of S draws a resample has
    (S - 1) / S of the variance that another sample would have, so its distance from their mean is stretched to that;
    of a single draw nothing is known but the texts.
    """
    draws, resamples = judged.resampled.shape
    chosen = np.random.default_rng(seed).integers(0, draws, size=(draws, resamples))
    middle = judged.resampled.mean(0)
    stretch = np.sqrt(draws / (draws - 1)) if draws > 1 else 0.0
    moved = middle + stretch * (np.take_along_axis(judged.resampled, chosen, axis=0).mean(0) - middle)
    moved = moved.clip(judged.resampled.min(), judged.resampled.max())  # no share is above 1
    tail = (1 - confidence) / 2
    low, high = (float(bound) for bound in np.quantile(moved, [tail, 1 - tail]))
    return Interval(float(judged.values.mean()), low, high)
