"""What `paredown inspect` shows of a bundle."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paredown import bundle as bundles
from paredown.cli import main
from paredown.errors import CorruptBundle
from tests.contracts.network_bundles import make as make_network

REPORT = {
    "model": "./my-classifier",
    "verdict": "3 times as many texts per second.",
    "accepted": True,
    "anatomy": {"layers": 4, "heads": 12, "neurons": 1536},
    "parameters_dense": 22_700_000,
    "parameters_pruned": 15_000_000,
    "candidates": [{"name": "dense torch"}],
    "speedup": {"value": 3.0, "low": 2.9, "high": float("nan")},
    "zeros": {"sparsity": 0.8, "weights": 10_000, "pattern": "4x1", "solver": "alps", "allocation": "uniform"},
}


@dataclass
class Opened:
    folder: Path
    manifest: dict[str, Any]
    plan: Any = field(
        default_factory=lambda: SimpleNamespace(
            keep={
                "layers": (0, 2),
                "layer.0.heads": (1, 2, 3),
                "layer.0.neurons": tuple(range(640)),
                "layer.1.heads": (),
                "layer.2.heads": (),
                "layer.2.neurons": (5,),
            }
        )
    )

    def report(self) -> dict[str, Any]:
        return REPORT


@pytest.fixture
def opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Opened:
    (tmp_path / "model.onnx").write_bytes(bytes(2_500_000))
    (tmp_path / "report.json").write_bytes(bytes(10))
    manifest = {
        **{"accepted": True, "task": "text-classification", "family": "bert", "target": "onnxruntime"},
        **{"precision": "int8", "file": "model-int8.onnx", "pooling": "cls", "normalize": False, "max_length": 64},
        **{
            "folds": ["6 key biases removed"],
            "plan_id": "0123456789abcdef",
            "created": "2026-11-22",
            "paredown": "0.1.0",
        },
        **{"labels": {"yes": 0, "no": 1}, "files": {"report.json": "00", "model.onnx": "00"}},
    }
    found = Opened(tmp_path, manifest)
    monkeypatch.setattr(bundles, "load", lambda folder: found)
    return found


def test_the_tables(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "slim"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "model ./my-classifier",
        "task text-classification (2 labels)",
        "family bert, cls pooling",
        "serves model-int8.onnx (int8 on onnxruntime)",
        "parameters 22,700,000 → 15,000,000",
        "zeros 80 % of 10,000 weights are zero: 4x1, by alps, uniform over the matrices",
        "folds 6 key biases removed",
        "0 3 of 12 640 of 1536",
        "2 0 of 12 1 of 1536",
        "1, 3 gone gone",
        "model.onnx 2.50",
        "all 2.50",
        "Accepted: 3 times as many texts per second.",
    ):
        assert line in lines
    assert "dense torch" not in "".join(lines)  # the candidates are in the report


def test_the_json(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "slim", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["layers"] == [{"layer": 0, "heads": 3, "neurons": 640}, {"layer": 2, "heads": 0, "neurons": 1}]
    assert found["files"] == {"model.onnx": 2_500_000, "report.json": 10}
    assert (found["labels"], found["bundle"], found["accepted"]) == (2, str(opened.folder), True)
    assert found["report"]["speedup"]["high"] is None


def test_a_bundle_without_a_report(opened: Opened, capsys: pytest.CaptureFixture[str]) -> None:
    del opened.manifest["files"]["report.json"]
    opened.manifest["accepted"] = False
    assert main(["inspect", "slim"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "accepted no" in lines
    assert "0 3 640" in lines


def test_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = make_network(tmp_path / "slim", exported=True)
    assert main(["inspect", str(made.folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    for line in (
        "model tests.contracts.networks:make",
        "task image-classification (5 labels)",
        "serves model.onnx (fp32 on onnxruntime)",
        "pictures 16 x 16",
        "normalized with mean 0.4914 0.4822 0.4465, std 0.247 0.2435 0.2616",
        "branches 5 of 6; gone: layers.5.conv1",
        "conv1 5 of 8",
        "layers.5.conv1 gone",
    ):
        assert line in lines, lines
    assert not [line for line in lines if line.startswith(("family", "longest", "layer heads"))]
    assert main(["inspect", str(made.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["branches"] == {"of": 6, "gone": ["layers.5.conv1"]}
    kept = {row["group"]: (row["kept"], row["of"]) for row in found["groups"]}
    assert kept["conv1"] == (5, 8) and kept["layers.5.conv1"] == (0, 16)
    assert (found["size"], found["labels"], found["source"]) == ([16, 16], 5, "tests.contracts.networks:make")
    assert "layers" not in found and "pooling" not in found


def test_a_network_without_branches(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(make_network(tmp_path / "slim", "vgg", labels=()).folder)]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "task image-classification" in lines and "classifier.0 14 of 20" in lines
    assert not [line for line in lines if line.startswith("branches")]


def test_a_corrupt_bundle(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def load(folder: str) -> None:
        raise CorruptBundle(f"the bundle {folder} lacks model.onnx")

    monkeypatch.setattr(bundles, "load", load)
    assert main(["inspect", "slim"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: the bundle slim lacks model.onnx"
