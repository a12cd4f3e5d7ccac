"""Looking before cutting: how much units matter, what each layer can lose, and which criterion is right for a model.

Everything here is judged on the guardrail texts; the test split stays closed. Image classifiers are studied by
`_network_study`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from paredown import registry
from paredown.calibration import Batch
from paredown.errors import InfeasibleBudget, ParedownError
from paredown.importance import criteria as criteria_of
from paredown.importance import score_each
from paredown.network import network
from paredown.pipeline import _network_study
from paredown.pipeline._memory import give_back_what_is_freed
from paredown.pipeline._prepare import CALIBRATION_BATCH_TOKENS, Prepared, outputs_of, prepare
from paredown.pipeline._settings import Progress, Silent
from paredown.pipeline._study_settings import StudySettings, check, facts_of, plain, with_threads
from paredown.planning import Shares, by_shares
from paredown.recovery import recover as recover_by
from paredown.surgery import cut, parameters
from paredown.tasks import length_sorted_batches
from paredown.tasks.causal_lm import next_tokens
from paredown.types import Array, Interval, Plan, Scores
from paredown.validation.quality import mean_drop

UNITS = {"heads": "head", "neurons": "neuron", "layers": "layer", "sublayers": "sublayer"}
RECOVERIES = ("none", "compensate", "reconstruct")
ALONE, ALONE_FRACTIONS = ("heads", "neurons", "sublayers", "layers"), (0.25, 0.5, 0.75)
COMPARED, COMPARED_FRACTIONS = ("heads", "neurons"), (0.1, 0.3, 0.5)
STUDIED_TOKENS = 24_000  # of calibration texts per seed
DEFAULT_CRITERION = {"heads": "obs", "neurons": "obs", "layers": "block_influence", "sublayers": "block_influence"}


@dataclass
class Study:
    """A dense model with its texts, ready to be cut in many ways."""

    asked: StudySettings
    prepared: Prepared
    progress: Progress
    _batches: dict[int, list[Batch]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.dense: Array = outputs_of(self.prepared.network, self.prepared.guardrail)

    def batches(self, seed: int) -> list[Batch]:
        """Calibration batches of texts drawn by this seed, with their labels if those are to count."""
        if seed not in self._batches:
            tokens, data = self.prepared.calibration, self.prepared.splits.calibration
            drawn = np.random.default_rng([self.asked.seed, seed]).permutation(len(tokens))
            count = max(1, int(np.searchsorted(np.cumsum(tokens.lengths[drawn]), STUDIED_TOKENS)))
            found = length_sorted_batches(tokens, indices=drawn[:count], most_tokens=CALIBRATION_BATCH_TOKENS)
            batches: list[Batch] = [arrays for _, arrays in found]
            if self.asked.labels and self.prepared.generates:
                batches = [{**arrays, "labels": next_tokens(arrays)} for arrays in batches]
            elif self.asked.labels:
                assert data.labels is not None
                batches = [{**arrays, "labels": data.labels[at]} for at, arrays in found]
            shuffled = np.random.default_rng(0).permutation(len(batches))  # the last ones judge a recovery
            self._batches[seed] = [batches[i] for i in shuffled]
        return self._batches[seed]

    def scores(
        self, names: Sequence[str], seed: int, *, units: Iterable[str] = UNITS, drop: int = 1
    ) -> dict[str, Scores]:
        """By several criteria, from the texts of one seed."""
        model, anatomy, kinds = self.prepared.model, self.prepared.anatomy, [UNITS[unit] for unit in units]
        chosen = self.asked.seed + seed
        found = score_each(model, anatomy, self.batches(seed), names, drop=drop, seed=chosen, units=kinds)
        give_back_what_is_freed()
        return found

    def outputs(self, plan: Plan, recover: str, seed: int) -> tuple[Array, int]:
        """What the model answers to the guardrail texts once it is cut and recovered, and its parameters."""
        prepared = self.prepared
        small = cut(prepared.model, prepared.anatomy, plan)
        if recover != "none":
            small = recover_by(
                small,
                method=recover,
                teacher=prepared.model,
                anatomy=prepared.anatomy,
                plan=plan,
                batches=self.batches(seed),
            )
        return outputs_of(network(small, prepared.anatomy.layout), prepared.guardrail), parameters(small)

    def judged(self, outputs: Sequence[Array]) -> tuple[float, Interval]:
        """Mean quality over seeds, and the mean drop with its interval."""
        prepared = self.prepared
        return mean_drop(prepared.task, self.dense, outputs, prepared.splits.guardrail, seed=self.asked.seed)

    def about(self) -> dict[str, Any]:
        """What every study says of itself."""
        prepared = self.prepared
        return facts_of(
            self.asked,
            task=prepared.task,
            data=prepared.splits.guardrail,
            dense=self.dense,
            family=prepared.anatomy.family,
            parameters=parameters(prepared.model),
            notes=prepared.notes,
        )


@contextmanager
def _opened(asked: StudySettings, progress: Progress) -> Iterator[Study]:
    settings = asked.settings()
    settings.only_for(pictures=False)
    with with_threads(asked):
        progress.stage("Reading model and data")
        prepared = prepare(settings)
        if asked.labels and not prepared.generates and prepared.splits.calibration.labels is None:
            raise ParedownError("The task loss needs labels, and the data has none: leave --labels out.")
        yield Study(asked, prepared, progress)


def score_model(asked: StudySettings, *, criterion: str, progress: Progress | None = None) -> dict[str, Any]:
    """How much every unit matters by one criterion: `values` by group, for a heat map."""
    progress = progress or Silent()
    registry.find("importance", criterion)
    if asked.of_pictures:
        return _network_study.score_network(asked, criterion, progress)
    with _opened(asked, progress) as study:
        progress.stage(f"Scoring by {criterion}")
        scores = study.scores([criterion], 0)[criterion]
        return plain({**study.about(), "criterion": criterion, "source": scores.source, "values": scores.values})


def sensitivity(
    asked: StudySettings,
    *,
    units: Sequence[str] = (),
    fractions: Sequence[float] = (),
    criterion: str | None = None,
    recover: str = "none",
    progress: Progress | None = None,
) -> dict[str, Any]:
    """What each layer alone can lose: `rows` of quality by unit, layer and fraction, and the layers in order.

    The units of one layer go in the order of the criterion ("obs" by default); a layer, or one of its sub-layers, goes
    as a whole. Of an image classifier channels go so, in every group of coupled ones alone, and residual branches as a
    whole; to `recover`, "reconstruct" re-fits what reads them, and "statistics" takes those of batch norm anew. Without
    `units` all there are, by default quarters of them, and of channels 10 to 70 %.
    """
    progress = progress or Silent()
    if asked.of_pictures:
        return _network_study.network_sensitivity(asked, units, fractions, criterion, recover, progress)
    units, fractions = units or ALONE, fractions or ALONE_FRACTIONS
    check(units, fractions, recover, tuple(UNITS), RECOVERIES)
    with _opened(asked, progress) as study:
        anatomy = study.prepared.anatomy
        depth = anatomy.group("layers").units
        ranked = {unit: criterion or DEFAULT_CRITERION[unit] for unit in units if unit in ("heads", "neurons")}
        for unit, name in ranked.items():
            if name not in criteria_of(UNITS[unit]):
                raise ParedownError(f"{name} does not rank {unit}; {', '.join(criteria_of(UNITS[unit]))} do.")
        progress.stage("Scoring")
        scores = study.scores(sorted(set(ranked.values())), 0, units=ranked) if ranked else {}
        plans = list(_alone(study, ranked, scores, units, fractions))
        progress.stage("Cutting one layer at a time", len(plans))
        rows = []
        lost: dict[str, dict[int, list[float]]] = {}
        for unit, layer, fraction, plan in plans:
            outputs, size = study.outputs(plan, _published(ranked.get(unit), recover), 0)
            quality, drop = study.judged([outputs])
            row = {"unit": unit, "layer": layer, "fraction": fraction, "quality": quality, "drop": drop}
            rows.append({**row, "parameters": size})
            lost.setdefault(unit, {}).setdefault(layer, []).append(drop.value)
            progress.advance(1)
        order = {unit: sorted(by_layer, key=lambda i: float(np.mean(by_layer[i]))) for unit, by_layer in lost.items()}
        facts = {**study.about(), "criterion": ranked, "recover": recover, "layers": depth, "rows": rows}
        return plain({**facts, "most_prunable_first": order})


def _alone(
    study: Study,
    ranked: Mapping[str, str],
    scores: Mapping[str, Scores],
    units: Sequence[str],
    fractions: Sequence[float],
) -> Iterator[tuple[str, int, float, Plan]]:
    """One plan for each unit, layer and fraction; everything else stays."""
    anatomy = study.prepared.anatomy
    depth = anatomy.group("layers").units
    for unit, layer in itertools.product(units, range(depth)):
        if unit == "layers":
            if depth > 1:
                kept = tuple(i for i in range(depth) if i != layer)
                yield unit, layer, 1.0, Plan(anatomy.fingerprint, {**anatomy.identity(), "layers": kept})
        elif unit == "sublayers":
            for kind in ("heads", "neurons"):
                plan = Plan(anatomy.fingerprint, {**anatomy.identity(), f"layer.{layer}.{kind}": ()})
                yield ("attention" if kind == "heads" else "ffn"), layer, 1.0, plan
        else:
            total = anatomy.group(f"layer.{layer}.{unit}").units
            for fraction in fractions:
                count = round(fraction * total)
                if not 0 < count < total:
                    continue  # so few units cannot be cut so finely
                share = Shares(**{unit: count})
                plan = by_shares(anatomy, scores[ranked[unit]], share, protect=(layer, depth - 1 - layer))
                yield unit, layer, fraction, plan


def compare(
    asked: StudySettings,
    *,
    criteria: Sequence[str] = (),
    units: Sequence[str] = (),
    fractions: Sequence[float] = (),
    recover: str = "none",
    ranking: str = "global",
    protect: tuple[int, int] = (0, 0),
    seeds: int = 3,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quality by criterion and fraction, every kind of unit for itself: `rows`, each a mean over seeds with interval.

    A seed draws the calibration texts (and the random control). Without `criteria` all those of the kind are compared,
    without `units` heads and neurons, or the channels of an image classifier; of those, `fractions` are of all that may
    go (the first layer's stay), and what is left is anything but equal in multiply-accumulates: every row has them.
    """
    progress = progress or Silent()
    if asked.of_pictures:
        return _network_study.compare_network(
            asked, criteria, units, fractions, recover=recover, ranking=ranking, seeds=seeds, progress=progress
        )
    units, fractions = units or COMPARED, fractions or COMPARED_FRACTIONS
    check(units, fractions, recover, tuple(UNITS), RECOVERIES)
    for name in criteria:
        registry.find("importance", name)
    named = {unit: [c for c in criteria_of(UNITS[unit]) if not criteria or c in criteria] for unit in units}
    unused = set(criteria) - {name for names in named.values() for name in names}
    if unused:
        raise ParedownError(f"{', '.join(sorted(unused))} ranks none of {', '.join(units)}.")
    with _opened(asked, progress) as study:
        anatomy = study.prepared.anatomy
        depth = anatomy.group("layers").units
        found: dict[tuple[str, str, float], list[tuple[Array, int]]] = {}
        total = seeds * sum(len(names) for names in named.values()) * len(fractions)
        progress.stage("Comparing criteria", total)
        every = sorted({name for names in named.values() for name in names})
        for seed in range(seeds):
            shallow = study.scores(every, seed, units=units)
            for unit, fraction in itertools.product(units, fractions):
                share = Shares(**{unit: fraction})
                drop = share.count(unit, depth if unit == "layers" else 2 * depth)
                blocks = [c for c in named[unit] if unit in ("layers", "sublayers")]
                scores = study.scores(blocks, seed, units=[unit], drop=drop) if blocks and drop > 1 else shallow
                for name in named[unit]:
                    try:
                        plan = by_shares(anatomy, scores[name], share, ranking=ranking, protect=protect)
                    except InfeasibleBudget as error:
                        progress.say(f"{fraction:.0%} of the {unit} are left out: {error}")
                        progress.advance(len(named[unit]))
                        break
                    outputs = study.outputs(plan, _published(name, recover), seed)
                    found.setdefault((unit, name, fraction), []).append(outputs)
                    progress.advance(1, f"{name}, {fraction:.0%} of the {unit}")
        rows = []
        for (unit, name, fraction), seen in found.items():
            quality, lost = study.judged([one for one, _ in seen])
            row = {"unit": unit, "criterion": name, "fraction": fraction, "quality": quality, "drop": lost}
            rows.append({**row, "seeds": len(seen), "parameters": seen[0][1]})
        about = {"recover": recover, "ranking": ranking, "protect": list(protect), "seeds": seeds}
        return plain({**study.about(), **about, "rows": rows})


def _published(criterion: str | None, recover: str) -> str:
    """What follows a cut by a criterion: without recovery, still what is a part of the criterion itself."""
    own = criterion is not None and getattr(registry.find("importance", criterion), "COMPENSATES", False)
    return "compensate" if own and recover == "none" else recover
