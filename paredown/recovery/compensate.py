"""FLAP's bias compensation: what a removed unit gives on average goes into the bias (An et al. 2024, arXiv:2312.11983).

The least-squares answer when nothing but the bias may change; `reconstruct` also re-fits the weights that stay.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from paredown.calibration import PROJECTIONS, Batch, collect, divergence
from paredown.encoder import Model, admit_biases, blocks_of, copied, linear_of
from paredown.errors import BadData
from paredown.network import network
from paredown.recovery.reconstruct import held_out
from paredown.types import Anatomy, Plan


def recover(
    small: Model,
    *,
    teacher: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    batches: Sequence[Batch],
    progress: Callable[[int], None] | None = None,
) -> Model:
    """A copy of `small` with b + sum over removed inputs j of E[x_j] W_j; unchanged if that brings it no nearer.

    Projections without a bias get one, as FLAP gives Llama's: such a model no longer fits a stock checkpoint.
    The means are those of the dense `teacher`; whether it is nearer is judged on `held_out` batches, which do not
    count in them. Cost: one forward pass over the batches. `progress` is told of texts. Raises BadData without batches.
    """
    if not len(batches):
        raise BadData("Bias compensation needs calibration texts, and there are none.")
    held = held_out(len(batches))
    learnt = [batch for i, batch in enumerate(batches) if i not in held or len(batches) == 1]
    layout = anatomy.layout
    dense = network(teacher, layout)
    seen = collect(dense, anatomy, learnt, ["moments"], progress=progress)
    fitted = copied(small, layout)
    with torch.no_grad():
        for here, index in enumerate(plan.keep["layers"]):
            for kind, role in PROJECTIONS.items():
                group = anatomy.group(f"layer.{index}.{kind}")
                gone = np.setdiff1d(np.arange(group.units), plan.keep[group.name])
                if not len(gone) or group.name not in seen:
                    continue
                name = f"{layout.layers}.{here}.{layout.layer_names[role]}.bias"
                admit_biases(fitted, [name])
                bias = fitted.get_parameter(name)
                moments = seen[group.name].moments
                assert moments is not None
                inputs = torch.from_numpy(group.consumer.positions[gone].ravel())
                dropped = linear_of(blocks_of(teacher, layout)[index], layout, role).weight
                dropped = dropped.index_select(group.consumer.axis, inputs).double()
                mean = torch.from_numpy(moments[0])[inputs]
                bias.add_(dropped @ mean if group.consumer.axis else mean @ dropped)
    judge = [batches[i] for i in held]
    nearer = divergence(network(fitted, layout), dense, judge) < divergence(network(small, layout), dense, judge)
    return fitted if nearer else copied(small, layout)
