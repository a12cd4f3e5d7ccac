"""Convolutions and linear layers of a traced network as the matrix products that they are.

Legend: X inputs of an output (channels of a group times the window), D outputs, N rows (pictures times places).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from paredown.graph import operator_of, run_seeing
from paredown.types import Array

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
WIDEST = 6000  # inputs of a layer whose matrix of them is made and inverted, in a minute
ROWS = 2**18  # that a layer's statistics are taken from: hundreds for each weight of an output


@dataclass(frozen=True)
class Layer:
    """A node whose inputs are multiplied with a weight. Of a transposed convolution there are no `rows` and `columns`.

    `node` and `x` name the node and what it reads; `weight` and `bias` its tensors, "" where it has none.
    """

    node: str
    x: str
    weight: str
    bias: str
    groups: int
    kind: str
    args: tuple[Any, ...]
    places: int = 1  # of one picture's outputs

    def rows(self, x: Tensor, places: Tensor | None = None) -> Tensor:
        """[groups, N, X]: the inputs of every output, of a convolution by im2col.

        With `places`, indices into a picture's outputs one after the other, only of those.
        """
        if self.kind == "linear":
            return (x if places is None else x.flatten(1, -2)[:, places]).flatten(0, -2)[None]
        size, stride, padding, dilation = self.args
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(dilation, size, strict=True)]
            x = F.pad(x, [side for t in reversed(total) for side in (t // 2, t - t // 2)])
        elif padding != "valid":
            x = F.pad(x, [side for p in reversed(padding) for side in (p, p)])
        for axis, (k, s, d) in enumerate(zip(size, stride, dilation, strict=True)):
            x = x.unfold(2 + axis, d * (k - 1) + 1, s)[..., ::d]
        many = len(size)
        if places is not None:
            at: Any = (slice(None), slice(None), *torch.unravel_index(places, x.shape[2 : 2 + many]))
            x, many = x[at], 1
        x = x.unflatten(1, (self.groups, -1))  # [B, groups, C, places..., window...]
        order = [1, 0, *range(3, 3 + many), 2, *range(3 + many, x.ndim)]
        return x.permute(order).flatten(2 + many).flatten(1, 1 + many)

    def columns(self, y: Tensor, places: Tensor | None = None) -> Tensor:
        """[groups, N, D]: the outputs, row by row as `rows` has the inputs."""
        if self.kind == "linear":
            return (y if places is None else y.flatten(1, -2)[:, places]).flatten(0, -2)[None]
        y = y.flatten(2)
        y = (y if places is None else y[:, :, places]).unflatten(1, (self.groups, -1))
        return y.permute(1, 0, 3, 2).flatten(1, 2)

    def some_places(self, pictures: int, random: torch.Generator) -> Tensor | None:
        """The places to look at in one batch, so that of so many pictures about `ROWS` rows come; None for all."""
        some = min(self.places, max(1, ROWS // max(1, pictures)))
        return torch.randperm(self.places, generator=random)[:some] if some < self.places else None

    def matrix(self, weight: Tensor) -> Tensor:
        """[groups, X, D]"""
        return weight.reshape(self.groups, len(weight) // self.groups, -1).transpose(1, 2)

    def tensor(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The weight again, of a matrix [groups, X, D]."""
        return matrix.transpose(1, 2).reshape(like.shape).to(like.dtype)

    def inputs_of(self, channels: Array, weight_shape: tuple[int, ...]) -> Array:
        """[U, S]: the inputs in `rows` of the entries [U, s] along the weight's second axis."""
        window = int(np.prod(weight_shape[2:]))
        return (channels[:, :, None] * window + np.arange(window)).reshape(len(channels), -1)


def layers_of(model: fx.GraphModule, *, transposed: bool = False) -> list[Layer]:
    """In the order in which they run, `transposed` convolutions only where they are asked for. One whose weights are
    computed is none, nor one whose filter is a buffer: it is not learnt.
    """
    found = []
    learnt = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for node in model.graph.nodes:
        kind = operator_of(node) if node.op == "call_function" else ""
        is_transposed = transposed and kind in TRANSPOSED
        if kind != "linear" and kind not in CONVOLUTIONS and not is_transposed:
            continue
        x, weight, bias = (*node.args, None)[:3]
        if any(one.op != "get_attr" or one.target not in learnt for one in (weight, bias) if one is not None):
            continue
        args: tuple[Any, ...] = ()
        if kind in CONVOLUTIONS:
            size = tuple(weight.meta["shape"][2:])
            many = len(size)
            stride, padding, dilation = (_all(one, many) for one in node.args[3:6])
            args = (size, stride, padding, dilation)
        groups = int(node.args[6]) if kind in CONVOLUTIONS else 1
        name = "" if bias is None else str(bias.target)
        shape = node.meta["shape"]
        places = int(np.prod(shape[1:-1] if kind == "linear" else shape[2:]))
        found.append(Layer(node.name, x.name, str(weight.target), name, groups, kind, args, places))
    return found


def _all(value: Any, many: int) -> Any:
    if isinstance(value, str):
        return value
    return tuple(value) * many if len(value) == 1 else tuple(value)


def gram(rows: Tensor) -> Tensor:
    """[groups, X + 1, X + 1] float64: the sum of x x' over rows [groups, N, X], the last entry of x being 1."""
    rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
    return (rows.transpose(1, 2) @ rows).double()


def widest(model: fx.GraphModule) -> int:
    """The most inputs that an output of a layer has."""
    return max((inputs_of(model, layer) for layer in layers_of(model)), default=0)


def inputs_of(model: fx.GraphModule, layer: Layer) -> int:
    """How many inputs an output of the layer has."""
    return int(np.prod(model.get_parameter(layer.weight).shape[1:]))


def input_grams(model: fx.GraphModule, pictures: Sequence[Tensor]) -> dict[str, Tensor]:
    """[groups, X + 1, X + 1] float64 of every layer by its node: means of x x' over rows of these pictures. Layers with
    more than `WIDEST` inputs are left out.
    """
    layers = {layer.node: layer for layer in layers_of(model) if inputs_of(model, layer) <= WIDEST}
    seen: dict[str, Tensor] = {}
    count, random = sum(map(len, pictures)), torch.Generator().manual_seed(0)

    def before(name: str, x: Tensor) -> Tensor:
        found = gram(layers[name].rows(x, layers[name].some_places(count, random)))
        seen[name] = found if name not in seen else seen[name] + found
        return x

    with torch.inference_mode():
        for x in pictures:
            run_seeing(model, x.clone(), layers, before)
    return {name: table / table[:, -1:, -1:] for name, table in seen.items()}


def places_of(model: fx.GraphModule) -> dict[str, tuple[tuple[int, ...], int]]:
    """Of every weight that is multiplied with something: its shape, and at how many places of one picture."""
    found: dict[str, tuple[tuple[int, ...], int]] = {}
    for node in model.graph.nodes:
        kind = operator_of(node) if node.op == "call_function" else ""
        if kind != "linear" and not kind.startswith("conv"):
            continue
        weight = node.args[1]
        if weight.op != "get_attr":
            continue
        output, read = node.meta["shape"], node.args[0].meta["shape"]
        rows = (
            int(np.prod(output[1:-1]))
            if kind == "linear"
            else int(np.prod((read if "transpose" in kind else output)[2:]))
        )
        shape, before = found.get(str(weight.target), (tuple(weight.meta["shape"]), 0))
        found[str(weight.target)] = shape, before + rows
    return found


def macs(model: fx.GraphModule) -> int:
    """Multiply-accumulates of one picture, by the shapes that the example gave: convolutions and linear layers."""
    return sum(int(np.prod(shape)) * places for shape, places in places_of(model).values())
