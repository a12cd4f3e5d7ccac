"""Recovery on transformers' Trainer, for every kind of model."""

from __future__ import annotations

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paredown.anatomy import describe
from paredown.calibration import tensors
from paredown.errors import BadData, FingerprintMismatch
from paredown.network import network
from paredown.recovery import _losses as losses
from paredown.recovery import train
from paredown.recovery.distill import Progress
from paredown.recovery.train import recipe, recover
from paredown.surgery import cut, parameters
from paredown.tasks import Tokens, pad
from paredown.types import Plan
from tests.contracts.families import VOCABULARY, tiny

CASES = (
    ("bert", "text-classification"),
    ("distilbert", "text-embedding"),
    ("llama", "causal-lm"),
    ("gpt2", "causal-lm"),
)


class Job:
    """A small model cut in every way, its teacher, and texts."""

    def __init__(self, family: str, task: str):
        self.teacher = tiny(family, task)
        anatomy = describe(self.teacher)
        self.layout = anatomy.layout
        keep = {**anatomy.identity(), "layers": (0, 2), "layer.0.neurons": tuple(range(9)), "layer.2.heads": (1,)}
        self.plan = Plan(anatomy.fingerprint, keep)
        self.small = cut(self.teacher, anatomy, self.plan)
        rng = np.random.default_rng(0)
        ids = tuple(rng.integers(5, VOCABULARY, n) for n in rng.integers(6, 15, 80))
        names = network(self.teacher, self.layout).input_names
        self.tokens = Tokens(ids, self.teacher.config.pad_token_id, names, 0)
        self.labels = rng.integers(0, 3, 80) if task == "text-classification" else None

    def run(self, *, steps: int = 24, objective: str = "distill", lora: int = 0, **more: Any) -> Any:
        how = more.pop("recipe", None) or recipe(self.layout, objective=objective, lora_rank=lora)
        how = replace(how, batch_tokens=more.pop("batch_tokens", 128))
        settings = {"plan": self.plan, "tokens": self.tokens, "recipe": how, "labels": self.labels, **more}
        settings |= {} if "minutes" in more else {"steps": steps}
        return recover(self.small, teacher=self.teacher, layout=self.layout, **settings)


def copies(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("objective", train.OBJECTIVES)
@pytest.mark.parametrize(("family", "task"), CASES)
def test_the_loss_falls_and_nobody_is_touched(family: str, task: str, objective: str) -> None:
    job = Job(family, task)
    small, teacher = copies(job.small), copies(job.teacher)
    if objective == "finetune" and task == "text-embedding":
        with pytest.raises(BadData, match="needs labels"):
            job.run(objective=objective)
        return
    states = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index]
    model, history = job.run(objective=objective)
    assert history[-1].best < history[0].distance
    assert [one.step for one in history] == sorted(one.step for one in history) and history[0].step == 0
    assert same(copies(job.small), small) and same(copies(job.teacher), teacher)
    assert not same(copies(model), small) and parameters(model) == parameters(job.small)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    frozen = [name for name in small if name.startswith(tuple(f"{one}." for one in job.layout.embeddings))]
    assert frozen and all(torch.equal(model.state_dict()[name], small[name]) for name in frozen)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # type: ignore[index]
    if family == "llama":
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("rate", [0.0, 1e4])
def test_never_worse_than_nothing(rate: float) -> None:
    job = Job("bert", "text-classification")
    model, history = job.run(recipe=replace(recipe(job.layout), learning_rate=rate), steps=6)
    assert same(copies(model), copies(job.small))
    assert history[-1].best == history[0].best


def stopped(at: int) -> Callable[[Progress], None]:
    def report(progress: Progress) -> None:
        if progress.step == at:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(("family", "task"), [CASES[0], CASES[2]])
def test_it_goes_on_where_it_was_stopped(family: str, task: str, tmp_path: Path) -> None:
    job = Job(family, task)
    with pytest.raises(KeyboardInterrupt):
        job.run(folder=tmp_path / "a", report=stopped(13))
    seen: list[int] = []
    model, history = job.run(folder=tmp_path / "a", report=lambda p: seen.append(p.step))
    assert seen[0] == 13 and seen[-1] == 24  # the last checkpoint was at 12
    straight, whole = job.run(folder=tmp_path / "b")
    assert same(copies(model), copies(straight))
    assert [(one.step, one.distance) for one in history] == [(one.step, one.distance) for one in whole]
    with pytest.raises(FingerprintMismatch, match="another training"):
        job.run(folder=tmp_path / "a", seed=1)
    done, _ = job.run(folder=tmp_path / "a")  # over already
    assert same(copies(done), copies(straight))
    assert (tmp_path / "a" / train.BEST).exists()


def test_a_checkpoint_that_was_not_finished_is_passed_over(tmp_path: Path) -> None:
    job = Job("bert", "text-classification")
    with pytest.raises(KeyboardInterrupt):
        job.run(folder=tmp_path, report=stopped(13))
    (tmp_path / "checkpoint-14").mkdir()
    (tmp_path / "checkpoint-14" / "model.safetensors").write_bytes(b"half")
    again, _ = job.run(folder=tmp_path)
    straight, _ = job.run()
    assert same(copies(again), copies(straight))


@pytest.mark.parametrize(("family", "task"), CASES)
def test_lora_trains_little_and_merges(family: str, task: str) -> None:
    job = Job(family, task)
    seen: list[int] = []
    original = train._trainable

    def counted(*arguments: Any) -> Any:
        found = original(*arguments)
        seen.append(sum(value.numel() for value in found.values()))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "_trainable", counted)
        model, history = job.run(lora=1)
    assert 0 < seen[0] < 0.2 * parameters(job.small)
    assert history[-1].best < history[0].distance
    assert copies(model).keys() == copies(job.small).keys()
    assert [type(m) for m in model.modules()] == [type(m) for m in job.small.modules()]


def test_minutes_become_steps() -> None:
    job = Job("bert", "text-classification")
    _, history = job.run(minutes=0.05)
    assert history[-1].step > 3 and history[-1].seconds < 12
    with pytest.raises(ValueError, match="either steps or minutes"):
        settings = {"plan": job.plan, "tokens": job.tokens, "recipe": recipe(job.layout), "layout": job.layout}
        recover(job.small, teacher=job.teacher, steps=3, minutes=0.1, **settings)  # type: ignore[arg-type]
    _, history = job.run(minutes=0.0)
    assert len(history) == 1


@pytest.mark.parametrize(("family", "task"), CASES)
def test_like_models_have_nothing_to_learn(family: str, task: str) -> None:
    job = Job(family, task)
    inputs = tensors(
        pad(job.tokens.ids[:5], pad_id=job.tokens.pad_id, input_names=job.tokens.input_names),
        network(job.teacher, job.layout),
    )
    whole, part = (losses.watched(network(m, job.layout), inputs, values=True) for m in (job.teacher, job.small))
    mask = inputs["attention_mask"]
    assert losses.hidden(whole, whole, (0, 1, 2), mask) == 0
    assert losses.relations(whole, whole, mask).abs() < 1e-6
    assert losses.hidden(part, whole, (0, 2), mask) > 0 and losses.relations(part, whole, mask) > 0
    name = network(job.teacher, job.layout).output_name
    assert losses.answers(whole.output, whole.output, name, 2.0).abs() < 1e-5
    assert losses.answers(part.output, whole.output, name, 2.0) > 0


def test_padding_counts_for_nothing() -> None:
    job = Job("bert", "text-classification")
    outputs = []
    for extra in (0, 6):
        arrays = pad(job.tokens.ids[:4], pad_id=0, input_names=job.tokens.input_names)
        arrays = {name: np.pad(value, ((0, 0), (0, extra))) for name, value in arrays.items()}
        inputs = tensors(arrays, network(job.teacher, job.layout))
        whole, part = (losses.watched(network(m, job.layout), inputs, values=True) for m in (job.teacher, job.small))
        mask = inputs["attention_mask"]
        found = losses.hidden(part, whole, (0, 2), mask), losses.relations(part, whole, mask)
        outputs.append([one.item() for one in found])
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-4)


def test_the_teacher_in_training_mode_stays_so() -> None:
    job = Job("bert", "text-classification")
    before = copy.deepcopy([module.training for module in job.teacher.modules()])
    job.run(steps=2)
    assert [module.training for module in job.teacher.modules()] == before


TOGETHER = """
import json, sys
import torch
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from tests.unit.recovery.test_train import Job

job = Job("bert", "text-classification")
torch.manual_seed(0)
fitted, history = job.run(steps=20, batch_tokens=64)
state = PartialState()
weights = torch.cat([value.flatten() for value in fitted.state_dict().values()])
print(json.dumps([state.process_index, state.num_processes, float(weights.double().sum()), history[0].best, history[-1].best]))
"""  # noqa: E501


def test_processes_of_a_launcher_train_one_student(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    root = str(Path(__file__).parents[3])
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, root], capture_output=True, text=True, check=False, cwd=root, env=environment)
    assert done.returncode == 0, done.stderr
    first, second = sorted(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))
    assert [first[0], second[0], first[1]] == [0, 1, 2]
    assert first[2:] == second[2:]
    assert first[4] < first[3]
