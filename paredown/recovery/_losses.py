"""What a student learns: the teacher's answers, its stream between the layers, how its values relate, or the task.

Legend: B batch, T tokens, D model width, N rows of output, V values of all heads side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paredown.network import Network


@dataclass(frozen=True)
class Seen:
    """One forward pass: the output, the stream after each layer [B, T, D], and the values of the last one [B, T, V]."""

    output: Tensor
    streams: tuple[Tensor, ...]
    values: Tensor | None


def watched(model: Network, inputs: dict[str, Tensor], *, values: bool) -> Seen:
    """A forward pass in steps, with what the losses read; `values` None where the last layer has no heads."""
    x = model.embed(inputs["input_ids"], inputs.get("token_type_ids"))
    mask = model.mask(x, inputs["attention_mask"])
    streams: list[Tensor] = []
    caught: list[Tensor] = []
    last = len(model.layers) - 1
    for index in range(last + 1):
        handle = None
        if values and index == last and model.layers[last].num_heads:
            handle = _value_projection(model).register_forward_hook(lambda _m, _i, out: caught.append(out))
        try:
            x = model.step(index, x, mask)
        finally:
            if handle is not None:
                handle.remove()
        streams.append(x)
    found = None
    if caught:
        fused = "fused" in model.layout.layer_names  # [Q | K | V]
        found = caught[0][..., -(caught[0].shape[-1] // 3) :] if fused else caught[0]
    return Seen(cast(Any, model).pool(x, inputs["attention_mask"]), tuple(streams), found)


def _value_projection(model: Network) -> nn.Module:
    names = model.layout.layer_names
    block = cast(nn.ModuleList, model.model.get_submodule(model.layout.layers))[-1]
    return block.get_submodule(names.get("fused") or names["value"])


def answers(output: Tensor, wanted: Tensor, output_name: str, temperature: float) -> Tensor:
    """T^2 KL(teacher || student) of logits softened by T (Hinton et al. 2015, arXiv:1503.02531): mean over rows.

    Of embeddings 1 - cosine, and how the texts of the batch lie to one another.
    """
    if output_name == "logits":
        ours, theirs = (logits.float().div(temperature).log_softmax(-1) for logits in (output, wanted))
        return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
    near, wished = F.normalize(output.float(), dim=-1), F.normalize(wanted.float(), dim=-1)
    return (1 - (near * wished).sum(-1)).mean() + F.mse_loss(near @ near.T, wished @ wished.T)


def hidden(ours: Seen, theirs: Seen, layers: tuple[int, ...], mask: Tensor) -> Tensor:
    """Mean over kept layers and real tokens of |h_s - h_t|^2 (the token loss of ZipLM, arXiv:2302.04089), each layer in
    units of the teacher's mean square; `layers` says which of the teacher's each of the student's is.
    """
    losses = []
    for small, layer in zip(ours.streams, layers, strict=True):
        great = theirs.streams[layer]
        rows = mask[:, : small.shape[1]].bool()  # the last layer may give its first token alone
        want = great[:, : small.shape[1]][rows].float()
        losses.append(F.mse_loss(small[rows].float(), want) / want.square().mean().clamp(min=1e-12))
    return torch.stack(losses).mean()


def relations(ours: Seen, theirs: Seen, mask: Tensor) -> Tensor:
    """KL of softmax(V V' / sqrt(V)) between teacher and student over real tokens, at the last layer of each (MiniLM:
    Wang et al. 2020, arXiv:2002.10957).

    The student may have fewer heads, so the values of all heads side by side make one relation.
    """
    if ours.values is None or theirs.values is None:
        return ours.output.new_zeros(())
    rows = mask.bool()

    def logged(values: Tensor) -> Tensor:
        product: Tensor = values.float() @ values.float().transpose(1, 2) / values.shape[-1] ** 0.5
        return product.masked_fill(~rows[:, None, :], -1e9).log_softmax(-1)

    small, great = logged(ours.values)[rows], logged(theirs.values)[rows]
    return F.kl_div(small, great, log_target=True, reduction="batchmean")


def task(output: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels [N]; -100 is none."""
    return F.cross_entropy(output.float(), labels)
