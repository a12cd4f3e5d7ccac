"""Cutting channels out of a traced network: its tensors get smaller, and the integers in its graph follow."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import fx

from paredown.errors import FingerprintMismatch
from paredown.graph import fingerprint, measure_shapes
from paredown.surgery._cut import sliced, units_of, zero_consumers
from paredown.types import GraphAnatomy, Group, Plan, Size


def cut_graph(model: fx.GraphModule, anatomy: GraphAnatomy, plan: Plan) -> fx.GraphModule:
    """A copy of the network that holds only the channels that the plan keeps. Works on the meta device too.

    Raises FingerprintMismatch when plan, anatomy and network do not belong together.
    """
    changed = list(_changed(model, anatomy, plan))
    small: fx.GraphModule = copy.deepcopy(model, sliced(model, changed))
    nodes = {node.name: node for node in small.graph.nodes}
    for size in anatomy.sizes:
        _set(nodes[size.node], size, plan)
    small.recompile()
    measure_shapes(small)
    return small


def mask_graph(model: fx.GraphModule, anatomy: GraphAnatomy, plan: Plan) -> fx.GraphModule:
    """A copy of full size in which nothing reads a dropped channel: where groups are exact it computes what the cut
    one computes, and is the oracle for the tables.
    """
    masked = copy.deepcopy(model)
    zero_consumers(masked, list(_changed(model, anatomy, plan)))
    return masked


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
