"""A training that is stopped goes on from where it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from paredown.errors import FingerprintMismatch, ParedownError
from paredown.recovery import _checkpoint, _learning, distill
from paredown.recovery.distill import Progress
from tests.unit.recovery.cases import Clock, case, same, stop_at


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
    monkeypatch.setattr(_learning, "_rate", lambda _: 3000.0)
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
