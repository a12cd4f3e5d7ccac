"""Turning texts into vectors: outputs are embeddings [N, D], judged against the dense model's or against human scores.

For data with pairs the N texts and their N partners are encoded one after the other, so outputs are [2N, D].
Legend: N texts, D width, R resamples.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from paredown.errors import BadData
from paredown.tasks._table import TEXT_COLUMNS, read_table, usable_rows
from paredown.tasks._text import TextData
from paredown.types import Array

NAME = "text-embedding"
METRIC = "cosine"
PAIR_COLUMNS = (("sentence1", "sentence2"), ("text_a", "text_b"))
SCORE_COLUMNS = ("score",)

_NEIGHBOURS = 10
_SAMPLE = 2000  # texts for the neighbour overlap: its standard error is then below half a point
_CHUNK = 256  # rows of the similarity matrix held at a time


def load(
    path: str | Path,
    *,
    text_column: str | None = None,
    pair_column: str | None = None,
    score_column: str | None = None,
    part: str = "train",
) -> TextData:
    """The texts of a file and, where it has them, their partners and the similarity scores of the pairs.

    Columns that are not named are looked for: sentence1/sentence2 or text_a/text_b with score, else one column of
    texts. A file without a header takes column numbers from 1 (STS-B: "6", "7", "5"). Of a file of intents the `part`
    is read. Raises BadData that names file, line and what is wrong.
    """
    table = read_table(path, wanted=(text_column, pair_column, score_column), part=part)
    if text_column is None and pair_column is None:
        for names in PAIR_COLUMNS:
            found = [table.first_of([name]) for name in names]
            if None not in found:
                text_column, pair_column = found
                break
    text_column = text_column or table.first_of(TEXT_COLUMNS)
    if text_column is None:
        raise BadData(f"{table.path}: no column of texts found among {table.listed}; name it with --text-column.")
    if score_column is not None and pair_column is None:
        raise BadData(f"{table.path}: a column of scores needs a column of second texts too.")
    if pair_column is not None and score_column is None:
        score_column = table.first_of(SCORE_COLUMNS)
    texts = table.column(text_column)
    partners = None if pair_column is None else table.column(pair_column)
    rows, notes = usable_rows(table, texts, *([] if partners is None else [partners]))
    scores: Array | None = None
    if score_column is not None:
        cells = table.column(score_column)
        scores = np.array([_score(table.path, table.lines[row], cells[row]) for row in rows])
    return TextData(
        texts=tuple(texts[row] for row in rows),
        pairs=None if partners is None else tuple(partners[row] for row in rows),
        scores=scores,
        notes=notes,
    )


def _score(path: Path, line: int, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise BadData(f"{path}, line {line}: the score {cell!r} is not a number.")
    return value


def metric_name(data: TextData) -> str:
    """The metric that the gate looks at: "spearman" where the data has scores, else "cosine"."""
    return METRIC if data.scores is None else "spearman"


def all_texts(data: TextData) -> tuple[str, ...]:
    """The texts to encode: N, or for pairs 2N with the partners after the texts."""
    return data.texts + (data.pairs or ())


def metrics(outputs: Array, data: TextData, reference: Array) -> dict[str, float]:
    """`cosine` to the dense model (mean), `neighbour_overlap_at_10`, and `spearman` where the data has scores.

    The overlap is the mean share of a text's 10 nearest neighbours by cosine that the dense model names too, over all
    texts or 2,000 of them drawn at random.
    """
    found = {
        "cosine": float(per_example(outputs, data, reference).mean()),
        "neighbour_overlap_at_10": neighbour_overlap(outputs, reference),
    }
    if data.scores is not None:
        found["spearman"] = float(spearman(pair_similarity(outputs, data), data.scores))
    return found


def per_example(outputs: Array, data: TextData, reference: Array) -> Array:
    """Cosine to the dense model's embedding [N]; for pairs the mean over the two sides."""
    cosine = _cosine(outputs, reference)
    if data.pairs is not None:
        cosine = cosine.reshape(2, len(data)).mean(axis=0)
    return cosine


def neighbour_overlap(outputs: Array, reference: Array) -> float:
    """The mean share of the 10 nearest neighbours (fewer where there are fewer texts) that both embeddings agree on."""
    chosen = np.arange(len(outputs))
    if len(chosen) > _SAMPLE:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, _SAMPLE, replace=False))
    ours, theirs = (_unit(rows[chosen]).astype(np.float32) for rows in (outputs, reference))
    count = min(_NEIGHBOURS, len(chosen) - 1)
    if count < 1:
        return 1.0
    shared = 0
    for start in range(0, len(chosen), _CHUNK):
        shared += int((_nearest(ours, start, count) & _nearest(theirs, start, count)).sum())
    return shared / (count * len(chosen))


def _nearest(unit: Array, start: int, count: int) -> Array:
    """Which texts are among the nearest of each text of the chunk: bool [chunk, N]."""
    similarity = unit[start : start + _CHUNK] @ unit.T
    rows = np.arange(len(similarity))
    similarity[rows, start + rows] = -np.inf
    near = np.zeros(similarity.shape, dtype=bool)
    np.put_along_axis(near, np.argpartition(-similarity, count - 1, axis=1)[:, :count], True, axis=1)
    return near


def pair_similarity(outputs: Array, data: TextData) -> Array:
    """Cosine between the two sides of every pair [N], from outputs [2N, D]."""
    return _cosine(outputs[: len(data)], outputs[len(data) :])


def spearman(x: Array, y: Array, counts: Array | None = None) -> Array:
    """Spearman's rank correlation of x [N] and y [N], ties sharing their mean rank: a scalar array.

    With `counts` [R, N], that of R samples in which example i occurs counts[r, i] times [R], without sorting again.
    0 where either side is constant.
    """
    single = counts is None
    times = np.ones((1, len(x))) if counts is None else counts.astype(np.float64)
    total = times.sum(axis=1, keepdims=True)
    a, b = (_mean_ranks(values, times) for values in (x, y))
    a, b = (ranks - (times * ranks).sum(axis=1, keepdims=True) / total for ranks in (a, b))
    weighted = times * a
    covariance = (weighted * b).sum(axis=1)
    spread = np.sqrt((weighted * a).sum(axis=1) * (times * b * b).sum(axis=1))
    result: Array = np.divide(covariance, spread, out=np.zeros_like(covariance), where=spread > 0)
    return result[0] if single else result


def _mean_ranks(values: Array, times: Array) -> Array:
    """The mean rank [R, N] of each example among `times` [R, N] copies of all of them."""
    distinct, group = np.unique(values, return_inverse=True)
    order = np.argsort(group, kind="stable")
    starts = np.searchsorted(group[order], np.arange(len(distinct)))
    sizes = np.add.reduceat(times[:, order], starts, axis=1)
    ranks: Array = (np.cumsum(sizes, axis=1) - sizes / 2)[:, group]
    return ranks


def _unit(rows: Array) -> Array:
    """Rows of length 1; a row of zeros, or one that is not finite, becomes zeros: it is like nothing."""
    rows = rows.astype(np.float64)
    rows = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    result: Array = np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
    return result


def _cosine(rows: Array, others: Array) -> Array:
    result: Array = (_unit(rows) * _unit(others)).sum(axis=1)
    return result
