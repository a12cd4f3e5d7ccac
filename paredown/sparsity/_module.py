"""One layer made sparse by itself: a linear one, or a convolution as the matrix product that it is.

Legend: B samples, C channels, O outputs, K inputs of an output (channels of a group times the window), N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paredown import registry
from paredown.errors import UnsupportedModel
from paredown.sparsity._pattern import Pattern
from paredown.sparsity._solve import matrix, put


def solve_module(
    module: nn.Module, inputs: Sequence[Tensor], sparsity: float, pattern: Pattern, solver: str, *, seed: int = 0
) -> None:
    """Gives the weights of a Linear, Conv1D of transformers or Conv2d, in place, so many zeros where the pattern has
    them, so that what it makes of the `inputs` changes little. Groups of a convolution are solved each by itself.

    Raises UnsupportedModel for another layer, and where a group's matrix does not divide into the pattern.
    """
    if not isinstance(module, nn.Linear | Conv1D | nn.Conv2d):
        raise UnsupportedModel(f"zeros are made in linear layers and 2-d convolutions, not in {type(module).__name__}")
    solve: Callable[..., Tensor] = registry.find("sparsity", solver).solve
    weight = matrix(module)
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    shape = (len(weight) // groups, weight.shape[1])
    if not pattern.fits(shape):
        raise UnsupportedModel(f"a matrix of {shape[0]} x {shape[1]} does not divide into {pattern}")
    grams = gram_of(module, inputs)
    zeros = pattern.zeros(shape, sparsity)
    parts = zip(weight.chunk(groups), grams, strict=True)
    put(module, torch.cat([solve(part, gram, pattern, zeros, seed=seed) for part, gram in parts]))


def gram_of(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """[groups, K, K] float64: the sum of x x' over all that an output's weights are multiplied with."""
    total: Tensor | None = None
    for x in inputs:
        rows = _rows(module, x.detach())
        product = (rows.transpose(1, 2) @ rows).double()
        total = product if total is None else total + product
    if total is None:
        raise ValueError("a gram is of inputs, and there are none")
    return total


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """[groups, N, K]: the inputs of every output, of a convolution by im2col."""
    if not isinstance(module, nn.Conv2d):
        return x.flatten(0, -2)[None]
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    size, dilation, stride = (
        cast(tuple[int, int], pair) for pair in (module.kernel_size, module.dilation, module.stride)
    )
    windows = F.unfold(padded, size, dilation=dilation, stride=stride)  # [B, C window, places]
    grouped = windows.reshape(len(x), module.groups, -1, windows.shape[-1])
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)
