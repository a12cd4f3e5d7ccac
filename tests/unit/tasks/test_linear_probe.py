"""A classifier on an embedder's vectors, fitted once and then only asked."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from paredown.errors import BadData
from paredown.tasks import LinearProbe, TextData
from paredown.types import Array


def clouds(count: int, seed: int, *, classes: int = 3, width: int = 8) -> tuple[Array, TextData]:
    """Embeddings of length 1 around one direction per class, far apart, and their texts with labels."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, classes, count)
    x = np.eye(width)[labels] + 0.1 * random.standard_normal((count, width))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), TextData(tuple(f"text {i}" for i in range(count)), labels)


def probe() -> LinearProbe:
    x, data = clouds(120, 0)
    assert data.labels is not None
    return LinearProbe(x, data.labels)


def test_it_learns_what_a_line_can_part() -> None:
    x, data = clouds(90, 1)
    found = probe().metrics(x, data, x)
    assert found == {"accuracy": 1.0, "cosine": pytest.approx(1.0)}
    random = np.random.default_rng(2).standard_normal(x.shape)
    assert probe().metrics(random, data, x)["accuracy"] < 0.6


def test_it_is_the_same_every_time() -> None:
    x, data = clouds(90, 1)
    noisy = x + np.random.default_rng(2).normal(scale=0.3, size=x.shape)
    np.random.seed(1)
    first = probe().per_example(noisy, data, x)
    np.random.seed(2)
    np.testing.assert_array_equal(probe().per_example(noisy, data, x), first)
    assert 0.3 < first.mean() < 1  # else nothing was compared


def test_the_metric_is_the_share_of_right_answers_of_the_classifier_as_it_was() -> None:
    x, data = clouds(60, 1)
    task, outputs = probe(), x.copy()
    assert data.labels is not None
    assert (task.NAME, task.METRIC, task.metric_name(data)) == ("text-embedding", "accuracy", "accuracy")
    assert task.all_texts(data) == data.texts
    wrong = np.array([3, 17, 40])
    outputs[wrong] = x[[int(np.flatnonzero(data.labels != data.labels[i])[0]) for i in wrong]]  # of another class
    right = task.per_example(outputs, data, x)
    assert right.shape == (60,) and right.dtype == np.float64
    assert np.flatnonzero(right == 0).tolist() == wrong.tolist()
    assert task.metrics(outputs, data, x)["accuracy"] == pytest.approx(57 / 60)
    # what was turned as a whole is as good by itself, and useless to a classifier that stays as it is
    turned = np.roll(x, 1, axis=1)
    assert task.metrics(turned, data, x)["accuracy"] < 0.2
    assert task.metrics(-2 * x, data, x)["cosine"] == pytest.approx(-1)
    assert task.metrics(0 * x, data, x)["cosine"] == 0


def test_it_names_the_classes_as_the_labels_do() -> None:
    x, data = clouds(120, 0)
    assert data.labels is not None
    moved = replace(data, labels=data.labels * 10 + 7)
    assert moved.labels is not None
    assert LinearProbe(x, moved.labels).metrics(x, moved, x)["accuracy"] == 1
    strange = replace(moved, labels=np.full(120, 99))  # a class that it was never shown
    assert LinearProbe(x, moved.labels).metrics(x, strange, x)["accuracy"] == 0


def test_embeddings_that_are_not_finite_are_wrong_answers() -> None:
    x, data = clouds(60, 1)
    broken = x.copy()
    broken[5, 0], broken[9, 3] = np.nan, np.inf
    right = probe().per_example(broken, data, x)
    assert np.flatnonzero(right == 0).tolist() == [5, 9]
    assert not probe().per_example(np.full_like(x, np.nan), data, x).any()


def test_labels_that_are_all_the_same_teach_nothing() -> None:
    x, _ = clouds(20, 0)
    for labels in (np.zeros(20, dtype=np.int64), np.full(20, 4)):
        with pytest.raises(BadData, match="All calibration texts have the same label"):
            LinearProbe(x, labels)
    with pytest.raises(BadData, match="same label"):
        LinearProbe(x[:0], np.zeros(0, dtype=np.int64))
