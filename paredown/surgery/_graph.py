"""Cutting a traced network: channels out of its tensors, whose sizes follow, and branches out of its graph."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from paredown.errors import FingerprintMismatch
from paredown.graph import fingerprint, measure_shapes, operator_of, writes_over
from paredown.surgery._cut import sliced, units_of, zero_consumers
from paredown.types import Branch, GraphAnatomy, Group, Plan, Size

TWICE_IS_ONCE = ("relu", "relu6", "hardtanh")  # operators that change nothing when they are applied again


def cut_graph(model: fx.GraphModule, anatomy: GraphAnatomy, plan: Plan) -> fx.GraphModule:
    """A copy of the network that holds only the channels and the branches that the plan keeps. Works on the meta device
    too.

    Raises FingerprintMismatch when plan, anatomy and network do not belong together.
    """
    changed = list(_changed(model, anatomy, plan))
    small: fx.GraphModule = copy.deepcopy(model, sliced(model, changed))
    nodes = {node.name: node for node in small.graph.nodes}
    for size in anatomy.sizes:
        _set(nodes[size.node], size, plan)
    for branch in anatomy.gone(plan):
        _drop(small.graph, nodes, branch)
    small.graph.eliminate_dead_code()
    small.recompile()
    small = fx.GraphModule(small, small.graph, small._get_name())  # without the tensors that nothing reads by now
    measure_shapes(small)
    return small


def mask_graph(model: fx.GraphModule, anatomy: GraphAnatomy, plan: Plan) -> fx.GraphModule:
    """A copy of full size in which nothing reads a dropped channel, and dropped branches add zeros: where groups are
    exact it computes what the cut one computes, and is the oracle for the tables.
    """
    masked = copy.deepcopy(model)
    zero_consumers(masked, list(_changed(model, anatomy, plan)))
    nodes = {node.name: node for node in masked.graph.nodes}
    for branch in anatomy.gone(plan):
        join, end = nodes[branch.join], nodes[branch.end]
        with masked.graph.inserting_before(join):
            join.replace_input_with(end, masked.graph.call_function(torch.ops.aten.mul.Scalar, (end, 0.0)))
    masked.recompile()
    return masked


def _drop(graph: fx.Graph, nodes: dict[str, fx.Node], branch: Branch) -> None:
    """Lets the shortcut stand alone where the branch was added to it."""
    join = nodes[branch.join]
    shortcut = next(one for one in join.all_input_nodes if one.name != branch.end)
    readers = list(join.users)
    join.replace_all_uses_with(shortcut)
    graph.erase_node(join)
    for node in readers:
        _change_nothing_but_its_own(node)
        again = node.args[0] is shortcut and shortcut.op == "call_function" and operator_of(node) in TWICE_IS_ONCE
        if again and node.target == shortcut.target and node.args[1:] == shortcut.args[1:]:
            node.replace_all_uses_with(shortcut)
            graph.erase_node(node)
    for name in reversed(branch.nodes):  # dead, but those that write over their input do not look so
        if name in nodes and not nodes[name].users:
            graph.erase_node(nodes.pop(name))


def _change_nothing_but_its_own(node: fx.Node) -> None:
    """An operator that wrote its result over its input becomes one that does not: others may read that input now."""
    if isinstance(node.target, torch._ops.OpOverload) and writes_over(node):
        packet = getattr(torch.ops.aten, operator_of(node))
        node.target = getattr(packet, node.target._overloadname)


def _set(node: fx.Node, size: Size, plan: Plan) -> None:
    value = size.fixed + sum(int(counts[list(plan.keep[name])].sum()) for name, counts in size.counts.items())
    at, *inner = size.place
    if inner:
        old: Any = node.args[at]
        node.update_arg(at, [value if number == inner[0] else one for number, one in enumerate(old)])
    else:
        node.update_arg(at, value)


def _changed(model: fx.GraphModule, anatomy: GraphAnatomy, plan: Plan) -> Iterator[tuple[Group, tuple[int, ...]]]:
    for name, found in (("anatomy", anatomy.fingerprint), ("plan", plan.fingerprint)):
        if found != fingerprint(model):
            raise FingerprintMismatch(f"the {name} is of the network {found[:12]}, another one is given")
    unknown = set(plan.keep) - {group.name for group in anatomy.groups}
    if unknown:
        raise FingerprintMismatch(f"the plan keeps units of {sorted(unknown)[0]!r}, a group the network does not have")
    for group in anatomy.groups:
        keep = units_of(plan.keep, group)
        if len(keep) < group.units:
            yield group, keep
