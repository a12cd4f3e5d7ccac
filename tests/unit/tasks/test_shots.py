"""Which texts are drawn, which are tested on, and what is learnt from them."""

from __future__ import annotations

import numpy as np
import pytest

from paredown.errors import BadData
from paredown.tasks import TextData, draw_shots, fit_and_answer, pool_and_test, unit_rows


def data(texts: list[str], labels: list[int]) -> TextData:
    return TextData(tuple(texts), np.array(labels))


def keys(part: TextData) -> set[str]:
    return {" ".join(text.split()).casefold() for text in part.texts}


def test_without_a_test_file_every_label_is_shared_out() -> None:
    labels = [i % 4 for i in range(200)]
    pool, test, notes = pool_and_test(data([f"text {i}" for i in range(200)], labels), None)
    assert (len(pool), len(test), notes) == (120, 80, ())
    assert pool.labels is not None and test.labels is not None
    assert list(np.bincount(pool.labels)) == [30] * 4 and list(np.bincount(test.labels)) == [20] * 4
    assert keys(pool).isdisjoint(keys(test))
    other = pool_and_test(data([f"text {i}" for i in range(200)], labels), None, seed=1)[0]
    assert other.texts != pool.texts
    for text, label in [*zip(pool.texts, pool.labels, strict=True), *zip(test.texts, test.labels, strict=True)]:
        assert int(text.split()[1]) % 4 == label


@pytest.mark.parametrize("seed", range(5))
def test_a_repeated_text_never_lies_on_both_sides(seed: int) -> None:
    texts = [f"text {i}" for i in range(40)]
    repeats = [*texts, *(f" TEXT  {i}" for i in range(40))]
    pool, test, notes = pool_and_test(data(repeats, [i % 2 for i in range(80)]), None, seed=seed)
    assert len(keys(pool)) == len(pool) and keys(pool).isdisjoint(keys(test))
    assert "40 texts dropped: the same text with the same label came before." in notes
    # The same text with two labels: whichever side it is cut to, the other one loses it.
    torn = [i % 2 for i in range(40)] + [(i + 1) % 2 for i in range(40)]
    pool, test, notes = pool_and_test(data(repeats, torn), None, seed=seed)
    assert keys(pool).isdisjoint(keys(test)) and "also among the test texts" in notes[-1]


def test_a_test_file_stays_whole_and_the_pool_gives_way() -> None:
    known = data([f"text {i}" for i in range(20)], [i % 2 for i in range(20)])
    asked = data([f"Text {i}" for i in range(15, 30)], [i % 2 for i in range(15)])
    pool, test, notes = pool_and_test(known, asked)
    assert test.texts == asked.texts
    assert pool.texts == known.texts[:15]
    assert notes == ("5 texts to draw from dropped: also among the test texts.",)


def test_too_few_to_test_on_and_no_labels() -> None:
    known = data([f"text {i}" for i in range(10)], [i % 2 for i in range(10)])
    with pytest.raises(BadData, match="4 test texts, and at least 8 are needed"):
        pool_and_test(known, None)
    with pytest.raises(BadData, match="the data has none"):
        pool_and_test(TextData(("a", "b")), None)


def test_a_draw_has_so_many_of_each_label_and_grows_by_more() -> None:
    labels = np.random.default_rng(0).integers(0, 5, 200)
    drawn = draw_shots(labels, 5, 8, seed=(0, 3))
    assert drawn.shape == (5, 8) and len(set(drawn.ravel().tolist())) == 40
    assert (labels[drawn] == np.arange(5)[:, None]).all()
    np.testing.assert_array_equal(draw_shots(labels, 5, 3, seed=(0, 3)), drawn[:, :3])
    assert (draw_shots(labels, 5, 8, seed=(0, 4)) != drawn).any()
    assert (draw_shots(labels, 5, 8, seed=(1, 3)) != drawn).any()
    every = draw_shots(labels, 5, int(np.bincount(labels).min()), seed=(0, 0))
    fewest = int(np.bincount(labels).argmin())
    assert set(every[fewest].tolist()) == set(np.flatnonzero(labels == fewest).tolist())


def test_unit_rows() -> None:
    rows = unit_rows(np.array([[3.0, 4.0], [0.0, 0.0]], np.float32))
    np.testing.assert_allclose(rows, [[0.6, 0.8], [0.0, 0.0]])


def test_what_lies_apart_is_learnt_from_one_text() -> None:
    rng = np.random.default_rng(0)
    centres = unit_rows(rng.normal(size=(12, 32)))
    labels = np.repeat(np.arange(12), 20)
    rows = unit_rows(centres[labels] + 0.05 * rng.normal(size=(240, 32)))
    learnt = draw_shots(labels, 12, 1, seed=(0, 0)).ravel()
    assert (fit_and_answer(rows[learnt], labels[learnt], rows) == labels).all()
    pair = np.flatnonzero(labels < 2)  # two classes are a case of their own in scikit-learn
    assert (fit_and_answer(rows[[0, 20]], labels[[0, 20]], rows[pair]) == labels[pair]).all()
