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
) -> TextData:
    """The texts of a file with their labels as the model's class indices.

    `labels` is the model's `config.label2id`. A label matches by its exact name, then by its name in other capitals;
    whole numbers are taken as class indices when no name matches at all. With `require_labels` (evaluation data) the
    file must have labels, of two classes or more. Without it a file without labels, or with gaps among them, gives
    labels None. Raises BadData that names file, line and what is wrong.
    """
    table = read_table(path, wanted=(text_column, label_column))
    text_column = text_column or table.first_of(TEXT_COLUMNS)
    if text_column is None:
        raise BadData(f"{table.path}: no column of texts found among {table.listed}; name it with --text-column.")
    label_column = label_column or table.first_of([name for name in LABEL_COLUMNS if name != text_column])
    if label_column is None and require_labels:
        raise BadData(f"{table.path}: no column of labels found among {table.listed}; name it with --label-column.")
    texts = table.column(text_column)
    rows, notes = usable_rows(table, texts)
    ids: Array | None = None
    if label_column is not None:
        names = table.column(label_column)
        names = [names[row] for row in rows]
        gaps = [row for row, name in zip(rows, names, strict=True) if not name.strip()]
        if gaps and require_labels:
            raise BadData(f"{table.path}, line {table.lines[gaps[0]]}: this row has no label.")
        if gaps:
            notes = (*notes, f"{table.path}: {count(len(gaps), 'row')} without a label, so its labels are not used.")
        else:
            ids, more = _class_indices(table, rows, names, labels or {})
            notes = (*notes, *more)
    if ids is not None and len(np.unique(ids)) < 2:
        if require_labels:
            raise BadData(f"{table.path}: all texts have the label {names[0]!r}; evaluation needs two classes or more.")
        notes = (*notes, f"{table.path}: all texts have the label {names[0]!r}, so nothing is fitted to the labels.")
    return TextData(tuple(texts[row] for row in rows), ids, notes=notes)


def label_names(path: str | Path, *, text_column: str | None = None, label_column: str | None = None) -> list[str]:
    """The labels of a file as it spells them, one per row; empty where no column of labels is found."""
    table = read_table(path, wanted=(text_column, label_column))
    label_column = label_column or table.first_of([name for name in LABEL_COLUMNS if name != text_column])
    return [] if label_column is None else [name for name in table.column(label_column) if name.strip()]


def _class_indices(
    table: Table, rows: Sequence[int], names: Sequence[str], known: Mapping[str, int]
) -> tuple[Array, tuple[str, ...]]:
    folded: dict[str, set[int]] = {}
    for name, index in known.items():
        folded.setdefault(name.strip().casefold(), set()).add(index)
    found: dict[str, int | None] = {}
    for name in dict.fromkeys(names):
        same = folded.get(name.strip().casefold(), set())
        found[name] = known[name] if name in known else next(iter(same)) if len(same) == 1 else None
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
