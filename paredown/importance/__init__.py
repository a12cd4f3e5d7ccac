"""How much each unit matters. A new criterion is one file with `NEEDS` and `score(evidence) -> [U]`, higher = keep."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from torch import nn

from paredown import registry
from paredown.calibration import Batch, Statistics, collect
from paredown.encoder import Encoder
from paredown.errors import BadData
from paredown.importance._evidence import Evidence
from paredown.importance._measured import measured
from paredown.types import Anatomy, Array, Group, Scores

__all__ = ["Evidence", "evidence_of", "score"]


def evidence_of(group: Group, state: Mapping[str, Array], found: Statistics | None, *, seed: int = 0) -> Evidence:
    """What a criterion may see of one group of a model with this state dict; every group has a seed of its own."""
    consumer = next(s for s in group.slices if s.role == "consumer")
    incoming = [
        np.take(state[s.tensor], s.positions, axis=s.axis).reshape(group.units, -1)
        for s in group.slices
        if s.role == "producer" and s.tensor in state
    ]
    bias = consumer.tensor.removesuffix("weight") + "bias"
    outgoing = state[consumer.tensor].T
    return Evidence(
        positions=consumer.positions,
        outgoing=outgoing,
        bias=state.get(bias, np.zeros(outgoing.shape[1])),
        incoming=np.concatenate(incoming, axis=1),
        gram=found.gram if found else None,
        curvature=found.curvature if found else None,
        gradients=found.gradients if found else None,
        texts=found.texts if found else 0,
        seed=zlib.crc32(f"{group.name} {seed}".encode()),
    )


def score(
    model: nn.Module,
    anatomy: Anatomy,
    calibration: Sequence[Batch],
    criterion: str = "fisher",
    *,
    judge: Sequence[Batch] = (),
    seed: int = 0,
) -> Scores:
    """Scores of every head and neuron group. `calibration` holds padded batches as `tasks` makes them.

    With the further texts of `judge`, groups become comparable: a group's scores are scaled so that they add up to what
    the model's answers really change when its units go. Raises BadData when texts are needed and there are none.
    """
    module = registry.find("importance", criterion)
    statistics: Mapping[str, Statistics] = {}
    encoder = Encoder(model, anatomy.layout)
    if module.NEEDS or judge:
        if not len(calibration):
            raise BadData(f"The criterion {criterion!r} needs calibration texts, and there are none.")
        statistics = collect(
            encoder,
            calibration,
            layers=range(anatomy.group("layers").units),
            gram="gram" in module.NEEDS or bool(judge),
            curvature="curvature" in module.NEEDS,
            gradients="gradients" in module.NEEDS,
            seed=seed,
        )
    state = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    values = {
        group.name: module.score(evidence_of(group, state, statistics.get(group.name), seed=seed))
        if group.units
        else np.zeros(0)
        for group in anatomy.groups
        if group.kind != "layer"
    }
    source = f"{len(calibration)} batches, seed {seed}"
    if judge:
        values, source = measured(encoder, anatomy, values, statistics, judge), f"{source}, scaled to what was measured"
    return Scores(criterion, values, source=source)
