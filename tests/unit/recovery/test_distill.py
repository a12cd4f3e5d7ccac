"""Distillation by a clock of its own: every look at the time takes a tenth of a second, so nothing depends on speed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from paredown.recovery import _learning, distill
from paredown.tasks import Tokens
from tests.contracts.families import FAMILIES
from tests.unit.recovery.cases import Clock, case, same, texts

# -------------------------------------------------------------------------------------------------------- the teacher


@pytest.mark.parametrize("task", ("text-classification", "text-embedding"))
def test_the_teacher_answers_in_the_order_of_the_texts(task: str, clock: Clock) -> None:
    one = case("bert", task)
    assert one.wanted.shape == (200, 3 if task == "text-classification" else 24) and one.wanted.dtype == torch.float32
    assert one.far(one.teacher.model, range(0, 200, 7)) == pytest.approx(0, abs=1e-5)
    told: list[int] = []
    distill.teach(one.teacher, one.tokens, progress=told.append)
    assert sum(told) == 200


def test_the_teacher_stops_in_time(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(distill, "TAUGHT_TOKENS", 300)
    one = case()
    found = distill.teach(one.teacher, one.tokens, seconds=0.25)  # time for two chunks
    assert 500 < one.tokens.lengths[: len(found)].sum() < 600 < one.tokens.lengths.sum()
    torch.testing.assert_close(found, one.wanted[: len(found)], rtol=1e-4, atol=1e-4)
    assert distill.teach(one.teacher, one.tokens, seconds=0.0).shape == (0, 0)
    torch.testing.assert_close(distill.teach(one.teacher, one.tokens, seconds=99), one.wanted, rtol=1e-4, atol=1e-4)


# --------------------------------------------------------------------------------------------------------- it learns


@pytest.mark.parametrize("task", ("text-classification", "text-embedding"))
@pytest.mark.parametrize("family", FAMILIES)
def test_the_distance_goes_down(family: str, task: str, clock: Clock) -> None:
    one = case(family, task)
    model, history = one.run()
    held = distill.held_out(one.tokens.lengths)
    assert history[0].distance == pytest.approx(one.far(one.small, held), rel=1e-4)
    assert history[-1].best == pytest.approx(one.far(model, held), rel=1e-4)
    assert history[-1].best < 0.9 * history[0].distance
    assert 8 <= len(history) <= _learning.CHECKS + 2
    assert [p.best for p in history] == list(np.minimum.accumulate([p.distance for p in history]))
    assert history[-1].seconds == pytest.approx(30, abs=1) and history[-1].step > 50
    assert [p.seconds for p in history] == sorted(p.seconds for p in history)


def test_embeddings_are_frozen_and_all_else_learns(clock: Clock) -> None:
    one = case("electra")
    model, _ = one.run()
    before = dict(one.small.named_parameters())
    for name, value in model.named_parameters():
        frozen = any(name.startswith(part) for part in one.layout.embeddings) or not value.numel()
        assert torch.equal(value, before[name]) == frozen, name
        assert value.grad is None and not value.requires_grad
    assert not model.training


def test_embeddings_are_shared_and_no_flag_of_the_student_changes(clock: Clock) -> None:
    one = case()
    flags = [parameter.requires_grad for parameter in one.small.parameters()]
    found, _ = one.run(0.05)
    for name in one.layout.embeddings:
        ours, theirs = (model.get_submodule(name).parameters() for model in (found, one.small))
        assert all(a is not b and a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True))
    assert [parameter.requires_grad for parameter in one.small.parameters()] == flags


def test_unused_parts_stay_as_they_are_and_may_be_gone(clock: Clock) -> None:
    one = case("bert", "text-embedding")
    model, _ = one.run(0.05)
    assert "pooler" in one.layout.unused
    assert torch.equal(model.pooler.dense.weight, one.small.pooler.dense.weight)
    one.small.pooler = None
    assert one.run(0.05)[0].pooler is None


def test_held_out_texts_are_not_learnt_from(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case()
    learnt: set[bytes] = set()
    lessons = distill._lessons

    def spy(tokens: Tokens, *, seed: int) -> Any:
        learnt.update(ids.tobytes() for ids in tokens.ids if len(ids) > 6)
        return lessons(tokens, seed=seed)

    monkeypatch.setattr(distill, "_lessons", spy)
    one.run(0.05)
    held = distill.held_out(one.tokens.lengths)
    assert len(held) == 20 and learnt
    assert not learnt & {one.tokens.ids[i].tobytes() for i in held}
    long, short = np.full(10_003, 100), np.full(5, 13_000)
    assert len(distill.held_out(long)) == 120 and len(distill.held_out(short)) == 1  # 12,000 tokens, and one at least


def test_extra_texts_are_learnt_each_with_its_own_answer(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one = case(count=60)
    extra = texts(90, one.tokens.input_names, one.tokens.pad_id, seed=9)
    answers = distill.teach(one.teacher, extra)
    right = {
        ids.tobytes(): out
        for ids, out in zip(one.tokens.ids + extra.ids, torch.cat([one.wanted, answers]), strict=True)
    }
    pads, losses, seen = distill.pad, distill._loss, []

    def see_texts(ids: Any, **about: Any) -> Any:
        seen.append([row.tobytes() for row in ids])
        return pads(ids, **about)

    def see_targets(output: Tensor, wanted: Tensor, name: str) -> Tensor:
        expected = torch.stack([right[key] for key in seen[-1]])
        torch.testing.assert_close(wanted, expected)
        return losses(output, wanted, name)

    monkeypatch.setattr(distill, "pad", see_texts)
    monkeypatch.setattr(distill, "_loss", see_targets)
    one.run(0.1, extra_tokens=extra, extra_wanted=answers)
    assert {key for keys in seen for key in keys} == set(right)
    with pytest.raises(ValueError, match="extra_wanted"):
        one.run(extra_tokens=extra)


@pytest.mark.parametrize("count", (1, 2, 5, 63, 64, 65))
def test_few_texts(count: int, clock: Clock) -> None:
    _, history = case(count=count).run(0.1)
    assert history[-1].step > 5 and np.isfinite(history[-1].best)


def test_too_few_answers() -> None:
    one = case(count=20)
    with pytest.raises(ValueError, match="every text needs"):
        one.run(wanted=one.wanted[:19])


# ------------------------------------------------------------------------------------------------------ the best state


def test_a_late_divergence_is_forgotten(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = _learning._rate
    monkeypatch.setattr(_learning, "_rate", lambda share: rate(share) if share < 0.6 else 3000.0)
    one = case()
    model, history = one.run()
    assert history[-1].distance > 2 * history[-1].best
    assert one.far(model, distill.held_out(one.tokens.lengths)) == pytest.approx(
        min(p.distance for p in history), rel=1e-4
    )


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_a_loss_that_is_no_number_spoils_nothing(bad: float, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    one, loss, calls = case(), distill._loss, iter(range(10_000))
    monkeypatch.setattr(distill, "_loss", lambda *args: loss(*args) * (bad if next(calls) % 3 == 1 else 1.0))
    model, history = one.run()
    assert all(value.isfinite().all() for value in model.parameters())
    assert history[-1].best < history[0].best


def test_a_student_that_only_gets_worse_comes_back_as_it_was(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    loss = distill._loss
    monkeypatch.setattr(distill, "_loss", lambda *args: -loss(*args))
    one = case()
    model, history = one.run()
    assert history[-1].best == history[0].distance and same(model, one.small)


def test_no_minutes_give_a_copy_at_once(clock: Clock, tmp_path: Path) -> None:
    one = case()
    model, history = one.run(0, checkpoint=tmp_path / "state")
    assert model is not one.small and same(model, one.small)
    assert len(history) == 1 and history[0].step == 0 and history[0].distance == history[0].best > 0
    assert clock.seconds < 1 and not list(tmp_path.iterdir())


def test_nothing_to_train_gives_a_copy_at_once(clock: Clock) -> None:
    one = case()
    everything = tuple(
        name for name, module in one.small.named_modules() if next(module.parameters(False), None) is not None
    )
    model, history = replace(one, layout=replace(one.layout, unused=everything)).run()
    assert same(model, one.small) and len(history) == 1


def test_wider_models_take_smaller_steps() -> None:
    layout = case(count=0).layout
    rates = [distill.learning_rate(replace(layout, width=width)) for width in (24, 307, 384, 768, 1024)]
    assert rates == pytest.approx([5e-4, 5e-4, 4e-4, 2e-4, 1.5e-4])


def test_the_rate_warms_up_and_goes_to_nothing() -> None:
    shares = np.linspace(0, 1, 201)
    rates = [_learning._rate(share) for share in shares]
    assert 0 < rates[0] < 0.05 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert shares[int(np.argmax(rates))] <= _learning.WARM_UP and 0.98 < max(rates) <= 1
