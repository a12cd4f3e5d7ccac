"""Zeros into a model: what goes first as a whole, then zeros at once or in rounds, each followed by training that keeps
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from torch import Tensor

from paredown import planning, sparsity
from paredown.encoder import copied
from paredown.files import state_of
from paredown.network import network
from paredown.pipeline._loaders import load_state
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._prepare import Prepared, calibration_batches
from paredown.pipeline._rounds import Rounds
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import SCORED_TOKENS, Student, nonzero
from paredown.pipeline._teaching import Teaching
from paredown.pipeline._work import Work
from paredown.sparsity import Pattern
from paredown.types import Limits, Plan


@dataclass
class Zeroing:
    """A run that makes zeros, from the dense model to the sparse one."""

    prepared: Prepared
    settings: Settings
    work: Work
    progress: Progress
    limits: Limits

    def student(self) -> Student:
        """The model after the last round; its `rounds` are the record of all of them, `zeros` where the zeros are."""
        prepared, settings, anatomy = self.prepared, self.settings, self.prepared.anatomy
        plan, model, records = Plan(anatomy.fingerprint, anatomy.identity()), prepared.model, list[dict[str, Any]]()
        lessons = list[dict[str, Any]]()
        if settings.cuts:  # structure before zeros: rows that go would take zeros along that were paid for
            first = self.settings.cutting_first()
            small = Rounds(prepared, first, self.work, self.progress, self.limits).student()
            plan, model, records, lessons = small.plan, small.model, [*small.rounds], [*small.recovery]
        model = copied(model, anatomy.layout)
        for number in range(1, settings.rounds + 1):
            facts, curve = self._round(number, model, plan)
            records.append({"round": len(records) + 1, "plan_id": plan.id, **facts})
            lessons += curve
        zeros = zeros_of(model, anatomy.layout)
        return Student(self._name(), "sparse", plan, model, recovery=tuple(lessons), rounds=tuple(records), zeros=zeros)

    def _round(self, number: int, model: Any, plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Zeroes the model's weights in place as far as this round goes, and trains them."""
        pattern, share = self._wanted(number)
        name, judge = f"zeros-{number}", self._rounds.quality
        load_state(model, self.work.tensors(name, lambda: self._zeroed(model, pattern, share)))
        give_back_what_is_freed()
        facts: dict[str, Any] = {"sparsity": share, "parameters": nonzero(model)}
        facts |= self.work.json(f"{name}-cut", lambda: {"quality_cut": judge(model)})
        curve: list[dict[str, Any]] = []
        if self.settings.trains:
            state, curve = self._trained(number, model, plan)
            load_state(model, state)
        facts |= self.work.json(f"{name}-quality", lambda: {"quality": judge(model)})
        return facts, curve

    @cached_property
    def _rounds(self) -> Rounds:
        return Rounds(self.prepared, self.settings, self.work, self.progress, self.limits)

    @cached_property
    def _teaching(self) -> Teaching:
        return Teaching(self.prepared, self.settings, self.work, self.progress)

    def _name(self) -> str:
        settings = self.settings
        pattern = Pattern.parse(settings.pattern)
        said = f"{pattern} zeros" if pattern.kind == "n:m" else f"{100 * settings.share:g}% zeros"
        said += f" in {pattern}" if pattern.kind == "block" else ""
        return f"{said}, {self._rounds.name()}" if settings.cuts else said

    def _wanted(self, number: int) -> tuple[Pattern, float]:
        """The pattern and share of zeros of a round; n:m comes down to n one by one as the schedule says."""
        settings, pattern = self.settings, Pattern.parse(self.settings.pattern)
        share = settings.share
        if number < settings.rounds:
            share = planning.gone_by(share, number / settings.rounds, settings.schedule)
            if pattern.kind == "n:m":
                pattern = Pattern("n:m", n=max(pattern.n, round(pattern.m * (1 - share))), m=pattern.m)
                share = cast(float, pattern.sparsity)
        return pattern, share

    def _zeroed(self, model: Any, pattern: Pattern, share: float) -> dict[str, Tensor]:
        settings, layout = self.settings, self.prepared.anatomy.layout
        if pattern.n == pattern.m and pattern.kind == "n:m":  # a first step too small for any zero
            return state_of(model)
        batches = calibration_batches(self.prepared.calibration, most_tokens=SCORED_TOKENS)
        dense = network(model, layout)
        self.progress.stage(f"Deciding how many zeros each matrix has, {settings.allocation}")
        shares = sparsity.allocate(dense, share, pattern, batches, how=settings.allocation)
        if left := [name for name in sparsity.matrices_of(model, layout) if name not in shares]:
            self.progress.say(f"Not all matrices divide into {pattern}; these stay as they are: {', '.join(left)}.")
        if settings.permute and pattern.kind == "n:m":
            dense = network(sparsity.permuted(model, layout, pattern), layout)
        self.progress.stage(f"Zeroing {100 * share:.3g}% by {settings.solver}", len(shares))
        found = sparsity.solve(
            dense,
            shares,
            pattern,
            settings.solver,
            batches,
            seed=settings.seed,
            progress=lambda name: self.progress.advance(note=name),
        )
        return state_of(found)

    def _trained(self, number: int, model: Any, plan: Plan) -> tuple[Mapping[str, Tensor], list[dict[str, Any]]]:
        settings, said = self.settings, f"zeros-{number}"
        curve: list[dict[str, Any]] = []

        def train() -> dict[str, Tensor]:
            if settings.recover == "finetune" or self.prepared.generates or settings.steps:
                fitted, lessons = self._rounds.trained(number, settings.rounds, model, plan)
                curve.extend(lessons)
            else:
                minutes = settings.minutes / settings.rounds
                name = f"round {number}" if settings.rounds > 1 else self._name()
                fitted, taught = self._teaching.distilled(name, model, minutes)
                curve.extend(taught)
            return state_of(fitted)

        state = self.work.tensors(f"{said}-trained", train)
        return state, self.work.json(f"{said}-lessons", lambda: curve)


def zeros_of(model: Any, layout: Any) -> tuple[dict[str, Any], ...]:
    """Of every weight matrix its share of zeros, bottom-up."""
    return tuple(
        {"matrix": name, "shape": list(weight.shape), "sparsity": float((weight == 0).float().mean())}
        for name, part in sparsity.matrices_of(model, layout).items()
        if (weight := sparsity.matrix(part)).numel()
    )
