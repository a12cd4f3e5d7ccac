"""Closed-form recovery of a cut network: every layer re-fitted to what the dense one makes at that place, and batch
norm's statistics moved by what the cut changed, in one pass from the input to the answer.

The k-th layer sees what the layers before it make after their own re-fit, so their errors are made up for as far as a
linear layer can (as in `reconstruct`, after Park et al. 2024, arXiv:2308.03449).

Statistics are re-estimated on calibration pictures (Li et al. 2020, EagleEye, arXiv:2007.02491), but beside the dense
network's on the same pictures: those of a thousand pictures alone miss the true ones by more than a careful re-fit
leaves to mend. Behind a layer that was re-fitted they stay, as what it is fitted to is in their terms.

Legend: B pictures, X inputs of a layer (channels of a group times the window), D outputs, N rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from paredown.calibration import ridge_regression
from paredown.errors import BadData
from paredown.graph import copied, operator_of, tensor_of
from paredown.layers import WIDEST, Layer, inputs_of, layers_of
from paredown.types import GraphAnatomy, Plan

STEEPEST = 100.0  # a norm that scales by less than one over this hands nothing on that could be made up for
RIDGE = 0.01  # of the mean diagonal, towards the weights before


def refit_graph(
    small: fx.GraphModule,
    *,
    teacher: fx.GraphModule,
    anatomy: GraphAnatomy,
    plan: Plan,
    pictures: Sequence[Tensor],
    weights: bool = True,
    statistics: bool = True,
    only: Collection[str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> fx.GraphModule:
    """A copy of `small`, cut by `plan` out of `teacher`: layers re-fitted (`weights`), batch norm's means and variances
    moved as far as those of its inputs moved (`statistics`), unless a re-fitted layer is in front of it.

    `pictures` are batches [B, 3, H, W]. Given `only`, nodes of layers, the pass changes these alone and ends with the
    last of them. Memory: what both networks hold between layers, for all pictures. `progress` is told of every layer.
    Raises BadData without pictures.
    """
    if not len(pictures):
        raise BadData("Re-fitting needs calibration pictures, and there are none.")
    fitted = copied(small)
    layers = {layer.node: layer for layer in layers_of(fitted)}
    left = set(layers if only is None else only)
    settled = set[str]()  # statistics: those behind a re-fitted layer, and those that were moved
    seen = set[str]()  # weights: those that are used twice are fitted where they are used first
    with torch.no_grad():
        ours, theirs = ([_Run(model, x) for x in pictures] for model in (fitted, teacher))
        own = {node.name: node for node in fitted.graph.nodes}
        for dense in teacher.graph.nodes:
            if only is not None and not left:
                break
            node = own.get(dense.name)
            is_norm = node is not None and node.op == "call_function" and operator_of(node) == "batch_norm"
            is_norm = is_norm and dense.args[3] is not None  # else it has no statistics of its own
            before = [run.of(dense, 0) for run in theirs] if is_norm else []
            for run in theirs:
                run.step(dense)
            if node is None:  # of a branch that is gone
                continue
            layer = layers.get(node.name)
            if layer is not None:
                if weights and node.name in left and layer.weight not in seen:
                    seen.add(layer.weight)
                    if inputs_of(fitted, layer) <= WIDEST:
                        settled |= {_statistics(norm) for norm in [_behind(dense)] if norm is not dense}
                        weight = fitted.get_parameter(layer.weight)
                        stay = _kept(anatomy, plan, teacher.get_parameter(layer.weight), layer.weight)
                        pairs = [
                            (a.of(node, 0), _wanted((fitted, teacher), (node, dense), (a, b), stay))
                            for a, b in zip(ours, theirs, strict=True)
                        ]
                        _refit(fitted, layer, weight, pairs)
                left.discard(node.name)
                if progress:
                    progress(1)
            elif is_norm and statistics and _statistics(dense) not in settled:
                name = _statistics(dense)
                settled.add(name)
                stay = _kept(anatomy, plan, teacher.get_buffer(name), name)
                _move(fitted, node, [run.of(node, 0) for run in ours], [x.index_select(1, stay) for x in before])
            for run in ours:
                run.step(node)
    return fitted


def refit_inputs(
    small: fx.GraphModule,
    *,
    dense: fx.GraphModule,
    anatomy: GraphAnatomy,
    plan: Plan,
    grams: Mapping[str, Tensor],
) -> None:
    """In place, the layers of `small` that read fewer channels than in `dense`, each as if nothing else had changed.

    `grams` [groups, X + 1, X + 1] are `layers.input_grams` of the dense network: no picture is looked at again.
    """
    with torch.no_grad():
        theirs = {layer.node: layer for layer in layers_of(dense)}
        for layer in layers_of(small):
            weight, whole = (model.get_parameter(layer.weight) for model in (small, dense))
            stay = anatomy.kept(plan, layer.weight, 1, whole.shape[1])
            if len(stay) == whole.shape[1] or layer.node not in grams or layer.groups != theirs[layer.node].groups:
                continue
            out = torch.from_numpy(anatomy.kept(plan, layer.weight, 0, whole.shape[0]))
            inputs = torch.from_numpy(layer.inputs_of(stay[:, None], tuple(whole.shape)).ravel())
            before = layer.matrix(whole.index_select(0, out)).double()  # [groups, X, D]
            cross = grams[layer.node][:, inputs, :-1] @ before
            table = grams[layer.node][:, inputs][:, :, inputs]
            start = before[:, inputs]
            solved = [
                ridge_regression(g, c, s, ridge=RIDGE, biased=False)
                for g, c, s in zip(table, cross, start, strict=True)
            ]
            weight.copy_(layer.tensor(torch.stack(solved), weight))


class _Run:
    """A network half-way through one batch."""

    def __init__(self, model: fx.GraphModule, x: Tensor):
        self._work = fx.Interpreter(model)
        self._work.args_iter = iter((x.clone(),))
        self._work.env = {}

    def step(self, node: fx.Node) -> None:
        self._work.env[node] = self._work.run_node(node)
        for gone in self._work.user_to_last_uses.get(node, ()):
            del self._work.env[gone]

    def of(self, node: fx.Node, place: int) -> Tensor:
        """What a node is about to read."""
        found: Tensor = self._work.env[node.args[place]]  # type: ignore[index]
        return found

    def get(self, node: fx.Node) -> Tensor | None:
        """A node's value, if it is there by now."""
        return self._work.env.get(node)

    def value(self, node: fx.Node) -> Tensor:
        found: Tensor = self._work.env[node]
        return found


def _wanted(models: Sequence[fx.GraphModule], nodes: Sequence[fx.Node], runs: Sequence[_Run], stay: Tensor) -> Tensor:
    """What a layer is to make, of (ours, the dense network): the dense one's outputs that `stay`, and what the shortcut
    that is added to them lacks by now. Where a batch norm is behind, it is asked for what lies in front of our norm.
    """
    y = runs[1].value(nodes[1])
    dim = y.ndim - 1 if operator_of(nodes[1]) == "linear" else 1
    wanted = y.index_select(dim, stay)
    behind = [_behind(node) for node in nodes]
    normed = all(end is not node for end, node in zip(behind, nodes, strict=True))
    other, full = (_added_to(end) for end in behind)
    own, whole = (None if one is None else run.get(one) for one, run in zip((other, full), runs, strict=True))
    gap = torch.zeros(()) if own is None or whole is None else _gap(own, whole, dim, stay)
    if not normed:
        return wanted + gap
    (scale, shift), (dense_scale, dense_shift) = (_affine(*both) for both in zip(models, behind, strict=True))
    flat, shape = scale.abs() * STEEPEST <= 1, (1, -1, *[1] * (y.ndim - 2))
    back = torch.where(flat, 0.0, 1 / scale)  # from behind our norm to in front of it
    ratio = torch.where(flat, 1.0, dense_scale[stay] * back)
    offset = (dense_shift[stay] - shift) * back
    ratio, offset, back = (one.reshape(shape) for one in (ratio, offset, back))
    return ratio * wanted + offset + back * gap


def _gap(own: Tensor, whole: Tensor, dim: int, stay: Tensor) -> Tensor:
    """What a shortcut's value lacks of the dense network's same channels, where both have them."""
    if whole.ndim <= dim or whole.shape[dim] <= int(stay.max()):
        return own.new_zeros(())
    whole = whole.index_select(dim, stay)
    return whole - own if whole.shape == own.shape else own.new_zeros(())


def _affine(model: fx.GraphModule, norm: fx.Node) -> tuple[Tensor, Tensor]:
    """Scale and shift [C] of a batch norm that has running statistics."""
    weight, bias, mean, var = (None if one is None else tensor_of(model, one) for one in norm.args[1:5])
    assert mean is not None and var is not None
    epsilon: Any = norm.args[7]
    scale = (var + epsilon).rsqrt() * (1.0 if weight is None else weight)
    return scale, -mean * scale + (0.0 if bias is None else bias)


def _statistics(norm: fx.Node) -> str:
    """The name of a batch norm's running mean."""
    mean: Any = norm.args[3]
    return str(mean.target)


def _behind(node: fx.Node) -> fx.Node:
    """The batch norm behind a layer, or the layer where there is none that has running statistics."""
    after = next(iter(node.users)) if len(node.users) == 1 else node
    return after if operator_of(after) == "batch_norm" and after.args[3] is not None else node


def _added_to(node: fx.Node) -> fx.Node | None:
    """What a node's value is added to, where that is all that happens to it."""
    joined = next(iter(node.users)) if len(node.users) == 1 else None
    if joined is None or operator_of(joined) != "add":
        return None
    return next((one for one in joined.all_input_nodes if one is not node), None)


def _refit(model: fx.GraphModule, layer: Layer, weight: Tensor, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One layer in place, to make the second of each pair, its outputs, out of the first."""
    start = layer.matrix(weight).double()
    if not start.shape[1]:
        return
    bias = model.get_parameter(layer.bias) if layer.bias else None
    if bias is not None:
        start = torch.cat([start, bias.double().reshape(layer.groups, 1, -1)], dim=1)
    gram = start.new_zeros(len(start), start.shape[1], start.shape[1])
    cross = torch.zeros_like(start)
    count, random = sum(len(x) for x, _ in pairs), torch.Generator().manual_seed(0)
    for x, y in pairs:
        places = layer.some_places(count, random)
        rows = layer.rows(x, places)
        if bias is not None:
            rows = torch.cat([rows, rows.new_ones(*rows.shape[:2], 1)], dim=2)
        wanted = layer.columns(y, places)
        gram += (rows.transpose(1, 2) @ rows).double()
        cross += (rows.transpose(1, 2) @ wanted).double()
    solved = torch.stack(
        [
            ridge_regression(g, c, s, ridge=RIDGE, biased=bias is not None)
            for g, c, s in zip(gram, cross, start, strict=True)
        ]
    )
    if bias is not None:
        bias.copy_(solved[:, -1].reshape(-1))
        solved = solved[:, :-1]
    weight.copy_(layer.tensor(solved, weight))


def _kept(anatomy: GraphAnatomy, plan: Plan, tensor: Tensor, name: str) -> Tensor:
    """The entries of a dense tensor's first axis that stay."""
    return torch.from_numpy(anatomy.kept(plan, name, 0, len(tensor)))


def _move(model: fx.GraphModule, node: fx.Node, ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> None:
    """Moves batch norm's running mean and variance, in place, so that its inputs `ours` [B, C, ...] come out of it with
    the moments that the dense network's same channels have.
    """
    mean, var = (model.get_buffer(str(one.target)) for one in node.args[3:5])  # type: ignore[union-attr]
    (middle, spread), (dense_middle, dense_spread) = _moments(ours), _moments(theirs)
    ratio = torch.where(dense_spread > 0, spread / dense_spread, 1.0)
    mean.copy_(middle + (mean - dense_middle) * ratio.sqrt())
    var.mul_(ratio)


def _moments(inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] in float64 of every channel of all the inputs [B, C, ...]."""
    others = [dim for dim in range(inputs[0].ndim) if dim != 1]
    counts = torch.tensor([x.numel() / x.shape[1] for x in inputs], dtype=torch.float64)[:, None]
    found = [torch.var_mean(x, others, correction=0) for x in inputs]
    variances, means = (torch.stack(part).double() for part in zip(*found, strict=True))
    middle = (counts * means).sum(0) / counts.sum()
    return middle, (counts * (variances + (means - middle).square())).sum(0) / counts.sum()
