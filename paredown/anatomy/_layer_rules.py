"""What layers and norms make of channels: which entries of their tensors go with what enters, and with what leaves."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import fx

from paredown.anatomy._atoms import CONSUMER, PRODUCER, Labelling, Labels, Rule, arguments
from paredown.types import Array

GROUPS = 6  # the place of their number among a convolution's arguments, transposed or not


def convolution(labelling: Labelling, node: fx.Node, transposed: bool = False) -> Labels:
    x, weight, bias = arguments(node)[:3]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return labelling.keep(node, "its weights are computed")
    groups = int(arguments(node)[GROUPS]) if len(arguments(node)) > GROUPS else 1
    incoming = labelling.channels(node, x, 1)
    size = labelling.shapes[str(weight.target)]
    first, second = (1, 0) if transposed else (0, 1)  # the axes of outputs and of inputs
    depthwise = groups > 1 and size[1] == 1 if not transposed else groups > 1 and size[0] == groups
    if depthwise:
        return _depthwise(labelling, node, incoming, groups, transposed)
    inputs = labelling.axis(weight, second, CONSUMER)
    outputs = labelling.axis(weight, first, PRODUCER)
    assert inputs is not None and outputs is not None
    # Of g groups, inputs or outputs that have the same weight's index go together: every group keeps as many.
    entering = np.tile(inputs, groups) if not transposed else inputs
    leaving = outputs if not transposed else np.tile(outputs, groups)
    _same_in_groups(labelling, inputs if transposed else outputs, groups)
    _fed(labelling, node, incoming, entering)
    _biased(labelling, bias, leaving)
    return labelling.led(node, leaving, 1)


def _same_in_groups(labelling: Labelling, atoms: Array, groups: int) -> None:
    if groups > 1:
        table = atoms.reshape(groups, -1)
        for row in table[1:]:
            labelling.atoms.unite(table[0], row)


def _depthwise(labelling: Labelling, node: fx.Node, incoming: Labels, groups: int, transposed: bool) -> Labels:
    _, weight, bias = arguments(node)[:3]
    assert isinstance(weight, fx.Node)
    size = labelling.shapes[str(weight.target)]
    atoms = labelling.axis(weight, 0, PRODUCER)
    assert atoms is not None
    each = size[1] if transposed else len(atoms) // groups  # outputs of an input
    if transposed:
        leaving = np.repeat(atoms, each)
    else:
        leaving = atoms
        _same_in_groups(labelling, atoms.reshape(groups, each).T.reshape(-1), each)
    entering = atoms if transposed else atoms[::each]
    _fed(labelling, node, incoming, entering)
    _biased(labelling, bias, leaving)
    labelling.sizes.append((node.name, (GROUPS,), entering))
    return labelling.led(node, leaving, 1)


def _fed(labelling: Labelling, node: fx.Node, incoming: Labels, entering: Array) -> None:
    """What a layer multiplies its inputs with goes with them, or stays where they do."""
    if incoming is None:
        labelling.atoms.keep(entering, f"its inputs stay ({node.name})")
    else:
        labelling.atoms.unite(incoming, entering)


def _biased(labelling: Labelling, bias: Any, leaving: Array) -> None:
    atoms = labelling.axis(bias, 0, PRODUCER)
    if atoms is not None:
        labelling.atoms.unite(atoms, leaving)
    elif bias is not None:
        labelling.atoms.keep(leaving, f"the bias is computed ({bias})")


def linear(labelling: Labelling, node: fx.Node) -> Labels:
    x, weight, bias = (*arguments(node), None)[:3]
    inputs, outputs = labelling.axis(weight, 1, CONSUMER), labelling.axis(weight, 0, PRODUCER)
    if inputs is None or outputs is None:
        return labelling.keep(node, "its weights are computed")
    incoming = labelling.channels(node, x, -1)
    _fed(labelling, node, incoming, inputs)
    _biased(labelling, bias, outputs)
    return labelling.led(node, outputs, -1)


def batch_norm(labelling: Labelling, node: fx.Node) -> Labels:
    return _normed(labelling, node, arguments(node)[1:5])


def _normed(labelling: Labelling, node: fx.Node, tensors: Sequence[Any], dim: int = 1) -> Labels:
    channels = labelling.channels(node, arguments(node)[0], dim)
    for one in tensors:
        atoms = labelling.axis(one, 0, PRODUCER)
        if atoms is not None:
            _fed(labelling, node, channels, atoms)
    return None if channels is None else labelling.read(node)


def group_norm(labelling: Labelling, node: fx.Node) -> Labels:
    groups = int(arguments(node)[1])
    channels = labelling.channels(node, arguments(node)[0], 1)
    if channels is not None:  # a group's channels share their statistics: they go together
        table = channels.reshape(groups, -1)
        for column in table.T[1:]:
            labelling.atoms.unite(table[:, 0], column)
        labelling.sizes.append((node.name, (1,), table[:, 0]))
    return _normed(labelling, node, arguments(node)[2:4])


def layer_norm(labelling: Labelling, node: fx.Node) -> Labels:
    over = arguments(node)[1]
    if len(over) != 1:
        return labelling.keep(node, "a norm over several dimensions")
    channels = labelling.channels(node, arguments(node)[0], -1)
    if channels is not None:
        labelling.atoms.shifting.update(channels.tolist())
        labelling.sizes.append((node.name, (1, 0), channels))
    return _normed(labelling, node, arguments(node)[2:4], -1)


def prelu(labelling: Labelling, node: fx.Node) -> Labels:
    slope = arguments(node)[1]
    assert isinstance(slope, fx.Node)
    if labelling.shapes.get(str(slope.target), (2,)) == (1,):
        return labelling.read(node)
    return _normed(labelling, node, [slope])


LAYERS: dict[str, Rule] = {
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), convolution),
    **dict.fromkeys(
        ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), partial(convolution, transposed=True)
    ),
    "linear": linear,
    "batch_norm": batch_norm,
    "instance_norm": batch_norm,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "prelu": prelu,
}
