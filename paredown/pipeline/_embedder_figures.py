"""What a training of a sentence encoder brought, each figure with an interval.

Legend: N texts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from paredown.encoder import Encoder
from paredown.errors import ParityFailure
from paredown.models import EMBEDDING, LoadedModel, load_model, silenced
from paredown.pipeline import _loaders
from paredown.pipeline._examples import Examples
from paredown.pipeline._prepare import describe_loaded, outputs_of, task_of, timing_batches
from paredown.pipeline._settings import Progress
from paredown.tasks import TextData, Tokens, text_embedding, tokenize
from paredown.types import Anatomy, Array, Interval
from paredown.validation.quality import paired_drop
from paredown.validation.timing import Alternative, measure, ratio

ROUNDS = 9
RESAMPLES = 2000
PROBES = 8  # texts by which the folder is compared with what was trained
TOLERANCE = 1e-5  # of a coordinate, against the longest embedding: the same kernels on the same machine


@dataclass(frozen=True)
class SentenceEncoder:
    """A model that turns texts into vectors, with its anatomy."""

    loaded: LoadedModel
    anatomy: Anatomy

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.loaded.model, self.anatomy.layout)

    def tokens(self, texts: Sequence[str]) -> Tokens:
        names = self.encoder.input_names
        return tokenize(self.loaded.tokenizer, texts, max_length=self.loaded.max_length, input_names=names)

    def embed(self, texts: Sequence[str]) -> Array:
        return outputs_of(self.encoder, self.tokens(texts))


def open_encoder(source: str, max_length: int | None) -> SentenceEncoder:
    """The sentence encoder of a folder or a hub name; UnsupportedModel where it is none."""
    loaded = load_model(source, task=EMBEDDING)
    loaded = replace(loaded, max_length=min(loaded.max_length, max_length or loaded.max_length))
    return SentenceEncoder(loaded, describe_loaded(loaded, loaded.model))


def against_teacher(
    teacher: SentenceEncoder, before: SentenceEncoder, after: SentenceEncoder, tested: Examples
) -> list[dict[str, Any]]:
    """Cosine to the teacher and shared neighbours and, where there are scores, Spearman."""
    data = tested.as_pairs()
    texts = text_embedding.all_texts(data)
    great, old, new = (one.embed(texts) for one in (teacher, before, after))
    found = []
    each = [text_embedding.metrics(outputs, data, great) for outputs in (great, old, new)]
    sides = [text_embedding.per_example(outputs, data, great) for outputs in (old, new)]
    for name in each[0]:
        row = {"metric": name, "teacher": each[0][name], "before": each[1][name], "after": each[2][name]}
        if name == "cosine":
            row["change"] = _gain(*sides)
        elif name == "spearman":
            row["change"] = _spearman_gain(old, new, data)
            row["below_teacher"] = paired_drop(task_of(EMBEDDING), great, new, data).interval
        found.append(row)
    return found


def figures(before: SentenceEncoder, after: SentenceEncoder, tested: Examples) -> list[dict[str, Any]]:
    """By what is tested: Spearman of scores, else how often the nearest text has the same label, or is the partner."""
    data = tested.as_pairs()
    texts = text_embedding.all_texts(data)
    old, new = (one.embed(texts) for one in (before, after))
    if tested.scores is not None:
        sides = [text_embedding.pair_similarity(outputs, data) for outputs in (old, new)]
        scores = [float(text_embedding.spearman(near, tested.scores)) for near in sides]
        row = {"metric": "spearman", "before": scores[0], "after": scores[1], "change": _spearman_gain(old, new, data)}
        return [row]
    name = "partner_nearest" if tested.labels is None else "label_of_nearest"
    sides = [_nearest_is_right(outputs, tested.labels) for outputs in (old, new)]
    means = [float(side.mean()) for side in sides]
    return [{"metric": name, "before": means[0], "after": means[1], "change": _gain(*sides)}]


def _nearest_is_right(outputs: Array, labels: Array | None) -> Array:
    """1.0 or 0.0 for each text [N]: whether the nearest other text has its label; without labels [2N, D] are texts and
    then their partners, and the nearest of all partners has to be its own.
    """
    rows = outputs / np.maximum(np.linalg.norm(outputs, axis=1, keepdims=True), 1e-12)
    if labels is None:
        half = len(rows) // 2
        similar = rows[:half] @ rows[half:].T
        right: Array = similar.diagonal() >= similar.max(1) - 1e-6  # two rows may have the same partner
        return right.astype(np.float64)
    near = rows @ rows.T
    np.fill_diagonal(near, -np.inf)
    right = labels[near.argmax(1)] == labels
    return right.astype(np.float64)


def _gain(old: Array, new: Array) -> Interval:
    """The mean of new - old, paired, with its 95 % bootstrap interval over examples."""
    gained = new - old
    drawn = np.random.default_rng(0).integers(0, len(gained), (RESAMPLES, len(gained)))
    low, high = np.quantile(gained[drawn].mean(1), [0.025, 0.975])
    return Interval(float(gained.mean()), float(low), float(high))


def _spearman_gain(old: Array, new: Array, data: TextData) -> Interval:
    lost = paired_drop(task_of(EMBEDDING), old, new, data).interval
    return Interval(-lost.value, -lost.high, -lost.low)


def speed(
    teacher: SentenceEncoder, student: Path, tested: Examples, *, threads: int | None, seed: int, progress: Progress
) -> dict[str, Any]:
    """Teacher and student on plain torch, in turn."""
    progress.stage("Timing, interleaved", ROUNDS)
    batches, singles = timing_batches(teacher.tokens(tested.every_text()))
    options = {"task": EMBEDDING}
    timed = measure(
        [
            Alternative("teacher", _loaders.STOCK, teacher.loaded.source, options),
            Alternative("student", _loaders.STOCK, str(student), options),
        ],
        batches,
        singles=singles,
        rounds=ROUNDS,
        threads=threads,
        seconds=60,
        seed=seed,
        progress=lambda done, of: progress.advance(ROUNDS / of),
    )
    rows = [
        {
            "name": name,
            "texts_per_second": timing.texts_per_second,
            "latency_ms_p50": timing.latency_ms_p50,
            "latency_ms_p90": timing.latency_ms_p90,
            "speedup": ratio(timed["teacher"], timing),
        }
        for name, timing in timed.items()
    ]
    return {"timing": rows, "speedup": ratio(timed["teacher"], timed["student"]), "target": "torch"}


def check_same(after: SentenceEncoder, folder: Path, tested: Examples) -> None:
    """Raises ParityFailure when sentence-transformers reads another model out of the folder than `load_model`."""
    from sentence_transformers import SentenceTransformer

    texts = tested.every_text()[:PROBES]
    with silenced():
        stock = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
        theirs = stock.encode(list(texts), show_progress_bar=False, convert_to_numpy=True)
    ours = after.embed(texts)
    off = float(np.abs(ours - theirs).max() / max(1e-12, float(np.linalg.norm(ours, axis=1).max())))
    if off > TOLERANCE:
        raise ParityFailure(f"sentence-transformers computes something else: embeddings differ by {off:.2g}")
