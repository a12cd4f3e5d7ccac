"""One layer made sparse by itself: a linear one, or a convolution as the matrix product that it is.

Legend: O outputs, K inputs of an output (channels of a group times the window), N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paredown import registry
from paredown.errors import UnsupportedModel
from paredown.layers import Layer, gram
from paredown.sparsity._pattern import Pattern
from paredown.sparsity._solve import matrix, put

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def solve_module(
    module: nn.Module, inputs: Sequence[Tensor], sparsity: float, pattern: Pattern, solver: str, *, seed: int = 0
) -> None:
    """Gives the weights of a Linear, a Conv1D of transformers or a convolution, in place, so many zeros where the
    pattern has them, so that what it makes of the `inputs` changes little. Groups of a convolution are solved each by
    itself.

    Raises UnsupportedModel for another layer, and where a group's matrix does not divide into the pattern.
    """
    if not isinstance(module, nn.Linear | Conv1D | Convolution):
        raise UnsupportedModel(f"zeros are made in linear layers and convolutions, not in {type(module).__name__}")
    solve: Callable[..., Tensor] = registry.find("sparsity", solver).solve
    weight = matrix(module)
    groups = module.groups if isinstance(module, Convolution) else 1
    shape = (len(weight) // groups, weight.shape[1])
    if not pattern.fits(shape):
        raise UnsupportedModel(f"a matrix of {shape[0]} x {shape[1]} does not divide into {pattern}")
    grams = gram_of(module, inputs)
    zeros = pattern.zeros(shape, sparsity)
    parts = zip(weight.chunk(groups), grams, strict=True)
    put(module, torch.cat([solve(part, own, pattern, zeros, seed=seed) for part, own in parts]))


def gram_of(module: nn.Module, inputs: Sequence[Tensor]) -> Tensor:
    """[groups, K, K] float64: the sum of x x' over all that an output's weights are multiplied with."""
    total: Tensor | None = None
    for x in inputs:
        found = gram(_rows(module, x.detach()))[:, :-1, :-1]
        total = found if total is None else total + found
    if total is None:
        raise ValueError("a gram is of inputs, and there are none")
    return total


def _rows(module: nn.Module, x: Tensor) -> Tensor:
    """[groups, N, K]: the inputs of every output."""
    groups, kind, args = 1, "linear", tuple[Any, ...]()
    if isinstance(module, Convolution):
        padding: Any = module.padding
        if module.padding_mode != "zeros":  # a border that a traced network has as a node of its own
            x = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
            padding = "valid"
        groups, kind = module.groups, f"conv{len(module.kernel_size)}d"
        args = (module.kernel_size, module.stride, padding, module.dilation)
    return Layer("", "", "weight", "bias", groups, kind, args).rows(x)
