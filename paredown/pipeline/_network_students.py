"""Smaller image classifiers: planned to a time or an amount, cut, re-fitted, trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from paredown import planning
from paredown.errors import InfeasibleBudget
from paredown.files import state_of
from paredown.layers import layers_of
from paredown.pipeline._ladder import HOPELESS, MARGIN, out_of_reach
from paredown.pipeline._network_amounts import Amounts
from paredown.pipeline._network_table import Table
from paredown.pipeline._networks import Pictured
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._students import Student
from paredown.pipeline._work import Work
from paredown.recovery import refit_graph, train_on_pictures
from paredown.surgery import cut_graph, parameters
from paredown.types import Plan

# Speed-ups of the students that are tried when a drop is the dial. Of the CIFAR ResNets the deeper one lost 0.8 points
# at 1.3 times without training, the other 3.
REFITTED = (1.15, 1.35, 1.6)
TRAINED = (1.4, 1.9, 2.8)  # beside the most careful of those
BRIEFLY_TRAINED = 1.4  # with less than two minutes: what is cut deeper does not come back in that time
FEW_MINUTES = 2.0

MILDER = "milder"  # than what reaches the target as it is: it reaches it in int8


@dataclass(frozen=True)
class Rung:
    """A student to make: the seconds that it may take, as it is or in int8, and whether it shares the minutes."""

    name: str
    seconds: float
    trained: bool
    int8: bool = False


@dataclass
class NetworkWorkshop:
    """What all students of a run share."""

    prepared: Pictured
    settings: Settings
    work: Work
    progress: Progress
    table: Table

    # ------------------------------------------------------------------------------------------- for a speed or a drop

    def for_speed(self, dense_seconds: float) -> list[Student]:
        """The students of a run whose dial is a speed or a drop; `dense_seconds` are the fastest dense model's."""
        settings = self.settings
        planned: list[tuple[Rung, Plan, tuple[dict[str, Any], ...]]] = []
        closest: list[float] = []  # seconds of those that are out of reach
        for rung in self._rungs(dense_seconds):
            try:
                plan, taken, predictions = self.table.plan(rung.name, rung.seconds, int8=rung.int8)
            except InfeasibleBudget as error:
                missed, taken = True, error.closest
            else:
                missed = settings.dial != "max_drop" and taken * HOPELESS > rung.seconds
                planned += [] if missed else [(rung, plan, predictions)]
            if missed:
                closest.append(taken)
                self.progress.say(f"{rung.name} is out of reach on {settings.target}.")
        if settings.dial != "max_drop" and closest and not planned and not self._int8_reaches(dense_seconds):
            best = min(closest)
            raise out_of_reach(settings, dense_seconds / best if settings.dial == "speedup" else best * 1e3)
        minutes = settings.minutes / max(1, sum(rung.trained for rung, _, _ in planned))
        return [self.student(rung.name, plan, minutes * rung.trained, told) for rung, plan, told in planned]

    def _rungs(self, dense_seconds: float) -> list[Rung]:
        """The students to make; for a speed that the dense network has not even in int8, also one that has it so."""
        settings, watch = self.settings, self.table.watch
        trained = settings.trains and settings.minutes > 0
        if settings.dial != "max_drop":
            goal = self._goal(dense_seconds) / MARGIN
            rungs = [Rung("at the target", goal, trained)] if goal < watch.dense else []
            if watch.dense_int8 and watch.dense_int8 < watch.dense and not self._int8_reaches(dense_seconds):
                rungs.append(Rung(MILDER, goal, trained, int8=True))
            return rungs
        if not trained:
            speeds = [(speed, False) for speed in REFITTED]
        elif settings.minutes < FEW_MINUTES:
            speeds = [(BRIEFLY_TRAINED, True)]
        else:
            speeds = [(REFITTED[0], False), *((speed, True) for speed in TRAINED)]
        return [Rung(f"{speed:g} times{', trained' * learns}", watch.dense / speed, learns) for speed, learns in speeds]

    def _goal(self, dense_seconds: float) -> float:
        """The seconds that were asked for."""
        settings = self.settings
        return settings.latency_ms / 1e3 if settings.latency_ms else dense_seconds / (settings.speedup or 1.0)

    def _int8_reaches(self, dense_seconds: float) -> bool:
        """Whether the dense network in int8 is as fast as was asked for."""
        seconds = self.table.watch.dense_int8
        return seconds is not None and seconds <= self._goal(dense_seconds)

    # ------------------------------------------------------------------------------------------------- for an amount

    def for_amount(self) -> list[Student]:
        """The student of the amount that was asked for: scored, cut and recovered in one round or in several."""
        settings, amounts = self.settings, Amounts(self.table)
        name = f"{settings.objective()['value']}"
        records: list[dict[str, Any]] = []
        curve: tuple[dict[str, Any], ...] = ()
        model, plan, given = self.prepared.model, Plan(self.prepared.anatomy.fingerprint, {}), None
        for number in range(1, settings.rounds + 1):
            share = 1.0
            if number < settings.rounds:
                share = planning.gone_by(1.0, number / settings.rounds, settings.schedule)
            again = None if given is None else self.table.scores_after(number, given.model, given.plan)
            plan = amounts.plan(share, again)
            if given is not None:  # what went once does not come back
                stay = {
                    name: tuple(u for u in units if u in given.plan.keep[name]) for name, units in plan.keep.items()
                }
                plan = replace(plan, keep=stay)
            stage = name if settings.rounds == 1 else f"{name}, round {number}"
            steps = (settings.steps or 0) if settings.trains else 0
            minutes = settings.minutes / settings.rounds if settings.trains and not steps else 0.0
            steps = steps * number // settings.rounds - steps * (number - 1) // settings.rounds
            made = self.student(stage, plan, minutes, steps=steps, from_=given)
            model, curve, given = made.model, curve + made.recovery, made
            records.append(self._record(number, plan, made))
        return [Student(name, "pruned", plan, model, recovery=curve, rounds=tuple(records))]

    def _record(self, number: int, plan: Plan, made: Student) -> dict[str, Any]:
        data, task = self.prepared.splits.guardrail, self.prepared.task

        def judged() -> dict[str, Any]:
            outputs = self.prepared.outputs_of(made.model, data)
            return {"quality": float(task.per_example(outputs, data).mean())}

        return {
            "round": number,
            "plan_id": plan.id,
            "parameters": parameters(made.model),
            **self.work.json(f"judged-{number}", judged),
        }

    # --------------------------------------------------------------------------------------------------------- one

    def student(
        self,
        name: str,
        plan: Plan,
        minutes: float,
        predictions: tuple[dict[str, Any], ...] = (),
        steps: int = 0,
        from_: Student | None = None,
    ) -> Student:
        """The network cut by a plan, re-fitted unless nothing is to follow a cut, and trained for so many minutes, or
        for so many steps where there are any.

        Cut `from_` a student of an earlier round, it begins with what that one has learnt.
        """
        prepared, settings = self.prepared, self.settings
        small = cut_graph(prepared.model, prepared.anatomy, plan)
        if from_ is not None:
            self._inherit(small, plan, from_)
        if settings.recover != "none":
            self._load(small, self.work.tensors(f"refit-{name}", lambda: self._refitted(name, small, plan)))
        curve: tuple[dict[str, Any], ...] = ()
        if minutes or steps:
            lessons: list[dict[str, Any]] = []
            train = partial(self._trained, name, small, plan, minutes, steps, lessons)
            self._load(small, self.work.tensors(f"train-{name}", train))
            curve = tuple(self.work.json(f"lessons-{name}", lambda: lessons))
        return Student(name, "pruned", plan, small, predictions=predictions, recovery=curve)

    def _inherit(self, small: fx.GraphModule, plan: Plan, earlier: Student) -> None:
        """Puts into a cut network the tensors that an earlier, larger student has, as far as the plan keeps them."""
        anatomy = self.prepared.anatomy
        whole = dict(self.prepared.model.state_dict())
        theirs = dict(earlier.model.state_dict())
        with torch.no_grad():
            for name, tensor in small.state_dict().items():
                value = theirs[name]
                for axis, size in enumerate(whole[name].shape):
                    before, now = (anatomy.kept(one, name, axis, size).tolist() for one in (earlier.plan, plan))
                    at = {entry: place for place, entry in enumerate(before)}
                    value = value.index_select(axis, torch.tensor([at[entry] for entry in now]))
                tensor.copy_(value)

    def _refitted(self, name: str, small: fx.GraphModule, plan: Plan) -> dict[str, Tensor]:
        prepared = self.prepared
        self.progress.stage(f"Re-fitting {name}", len(layers_of(small)))
        fitted = refit_graph(
            small,
            teacher=prepared.model,
            anatomy=prepared.anatomy,
            plan=plan,
            pictures=prepared.batches(prepared.scored),
            progress=self.progress.advance,
        )
        return state_of(fitted)

    def _trained(
        self, name: str, small: fx.GraphModule, plan: Plan, minutes: float, steps: int, lessons: list[dict[str, Any]]
    ) -> dict[str, Tensor]:
        settings, prepared = self.settings, self.prepared
        said: Callable[[Any], None] = _said(self.progress, steps)
        self.progress.stage(f"Training {name}", float(steps) if steps else 60 * minutes)
        trained, history = train_on_pictures(
            small,
            teacher=prepared.model,
            data=prepared.splits.calibration,
            mean=prepared.mean,
            std=prepared.std,
            anatomy=prepared.anatomy,
            plan=plan,
            minutes=None if steps else minutes,
            steps=steps or None,
            mirrored=settings.mirrored,
            objective="finetune" if settings.recover == "finetune" else "distill",
            checkpoint=self.work.path(f"train-{name}.checkpoint"),
            seed=settings.seed,
            report=said,
        )
        lessons += [
            {"candidate": name, "minutes": one.seconds / 60, "step": one.step, "distance": one.distance}
            for one in history
        ]
        return state_of(trained)

    def _load(self, model: fx.GraphModule, state: dict[str, Tensor]) -> None:
        model.load_state_dict(state, strict=True)


def _said(progress: Progress, steps: int) -> Callable[[Any], None]:
    """Moves the bar by what was done since the last word."""
    before = [0.0]

    def said(one: Any) -> None:
        now = float(one.step if steps else one.seconds)
        progress.advance(now - before[0], f"divergence {one.best:.4f}")
        before[0] = now

    return said
