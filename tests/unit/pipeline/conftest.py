"""A tiny classifier with data that it answers rightly by construction."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from paredown.encoder import Encoder
from paredown.models import load_model
from paredown.pipeline._prepare import describe_loaded, outputs_of
from paredown.tasks import tokenize
from tests.contracts.families import LABELS, save, tiny, tiny_tokenizer


@dataclass(frozen=True)
class Desk:
    model: Path
    train: Path
    test: Path


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Desk:
    folder = tmp_path_factory.mktemp("desk")
    model = save(tiny("bert"), folder / "model")
    tiny_tokenizer("bert").save_pretrained(model)
    loaded = load_model(model)
    words = [word for word in loaded.tokenizer.get_vocab() if word.isalnum()]
    rng = np.random.default_rng(0)
    texts = sorted({" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(1200)})
    rng.shuffle(texts)
    encoder = Encoder(loaded.model, describe_loaded(loaded, loaded.model).layout)
    tokens = tokenize(loaded.tokenizer, texts, max_length=40, input_names=encoder.input_names)
    labels = [LABELS[i] for i in outputs_of(encoder, tokens).argmax(1)]
    assert len(set(labels)) > 1
    write(folder / "train.csv", texts[:500], labels[:500])
    write(folder / "test.csv", texts[500:], labels[500:])
    return Desk(model, folder / "train.csv", folder / "test.csv")


@pytest.fixture(scope="session")
def tale(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny language model and a text."""
    folder = tmp_path_factory.mktemp("tale")
    model = tiny("llama", max_position_embeddings=64, num_hidden_layers=4)
    words = sorted(word for word in tiny_tokenizer("llama").get_vocab() if word.isalnum())
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, 40)) for _ in range(600)]
    text = folder / "tale.txt"
    text.write_text("\n\n".join(lines))
    return save(model, folder / "model"), text


def write(path: Path, texts: Sequence[str], labels: Sequence[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "category"])
        writer.writerows(zip(texts, labels, strict=True))
