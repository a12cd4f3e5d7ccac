"""Texts as data: loading what a table holds, three disjoint splits, tokens, and length-sorted batches.

Legend: N texts, B texts of a batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from paredown.errors import BadData, UnsupportedModel
from paredown.tasks._table import count
from paredown.types import Array

SMALLEST_SPLIT = 8  # with fewer texts than this no figure means anything
_CHUNK = 1024  # texts per tokenizer call: bounds memory, costs nothing
BATCH_TOKENS = 4096  # padding included: the 3072 activations of a BERT-base layer take 50 MB then


@dataclass(frozen=True)
class TextData:
    """N texts and, where the file has them, integer labels [N], second texts (pairs), and float scores [N].

    `notes` are plain sentences about what was dropped or assumed while reading.
    """

    texts: tuple[str, ...]
    labels: Array | None = None
    pairs: tuple[str, ...] | None = None
    scores: Array | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | Array) -> TextData:
        """The examples at `indices`, in that order. The notes are about the whole and stay behind."""
        at = np.asarray(indices, dtype=np.int64)
        return TextData(
            texts=tuple(self.texts[i] for i in at),
            labels=None if self.labels is None else self.labels[at],
            pairs=None if self.pairs is None else tuple(self.pairs[i] for i in at),
            scores=None if self.scores is None else self.scores[at],
        )


# --------------------------------------------------------------------------------------------------------- the splits


@dataclass(frozen=True)
class Splits:
    """Three sets of examples that share no text, each in a seeded random order. `notes` gathers all that was said."""

    calibration: TextData
    guardrail: TextData
    test: TextData
    notes: tuple[str, ...]


def split(data: TextData, evaluation: TextData | None, *, seed: int = 0, guardrail_share: float = 0.6) -> Splits:
    """Calibration from `data`, guardrail and test from `evaluation`: cut at random, by label where there are labels.

    Without `evaluation`, 60 % of `data` calibrates and the rest is cut. Texts that are equal up to case and white
    space never lie in two splits: a repeat is dropped from calibration first, from test next. For pairs that holds of
    every single sentence between calibration and the others, and of whole pairs between guardrail and test.
    Raises BadData if a split keeps fewer than 8 examples.
    """
    rng = np.random.default_rng(seed)
    notes = data.notes
    if evaluation is None:
        first, rest = _cut(data, 0.6, rng)
        data, evaluation = data.take(first), data.take(rest)
    else:
        notes += evaluation.notes
        data = data.take(rng.permutation(len(data)))
    inside, outside = _cut(evaluation, guardrail_share, rng)
    guardrail, test = evaluation.take(inside), evaluation.take(outside)
    held_out = {text for key in _keys(evaluation) for text in key}
    kept = [i for i, key in enumerate(_keys(data)) if held_out.isdisjoint(key)]
    calibration, repeats = data.take(kept), len(data) - len(kept)
    if repeats:
        notes += (f"{count(repeats, 'calibration text')} dropped: also in the evaluation data.",)
    test, repeats = _without(test, set(_keys(guardrail)))
    if repeats:
        notes += (f"{count(repeats, 'test text')} dropped: also in the guardrail split.",)
    for name, part in (("calibration", calibration), ("guardrail", guardrail), ("test", test)):
        if len(part) < SMALLEST_SPLIT:
            raise BadData(
                f"The {name} split would hold {count(len(part), 'text')} once repeats across the splits are dropped; "
                f"at least {SMALLEST_SPLIT} are needed: give more data."
            )
    return Splits(calibration, guardrail, test, notes)


def _cut(data: TextData, share: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """Indices of `share` of the data and of the rest; each label is shared out in the same proportion."""
    order = rng.permutation(len(data))
    if data.labels is not None:
        order = order[np.argsort(data.labels[order], kind="stable")]
    # Systematic sampling along the sorted order: the quota of every label is met to within one example.
    steps = np.floor(np.arange(len(data) + 1) * share + 1e-9)
    chosen = np.diff(steps) > 0
    return rng.permutation(order[chosen]), rng.permutation(order[~chosen])


def _keys(data: TextData) -> list[tuple[str, ...]]:
    columns = (data.texts,) if data.pairs is None else (data.texts, data.pairs)
    return [tuple(" ".join(text.split()).casefold() for text in row) for row in zip(*columns, strict=True)]


def _without(data: TextData, keys: set[tuple[str, ...]]) -> tuple[TextData, int]:
    kept = [i for i, key in enumerate(_keys(data)) if key not in keys]
    return data.take(kept), len(data) - len(kept)


# --------------------------------------------------------------------------------------------------------- the tokens


@dataclass(frozen=True)
class Tokens:
    """Token ids of N texts, each an int64 array [T_i]; `truncated` of them were longer than the model takes.

    The windows of a language model say whose they are (`owner` [N], an index of a text) and how many of their last
    tokens are judged (`scored` [N]).
    """

    ids: tuple[Array, ...]
    pad_id: int
    input_names: tuple[str, ...]
    truncated: int
    owner: Array | None = None
    scored: Array | None = None

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> Array:
        """The number of tokens of every text [N], special tokens included."""
        return np.array([len(ids) for ids in self.ids], dtype=np.int64)

    def take(self, rows: Array) -> Tokens:
        """Those of some rows, in that order."""
        owner, scored = (None if part is None else part[rows] for part in (self.owner, self.scored))
        return replace(self, ids=tuple(self.ids[i] for i in rows), owner=owner, scored=scored)


def tokenize(tokenizer: Any, texts: Sequence[str], *, max_length: int, input_names: Sequence[str]) -> Tokens:
    """Token ids of single texts by a transformers tokenizer, cut at `max_length` tokens, special tokens included."""
    if tokenizer.pad_token_id is None:
        raise UnsupportedModel(f"The tokenizer {type(tokenizer).__name__} has no padding token, so it cannot batch.")
    ids: list[Array] = []
    truncated = 0
    for start in range(0, len(texts), _CHUNK):
        chunk = list(texts[start : start + _CHUNK])
        # One token more than allowed tells a text that just fits from one that is too long.
        rows = tokenizer(chunk, truncation=True, max_length=max_length + 1)["input_ids"]
        too_long = [i for i, row in enumerate(rows) if len(row) > max_length]
        if too_long:
            shorter = tokenizer([chunk[i] for i in too_long], truncation=True, max_length=max_length)["input_ids"]
            for i, row in zip(too_long, shorter, strict=True):
                rows[i] = row
        truncated += len(too_long)
        ids += [np.asarray(row, dtype=np.int64) for row in rows]
    return Tokens(tuple(ids), int(tokenizer.pad_token_id), tuple(input_names), truncated)


def pad(ids: Sequence[Array], *, pad_id: int, input_names: Sequence[str]) -> dict[str, Array]:
    """The model's int64 inputs [B, T], padded on the right to the longest text; all tokens are of type 0."""
    lengths = np.array([len(row) for row in ids])
    real = np.arange(lengths.max(initial=0)) < lengths[:, None]
    tokens = np.full(real.shape, pad_id, dtype=np.int64)
    tokens[real] = np.concatenate(ids) if len(ids) else 0
    arrays = {
        "input_ids": tokens,
        "attention_mask": real.astype(np.int64),
        "token_type_ids": np.zeros_like(tokens),
    }
    return {name: arrays[name] for name in input_names}


def length_sorted_batches(
    tokens: Tokens,
    *,
    batch_size: int = 64,
    indices: Sequence[int] | Array | None = None,
    most_tokens: int = BATCH_TOKENS,
) -> list[tuple[Array, dict[str, Array]]]:
    """Batches of similar length, short ones first: (which texts [B], their inputs [B, T] padded to the longest).

    B is at most `batch_size`, and B * T at most `most_tokens` unless one text alone is longer.
    """
    return list(_batches(tokens, batch_size, indices, most_tokens))


def _batches(
    tokens: Tokens,
    batch_size: int,
    indices: Sequence[int] | Array | None = None,
    most_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[Array, dict[str, Array]]]:
    chosen = np.arange(len(tokens)) if indices is None else np.asarray(indices, dtype=np.int64)
    for at in similar_lengths(tokens.lengths, chosen, batch_size=batch_size, most_tokens=most_tokens):
        yield at, pad([tokens.ids[i] for i in at], pad_id=tokens.pad_id, input_names=tokens.input_names)


def similar_lengths(
    lengths: Array, chosen: Array, *, batch_size: int = 64, most_tokens: int = BATCH_TOKENS
) -> list[Array]:
    """The chosen texts as batches of similar length, short ones first, within both limits."""
    order = chosen[np.argsort(lengths[chosen], kind="stable")]
    batches, start = [], 0
    while start < len(order):
        sorted_lengths = lengths[order[start : start + batch_size]]
        padded = sorted_lengths * np.arange(1, len(sorted_lengths) + 1)
        size = max(1, int((padded <= most_tokens).sum()))
        batches.append(order[start : start + size])
        start += size
    return batches


def run_batches(run: Callable[[Mapping[str, Array]], Array], tokens: Tokens, *, batch_size: int = 64) -> Array:
    """The outputs [N, ...] of `run` over all texts, in their own order; it is called with length-sorted batches."""
    if not len(tokens):
        raise ValueError("there is no text to run")
    outputs: Array | None = None
    for at, inputs in _batches(tokens, batch_size):
        got = np.asarray(run(inputs))
        if outputs is None:
            outputs = np.empty((len(tokens), *got.shape[1:]), dtype=got.dtype)
        outputs[at] = got
    assert outputs is not None
    return outputs
