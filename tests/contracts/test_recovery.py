"""What every file of recovery/ must pass: the student handed in is untouched, and what comes back is never worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from paredown import recovery, registry, sparsity
from paredown.anatomy import describe
from paredown.calibration import divergence
from paredown.encoder import Encoder, Layer
from paredown.errors import BadData, ParedownError
from paredown.network import network
from paredown.recovery import distill, reconstruct, train
from paredown.sparsity import Pattern
from paredown.surgery import cut
from paredown.tasks import Tokens, length_sorted_batches
from paredown.types import Anatomy, Plan
from tests.contracts.families import CASES, CAUSAL_LM, VOCABULARY, tiny, widths

METHODS = registry.available("recovery")
OF_ENCODERS = ("distill",)
EVERY = pytest.mark.parametrize(
    ("method", "family", "task"),
    [(m, f, t) for m in METHODS for f, t in CASES if t != CAUSAL_LM or m not in OF_ENCODERS],
)


@dataclass(frozen=True)
class Case:
    teacher: nn.Module
    small: nn.Module
    anatomy: Anatomy
    plan: Plan
    tokens: Tokens

    @property
    def batches(self) -> list[dict[str, Any]]:
        return [inputs for _, inputs in length_sorted_batches(self.tokens, batch_size=8)]


def case(family: str, task: str, *, texts: int = 60) -> Case:
    teacher = tiny(family, task)
    anatomy = describe(teacher)
    most = tuple(unit for unit in range(anatomy.group("layer.0.heads").units) if unit != 1)
    keep = {**anatomy.identity(), "layer.0.heads": most, "layer.1.neurons": tuple(range(0, 20, 2))}
    plan = Plan(anatomy.fingerprint, {**keep, "layer.2.neurons": ()})
    random = np.random.default_rng(0)
    ids = tuple(random.integers(5, VOCABULARY, random.integers(1, 12)) for _ in range(texts))
    names = network(teacher, anatomy.layout).input_names
    tokens = Tokens(ids, int(teacher.config.pad_token_id), names, 0)
    return Case(teacher, cut(teacher, anatomy, plan), anatomy, plan, tokens)


def in_closed_form(method: str) -> Callable[[Case], tuple[nn.Module, list[dict[str, Any]]]]:
    def recover(one: Case) -> tuple[nn.Module, list[dict[str, Any]]]:
        batches = one.batches
        model = recovery.recover(
            one.small, method=method, teacher=one.teacher, anatomy=one.anatomy, plan=one.plan, batches=batches
        )
        return model, [batches[i] for i in reconstruct.held_out(len(batches))]

    return recover


def by_distillation(one: Case) -> tuple[nn.Module, list[dict[str, Any]]]:
    layout = one.anatomy.layout
    wanted = distill.teach(Encoder(one.teacher, layout), one.tokens)
    model, _ = recovery.recover(
        one.small, method="distill", layout=layout, tokens=one.tokens, wanted=wanted, minutes=0.002
    )
    held = distill.held_out(one.tokens.lengths)
    return model, [inputs for _, inputs in length_sorted_batches(one.tokens, indices=held)]


def by_training(one: Case) -> tuple[nn.Module, list[dict[str, Any]]]:
    """With the divergence alone as the loss: it is what the test judges by."""
    layout = one.anatomy.layout
    how = replace(train.recipe(layout), temperature=1.0, hidden_weight=0.0)
    model, _ = recovery.recover(
        one.small,
        method="train",
        teacher=one.teacher,
        layout=layout,
        plan=one.plan,
        tokens=one.tokens,
        recipe=how,
        steps=4,
    )
    held = distill.held_out(one.tokens.lengths)
    return model, [inputs for _, inputs in length_sorted_batches(one.tokens, indices=held)]


HOW: dict[str, Callable[[Case], tuple[nn.Module, list[dict[str, Any]]]]] = {
    "compensate": in_closed_form("compensate"),
    "reconstruct": in_closed_form("reconstruct"),
    "distill": by_distillation,
    "train": by_training,
}


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


def test_every_method_is_known_here() -> None:
    assert set(METHODS) == set(HOW)  # a new one: say above how it is called, and which texts judge it


@EVERY
def test_never_worse_and_the_student_untouched(method: str, family: str, task: str) -> None:
    one = case(family, task)
    student, teacher = weights(one.small), weights(one.teacher)
    flags = [parameter.requires_grad for parameter in one.small.parameters()]
    state = torch.get_rng_state()
    model, judges = HOW[method](one)
    assert same(one.small, student) and same(one.teacher, teacher)
    assert [parameter.requires_grad for parameter in one.small.parameters()] == flags
    assert all(parameter.grad is None for parameter in (*one.small.parameters(), *model.parameters()))
    assert torch.equal(torch.get_rng_state(), state)
    ours, theirs = (
        {name: p.data_ptr() for name, p in found.named_parameters() if p.numel()} for found in (model, one.small)
    )
    tables = tuple(f"{name}." for name in one.anatomy.layout.embeddings)  # no recovery changes them
    assert {name for name in ours if ours[name] in theirs.values()} == {n for n in ours if n.startswith(tables)}
    assert widths(model) == widths(one.small)
    dense = network(one.teacher, one.anatomy.layout)
    before, after = (divergence(network(m, one.anatomy.layout), dense, judges) for m in (one.small, model))
    assert after <= before * (1 + 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_the_student_is_untouched_on_error(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes in the middle: after some of the work was done."""
    one = case("bert", "text-classification", texts=40)
    student, feed, calls = weights(one.small), Layer.feed, 0

    def failing(layer: Layer, x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 9:
            raise RuntimeError("planted")
        return feed(layer, x)

    monkeypatch.setattr(Layer, "feed", failing)
    with pytest.raises(RuntimeError, match="planted"):
        HOW[method](one)
    assert same(one.small, student)
    assert not one.small.training and not one.teacher.training


@pytest.mark.parametrize("method", METHODS)
def test_no_texts(method: str) -> None:
    with pytest.raises(BadData, match="text"):
        HOW[method](case("bert", "text-classification", texts=0))


@pytest.mark.parametrize("texts", (1, 2, 9))
@pytest.mark.parametrize("method", METHODS)
def test_very_few_texts(method: str, texts: int) -> None:
    model, judges = HOW[method](case("bert", "text-embedding", texts=texts))
    assert judges and all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_dropout_is_never_applied(method: str) -> None:
    one = case("bert", "text-classification")
    expected = divergence(*(Encoder(m, one.anatomy.layout) for m in (one.small, one.teacher)), one.batches)
    one.teacher.train()
    one.small.train()
    found = divergence(*(Encoder(m, one.anatomy.layout) for m in (one.small, one.teacher)), one.batches)
    assert found == expected
    HOW[method](one)
    assert all(module.training for module in (*one.teacher.modules(), *one.small.modules()))


def test_an_unknown_method() -> None:
    with pytest.raises(ParedownError, match="recovery has no 'lora'"):
        recovery.recover(nn.Linear(1, 1), method="lora")


@pytest.mark.parametrize("family", ["roberta", "llama", "gpt2"])
@pytest.mark.parametrize("method", ["distill", "train"])
def test_what_is_zero_stays_zero_in_training(method: str, family: str) -> None:
    task = CAUSAL_LM if family != "roberta" else "text-classification"
    if task == CAUSAL_LM and method in OF_ENCODERS:
        pytest.skip("of encoders alone")
    one = case(family, task)
    layout = one.anatomy.layout
    names = {
        name: 0.5 for name, part in sparsity.matrices_of(one.small, layout).items() if sparsity.matrix(part).numel()
    }
    sparse = sparsity.solve(network(one.small, layout), names, Pattern(), "magnitude", [])
    model, _ = HOW[method](replace(one, small=sparse))
    before, after = (sparsity.matrices_of(m, layout) for m in (sparse, model))
    for name in names:
        old, new = sparsity.matrix(before[name]), sparsity.matrix(after[name])
        assert torch.equal(old == 0, new == 0), name
    assert any(not torch.equal(sparsity.matrix(before[name]), sparsity.matrix(after[name])) for name in names)


def test_lora_does_not_train_a_sparse_model() -> None:
    one = case("bert", "text-classification")
    layout = one.anatomy.layout
    names = {
        name: 0.5 for name, part in sparsity.matrices_of(one.small, layout).items() if sparsity.matrix(part).numel()
    }
    sparse = sparsity.solve(network(one.small, layout), names, Pattern(), "magnitude", [])
    with pytest.raises(ParedownError, match="fill the zeros"):
        recovery.recover(
            sparse,
            method="train",
            teacher=one.teacher,
            layout=layout,
            plan=one.plan,
            tokens=one.tokens,
            recipe=train.recipe(layout, lora_rank=2),
            steps=2,
        )
