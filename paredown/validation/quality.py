"""How much quality a pruned model loses, from the same texts run through both models, with what chance could add to it.

Legend: N examples, R resamples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from paredown.tasks import Task, TextData
from paredown.tasks.text_embedding import pair_similarity, spearman
from paredown.types import Array, Interval

_CHUNK = 2_000_000  # drawn indices held at a time: 16 MB


@dataclass(frozen=True)
class Drop:
    """`dense` - `pruned` of one metric over `samples` examples: positive means that the pruned model is worse.

    `interval` is two-sided at 95 %; `bound` is the one-sided upper bound that the gate compares with the budget.
    """

    metric: str
    dense: float
    pruned: float
    interval: Interval
    bound: float
    samples: int


def paired_drop(
    task: Task,
    dense_outputs: Array,
    pruned_outputs: Array,
    data: TextData,
    *,
    confidence: float = 0.9,
    resamples: int = 4000,
    seed: int = 0,
) -> Drop:
    """The drop of the task's gate metric with its paired bootstrap over examples (Efron 1979).

    Both models are resampled together, so what they get wrong alike cancels. The bootstrap cannot see what did not
    happen: if none of 20 answers turned wrong, none does in any resample, and its bound would be 0. For accuracy the
    bound is therefore at least the exact binomial one of Clopper and Pearson (1934) on the share of answers that turn
    wrong, less the observed share of those that turn right. Without a loss it is 1 - (1 - confidence)**(1 / N): at
    0.9, a drop of 1 % cannot be ruled out by fewer than 230 texts. Outputs are those of `task.all_texts(data)`.
    """
    rng = np.random.default_rng(seed)
    metric = task.metric_name(data)
    if metric == "spearman":
        assert data.scores is not None
        sides = (pair_similarity(dense_outputs, data), pair_similarity(pruned_outputs, data))
        dense, pruned = (float(spearman(side, data.scores)) for side in sides)
        drops = _spearman_drops(sides, data.scores, resamples, rng)
    else:
        ours, theirs = (task.per_example(outputs, data, dense_outputs) for outputs in (dense_outputs, pruned_outputs))
        dense, pruned = float(ours.mean()), float(theirs.mean())
        lost = ours - theirs
        drops = _mean_drops(lost, resamples, rng, studentised=metric != "accuracy")
    # The next resample above the quantile: the drops of few examples come in steps, and between steps is no evidence.
    low, high, bound = (float(np.quantile(drops, q, method="higher")) for q in (0.025, 0.975, confidence))
    if metric == "accuracy":
        losses, gains = int((lost > 0).sum()), int((lost < 0).sum())
        bound = max(bound, _binomial_upper(losses, len(data), confidence) - gains / len(data))
        high = max(high, _binomial_upper(losses, len(data), 0.975) - gains / len(data))
    return Drop(metric, dense, pruned, Interval(dense - pruned, low, high), bound, len(data))


def least_bound(examples: int, confidence: float) -> float:
    """The bound on a drop of accuracy where no answer changes: fewer examples show less (see `paired_drop`)."""
    return _binomial_upper(0, examples, confidence)


def passes(drop: Drop, max_drop: float) -> bool:
    """Whether the drop is at most `max_drop` (in the metric's own unit) with the confidence of its bound."""
    return drop.bound <= max_drop + 1e-12  # a bound that rounding has put beside the budget is on it


def _draws(count: int, resamples: int, rng: np.random.Generator) -> Iterator[Array]:
    """Indices [r, N] of examples drawn with replacement, `resamples` rows in all."""
    rows = max(1, _CHUNK // count)
    for start in range(0, resamples, rows):
        yield rng.integers(0, count, size=(min(rows, resamples - start), count))


def _mean_drops(lost: Array, resamples: int, rng: np.random.Generator, *, studentised: bool) -> Array:
    """Resampled means of `lost` [N], as an array [R] whose quantiles bound the true mean.

    Losses in cosine are skewed, many near 0 and a few large, and plain percentiles then cover too little (82 % where
    90 % was asked, in a simulation with 60 texts; 86 % this way). Studentised, every resample counts in standard errors
    of its own (bootstrap-t: Efron 1981, Hall 1988).
    """
    drops = []
    for drawn in _draws(len(lost), resamples, rng):
        sample = lost[drawn]
        mean = sample.mean(axis=1)
        if studentised:
            spread = sample.std(axis=1)
            scale = np.divide(lost.std(), spread, out=np.ones_like(spread), where=spread > 0)
            mean = lost.mean() - (mean - lost.mean()) * scale
        drops.append(mean)
    return np.concatenate(drops)


def _spearman_drops(sides: tuple[Array, Array], scores: Array, resamples: int, rng: np.random.Generator) -> Array:
    drops = []
    for drawn in _draws(len(scores), resamples, rng):
        rows, count = drawn.shape
        flat = (drawn + np.arange(rows)[:, None] * count).ravel()
        counts = np.bincount(flat, minlength=rows * count).reshape(rows, count)
        dense, pruned = (spearman(side, scores, counts) for side in sides)
        drops.append(dense - pruned)
    return np.concatenate(drops)


def _binomial_upper(events: int, trials: int, confidence: float) -> float:
    """The largest rate at which no more than `events` in `trials` still has probability 1 - confidence."""
    from scipy.special import betaincinv

    return 1.0 if events >= trials else float(betaincinv(events + 1, trials - events, confidence))
