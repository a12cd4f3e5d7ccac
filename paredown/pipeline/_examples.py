"""What a sentence encoder is trained on: pairs of texts, texts with labels, or texts alone, and what is set aside.

Texts that are equal up to case and white space never lie in two parts. Legend: N rows, K partners.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paredown.errors import BadData
from paredown.tasks import TEXT_COLUMNS, Table, TextData, read_table
from paredown.tasks.text_classification import LABEL_COLUMNS
from paredown.tasks.text_embedding import PAIR_COLUMNS, SCORE_COLUMNS
from paredown.types import Array

PARTNER_COLUMNS = (("anchor", "positive"), ("query", "positive"), ("question", "answer"), *PAIR_COLUMNS)
NEGATIVE_COLUMNS = ("negative",)
ALIKE = 0.8  # of the highest score: from here on a scored pair counts as one that means the same (STS-B: 4 of 5)
PARTNERS = 4  # of its label that a text is paired with, a different one in every round through the texts
HELD = 0.1  # of the rows that judge, and that are tested at the end,
MOST_JUDGED, MOST_TESTED = 400, 2000  # so many: judging must not take the time for learning
FEWEST = 8  # rows of a part: with fewer no figure means anything


@dataclass(frozen=True)
class Examples:
    """N texts, and what the file has beside them: `partners`, hard `negatives`, `labels` [N] or `scores` [N]."""

    texts: tuple[str, ...]
    partners: tuple[str, ...] | None = None
    negatives: tuple[str, ...] | None = None
    labels: Array | None = None
    scores: Array | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> Examples:
        """Those of some rows, in that order, without the notes."""
        at = np.array(list(rows), dtype=np.int64)

        def of(part: tuple[str, ...] | None) -> tuple[str, ...] | None:
            return None if part is None else tuple(part[i] for i in at)

        labels, scores = (None if part is None else part[at] for part in (self.labels, self.scores))
        return Examples(tuple(self.texts[i] for i in at), of(self.partners), of(self.negatives), labels, scores)

    def every_text(self) -> tuple[str, ...]:
        """All texts of all rows, each once."""
        return tuple(dict.fromkeys((*self.texts, *(self.partners or ()), *(self.negatives or ()))))

    def keys(self) -> list[set[str]]:
        """What the texts of each row are known by: they without case and white space."""
        columns = [part for part in (self.texts, self.partners, self.negatives) if part is not None]
        return [{" ".join(text.split()).casefold() for text in row} for row in zip(*columns, strict=True)]

    def as_pairs(self) -> TextData:
        """The same as the task text-embedding has it."""
        return TextData(self.texts, pairs=self.partners, scores=self.scores)


def read(path: str, columns: Mapping[str, str | None], *, labelled: bool = True) -> Examples:
    """The rows of a table, without those that lack a text.

    `columns` names the "text", "pair", "negative", "label" and "score" columns. What is not named is looked for: a pair
    of `PARTNER_COLUMNS`, else texts with labels (if `labelled`), else texts alone. Raises BadData that names file, line
    and what is wrong.
    """
    table = read_table(path, wanted=tuple(columns.values()))
    text, pair = columns.get("text"), columns.get("pair")
    if text is None and pair is None and columns.get("label") is None:
        for one, other in PARTNER_COLUMNS:
            if table.first_of([one]) and table.first_of([other]):
                text, pair = table.first_of([one]), table.first_of([other])
                break
    text = text or table.first_of(TEXT_COLUMNS)
    if text is None:
        raise BadData(f"{table.path}: no column of texts found among {table.listed}; name it with --text-column.")
    negative = columns.get("negative") or (table.first_of(NEGATIVE_COLUMNS) if pair else None)
    score = columns.get("score") or (table.first_of(SCORE_COLUMNS) if pair else None)
    label = None if pair or not labelled else columns.get("label") or table.first_of(LABEL_COLUMNS)
    if pair is None and (columns.get("score") or columns.get("negative")):
        raise BadData(f"{table.path}: scores and negatives need a column of second texts too: --pair-column.")
    names = [text, *filter(None, (pair, negative))]
    cells = [table.column(name) for name in names]
    rows = [i for i, row in enumerate(zip(*cells, strict=True)) if all(cell.strip() for cell in row)]
    if not rows:
        raise BadData(f"{table.path}: every row has an empty text.")
    notes = table.notes
    if len(rows) < len(table):
        notes += (f"{table.path}: {len(table) - len(rows):,} rows with an empty text are left out.",)
    kept = [tuple(column[i] for i in rows) for column in cells]
    return Examples(
        kept[0],
        kept[1] if pair else None,
        kept[-1] if negative else None,
        None if label is None else _labels(table, label, rows),
        None if score is None else _scores(table, score, rows),
        notes,
    )


def _labels(table: Table, column: str, rows: Sequence[int]) -> Array:
    """Integers [N], a number for each name."""
    names = table.column(column)
    for row in rows:
        if not names[row].strip():
            raise BadData(f"{table.path}, line {table.lines[row]}: this row has no label.")
    _, numbers = np.unique([names[row].strip() for row in rows], return_inverse=True)
    labels: Array = numbers.astype(np.int64)
    return labels


def _scores(table: Table, column: str, rows: Sequence[int]) -> Array:
    cells, found = table.column(column), []
    for row in rows:
        try:
            found.append(float(cells[row]))
        except ValueError:
            found.append(math.nan)
        if not math.isfinite(found[-1]):
            raise BadData(f"{table.path}, line {table.lines[row]}: the score {cells[row]!r} is not a number.")
    return np.array(found)


def alike(data: Examples, path: str, minimum: float | None) -> Examples:
    """The pairs that mean the same: all, but of scored ones those with `minimum` or more (by default `ALIKE`)."""
    if data.scores is None:
        return data
    least = ALIKE * float(data.scores.max()) if minimum is None else minimum
    rows = np.flatnonzero(data.scores >= least)
    if not len(rows):
        raise BadData(f"{path}: no pair has a score of {least:g} or more, so there is nothing that belongs together.")
    said = f"{len(rows):,} of {len(data):,} pairs have a score of {least:g} or more: these are learnt."
    return replace(data.take(rows), notes=(*data.notes, said))


# ------------------------------------------------------------------------------------------------------------ the parts


@dataclass(frozen=True)
class Parts:
    """What is `learnt`, what judges the states of a training, and what is `tested` at its end: they share no text."""

    learnt: Examples
    judged: Examples
    tested: Examples
    notes: tuple[str, ...] = ()


def divided(data: Examples, tested: Examples | None, *, path: str, seed: int) -> Parts:
    """Three parts drawn at random; without `tested` a tenth of the rows is tested. Labels are shared out alike.

    A row is left out of a part when one of its texts is in a later one. Raises BadData when a part keeps fewer than
    eight rows, or when labels have too few texts to make pairs.
    """
    rng = np.random.default_rng(seed)
    notes = data.notes + (tested.notes if tested else ())
    if data.labels is not None:
        data, repeated = _once(data)
        if repeated:
            notes += (f"{repeated:,} texts that come again are left out.",)
        _check_labels(data, path)
    shares = _by_label(data, tested is None, rng) if data.labels is not None else _at_random(data, tested is None, rng)
    learnt, judged, last = (data.take(rows) for rows in shares)
    tested = last if tested is None else tested.take(rng.permutation(len(tested))[:MOST_TESTED])
    judged = _without(judged, tested)
    before = len(learnt)
    learnt = _without(_without(learnt, tested), judged)
    if len(learnt) < before:
        notes += (f"{before - len(learnt):,} rows are not learnt: they share a text with the held-out ones.",)
    if data.labels is not None:  # of a label whose other texts were held out, no pair is left
        learnt, judged = (_paired(part) for part in (learnt, judged))
    for part, what in ((learnt, "to learn from"), (judged, "to judge by"), (tested, "to test with")):
        if len(part) < FEWEST:
            raise BadData(f"{path}: {len(part)} rows would be left {what}, and {FEWEST} are needed: give more data.")
    return Parts(learnt, judged, tested, notes)


def _without(part: Examples, other: Examples) -> Examples:
    known = set().union(*other.keys())
    return part.take(i for i, key in enumerate(part.keys()) if known.isdisjoint(key))


def _once(data: Examples) -> tuple[Examples, int]:
    """Each text once, and how many came again."""
    first: dict[str, int] = {}
    for row, key in enumerate(data.keys()):
        first.setdefault(next(iter(key)), row)
    return data.take(first.values()), len(data) - len(first)


def _paired(data: Examples) -> Examples:
    assert data.labels is not None
    counts = np.bincount(data.labels)
    return data.take(np.flatnonzero(counts[data.labels] > 1))


def _check_labels(data: Examples, path: str) -> None:
    assert data.labels is not None
    counts = np.bincount(data.labels)
    if len(counts) < 2:
        raise BadData(f"{path}: all texts have the same label, so there is nothing to tell them from.")
    if (counts < 2).any():
        text = data.texts[int(np.flatnonzero(data.labels == int(counts.argmin()))[0])]
        raise BadData(
            f"{path}: the label of {text[:60]!r} has one text only, and a pair takes two: add one, or drop it."
        )


def _at_random(data: Examples, test: bool, rng: np.random.Generator) -> list[Array]:
    order = rng.permutation(len(data))
    share = max(1, math.ceil(HELD * len(data)))
    tested = min(share, MOST_TESTED) if test else 0
    judged = min(share, MOST_JUDGED)
    return [order[tested + judged :], order[tested : tested + judged], order[:tested]]


def _by_label(data: Examples, test: bool, rng: np.random.Generator) -> list[Array]:
    """Of each label two texts at least in every part, or none."""
    assert data.labels is not None
    most = [MOST_JUDGED, MOST_TESTED if test else 0]
    count = int(data.labels.max()) + 1
    learnt, held = [], [[np.zeros(0, np.int64)], [np.zeros(0, np.int64)]]
    for label in range(count):
        rows = rng.permutation(np.flatnonzero(data.labels == label))
        for part, limit in zip(held, most, strict=True):
            size = max(2, min(round(HELD * len(rows)), limit // count)) if limit else 0
            if len(rows) >= size + 2:
                part.append(rows[:size])
                rows = rows[size:]
        learnt.append(rows)
    return [rng.permutation(np.concatenate(part)) for part in (learnt, *held)]


def columns_to_learn(data: Examples, *, partners: int, seed: int) -> dict[str, Any]:
    """The columns "anchor", "positive" and what else `Lesson` takes.

    A text with a label is paired with up to `partners` others of its label, drawn at random.
    """
    if data.labels is None:
        assert data.partners is not None
        found: dict[str, Any] = {"anchor": list(data.texts), "positive": list(data.partners)}
        return found | ({} if data.negatives is None else {"negative": list(data.negatives)})
    rng = np.random.default_rng(seed)
    anchors: list[int] = []
    positives: list[int] = []
    for label in np.unique(data.labels):
        rows = np.flatnonzero(data.labels == label)
        for row in rows:
            others = rows[rows != row]
            drawn = rng.choice(others, min(partners, len(others)), replace=False)
            anchors += [int(row)] * len(drawn)
            positives += [int(other) for other in drawn]
    found = {"anchor": [data.texts[i] for i in anchors], "positive": [data.texts[i] for i in positives]}
    return found | {"label": [int(data.labels[i]) for i in anchors]}
