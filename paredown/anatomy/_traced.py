"""The anatomy of any network whose graph can be followed: groups of coupled channels.

Legend: U units, S entries of one unit along one axis of one tensor.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
from torch import fx

from paredown.anatomy._atoms import CONSUMER, PRODUCER, Atoms, Labelling, weight_of
from paredown.anatomy._labels import labelled
from paredown.graph import fingerprint, operator_of, writes_over
from paredown.types import BRANCHES, Array, Branch, GraphAnatomy, Group, Size, Slice

Key = tuple[str, int]  # a tensor and one of its axes


def describe_graph(model: fx.GraphModule) -> GraphAnatomy:
    """What can be cut from a network traced by `paredown.graph.trace`.

    A unit is a set of channels that can only go together; a group holds those units that own the same number of entries
    of the same tensors, so the channels that a shortcut adds to, and those that it pads, are two groups. Residual
    branches are units of a group of their own.
    """
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    tracing = labelled(model.graph, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    atoms = tracing.atoms
    whole = {atoms.root(atom): why for atom, why in reversed(atoms.whole.items())}
    shifting = {atoms.root(atom) for atom in atoms.shifting}
    entries: dict[int, dict[Key, list[int]]] = defaultdict(lambda: defaultdict(list))
    for key, axis in atoms.axes.items():
        for position, atom in enumerate(axis.tolist()):
            entries[atoms.root(atom)][key].append(position)
    kinds: dict[tuple[tuple[Key, int], ...], list[int]] = defaultdict(list)
    for unit, owned in entries.items():
        roles = {atoms.roles[key] for key in owned}
        if unit not in whole and roles == {PRODUCER, CONSUMER}:
            kinds[tuple((key, len(positions)) for key, positions in owned.items())].append(unit)  # in the graph's order
    groups, place = [], dict[int, tuple[str, int]]()
    names: set[str] = set()
    for kind, units in kinds.items():
        makers = [key[0] for key, _ in kind if atoms.roles[key] == PRODUCER]
        name = _named(next((maker for maker in makers if tensors[maker].ndim > 1), makers[0]), names)
        slices = tuple(
            Slice(key[0], key[1], np.array([entries[unit][key] for unit in units]), atoms.roles[key]) for key, _ in kind
        )
        exact = not shifting & set(units)
        groups.append(Group(name, "channel", len(units), slices, exact=exact, minimum=1))
        place |= {unit: (name, number) for number, unit in enumerate(units)}
    branches = _branches(model.graph, groups)
    whole_group = [Group(BRANCHES, "branch", len(branches))] if branches else []
    return GraphAnatomy(
        "graph",
        fingerprint(model),
        (*groups, *whole_group),
        _sizes(tracing, place, groups),
        _left_whole(atoms, whole, place),
        branches,
    )


def _branches(graph: fx.Graph, groups: list[Group]) -> tuple[Branch, ...]:
    """Every addend with a layer in it whose work nobody else reads; of two such addends the one with more layers."""
    above: dict[fx.Node, set[fx.Node]] = {}
    found: list[Branch] = []
    names: set[str] = set()
    multiplied = {str(weight.target) for node in graph.nodes if (weight := weight_of(node)) is not None}
    for node in graph.nodes:
        read = node.all_input_nodes
        above[node] = {node}.union(*(above[one] for one in read))
        if node.op != "call_function" or operator_of(node) != "add" or len(read) != 2:
            continue
        if read[0].meta["shape"] != read[1].meta["shape"] or node.kwargs.get("alpha", 1) != 1:
            continue
        alone = [_alone(above[one] - above[other], node) for one, other in (read, reversed(read))]
        layers = [[weight for one in part if (weight := weight_of(one)) is not None] for part in alone]
        end = int(len(layers[1]) > len(layers[0]))
        if not layers[end] or _written_over(node, alone[end]):
            continue
        nodes = tuple(one.name for one in graph.nodes if one in alone[end])
        weights = tuple(str(weight.target) for weight in layers[end])
        held = tuple(g.name for g in groups if {part.tensor for part in g.slices} & multiplied <= {*weights})
        found.append(Branch(_named(weights[0], names), node.name, read[end].name, nodes, weights, held))
    return tuple(found)


def _alone(part: set[fx.Node], join: fx.Node) -> list[fx.Node]:
    """The operators of one addend in the graph's order; none where something else reads what they make."""
    work = [node for node in join.graph.nodes if node in part and node.op == "call_function"]
    return work if all(user in part or user is join for node in work for user in node.users) else []


def _written_over(join: fx.Node, branch: list[fx.Node]) -> bool:
    """Whether operators that write over what they read do more than can be left out with the branch: over a value from
    outside of it, which others read; or over the sum, which others read too.
    """
    for node in (one for one in branch if writes_over(one)):
        if node.args[0] not in branch:
            return True
    writers = [user for user in join.users if writes_over(user)]
    return bool(writers) and (len(join.users) > 1 or writers[0].args[0] is not join)


def _named(tensor: str, names: set[str]) -> str:
    """A group's name: the first layer that makes its channels, not the norm behind it."""
    layer = tensor.rpartition(".")[0] or tensor
    name, number = layer, 1
    while name in names:
        number += 1
        name = f"{layer}:{number}"
    names.add(name)
    return name


def _sizes(tracing: Labelling, place: dict[int, tuple[str, int]], groups: list[Group]) -> tuple[Size, ...]:
    units = {group.name: group.units for group in groups}
    found = []
    for node, where, counted in tracing.sizes:
        fixed, counts = 0, dict[str, Array]()
        for atom in counted.tolist():
            home = place.get(tracing.atoms.root(atom))
            if home is None:
                fixed += 1
            else:
                counts.setdefault(home[0], np.zeros(units[home[0]], dtype=np.int64))[home[1]] += 1
        if counts:
            found.append(Size(node, where, fixed, counts))
    return tuple(found)


def _left_whole(atoms: Atoms, whole: dict[int, str], place: dict[int, tuple[str, int]]) -> dict[str, str]:
    """The tensors with outputs that stay, and why."""
    found = {}
    for (tensor, axis), of in atoms.axes.items():
        if atoms.roles[tensor, axis] != PRODUCER or not tensor.endswith("weight"):
            continue
        reasons = [whole.get(root, "nothing reads it") for root in map(atoms.root, of.tolist()) if root not in place]
        if reasons:
            found[tensor] = reasons[0]
    return found
