"""How much each unit matters: one file per criterion, higher = keep.

A file says in `UNITS` what it ranks and in `NEEDS` what it must see. Of heads and neurons it has `score(evidence)`, of
layers and sub-layers `score_depth(evidence)`; both give one figure per unit.
"""

from __future__ import annotations

import zlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import numpy as np
from torch import nn

from paredown import registry
from paredown.calibration import NEEDS, Batch, Statistics, collect
from paredown.errors import BadData
from paredown.importance._channels import score_channels
from paredown.importance._depth import removal, streams, thinned
from paredown.importance._evidence import DepthEvidence, Evidence, Streams
from paredown.importance._heads import attention_patterns, train_gates
from paredown.importance._measured import ablations, measured
from paredown.network import Network, network
from paredown.types import Anatomy, Array, Group, Scores

__all__ = ["DepthEvidence", "Evidence", "Streams", "criteria", "score", "score_channels", "score_each"]

AFFORDED = {"ablations": 0.5, "removals": 0.8}  # passes over the calibration texts that trying may cost, each kind
EVERY = ("head", "query", "neuron", "layer", "sublayer")  # kind of unit
DEPTH = {"layer": "layers", "sublayer": "sublayers"}  # the names under which their scores are found


def criteria(unit: str) -> tuple[str, ...]:
    """The criteria that rank this kind of unit: head, neuron, layer or sublayer."""
    return tuple(name for name in registry.available("importance") if unit in registry.find("importance", name).UNITS)


def score(
    model: nn.Module,
    anatomy: Anatomy,
    calibration: Sequence[Batch],
    criterion: str = "fisher",
    *,
    judge: Sequence[Batch] = (),
    drop: int = 1,
    seed: int = 0,
) -> Scores:
    """Scores of every unit of the kinds that the criterion ranks, by group; larger means keep.

    `values` has the head and neuron groups, "layers" [L], and "sublayers" [2L] (attention of layer i at 2i, its FFN at
    2i + 1), as far as the criterion ranks them. `calibration` holds padded batches as `tasks` makes them; where they
    hold `labels`, gradients are those of the task loss, else of the divergence from the model itself. With the further
    texts of `judge`, groups become comparable: a group's scores are scaled so that they add up to what the model's
    answers really change when its units go. `drop` is how many layers are meant to go, for criteria that judge blocks
    of them. Raises BadData when texts are needed and there are none.
    """
    return score_each(model, anatomy, calibration, [criterion], judge=judge, drop=drop, seed=seed)[criterion]


def score_each(
    model: nn.Module,
    anatomy: Anatomy,
    calibration: Sequence[Batch],
    names: Sequence[str],
    *,
    judge: Sequence[Batch] = (),
    drop: int = 1,
    seed: int = 0,
    units: Collection[str] = EVERY,
) -> dict[str, Scores]:
    """The scores of several criteria, each as `score` gives them; the texts are gone through once for all of them.

    `units` names the kinds that matter to the caller: trying others would cost time for nothing.
    """
    modules = {name: registry.find("importance", name) for name in names}
    for name, module in modules.items():
        if (module.NEEDS or judge) and not len(calibration):
            raise BadData(f"The criterion {name!r} needs calibration texts, and there are none.")
    needs = {need for module in modules.values() for need in module.NEEDS}
    gram = {"gram"} if judge and any(hasattr(module, "score") for module in modules.values()) else set()
    encoder = network(model, anatomy.layout)
    statistics = (
        collect(encoder, anatomy, calibration, asked, seed=seed) if (asked := (needs & set(NEEDS)) | gram) else {}
    )
    seen = _Seen(
        state={name: tensor.detach().numpy() for name, tensor in model.state_dict().items()},
        statistics=statistics,
        attention=attention_patterns(encoder, anatomy, calibration) if "attention" in needs else {},
        learned=train_gates(encoder, anatomy, calibration) if "learned" in needs else {},
        ablated=_ablated(encoder, anatomy, statistics, calibration, units) if "ablations" in needs else {},
        streams=streams(encoder, calibration) if "streams" in needs else None,
        seed=seed,
    )
    found = {}
    for name, module in modules.items():
        values: dict[str, Array] = {}
        source = f"{len(calibration)} batches, seed {seed}"
        if hasattr(module, "score"):
            groups = [group for group in anatomy.groups if _ranks(module, group) and (judge or group.kind in units)]
            values = {g.name: module.score(seen.of(g)) if g.units else np.zeros(0) for g in groups}
            if judge:
                values = measured(encoder, anatomy, values, seen.statistics, judge)
                source += ", scaled to what was measured"
        if hasattr(module, "score_depth"):
            for unit in (unit for unit in DEPTH if unit in module.UNITS and unit in units):
                evidence = _depth_evidence(encoder, calibration, seen, unit, drop, "removals" in module.NEEDS)
                values[DEPTH[unit]] = module.score_depth(evidence)
        found[name] = Scores(name, values, source=source)
    return found


def _ranks(module: ModuleType, group: Group) -> bool:
    """Whether a criterion scores the units of a group; query heads as it scores heads, where inputs are all it sees."""
    if group.kind == "query":
        return "head" in module.UNITS and not {"attention", "learned"} & set(module.NEEDS)
    return group.kind != "layer" and group.kind in module.UNITS


@dataclass(frozen=True)
class _Seen:
    """All that was found out about one model, for whichever criteria ask."""

    state: Mapping[str, Array]
    statistics: Mapping[str, Statistics]
    attention: Mapping[str, Array]
    learned: Mapping[str, Array]
    ablated: Mapping[str, Array]
    streams: Streams | None
    seed: int

    def of(self, group: Group) -> Evidence:
        """What a criterion may see of one group."""
        consumer, found = group.consumer, self.statistics.get(group.name)

        def incoming(table: Mapping[str, Array]) -> Array:
            entries = [
                np.moveaxis(np.take(table[part.tensor], part.positions, axis=part.axis), part.axis, 0)
                for part in group.slices
                if part.role == "producer" and part.tensor in table
            ]
            return np.concatenate([one.reshape(group.units, -1) for one in entries], axis=1)

        def outgoing(table: Mapping[str, Array]) -> Array:
            return np.moveaxis(table[consumer.tensor], consumer.axis, 0)

        gradients = found.weight_gradients if found else None
        weights = outgoing(self.state)
        return Evidence(
            positions=consumer.positions,
            outgoing=weights,
            bias=self.state.get(consumer.tensor.removesuffix("weight") + "bias", np.zeros(weights.shape[1])),
            incoming=incoming(self.state),
            rows=found.rows if found else 0,
            texts=found.texts if found else 0,
            seed=_seed(group.name, self.seed),
            gram=found.gram if found else None,
            curvature=found.curvature if found else None,
            moments=found.moments if found else None,
            gates=found.gates if found else None,
            incoming_gradients=incoming(gradients) if gradients else None,
            outgoing_gradients=outgoing(gradients) if gradients else None,
            attention=self.attention.get(group.name),
            learned=self.learned.get(group.name),
            ablated=self.ablated.get(group.name),
        )


def _ablated(
    encoder: Network,
    anatomy: Anatomy,
    statistics: Mapping[str, Statistics],
    calibration: Sequence[Batch],
    units: Collection[str],
) -> dict[str, Array]:
    """Every head left out once, from its layer on: on as many texts as AFFORDED passes go through."""
    groups = [group for group in anatomy.groups if group.kind in ("head", "query") and group.kind in units]
    tried = sum(group.units for group in groups)
    texts = thinned(encoder, calibration, min(1.0, 2 * AFFORDED["ablations"] / max(1, tried)))
    return ablations(encoder, groups, statistics, texts)


def _depth_evidence(
    encoder: Network, calibration: Sequence[Batch], seen: _Seen, unit: str, drop: int, removals: bool
) -> DepthEvidence:
    places = np.arange(0, 2 * len(encoder.layers) + 1, 2 if unit == "layer" else 1)
    removed = None
    if removals:  # U pieces are tried, then U - 1, and so on: U^2 / 2 passes
        texts = thinned(encoder, calibration, min(1.0, 2 * AFFORDED["removals"] / len(places) ** 2))
        removed = removal(encoder, texts, sub_layers=unit == "sublayer")
    return DepthEvidence(places, drop, _seed(DEPTH[unit], seen.seed), streams=seen.streams, removed=removed)


def _seed(name: str, seed: int) -> int:
    """Every group has a seed of its own."""
    return zlib.crc32(f"{name} {seed}".encode())
