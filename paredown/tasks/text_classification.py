"""Sorting texts into the classes of a fine-tuned classifier: outputs are logits [N, C], labels are class indices [N].

Legend: N texts, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from paredown.errors import BadData
from paredown.tasks._table import TEXT_COLUMNS, Table, count, read_table, usable_rows
from paredown.tasks._text import TextData
from paredown.types import Array

NAME = "text-classification"
METRIC = "accuracy"
LABEL_COLUMNS = ("label", "category", "intent", "class", "target")

_INTEGER = re.compile(r"\d{1,9}(\.0+)?")  # pandas writes 3.0 where a column once had a gap


def load(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    labels: Mapping[str, int] | None,
    require_labels: bool = True,
    part: str = "train",
) -> TextData:
    """The texts of a file with their labels as the model's class indices.

    `labels` is the model's `config.label2id`. A label matches by its exact name, then by its name in other capitals;
    whole numbers are taken as class indices when no name matches at all. With `require_labels` (evaluation data) the
    file must have labels, of two classes or more. Without it a file without labels, or with gaps among them, gives
    labels None. Of a file of intents the `part` is read. Raises BadData that names file, line and what is wrong.
    """
    table = read_table(path, wanted=(text_column, label_column), part=part)
    texts, rows, names, notes = _columns(table, text_column, label_column, require_labels)
    ids: Array | None = None
    if names is not None:
        ids, more = _class_indices(table, rows, names, labels or {})
        notes = (*notes, *more)
        if len(np.unique(ids)) < 2:
            if require_labels:
                raise BadData(_one_class(table, names, "evaluation"))
            said = f"{table.path}: all texts have the label {names[0]!r}, so nothing is fitted to the labels."
            notes = (*notes, said)
    return TextData(texts, ids, notes=notes)


def load_named(
    path: str | Path,
    *,
    text_column: str | None = None,
    label_column: str | None = None,
    known: Sequence[str] | None = None,
    part: str = "train",
) -> tuple[TextData, tuple[str, ...]]:
    """The texts of a file whose labels no model knows, and the names that its label indices stand for, sorted.

    With `known`, the names that another file gave, indices are those of that file, and a label that matches none of
    its names, capitals aside, is an error. Raises BadData that names file, line and what is wrong.
    """
    table = read_table(path, wanted=(text_column, label_column), part=part)
    texts, rows, names, notes = _columns(table, text_column, label_column, require_labels=True)
    assert names is not None
    if len(set(names)) < 2:
        raise BadData(_one_class(table, names, "a classifier"))
    listed = tuple(sorted(set(names)) if known is None else known)
    found = _matched(names, {name: index for index, name in enumerate(listed)})
    for row, name in zip(rows, names, strict=True):
        if found[name] is None:
            raise BadData(f"{table.path}, line {table.lines[row]}: no text to learn from has the label {name!r}.")
    return TextData(texts, np.array([found[name] for name in names], dtype=np.int64), notes=notes), listed


def has_labels(path: str | Path, label_column: str | None = None) -> bool:
    """Whether a column of labels was named, or is found in the file."""
    return label_column is not None or read_table(path).first_of(LABEL_COLUMNS) is not None


def _columns(
    table: Table, text_column: str | None, label_column: str | None, require_labels: bool
) -> tuple[tuple[str, ...], list[int], list[str] | None, tuple[str, ...]]:
    """The usable texts, the rows that they stand in, their labels by name, and what is to be said; labels are None
    where the file has none, or gaps among them.
    """
    text_column = text_column or table.first_of(TEXT_COLUMNS)
    if text_column is None:
        raise BadData(f"{table.path}: no column of texts found among {table.listed}; name it with --text-column.")
    label_column = label_column or table.first_of([name for name in LABEL_COLUMNS if name != text_column])
    if label_column is None and require_labels:
        raise BadData(f"{table.path}: no column of labels found among {table.listed}; name it with --label-column.")
    cells = table.column(text_column)
    rows, notes = usable_rows(table, cells)
    texts = tuple(cells[row] for row in rows)
    if label_column is None:
        return texts, rows, None, notes
    labels = table.column(label_column)
    names = [labels[row] for row in rows]
    gaps = [row for row, name in zip(rows, names, strict=True) if not name.strip()]
    if gaps and require_labels:
        raise BadData(f"{table.path}, line {table.lines[gaps[0]]}: this row has no label.")
    if gaps:
        said = f"{table.path}: {count(len(gaps), 'row')} without a label, so its labels are not used."
        return texts, rows, None, (*notes, said)
    return texts, rows, names, notes


def _one_class(table: Table, names: Sequence[str], what: str) -> str:
    return f"{table.path}: all texts have the label {names[0]!r}; {what} needs two classes or more."


def _matched(names: Sequence[str], known: Mapping[str, int]) -> dict[str, int | None]:
    """The class index of each name, by its exact name, else in other capitals; None where that is none, or several."""
    folded: dict[str, set[int]] = {}
    for name, index in known.items():
        folded.setdefault(name.strip().casefold(), set()).add(index)
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(names):
        same = folded.get(name.strip().casefold(), set())
        found[name] = known[name] if name in known else next(iter(same)) if len(same) == 1 else None
    return found


def _class_indices(
    table: Table, rows: Sequence[int], names: Sequence[str], known: Mapping[str, int]
) -> tuple[Array, tuple[str, ...]]:
    found = _matched(names, known)
    notes: tuple[str, ...] = ()
    numbers = {name: int(float(name)) for name in found if _INTEGER.fullmatch(name.strip())}
    indices = set(known.values())
    if all(index is None for index in found.values()) and len(numbers) == len(found):
        found = {name: number if not known or number in indices else None for name, number in numbers.items()}
        notes = (f"{table.path}: the labels are numbers and are read as the model's class indices.",)
    for row, name in zip(rows, names, strict=True):
        if found[name] is None:
            if not known:
                raise BadData(f"{table.path}, line {table.lines[row]}: label {name!r}, but the model names no labels.")
            first = ", ".join(repr(label) for label in list(known)[:5]) + (", ..." if len(known) > 5 else "")
            raise BadData(
                f"{table.path}, line {table.lines[row]}: the model does not know the label {name!r}; "
                f"its {len(known)} labels are {first}."
            )
    return np.array([found[name] for name in names], dtype=np.int64), notes


def metric_name(data: TextData) -> str:
    """The metric that the gate looks at: "accuracy"."""
    return METRIC


def all_texts(data: TextData) -> tuple[str, ...]:
    """The N texts to encode."""
    return data.texts


def metrics(outputs: Array, data: TextData, reference: Array | None = None) -> dict[str, float]:
    """`accuracy` and `macro_f1` (the mean over all classes that occur in the labels or the predictions)."""
    labels = _labels(data)
    predicted = np.argmax(outputs, axis=1)
    num_classes = max(outputs.shape[1], int(labels.max()) + 1)
    hits = np.bincount(labels[predicted == labels], minlength=num_classes)
    total = np.bincount(labels, minlength=num_classes) + np.bincount(predicted, minlength=num_classes)
    f1 = 2 * hits[total > 0] / total[total > 0]
    return {"accuracy": float(per_example(outputs, data).mean()), "macro_f1": float(f1.mean())}


def per_example(outputs: Array, data: TextData, reference: Array | None = None) -> Array:
    """1.0 for a right answer, 0.0 for a wrong one [N]; logits that are not finite are wrong."""
    right = (np.argmax(outputs, axis=1) == _labels(data)) & np.isfinite(outputs).all(axis=1)
    result: Array = right.astype(np.float64)
    return result


def _labels(data: TextData) -> Array:
    if data.labels is None:
        raise BadData("This data has no labels, so accuracy cannot be measured.")
    return data.labels
