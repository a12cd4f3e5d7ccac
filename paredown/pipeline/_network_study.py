"""Looking before cutting an image classifier: how much channels matter, what each layer can lose, which criterion is
right for it.

Everything here is judged on the guardrail pictures; the test split stays closed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from paredown import registry
from paredown.errors import InfeasibleBudget, ParedownError
from paredown.importance import criteria as criteria_of
from paredown.importance import score_channels
from paredown.layers import WIDEST, input_grams, macs, places_of, widest
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._networks import JUDGED_MACS, Pictured, first_groups, prepare_network
from paredown.pipeline._settings import Progress
from paredown.pipeline._study_settings import StudySettings, check, facts_of, plain, with_threads
from paredown.planning import Product, Way, channel_plan, plan_of
from paredown.recovery import refit_graph, refit_inputs
from paredown.surgery import cut_graph, parameters
from paredown.tasks.image_classification import ImageData
from paredown.types import BRANCHES, Array, Budget, Plan, Scores
from paredown.validation.quality import mean_drop

CHANNELS = "channels"
UNITS = (CHANNELS, BRANCHES)
RECOVERIES = ("none", "statistics", "reconstruct")
ALONE = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)  # shares of a layer that go
COMPARED = (0.1, 0.2, 0.3, 0.4, 0.5)  # shares of all channels that go
FEWEST_JUDGED = 100  # pictures: with fewer of them accuracy says nothing
MOST_REFITTED = 512  # pictures that a network is re-fitted to, of those that score
RANKINGS = {"global": "global", "layer": "local"}  # as the planner calls them


@dataclass(frozen=True)
class Tried:
    """What a smaller network answers to the judging pictures [N, C], and what it is."""

    outputs: Array
    macs: int
    parameters: int


@dataclass
class NetworkStudy:
    """A dense network with its pictures, ready to be cut in many ways; `tries` says in how many."""

    asked: StudySettings
    prepared: Pictured
    tries: int
    _drawn: dict[int, tuple[list[Tensor], list[Tensor]]] = field(default_factory=dict)

    @cached_property
    def judging(self) -> ImageData:
        """The guardrail pictures that judge; fewer of them where networks are large or many."""
        data = self.prepared.splits.guardrail
        count = max(FEWEST_JUDGED, int(JUDGED_MACS / self.prepared.macs / self.tries))
        return data.take(np.arange(min(count, len(data))))

    @cached_property
    def dense(self) -> Array:
        """What the dense network answers to them."""
        return self.prepared.outputs_of(self.prepared.model, self.judging)

    def pictures(self, seed: int) -> tuple[list[Tensor], list[Tensor]]:
        """Batches of calibration pictures drawn by this seed, and their labels."""
        if seed not in self._drawn:
            data = self.prepared.splits.calibration
            order = np.random.default_rng([self.asked.seed, seed]).permutation(len(data))
            drawn = data.take(order[: len(self.prepared.scored)])
            batches = self.prepared.batches(drawn)
            self._drawn = {seed: (batches, list(torch.from_numpy(drawn.labels).split(len(batches[0]))))}  # no others
        return self._drawn[seed]

    def scores(self, criterion: str, seed: int, progress: Callable[[int], None] | None = None) -> Scores:
        """Of every group's channels, from the pictures of one seed."""
        pictures, labels = self.pictures(seed)
        found = score_channels(
            self.prepared.model,
            self.prepared.anatomy,
            criterion,
            pictures,
            labels if self.asked.labels else (),
            seed=self.asked.seed + seed,
            progress=progress,
        )
        give_back_what_is_freed()
        return found

    def tried(self, plan: Plan, recover: str, seed: int) -> Tried:
        """The network once it is cut, and recovered as a whole."""
        prepared = self.prepared
        small = cut_graph(prepared.model, prepared.anatomy, plan)
        if recover != "none":
            small = refit_graph(
                small,
                teacher=prepared.model,
                anatomy=prepared.anatomy,
                plan=plan,
                pictures=self._refitting(seed),
                weights=recover == "reconstruct",
            )
        return self._judged(small)

    def tried_alone(self, plan: Plan, recover: str) -> Tried:
        """The same where one group alone is cut, and where no other layer but those that read it has to follow: what
        they read is looked at once for all plans.
        """
        if recover != "reconstruct" or self.prepared.anatomy.gone(plan):
            return self.tried(plan, recover, 0)
        prepared = self.prepared
        small = cut_graph(prepared.model, prepared.anatomy, plan)
        refit_inputs(small, dense=prepared.model, anatomy=prepared.anatomy, plan=plan, grams=self._grams)
        return self._judged(small)

    @cached_property
    def _grams(self) -> dict[str, Tensor]:
        return input_grams(self.prepared.model, self.pictures(0)[0])

    def _refitting(self, seed: int) -> list[Tensor]:
        batches = self.pictures(seed)[0]
        return batches[: max(1, MOST_REFITTED // len(batches[0]))]

    def _judged(self, small: fx.GraphModule) -> Tried:
        return Tried(self.prepared.outputs_of(small, self.judging), macs(small), parameters(small))

    def row(self, tried: Sequence[Tried]) -> dict[str, Any]:
        """What networks lose that are the same but for their seeds: accuracy with an interval, the divergence from the
        dense answers in nats, and the means of their sizes.
        """
        judging: Any = self.judging
        outputs = [one.outputs for one in tried]
        quality, drop = mean_drop(self.prepared.task, self.dense, outputs, judging, seed=self.asked.seed)
        return {
            "quality": quality,
            "drop": drop,
            "divergence": float(np.mean([_divergence(self.dense, one) for one in outputs])),
            "macs": round(float(np.mean([one.macs for one in tried]))),
            "parameters": round(float(np.mean([one.parameters for one in tried]))),
        }

    def about(self) -> dict[str, Any]:
        """What every study says of itself."""
        prepared, notes = self.prepared, list(self.prepared.notes)
        count, all_of_them = len(self.judging), len(prepared.splits.guardrail)
        if count < all_of_them:
            notes.append(f"{count} of {all_of_them} guardrail pictures judge: {self.tries} networks are tried.")
        facts = facts_of(
            self.asked,
            task=prepared.task,
            data=self.judging,
            dense=self.dense,
            family=prepared.anatomy.family,
            parameters=parameters(prepared.model),
            notes=notes,
        )
        groups = {group.name: group.units for group in prepared.anatomy.channels}
        return {**facts, "macs_dense": prepared.macs, "groups": groups}


@contextmanager
def _prepared(asked: StudySettings, progress: Progress) -> Iterator[Pictured]:
    settings = asked.settings()
    settings.only_for(pictures=True)
    with with_threads(asked):
        progress.stage("Reading network and pictures")
        yield prepare_network(settings, given=asked.given)


def score_network(asked: StudySettings, criterion: str, progress: Progress) -> dict[str, Any]:
    """How much every channel matters by one criterion: `values` by group, for a heat map."""
    _ranks_channels(criterion)
    with _prepared(asked, progress) as prepared:
        study = NetworkStudy(asked, prepared, tries=1)
        scores = _scored(study, criterion, progress)
        facts = {"unit": CHANNELS, "criterion": criterion, "source": scores.source, "values": scores.values}
        return plain({**study.about(), **facts})


def network_sensitivity(
    asked: StudySettings,
    units: Sequence[str],
    fractions: Sequence[float],
    criterion: str | None,
    recover: str,
    progress: Progress,
) -> dict[str, Any]:
    """What each group of channels alone can lose, and each branch: `rows`, and both kinds in order."""
    units, fractions = units or UNITS, fractions or ALONE
    check(units, fractions, recover, UNITS, RECOVERIES)
    if criterion:
        _ranks_channels(criterion)
    with _prepared(asked, progress) as prepared:
        anatomy = prepared.anatomy
        name = criterion or ("obs" if widest(prepared.model) <= WIDEST else "taylor_gate")
        tries = len(anatomy.channels) * len(fractions) * (CHANNELS in units)
        study = NetworkStudy(asked, prepared, tries + len(anatomy.branches) * (BRANCHES in units))
        scores = _scored(study, name, progress) if CHANNELS in units else Scores(name, {})
        plans = list(_alone(prepared, scores, units, fractions))
        progress.stage("Cutting one layer at a time", len(plans))
        rows: list[dict[str, Any]] = []
        for unit, layer, fraction, plan in plans:
            found = study.row([study.tried_alone(plan, recover)])
            rows.append({"unit": unit, "layer": layer, "fraction": fraction, **found})
            progress.advance(1, f"{layer}, {fraction:.0%}")
        about = {"criterion": {CHANNELS: name} if CHANNELS in units else {}, "recover": recover, "rows": rows}
        return plain({**study.about(), **about, "most_prunable_first": _in_order(rows)})


def _alone(
    prepared: Pictured, scores: Scores, units: Sequence[str], fractions: Sequence[float]
) -> Iterator[tuple[str, str, float, Plan]]:
    """One plan for each unit, layer and fraction; everything else stays."""
    anatomy = prepared.anatomy
    for group in anatomy.channels if CHANNELS in units else ():
        for fraction in fractions:
            count = round(fraction * group.units)
            if 0 < count < group.units:  # so few channels cannot be cut so finely
                yield CHANNELS, group.name, fraction, plan_of(anatomy, scores, [Way({group.name: group.units - count})])
    for number, branch in enumerate(anatomy.branches) if BRANCHES in units else ():
        yield BRANCHES, branch.name, 1.0, plan_of(anatomy, scores, [Way({}, gone=number)])


def _in_order(rows: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """By unit, the layers that lose least first: by the mean drop, and where that is the same by the divergence."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for row in rows:
        by_layer = found.setdefault(row["unit"], {}).setdefault(row["layer"], [])
        by_layer.append((row["drop"].value, row["divergence"]))
    return {
        unit: sorted(by_layer, key=lambda name: tuple(np.mean(by_layer[name], axis=0)))
        for unit, by_layer in found.items()
    }


def compare_network(
    asked: StudySettings,
    criteria: Sequence[str],
    units: Sequence[str],
    fractions: Sequence[float],
    *,
    recover: str,
    ranking: str,
    seeds: int,
    progress: Progress,
) -> dict[str, Any]:
    """Quality by criterion and share of channels: `rows`, each a mean over seeds with interval."""
    fractions = fractions or COMPARED
    check(units, fractions, recover, (CHANNELS,), RECOVERIES)
    for name in criteria:
        _ranks_channels(name)
    names = list(dict.fromkeys(criteria)) or list(criteria_of("channel"))
    with _prepared(asked, progress) as prepared:
        if not criteria and widest(prepared.model) > WIDEST:
            progress.say(f"Criteria that invert what layers read are left out: a layer has over {WIDEST} inputs.")
            names = [name for name in names if "gram" not in registry.find("importance", name).NEEDS]
        tries = seeds * len(names) * len(fractions)
        study, whole = NetworkStudy(asked, prepared, tries), first_groups(prepared)
        products = [Product(name, *about) for name, about in places_of(prepared.model).items()]
        progress.stage("Comparing criteria", tries)
        found: dict[tuple[str, float], list[Tried]] = {}
        for seed, name in itertools.product(range(seeds), names):
            scores = study.scores(name, seed)
            for fraction in fractions:
                try:
                    plan = channel_plan(
                        prepared.anatomy,
                        scores,
                        Budget(CHANNELS, 1 - fraction),
                        products,
                        ranking=RANKINGS[ranking],
                        protect=whole,
                    )
                except InfeasibleBudget as error:
                    progress.say(f"{fraction:.0%} of the channels are left out: {error}")
                else:
                    found.setdefault((name, fraction), []).append(study.tried(plan, recover, seed))
                progress.advance(1, f"{name}, {fraction:.0%} of the channels")
        rows = [
            {"unit": CHANNELS, "criterion": name, "fraction": fraction, **study.row(tried), "seeds": len(tried)}
            for (name, fraction), tried in found.items()
        ]
        about = {"recover": recover, "ranking": ranking, "whole": whole, "seeds": seeds}
        return plain({**study.about(), **about, "rows": rows})


def _scored(study: NetworkStudy, criterion: str, progress: Progress) -> Scores:
    progress.stage(f"Scoring by {criterion}", len(study.prepared.scored))
    return study.scores(criterion, 0, progress.advance)


def _ranks_channels(criterion: str) -> None:
    if "channel" not in registry.find("importance", criterion).UNITS:
        raise ParedownError(f"{criterion} does not rank channels; {', '.join(criteria_of('channel'))} do.")


def _divergence(dense: Array, other: Array) -> float:
    """KL(dense || other) in nats a picture."""
    ours, theirs = (F.log_softmax(torch.from_numpy(one).double(), 1) for one in (dense, other))
    return float(F.kl_div(theirs, ours, log_target=True, reduction="batchmean"))
