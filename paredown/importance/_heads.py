"""What needs the model itself to be known of heads and units: where they look, and gates on them that are trained.

Legend: B batch, T tokens, X inputs of an output projection, U units, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from paredown.calibration import PROJECTIONS, Batch, distance, evaluating, sub_layers, tensors
from paredown.network import Network
from paredown.types import Anatomy, Array, Group

PASSES = 3  # over the texts: with a dense pass each, as dear as four passes forward and back
STEP = 1.0  # of a gate's logit, in units of the root mean square pull on its kind
PRESSURE = 0.5  # towards zero, in the same units: the L1 penalty
IN_EFFECT = 1 / 16  # of the gates, in each text: with all of them at once, a gate learns what the others do
STREAMS = 1.0  # weight of the streams beside the answers, which say little of a single neuron
OTHERWISE = 1e-5  # at most this much of a gate is in effect: texts are few, and no gate may go unseen


def attention_patterns(encoder: Network, anatomy: Anatomy, batches: Sequence[Batch]) -> dict[str, Array]:
    """[2, U] by group name: 1 - entropy / log T, and the largest probability; means over the rows that are read.

    What looks at a special token does nothing (Clark et al. 2019, arXiv:1906.04341), so keys are the T tokens between
    those at the ends: all that a row sees but the first one, and the last one of a text encoder's. Entropy is of the
    probabilities among them. Rows that see fewer than two of them say nothing and are left out. The query heads of a
    group are averaged. Cost: a forward pass and half.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    with torch.inference_mode(), evaluating(encoder.model):
        for batch in batches:
            inputs = tensors(batch, encoder)
            real = inputs["attention_mask"].bool()
            keys = real.clone()
            keys[:, 0] = False
            if encoder.layout.pooling == "tokens":
                sees = keys.cumsum(1)
            else:
                keys[torch.arange(len(keys)), real.sum(1) - 1] = False
                sees = keys.sum(1, keepdim=True).expand(real.shape)
            x = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
            mask = encoder.mask(x, inputs["attention_mask"])
            for i, layer in enumerate(encoder.layers):
                first = encoder.layout.pooling == "cls" and i == len(encoder.layers) - 1
                if layer.num_heads:
                    rows_ = slice(0, 1) if first else slice(None)
                    read, seen = (real & (sees > 1))[:, rows_], sees[:, None, rows_]
                    p = layer.probabilities(x, mask, first) * keys[:, None, None]
                    q = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
                    entropy = -torch.special.xlogy(q, q).sum(-1) / seen.clamp(min=2).log()
                    both = torch.stack([1 - entropy, p.amax(-1)])  # [2, B, H, T]
                    name = f"layer.{i}.heads"
                    both = both.unflatten(2, (anatomy.group(name).units, -1)).mean(3)
                    sums[name] = sums.get(name, 0) + (both * read[:, None]).sum((1, 3)).double()
                    rows[name] = rows.get(name, 0) + int(read.sum())
                x = encoder.step(i, x, mask)
    return {name: (total / max(rows[name], 1)).clamp(min=0).numpy() for name, total in sums.items()}


def train_gates(encoder: Network, anatomy: Anatomy, batches: Sequence[Batch]) -> dict[str, Array]:
    """[U] by group name: a gate in (0, 1) on each unit, trained to stay near the dense model under an L1 penalty, in
    its answers and, as CoFi does, layer by layer.

    Gates are stochastic, as in L0 regularization: in each text some are in effect, drawn by the text itself, and the
    others open. What pulls at a gate is its gradient in the texts where it is in effect, less its gradient in all of
    them: that part comes from the other gates. Whole passes over the texts are the steps, so batches do not matter.
    Cost: PASSES times a dense pass and one forward and back.
    """
    modules = sub_layers(encoder)
    orders = {name: _order(module, anatomy.group(name)) for name, module in modules.items()}
    logits = {name: torch.zeros(len(order), dtype=torch.float64) for name, order in orders.items()}
    for number in range(PASSES):
        sums = {name: torch.zeros(3, len(logit), dtype=torch.float64) for name, logit in logits.items()}
        with evaluating(encoder.model):
            for batch in batches:
                inputs = tensors(batch, encoder)
                effects = _drawn(inputs, orders, number)
                gates = {name: 1 - effects[name] * (1 - logit.sigmoid()) for name, logit in logits.items()}
                asked = {name: gate.float().requires_grad_() for name, gate in gates.items()}
                with torch.no_grad():
                    wanted = _followed(encoder, inputs)
                with torch.enable_grad(), _gated(encoder, anatomy, asked):
                    loss = _lost(encoder, _followed(encoder, inputs), wanted, inputs["attention_mask"])
                for name, g in zip(asked, torch.autograd.grad(loss, list(asked.values())), strict=True):
                    effect = effects[name]
                    sums[name] += torch.stack([(g * effect).sum(0), effect.sum(0), g.double().sum(0)])
        texts = sum(len(batch["input_ids"]) for batch in batches)
        pulls = {name: every / texts - own / weight for name, (own, weight, every) in sums.items()}
        for kind in PROJECTIONS:  # heads pull far harder than neurons
            names = [name for name in pulls if name.endswith(kind)]
            size = float(torch.cat([pulls[name] for name in names]).square().mean().sqrt()) if names else 0.0
            for name in names:
                logits[name] += STEP * ((pulls[name] / (size or 1.0)).asinh() - PRESSURE)  # none runs off in one step
    return {name: logit.sigmoid().numpy() for name, logit in logits.items()}


def _followed(encoder: Network, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """The stream behind every layer, and the answers."""
    x = encoder.embed(inputs["input_ids"], inputs.get("token_type_ids"))
    mask, streams = encoder.mask(x, inputs["attention_mask"]), []
    for index in range(len(encoder.layers)):
        x = encoder.step(index, x, mask)
        streams.append(x)
    return streams, encoder.forward_from(len(streams), x, inputs["attention_mask"])


def _lost(
    encoder: Network, found: tuple[list[Tensor], Tensor], wanted: tuple[list[Tensor], Tensor], mask: Tensor
) -> Tensor:
    """The divergence of the answers, and how far the stream is off behind each layer, relative; summed over answers."""
    total = distance(found[1], wanted[1], encoder.output_name).sum()
    for ours, theirs in zip(found[0], wanted[0], strict=True):
        off = (ours - theirs).square().sum(-1) / theirs.square().sum(-1).clamp(min=1e-12)
        real = mask[:, : off.shape[1]]  # of a last layer perhaps one row
        off = off * real if encoder.layout.pooling == "tokens" else off * real / real.sum(1, keepdim=True)
        total = total + STREAMS * off.sum() / len(found[0])
    return total


@contextmanager
def _gated(encoder: Network, anatomy: Anatomy, gates: dict[str, Tensor]) -> Iterator[None]:
    """Inside the block every unit's output is multiplied by its gate in that text [B, U]."""
    handles = []
    for name, module in sub_layers(encoder).items():
        positions = torch.from_numpy(anatomy.group(name).consumer.positions)
        index = torch.empty(positions.numel(), dtype=torch.long)
        index[positions.flatten()] = torch.arange(len(positions)).repeat_interleave(positions.shape[1])
        gate = gates[name][:, None, index]  # [B, 1, X]
        handles.append(module.register_forward_pre_hook(lambda _m, args, gate=gate: (args[0] * gate,)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drawn(inputs: dict[str, Tensor], orders: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    """How much of each gate is in effect in each text [B, U]: all of it, or next to nothing; anew in each pass."""
    real = (inputs["input_ids"] + number) * inputs["attention_mask"]
    seeds = (real * torch.arange(1, real.shape[1] + 1) * 2654435761 % 2**31).sum(1).tolist()
    counts = [len(order) for order in orders.values()]
    drawn = [torch.rand(sum(counts), generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    by_text = torch.stack(drawn).double()
    effects = torch.where(by_text < IN_EFFECT, 1.0, OTHERWISE * by_text).split(counts, dim=1)
    return {name: effect[:, order] for (name, order), effect in zip(orders.items(), effects, strict=True)}


def _order(projection: nn.Module, group: Group) -> Tensor:
    """[U]: the rank of each unit by its own weights, so that draws go with the units however they are permuted."""
    assert isinstance(projection.weight, Tensor)
    weights = projection.weight.detach().movedim(group.consumer.axis, 0)[torch.from_numpy(group.consumer.positions)]
    ranks = np.empty(group.units, dtype=np.int64)
    ranks[np.lexsort(weights.flatten(1).T.numpy())] = np.arange(group.units)
    return torch.from_numpy(ranks)
