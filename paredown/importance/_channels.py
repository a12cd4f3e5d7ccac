"""How much each channel of a traced network matters, by any criterion that ranks channels.

Legend: B pictures, U units, S entries of a unit, X inputs of a layer (channels times the window), D outputs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from paredown import registry
from paredown.calibration import SOFTENING
from paredown.errors import BadData
from paredown.graph import operator_of, run_seeing
from paredown.importance._evidence import Evidence
from paredown.layers import TRANSPOSED, WIDEST, Layer, gram, layers_of, widest
from paredown.types import Array, GraphAnatomy, Group, Scores, Slice

NORMS = ("batch_norm", "instance_norm", "group_norm", "layer_norm")
_SCALED = 1e-12
_OF_LOSS = {"gram", "gates", "weight_gradients"}  # what makes a score a change of the loss, the same for all groups


@dataclass
class _Reader:
    """One consumer of a group, and what was seen at it; `positions` [U, S] are inputs of one of its conv groups. A
    transposed convolution has no rows, and so no grams.
    """

    layer: Layer
    part: Slice
    positions: Array
    grams: Tensor | None = None  # [groups, X + 1, X + 1]
    curvature: Tensor | None = None  # [groups, D, D]
    squares: Tensor | None = None  # [C]: of the channels that it reads, mean squares
    gates: Tensor | None = None  # [U]: sums over pictures of squared derivatives by a gate on what it reads of a unit


def score_channels(
    model: fx.GraphModule,
    anatomy: GraphAnatomy,
    criterion: str,
    pictures: Sequence[Tensor] = (),
    labels: Sequence[Tensor] = (),
    *,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Scores:
    """`values[group]` [U] of every group, larger means keep; what is no change of the loss has a mean of 1 in a group.

    `pictures` are batches [B, 3, H, W] and `labels` theirs [B]; without labels gradients are those of an answer drawn
    from the network's own. Raises BadData where the criterion needs pictures and there are none, and for layers that
    are too wide for it.
    """
    module = registry.find("importance", criterion)
    if "channel" not in module.UNITS:
        raise BadData(f"The criterion {criterion!r} does not rank channels.")
    if module.NEEDS and not len(pictures):
        raise BadData(f"The criterion {criterion!r} needs calibration pictures, and there are none.")
    if "gram" in module.NEEDS and widest(model) > WIDEST:
        raise BadData(
            f"The criterion {criterion!r} inverts what layers read, {WIDEST} inputs at most, and this network has a "
            f"layer of {widest(model)}: take taylor_gate."
        )
    seen = _Seen(model, anatomy)
    if module.NEEDS:
        seen = _look(model, anatomy, module.NEEDS, pictures, labels, seed, progress or (lambda count: None))
    values = {}
    for group in anatomy.channels:
        if "gram" in module.NEEDS:
            found = sum((module.score(one) for one in seen.by_reader(group)), seen.by_gates(group))
        else:
            found = module.score(seen.of(group, seed))
        mean = 1.0 if _OF_LOSS & set(module.NEEDS) else float(np.mean(found))
        values[group.name] = np.asarray(found) / (mean if mean > _SCALED else 1.0)
    return Scores(criterion, values, source=f"{sum(map(len, pictures))} pictures, seed {seed}")


@dataclass
class _Seen:
    model: fx.GraphModule
    anatomy: GraphAnatomy
    readers: dict[str, list[_Reader]] = field(default_factory=dict)
    gradients: dict[str, Array] = field(default_factory=dict)
    gates: dict[str, list[Tensor]] = field(default_factory=dict)  # of each group, a picture's derivatives [B, U]
    pictures: int = 0

    def of(self, group: Group, seed: int) -> Evidence:
        """All weights of a unit side by side: what makes it, and what reads it."""
        state = _state(self.model)
        made = [part for part in group.slices if part.role == "producer" and part.tensor in state]
        filters = [part for part in made if state[part.tensor].ndim > 1]
        norms = [part for part in made if part.tensor in _norm_weights(self.model)]
        readers = [part for part in group.slices if part.role == "consumer" and part.tensor in state]
        outgoing = _joined(state, readers, group.units)
        scale = np.mean([np.abs(_entries(state, part)).mean(1) for part in norms], axis=0) if norms else None
        squares = [
            one.squares.numpy()[one.part.positions].mean(axis=1)
            for one in self.readers.get(group.name, ())
            if one.squares is not None
        ]
        moments = np.zeros((3, group.units))
        if squares:
            moments[1] = np.mean(squares, axis=0)
        gates = torch.cat(self.gates[group.name]).double().numpy() if group.name in self.gates else None
        known = self.gradients
        return Evidence(
            positions=np.arange(group.units)[:, None],
            outgoing=outgoing,
            bias=np.zeros(outgoing.shape[1]),
            incoming=_joined(state, filters, group.units),
            seed=seed,
            scale=scale,
            moments=moments if squares else None,
            gates=None if gates is None else np.stack([np.abs(gates).mean(0), (gates**2).mean(0)]),
            incoming_gradients=_joined(known, filters, group.units) if known else None,
            outgoing_gradients=_joined(known, readers, group.units) if known else None,
        )

    def by_reader(self, group: Group) -> list[Evidence]:
        """What each layer that reads the group has seen, of a convolution each of its groups. Without gradients its
        errors are shares of what the layer gives.

        Gram and curvature apart take what a layer reads and the gradients of what it makes, and those of one place and
        the next, as independent, and they are not: in front of a global pooling errors at all places add up. What a
        gate on a unit does is known without that, and a factor per layer sets the sum of all units right.
        """
        state, found = _state(self.model), []
        for one in self.readers[group.name]:
            if one.grams is None:
                continue
            layer = one.layer
            matrices = layer.matrix(torch.from_numpy(state[layer.weight])).numpy()
            biases = np.zeros((layer.groups, matrices.shape[2]))
            if layer.bias:
                biases = state[layer.bias].reshape(layer.groups, -1)
            factor = _dependence(one, matrices)
            for g, (weight, bias, table) in enumerate(zip(matrices, biases, one.grams.numpy(), strict=True)):
                whole = np.concatenate([weight, bias[None]])
                curvature = None if one.curvature is None else one.curvature[g].numpy() * factor
                total = 1.0 if curvature is not None else float((whole * (table @ whole)).sum())
                found.append(
                    Evidence(
                        positions=one.positions,
                        outgoing=weight,
                        bias=bias,
                        incoming=np.zeros((group.units, 0)),
                        texts=self.pictures,
                        gram=table / max(total, _SCALED),
                        curvature=curvature,
                    )
                )
        return found

    def by_gates(self, group: Group) -> Array:
        """[U]: what removals cost at those readers of which `by_reader` knows nothing, in the same measure."""
        found = np.zeros(group.units)
        for one in self.readers[group.name]:
            if one.grams is None and one.gates is not None:
                found += one.gates.numpy() / max(self.pictures, 1)
        return found


def _dependence(reader: _Reader, matrices: Array) -> float:
    """What the removal of single units costs in all, as their gates have it, over what gram and curvature say."""
    if reader.gates is None or reader.grams is None or reader.curvature is None:
        return 1.0
    apart = 0.0
    at = reader.positions
    for weight, table, curvature in zip(matrices, reader.grams.numpy(), reader.curvature.numpy(), strict=True):
        own = weight[at]  # [U, S, D]
        blocks = table[at[:, :, None], at[:, None, :]]
        apart += float(((blocks @ own) * (own @ curvature)).sum())
    return float(reader.gates.sum()) / apart if apart > 0 else 1.0


def _state(model: fx.GraphModule) -> dict[str, Array]:
    return {name: tensor.detach().numpy() for name, tensor in model.named_parameters(remove_duplicate=False)}


def _joined(table: Mapping[str, Array], parts: Sequence[Slice], units: int) -> Array:
    """[U, ...]: the entries of each unit in several tensors, in one row."""
    return np.concatenate([np.zeros((units, 0)), *(_entries(table, part) for part in parts)], axis=1)


def _entries(table: Mapping[str, Array], part: Slice) -> Array:
    """[U, ...]: all entries of each unit along a tensor's axis, in one row."""
    taken = np.take(np.moveaxis(table[part.tensor], part.axis, 0), part.positions, axis=0)
    return taken.reshape(len(part.positions), -1)


def _norm_weights(model: fx.GraphModule) -> set[str]:
    nodes = [node for node in model.graph.nodes if node.op == "call_function" and operator_of(node) in NORMS]
    places = {"batch_norm": 1, "instance_norm": 1, "group_norm": 2, "layer_norm": 2}
    read = [node.args[places[operator_of(node)]] for node in nodes]
    return {str(one.target) for one in read if isinstance(one, fx.Node)}


def _look(
    model: fx.GraphModule,
    anatomy: GraphAnatomy,
    needs: Collection[str],
    pictures: Sequence[Tensor],
    labels: Sequence[Tensor],
    seed: int,
    progress: Callable[[int], None],
) -> _Seen:
    """One pass over the pictures, with gradients where they are asked for."""
    seen = _Seen(model, anatomy)
    by_weight: dict[str, list[Layer]] = defaultdict(list)
    for layer in layers_of(model, transposed=True):
        by_weight[layer.weight].append(layer)
    at: dict[str, list[tuple[str, _Reader]]] = defaultdict(list)
    for group in anatomy.channels:
        mine = seen.readers.setdefault(group.name, [])
        for part in group.slices:
            for layer in by_weight.get(part.tensor, ()) if part.role == "consumer" else ():
                shape = tuple(model.get_parameter(part.tensor).shape)
                reader = _Reader(layer, part, layer.inputs_of(part.positions, shape))
                mine.append(reader)
                at[layer.node].append((group.name, reader))
    grads = bool({"curvature", "gates", "weight_gradients"} & set(needs))
    generator, random = (torch.Generator().manual_seed(seed) for _ in range(2))
    count = sum(map(len, pictures))
    gates: dict[str, Tensor] = {}
    as_found = [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None
    model.requires_grad_("weight_gradients" in needs)

    def before(node: str, x: Tensor) -> Tensor:
        with torch.no_grad():
            layer = at[node][0][1].layer
            if "gram" in needs and layer.kind not in TRANSPOSED:
                places = layer.some_places(count, random)
                share = 1.0 if places is None else len(places) / layer.places
                found = gram(layer.rows(x.detach(), places)) / share  # sums over all places
                for _, reader in at[node]:
                    reader.grams = found if reader.grams is None else reader.grams + found
            if "moments" in needs:
                squares = channels(node, x.detach().square().double())
                squares = squares.sum(0) * len(x) * squares.shape[1] / x.numel()  # sums over places become means
                for _, reader in at[node]:
                    reader.squares = squares if reader.squares is None else reader.squares + squares
        if not grads:
            return x
        x = x.view_as(x) if x.requires_grad else x.detach().requires_grad_()
        if {"gates", "curvature"} & set(needs):
            seen_here = x.detach()
            x.register_hook(lambda g: gate(node, seen_here * g))
        return x

    def channels(node: str, values: Tensor) -> Tensor:
        """[B, C]: sums over places, and over the groups of a convolution, whose units lie in all of them."""
        layer = at[node][0][1].layer
        if layer.kind == "linear":
            return values.reshape(len(values), -1, values.shape[-1]).sum(1)
        return values.reshape(len(values), layer.groups, values.shape[1] // layer.groups, -1).sum((1, 3))

    def gate(node: str, product: Tensor) -> None:
        summed = channels(node, product)
        for name, reader in at[node]:
            own = summed[:, torch.from_numpy(reader.part.positions)].sum(2)  # [B, U]
            gates[name] = own if name not in gates else gates[name] + own
            squares = own.double().square().sum(0)
            reader.gates = squares if reader.gates is None else reader.gates + squares

    def after(node: str, y: Tensor) -> None:
        if "curvature" in needs and y.requires_grad and at[node][0][1].layer.kind not in TRANSPOSED:
            y.register_hook(lambda g: curve(node, g))

    def curve(node: str, g: Tensor) -> None:
        rows = at[node][0][1].layer.columns(g)
        found = (rows.transpose(1, 2) @ rows).double() / rows.shape[1]
        for _, reader in at[node]:
            reader.curvature = found if reader.curvature is None else reader.curvature + found

    try:
        for number, x in enumerate(pictures):
            seen.pictures += len(x)
            progress(len(x))
            with torch.set_grad_enabled(grads):
                logits = run_seeing(model, x, set(at), before, after)
                if not grads:
                    continue
                if len(labels):
                    wanted = labels[number]
                else:
                    logits = logits / SOFTENING
                    wanted = torch.multinomial(logits.detach().softmax(1), 1, generator=generator)[:, 0]
                loss = F.cross_entropy(logits, wanted, reduction="sum")
                loss.backward()
            for name in list(gates):
                seen.gates.setdefault(name, []).append(gates.pop(name).detach())
        if "weight_gradients" in needs:
            seen.gradients = {
                name: (torch.zeros_like(value) if value.grad is None else value.grad / max(seen.pictures, 1)).numpy()
                for name, value in model.named_parameters(remove_duplicate=False)
            }
    finally:
        for parameter, (learns, gradient) in zip(model.parameters(), as_found, strict=True):
            parameter.grad = gradient
            parameter.requires_grad_(learns)
    for readers in seen.readers.values():
        for reader in readers:
            reader.squares = None if reader.squares is None else reader.squares / seen.pictures
            reader.curvature = None if reader.curvature is None else reader.curvature / len(pictures)
    return seen
