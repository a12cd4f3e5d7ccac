"""What each part of an image classifier costs on the target and what it is worth: tables of times and errors, in which
one part alone is changed. Plans are solved from them and timed before they are believed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from paredown import planning, registry
from paredown.anatomy import describe_graph
from paredown.errors import InfeasibleBudget, ParedownError
from paredown.importance import score_channels
from paredown.layers import WIDEST, layers_of, places_of, widest
from paredown.pipeline._network_stopwatch import NetworkStopwatch
from paredown.pipeline._networks import BATCH, Pictured, first_groups
from paredown.pipeline._settings import Progress, Settings
from paredown.pipeline._work import Work
from paredown.planning import Way
from paredown.recovery import refit_graph
from paredown.surgery import cut_graph
from paredown.tasks.image_classification import blended
from paredown.types import BRANCHES, Limits, Plan, Scores

CAREFUL = 3.0  # seconds of timing a plan, and as many of the dense network beside it
JUDGED_MACS = 3e12  # of all the pictures on which errors are measured: a minute on two cores
FEWEST_FITTED, MOST_FITTED = 16, 128
MENDED = 9  # layers, from the one that is cut on: later ones make up for little more (cifar10-resnet56)
FEWEST_JUDGED, MOST_JUDGED = 32, 512
AGREEMENT = 0.03  # prediction and measurement must agree this well, or the plan is solved again
TURNS = 6  # of solving again
LEAST_SAVED = 0.2  # of what the table says: less is the clock's noise
STRIDE = 1.5  # times as much is asked of the table at a time: one measurement may be far off
MULTIPLE = 8  # of channels, unless it is said otherwise: a register of floats; wider steps are found by timing

Key = tuple[str, int]  # a group and a width of it, or "branches" and the number of one


@dataclass
class Table:
    """Times and errors of every part changed alone, and the plans that are made from them."""

    prepared: Pictured
    settings: Settings
    work: Work
    watch: NetworkStopwatch
    progress: Progress

    def check(self) -> None:
        """Raises ParedownError before any work for layers that do not exist, or shares that are none."""
        names = [group.name for group in self.prepared.anatomy.channels]
        registry.find("importance", self.criterion)
        for name in (*self.whole, *self.shares):
            if name not in names:
                raise ParedownError(f"there is no layer {name!r} to cut; there are {', '.join(names)}")

    @cached_property
    def limits(self) -> Limits:
        return Limits(multiple_of=self.settings.multiple_of or MULTIPLE)

    @cached_property
    def criterion(self) -> str:
        """The one asked for, or "obs", but for layers too wide for it "taylor_gate"."""
        return self.settings.criterion or ("obs" if widest(self.prepared.model) <= WIDEST else "taylor_gate")

    @cached_property
    def scores(self) -> Scores:
        """Of all channels; the answers that gradients are of are drawn from the network's own."""
        prepared = self.prepared

        def compute() -> dict[str, Tensor]:
            self.progress.stage(f"Scoring channels by {self.criterion}", len(prepared.scored))
            batches = prepared.batches(prepared.scored)
            how: Any = {"seed": self.settings.seed, "progress": self.progress.advance}
            found = score_channels(prepared.model, prepared.anatomy, self.criterion, batches, **how)
            return {name: torch.from_numpy(np.asarray(value)) for name, value in found.values.items()}

        stored = self.work.tensors(f"scores-{self.criterion}", compute)
        return Scores(self.criterion, {name: value.numpy() for name, value in stored.items()})

    def scores_after(self, number: int, small: fx.GraphModule, plan: Plan) -> Scores:
        """The same anew, of a network that was cut by `plan` in round `number` - 1; what is gone has less than all."""
        own = describe_graph(small)

        def compute() -> dict[str, Tensor]:
            self.progress.stage(f"Scoring what is left by {self.criterion}", len(self.prepared.scored))
            batches = self.prepared.batches(self.prepared.scored)
            how: Any = {"seed": self.settings.seed, "progress": self.progress.advance}
            found = score_channels(small, own, self.criterion, batches, **how).values
            most = 1 + max((float(value.max()) for value in found.values()), default=0.0)
            values = {}
            for group in self.prepared.anatomy.channels:
                kept = list(plan.keep[group.name])
                values[group.name] = torch.full([group.units], -1.0, dtype=torch.float64)
                theirs = found.get(group.name)
                there = theirs is not None and len(theirs) == len(kept)  # a single channel is no group: it stays
                values[group.name][kept] = torch.from_numpy(np.asarray(theirs, float)) if there else most
            return values

        stored = self.work.tensors(f"scores-{self.criterion}-{number}", compute)
        return Scores(self.criterion, {name: value.numpy() for name, value in stored.items()})

    @cached_property
    def whole(self) -> tuple[str, ...]:
        """The groups that are not cut: those named, or by default the first layer's."""
        named = self.settings.whole
        if named == "none":
            return ()
        return tuple(filter(None, named.split(","))) if named else first_groups(self.prepared)

    @cached_property
    def shares(self) -> dict[str, float]:
        """What single layers are to lose, as asked for."""
        found = {}
        for said in filter(None, self.settings.layer_shares.split(",")):
            name, _, share = said.partition("=")
            try:
                value = float(share.strip().removesuffix("%")) / (100 if share.strip().endswith("%") else 1)
            except ValueError:
                value = -1.0
            if not 0 <= value < 1:
                raise ParedownError(f"{said!r} is no share of a layer: write layer1.conv1=50%")
            found[name.strip()] = value
        return found

    @cached_property
    def keys(self) -> list[Key]:
        """All that is tried: levels of the groups that may be cut, and the branches."""
        anatomy, least = self.prepared.anatomy, self.settings.minimum_channels
        found = [
            (group.name, width)
            for group in anatomy.channels
            if group.exact and group.name not in self.whole
            for width in planning.channel_levels(group.units, self.limits, least)
        ]
        return found + [(BRANCHES, number) for number in range(len(anatomy.branches))]

    def plan_with(self, keys: Sequence[Key]) -> Plan:
        """The plan in which these alone are changed."""
        ways = [Way({}, gone=key[1]) if key[0] == BRANCHES else Way(dict([key])) for key in keys]
        return planning.plan_of(self.prepared.anatomy, self.scores, ways)

    # ------------------------------------------------------------------------------------------------------- tables

    @cached_property
    def errors(self) -> dict[Key, float]:
        """What the answers diverge by, KL(dense || changed) in nats a picture, where a key's change is made alone and
        a few layers from there on are re-fitted.
        """

        def compute() -> list[float]:
            self.progress.stage("Measuring what each part is worth", len(self.keys))
            with torch.no_grad():
                found = []
                for key in self.keys:
                    found.append(divergence(self._mended(self.plan_with([key])), *self._judging))
                    self.progress.advance(note=f"{key[0]} {key[1]}")
            return found

        return dict(zip(self.keys, self.work.json("errors", compute), strict=True))

    def lost(self, plan: Plan) -> float:
        """What the answers diverge by, in the same measure, of the network cut by a plan and re-fitted, where a re-fit
        is what follows.
        """
        prepared = self.prepared
        with torch.no_grad():
            if self.settings.recover == "none":
                small = cut_graph(prepared.model, prepared.anatomy, plan)
            else:
                small = self._mended(plan, None)
            return divergence(small, *self._judging)

    def _mended(self, plan: Plan, most: int | None = MENDED) -> fx.GraphModule:
        """The network cut by a plan, and the first `most` layers from the one that lacks something on re-fitted; None
        for all.
        """
        prepared = self.prepared
        small = cut_graph(prepared.model, prepared.anatomy, plan)
        left = {layer.node: layer for layer in layers_of(small)}
        behind: list[str] = []
        for layer in layers_of(prepared.model):
            size = prepared.model.get_parameter(layer.weight).shape
            if behind or layer.node not in left or small.get_parameter(layer.weight).shape != size:
                behind.append(layer.node)
        chosen = [node for node in behind if node in left][:most]
        return refit_graph(
            small,
            teacher=prepared.model,
            anatomy=prepared.anatomy,
            plan=plan,
            pictures=self._fitted_on,
            only=chosen,
            statistics=False,
        )

    @cached_property
    def _fitted_on(self) -> list[Tensor]:
        """The first calibration pictures, few enough that a network is re-fitted on them for every key."""
        data = self.prepared.scored
        count = self._affordable(len(data), FEWEST_FITTED, MOST_FITTED)
        return self.prepared.batches(data.take(np.arange(count)))

    @cached_property
    def _judging(self) -> tuple[list[Tensor], list[Tensor]]:
        """Calibration pictures that did not score, where there are enough, each blended with another, and the dense
        network's log-probabilities of them.
        """
        data = self.prepared.splits.calibration
        count = self._affordable(len(data), FEWEST_JUDGED, MOST_JUDGED)
        first = min(len(self.prepared.scored), len(data) - count)
        pictures = self.prepared.pictures(data.take(np.arange(first, first + count)))
        batches = list(torch.from_numpy(blended(pictures)).split(BATCH))
        with torch.no_grad():
            return batches, [F.log_softmax(self.prepared.model(x), 1) for x in batches]

    def _affordable(self, there: int, fewest: int, most: int) -> int:
        """How many pictures every key may be tried on."""
        count = int(JUDGED_MACS / max(1, len(self.keys)) / self.prepared.macs)
        return min(max(count, fewest), most, there)

    @cached_property
    def seconds(self) -> dict[Key, float]:
        """What each key's change saves on the target. Parts of the same shapes are changed together, once for all."""

        def compute() -> dict[str, Any]:
            alike = self._alike()
            self.progress.stage(f"Timing parts on {self.settings.target}", len(alike))
            prepared = self.prepared
            models = {
                str(number): cut_graph(prepared.model, prepared.anatomy, self.plan_with(keys))
                for number, keys in enumerate(alike)
            }
            taken = self.watch.time(models, progress=self.progress)
            saved = [(self.watch.dense - taken[str(number)]) / len(keys) for number, keys in enumerate(alike)]
            return {"dense": self.watch.dense, "saved": saved}

        stored = self.work.json(f"seconds-{self.watch.metric}", compute)
        self.watch.dense = self.watch.dense or float(stored["dense"])
        found = {key: saved for keys, saved in zip(self._alike(), stored["saved"], strict=True) for key in keys}
        return _narrower_saves_more(found)

    def _alike(self) -> list[list[Key]]:
        """The keys, those together that change the same of layers of the same shapes and places."""
        places, anatomy = places_of(self.prepared.model), self.prepared.anatomy
        kinds: dict[Any, list[Key]] = {}
        kind: Any
        for name, number in self.keys:
            if name == BRANCHES:
                about: Any = Counter(places[weight] for weight in anatomy.branches[number].weights)
                kind = (BRANCHES, frozenset(about.items()))
            else:
                parts = [part for part in anatomy.group(name).slices if part.tensor in places]
                about = Counter((places[part.tensor], part.axis, part.positions.shape) for part in parts)
                kind = (number, frozenset(about.items()))
            kinds.setdefault(kind, []).append((name, number))
        return list(kinds.values())

    # -------------------------------------------------------------------------------------------------------- plans

    def plan(self, name: str, seconds: float, *, int8: bool = False) -> tuple[Plan, float, tuple[dict[str, Any], ...]]:
        """The plan that takes at most `seconds` as measured, in int8 or as it is, what it takes, and how that was
        predicted: solved, timed, and solved again until both agree. More is asked of the table where a plan was too
        slow, and less where it was faster than it need be. Raises InfeasibleBudget with the fewest seconds.
        """
        stored = self.work.json(f"plan-{name}", lambda: self._solved(name, seconds, int8))
        return Plan.from_json(stored["plan"]), float(stored["seconds"]), tuple(stored["predictions"])

    def _solved(self, name: str, seconds: float, int8: bool) -> dict[str, Any]:
        prepared, parts = self.prepared, planning.ways_of(self.prepared.anatomy, self.seconds, self.errors)
        dense = self.watch.dense_int8 if int8 else self.watch.dense
        assert dense, "timed before anything is planned"
        form = f"{name} int8" if int8 else name
        self.progress.stage(f"Planning {name}", TURNS)
        predictions: list[dict[str, Any]] = []
        tried: dict[str, tuple[float, Plan]] = {}
        goal = dense - seconds
        little, enough = 0.0, math.inf  # of what it was asked for
        factor = dense / self.watch.dense  # what is really saved of what the table says, which is of fp32
        most = sum(max(way.saved for way in part) for part in parts)
        wanted = min(goal / factor, most) if int8 else goal  # of the table: what it says of int8 is a guess
        for turn in range(1, TURNS + 1):
            try:
                ways = planning.choose(parts, wanted)
            except InfeasibleBudget as error:  # of the first turn: later ones ask for what there is
                error.closest = dense - error.closest
                raise
            saved = sum(way.saved for way in ways)
            predicted = dense - factor * saved
            plan = planning.plan_of(prepared.anatomy, self.scores, ways, f"{self.criterion}, as timed")
            if plan.id not in tried:
                small = cut_graph(prepared.model, prepared.anatomy, plan)
                tried[plan.id] = self.watch.time({name: small}, seconds=CAREFUL, int8=int8)[name], plan
                told = {"predicted_ms": predicted * 1e3, "measured_ms": tried[plan.id][0] * 1e3}
                predictions.append({"round": turn, "what": form, **told})
            measured = tried[plan.id][0]
            self.progress.advance()
            fits = measured <= seconds * (1 + AGREEMENT)
            if saved <= 0 or (fits and abs(predicted / measured - 1) <= AGREEMENT):
                break
            little, enough = (little, min(enough, wanted)) if fits else (max(little, wanted), enough)
            factor = max(LEAST_SAVED * dense / self.watch.dense, (dense - measured) / saved)
            wanted = min(goal / factor, STRIDE * wanted, most)
            if not little < wanted < enough:
                wanted = (little + min(enough, most)) / 2
        fast = [one for one in tried.values() if one[0] <= seconds * (1 + AGREEMENT)]
        best = max(fast, key=lambda one: one[0]) if fast else min(tried.values(), key=lambda one: one[0])
        return {"plan": best[1].to_json(), "seconds": best[0], "predictions": predictions}


def divergence(model: fx.GraphModule, pictures: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """KL(dense || model) in nats a picture; `wanted` are the dense network's log-probabilities."""
    total = 0.0
    for x, y in zip(pictures, wanted, strict=True):
        total += float(F.kl_div(F.log_softmax(model(x), 1), y, log_target=True, reduction="sum"))
    return total / sum(map(len, pictures))


def _narrower_saves_more(saved: Mapping[Key, float]) -> dict[Key, float]:
    """The table with what noise turned round mended: nothing saves less than nothing, or less than a wider one."""
    found: dict[Key, float] = {}
    for key in sorted(saved, key=lambda key: (key[0], -key[1])):
        wider = [found[other] for other in found if other[0] == key[0]] if key[0] != BRANCHES else []
        found[key] = max(0.0, saved[key], *wider)
    return found
