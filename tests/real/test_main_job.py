"""The public command on the real model and data: training-free, so that it fits into a test run."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import paredown


@pytest.fixture(scope="module")
def run(assets: Path, banking77: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("real") / "slim"
    train, test = banking77(4, 2)
    command = [sys.executable, "-m", "paredown", "prune", str(assets / "models" / "minilm-banking77")]
    command += ["--data", str(train), "--eval", str(test), "--max-drop", "2%"]
    command += ["--minutes", "0", "--out", str(out), "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def test_it_is_accepted_and_the_dense_figure_is_the_known_one(run: dict[str, Any]) -> None:
    assert run["accepted"] is True
    assert run["quality_metric"] == "accuracy"
    assert run["quality_dense"] == pytest.approx(0.93, abs=0.015)  # 92.99 % on the whole file
    assert run["drop"]["value"] <= 0.03


def test_every_plan_was_timed_after_it_was_predicted(run: dict[str, Any]) -> None:
    assert {row["what"] for row in run["prediction"]} == {"1.3 times", "1.6 times", "2 times"}
    assert all(row["predicted_ms"] > 0 and row["measured_ms"] > 0 for row in run["prediction"])


def test_the_bundle_answers_as_the_report_says(run: dict[str, Any], assets: Path) -> None:
    bundle = paredown.load(run["bundle"])
    with (assets / "data" / "banking77" / "test.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    answers = bundle.labels_of(bundle.predict([row["text"] for row in rows]))
    accuracy = np.mean([a == row["category"] for a, row in zip(answers, rows, strict=True)])
    assert accuracy == pytest.approx(run["quality_pruned"], abs=0.02)


def test_the_onnx_file_runs_without_paredown(run: dict[str, Any]) -> None:
    code = (
        "import sys, numpy as np, onnxruntime as ort\n"
        "sys.modules['paredown'] = None\n"
        "s = ort.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])\n"
        "ids = np.random.default_rng(0).integers(5, 1000, (3, 9))\n"
        "names = {i.name for i in s.get_inputs()}\n"
        "assert names == {'input_ids', 'attention_mask', 'token_type_ids'}, names\n"
        "feed = {'input_ids': ids, 'attention_mask': np.ones_like(ids), 'token_type_ids': np.zeros_like(ids)}\n"
        "print(s.run(None, feed)[0].shape)"
    )
    onnx = Path(run["bundle"]) / "model.onnx"
    done = subprocess.run([sys.executable, "-c", code, str(onnx)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "(3, 77)"


def test_a_label_that_the_model_does_not_know_is_named(assets: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.csv"
    bad.write_text("text,category\nWhere is my card?,lost_sheep\nHello,age_limit\n", encoding="utf-8")
    model, train = assets / "models" / "minilm-banking77", assets / "data" / "banking77" / "train.csv"
    command = [sys.executable, "-m", "paredown", "prune", str(model), "--data", str(train), "--eval", str(bad)]
    done = subprocess.run([*command, "--out", str(tmp_path / "slim")], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "lost_sheep" in done.stderr and "Traceback" not in done.stderr
