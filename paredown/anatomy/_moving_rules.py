"""What moves data about moves labels about: views, permutations, slices, splits, concatenations, padding."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import numpy as np
from torch import fx

from paredown.anatomy._atoms import Labelling, Labels, Rule, aligned, arguments
from paredown.graph import operator_of
from paredown.types import Array


def reshaped(labelling: Labelling, node: fx.Node, sized: bool = False) -> Labels:
    """Where `sized`, sizes among the arguments follow the cut."""
    one = arguments(node)[0]
    assert isinstance(one, fx.Node)
    labels = labelling.labels[one]
    if labels is None:
        return None
    before, after = one.meta["shape"], node.meta["shape"]
    moved = np.broadcast_to(labels, before).reshape(after)
    for dim in range(moved.ndim):
        if (moved == moved.take([0], axis=dim)).all():
            moved = moved.take([0], axis=dim)
    if moved.size > 1 and max(moved.shape) != moved.size:
        return labelling.keep(node, "channels are spread over several dimensions")
    if len(after) > 1 and moved.shape[0] > 1:
        return labelling.keep(node, "channels are put together with pictures")
    if sized:
        _resize(labelling, node, moved)
    return np.ascontiguousarray(moved)


def _resize(labelling: Labelling, node: fx.Node, labels: Array) -> None:
    """The size of the labelled dimension, among those in the argument that holds them."""
    place, first = (2, int(arguments(node)[1])) if operator_of(node) == "unflatten" else (1, 0)
    for dim in (dim for dim, size in enumerate(labels.shape) if size > 1):
        told = arguments(node)[place][dim - first]
        if isinstance(told, int) and told >= 0:
            labelling.sizes.append((node.name, (place, dim - first), labels.reshape(-1)))


def expand(labelling: Labelling, node: fx.Node) -> Labels:
    labels = labelling.read(node)
    if labels is None:
        return None
    labels = aligned(labels, len(node.meta["shape"]))
    _resize(labelling, node, labels)
    return labels


def permute(labelling: Labelling, node: fx.Node) -> Labels:
    labels = labelling.read(node)
    return None if labels is None else labels.transpose(arguments(node)[1])


def transpose(labelling: Labelling, node: fx.Node) -> Labels:
    labels = labelling.read(node)
    return None if labels is None else np.swapaxes(labels, arguments(node)[1], arguments(node)[2])


def sliced(labelling: Labelling, node: fx.Node) -> Labels:
    """A part of the channels: its ends follow the cut."""
    _, dim, start, end, step = arguments(node)
    labels = labelling.read(node)
    if labels is None or labels.shape[dim] == 1:
        return labels
    channels, start = labels.reshape(-1), start or 0
    if not all(isinstance(one, int) for one in (start, end, step)) or step != 1:
        return labelling.keep(node, "some channels are left out")
    begin, stop, _ = slice(start, end).indices(len(channels))
    for place, upto in ((2, begin), (3, stop)):
        labelling.sizes.append((node.name, (place,), channels[:upto]))
    part = labels.take(np.arange(begin, stop), axis=dim)
    return part if part.size > 1 else labelling.lone(node, part)


def narrow(labelling: Labelling, node: fx.Node) -> Labels:
    return labelling.keep(node, "narrow cannot be followed") if labelling.read(node) is not None else None


def select(labelling: Labelling, node: fx.Node) -> Labels:
    labels = labelling.read(node)
    if labels is None:
        return None
    dim = int(arguments(node)[1]) % labels.ndim
    return labelling.keep(node, "one channel is taken") if labels.shape[dim] > 1 else labels.squeeze(dim)


def split_with_sizes(labelling: Labelling, node: fx.Node) -> Any:
    """A list of labels. Its sizes follow the cut; `trace` writes every split and chunk with sizes."""
    one, dim = arguments(node)[0], int(arguments(node)[2])
    labels = labelling.labels[one]
    if labels is None:
        return None
    if labels.shape[dim] == 1:
        return [labels] * len(node.meta["shape"])
    widths = [shape[dim] for shape in node.meta["shape"]]
    parts = np.split(labels, np.cumsum(widths)[:-1], axis=dim)
    for number, part in enumerate(parts):
        labelling.sizes.append((node.name, (1, number), part.reshape(-1)))
    return [part if part.size > 1 else labelling.lone(node, part) for part in parts]


def getitem(labelling: Labelling, node: fx.Node) -> Labels:
    found: Any = labelling.read(node)
    return None if found is None else cast(Labels, found[arguments(node)[1]])


def cat(labelling: Labelling, node: fx.Node) -> Labels:
    parts, dim = arguments(node)[0], int(arguments(node)[1])
    rank = len(node.meta["shape"])
    dim %= rank
    found = [labelling.labels[one] for one in parts]
    if all(labels is None for labels in found):
        return None
    if any(labels is not None and labels.size > 1 and labels.shape[dim] != labels.size for labels in found):
        return labelling.keep(node, "pieces are put together along another dimension")
    whole = []
    for one, labels in zip(parts, found, strict=True):
        if labels is None:
            labels = labelling.atoms.fresh(one.meta["shape"][dim])
            labelling.atoms.keep(labels, f"an operand stays ({node.name})")
        whole.append(labels.reshape(-1))
    return np.concatenate(whole).reshape([-1 if d == dim else 1 for d in range(rank)])


def pad(labelling: Labelling, node: fx.Node) -> Labels:
    """Padding with channels of a constant: they are atoms without a tensor, and may go with what is added."""
    labels = labelling.read(node)
    if labels is None:
        return None
    amounts = [int(one) for one in arguments(node)[1]]
    dim = int(np.argmax(labels.shape))
    at = 2 * (labels.ndim - 1 - dim)
    before, after = amounts[at : at + 2] if at < len(amounts) else (0, 0)
    if not before and not after:
        return labels
    mode = arguments(node)[2] if operator_of(node) == "pad" else "constant"
    if min(before, after) < 0 or mode != "constant":
        return labelling.keep(node, "channels are padded with others")
    left, right = labelling.atoms.fresh(before), labelling.atoms.fresh(after)
    labelling.sizes += [(node.name, (1, at), left), (node.name, (1, at + 1), right)]
    whole = np.concatenate([left, labels.reshape(-1), right])
    return whole.reshape([-1 if d == dim else 1 for d in range(labels.ndim)])


MOVES: dict[str, Rule] = {
    **dict.fromkeys(("view", "reshape", "_unsafe_view", "unflatten"), partial(reshaped, sized=True)),
    **dict.fromkeys(("flatten", "squeeze", "unsqueeze"), reshaped),
    "expand": expand,
    "permute": permute,
    "transpose": transpose,
    "slice": sliced,
    "narrow": narrow,
    "select": select,
    "split_with_sizes": split_with_sizes,
    "getitem": getitem,
    "cat": cat,
    **dict.fromkeys(("pad", "constant_pad_nd"), pad),
}
