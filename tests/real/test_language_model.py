"""A real language model, pruned through the public command: what it loses, and that stock transformers opens it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

CHARACTERS = 200_000  # of the stories: enough to score with, and soon judged


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("stories")
    text = folder / "stories.txt"
    text.write_text((assets / "data/tinystories/tinystories_cased_940k.txt").read_text(encoding="utf-8")[:CHARACTERS])
    asked = ["--neurons", "10%", "--uniform", "--recover", "reconstruct", "--max-drop", "20%"]
    command = [sys.executable, "-m", "paredown", "prune", str(assets / "models/stories260k"), "--data", str(text)]
    command += [*asked, "--out", str(folder / "slim"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def test_what_it_loses_is_known(run: dict[str, Any]) -> None:
    """Perplexity 5.5 on stories that were not learnt from by the re-fit; a tenth of the neurons costs about a tenth."""
    dense, pruned = (run[key]["perplexity"] for key in ("metrics_dense", "metrics_pruned"))
    assert run["accepted"] and 5 < dense < 6.5
    assert dense < pruned < 1.18 * dense
    assert run["parameters_pruned"] < run["parameters_dense"]


def test_it_still_tells_stories(run: dict[str, Any]) -> None:
    writing = run["generation"]
    assert writing["dense"]["tokens"] == writing["pruned"]["tokens"] == 256
    assert writing["pruned"]["repeated_ngrams"] < writing["dense"]["repeated_ngrams"] + 0.25
    assert writing["warnings"] == []


def test_stock_transformers_opens_it_and_caches(run: dict[str, Any]) -> None:
    folder = Path(run["bundle"]) / "huggingface"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(folder)("Once upon a time", return_tensors="pt")["input_ids"]
    how = {"max_new_tokens": 40, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    fast, slow = (model.generate(ids, use_cache=cached, **how) for cached in (True, False))
    assert torch.equal(fast, slow) and fast.shape[1] > ids.shape[1] + 20
