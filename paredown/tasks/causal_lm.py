"""Continuing text: outputs are [N, 2], the log-likelihood of a text in nats and the number of tokens it is the sum of.

Perplexity is taken over strided windows at the model's context (the usual evaluation of GPT-2 and after): a long text
is cut into windows that overlap, and each token is judged once, in the window in which it has most before it.

Legend: N texts, W windows, B windows of a batch, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paredown.errors import BadData
from paredown.tasks._table import TEXT_COLUMNS, read_table, read_text, usable_rows
from paredown.tasks._text import TextData, Tokens, pad, similar_lengths
from paredown.types import Array

NAME = "causal-lm"
METRIC = "log_likelihood"

PASSAGES = 100  # of a plain text: 60 calibrate, 24 guard and 16 test where there is no other file
PASSAGE = (400, 32_000)  # characters of one: a sentence or two at least, several contexts of 2,048 tokens at most
ENDS = "<|endoftext|>"  # what collections of stories and web pages put between their texts


def load(path: str | Path, *, text_column: str | None = None) -> TextData:
    """The texts of a table (.csv .tsv .jsonl .json), or the passages of a plain text file.

    A plain text is cut at its end marks, or where lines are empty, into about a hundred passages that follow one
    another, so that calibration and evaluation can be kept apart. Raises BadData that names file, line and what is
    wrong.
    """
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".tsv", ".jsonl", ".json"):
        return TextData(passages(read_text(path)))
    table = read_table(path, wanted=(text_column,))
    text_column = text_column or table.first_of(TEXT_COLUMNS)
    if text_column is None:
        raise BadData(f"{table.path}: no column of texts found among {table.listed}; name it with --text-column.")
    texts = table.column(text_column)
    rows, notes = usable_rows(table, texts)
    return TextData(tuple(texts[row] for row in rows), notes=notes)


def passages(text: str) -> tuple[str, ...]:
    """Pieces of a long text, in order and of about one length, that begin and end where lines are empty."""
    parts = text.split(ENDS) if ENDS in text else re.split(r"(?<=\n)\s*\n", text)
    size = min(max(len(text) // PASSAGES, PASSAGE[0]), PASSAGE[1])
    joint = "\n" if ENDS not in text else "\n\n"
    found: list[str] = []
    held: list[str] = []
    for part in parts:
        held.append(part)
        if sum(map(len, held)) >= size:
            found.append(joint.join(held).strip())
            held = []
    found.append(joint.join(held).strip())
    return tuple(piece for piece in found if piece)


def windows(tokenizer: Any, texts: Sequence[str], *, max_length: int, stride: int | None = None) -> Tokens:
    """Token ids of the windows of all texts; `owner` says of which text, `scored` how many last tokens are judged.

    A window has at most `max_length` tokens. It begins with the tokenizer's first token, if that puts one before every
    text, and moves on by `stride` tokens, half a window by default: so every token but a text's first ones has at least
    half a window before it.
    """
    first = _first_token(tokenizer)
    width = max_length - len(first)
    step = max(1, min(stride or width // 2, width - (not first)))  # a row's own first token is not judged
    padding = next((int(i) for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    ids: list[Array] = []
    owner: list[int] = []
    scored: list[int] = []
    for index, text in enumerate(texts):
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] or [padding]
        done = 0
        while done < len(tokens):
            end = min(width if not done else done + step, len(tokens))
            row = np.array([*first, *tokens[max(0, end - width) : end]], dtype=np.int64)
            judged = min(end - done, len(row) - 1)  # nothing comes before a row's own first token
            ids.append(row)
            owner.append(index)
            scored.append(judged)
            done = end
    names = ("input_ids", "attention_mask")
    return Tokens(tuple(ids), padding, names, 0, owner=np.array(owner, int), scored=np.array(scored, int))


def _first_token(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before every text: [bos], or nothing."""
    found = tokenizer("a", add_special_tokens=True)["input_ids"]
    return [int(found[0])] if found and found[0] == tokenizer.bos_token_id else []


def next_tokens(arrays: Mapping[str, Array]) -> Array:
    """What follows each real token of a padded batch, row after row [real tokens]; -100 after the last of a row."""
    ids, mask = arrays["input_ids"], arrays["attention_mask"].astype(bool)
    following = np.full(ids.shape, -100, dtype=np.int64)
    following[:, :-1] = np.where(mask[:, 1:], ids[:, 1:], -100)
    real: Array = following[mask]
    return real


def likelihoods(run: Callable[[Mapping[str, Array]], Array], tokens: Tokens, *, texts: int) -> Array:
    """Outputs [N, 2] of `texts` texts. `run` gives, for a padded batch, the log-likelihood of each next token [B, T-1].

    What it gives for padding is not read.
    """
    assert tokens.owner is not None and tokens.scored is not None
    found = np.zeros((texts, 2))
    for rows in similar_lengths(tokens.lengths, np.arange(len(tokens))):
        arrays = pad([tokens.ids[i] for i in rows], pad_id=tokens.pad_id, input_names=tokens.input_names)
        got = np.asarray(run(arrays), dtype=np.float64)
        last = tokens.lengths[rows][:, None] - 1
        place = np.arange(got.shape[1])[None]
        judged = (place < last) & (place >= last - tokens.scored[rows][:, None])
        np.add.at(found, tokens.owner[rows], np.stack([np.where(judged, got, 0.0).sum(1), judged.sum(1)], axis=1))
    return found


def metric_name(data: TextData) -> str:
    """The metric that the gate looks at: the mean log-likelihood of a token in nats, minus the log of perplexity."""
    return METRIC


def all_texts(data: TextData) -> tuple[str, ...]:
    """The N texts."""
    return data.texts


def metrics(outputs: Array, data: TextData, reference: Array) -> dict[str, float]:
    """`perplexity` over all tokens, and `log_likelihood`, the mean over them in nats."""
    mean = float(outputs[:, 0].sum() / outputs[:, 1].sum())
    return {"log_likelihood": mean, "perplexity": float(np.exp(-mean))}


def per_example(outputs: Array, data: TextData, reference: Array) -> Array:
    """The log-likelihood of each text [N], in units in which their mean is that of all tokens."""
    found: Array = outputs[:, 0] / outputs[:, 1].mean()
    return found
