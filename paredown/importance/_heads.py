"""What needs the model itself to be known of heads and units: where they look, and gates on them that are trained.

Legend: B batch, T tokens, X inputs of an output projection, U units, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from paredown.calibration import Batch, distance, evaluating, sub_layers, tensors
from paredown.network import Network
from paredown.types import Anatomy, Array, Group

PASSES = 3  # over the texts: with a dense pass each, as dear as four passes forward and back
STEP = 1.0  # of a gate's logit, in units of the root mean square pull
PRESSURE = 0.5  # towards zero, in the same units: the L1 penalty
START = 2.2  # logit of 0.9: at 1 the divergence has no gradient


def attention_patterns(encoder: Network, anatomy: Anatomy, batches: Sequence[Batch]) -> dict[str, Array]:
    """[2, U] by group name: 1 - entropy / log T, and the largest probability; means over the rows that are read.

    T is the number of tokens that a row sees; rows that see one token say nothing and are left out. The query heads of
    a group are averaged. Cost: a forward pass and half.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    with torch.inference_mode(), evaluating(encoder.model):
        for batch in batches:
            inputs = tensors(batch, encoder)
            real = inputs["attention_mask"].bool()
            sees = (
                real.cumsum(1) if encoder.layout.pooling == "tokens" else real.sum(1, keepdim=True).expand(real.shape)
            )
            x = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
            mask = encoder.mask(x, inputs["attention_mask"])
            for i, layer in enumerate(encoder.layers):
                first = encoder.layout.pooling == "cls" and i == len(encoder.layers) - 1
                if layer.num_heads:
                    p = layer.probabilities(x, mask, first)
                    rows_ = slice(0, 1) if first else slice(None)
                    read = (real & (sees > 1))[:, rows_]
                    entropy = -torch.special.xlogy(p, p).sum(-1) / sees.clamp(min=2).log()[:, None, rows_]
                    both = torch.stack([1 - entropy, p.amax(-1)])  # [2, B, H, T]
                    name = f"layer.{i}.heads"
                    both = both.unflatten(2, (anatomy.group(name).units, -1)).mean(3)
                    sums[name] = sums.get(name, 0) + (both * read[:, None]).sum((1, 3)).double()
                    rows[name] = rows.get(name, 0) + int(read.sum())
                x = encoder.step(i, x, mask)
    return {name: (total / max(rows[name], 1)).clamp(min=0).numpy() for name, total in sums.items()}


def train_gates(encoder: Network, anatomy: Anatomy, batches: Sequence[Batch]) -> dict[str, Array]:
    """[U] by group name: a gate in (0, 1) on each unit, trained to stay near the dense model under an L1 penalty.

    Whole passes over the texts are the steps, so batches do not matter. Cost: PASSES times a dense pass and one forward
    and back.
    """
    names = sub_layers(encoder)
    logits = {name: _start(anatomy.group(name), module) for name, module in names.items()}
    for _ in range(PASSES):
        pulls = {name: torch.zeros(len(logit), dtype=torch.float64) for name, logit in logits.items()}
        texts = 0
        with evaluating(encoder.model):
            for batch in batches:
                inputs = tensors(batch, encoder)
                with torch.no_grad():
                    wanted = encoder(**inputs)
                with torch.enable_grad(), _gated(encoder, anatomy, logits):
                    loss = distance(encoder(**inputs), wanted, encoder.output_name).sum()
                for name, g in zip(logits, torch.autograd.grad(loss, list(logits.values())), strict=True):
                    pulls[name] -= g.double()
                texts += len(wanted)
        size = float(torch.cat(list(pulls.values())).square().mean().sqrt()) or 1.0
        with torch.no_grad():
            for name, logit in logits.items():
                logit += STEP * ((pulls[name] / size).tanh() - PRESSURE)  # no unit may run off in one step
    return {name: logit.detach().sigmoid().numpy() for name, logit in logits.items()}


def _start(group: Group, projection: nn.Module) -> Tensor:
    """Logits [U] about START; a unit that writes more starts a little higher.

    If all started alike, a norm behind the projection would take the common factor out, and nothing would pull.
    """
    weight = cast(Tensor, projection.weight).detach()
    by_input = weight.square().sum(1 - group.consumer.axis)
    norms = by_input[torch.from_numpy(group.consumer.positions)].sum(1).sqrt()
    return (START + (norms / norms.mean() - 1).tanh()).requires_grad_(True)


@contextmanager
def _gated(encoder: Network, anatomy: Anatomy, logits: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block every unit's output is multiplied by the sigmoid of its logit."""
    handles = []
    for name, module in sub_layers(encoder).items():
        positions = torch.from_numpy(anatomy.group(name).consumer.positions)
        index = torch.empty(positions.numel(), dtype=torch.long)
        index[positions.flatten()] = torch.arange(len(positions)).repeat_interleave(positions.shape[1])
        gates = logits[name].sigmoid()[index]
        handles.append(module.register_forward_pre_hook(lambda _m, args, gates=gates: (args[0] * gates,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
