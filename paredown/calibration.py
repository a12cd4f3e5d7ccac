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
from paredown.errors import UnsupportedModel
from paredown.types import Array

Batch = Mapping[str, Array]

PROJECTIONS = {"heads": "output", "neurons": "down"}  # of a layer: its attention's, its FFN's

SOFTENING = 2.0  # temperature of the sampled answers: a model sure of its own training texts would give no gradient


@dataclass(frozen=True)
class Statistics:
    """What one sub-layer sees.

    `gram` [X+1, X+1] float64: sum of x x' over rows, the last entry of x being 1 (for the bias); None if not asked for.
    `curvature` [D, D] float64: mean of g g' over rows, g the gradient of a text's divergence at the sub-layer's output
    (None if not asked for). `gradients` [texts, X]: each text's derivative by a gate on each input (the same). `rows`
    is N.
    """

    gram: Array | None
    rows: int
    texts: int
    curvature: Array | None = None
    gradients: Array | None = None


def sub_layers(encoder: Encoder, layers: Sequence[int]) -> dict[str, nn.Module]:
    """Output projections by group name, bottom-up; `layers` are the dense indices of the layers still there."""
    table: dict[str, nn.Module] = {}
    for index, layer in zip(layers, encoder.layers, strict=True):
        for kind, role in PROJECTIONS.items():
            if getattr(layer, f"num_{kind}"):
                table[f"layer.{index}.{kind}"] = getattr(layer, role)
    return table


def tensors(batch: Batch, encoder: Encoder) -> dict[str, Tensor]:
    """The encoder's inputs out of one padded batch of arrays."""
    return {name: torch.from_numpy(np.ascontiguousarray(batch[name])) for name in encoder.input_names}


def real_rows(values: Tensor, attention_mask: Tensor) -> Tensor:
    """[B, T, X] -> [N, X]: padding removed; the rows of [B, 1, X] are the first ones, which are all real."""
    return values.flatten(0, 1) if values.shape[1] == 1 else values[attention_mask.bool()]


def with_ones(rows: Tensor) -> Tensor:
    """[N, X] -> [N, X+1] with a column of ones for the bias."""
    return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)


def ridge_regression(gram: Tensor, cross: Tensor, start: Tensor, *, ridge: float, biased: bool = True) -> Tensor:
    """W [X, D] that minimises tr(W' gram W - 2 W' cross) + r |W - start|^2, r being `ridge` of the mean diagonal.

    `gram` [X, X] and `cross` [X, D] are sums over rows of x x' and x y'. With `biased` the last row of W is a bias,
    which is not drawn to its start. All in float64; nothing to solve for where X is 0.
    """
    width = len(gram) - biased
    gram, cross = gram.clone(), cross.clone()
    if width:
        strength = ridge * gram.diagonal()[:width].mean().clamp(min=1e-12)
        gram.diagonal()[:width] += strength
        cross[:width] += strength * start[:width]
    solved: Tensor = torch.linalg.solve(gram, cross)
    return solved


@contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Dropout off inside the block; afterwards every part is in the mode in which it was."""
    modes = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for part, _ in modes:
            part.training = False
        yield
    finally:
        for part, mode in modes:
            part.training = mode


@contextmanager
def tapped(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Calls `see(name, input, output)` whenever one of the modules runs inside the block.

    With gradients on, the inputs seen require them, also in a model all of whose parameters are frozen.
    """

    def prepare(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled() and not args[0].requires_grad:
            args[0].requires_grad_(True)

    handles = [module.register_forward_pre_hook(prepare) for module in modules.values()]
    handles += [
        module.register_forward_hook(lambda _m, args, out, name=name: see(name, args[0], out))
        for name, module in modules.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def probe_loss(encoder: Encoder, output: Tensor, random: np.random.Generator) -> Tensor:
    """A scalar whose gradients g give the Gauss-Newton matrix E[g g'] of the divergence from the model itself.

    The divergence has no gradient at the model itself, so answers are drawn instead: for logits, y ~ softmax and
    -log p(y); for embeddings e, the tangent probe (I - ee')r/|e| with r ~ N(0, I), which gives the matrix of the
    cosine loss. Labels are never needed (Martens 2020, arXiv:1412.1193, section 9). `random` is read text by text, so
    the draws do not depend on how the texts are batched.
    """
    if encoder.output_name == "logits":
        log_p = torch.log_softmax(output / SOFTENING, dim=-1)
        reached = log_p.detach().double().exp().cumsum(dim=1)
        drawn = (reached < reached[:, -1:] * torch.from_numpy(random.random((len(output), 1)))).sum(1, keepdim=True)
        return -log_p.gather(1, drawn).sum()
    norm = output.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    unit = output.detach() / norm
    noise = torch.from_numpy(random.standard_normal(output.shape)).to(output.dtype)
    tangent: Tensor = (noise - unit * (unit * noise).sum(-1, keepdim=True)) / norm
    return (tangent * output).sum()


def collect(
    encoder: Encoder,
    batches: Iterable[Batch],
    *,
    layers: Sequence[int],
    gram: bool = True,
    curvature: bool = False,
    gradients: bool = False,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Statistics]:
    """The statistics asked for of every sub-layer, by group name. Cost: one forward pass over the batches, and a
    backward pass for curvature or gradients.

    Memory: what autograd keeps of one batch, and the sums. Raises UnsupportedModel when activations are not finite.
    """
    modules = sub_layers(encoder, layers)
    grams: dict[str, Tensor] = {}
    curvatures: dict[str, Tensor] = {}
    gates: dict[str, list[Tensor]] = {name: [] for name in modules}
    rows = dict.fromkeys(modules, 0)
    texts = 0
    random = np.random.default_rng(seed)
    mask = torch.empty(0)
    backward = curvature or gradients
    lowest: list[Tensor] = []  # the input of the first sub-layer of a pass: every other one depends on it

    def see(name: str, x: Tensor, out: Tensor) -> None:
        values = x.detach()
        real = real_rows(values, mask)
        rows[name] += len(real)
        if gram:
            z = with_ones(real)  # one batch's products in the model's precision, twice as fast; their sum in float64
            grams[name] = grams[name].add_(z.T @ z) if name in grams else (z.T @ z).double()
        if backward:
            lowest.append(x)
            del lowest[1:]
        if gradients:
            x.register_hook(lambda g: gates[name].append((values * g).sum(1)))
        if curvature:
            out.register_hook(lambda g: bend(name, real_rows(g, mask)))

    def bend(name: str, g: Tensor) -> None:
        curvatures[name] = curvatures[name].add_(g.T @ g) if name in curvatures else (g.T @ g).double()

    with tapped(modules, see), evaluating(encoder), torch.set_grad_enabled(backward):
        for batch in batches:
            inputs = tensors(batch, encoder)
            mask = inputs["attention_mask"]
            output = encoder(**inputs)
            if not torch.isfinite(output).all():
                raise UnsupportedModel("The model's outputs on the calibration texts are not finite numbers.")
            if backward and modules:
                # asked for the lowest input alone, autograd passes the hooks of all and keeps none of their gradients
                torch.autograd.grad(probe_loss(encoder, output, random), lowest)
                lowest.clear()
            texts += len(mask)
            if progress:
                progress(len(mask))
    return {
        name: Statistics(
            gram=grams[name].numpy() if gram else None,
            rows=rows[name],
            texts=texts,
            curvature=(curvatures[name] / rows[name]).numpy() if curvature else None,
            gradients=torch.cat(gates[name]).numpy() if gradients else None,
        )
        for name in modules
        if texts
    }


def divergence(encoder: Encoder, reference: Encoder, batches: Iterable[Batch]) -> float:
    """Mean over texts of what separates the outputs: KL(reference || encoder) of logits, 1 - cosine of embeddings."""
    total, texts = 0.0, 0
    with torch.inference_mode(), evaluating(encoder, reference):
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
