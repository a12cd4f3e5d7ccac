from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown.anatomy import describe
from paredown.decoder import Decoder
from paredown.errors import BadData
from paredown.tasks import TextData
from paredown.tasks import causal_lm as task
from paredown.types import Array
from tests.contracts.families import tiny


class Letters:
    """A tokenizer of single letters, with or without a first token."""

    pad_token_id, eos_token_id = None, 2

    def __init__(self, first: bool = True):
        self.bos_token_id = 1 if first else None
        self.first = [1] if first else []

    def __call__(self, text: str, *, add_special_tokens: bool, verbose: bool = True) -> dict[str, Any]:
        return {"input_ids": (self.first if add_special_tokens else []) + [ord(c) - 90 for c in text]}


TEXT = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("stride", [None, 3, 100])
def test_every_token_is_judged_once(first: bool, stride: int | None) -> None:
    tokens = task.windows(Letters(first), [TEXT, "ab"], max_length=9, stride=stride)
    assert tokens.owner is not None and tokens.scored is not None and tokens.pad_id == 2
    assert tokens.lengths.max() <= 9
    judged = [
        list(ids[len(ids) - n :])
        for ids, n, who in zip(tokens.ids, tokens.scored, tokens.owner, strict=True)
        if not who
    ]
    seen = [token for part in judged for token in part]
    assert seen == [ord(c) - 90 for c in TEXT[0 if first else 1 :]]  # nothing comes before the very first token
    assert all(ids[0] == 1 for ids in tokens.ids) is first
    assert tokens.owner[-1] == 1 and tokens.scored[-1] == 2 - (not first)


def test_a_token_has_half_a_window_before_it() -> None:
    tokens = task.windows(Letters(False), [TEXT], max_length=8)
    assert tokens.scored is not None
    assert tokens.scored.tolist() == [7, 4, 4, 4, 4, 2]
    assert all(len(ids) == 8 for ids in tokens.ids)


def test_outputs_are_sums_over_what_is_judged() -> None:
    tokens = task.windows(Letters(), [TEXT, "xyz"], max_length=9)
    seen: list[float] = []

    def run(arrays: Any) -> Array:
        ids = arrays["input_ids"][:, 1:].astype(float)
        seen.append(ids.size)
        return np.where(arrays["attention_mask"][:, 1:] > 0, -ids, 1e9)

    outputs = task.likelihoods(run, tokens, texts=2)
    assert outputs.tolist() == [[-sum(ord(c) - 90 for c in t), len(t)] for t in (TEXT, "xyz")]
    data = TextData((TEXT, "xyz"))
    mean = outputs[:, 0].sum() / 29
    assert task.per_example(outputs, data, outputs).mean() == pytest.approx(mean)
    assert task.metrics(outputs, data, outputs)["perplexity"] == pytest.approx(np.exp(-mean))


def test_perplexity_is_that_of_transformers() -> None:
    model = tiny("llama")
    decoder = Decoder(model, describe(model).layout)
    ids = torch.randint(3, 60, (3, 20), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 12:] = 0
    with torch.no_grad():
        got = decoder.log_likelihood(ids, mask)
        stock = model(input_ids=ids[1:2, :12], labels=ids[1:2, :12]).loss
    assert got.shape == (3, 19) and torch.all(got[1, 11:] == 0)
    assert torch.allclose(-got[1, :11].mean(), stock, atol=1e-5)


def test_next_tokens_stay_within_their_text() -> None:
    arrays = {"input_ids": np.array([[5, 6, 7], [8, 9, 0]]), "attention_mask": np.array([[1, 1, 1], [1, 1, 0]])}
    assert task.next_tokens(arrays).tolist() == [6, 7, -100, 9, -100]


def test_a_plain_text_becomes_passages(tmp_path: Path) -> None:
    stories = [f"Story {i} begins.\n\nAnd it ends, as story {i} does." for i in range(400)]
    for joint in ("\n\n", f"\n{task.ENDS}\n"):
        path = tmp_path / "a.txt"
        path.write_text(joint.join(stories))
        texts = task.load(path).texts
        assert 20 < len(texts) <= 101
        assert " ".join(" ".join(texts).split()) == " ".join(" ".join(stories).split())  # nothing lost, order kept
        assert all(len(text) >= task.PASSAGE[0] for text in texts[:-1])
    with pytest.raises(BadData, match="empty"):
        path.write_text(" \n")
        task.load(path)


def test_a_table_gives_a_text_per_row(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,one\n2,\n3,three\n")
    data = task.load(path)
    assert data.texts == ("one", "three") and "empty text" in data.notes[0]
    with pytest.raises(BadData, match="no column of texts"):
        path.write_text("a,b\n1,2\n")
        task.load(path)
