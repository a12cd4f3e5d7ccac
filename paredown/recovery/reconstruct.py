"""Closed-form recovery: every output projection re-fitted, bottom-up, to what the dense model has at that place.

For one sub-layer, with inputs X (and a column of ones) of the small model, its own residual stream R and the dense
model's stream before the norm Z, the new weights are argmin |[X, 1] W - (Z - R)|^2 + ridge |W - W0|^2. The target holds
the error of everything below, which is what lets deep cuts survive (K-prune, Park et al. 2024, arXiv:2308.03449). A
layer that is gone is made up for by the next one that stays; if the topmost is gone, by none.

Legend: B batch, T tokens, X inputs, D model width, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from paredown.calibration import Batch, divergence, evaluating, real_rows, ridge_regression, tensors, with_ones
from paredown.encoder import Model, copied
from paredown.errors import BadData
from paredown.network import LayerSteps, Network, network
from paredown.types import Anatomy, Plan

RIDGE = 0.1  # of the mean diagonal, towards the weights before; 0.01 left more divergence on new texts, measured


def recover(
    small: Model,
    *,
    teacher: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    batches: Sequence[Batch],
    progress: Callable[[int], None] | None = None,
) -> Model:
    """A copy of `small` with re-fitted output projections; the copy is unchanged if that brings it no nearer.

    `small` is the cut model, which shares its embeddings with the copy; `teacher` is the dense one. Whether it is
    nearer is judged on `held_out` batches, which are not fitted to. Cost: two forward passes over the batches, and
    memory for one stream [B, T, D] of each model and batch. `progress` is told of every layer of the teacher. Raises
    BadData when there is no batch.
    """
    if not len(batches):
        raise BadData("Reconstruction needs calibration texts, and there are none.")
    held = held_out(len(batches))
    fitted = copied(small, anatomy.layout)
    student, dense = network(fitted, anatomy.layout), network(teacher, anatomy.layout)
    learnt = [batch for i, batch in enumerate(batches) if i not in held or len(batches) == 1]
    with torch.no_grad(), evaluating(student.model, dense.model):
        _fit(student, dense, plan.keep["layers"], learnt, progress)
    judge = [batches[i] for i in held]
    before = divergence(network(small, anatomy.layout), dense, judge)
    after = divergence(student, dense, judge)
    return fitted if after < before else copied(small, anatomy.layout)


def held_out(count: int) -> range:
    """Which batches judge: every tenth, from the middle of the first ten, since batches are often sorted by length."""
    return range(min(5, count // 2), count, 10)


def _fit(
    student: Network,
    teacher: Network,
    kept: Sequence[int],
    batches: Sequence[Batch],
    progress: Callable[[int], None] | None,
) -> None:
    """Re-fits the student in place. `wanted` and `streams` hold each model's stream, overwritten stage by stage."""
    inputs = [tensors(batch, teacher) for batch in batches]
    attention = [one["attention_mask"] for one in inputs]
    wanted = [teacher.embed(one["input_ids"], one.get("token_type_ids")) for one in inputs]
    streams = [student.embed(one["input_ids"], one.get("token_type_ids")) for one in inputs]
    every = range(len(batches))
    cls = student.layout.pooling == "cls"
    for index, dense in enumerate(teacher.layers):
        first = cls and index == len(teacher.layers) - 1  # only the first row is read
        here = kept.index(index) if index in kept else -1
        layer, alone = student.layers[here], cls and here == len(student.layers) - 1

        def context(i: int, layer: LayerSteps = layer, alone: bool = alone) -> Tensor:
            x = streams[i]
            none = x[:, : 1 if alone else x.shape[1], :0]
            return layer.context(x, student.mask(x, attention[i]), alone) if layer.num_heads else none

        def hidden(i: int, layer: LayerSteps = layer) -> Tensor:
            return layer.hidden(streams[i]) if layer.num_neurons else streams[i][..., :0]

        added = [dense.attention_output(x, teacher.mask(x, attention[i]), first) for i, x in enumerate(wanted)]
        wanted = [x[:, :1] if first else x for x in wanted]
        added = [one.expand_as(x) for one, x in zip(added, wanted, strict=True)]  # the teacher may be cut itself
        if here >= 0:
            targets = [_target(dense.after_attention, *three) for three in zip(added, wanted, streams, strict=True)]
            _refit(layer.output, context, targets, attention, alone)
            for i in every:
                streams[i] = layer.attend(streams[i], student.mask(streams[i], attention[i]), alone)
        wanted = [dense.join_attention(x, one) for x, one in zip(wanted, added, strict=True)]
        added = [dense.ffn_output(x).expand_as(x) for x in wanted]
        if here >= 0:
            targets = [_target(dense.after_ffn, *three) for three in zip(added, wanted, streams, strict=True)]
            _refit(layer.down, hidden, targets, attention, alone)
            for i in every:
                streams[i] = layer.feed(streams[i])
        wanted = [dense.join_ffn(x, one) for x, one in zip(wanted, added, strict=True)]
        if progress:
            progress(1)


def _target(norm: nn.Module | None, added: Tensor, wanted: Tensor, stream: Tensor) -> Tensor:
    """What the student's projection should give: the dense one's, and what its stream lacks by now.

    Where a norm comes between the projection and the stream, what is lacking cannot be asked of a linear map.
    """
    rows = min(wanted.shape[1], stream.shape[1])  # one, where only the first row of a text is read
    return added[:, :rows] if norm is not None else added[:, :rows] + wanted[:, :rows] - stream[:, :rows]


def _refit(
    projection: nn.Module,
    inputs: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    attention: Sequence[Tensor],
    alone: bool,
) -> None:
    """Solves for one projection in place. `inputs(i)` [B, T, X]; targets [B, T, D].

    With `alone`, only the first row of a text is fitted. Without a bias nothing stands in for it.
    """
    linear = cast(nn.Linear, projection)
    turned = not isinstance(projection, nn.Linear)  # GPT-2's Conv1D holds [in, out]
    start = (linear.weight if turned else linear.weight.T).double()
    width = len(start)
    if linear.bias is not None:
        start = torch.cat([start, linear.bias[None].double()])
    gram = start.new_zeros(len(start), len(start))
    cross = torch.zeros_like(start)
    for i, (target, mask) in enumerate(zip(targets, attention, strict=True)):
        z = real_rows(inputs(i), mask)
        z = with_ones(z) if linear.bias is not None else z
        gram += z.T @ z  # one batch's products in the model's precision; their sum in float64
        cross += z.T @ real_rows(target[:, :1] if alone else target, mask)
    solved = ridge_regression(gram, cross, start, ridge=RIDGE, biased=linear.bias is not None)
    linear.weight.copy_(solved[:width] if turned else solved[:width].T)
    if linear.bias is not None:
        linear.bias.copy_(solved[-1])
