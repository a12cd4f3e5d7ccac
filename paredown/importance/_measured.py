"""Scores of different groups on one scale: what leaving units out really does to the model's answers.

A criterion looks at one sub-layer at a time and takes tokens for independent. Inside a group that ranks the units well;
between groups it can be wrong by far: under mean pooling the errors of all tokens of a text add up in the last layer,
where an independent sum is too small by their number. So each group is put to the test on texts; and heads, which are
few, can be put to it one by one.

Legend: B batch, T tokens, X inputs of an output projection (heads side by side, or neurons), D model width, U units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor, nn

from paredown.calibration import (
    PROJECTIONS,
    Batch,
    Statistics,
    distance,
    evaluating,
    ridge_regression,
    sub_layer_of,
    sub_layers,
    tensors,
)
from paredown.importance.obs import DAMPING
from paredown.network import Network
from paredown.types import Anatomy, Array, Group


def measured(
    encoder: Network,
    anatomy: Anatomy,
    values: Mapping[str, Array],
    statistics: Mapping[str, Statistics],
    judge: Sequence[Batch],
) -> dict[str, Array]:
    """The same ranking, with every group's scores in units of the model's divergence (see `calibration.divergence`).

    Of each group the lower half is left out, then all of it; what stays is re-fitted with the group's Gram matrix, and
    the change of the answers is measured on the texts of `judge`. The first figure scales the scores, the second is
    what all of them add up to. Cost: for each group about one pass over `judge`.
    """
    projections = sub_layers(encoder)
    found = dict(values)
    with torch.no_grad(), evaluating(encoder.model):
        texts = _Texts(encoder, judge)
        for index in range(len(encoder.layers)):
            for kind in PROJECTIONS:
                name = f"layer.{index}.{kind}"
                if name not in projections:
                    continue
                group, scores = anatomy.group(name), values[name]
                rising = np.argsort(scores, kind="stable")
                half, whole = (
                    texts.divergence(index, projections[name], statistics[name], _inputs(group, kept))
                    for kept in (rising[group.units // 2 :], rising[group.units :])
                )
                found[name] = _scaled(scores, half, whole)
            texts.advance(index)
    return found


def ablations(
    encoder: Network, groups: Sequence[Group], statistics: Mapping[str, Statistics], judge: Sequence[Batch]
) -> dict[str, Array]:
    """[U] by name, of these groups of heads or query heads: the divergence when that unit alone goes.

    What stays of the sub-layer is re-fitted with its Gram matrix. Cost: half a pass over `judge` for each unit.
    """
    projections = sub_layers(encoder)
    found = {}
    with torch.no_grad(), evaluating(encoder.model):
        texts = _Texts(encoder, judge)
        for index in range(len(encoder.layers)):
            for group in groups:
                if group.layer != index:
                    continue
                others = (np.delete(np.arange(group.units), unit) for unit in range(group.units))
                lost = [
                    texts.divergence(
                        index, projections[sub_layer_of(group)], statistics[group.name], _inputs(group, kept)
                    )
                    for kept in others
                ]
                found[group.name] = np.array(lost)
            texts.advance(index)
    return found


def _inputs(group: Group, units: Array) -> Array:
    """The inputs of the group's projection that these units own."""
    positions: Array = group.consumer.positions[np.sort(units)].ravel()
    return positions


def _refitted(projection: nn.Module, seen: Statistics, inputs: Array) -> tuple[Tensor, Tensor | None]:
    """The weight [X, D] and bias [D] that do best with these inputs alone; the weights of the others are zero.

    A projection without a bias gets none.
    """
    assert isinstance(projection.weight, Tensor) and seen.gram is not None
    weight = projection.weight.T if isinstance(projection, nn.Linear) else projection.weight
    bias = projection.bias
    dense, rows = weight.double(), torch.from_numpy(inputs)
    if isinstance(bias, Tensor):
        dense = torch.cat([dense, bias[None].double()])
        rows = torch.cat([rows, torch.tensor([len(dense) - 1])])
    gram = torch.from_numpy(seen.gram)[rows][:, : len(dense)]
    fitted = torch.zeros_like(dense)
    biased = isinstance(bias, Tensor)
    fitted[rows] = ridge_regression(gram[:, rows], gram @ dense, dense[rows], ridge=DAMPING, biased=biased)
    fitted = fitted.to(weight.dtype)
    return (fitted[:-1], fitted[-1]) if biased else (fitted, None)


def _scaled(scores: Array, half: float, whole: float) -> Array:
    """The same order; the lower half of the scores adds up to `half`, all of them to `whole`.

    Scores rise, so all add up to more where that would take a unit of the upper half below one of the lower.
    """
    order = np.argsort(scores, kind="stable")
    rising, lower = scores[order], len(scores) // 2
    if lower and half > 0 and rising[:lower].sum() > 0:
        rising = rising * (half / rising[:lower].sum())
        sums = np.minimum(np.cumsum(rising[lower:]), max(whole - half, 0.0))
        sums[-1] = max(whole - half, 0.0)
        upper = isotonic_regression(np.diff(sums, prepend=0.0)).x
        rising[lower:] = np.maximum(upper, rising[lower - 1])
    elif rising.sum() > 0:
        rising = rising * (whole / rising.sum())
    rising = rising + np.arange(len(rising)) * 1e-12 * max(rising[-1], 1e-300)  # ties would lose the order
    out = np.empty(len(scores))
    out[order] = rising
    return out


class _Texts:
    """The texts that judge, with the dense model's stream before the layer at hand and its answers."""

    def __init__(self, encoder: Network, batches: Sequence[Batch]):
        inputs = [tensors(batch, encoder) for batch in batches]
        self.encoder = encoder
        self.masks = [one["attention_mask"] for one in inputs]
        self.streams = [encoder.embed(one["input_ids"], one.get("token_type_ids")) for one in inputs]
        self.wanted = [encoder.forward_from(0, x, mask) for x, mask in zip(self.streams, self.masks, strict=True)]

    def divergence(self, index: int, projection: nn.Module, seen: Statistics, inputs: Array) -> float:
        """Mean over texts of how far the answers move when a projection of a layer is left with these inputs."""
        weight, bias = _refitted(projection, seen, inputs)

        def replaced(_module: nn.Module, args: tuple[Tensor, ...], _output: Tensor) -> Tensor:
            given = args[0] @ weight
            return given if bias is None else given + bias

        with projection.register_forward_hook(replaced):
            found: list[Tensor] = [
                distance(self.encoder.forward_from(index, x, mask), wanted, self.encoder.output_name)
                for x, mask, wanted in zip(self.streams, self.masks, self.wanted, strict=True)
            ]
        return float(torch.cat(found).mean())

    def advance(self, index: int) -> None:
        """On to the next layer."""
        for i, (x, mask) in enumerate(zip(self.streams, self.masks, strict=True)):
            self.streams[i] = self.encoder.step(index, x, self.encoder.mask(x, mask))
