"""Smaller models for a time: which layers and widths, cut, re-fitted, distilled.

Legend: L layers, U units of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from paredown import planning
from paredown.errors import InfeasibleBudget
from paredown.files import state_of
from paredown.importance import score
from paredown.pipeline._latency import Stopwatch, widths_of
from paredown.pipeline._loaders import load_state
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._prepare import Prepared, calibration_batches
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._teaching import Teaching
from paredown.pipeline._work import Work
from paredown.planning import LatencyTable
from paredown.recovery import reconstruct
from paredown.surgery import cut
from paredown.types import Budget, Limits, Plan, Scores

JUDGED_TOKENS = 4_000  # of further texts, on which the scale of each group's scores is measured
SCORED_TOKENS = 24_000  # rows for the 1536 inputs of a small FFN fifteen times over
AGREEMENT = 0.03  # prediction and measurement must agree this well, or the plan is solved again
ROUNDS = 4  # of solving again
CAREFUL = 9  # rounds of timing a plan: it is faster than the dense model, so one round says less
MOSTLY_KEPT = 0.5  # of the parameters of its layers: a student keeps as many layers as leave it that
BISECTIONS = 12  # of a time: to within a thousandth of the dense model's


@dataclass(frozen=True)
class Student:
    """A smaller model, how it came about, and what was predicted and measured of its time (in dense = 1)."""

    name: str
    kind: str  # "pruned" | "layer-drop" | "sparse"
    plan: Plan
    model: Any
    note: str = ""
    predictions: tuple[dict[str, Any], ...] = ()
    recovery: tuple[dict[str, Any], ...] = ()
    rounds: tuple[dict[str, Any], ...] = ()  # of pruning, where there were several: parameters, quality cut, quality
    zeros: tuple[dict[str, Any], ...] = ()  # of a sparse model: every weight matrix with its share of zeros


@dataclass
class Workshop:
    """What all students of a run share: the dense model, its scores, the latency table, the teacher's outputs."""

    prepared: Prepared
    settings: Settings
    work: Work
    watch: Stopwatch
    progress: Progress
    limits: Limits

    def __post_init__(self) -> None:
        self.batches = calibration_batches(self.prepared.calibration, most_tokens=SCORED_TOKENS)
        self.table: LatencyTable = self.watch.table(self.progress)
        self.scores = self._scores()
        self._teaching = Teaching(self.prepared, self.settings, self.work, self.progress)
        give_back_what_is_freed()

    def _scores(self) -> Scores:
        anatomy = self.prepared.anatomy

        def compute() -> dict[str, Tensor]:
            self.progress.stage("Scoring heads and neurons")
            used = sum(len(batch["input_ids"]) for batch in self.batches)
            tokens = self.prepared.calibration
            further = replace(tokens, ids=tokens.ids[used:])
            further = further if further.lengths.sum() >= JUDGED_TOKENS else tokens  # few texts serve for both
            judge = calibration_batches(further, most_tokens=JUDGED_TOKENS)
            found = score(self.prepared.model, anatomy, self.batches, "obs", judge=judge, seed=self.settings.seed)
            return {name: torch.from_numpy(np.asarray(value)) for name, value in found.values.items()}

        stored = self.work.tensors("scores", compute)
        return Scores("obs", {name: value.numpy() for name, value in stored.items()})

    # ------------------------------------------------------------------------------------------------- plans

    def plan(
        self, name: str, seconds: float, *, depth: int | None = None, as_measured: bool = True
    ) -> tuple[Plan, tuple[dict[str, Any], ...]]:
        """The plan that takes at most `seconds` as measured: solved, timed, and solved again until both agree.

        With `depth` that many layers stay, spread evenly; otherwise as many as leave them most of their widths. Not
        `as_measured`, the plan is the first solution, timed once for the record.
        Raises InfeasibleBudget with the fewest seconds that can be reached.
        """
        rounds = ROUNDS if as_measured else 1
        stored = self.work.json(f"plan-{name}", lambda: self._solve(name, seconds, depth, rounds))
        return Plan.from_json(stored["plan"]), tuple(stored["predictions"])

    def _solve(self, name: str, seconds: float, depth: int | None, rounds: int) -> dict[str, Any]:
        predictions: list[dict[str, Any]] = []
        table, tried, corrections = self.table, list[tuple[float, Plan]](), list[float]()
        self.progress.stage(f"Planning {name}", rounds)
        for turn in range(1, rounds + 1):
            try:
                plan = self._best_depth(table, seconds) if depth is None else self._at_depth(table, seconds, depth)
            except InfeasibleBudget:
                if not tried:
                    raise
                break  # the corrected table leaves nothing narrower
            widths = widths_of(plan)
            predicted = table.predict(widths)
            measured = self.watch.time([widths], rounds=CAREFUL)[widths]
            predictions.append(
                {
                    "round": turn,
                    "what": name,
                    "predicted_ms": predicted * self.milliseconds,
                    "measured_ms": measured * self.milliseconds,
                }
            )
            self.progress.advance()
            tried.append((measured, plan))
            if abs(measured - predicted) <= AGREEMENT * measured and measured <= seconds * (1 + AGREEMENT):
                break
            corrections.append(measured / max(self.table.predict(widths), 1e-9))
            table = replace(self.table, scale=float(np.median(corrections)))
        fast = [one for one in tried if one[0] <= seconds * (1 + AGREEMENT)]
        best = max(fast, key=lambda one: one[0]) if fast else min(tried, key=lambda one: one[0])
        return {"plan": best[1].to_json(), "predictions": predictions}

    @property
    def milliseconds(self) -> float:
        """What the stopwatch's unit of time is in milliseconds."""
        return 1000.0 if self.watch.metric == "offline" else 1.0

    def _best_depth(self, table: LatencyTable, seconds: float) -> Plan:
        """The deepest plan that still keeps most of its layers' parameters; else the one that keeps most."""
        best: tuple[float, Plan] | None = None
        total = self.prepared.anatomy.group("layers").units
        closest = InfeasibleBudget("", closest=float("inf"))
        for depth in range(total, 0, -1):
            try:
                plan = self._at_depth(table, seconds, depth)
            except InfeasibleBudget as error:
                closest = error if error.closest < closest.closest else closest
                continue
            share = self._share(plan)
            if share >= MOSTLY_KEPT:
                return plan
            if best is None or share > best[0]:
                best = (share, plan)
        if best is None:
            raise closest
        return best[1]

    def _at_depth(self, table: LatencyTable, seconds: float, depth: int) -> Plan:
        anatomy = self.prepared.anatomy
        layers = spread(anatomy.group("layers").units, depth)
        least = self.limits.multiple_of if self.limits.uniform else 0  # a stock config cannot say "no FFN"
        groups = tuple(
            replace(g, minimum=min(least, g.units) if g.kind == "neuron" else 0)
            for g in anatomy.groups
            if g.kind != "layer" and g.layer in layers
        )
        part = replace(anatomy, groups=groups)
        costs = planning.latency_costs(part, table)
        budget = Budget("latency", min(1.0, seconds / costs.dense))
        found = planning.plan(part, self.scores, budget, self.limits, costs=costs)
        keep = {**anatomy.identity(), **found.keep, "layers": layers}
        return Plan(anatomy.fingerprint, keep, source=f"layers {list(layers)}, {found.source}")

    def seconds_for(self, error: float) -> float:
        """The fewest seconds at which no more than `error` of divergence is predicted, with all layers kept."""
        depth = self.prepared.anatomy.group("layers").units
        low, high = 0.0, self.table.predict(self.watch.full)
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            try:
                fine = self._predicted_error(self._at_depth(self.table, middle, depth)) <= error
            except InfeasibleBudget:
                fine = False
            low, high = (low, middle) if fine else (middle, high)
        return high

    def _predicted_error(self, plan: Plan) -> float:
        """The measured errors of all groups' widths added up: what they leave together is seldom less."""
        return sum(
            float(planning.error_of_width(values)[len(plan.keep[name])]) for name, values in self.scores.values.items()
        )

    def _share(self, plan: Plan) -> float:
        """Of the parameters of the layers that stay, the share that stays."""
        costs = planning.arithmetic(self.prepared.anatomy, "params").group
        names = [name for i in plan.keep["layers"] for name in (f"layer.{i}.heads", f"layer.{i}.neurons")]
        return float(sum(costs[n][len(plan.keep[n])] for n in names) / sum(costs[n][-1] for n in names))

    # ----------------------------------------------------------------------------------------------- students

    def cut(self, plan: Plan) -> Any:
        """The model cut, with the dense model's own embeddings: no stage changes them, and copies would add up."""
        dense, anatomy = self.prepared.model, self.prepared.anatomy
        small = cut(dense, anatomy, plan)
        for name in anatomy.layout.embeddings:
            small.set_submodule(name, dense.get_submodule(name), strict=True)
        return small

    def refit(self, name: str, plan: Plan, **about: Any) -> Student:
        """Cut and closed-form recovery: a student without any training."""
        prepared, small = self.prepared, self.cut(plan)

        def compute() -> dict[str, Tensor]:
            self.progress.stage(f"Re-fitting {name}", prepared.anatomy.group("layers").units)
            fitted = reconstruct.recover(
                small,
                teacher=prepared.model,
                anatomy=prepared.anatomy,
                plan=plan,
                batches=self.batches,
                progress=self.progress.advance,
            )
            return state_of(fitted)

        load_state(small, self.work.tensors(f"refit-{name}", compute))
        give_back_what_is_freed()
        return Student(name, "pruned", plan, small, **about)

    def distilled(self, student: Student, minutes: float) -> Student:
        """The student after so many minutes of learning the dense model's outputs."""
        model, curve = self._teaching.distilled(student.name, student.model, minutes)
        return replace(student, model=model, recovery=student.recovery + curve)


def nonzero(model: Any) -> int:
    """The parameters that are not zero."""
    return sum(int(torch.count_nonzero(value)) for value in model.parameters())


def spread(total: int, depth: int) -> tuple[int, ...]:
    """`depth` of `total` layers, first and last among them, evenly spread (DistilBERT's choice, arXiv:1910.01108).

    A single one is the last: it was trained to stand before the head.
    """
    if depth == 1:
        return (total - 1,)
    return tuple(int(i) for i in np.round(np.linspace(0, total - 1, depth)))


def drop_layers(prepared: Prepared, layers: Sequence[int]) -> Plan:
    """What anybody can script: some layers stay as they are, the others go."""
    keep = {**prepared.anatomy.identity(), "layers": tuple(layers)}
    return Plan(prepared.anatomy.fingerprint, keep, source=f"layers {list(layers)} as they are")
