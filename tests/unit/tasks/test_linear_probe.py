"""An embedder judged by what was built on its dense vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from paredown.errors import BadData
from paredown.tasks import LinearProbe, TextData, text_classification

RNG = np.random.default_rng(0)
LABELS = np.arange(90) % 3
CENTRES = RNG.normal(size=(3, 8))
VECTORS = CENTRES[LABELS] + 0.1 * RNG.normal(size=(90, 8))
DATA = TextData(tuple(f"text {i}" for i in range(90)), LABELS)


def test_it_answers_by_the_dense_vectors_that_it_was_fitted_to() -> None:
    probe = LinearProbe(VECTORS, LABELS)
    assert probe.metric_name(DATA) == "accuracy" and probe.all_texts(DATA) == DATA.texts
    assert probe.metrics(VECTORS, DATA, VECTORS) == {"accuracy": 1.0, "cosine": pytest.approx(1.0)}
    spoilt = VECTORS.copy()
    spoilt[:30] = CENTRES[(LABELS[:30] + 1) % 3]
    assert probe.per_example(spoilt, DATA, VECTORS).tolist() == [0.0] * 30 + [1.0] * 60
    assert probe.metrics(spoilt, DATA, VECTORS)["accuracy"] == pytest.approx(2 / 3)
    again = LinearProbe(VECTORS, LABELS)
    noise = RNG.normal(size=(90, 8))
    assert np.array_equal(probe.per_example(noise, DATA, VECTORS), again.per_example(noise, DATA, VECTORS))


def test_one_label_teaches_nothing() -> None:
    with pytest.raises(BadData, match="the same label"):
        LinearProbe(VECTORS, np.zeros(90, int))


def test_labels_that_no_model_knows(tmp_path: Path) -> None:
    train, test, plain = (tmp_path / name for name in ("train.csv", "test.csv", "plain.csv"))
    train.write_text("text,intent\none,b\ntwo,a\nthree,b\n")
    test.write_text("text,intent\nfour,B\nfive,A\n")
    plain.write_text("text\none\ntwo\n")
    assert text_classification.has_labels(train) and not text_classification.has_labels(plain)
    assert text_classification.has_labels(plain, "text")
    data, names = text_classification.load_named(train)
    assert names == ("a", "b") and data.labels is not None and data.labels.tolist() == [1, 0, 1]
    other, _ = text_classification.load_named(test, known=names)
    assert other.labels is not None and other.labels.tolist() == [1, 0]
    test.write_text("text,intent\nfour,c\nfive,a\n")
    with pytest.raises(BadData, match=r"line 2: no text to learn from has the label 'c'"):
        text_classification.load_named(test, known=names)
    with pytest.raises(BadData, match="no column of labels"):
        text_classification.load_named(plain)
