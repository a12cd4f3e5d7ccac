"""Closed-form recovery: every output projection re-fitted, bottom-up, to what the dense model has at that place.

For one sub-layer, with inputs X (and a column of ones) of the small model, its own residual stream R and the dense
model's stream before the norm Z, the new weights are argmin |[X, 1] W - (Z - R)|^2 + ridge |W - W0|^2. The target holds
the error of everything below, which is what lets deep cuts survive (K-prune, Park et al. 2024, arXiv:2308.03449).

Legend: B batch, T tokens, X inputs, D model width, N rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from paredown.calibration import Batch, divergence, real_rows, tensors, with_ones
from paredown.encoder import Encoder, Layer
from paredown.types import Anatomy, Plan

Model = TypeVar("Model", bound=nn.Module)

RIDGE = 1e-2  # of the mean diagonal, towards the weights before: as in the elimination that chose the units


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

    `small` is the cut model, `teacher` the dense one. Cost: two forward passes over the batches, and memory for both
    streams. Whether it is nearer is judged on the last tenth of the batches, which are not fitted to.
    """
    held = max(1, len(batches) // 10) if len(batches) > 1 else 0
    fitted = copy.deepcopy(small).requires_grad_(False)
    with torch.no_grad():
        _fit(
            Encoder(fitted, anatomy.layout),
            Encoder(teacher, anatomy.layout),
            plan.keep["layers"],
            batches[: len(batches) - held],
            progress,
        )
    judge = batches[-held:] if held else batches
    dense = Encoder(teacher, anatomy.layout)
    before = divergence(Encoder(small, anatomy.layout), dense, judge)
    after = divergence(Encoder(fitted, anatomy.layout), dense, judge)
    return fitted if after < before else copy.deepcopy(small)


def _fit(
    student: Encoder, teacher: Encoder, kept: Sequence[int], batches: Sequence[Batch], progress: Callable[[int], None] | None
) -> None:
    inputs = [tensors(batch, teacher) for batch in batches]
    attention = [one["attention_mask"] for one in inputs]
    ids = [(one["input_ids"], one.get("token_type_ids")) for one in inputs]
    wanted = [teacher.embed(*pair) for pair in ids]
    streams = [student.embed(*pair) for pair in ids]
    masks = [student.mask(x, a) for x, a in zip(streams, attention, strict=True)]
    cls = student.layout.pooling == "cls"
    for index, dense in enumerate(teacher.layers):
        whole = not (cls and index == len(teacher.layers) - 1)
        rows = wanted if whole else [x[:, :1] for x in wanted]
        after_attention = [
            r + dense.attention_output(x, m, not whole) for r, x, m in zip(rows, wanted, masks, strict=True)
        ]
        middle = [dense.attention_norm(z) for z in after_attention]
        after_ffn = [x + dense.ffn_output(x) for x in middle]
        wanted = [dense.ffn_norm(z) for z in after_ffn]
        if index in kept:
            here = kept.index(index)
            layer = student.layers[here]
            streams = _refit_layer(
                layer, streams, masks, attention, after_attention, after_ffn, cls and here == len(student.layers) - 1
            )
        if progress:
            progress(1)


def _refit_layer(
    layer: Layer,
    streams: list[Tensor],
    masks: Sequence[Tensor],
    attention: Sequence[Tensor],
    after_attention: Sequence[Tensor],
    after_ffn: Sequence[Tensor],
    first_only: bool,
) -> list[Tensor]:
    """Re-fits both projections of one layer in place; the streams [B, T, D] that leave it."""

    def context(i: int) -> Tensor:
        x = streams[i]
        return layer.context(x, masks[i], first_only) if layer.num_heads else x[:, : rows[i].shape[1], :0]

    def hidden(i: int) -> Tensor:
        return layer.hidden(middle[i]) if layer.num_neurons else middle[i][..., :0]

    rows = [x[:, :1] if first_only else x for x in streams]
    _refit(layer.output, context, rows, after_attention, attention)
    middle = [layer.attend(x, m, first_only) for x, m in zip(streams, masks, strict=True)]
    _refit(layer.down, hidden, middle, after_ffn, attention)
    return [layer.feed(x) for x in middle]


def _refit(
    linear: nn.Linear,
    inputs: Callable[[int], Tensor],
    residuals: Sequence[Tensor],
    targets: Sequence[Tensor],
    attention: Sequence[Tensor],
) -> None:
    """Solves for one projection in place. `inputs(i)` [B, T, X]; residuals and targets [B, T, D]; T may be 1."""
    width, size = linear.weight.shape[0], linear.weight.shape[1] + 1
    gram = torch.zeros(size, size, dtype=torch.float64)
    cross = torch.zeros(size, width, dtype=torch.float64)
    for i, (residual, target, mask) in enumerate(zip(residuals, targets, attention, strict=True)):
        z = with_ones(real_rows(inputs(i), mask)).double()
        gram.addmm_(z.T, z)
        cross.addmm_(z.T, real_rows(target[:, : residual.shape[1]] - residual, mask).double())
    bias = linear.bias if linear.bias is not None else torch.zeros(width)
    start = torch.cat([linear.weight.T, bias[None]]).double()
    ridge = torch.zeros(size, dtype=torch.float64)
    if size > 1:
        ridge[:-1] = RIDGE * gram.diagonal()[:-1].mean().clamp(min=1e-12)
    solved = torch.linalg.solve(gram + torch.diag(ridge), cross + ridge[:, None] * start)
    linear.weight.copy_(solved[:-1].T)
    if linear.bias is not None:
        linear.bias.copy_(solved[-1])
