"""What operators make of channels whose values they change one by one, side by side, or together."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import fx

from paredown.anatomy._atoms import Labelling, Labels, Rule, aligned, arguments

_SAME: tuple[str, ...] = ("dropout", "feature_dropout", "alpha_dropout", "contiguous", "to", "alias", "detach", "clone")
_SAME += ("_to_copy", "hardswish", "hardtanh", "hardsigmoid", "relu6", "leaky_relu", "elu", "celu", "selu", "mish")
_SAME += ("softplus", "rrelu", "where", "expand_as")
_REDUCED = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp")
_ALONG = ("softmax", "log_softmax", "cumsum")
POOLS = (  # how the names of operators begin that look at each channel's places
    "max_pool",
    "avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "upsample_",
    "reflection_pad",
    "replication_pad",
)


def pointwise(labelling: Labelling, node: fx.Node) -> Labels:
    read = [one for one in node.all_input_nodes if one.meta["shape"] is not None]
    rank = len(node.meta["shape"])
    found = [aligned(labelling.labels[one], rank) for one in read if labelling.labels[one] is not None]
    if not found:
        if any(one.op == "get_attr" for one in read):
            labelling.keep(node, "an operand stays")
        return None
    labels = found[0]
    dims = {dim for one in found for dim, size in enumerate(one.shape) if size > 1}
    if len(dims) > 1:
        return labelling.keep(node, "its operands have channels along different dimensions")
    for one in found[1:]:
        labelling.atoms.unite(*np.broadcast_arrays(labels, one))
        labels = labels if labels.size >= one.size else one
    for other in read:  # what has no labels there must be the same for all channels
        if labelling.labels[other] is None and any(dim in dims and size > 1 for dim, size in _sizes(other, rank)):
            return labelling.keep(node, "an operand stays")
    return labels


def spatial(labelling: Labelling, node: fx.Node) -> Any:
    labels = labelling.read(node)
    if labels is None:
        return None
    if labels.shape[1] != labels.size:
        return labelling.keep(node, "pooling over channels")
    shape = node.meta["shape"]
    return [labels] * len(shape) if isinstance(shape[0], tuple) else labels  # what is largest, and where it was


def reduce(labelling: Labelling, node: fx.Node) -> Labels:
    labels = labelling.read(node)
    if labels is None:
        return None
    dims = arguments(node)[1] if len(arguments(node)) > 1 else None
    dims = [dims] if isinstance(dims, int) else dims or range(labels.ndim)
    gone = {int(dim) % labels.ndim for dim in dims}
    if any(labels.shape[dim] > 1 for dim in gone):
        return labelling.keep(node, "a sum over channels")
    if len(node.meta["shape"]) == labels.ndim:
        return labels
    return labels.reshape([size for dim, size in enumerate(labels.shape) if dim not in gone])


def along(labelling: Labelling, node: fx.Node) -> Labels:
    labels = labelling.read(node)
    if labels is not None and labels.shape[int(arguments(node)[1]) % labels.ndim] > 1:
        return labelling.keep(node, "a sum over channels")
    return labels


def _sizes(node: fx.Node, rank: int) -> list[tuple[int, int]]:
    """(dimension of the result, size) of an operand's dimensions."""
    shape = node.meta["shape"]
    return [(rank - len(shape) + dim, size) for dim, size in enumerate(shape)]


VALUES: dict[str, Rule] = {
    **dict.fromkeys(_SAME, pointwise),
    **dict.fromkeys(_REDUCED, reduce),
    **dict.fromkeys(_ALONG, along),
}
