"""What good means: one file per task, with the data it reads and its metrics.

Every task file has `NAME`, `METRIC`, `load` and the functions of `Task`, so that whoever prunes or validates needs to
know only the module. Files that begin with an underscore are shared by the tasks; what other folders need of them is
imported from here.
"""

from __future__ import annotations

from typing import Protocol

from paredown.tasks._augment import augment
from paredown.tasks._linear_probe import LinearProbe
from paredown.tasks._shots import draw_shots, fit_and_answer, pool_and_test, unit_rows
from paredown.tasks._table import TEXT_COLUMNS, Table, intent_parts, read_table
from paredown.tasks._text import (
    Splits,
    TextData,
    Tokens,
    length_sorted_batches,
    pad,
    run_batches,
    similar_lengths,
    split,
    tokenize,
)
from paredown.tasks._tfidf import Tfidf, fit_tfidf
from paredown.types import Array

__all__ = [
    "TEXT_COLUMNS",
    "LinearProbe",
    "Splits",
    "Table",
    "Task",
    "TextData",
    "Tfidf",
    "Tokens",
    "augment",
    "draw_shots",
    "fit_and_answer",
    "fit_tfidf",
    "intent_parts",
    "length_sorted_batches",
    "pad",
    "pool_and_test",
    "read_table",
    "run_batches",
    "similar_lengths",
    "split",
    "tokenize",
    "unit_rows",
]


class Task(Protocol):
    """The module of a task, as the stages see it.

    `outputs` come from the model that is measured and `reference` from the dense one. Both are [M, ...] with
    M = len(all_texts(data)); what is given per example has N = len(data) entries.
    """

    NAME: str
    METRIC: str

    def metric_name(self, data: TextData) -> str:
        """The metric that the gate looks at for this data; larger is better."""

    def all_texts(self, data: TextData) -> tuple[str, ...]:
        """The M texts that the model must encode."""

    def metrics(self, outputs: Array, data: TextData, reference: Array) -> dict[str, float]:
        """Every metric of the task by name."""

    def per_example(self, outputs: Array, data: TextData, reference: Array) -> Array:
        """One figure per example [N], larger is better, whose mean is a metric of the task."""
