"""One streaming pass over calibration texts: everything that scoring and closed-form recovery need to know.

Legend: B batch, T tokens, X inputs of an output projection (heads side by side, or neurons), D model width,
U units, N rows (real tokens; texts alone where only the first row is read).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from paredown.encoder import Encoder
from paredown.types import Array

Batch = Mapping[str, Array]

SOFTENING = 2.0  # temperature of the sampled answers: a model sure of its own training texts would give no gradient


@dataclass(frozen=True)
class Statistics:
    """What one sub-layer sees.

    `gram` [X+1, X+1] float64: sum of x x' over rows, the last entry of x being 1 (for the bias).
    `curvature` [D, D] float64: mean of g g' over rows, g the gradient of a text's divergence at the sub-layer's output
    (None without gradients). `gradients` [texts, X]: each text's derivative by a gate on each input. `rows` is N.
    """

    gram: Array
    rows: int
    texts: int
    curvature: Array | None = None
    gradients: Array | None = None


def sub_layers(encoder: Encoder, layers: Sequence[int]) -> dict[str, nn.Module]:
    """Output projections by group name, bottom-up; `layers` are the dense indices of the layers still there."""
    table: dict[str, nn.Module] = {}
    for index, layer in zip(layers, encoder.layers, strict=True):
        if layer.num_heads:
            table[f"layer.{index}.heads"] = layer.output
        if layer.num_neurons:
            table[f"layer.{index}.neurons"] = layer.down
    return table


def tensors(batch: Batch, encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's inputs out of one padded batch of arrays."""
    return {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in encoder.input_names}


def real_rows(values: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, X] -> [N, X]: padding removed; the rows of [B, 1, X] are the first ones, which are all real."""
    return values.flatten(0, 1) if values.shape[1] == 1 else values[attention_mask.bool()]


def with_ones(rows: Tensor) -> Tensor:
    """[N, X] -> [N, X+1] with a column of ones for the bias."""
    return torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)


@contextmanager
def tapped(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, input, output)` whenever one of the modules runs inside the block."""
    handles = [
        module.register_forward_hook(lambda _m, args, out, name=name: see(name, args[0], out))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_loss(encoder: Encoder, output: Tensor, generator: torch.Generator) -> Tensor:
    """A scalar whose gradients g give the Gauss-Newton matrix E[g g'] of the divergence from the model itself.

    The divergence has no gradient at the model itself, so answers are drawn instead: for logits, y ~ softmax and
    -log p(y); for embeddings e, the tangent probe (I - ee')r/|e| with r ~ N(0, I), which gives the matrix of the
    cosine loss. Labels are never needed (Martens 2020, arXiv:1412.1193, section 9).
    """
    if encoder.output_name == "logits":
        log_p = torch.log_softmax(output / SOFTENING, dim=-1)
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        return -log_p.gather(1, drawn).sum()
    norm = output.detach().norm(dim=-1, keepdim=True)
    unit = output.detach() / norm
    noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return (((noise - unit * (unit * noise).sum(-1, keepdim=True)) / norm) * output).sum()


def collect(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    layers: Sequence[int],
    gradients: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistics]:
    """Statistics of every sub-layer by group name. Cost: one forward (and backward) pass over the batches."""
    modules = sub_layers(encoder, layers)
    grams: dict[str, Tensor] = {}
    curvatures: dict[str, Tensor] = {}
    gates: dict[str, list[Tensor]] = {name: [] for name in modules}
    rows = dict.fromkeys(modules, 0)
    texts = 0
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for batch in batches:
        inputs = tensors(batch, encoder)
        mask = inputs["attention_mask"]
        seen.clear()
        with tapped(modules, lambda name, x, out: seen.__setitem__(name, (x, out))), torch.set_grad_enabled(gradients):
            output = encoder(**inputs)
        if gradients:
            flat = [tensor for pair in seen.values() for tensor in pair]
            found = torch.autograd.grad(probe_loss(encoder, output, generator), flat)
            for (name, (x, out)), gx, gy in zip(seen.items(), found[::2], found[1::2], strict=True):
                gates[name].append((x.detach() * gx).sum(1))
                g = real_rows(gy, mask).double()
                curvatures[name] = curvatures.get(name, 0) + g.T @ g
                del out
        for name, (x, _) in seen.items():
            z = with_ones(real_rows(x.detach(), mask)).double()
            grams[name] = grams[name].addmm_(z.T, z) if name in grams else z.T @ z
            rows[name] += len(z)
        texts += len(mask)
        if progress:
            progress(len(mask))
    return {
        name: Statistics(
            gram=grams[name].numpy(),
            rows=rows[name],
            texts=texts,
            curvature=(curvatures[name] / rows[name]).numpy() if gradients else None,
            gradients=torch.cat(gates[name]).numpy() if gradients else None,
        )
        for name in modules
    }


def divergence(encoder: Encoder, reference: Encoder, batches: Iterable[Batch]) -> float:
    """Mean over texts of what separates the outputs: KL(reference || encoder) of logits, 1 - cosine of embeddings."""
    total, texts = 0.0, 0
    with torch.inference_mode():
        for batch in batches:
            inputs = tensors(batch, encoder)
            total += float(distance(encoder(**inputs), reference(**inputs), encoder.output_name).sum())
            texts += len(inputs["attention_mask"])
    return total / max(texts, 1)


def distance(output: Tensor, wanted: Tensor, output_name: str) -> Tensor:
    """[B]: KL(wanted || output) for logits, 1 - cosine for embeddings; differentiable in `output`."""
    if output_name == "logits":
        log_p, log_q = output.log_softmax(-1), wanted.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    return 1 - torch.cosine_similarity(output, wanted, dim=-1)
