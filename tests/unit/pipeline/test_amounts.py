"""Pruning by amounts, in rounds, of a text encoder and of a language model."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import paredown
from paredown.errors import BadData, InfeasibleBudget, MissingExtra, ParedownError
from paredown.pipeline import Silent
from tests.unit.pipeline.conftest import Desk

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:onnxscript")


class Watch(Silent):
    """Knows the stages, and presses Ctrl-C at one of them."""

    def __init__(self, stop_at: str = ""):
        self.stages: list[str] = []
        self.stop_at = stop_at

    def stage(self, name: str, total: float | None = None) -> None:
        self.stages.append(name)
        if name == self.stop_at:
            raise KeyboardInterrupt


def pruned(desk: Desk, out: Path, **asked: Any) -> paredown.bundle.Bundle:
    return paredown.prune(
        desk.model, data=desk.train, eval=desk.test, out=out, threads=1, minutes=0, recover="reconstruct", **asked
    )


def test_rounds_end_where_one_shot_does(desk: Desk, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"heads": 0.25, "neurons": 0.3, "layers": 1}
    bundle = pruned(desk, tmp_path / "slim", rounds=3, criterion="fisher", **asked)
    facts = bundle.report()
    assert facts["accepted"] and facts["objective"]["dial"] == "amount"
    keep = bundle.plan.keep
    assert len(keep["layers"]) == 2
    assert sum(len(keep[f"layer.{i}.heads"]) for i in keep["layers"]) == 8 - 2
    assert sum(len(keep[f"layer.{i}.neurons"]) for i in keep["layers"]) == 40 - 12
    rounds = facts["pruning_rounds"]
    sizes = [one["parameters"] for one in rounds]
    assert [one["round"] for one in rounds] == [1, 2, 3] and sizes == sorted(sizes, reverse=True)
    assert sizes[-1] == facts["parameters_pruned"] and rounds[-1]["plan_id"] == bundle.plan.id
    assert all(0 < one["quality_cut"] <= 1 and 0 < one["quality"] <= 1 for one in rounds)
    chosen = next(row for row in facts["candidates"] if row["chosen"])
    assert chosen["kind"] == "pruned" and chosen["name"] == "without 25% of the heads, 30% of the neurons and 1 layer"
    assert "--heads 25% --neurons 30% --layers 1" in facts["command"] and "--rounds 3" in facts["command"]


def test_rounds_go_on_where_they_stopped(desk: Desk, tmp_path: Path) -> None:
    asked: dict[str, Any] = {"neurons": 0.5, "rounds": 3, "criterion": "magnitude"}
    with pytest.raises(KeyboardInterrupt):
        pruned(desk, tmp_path / "slim", progress=Watch("Re-fitting in round 2"), **asked)
    watch = Watch()
    again = pruned(desk, tmp_path / "slim", progress=watch, **asked)
    assert "Scoring, round 2 of 3" not in watch.stages and "Re-fitting in round 1" not in watch.stages
    assert "Re-fitting in round 2" in watch.stages
    straight = pruned(desk, tmp_path / "straight", **asked)
    ours, theirs = again.model().state_dict(), straight.model().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_layers_and_a_share_of_parameters_in_rounds(desk: Desk, tmp_path: Path) -> None:
    """Round 2 of 3 is met by the layer that goes in it; what round 1 took of the others stays away."""
    asked: dict[str, Any] = {"layers": 1, "parameters": 0.8, "rounds": 3, "criterion": "magnitude"}
    bundle = pruned(desk, tmp_path / "slim", depth_criterion="every_other", minimum_heads=2, **asked)
    facts = bundle.report()
    sizes = [one["parameters"] for one in facts["pruning_rounds"]]
    assert sizes == sorted(sizes, reverse=True)
    assert 0.7 * facts["parameters_dense"] < facts["parameters_pruned"] <= 0.8 * facts["parameters_dense"]
    assert all(len(bundle.plan.keep[f"layer.{i}.heads"]) >= 2 for i in bundle.plan.keep["layers"])
    with pytest.raises(InfeasibleBudget, match="cannot be reached"):
        pruned(desk, tmp_path / "other", parameters=0.05, criterion="magnitude")


def test_what_cannot_be_reached_in_the_end_is_told_in_the_beginning(desk: Desk, tmp_path: Path) -> None:
    watch = Watch()
    with pytest.raises(InfeasibleBudget, match="cannot go"):
        pruned(desk, tmp_path / "slim", heads=0.95, rounds=3, progress=watch)
    assert not any(stage.startswith("Scoring") for stage in watch.stages)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"heads": 0.2, "speedup": 2.0}, "a speed or for an amount"),
        ({"parameters": 0.5, "heads": 0.2}, "not both"),
        ({"layers": 1.5}, "a share from 0 to below 1, or a whole number"),
        ({"heads": 0.2, "criterion": "block_influence"}, "does not rank heads"),
        ({"layers": 3}, "3 of 3 layers cannot go"),
        ({"heads": 0.2, "schedule": "wild"}, "schedule is one of"),
        ({"rounds": 3}, "rounds goes with an amount"),
        ({"heads": 0.2, "lora": 4}, "lora and steps are for training"),
        ({"heads": 0.2, "uniform": True}, "no head can go with uniform"),
        ({"sublayers": 1, "uniform": True}, "leave sublayers or uniform out"),
        ({"heads": 0.5, "minimum_heads": 3}, "6 of 12 heads cannot go; 3 is the most, with 3 left in every layer"),
    ],
)
def test_what_cannot_be_asked_for(desk: Desk, tmp_path: Path, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ParedownError, match=words):
        pruned(desk, tmp_path / "slim", **asked)


def test_fine_tuning_without_labels_is_told_before_any_work(desk: Desk, tmp_path: Path) -> None:
    watch, asked = Watch(), {"task": "text-embedding", "heads": 0.5, "recover": "finetune"}
    with pytest.raises(BadData, match="Fine-tuning needs labels"):
        paredown.prune(desk.model, data=desk.train, out=tmp_path / "slim", progress=watch, **asked)
    assert watch.stages == ["Reading model and data"]


def test_a_missing_package_is_told_before_any_work(desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    watch = Watch()
    with pytest.raises(MissingExtra, match=r"peft is not installed.*paredown\[train\]"):
        paredown.prune(desk.model, data=desk.train, out=tmp_path / "slim", heads=0.5, lora=4, progress=watch)
    assert watch.stages == ["Reading model and data"]


def test_a_language_model_from_end_to_end(tale: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = tale
    out = tmp_path / "slim"
    asked: dict[str, Any] = {"heads": 0.5, "neurons": 0.4, "layers": 1, "protect": 0, "uniform": True}
    bundle = paredown.prune(model, data=text, out=out, minutes=0, recover="reconstruct", threads=1, **asked)
    facts = bundle.report()
    assert facts["accepted"] and (facts["target"], facts["task"]) == ("torch", "causal-lm")
    assert facts["quality_metric"] == "log_likelihood"
    metrics = facts["metrics_dense"]
    assert metrics["perplexity"] == pytest.approx(np.exp(-facts["quality_dense"]))
    assert facts["generation"]["dense"]["tokens"] == 32 and 8 <= facts["generation"]["prompts"] <= 16
    small = paredown.load(out).model()
    ids = torch.randint(3, 60, (1, 9), generator=torch.Generator().manual_seed(0))
    stock = AutoModelForCausalLM.from_pretrained(out / "huggingface", dtype=torch.float32).eval()
    assert (stock.config.num_hidden_layers, stock.config.num_key_value_heads) == (3, 1)
    with torch.no_grad():
        ours, theirs = small(input_ids=ids).logits, stock(input_ids=ids).logits
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert small.get_output_embeddings().weight is small.get_input_embeddings().weight  # still tied
    plain = small.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    assert plain.shape == (1, 14)


def test_what_a_language_model_is_not_for(tale: tuple[Path, Path], tmp_path: Path) -> None:
    model, text = tale
    for asked, words in (
        ({"speedup": 2.0}, "how much of a language model"),
        ({"neurons": 0.2, "target": "onnxruntime"}, "run on torch"),
    ):
        with pytest.raises(ParedownError, match=words):
            paredown.prune(model, data=text, out=tmp_path / "slim", **asked)  # type: ignore[arg-type]
