"""A model's weight matrices made sparse block by block, each solved on what the sparse blocks below it give.

Legend: B texts, T tokens, O outputs, K inputs, N rows of an input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paredown import registry
from paredown.calibration import Batch, evaluating, real_rows, tapped, tensors
from paredown.encoder import blocks_of, copied
from paredown.errors import UnsupportedModel
from paredown.network import Network, network
from paredown.sparsity._pattern import Pattern
from paredown.types import Layout


def matrices_of(model: nn.Module, layout: Layout) -> dict[str, nn.Module]:
    """By name, every weight matrix of the layers, bottom-up; embeddings and heads stay dense."""
    found: dict[str, nn.Module] = {}
    for i, block in enumerate(blocks_of(model, layout)):
        for name, module in block.named_modules():
            if isinstance(module, nn.Linear | Conv1D):
                found[f"{layout.layers}.{i}.{name}"] = module
    return found


def matrix(module: nn.Module) -> Tensor:
    """The weight as [O, K]: what a Linear has, a Conv1D's turned around, a convolution's inputs times its window."""
    weight = cast(Tensor, module.weight).detach()
    return weight.T if isinstance(module, Conv1D) else weight.flatten(1)


def put(module: nn.Module, found: Tensor) -> None:
    """The reverse of `matrix`."""
    weight = cast(Tensor, module.weight)
    with torch.no_grad():
        weight.copy_((found.T if isinstance(module, Conv1D) else found).reshape(weight.shape))


def solve(
    dense: Network,
    shares: Mapping[str, float],
    pattern: Pattern,
    solver: str,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> nn.Module:
    """A copy of the model whose matrices have `shares` of zeros, by name; those that are not named stay as they are.

    Cost: two forward passes over the batches, and what the solver takes. Raises UnsupportedModel where a matrix does
    not divide into the pattern, or activations are not finite.
    """
    module = registry.find("sparsity", solver)
    model = copied(dense.model, dense.layout)
    student = network(model, dense.layout)
    targets = {name: part for name, part in matrices_of(model, dense.layout).items() if shares.get(name, 0) > 0}
    for name, part in targets.items():
        if not pattern.fits(cast(tuple[int, int], tuple(matrix(part).shape))):
            raise UnsupportedModel(f"{name} of {tuple(matrix(part).shape)} does not divide into {pattern}")

    def settle(name: str, gram: Tensor | None) -> None:
        weight = matrix(targets[name])
        zeros = pattern.zeros((weight.shape[0], weight.shape[1]), shares[name])
        put(targets[name], module.solve(weight, gram, pattern, zeros, seed=seed))
        if progress:
            progress(name)

    if not module.NEEDS:
        for name in targets:
            settle(name, None)
        return model
    for name, gram in streamed(student, list(targets), batches):
        settle(name, gram)
    return model


def streamed(student: Network, names: Sequence[str], batches: Sequence[Batch]) -> Iterator[tuple[str, Tensor]]:
    """Of the matrices of these names, bottom-up, the gram [K, K] float64 of what enters them: the sum of x x' over the
    real tokens. Who changes a layer's weights between two of them has the later layers see it.
    """
    layout, modules = student.layout, matrices_of(student.model, student.layout)
    with torch.no_grad(), evaluating(student.model):
        inputs = [tensors(batch, student) for batch in batches]
        streams = [student.embed(*(one[n] for n in student.input_names if n != "attention_mask")) for one in inputs]
        masks = [student.mask(x, one["attention_mask"]) for x, one in zip(streams, inputs, strict=True)]
        for index in range(len(student.layers)):
            prefix = f"{layout.layers}.{index}."
            own = {name: modules[name] for name in names if name.startswith(prefix)}
            yield from _grams(student, index, own, streams, masks, inputs).items()
            streams = [student.step(index, x, mask) for x, mask in zip(streams, masks, strict=True)]


def _grams(
    student: Network,
    index: int,
    modules: Mapping[str, nn.Module],
    streams: Sequence[Tensor],
    masks: Sequence[object],
    inputs: Sequence[Mapping[str, Tensor]],
) -> dict[str, Tensor]:
    """By name, the sum over real tokens of x x' [K, K] in float64, x being what the matrix is multiplied with."""
    sums: dict[str, Tensor] = {}
    real = torch.empty(0)

    def see(name: str, x: Tensor, _out: Tensor) -> None:
        rows = real_rows(x, real)
        if not torch.isfinite(rows).all():
            raise UnsupportedModel(f"what enters {name} is not finite on the calibration texts")
        product = (rows.T @ rows).double()
        sums[name] = sums[name] + product if name in sums else product

    with tapped(modules, see):
        for x, mask, one in zip(streams, masks, inputs, strict=True):
            real = one["attention_mask"]
            student.step(index, x, mask)
    return {name: sums[name] for name in modules if name in sums}


def loss_of(weight: Tensor, found: Tensor, gram: Tensor) -> float:
    """tr (W - W') G (W - W')' as a share of tr W G W': how much of a matrix's output is lost."""
    gap, dense = (found - weight).double(), weight.double()
    lost, whole = (float(((part @ gram) * part).sum()) for part in (gap, dense))
    return lost / max(whole, 1e-300)
