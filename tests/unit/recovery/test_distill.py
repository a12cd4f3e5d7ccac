"""Distillation by a clock of its own: every look at the time takes a tenth of a second, so nothing depends on speed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from paredown.anatomy import describe
from paredown.calibration import distance, tensors
from paredown.encoder import Encoder
from paredown.errors import FingerprintMismatch, ParedownError
from paredown.recovery import _checkpoint, distill
from paredown.recovery.distill import Progress
from paredown.surgery import cut
from paredown.tasks import Tokens, pad
from paredown.types import Layout, Plan
from tests.contracts.families import FAMILIES, VOCABULARY, tiny


@dataclass
class Clock:
    """`seconds` since the start; every look at it moves it by `tick`."""

    seconds: float = 0.0
    tick: float = 0.1

    def monotonic(self) -> float:
        self.seconds += self.tick
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(distill, "time", SimpleNamespace(monotonic=found.monotonic, perf_counter=time.perf_counter))
    monkeypatch.setattr(distill, "_half_precision_pays", lambda _: False)
    return found


@dataclass(frozen=True)
class Case:
    teacher: Encoder
    small: nn.Module
    layout: Layout
    tokens: Tokens
    wanted: Tensor

    def run(self, minutes: float = 0.5, **settings: Any) -> tuple[nn.Module, list[Progress]]:
        settings = {"tokens": self.tokens, "wanted": self.wanted, **settings}
        return distill.recover(self.small, layout=self.layout, minutes=minutes, **settings)

    def far(self, model: nn.Module, held: Any) -> float:
        """Mean distance to the teacher over some texts, one by one."""
        encoder, total = Encoder(model, self.layout), 0.0
        for i in held:
            inputs = pad([self.tokens.ids[i]], pad_id=self.tokens.pad_id, input_names=self.tokens.input_names)
            with torch.no_grad():
                output = encoder(**tensors(inputs, encoder))
            total += float(distance(output, self.wanted[i : i + 1], encoder.output_name))
        return total / len(held)


def texts(count: int, names: tuple[str, ...], pad_id: int, *, seed: int = 0) -> Tokens:
    random = np.random.default_rng(seed)
    ids = tuple(random.integers(5, VOCABULARY, random.integers(1, 12)) for _ in range(count))
    return Tokens(ids, pad_id, names, 0)


def case(family: str = "bert", task: str = "text-classification", *, count: int = 200, seed: int = 0) -> Case:
    model = tiny(family, task, seed=seed)
    anatomy = describe(model)
    keep = {**anatomy.identity(), "layer.0.heads": (1, 2), "layer.1.neurons": (0, 4, 9), "layer.2.heads": ()}
    small = cut(model, anatomy, Plan(anatomy.fingerprint, keep))
    encoder = Encoder(model, anatomy.layout)
    tokens = texts(count, encoder.input_names, int(model.config.pad_token_id))
    wanted = distill.teach(encoder, tokens) if count else torch.empty(0, 3)
    return Case(encoder, small, anatomy.layout, tokens, wanted)


def stop_at(step: int) -> Callable[[Progress], None]:
    def report(at: Progress) -> None:
        if at.step == step:
            raise KeyboardInterrupt

    return report


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


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
    monkeypatch.setattr(distill, "BATCH", 4)  # chunks of 64 texts
    one = case()
    found = distill.teach(one.teacher, one.tokens, seconds=0.25)
    assert len(found) == 128
    torch.testing.assert_close(found, one.wanted[:128], rtol=1e-4, atol=1e-4)
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
    assert 8 <= len(history) <= distill.CHECKS + 2
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
    rate = distill._rate
    monkeypatch.setattr(distill, "_rate", lambda share: rate(share) if share < 0.6 else 3000.0)
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
    rates = [distill._rate(share) for share in shares]
    assert 0 < rates[0] < 0.05 and rates[-1] == pytest.approx(0, abs=1e-9)
    assert shares[int(np.argmax(rates))] <= distill.WARM_UP and 0.98 < max(rates) <= 1


# --------------------------------------------------------------------------------------------------- stop and go on


def stored(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_ctrl_c_saves_and_the_next_run_goes_on(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, path = case(), tmp_path / "new" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        one.run(checkpoint=path, report=stop_at(40))
    notes, arrays = stored(path)
    assert int(notes["step"]) == 40 and 5 < float(notes["seconds"]) < 25
    assert not list(path.parent.glob("*.part"))

    found: dict[str, Tensor] = {}  # weights and moments as the second run starts to learn
    restore = _checkpoint.Checkpoint.restore

    def spy(checkpoint: _checkpoint.Checkpoint) -> _checkpoint.State | None:
        state = restore(checkpoint)
        for name, value in checkpoint.trained.items():
            found[f"now.{name}"] = value.detach().clone()
            found.update({f"{k}.{name}": v.clone() for k, v in checkpoint.optimizer.state[value].items()})
        return state

    monkeypatch.setattr(_checkpoint.Checkpoint, "restore", spy)
    steps: list[Progress] = []
    _, history = one.run(checkpoint=path, report=steps.append)
    assert all(torch.equal(value, arrays[name]) for name, value in found.items())
    assert {name for name in arrays if not name.startswith(("best.", "start."))} == set(found)
    assert any(name.startswith("exp_avg_sq.") and value.any() for name, value in found.items())
    assert {float(value) for name, value in found.items() if name.startswith("step.")} == {40.0}
    assert steps[0].step == 41 and steps[0].seconds > float(notes["seconds"])
    assert history[0].step == 0 and history[-1].seconds == pytest.approx(30, abs=1)
    assert [p.step for p in history] == sorted(p.step for p in history)


def test_the_stored_moments_are_used(clock: Clock, tmp_path: Path) -> None:
    """With the second moments of a fresh start the first step after a stop would be far larger."""
    one, path = case(), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        one.run(checkpoint=path, report=stop_at(40))
    with pytest.raises(KeyboardInterrupt):
        one.run(checkpoint=path, report=stop_at(41))
    after = {name: value for name, value in stored(path)[1].items() if name.startswith("step.")}
    assert after and {float(value) for value in after.values()} == {41.0}


def test_a_kill_after_a_checkpoint_goes_on_from_there(clock: Clock, tmp_path: Path) -> None:
    """An error that nobody catches stands for kill -9: nothing is written any more."""
    one, path = case(), tmp_path / "state"
    saved: list[tuple[int, float]] = []

    def die(at: Progress) -> None:
        if path.exists():
            if not saved:
                notes, _ = stored(path)
                saved.append((int(notes["step"]), float(notes["seconds"])))
            if at.step > saved[0][0] + 20:
                raise SystemError("killed")

    with pytest.raises(SystemError):
        one.run(2, checkpoint=path, report=die)
    step, seconds = saved[0]
    assert 30 < seconds < 33
    steps: list[Progress] = []
    model, history = one.run(2, checkpoint=path, report=steps.append)
    assert steps[0].step == step + 1 and seconds < steps[0].seconds < seconds + 2
    assert history[-1].seconds == pytest.approx(120, abs=1)
    assert one.far(model, distill.held_out(one.tokens.lengths)) == pytest.approx(history[-1].best, rel=1e-4)


def test_a_finished_run_is_not_run_again_and_more_minutes_go_on(clock: Clock, tmp_path: Path) -> None:
    one, path = case(), tmp_path / "state"
    model, history = one.run(0.3, checkpoint=path)
    steps: list[Progress] = []
    again, told = one.run(0.3, checkpoint=path, report=steps.append)
    assert not steps and same(again, model) and told == history
    longer, more = one.run(0.6, checkpoint=path, report=steps.append)
    assert steps[0].step == history[-1].step + 1 and more[: len(history)] == history
    assert more[-1].best <= history[-1].best


def test_the_best_state_survives_a_stop(clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good until stopped; whatever comes afterwards is bad, and forgotten."""
    one, path = case(), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        one.run(checkpoint=path, report=stop_at(60))
    monkeypatch.setattr(distill, "_rate", lambda _: 3000.0)
    model, history = one.run(checkpoint=path)
    assert history[-1].distance > history[-1].best < history[0].best
    assert one.far(model, distill.held_out(one.tokens.lengths)) == pytest.approx(history[-1].best, rel=1e-4)


def test_a_checkpoint_appears_whole_or_not_at_all(
    clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, path = case(), tmp_path / "state"
    with pytest.raises(KeyboardInterrupt):
        one.run(checkpoint=path, report=stop_at(10))
    before, save = path.read_bytes(), _checkpoint.save_file

    def half(arrays: Any, where: Path, **about: Any) -> None:
        save(arrays, where, **about)
        where.write_bytes(where.read_bytes()[:1000])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(_checkpoint, "save_file", half)
    with pytest.raises(ParedownError, match="cannot be written: .*No space left"):
        one.run(checkpoint=path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    one.run(0.01, checkpoint=path)


@pytest.mark.parametrize("damage", (b"", b"not a checkpoint", None))
def test_a_corrupt_checkpoint_is_named(damage: bytes | None, clock: Clock, tmp_path: Path) -> None:
    one, path = case(), tmp_path / "state"
    one.run(0.05, checkpoint=path)
    path.write_bytes(path.read_bytes()[:2000] if damage is None else damage)
    with pytest.raises(ParedownError, match="cannot be read .*delete it to start anew"):
        one.run(0.05, checkpoint=path)


@pytest.mark.parametrize("other", ("family", "weights", "texts", "seed", "shapes", "file"))
def test_a_foreign_checkpoint_is_refused(other: str, clock: Clock, tmp_path: Path) -> None:
    one, path = case(), tmp_path / "state"
    if other == "file":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, path)
    else:
        one.run(0.05, checkpoint=path)
    changed, settings = one, {"checkpoint": path}
    if other == "family":
        changed = case("distilbert")
    elif other == "weights":
        changed = case(seed=1)
    elif other == "texts":
        tokens = replace(one.tokens, ids=one.tokens.ids[::-1])
        changed = replace(one, tokens=tokens, wanted=one.wanted.flip(0))
    elif other == "seed":
        settings["seed"] = 1  # type: ignore[assignment]
    elif other == "shapes":
        changed = replace(one, small=one.teacher.model)
    with pytest.raises(FingerprintMismatch, match="of another model, or of other texts"):
        changed.run(0.05, **settings)


def test_rounding_does_not_make_a_checkpoint_foreign(clock: Clock, tmp_path: Path) -> None:
    """A closed-form solution before the training differs in its last digits from one start to the next."""
    one, path = case(), tmp_path / "state"
    _, history = one.run(0.05, checkpoint=path)
    with torch.no_grad():
        for value in one.small.parameters():
            value.mul_(1 + 1e-6)
    assert one.run(0.05, checkpoint=path)[1] == history
