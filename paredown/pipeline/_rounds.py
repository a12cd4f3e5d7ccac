"""A smaller model by amounts: 25 % of the heads, a layer, half of the parameters; at once, or in rounds with recovery.

Every round scores what is left anew, cuts to its share of the whole way, re-fits and trains; each is kept on disk, so a
run that is stopped goes on in the round it was in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from paredown import planning
from paredown.errors import InfeasibleBudget, ParedownError
from paredown.files import state_of
from paredown.importance import criteria, score_each
from paredown.network import network
from paredown.pipeline._loaders import load_state
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._prepare import Prepared, calibration_batches, describe_loaded, outputs_of
from paredown.pipeline._settings import KINDS, PROTECTED, TRAINED, Progress, Settings
from paredown.pipeline._students import SCORED_TOKENS, Student
from paredown.pipeline._work import Work
from paredown.planning import Shares
from paredown.recovery import recover
from paredown.recovery.distill import Progress as Lesson
from paredown.surgery import cut, parameters
from paredown.types import Anatomy, Array, Budget, Limits, Plan, Scores

UNITS = {"heads": "head", "queries": "query", "neurons": "neuron", "layers": "layer", "sublayers": "sublayer"}
FINE = 8  # multiples of what an engine likes that a layer must have, or amounts could not be met


def fitting(limits: Limits, anatomy: Anatomy) -> Limits:
    """The limits, without multiples that are too coarse for layers as narrow as these."""
    narrowest = min(group.units for group in anatomy.groups if group.kind == "neuron")
    return limits if narrowest >= FINE * limits.multiple_of else replace(limits, multiple_of=1)


@dataclass(frozen=True)
class Rounds:
    """A run by amounts, from the dense model to the smaller one."""

    prepared: Prepared
    settings: Settings
    work: Work
    progress: Progress
    limits: Limits

    def student(self) -> Student:
        """The model after the last round; its `rounds` are the record of all of them."""
        prepared, settings = self.prepared, self.settings
        anatomy, model = prepared.anatomy, prepared.model
        self._check_reachable()
        kept = Plan(anatomy.fingerprint, anatomy.identity())
        here, records, lessons = anatomy, list[dict[str, Any]](), list[dict[str, Any]]()
        for number in range(1, settings.rounds + 1):
            plan = self._plan(number, model, here, kept)
            step = planning.relative(plan, kept, here)
            small = cut(model, here, step)
            state, record, curve = self._recovered(number, small, model, here, step, plan)
            load_state(small, state)
            records.append(record)
            lessons += curve
            model, kept, here = small, plan, describe_loaded(prepared.loaded, small)
            give_back_what_is_freed()
        for warning in planning.collapse_warnings(anatomy, kept, generative=prepared.generates):
            self.progress.say(warning)
        return Student(self.name(), "pruned", kept, model, recovery=tuple(lessons), rounds=tuple(records))

    def _check_reachable(self) -> None:
        """Raises InfeasibleBudget before the first round what the last one would raise."""
        anatomy = self.prepared.anatomy
        values = {group.name: np.arange(1.0, group.units + 1) for group in anatomy.groups}
        values["sublayers"] = np.arange(1.0, 2 * anatomy.group("layers").units + 1)
        scores, settings = Scores("any", values), self.settings
        if settings.parameters is None:
            self._by_shares(scores, settings.shares)
        else:
            self._by_parameters(scores, settings.shares, settings.parameters)

    def name(self) -> str:
        settings = self.settings
        said = []
        for kind in KINDS:
            value = getattr(settings, kind)
            if value:
                said.append(
                    f"{100 * value:g}% of the {kind}"
                    if value < 1
                    else f"{value:g} {kind[: -1 if value == 1 else None]}"
                )
        if settings.parameters is not None:
            said.append(f"{100 * (1 - settings.parameters):g}% of the parameters")
        return f"without {' and '.join(filter(None, (', '.join(said[:-1]), said[-1])))}"

    # ------------------------------------------------------------------------------------------------ what goes

    @property
    def protect(self) -> tuple[int, int]:
        """How many of the first and of the last layers stay whole: of a short model's layers half are free."""
        total = self.prepared.anatomy.group("layers").units
        asked = self.settings.protect
        if asked is None:
            asked = min(PROTECTED, total // 4) if self.prepared.generates and not self.limits.uniform else 0
        return asked, asked

    def _plan(self, number: int, model: Any, here: Anatomy, kept: Plan) -> Plan:
        anatomy, settings = self.prepared.anatomy, self.settings

        def solve() -> str:
            part = f", round {number} of {settings.rounds}" if settings.rounds > 1 else ""
            self.progress.stage(f"Scoring{part}")
            done = number / settings.rounds
            shares = settings.shares
            if number < settings.rounds:
                shares = shares.at(number, settings.rounds, self._totals(), settings.schedule)
            scores = planning.lifted(self._scores(model, here, shares), kept, anatomy)
            if settings.parameters is None:
                return self._by_shares(scores, shares).to_json()
            gone = Shares(neurons=1 - settings.parameters).at(
                number, settings.rounds, {**dict.fromkeys(KINDS, 0), "neurons": 10_000}, settings.schedule
            )
            share = settings.parameters if done == 1 else 1 - gone.neurons / 10_000
            return self._by_parameters(scores, shares, share).to_json()

        return Plan.from_json(self.work.json(f"round-{number}-plan", solve))

    def _totals(self) -> dict[str, int]:
        """How many units of each kind there are, heads and neurons in as many layers as stay in the end at least."""
        anatomy, shares = self.prepared.anatomy, self.settings.shares
        depth = anatomy.group("layers").units
        left = max(1, depth - shares.count("layers", depth) - shares.count("sublayers", 2 * depth))
        found = {"layers": depth, "sublayers": 2 * depth}
        for kind in ("heads", "queries", "neurons"):
            units = sum(group.units for group in anatomy.groups if group.name.endswith(f".{kind}"))
            found[kind] = round(units * left / depth)
        return found

    def _scores(self, model: Any, here: Anatomy, shares: Shares) -> Scores:
        """Each kind by its criterion, of all units that the model still has."""
        settings, prepared = self.settings, self.prepared
        asked = self._criteria()
        for kind, name in asked.items():
            fit = criteria(UNITS[kind if kind != "queries" else "heads"])
            if name not in fit:
                raise ParedownError(f"The criterion {name} does not rank {kind}; these do: {', '.join(fit)}.")
        batches = calibration_batches(prepared.calibration, most_tokens=SCORED_TOKENS)
        total, left = (one.group("layers").units for one in (prepared.anatomy, here))
        count = max(1, shares.count("layers", total) - (total - left))
        names = sorted({*asked.values()})
        found = score_each(model, here, batches, names, drop=count, seed=settings.seed, units=[UNITS[k] for k in asked])
        give_back_what_is_freed()
        values: dict[str, Array] = {}
        for kind, name in asked.items():
            own = {k: v for k, v in found[name].values.items() if k.rpartition(".")[2] == kind}
            if not own and kind != "queries":  # of which one in each group may be left
                raise ParedownError(f"This cannot be pruned as asked: {name} gave no scores of {kind}.")
            values |= own
        return Scores(" and ".join(names), values)

    def _criteria(self) -> dict[str, str]:
        """What ranks each kind of unit that is to go.

        Without a word of the user's heads and neurons are ranked by what the optimal-brain-surgeon pass would lose;
        but heads of a language model, which are few and whose answers are a text's every token, by trying each.
        """
        settings = self.settings
        if settings.parameters is not None:
            wide = ["heads", "neurons"]
        else:
            wide = [kind for kind in KINDS[:3] if getattr(settings, kind)]
        tried = self.prepared.generates and settings.parameters is None  # a budget has both kinds on one scale
        found = {kind: "ablation" if tried and kind != "neurons" else "obs" for kind in wide}
        if settings.criterion:
            found = dict.fromkeys(wide, settings.criterion)
        return found | {kind: settings.depth_criterion for kind in KINDS[3:] if getattr(settings, kind)}

    def _by_shares(self, scores: Scores, shares: Shares) -> Plan:
        settings = self.settings
        try:
            return planning.by_shares(
                self.prepared.anatomy,
                scores,
                shares,
                self.limits,
                ranking=settings.ranking,
                protect=self.protect,
                minimum={"heads": settings.minimum_heads, "neurons": settings.minimum_neurons},
            )
        except KeyError as error:
            raise ParedownError(f"This cannot be pruned as asked: {error.args[0]}.") from error

    def _by_parameters(self, scores: Scores, shares: Shares, share: float) -> Plan:
        """Layers by their shares first; then heads and neurons, until `share` of all parameters is left."""
        anatomy = self.prepared.anatomy
        first = self._by_shares(scores, Shares(layers=shares.layers, sublayers=shares.sublayers))
        least = {"head": self.settings.minimum_heads, "neuron": self.settings.minimum_neurons}
        free = range(self.protect[0], anatomy.group("layers").units - self.protect[1])
        groups = tuple(
            replace(group, minimum=min(least[group.kind], group.units))
            for group in anatomy.groups
            if group.kind in ("head", "neuron") and group.layer in first.keep["layers"] and group.layer in free
            if first.keep[group.name]
        )
        part = replace(anatomy, groups=groups)
        costs = planning.arithmetic(part, "params")
        whole = parameters(self.prepared.model)
        fixed = parameters(cut(self.prepared.model, anatomy, first)) - costs.dense
        if not groups and fixed <= share * whole:
            return first
        if fixed >= share * whole:
            raise InfeasibleBudget(
                f"{share:.0%} of the parameters cannot be reached: {fixed / whole:.0%} are none of heads and neurons "
                "that may go (protected layers stay whole).",
                closest=fixed / whole,
            )
        budget = Budget("params", min(1.0, (share * whole - fixed) / costs.dense))
        found = planning.plan(part, scores, budget, self.limits, costs=costs)
        there = {
            name: tuple(unit for unit in units if name not in scores.values or scores.values[name][unit] > -np.inf)
            for name, units in found.keep.items()  # what went in an earlier round does not come back
        }
        return Plan(anatomy.fingerprint, {**first.keep, **there}, source=found.source)

    # --------------------------------------------------------------------------------------------- what comes back

    def _recovered(
        self, number: int, small: Any, before: Any, here: Anatomy, step: Plan, plan: Plan
    ) -> tuple[Mapping[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
        """The recovered weights of a round, its record, and the curve of its training."""
        settings, prepared = self.settings, self.prepared
        name, recovery = f"round-{number}", settings.recover
        curve: list[dict[str, Any]] = []
        facts: dict[str, Any] = {"round": number, "parameters": parameters(small), "plan_id": plan.id}
        said = f" in round {number}" if settings.rounds > 1 else ""

        def refit() -> dict[str, Tensor]:
            self.progress.stage(f"Re-fitting{said}", len(here.identity()["layers"]))
            method = "reconstruct" if recovery in TRAINED else recovery
            options: dict[str, Any] = {"progress": self.progress.advance} if method == "reconstruct" else {}
            batches = calibration_batches(prepared.calibration, most_tokens=SCORED_TOKENS)
            fitted = recover(small, method=method, teacher=before, anatomy=here, plan=step, batches=batches, **options)
            return state_of(fitted)

        def train() -> dict[str, Tensor]:
            fitted, lessons = self.trained(number, settings.rounds, small, plan)
            curve.extend(lessons)
            return state_of(fitted)

        facts |= self.work.json(f"{name}-cut", lambda: {"quality_cut": self.quality(small)})
        if recovery != "none":
            load_state(small, self.work.tensors(f"{name}-refit", refit))
        if settings.trains:
            load_state(small, self.work.tensors(f"{name}-trained", train))
            curve = self.work.json(f"{name}-lessons", lambda: curve)
        facts |= self.work.json(f"{name}-quality", lambda: {"quality": self.quality(small)})
        return state_of(small), facts, curve

    def trained(self, number: int, rounds: int, small: Any, plan: Plan) -> tuple[Any, list[dict[str, Any]]]:
        from paredown.recovery.train import recipe  # accelerate is an extra

        settings, prepared = self.settings, self.prepared
        label = f"Training, round {number} of {rounds}" if rounds > 1 else "Training"
        minutes = None if settings.steps else settings.minutes / rounds
        steps = None
        if settings.steps:
            steps = max(1, settings.steps * number // rounds - settings.steps * (number - 1) // rounds)
        self.progress.stage(label, 1.0)
        done = 0.0

        def report(at: Lesson) -> None:
            nonlocal done
            share = at.step / steps if steps else at.seconds / (60 * (minutes or 1))
            self.progress.advance(max(0.0, share - done), f"held-out loss {at.distance:.4f}, best {at.best:.4f}")
            done = max(done, share)
            give_back_what_is_freed()

        labels = prepared.splits.calibration.labels if prepared.classifies else None
        model, history = recover(
            small,
            method="train",
            teacher=prepared.model,
            layout=prepared.anatomy.layout,
            plan=plan,
            tokens=prepared.calibration,
            labels=labels,
            recipe=recipe(prepared.anatomy.layout, objective=settings.recover, lora_rank=settings.lora),
            steps=steps,
            minutes=minutes,
            folder=self.work.path(f"round-{number}-training"),
            seed=settings.seed,
            report=report,
        )
        lessons = [
            {"candidate": f"round {number}", "step": at.step, "minutes": at.seconds / 60, "distance": at.distance}
            for at in history
        ]
        return model, lessons

    def quality(self, small: Any) -> float:
        """On the guardrail texts, for the record."""
        prepared = self.prepared
        data = prepared.splits.guardrail
        outputs = outputs_of(network(small, prepared.anatomy.layout), prepared.guardrail)
        reference = self._dense_outputs()
        metrics = prepared.task.metrics(outputs, data, reference)
        return float(metrics.get(prepared.task.metric_name(data), np.nan))

    def _dense_outputs(self) -> Array:
        prepared = self.prepared
        stored = self.work.path("dense-outputs.npy")
        if not stored.exists():
            np.save(stored, outputs_of(prepared.network, prepared.guardrail))
        found: Array = np.load(stored)
        return found
