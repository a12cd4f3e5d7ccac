"""Zeros from end to end: the gate, the report and the bundle of the main job."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import paredown
from paredown import sparsity
from paredown.errors import GateFailed, MissingExtra, ParedownError, UnsupportedModel
from paredown.sparsity import Pattern
from tests.unit.pipeline.conftest import Desk
from tests.unit.pipeline.test_amounts import Watch

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")


def made(desk: Desk, out: Path, **asked: Any) -> paredown.bundle.Bundle:
    return paredown.sparsify(
        desk.model, data=desk.train, eval=desk.test, out=out, **{"threads": 1, "minutes": 0, **asked}
    )


def share_of(bundle: paredown.bundle.Bundle) -> tuple[float, list[torch.Tensor]]:
    """Of all weights of the layers, what is zero; and the matrices."""
    model, anatomy = bundle._open()
    found = [sparsity.matrix(part) for part in sparsity.matrices_of(model, anatomy.layout).values()]
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found), found


def test_zeros_at_once(desk: Desk, tmp_path: Path) -> None:
    facts = made(desk, tmp_path / "slim", sparsity=0.6).report()
    bundle = paredown.load(tmp_path / "slim")
    share, _ = share_of(bundle)
    assert share == pytest.approx(0.6, abs=0.002)
    assert facts["accepted"] and facts["target"] == "sparse_cpu" and bundle.manifest["precision"] == "fp32"
    assert facts["zeros"]["sparsity"] == pytest.approx(share) and facts["zeros"]["solver"] == "sparsegpt"
    assert len(facts["zeros"]["matrices"]) == 18
    assert facts["parameters_pruned"] == sum(int((p != 0).sum()) for p in bundle.model().parameters())
    assert facts["parity"] is not None and facts["parity"] < 1e-4
    chosen = next(row for row in facts["candidates"] if row["chosen"])
    assert (chosen["name"], chosen["kind"], chosen["target"]) == ("60% zeros", "sparse", "sparse_cpu")
    assert facts["speedup"]["low"] <= facts["speedup"]["value"] <= facts["speedup"]["high"]
    assert "paredown sparsify" in facts["command"] and "--pattern unstructured --sparsity 0.6" in facts["command"]
    page = (bundle.folder / "report.html").read_text()
    assert "Where the zeros are" in page and "60 % of" in page
    assert "No layer, head or neuron was cut" in page and "head removed" not in page
    assert not (bundle.folder / "model.onnx").exists()


def test_zeros_in_rounds_with_training_that_keeps_them(desk: Desk, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sparsity": 0.5, "pattern": "4x1", "rounds": 3, "schedule": "exponential", "minutes": 0.01}
    bundle = made(desk, tmp_path / "slim", solver="magnitude", **asked)
    share, matrices = share_of(bundle)
    assert share == pytest.approx(0.5, abs=0.02)
    assert all(Pattern.parse("4x1").holds(weight) for weight in matrices)
    facts = bundle.report()
    rounds = facts["pruning_rounds"]
    assert [one["sparsity"] for one in rounds] == pytest.approx([1 - 0.5 ** (1 / 3), 1 - 0.5 ** (2 / 3), 0.5])
    sizes = [one["parameters"] for one in rounds]
    assert sizes == sorted(sizes, reverse=True) and len(facts["recovery"]) >= 3


def test_it_goes_on_where_it_was_stopped(desk: Desk, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"sparsity": 0.5, "rounds": 2, "solver": "wanda"}
    with pytest.raises(KeyboardInterrupt):
        made(desk, tmp_path / "slim", progress=Watch("Zeroing 50% by wanda"), **asked)
    watch = Watch()
    again = made(desk, tmp_path / "slim", progress=watch, **asked)
    assert [stage for stage in watch.stages if stage.startswith("Zeroing")] == ["Zeroing 50% by wanda"]
    straight = made(desk, tmp_path / "straight", **asked)
    ours, theirs = again.model().state_dict(), straight.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_of_four_step_by_step(desk: Desk, tmp_path: Path) -> None:
    bundle = made(desk, tmp_path / "slim", pattern="1:4", rounds=3, schedule="linear", solver="magnitude", permute=True)
    _, matrices = share_of(bundle)
    assert all(Pattern.parse("1:4").holds(weight) for weight in matrices)
    assert [one["sparsity"] for one in bundle.report()["pruning_rounds"]] == [0.25, 0.5, 0.75]


def test_structure_comes_first(desk: Desk, tmp_path: Path) -> None:
    bundle = made(desk, tmp_path / "slim", sparsity=0.5, layers=1, neurons=0.25, criterion="magnitude")
    facts = bundle.report()
    assert len(bundle.plan.keep["layers"]) == 2
    share, matrices = share_of(bundle)
    assert share == pytest.approx(0.5, abs=0.01) and len(matrices) == 12
    rounds = facts["pruning_rounds"]
    assert [one["round"] for one in rounds] == [1, 2] and "sparsity" not in rounds[0]
    assert "without 25% of the neurons and 1 layer" in facts["candidate"]


def test_another_target_computes_the_zeros(desk: Desk, tmp_path: Path) -> None:
    bundle = made(desk, tmp_path / "slim", sparsity=0.4, target="onnxruntime")
    texts = ["pay the bill", "my card is lost"]
    runner = bundle.runner(target="sparse_cpu", threads=1)
    runner.close()
    assert (bundle.folder / "model.onnx").exists() and bundle.manifest["target"] == "onnxruntime"
    assert np.isfinite(bundle.predict(texts)).all()


def test_the_gate_is_that_of_the_main_job(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(GateFailed) as caught:
        made(desk, tmp_path / "slim", sparsity=0.97, max_drop=0.001, solver="random")
    assert caught.value.result["accepted"] is False
    assert paredown.load(tmp_path / "slim").manifest["accepted"] is False


def test_a_bundle_validates_and_is_timed_as_it_serves(desk: Desk, tmp_path: Path) -> None:
    made(desk, tmp_path / "slim", sparsity=0.6)
    facts = paredown.validate(tmp_path / "slim", eval=desk.test, threads=1, max_drop=0.9)
    assert facts["accepted"] and facts["target"] == "sparse_cpu"


def test_a_language_model(tale: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = tale
    bundle = paredown.sparsify(
        model, data=text, out=tmp_path / "slim", pattern="2:4", solver="wanda", minutes=0, threads=1
    )
    share, matrices = share_of(bundle)
    assert share == 0.5 and all(Pattern.parse("2:4").holds(weight) for weight in matrices)
    assert bundle.report()["target"] == "torch"


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({}, "Say how much"),
        ({"sparsity": 1.0}, "above 0 and below 1"),
        ({"sparsity": 0.5, "pattern": "1:4"}, "a sparsity of 0.75"),
        ({"sparsity": 0.5, "pattern": "wild"}, "no pattern 'wild'"),
        ({"sparsity": 0.5, "solver": "wild"}, "no 'wild'"),
        ({"sparsity": 0.5, "allocation": "wild"}, "allocation is one of"),
        ({"sparsity": 0.5, "recover": "reconstruct"}, "fill the zeros"),
        ({"sparsity": 0.5, "permute": True}, "for n:m patterns"),
        ({"sparsity": 0.5, "criterion": "obs"}, "say how many of them go first"),
        ({"sparsity": 0.5, "target": "wild"}, "no target 'wild'"),
        ({"pattern": "1:4", "allocation": "owl"}, "uniform"),
    ],
)
def test_what_cannot_be_asked_for(desk: Desk, tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ParedownError, match=words):
        made(desk, tmp_path / "slim", **asked)


def test_a_pattern_that_fits_nothing(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="divides into 7x1"):
        made(desk, tmp_path / "slim", sparsity=0.5, pattern="7x1")


def test_prune_knows_nothing_of_it(desk: Desk, tmp_path: Path) -> None:
    with pytest.raises(ParedownError, match="runs what sparsify makes"):
        paredown.prune(desk.model, data=desk.train, out=tmp_path / "slim", target="sparse_cpu")


def test_without_numba_it_is_told_before_any_work(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else find(name))
    watch = Watch()
    with pytest.raises(MissingExtra, match=r"numba is not installed.*paredown\[sparse\]"):
        made(desk, tmp_path / "slim", sparsity=0.5, progress=watch)
    assert watch.stages == ["Reading model and data"]
