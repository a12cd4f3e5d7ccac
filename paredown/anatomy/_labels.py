"""Which channel is which, anywhere in a graph: every index of every tensor's axis is an atom, operators say which atoms
are the same, and the positions of a value are labelled with them. Whatever moves data about is done to the labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from paredown.anatomy._atoms import Labelling, Rule
from paredown.anatomy._layer_rules import LAYERS
from paredown.anatomy._moving_rules import MOVES
from paredown.anatomy._value_rules import POOLS, VALUES, pointwise, spatial
from paredown.graph import is_pointwise, operator_of

RULES: dict[str, Rule] = {**LAYERS, **VALUES, **MOVES}


def labelled(graph: fx.Graph, shapes: Mapping[str, tuple[int, ...]]) -> Labelling:
    """The labels of every node's value, and the integers in the graph that follow a cut; `shapes` are the tensors'."""
    found = Labelling(shapes)
    for node in graph.nodes:
        found.labels[node] = _step(found, node)
    return found


def _step(labelling: Labelling, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return labelling.vector(node)
    if node.op == "output":
        return labelling.keep(node, "the network's answer")
    if node.op != "call_function":
        return None
    name = operator_of(node)
    rule = RULES.get(name) or (spatial if name.startswith(POOLS) else pointwise if is_pointwise(node) else None)
    if rule is not None:
        return rule(labelling, node)
    if name == "sym_size" or node.meta["shape"] is None:
        return None
    return labelling.keep(node, f"{name} cannot be followed")
