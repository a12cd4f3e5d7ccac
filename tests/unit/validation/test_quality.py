from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from paredown.tasks import TextData, text_classification, text_embedding
from paredown.types import Array
from paredown.validation.quality import paired_drop, passes


def answers(right: Array) -> Array:
    """Logits [N, 2] of a model that answers label 0 where `right`."""
    return np.where(right[:, None], [[1.0, 0.0]], [[0.0, 1.0]])


def labelled(count: int) -> TextData:
    return TextData(("x",) * count, np.zeros(count, dtype=np.int64))


def turned(count: int, losses: int, gains: int) -> tuple[Array, Array]:
    dense, pruned = np.ones(count, dtype=bool), np.ones(count, dtype=bool)
    dense[losses : losses + gains] = False
    pruned[:losses] = False
    return answers(dense), answers(pruned)


def test_the_accuracy_drop_has_the_binomial_theorys_interval() -> None:
    dense, pruned = turned(1000, 40, 15)
    drop = paired_drop(text_classification, dense, pruned, labelled(1000))
    assert (drop.metric, drop.samples) == ("accuracy", 1000)
    assert (drop.dense, drop.pruned, drop.interval.value) == pytest.approx((0.985, 0.96, 0.025))
    error = np.sqrt((40 + 15) / 1000 - 0.025**2) / np.sqrt(1000)
    assert drop.interval.low == pytest.approx(0.025 - 1.96 * error, abs=0.0015)
    assert drop.interval.high == pytest.approx(0.025 + 1.96 * error, abs=0.0015)
    assert drop.bound == pytest.approx(0.025 + 1.2816 * error, abs=0.0015)
    strict = paired_drop(text_classification, dense, pruned, labelled(1000), confidence=0.99)
    assert strict.bound == pytest.approx(0.025 + 2.326 * error, abs=0.002)


def test_the_models_are_resampled_together() -> None:
    right = np.arange(400) % 2 == 0  # both are wrong on the same half: that uncertainty cancels
    drop = paired_drop(text_classification, answers(right), answers(right), labelled(400))
    assert (drop.interval.value, drop.interval.low) == (0.0, 0.0)
    assert drop.bound == pytest.approx(1 - 0.1 ** (1 / 400))


@pytest.mark.parametrize(("count", "accepted"), [(20, False), (229, False), (230, True), (1000, True)])
def test_few_texts_cannot_pass_on_nothing(count: int, accepted: bool) -> None:
    dense, pruned = turned(count, 0, 0)
    drop = paired_drop(text_classification, dense, pruned, labelled(count))
    assert drop.bound == pytest.approx(1 - 0.1 ** (1 / count))
    assert passes(drop, 0.01) == accepted
    assert drop.interval.high >= drop.bound


def test_a_loss_never_lowers_the_bound_and_gains_never_raise_it() -> None:
    bounds = [paired_drop(text_classification, *turned(300, n, 0), labelled(300)).bound for n in (0, 1, 2, 5)]
    assert bounds == sorted(bounds) and len(set(bounds)) == 4
    better = paired_drop(text_classification, *turned(300, 0, 30), labelled(300))
    assert better.interval.value == pytest.approx(-0.1) and better.bound < 0


def test_all_answers_lost() -> None:
    drop = paired_drop(text_classification, *turned(30, 30, 0), labelled(30))
    assert (drop.interval.value, drop.bound) == (1.0, 1.0)


@pytest.mark.parametrize(("losses", "gains", "count"), [(0.02, 0.0, 60), (0.03, 0.02, 100), (0.05, 0.04, 400)])
def test_the_bound_covers_the_true_drop_as_often_as_it_says(losses: float, gains: float, count: int) -> None:
    rng = np.random.default_rng(0)
    covered, trials = 0, 300
    for seed in range(trials):
        kind = rng.choice(3, size=count, p=[1 - losses - gains, losses, gains])
        dense, pruned = answers(kind != 2), answers(kind != 1)
        drop = paired_drop(text_classification, dense, pruned, labelled(count), resamples=400, seed=seed)
        covered += drop.bound >= losses - gains - 1e-12
    assert covered / trials >= 0.87  # 0.9 asked; the standard error of this simulation is 0.017


def test_the_cosine_drop_covers_skewed_losses() -> None:
    rng = np.random.default_rng(0)
    true = 1 - np.cos(np.random.default_rng(1).exponential(0.15, size=1_000_000)).mean()
    dense = np.tile([[1.0, 0.0]], (100, 1))
    covered, trials = 0, 300
    for seed in range(trials):
        angle = rng.exponential(0.15, size=100)
        pruned = np.stack([np.cos(angle), np.sin(angle)], axis=1)
        drop = paired_drop(text_embedding, dense, pruned, TextData(("x",) * 100), resamples=400, seed=seed)
        covered += drop.bound >= true
    assert drop.metric == "cosine" and drop.dense == 1.0
    assert drop.pruned == pytest.approx(np.cos(angle).mean())
    assert drop.interval.value == pytest.approx(1 - drop.pruned)
    assert 0.83 <= covered / trials <= 0.95


def test_identical_embeddings_have_no_drop() -> None:
    rows = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    drop = paired_drop(text_embedding, rows, rows, TextData(("x",) * 50))
    assert drop.bound == pytest.approx(0.0, abs=1e-12)
    assert passes(drop, 0.0)


def test_the_spearman_drop_is_resampled_over_pairs() -> None:
    rng = np.random.default_rng(0)
    count = 120
    data = TextData(("x",) * count, pairs=("y",) * count, scores=np.round(rng.normal(size=count), 1))
    assert data.scores is not None
    left = rng.normal(size=(count, 6))
    right = left * data.scores[:, None] + rng.normal(size=(count, 6))
    dense = np.concatenate([left, right])
    pruned = dense + 0.6 * rng.normal(size=dense.shape)
    drop = paired_drop(text_embedding, dense, pruned, data, resamples=600)
    assert (drop.metric, drop.samples) == ("spearman", count)

    sides = [text_embedding.pair_similarity(outputs, data) for outputs in (dense, pruned)]
    expected = [spearmanr(side, data.scores).statistic for side in sides]
    assert (drop.dense, drop.pruned) == pytest.approx(tuple(expected))
    loop = []
    for _ in range(600):
        at = rng.integers(0, count, size=count)
        one, other = (spearmanr(side[at], data.scores[at]).statistic for side in sides)
        loop.append(one - other)
    spread = np.std(loop)
    assert drop.bound == pytest.approx(np.quantile(loop, 0.9), abs=0.3 * spread)
    assert drop.interval.low == pytest.approx(np.quantile(loop, 0.025), abs=0.5 * spread)
    assert drop.interval.low < drop.interval.value < drop.bound < drop.interval.high


def test_the_same_seed_gives_the_same_drop() -> None:
    dense, pruned = turned(300, 12, 5)
    assert paired_drop(text_classification, dense, pruned, labelled(300)) == paired_drop(
        text_classification, dense, pruned, labelled(300)
    )


def test_chunking_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, pruned = turned(300, 12, 5)
    whole = paired_drop(text_classification, dense, pruned, labelled(300), resamples=500)
    monkeypatch.setattr("paredown.validation.quality._CHUNK", 1000)
    assert paired_drop(text_classification, dense, pruned, labelled(300), resamples=500) == whole
