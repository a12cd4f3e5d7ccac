"""Learning classes from a few texts each: which texts are drawn, and a linear classifier on their embeddings.

Legend: N texts, C classes, K shots, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np

from paredown.errors import BadData
from paredown.tasks._table import count
from paredown.tasks._text import SMALLEST_SPLIT, TextData, _cut, _keys
from paredown.types import Array

REGULARIZATION = 10.0  # C: at 1, ten shots lose 5 points on BANKING77 and 1 on CLINC150; from 10 to 100 all are alike
MOST_STEPS = 300  # of L-BFGS; 5 to 40 were enough wherever it was tried
POOL_SHARE = 0.6  # of the texts of each class, where no other file is there to test on


def pool_and_test(
    data: TextData, evaluation: TextData | None, *, seed: int = 0
) -> tuple[TextData, TextData, tuple[str, ...]]:
    """Labelled texts to draw shots from, texts to test on that share none with them, and what was said on the way.

    Without `evaluation`, 60 % of the texts of each class are drawn from. Texts that are equal up to case and white
    space are one text: they never lie on both sides (the pool gives way), and the pool holds each once per class.
    Raises BadData without labels, or where fewer than 8 texts are left to test on.
    """
    if data.labels is None or (evaluation is not None and evaluation.labels is None):
        raise BadData("Shots are drawn by label, and the data has none.")
    notes = data.notes if evaluation is None else (*data.notes, *evaluation.notes)
    first: dict[tuple[tuple[str, ...], int], int] = {}
    for i, key in enumerate(zip(_keys(data), data.labels.tolist(), strict=True)):
        first.setdefault(key, i)
    if len(first) < len(data):
        notes += (f"{count(len(data) - len(first), 'text')} dropped: the same text with the same label came before.",)
    data = data.take(list(first.values()))
    if evaluation is None:
        drawn_from, rest = _cut(data, POOL_SHARE, np.random.default_rng(seed))
        data, evaluation = data.take(np.sort(drawn_from)), data.take(np.sort(rest))
    tested = set(_keys(evaluation))
    kept = [i for i, key in enumerate(_keys(data)) if key not in tested]
    if len(kept) < len(data):
        notes += (f"{count(len(data) - len(kept), 'text')} to draw from dropped: also among the test texts.",)
    if len(evaluation) < SMALLEST_SPLIT:
        raise BadData(
            f"There would be {count(len(evaluation), 'test text')}, and at least {SMALLEST_SPLIT} are needed: give "
            "more data."
        )
    return data.take(kept), evaluation, notes


def draw_shots(labels: Array, num_classes: int, shots: int, *, seed: Sequence[int]) -> Array:
    """The places of `shots` texts of every class, at random [C, K].

    The first k columns are the draw of k shots: more shots add texts to those of fewer, so that a curve over shots
    moves by what they teach. Every class must have as many texts.
    """
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.searchsorted(labels[by_class], np.arange(num_classes))
    drawn: Array = by_class[starts[:, None] + np.arange(shots)]
    return drawn


def unit_rows(embeddings: Array) -> Array:
    """Rows of length 1 [N, D], whatever lengths a model gives them; a row of zeros stays one."""
    rows = embeddings.astype(np.float64)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Array = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    return result


def fit_and_answer(embeddings: Array, labels: Array, asked: Array) -> Array:
    """The classes [M] that a logistic regression, fitted to unit rows [N, D] with their labels [N], gives to others
    [M, D].
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(C=REGULARIZATION, max_iter=MOST_STEPS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the answers settle long before the weights do
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)  # one shot of each is meant
        classifier.fit(embeddings, labels)
    answers: Array = np.asarray(classifier.predict(asked), dtype=np.int64)
    return answers
