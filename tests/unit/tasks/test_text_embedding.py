from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

from paredown.errors import BadData
from paredown.tasks import TextData
from paredown.tasks import text_embedding as task
from paredown.types import Array


def write(folder: Path, name: str, *rows: str) -> Path:
    path = folder / name
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


def vectors(count: int, width: int = 12, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(size=(count, width))


def test_texts_alone(tmp_path: Path) -> None:
    data = task.load(write(tmp_path, "a.csv", "sentence,score", "one,1", ",2", "two,3"))
    assert data.texts == ("one", "two") and data.pairs is None and data.scores is None
    assert "1 row with an empty text" in data.notes[0]
    assert task.all_texts(data) == ("one", "two") and task.metric_name(data) == "cosine"


@pytest.mark.parametrize("names", ["sentence1,sentence2", "text_a,text_b"])
def test_pairs_with_scores(tmp_path: Path, names: str) -> None:
    data = task.load(write(tmp_path, "a.csv", f"{names},score", "a,b,1.5", "c,,2", "d,e,5"))
    assert (data.texts, data.pairs) == (("a", "d"), ("b", "e"))
    assert data.scores is not None and data.scores.tolist() == [1.5, 5.0]
    assert task.all_texts(data) == ("a", "d", "b", "e") and task.metric_name(data) == "spearman"


def test_the_layout_of_stsb(tmp_path: Path) -> None:
    rows = ("main\tx\t2015\t1\t4.5\tone\ttwo", 'main\tx\t2015\t2\t0\t"three\tfour\tsource\tsource')
    path = write(tmp_path, "sts.tsv", *rows)
    data = task.load(path, text_column="6", pair_column="7", score_column="5")
    assert (data.texts, data.pairs) == (("one", '"three'), ("two", "four"))
    assert data.scores is not None and data.scores.tolist() == [4.5, 0.0]


@pytest.mark.parametrize("score", ["high", "nan", ""])
def test_bad_scores_and_columns(tmp_path: Path, score: str) -> None:
    with pytest.raises(BadData, match=f"line 3: the score '{score}' is not a number"):
        task.load(write(tmp_path, "a.csv", "sentence1,sentence2,score", "a,b,1", f"c,d,{score}"))
    with pytest.raises(BadData, match="needs a column of second texts"):
        task.load(write(tmp_path, "a.csv", "text,score", "a,1"), score_column="score")
    with pytest.raises(BadData, match="no column of texts found among 'other'"):
        task.load(write(tmp_path, "a.csv", "other", "a"))


def test_cosine_by_hand() -> None:
    reference, outputs = np.array([[1.0, 0.0], [0.0, 2.0]]), np.array([[3.0, 4.0], [0.0, 1.0]])
    data = TextData(("a", "b"))
    assert task.per_example(outputs, data, reference) == pytest.approx([0.6, 1.0])
    assert task.metrics(outputs, data, reference)["cosine"] == pytest.approx(0.8)
    paired = TextData(("a",), pairs=("b",), scores=np.ones(1))
    assert task.per_example(outputs, paired, reference) == pytest.approx([0.8])
    broken = np.array([[np.nan, 1.0], [0.0, 0.0]])
    assert task.per_example(broken, data, reference).tolist() == [0.0, 0.0]


def test_neighbour_overlap_is_what_a_loop_finds() -> None:
    reference = vectors(300)
    outputs = reference + 0.5 * vectors(300, seed=1)

    def nearest(rows: Array) -> list[set[int]]:
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        similarity = unit @ unit.T
        np.fill_diagonal(similarity, -2)
        return [set(np.argsort(-row)[:10]) for row in similarity]

    shared = [len(a & b) / 10 for a, b in zip(nearest(outputs), nearest(reference), strict=True)]
    assert 0.2 < np.mean(shared) < 0.9
    assert task.neighbour_overlap(outputs, reference) == pytest.approx(np.mean(shared))
    assert task.neighbour_overlap(reference * 3, reference) == 1.0
    assert task.neighbour_overlap(outputs[:2], reference[:2]) == 1.0


def test_neighbour_overlap_looks_at_a_sample_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    reference = vectors(600)
    outputs = reference + 0.5 * vectors(600, seed=1)
    monkeypatch.setattr(task, "_SAMPLE", 150)
    found = task.neighbour_overlap(outputs, reference)
    chosen = np.sort(np.random.default_rng(0).choice(np.arange(600), 150, replace=False))
    assert found == task.neighbour_overlap(outputs[chosen], reference[chosen]) < 1.0


def test_spearman_is_that_of_scipy_also_for_counted_repeats() -> None:
    rng = np.random.default_rng(0)
    x, y = np.round(rng.normal(size=80), 1), rng.integers(0, 6, size=80).astype(float)
    assert float(task.spearman(x, y)) == pytest.approx(spearmanr(x, y).statistic)
    drawn = rng.integers(0, 80, size=(5, 80))
    counts = np.stack([np.bincount(row, minlength=80) for row in drawn])
    expected = [spearmanr(x[row], y[row]).statistic for row in drawn]
    assert task.spearman(x, y, counts) == pytest.approx(expected)
    assert float(task.spearman(np.ones(80), y)) == 0.0


def test_metrics_of_scored_pairs() -> None:
    reference = vectors(60)
    scores = np.random.default_rng(3).normal(size=30)
    data = TextData(("a",) * 30, pairs=("b",) * 30, scores=scores)
    found = task.metrics(reference * 2, data, reference)
    cosine = [
        a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in zip(reference[:30], reference[30:], strict=True)
    ]
    assert found == pytest.approx(
        {"cosine": 1.0, "neighbour_overlap_at_10": 1.0, "spearman": spearmanr(cosine, scores).statistic}
    )
