from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from transformers import AutoTokenizer
from transformers.utils import logging as hf_logging

from paredown.anatomy import describe
from paredown.encoder import Encoder
from paredown.errors import UnsupportedModel
from paredown.models import build_empty, fingerprint, load_model, save_tokenizer
from tests.contracts.families import DECODERS, FAMILIES, LABELS, TASKS, batch, save, stock, tiny

CLASSIFIER, EMBEDDER = TASKS


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved BERT classifier with its tokenizer."""
    return save(tiny("bert"), tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    fields = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in fields.items() if value is not None}))


def refused(source: str | Path, *words: str, task: str | None = None) -> str:
    with pytest.raises(UnsupportedModel) as caught:
        load_model(source, task=task)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def sentence_transformer(root: Path, *, pooling: dict[str, Any], inner: str = "", extra: tuple[str, ...] = ()) -> Path:
    save(tiny("mpnet", EMBEDDER), root / inner)
    kinds = ("Transformer", "Pooling", *extra)
    paths = (inner, *(f"{i}_{kind}" for i, kind in enumerate(kinds[1:], 1)))
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate(zip(paths, kinds, strict=True))]  # fmt: skip
    (root / "modules.json").write_text(json.dumps(modules))
    (root / "1_Pooling").mkdir()
    (root / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 24, **pooling}))
    (root / inner / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 12, "do_lower_case": False}))
    return root


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_whole(family: str, task: str, tmp_path: Path) -> None:
    model = tiny(family, task)
    loaded = load_model(str(save(model, tmp_path / "model")))
    assert (loaded.task, loaded.normalize, loaded.source) == (task, False, str(tmp_path / "model"))
    assert loaded.pooling == ("cls" if task == CLASSIFIER else "mean")
    assert loaded.labels == ({name: i for i, name in enumerate(LABELS)} if task == CLASSIFIER else None)
    assert not loaded.model.training and {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.config is loaded.model.config
    assert torch.equal(stock(loaded.model, batch(model)), stock(model, batch(model)))
    inputs = loaded.tokenizer(["My card is lost", "pay"], return_tensors="pt", padding=True)
    assert inputs["input_ids"][1, -1] == model.config.pad_token_id
    encoder = Encoder(loaded.model, describe(loaded.model).layout)
    assert set(encoder.input_names) == set(inputs)
    with torch.no_grad():
        encoder(**inputs)


@pytest.mark.parametrize("family", FAMILIES)
def test_max_length_fits_the_position_table(family: str, tmp_path: Path) -> None:
    folder = save(tiny(family), tmp_path / "model")
    edit(folder / "tokenizer_config.json", model_max_length=10**30)
    loaded = load_model(folder)
    assert loaded.max_length == (38 if family in ("roberta", "xlm-roberta", "mpnet") else 40)
    ids = torch.full((1, loaded.max_length), 7)
    loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    with pytest.raises((IndexError, RuntimeError)):
        loaded.model(input_ids=torch.full((1, loaded.max_length + 1), 7))


def test_half_precision_is_loaded_as_fp32(tmp_path: Path) -> None:
    loaded = load_model(save(tiny("bert").half(), tmp_path / "model"))
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}


def test_task_may_be_chosen(folder: Path) -> None:
    loaded = load_model(folder, task=EMBEDDER)
    assert (loaded.task, loaded.labels, type(loaded.model).__name__) == (EMBEDDER, None, "BertModel")
    describe(loaded.model, task=EMBEDDER)
    refused(folder, "bert model, which does not do causal-lm", task="causal-lm")
    refused(folder, "no task 'chat'", CLASSIFIER, EMBEDDER, "causal-lm", task="chat")


@pytest.mark.parametrize("family", DECODERS)
def test_a_decoder_is_a_causal_language_model(family: str, tmp_path: Path) -> None:
    loaded = load_model(save(tiny(family, "causal-lm", vocab_size=64), tmp_path / "model"))  # Qwen2 adds a token
    assert (loaded.task, loaded.labels, loaded.max_length) == ("causal-lm", None, 38)
    assert describe(loaded.model).family in (family, "gemma3")
    with pytest.raises(UnsupportedModel, match="does not do text-embedding"):
        load_model(tmp_path / "model", task=EMBEDDER)


def test_an_untrained_pooler_is_left_out(tmp_path: Path) -> None:
    loaded = load_model(save(tiny("roberta"), tmp_path / "model"), task=EMBEDDER)  # its checkpoint has no pooler
    assert loaded.model.pooler is None
    with_pooler = load_model(save(tiny("roberta", EMBEDDER), tmp_path / "encoder"))
    assert with_pooler.model.pooler is not None
    assert describe(loaded.model).fingerprint == describe(with_pooler.model).fingerprint


def test_logging_is_left_as_it_was(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    verbosity, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    headless = save(tiny("bert", EMBEDDER), folder / "encoder")
    capfd.readouterr()
    load_model(folder)
    refused(headless, "lacks a trained classification head", task=CLASSIFIER)
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (verbosity, bars)
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------ sentence-transformers


@pytest.mark.parametrize("inner", ["", "0_Transformer"])
@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode": "cls", "include_prompt": True}, "cls"),
        ({"pooling_mode": ["mean"]}, "mean"),
        ({}, "mean"),
    ],
)
def test_sentence_transformers(tmp_path: Path, pooling: dict[str, Any], expected: str, inner: str) -> None:
    loaded = load_model(sentence_transformer(tmp_path, pooling=pooling, inner=inner, extra=("Normalize",)))
    assert (loaded.task, loaded.pooling, loaded.normalize, loaded.max_length) == (EMBEDDER, expected, True, 12)


def test_sentence_transformers_without_normalize(tmp_path: Path) -> None:
    assert not load_model(sentence_transformer(tmp_path, pooling={"pooling_mode": "mean"})).normalize


@pytest.mark.parametrize(
    ("pooling", "extra", "words"),
    [
        ({"pooling_mode": "mean"}, ("Dense",), ("Dense", "modules.json")),
        ({"pooling_mode_max_tokens": True}, (), ("max", "mean and cls")),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}, (), ("mean + cls",)),
        ({"pooling_mode": "mean", "include_prompt": False}, (), ("prompt",)),
    ],
)
def test_other_sentence_transformers_are_refused(
    tmp_path: Path, pooling: dict[str, Any], extra: tuple[str, ...], words: tuple[str, ...]
) -> None:
    refused(sentence_transformer(tmp_path, pooling=pooling, extra=extra), *words)


# ------------------------------------------------------------------------------------------------------------ bad input


def test_missing_places(tmp_path: Path) -> None:
    refused(tmp_path / "nothing", "no model folder", "nothing")
    refused("./nothing", "no model folder")
    refused("no-one/no-such-model", "'no-one/no-such-model'", "neither a model folder nor a hub model")
    (tmp_path / "file.txt").write_text("x")
    refused(tmp_path / "file.txt", "is a file")
    refused(tmp_path, "config.json")


def test_bad_configs(folder: Path) -> None:
    path = folder / "config.json"
    good = path.read_text()
    for changes, words in (
        ({"model_type": "t5"}, ("'t5'", *FAMILIES)),
        ({"model_type": None}, ("names no model_type",)),
        ({"problem_type": "regression"}, ("regression",)),
        ({"problem_type": "multi_label_classification"}, ("multi_label_classification",)),
        ({"id2label": {"0": "score"}, "label2id": {"score": 0}}, ("1 label", "regression")),
        ({"id2label": {"0": "a", "1": "a", "2": "b"}}, ("id2label",)),
        ({"auto_map": {"AutoModel": "modeling_mine.MyModel"}}, ("auto_map",)),
        ({"hidden_size": 48}, ("cannot be loaded",)),
        ({"num_attention_heads": "4"}, ("cannot be loaded", "num_attention_heads")),
        ({"id2label": {"one": "a", "two": "b"}}, ("cannot be loaded",)),
    ):
        path.write_text(good)
        edit(path, **changes)
        refused(folder, *words)
    path.write_text("{ not json")
    refused(folder, "config.json", "JSON")


def test_bad_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    refused(folder, "model.safetensors", "not a readable safetensors file")
    weights.write_bytes(b"\xff" * 64)
    refused(folder, "not a readable safetensors file")
    weights.unlink()
    refused(folder, "no model.safetensors")
    (folder / "pytorch_model.bin").write_bytes(whole)
    refused(folder, "pytorch_model.bin", "pickle", "AutoModelForSequenceClassification", "save_pretrained")


def test_bad_tokenizers(folder: Path) -> None:
    tokenizer = folder / "tokenizer.json"
    whole = tokenizer.read_text()
    tokenizer.write_text(whole[:-40])
    refused(folder, "tokenizer", "cannot be loaded")
    tokenizer.unlink()
    refused(folder, "holds no tokenizer")
    save(tiny("bert", vocab_size=50), folder / "small")
    refused(folder / "small", "61 tokens", "only 50")


# ------------------------------------------------------------------------------------------------------------ the shell


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_build_empty(family: str, task: str) -> None:
    model = tiny(family, task)
    empty = build_empty(json.loads(json.dumps(model.config.to_dict())), task)
    assert type(empty) is type(model) and not empty.training
    assert all(p.is_meta for p in empty.parameters()) and not any(b.is_meta for b in empty.buffers())
    assert fingerprint(empty) == fingerprint(model)
    expected = dict(model.named_buffers())
    assert expected.keys() == dict(empty.named_buffers()).keys()
    assert all(torch.equal(buffer, expected[name]) for name, buffer in empty.named_buffers())
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(stock(empty, batch(model)), stock(model, batch(model)))
    assert not next(tiny(family, task).parameters()).is_meta  # the hook is gone


def test_build_empty_cleans_up_after_an_error() -> None:
    with pytest.raises(ValueError):
        build_empty({"model_type": "bert", "hidden_size": 25, "num_attention_heads": 4}, CLASSIFIER)
    assert not torch.nn.Linear(2, 2).weight.is_meta


def test_a_folder_may_be_moved(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder, tmp_path / "elsewhere")
    assert load_model(tmp_path / "elsewhere").labels


def test_a_saved_tokenizer_cuts_where_the_model_ends(folder: Path, tmp_path: Path) -> None:
    """And not where the last call on it did; without transformers too."""
    loaded = load_model(folder)
    loaded.tokenizer(["my card is lost"], truncation=True, padding=True, max_length=4)
    save_tokenizer(loaded.tokenizer, tmp_path / "saved", max_length=9)
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").model_max_length == 9
    alone = tokenizers.Tokenizer.from_file(str(tmp_path / "saved" / "tokenizer.json"))
    assert [len(alone.encode(text).ids) for text in ("my card", "card " * 50)] == [4, 9]
    assert len(loaded.tokenizer("card " * 50)["input_ids"]) == 52  # the caller's is as it was
