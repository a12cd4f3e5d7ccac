"""Metrics and intervals of what was learnt from shots."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from paredown.validation import shots
from paredown.validation.shots import Judged, judge, over_draws


def answers_of(labels: np.ndarray, right: float, rng: np.random.Generator, num_classes: int = 6) -> np.ndarray:
    return np.where(rng.random(len(labels)) < right, labels, rng.integers(0, num_classes, len(labels)))


def test_the_metrics_are_those_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 90)  # class 5 is answered but never asked
    answers = np.stack([answers_of(labels, right, rng) for right in (0.2, 0.6, 0.9)])
    found = judge(answers, labels, resamples=10)
    for i, given in enumerate(answers):
        assert found["accuracy"].values[i] == pytest.approx(accuracy_score(labels, given))
        wanted = f1_score(labels, given, average="weighted", zero_division=0.0)
        assert found["weighted_f1"].values[i] == pytest.approx(wanted)


def test_a_resample_is_the_metric_of_texts_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    labels = rng.integers(0, 5, 60)
    answers = np.stack([answers_of(labels, 0.5, rng), answers_of(labels, 0.8, rng)])
    monkeypatch.setattr(shots, "_CHUNK", 60 * 3)  # in several chunks
    found = judge(answers, labels, resamples=7, seed=4)
    same = np.random.default_rng(4)
    counts = np.concatenate([same.multinomial(60, np.full(60, 1 / 60), size=n) for n in (3, 3, 1)])
    for r, times in enumerate(counts):
        drawn = np.repeat(np.arange(60), times)
        for m, given in enumerate(answers):
            f1 = f1_score(labels[drawn], given[drawn], average="weighted", zero_division=0.0)
            assert found["accuracy"].resampled[m, r] == pytest.approx((labels == given)[drawn].mean())
            assert found["weighted_f1"].resampled[m, r] == pytest.approx(f1)


def test_what_both_get_wrong_alike_cancels() -> None:
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 6, 400)
    one = np.stack([answers_of(labels, 0.6, rng) for _ in range(4)])
    other = one.copy()
    other[:, :8] = (other[:, :8] + 1) % 6
    found = judge(np.concatenate([one, other]), labels)["accuracy"]
    dense, pruned = found.take(np.arange(4)), found.take(np.arange(4, 8))
    alone, apart = over_draws(pruned), over_draws(pruned.minus(dense))
    assert apart.value == pytest.approx((pruned.values - dense.values).mean())
    assert apart.high - apart.low < 0.4 * (alone.high - alone.low)
    assert over_draws(dense.minus(dense)) == over_draws(pruned.minus(pruned))
    assert (over_draws(dense.minus(dense)).low, over_draws(dense.minus(dense)).high) == (0.0, 0.0)


@pytest.mark.parametrize("draws", [2, 3, 10])
def test_the_interval_covers_what_other_draws_and_texts_would_give(draws: int) -> None:
    """A draw's true accuracy varies by 4 points, and 200 texts add 3: the mean over all draws is known."""
    rng = np.random.default_rng(draws)
    covered = []
    for trial in range(150):
        truth = rng.normal(0.7, 0.04, draws)
        hard = rng.random(200)  # the same texts for every draw
        right = (hard < truth[:, None]).astype(float)
        counts = rng.multinomial(200, np.full(200, 1 / 200), size=300)
        found = over_draws(Judged(right.mean(1), right @ counts.T / 200), seed=trial)
        assert found.low <= found.value <= found.high
        covered.append(found.low <= 0.7 <= found.high)
    assert np.mean(covered) > 0.86  # of 95 asked; a bootstrap of so few is a little short


def test_one_draw_has_the_interval_of_its_texts_and_no_share_is_above_one() -> None:
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 3, 100)
    one = judge(answers_of(labels, 0.8, rng, 3)[None], labels)["accuracy"]
    found = over_draws(one)
    assert 0.5 * 2 * 1.96 * 0.034 < found.high - found.low < 1.5 * 2 * 1.96 * 0.034
    nearly = np.stack([labels, labels, np.where(np.arange(100) < 3, (labels + 1) % 3, labels)])
    assert over_draws(judge(nearly, labels)["accuracy"]).high <= 1.0
