from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
from transformers import BertTokenizer, DistilBertTokenizer, ElectraTokenizer, MPNetTokenizer, RobertaTokenizer

from paredown.errors import BadData, UnsupportedModel
from paredown.tasks import TextData, Tokens, length_sorted_batches, pad, run_batches, split, tokenize
from paredown.types import Array

LETTERS = "abcdefghijkl"
ALL_NAMES = ("input_ids", "attention_mask", "token_type_ids")


def data_of(count: int, prefix: str = "text", classes: int = 4) -> TextData:
    labels = np.arange(count) * classes // count  # sorted by class, as files often are
    return TextData(tuple(f"{prefix} {i}" for i in range(count)), labels)


def keys(data: TextData) -> set[str]:
    return {" ".join(text.split()).casefold() for text in data.texts}


# --------------------------------------------------------------------------------------------------------- the splits


def test_take_keeps_every_column_together() -> None:
    data = TextData(("a", "b", "c"), np.array([0, 1, 2]), ("x", "y", "z"), np.array([0.0, 0.5, 1.0]), ("said",))
    part = data.take([2, 0])
    assert (part.texts, part.pairs, part.notes) == (("c", "a"), ("z", "x"), ())
    assert part.labels is not None and part.labels.tolist() == [2, 0]
    assert part.scores is not None and part.scores.tolist() == [1.0, 0.0]


@pytest.mark.parametrize("with_evaluation", [True, False])
def test_splits_are_disjoint_whole_seeded_and_stratified(with_evaluation: bool) -> None:
    data, evaluation = data_of(400), data_of(200, "other") if with_evaluation else None
    parts = split(data, evaluation)
    sizes = (len(parts.calibration), len(parts.guardrail), len(parts.test))
    assert sizes == ((400, 120, 80) if with_evaluation else (240, 96, 64))
    sets = [keys(part) for part in (parts.calibration, parts.guardrail, parts.test)]
    assert len(set.union(*sets)) == sum(sizes)
    for part in (parts.calibration, parts.guardrail, parts.test):
        assert part.labels is not None
        assert np.ptp(np.bincount(part.labels, minlength=4)) <= 1
        assert np.ptp(np.bincount(part.labels[: len(part) // 2], minlength=4)) < len(part) // 4, "still sorted by class"
        source = {text: label for d in (data, evaluation) if d for text, label in zip(d.texts, d.labels, strict=True)}
        assert [source[text] for text in part.texts] == part.labels.tolist()
    assert split(data, evaluation).guardrail.texts == parts.guardrail.texts
    assert split(data, evaluation, seed=1).guardrail.texts != parts.guardrail.texts
    assert not parts.notes


def test_repeats_are_dropped_from_calibration_then_from_test_and_counted() -> None:
    data = TextData(tuple(f"c {i}" for i in range(20)) + ("SHARED   one", "shared two", "SHARED   one"), notes=("n1",))
    evaluation = TextData(
        tuple(f"e {i}" for i in range(60)) + ("shared one", "Shared Two") + ("again",) * 20, notes=("n2",)
    )
    parts = split(data, evaluation)
    calibration, guardrail, test = (keys(part) for part in (parts.calibration, parts.guardrail, parts.test))
    assert not (calibration & guardrail or calibration & test or guardrail & test)
    assert len(parts.calibration) == 20
    assert "again" in guardrail and "again" not in test
    lost = len(evaluation) - len(parts.guardrail) - len(parts.test)
    assert lost == 20 - parts.guardrail.texts.count("again") > 0
    assert parts.notes == (
        "n1",
        "n2",
        "3 calibration texts dropped: also in the evaluation data.",
        f"{lost} test texts dropped: also in the guardrail split.",
    )


def test_a_sentence_of_an_evaluation_pair_is_not_calibrated_on() -> None:
    data = TextData(tuple(f"a {i}" for i in range(30)))
    pairs = TextData(tuple(f"b {i}" for i in range(40)), pairs=tuple(f"A  {i}" for i in range(29, 69)))
    parts = split(data, pairs)
    assert len(parts.calibration) == 29  # "a 29" is the second sentence of a pair
    assert any("1 calibration text" in note for note in parts.notes)


def test_guardrail_and_test_repeat_only_when_both_sides_do() -> None:
    data = TextData(tuple(f"c {i}" for i in range(30)))
    parts = split(data, TextData(("same",) * 40, pairs=tuple(f"p {i}" for i in range(40))))
    assert (len(parts.guardrail), len(parts.test)) == (24, 16)


def test_too_small_a_split_is_refused() -> None:
    with pytest.raises(BadData, match="calibration split would hold 0 texts"):
        split(data_of(40), data_of(40))
    with pytest.raises(BadData, match="test split would hold 7 texts"):
        split(data_of(40, classes=1), data_of(17, "other", classes=1))


# --------------------------------------------------------------------------------------------------------- the tokens


def tokenizers() -> dict[str, Any]:
    bert = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS])}
    fair = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "[UNK]", "<mask>", *LETTERS])}
    spaced = dict(fair) | {f"\u0120{letter}": len(fair) + i for i, letter in enumerate(LETTERS)}
    merges = [("\u0120", letter) for letter in LETTERS]
    return {
        "bert": BertTokenizer(vocab=bert),
        "distilbert": DistilBertTokenizer(vocab=bert),
        "electra": ElectraTokenizer(vocab=bert),
        "mpnet": MPNetTokenizer(vocab=fair),
        "roberta": RobertaTokenizer(vocab=spaced | {"\u0120": len(spaced)}, merges=merges),
    }


@pytest.mark.parametrize("family", list(tokenizers()))
def test_tokenize_counts_exactly_the_texts_that_are_too_long(family: str) -> None:
    tokenizer = tokenizers()[family]
    texts = ["a", "a b c d", "a b c d e", "", "a b c d e f g h"]
    tokens = tokenize(tokenizer, texts, max_length=6, input_names=ALL_NAMES)
    assert tokens.lengths.tolist() == [3, 6, 6, 2, 6]
    assert tokens.truncated == 2
    assert all(ids[0] == tokenizer.cls_token_id and ids[-1] == tokenizer.sep_token_id for ids in tokens.ids)
    assert tokens.ids[4].tolist() == tokens.ids[1].tolist() == tokenizer("a b c d")["input_ids"]
    assert tokens.pad_id == tokenizer.pad_token_id
    assert len(tokenizer("a b c d e f g h")["input_ids"]) == 10, "the caller's tokenizer still cuts"


def test_tokenize_is_the_same_across_its_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizers()["bert"]
    texts = [" ".join(LETTERS[: 1 + i % 9]) for i in range(50)]
    whole = tokenize(tokenizer, texts, max_length=7, input_names=ALL_NAMES)
    monkeypatch.setattr("paredown.tasks._text._CHUNK", 8)
    chunked = tokenize(tokenizer, texts, max_length=7, input_names=ALL_NAMES)
    assert [ids.tolist() for ids in whole.ids] == [ids.tolist() for ids in chunked.ids]
    assert whole.truncated == chunked.truncated == sum(1 + i % 9 > 5 for i in range(50))


def test_a_tokenizer_without_padding_is_refused() -> None:
    tokenizer = tokenizers()["bert"]
    tokenizer.pad_token = None
    with pytest.raises(UnsupportedModel, match="no padding token"):
        tokenize(tokenizer, ["a"], max_length=6, input_names=ALL_NAMES)


def test_pad() -> None:
    arrays = pad([np.array([5, 6, 7]), np.array([8])], pad_id=1, input_names=ALL_NAMES)
    assert tuple(arrays) == ALL_NAMES
    assert all(array.dtype == np.int64 for array in arrays.values())
    assert arrays["input_ids"].tolist() == [[5, 6, 7], [8, 1, 1]]
    assert arrays["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert arrays["token_type_ids"].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert tuple(pad([np.array([5])], pad_id=0, input_names=ALL_NAMES[:2])) == ALL_NAMES[:2]


def tokens_of(lengths: list[int]) -> Tokens:
    return Tokens(tuple(np.full(length, i + 1) for i, length in enumerate(lengths)), 0, ALL_NAMES, 0)


def test_batches_are_sorted_by_length_and_padded_to_their_longest() -> None:
    tokens = tokens_of([5, 2, 9, 2, 4])
    batches = length_sorted_batches(tokens, batch_size=2)
    assert [at.tolist() for at, _ in batches] == [[1, 3], [4, 0], [2]]
    assert [inputs["input_ids"].shape for _, inputs in batches] == [(2, 2), (2, 5), (1, 9)]
    assert [at.tolist() for at, _ in length_sorted_batches(tokens, batch_size=2, indices=[0, 2, 1])] == [[1, 0], [2]]


def test_run_batches_gives_outputs_in_the_texts_order() -> None:
    lengths = [int(n) for n in np.random.default_rng(0).integers(1, 30, size=101)]

    def run(inputs: Mapping[str, Array]) -> Array:
        # The first id tells which text it is, the mask how long it is.
        return np.stack([inputs["input_ids"][:, 0], inputs["attention_mask"].sum(1)], axis=1).astype(np.float32)

    outputs = run_batches(run, tokens_of(lengths), batch_size=8)
    assert outputs.dtype == np.float32
    assert outputs.tolist() == [[i + 1, length] for i, length in enumerate(lengths)]
    with pytest.raises(ValueError, match="no text"):
        run_batches(run, tokens_of([]))
