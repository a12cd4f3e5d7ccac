"""A tiny classifier with data that it answers rightly by construction."""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paredown.encoder import Encoder
from paredown.files import replacing
from paredown.models import load_model
from paredown.pipeline import _candidates, _fewshot, _policies, _validate
from paredown.pipeline._prepare import describe_loaded, outputs_of
from paredown.targets import export_stock
from paredown.tasks import tokenize
from tests.contracts.families import LABELS, save, tiny, tiny_tokenizer


@pytest.fixture(autouse=True, scope="session")
def _dense_models_are_exported_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Torch's exporter takes seconds, and nearly every test here prunes the same model. What it writes is tested where
    it is written, in tests/contracts.
    """
    made, folder = dict[str, Path](), tmp_path_factory.mktemp("exported")

    def once(encoder: Any, path: Path) -> Path:
        digest = hashlib.sha256(repr((type(encoder), encoder.layout, encoder.model.config, encoder.model)).encode())
        for name, tensor in encoder.state_dict().items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        key = digest.hexdigest()
        if key not in made:
            made[key] = export_stock(encoder, folder / f"{key}.onnx")
        with replacing(Path(path)) as beside:
            shutil.copyfile(made[key], beside)
        return Path(path)

    with pytest.MonkeyPatch.context() as patch:
        for module in (_candidates, _fewshot, _policies, _validate):
            patch.setattr(module, "export_stock", once)
        yield


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
