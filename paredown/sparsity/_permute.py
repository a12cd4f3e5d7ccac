"""Which weights are neighbours: neurons and value dimensions change places, so that n:m loses less; exact.

Channel permutation for n:m sparsity (Pool and Yu 2021, NeurIPS 34), by greedy swaps between groups that are paired at
random. What reads the residual stream keeps its order, which all layers share.

Legend: R rows, K inputs, G groups of m inputs, P pairs of groups, S swaps.
"""

from __future__ import annotations

from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from paredown.encoder import blocks_of, copied
from paredown.sparsity._pattern import Pattern
from paredown.types import Layout

Model = TypeVar("Model", bound=nn.Module)

PASSES = 60  # pairings of all groups


def permuted(model: Model, layout: Layout, pattern: Pattern, *, seed: int = 0) -> Model:
    """A copy that computes the same, whose neurons (all FFNs with projections of their own) and value dimensions
    (within a head, where query, key and value are projections of their own) lie so that n:m keeps most magnitude.
    """
    found = copied(model, layout)
    names = layout.layer_names
    random = np.random.default_rng(seed)
    with torch.no_grad():
        for block in blocks_of(found, layout):
            parts = {role: block.get_submodule(names[role]) for role in names if role in _ROLES}
            if {"up", "down"} <= set(parts):
                _swap_neurons(parts, pattern, random)
            if {"value", "output"} <= set(parts) and isinstance(parts["value"], nn.Linear):
                _swap_values(parts["value"], parts["output"], layout.head_dim, pattern, random)
    return found


_ROLES = ("up", "gate", "down", "value", "output")


def _swap_neurons(parts: dict[str, nn.Module], pattern: Pattern, random: np.random.Generator) -> None:
    down = _as_rows(parts["down"])
    producers = [parts[role] for role in ("up", "gate") if role in parts]
    if down.shape[1] % pattern.m or any(_as_rows(one).shape[0] != down.shape[1] for one in producers):
        return  # a fused projection has other rows
    order = swaps(down.abs(), pattern, random)
    down.copy_(down[:, order])
    for one in producers:
        _reorder_outputs(one, order)


def _swap_values(value: nn.Module, output: nn.Module, size: int, pattern: Pattern, random: np.random.Generator) -> None:
    """Key-value head by head; the query heads that share one are reordered alike."""
    rows, reading = _as_rows(value), _as_rows(output)
    heads = rows.shape[0] // size
    if not heads or size % pattern.m or reading.shape[1] % rows.shape[0]:
        return
    each = reading.shape[1] // rows.shape[0]  # query heads of one key-value head
    columns = reading.unflatten(1, (heads, each, size))  # [D, H, each, size]
    order = torch.empty(heads, size, dtype=torch.long)
    for head in range(heads):
        alike = columns[:, head].flatten(0, 1).abs()
        order[head] = swaps(alike, pattern, random)
    every = torch.cat([order[head] + (head * each + i) * size for head in range(heads) for i in range(each)])
    reading.copy_(reading[:, every])
    _reorder_outputs(value, (order + torch.arange(heads)[:, None] * size).flatten())


def swaps(scores: Tensor, pattern: Pattern, random: np.random.Generator) -> Tensor:
    """An order [K] of the columns of scores [R, K] in which more of their sum stays when each row keeps the n largest
    of every m; never less than as they are.
    """
    n, m = pattern.n, pattern.m
    order = torch.arange(scores.shape[1]).reshape(-1, m)  # [G, m]
    if len(order) < 2:
        return order.flatten()
    i, j = torch.meshgrid(torch.arange(m), torch.arange(m), indexing="ij")
    i, j = i.flatten(), j.flatten()  # of the swaps [S = m m]: which of one group with which of the other
    swap = torch.arange(len(i))
    for _ in range(PASSES):
        drawn = torch.from_numpy(random.permutation(len(order)))
        a, b = drawn[: len(order) // 2], drawn[len(order) // 2 : len(order) // 2 * 2]
        first, second = order[a][:, None].repeat(1, len(i), 1), order[b][:, None].repeat(1, len(i), 1)  # [P, S, m]
        first[:, swap, i], second[:, swap, j] = order[b][:, j], order[a][:, i]
        kept = _kept(scores, first, n) + _kept(scores, second, n)  # [P, S]
        before = _kept(scores, order[a], n) + _kept(scores, order[b], n)
        best, which = kept.max(1)
        better = best > before * (1 + 1e-6)
        order[a[better]] = first[better, which[better]]
        order[b[better]] = second[better, which[better]]
    return order.flatten()


def _kept(scores: Tensor, groups: Tensor, n: int) -> Tensor:
    """[...]: what the rows keep of the groups [..., m] of columns."""
    own = scores.T[groups]  # [..., m, R]
    return own.topk(n, dim=-2).values.sum((-2, -1))


def _as_rows(module: nn.Module) -> Tensor:
    """The weight as [O, K], in the module's own memory."""
    weight = cast(Tensor, module.weight).data
    return weight.T if isinstance(module, Conv1D) else weight


def _reorder_outputs(module: nn.Module, order: Tensor) -> None:
    rows = _as_rows(module)
    rows.copy_(rows[order])
    if isinstance(module.bias, Tensor):
        module.bias.copy_(module.bias[order])
