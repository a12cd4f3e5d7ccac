"""Which channel is which, anywhere in a graph: every index of every tensor's axis is an atom, operators say which atoms
are the same, and the positions of a value are labelled with them. Whatever moves data about is done to the labels.

The coupling rules are DepGraph's (Fang et al. 2023, arXiv:2301.12900), kept per channel instead of per layer, so that a
shortcut that pads or concatenates needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from torch import fx

from paredown.graph import is_pointwise, operator_of
from paredown.types import Array

Labels = Array | None  # as many dimensions as the value, of size 1 where nothing changes along them; None: no atoms
PRODUCER, CONSUMER = "producer", "consumer"
_SAME: tuple[str, ...] = ("dropout", "feature_dropout", "alpha_dropout", "contiguous", "to", "alias", "detach", "clone")
_SAME += ("_to_copy", "hardswish", "hardtanh", "hardsigmoid", "relu6", "leaky_relu", "elu", "celu", "selu", "mish")
_SAME += ("softplus", "rrelu")
_POOLS = (
    "max_pool",
    "avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "upsample_",
    "reflection_pad",
    "replication_pad",
)
_REDUCED = ("mean", "sum", "amax", "amin", "var", "std", "logsumexp")
_ALONG = ("softmax", "log_softmax", "cumsum")


class Atoms:
    """Sets of atoms that stay or go together, and where each one lies in the tensors."""

    def __init__(self) -> None:
        self._above: list[int] = []
        self.axes: dict[tuple[str, int], Array] = {}  # of each (tensor, axis), its atoms
        self.roles: dict[tuple[str, int], str] = {}
        self.whole: dict[int, str] = {}  # atoms that stay, and why
        self.shifting: set[int] = set()  # atoms whose going moves a statistic of those that stay

    def fresh(self, count: int) -> Array:
        first = len(self._above)
        self._above.extend(range(first, first + count))
        return np.arange(first, first + count)

    def of(self, tensor: str, axis: int, size: int, role: str) -> Array:
        """The atoms of a tensor's axis, which has one role."""
        key = (tensor, axis)
        if key not in self.axes:
            self.axes[key], self.roles[key] = self.fresh(size), role
        elif self.roles[key] != role:
            self.keep(self.axes[key], f"{tensor} is used in two ways")
        return self.axes[key]

    def root(self, atom: int) -> int:
        above = self._above
        while above[atom] != atom:
            above[atom] = above[above[atom]]
            atom = above[atom]
        return atom

    def unite(self, a: Array, b: Array) -> None:
        for one, two in zip(np.ravel(a).tolist(), np.ravel(b).tolist(), strict=True):
            first, second = sorted((self.root(one), self.root(two)))
            self._above[second] = first

    def keep(self, atoms: Array | Iterable[int], why: str) -> None:
        for atom in np.unique(np.asarray(atoms)).tolist():
            self.whole.setdefault(atom, why)


class Tracing:
    """One pass over the graph: `labels` of every node's value, and `sizes`, the integers that follow a cut."""

    def __init__(self, graph: fx.Graph, shapes: Mapping[str, tuple[int, ...]]):
        self.atoms = Atoms()
        self.shapes = shapes  # of the tensors, by name
        self.labels: dict[Any, Any] = {}
        self.sizes: list[tuple[str, tuple[int, ...], Array]] = []  # node, place of the integer, the atoms it counts
        for node in graph.nodes:
            self.labels[node] = self._step(node)

    # ------------------------------------------------------------------------------------------------ the operators

    def _step(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._vector(node)
        if node.op == "output":
            self._keep(node, "the network's answer")
        if node.op != "call_function":
            return None
        name = operator_of(node)
        rule: Callable[[fx.Node], Any] | None = getattr(self, f"_{name}", None)
        if rule is not None:
            return rule(node)
        if name.startswith("conv_transpose"):
            return self._convolution(node, transposed=True)
        if name in ("conv1d", "conv2d", "conv3d"):
            return self._convolution(node)
        if name.startswith(_POOLS):
            return self._spatial(node)
        if is_pointwise(node) or name in _SAME:
            return self._pointwise(node)
        if name in _REDUCED:
            return self._reduce(node)
        if name in _ALONG:
            return self._along(node)
        if name == "sym_size" or node.meta["shape"] is None:
            return None
        return self._keep(node, f"{name} cannot be followed")

    def _read(self, node: fx.Node) -> Labels:
        """The labels of what a node reads first."""
        found: Labels = self.labels[_args(node)[0]]
        return found

    def _keep(self, node: fx.Node, why: str) -> Labels:
        """All that a node reads stays."""
        for one in node.all_input_nodes:
            if one.op == "get_attr":
                name = str(one.target)
                for axis, size in enumerate(self.shapes[name]):
                    role = self.atoms.roles.get((name, axis), PRODUCER)
                    self.atoms.keep(self.atoms.of(name, axis, size, role), f"{why} ({node.name})")
            for labels in _flat(self.labels[one]):
                self.atoms.keep(labels, f"{why} ({node.name})")
        return None

    def _vector(self, node: fx.Node) -> Labels:
        """A tensor of one dimension labels its positions; another is only what its readers make of it."""
        shape = self.shapes[str(node.target)]
        wide = [axis for axis, size in enumerate(shape) if size > 1]
        if len(wide) != 1:
            return None
        atoms = self.atoms.of(str(node.target), wide[0], shape[wide[0]], PRODUCER)
        return atoms.reshape([shape[axis] if axis == wide[0] else 1 for axis in range(len(shape))])

    def _channels(self, node: fx.Node, one: Any, dim: int) -> Labels:
        """[C]: the atoms along one dimension of an input, which must be the only one that has any."""
        labels = self.labels[one] if isinstance(one, fx.Node) else None
        if labels is None:
            return None
        dim %= labels.ndim
        if labels.shape[dim] != labels.size:
            self.atoms.keep(labels, f"channels lie along another dimension ({node.name})")
            return None
        return np.asarray(labels.reshape(-1))

    def _axis(self, node: Any, axis: int, role: str) -> Array | None:
        """The atoms of an axis of a tensor of the network; None where it is computed, and cannot be cut."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        name = str(node.target)
        return self.atoms.of(name, axis, self.shapes[name][axis], role)

    def _convolution(self, node: fx.Node, transposed: bool = False) -> Labels:
        x, weight, bias = _args(node)[:3]
        place = 6  # of the number of groups, transposed or not
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return self._keep(node, "its weights are computed")
        groups = int(_args(node)[place]) if len(_args(node)) > place else 1
        incoming = self._channels(node, x, 1)
        size = self.shapes[str(weight.target)]
        first, second = (1, 0) if transposed else (0, 1)  # the axes of outputs and of inputs
        depthwise = groups > 1 and size[1] == 1 if not transposed else groups > 1 and size[0] == groups
        if depthwise:
            return self._depthwise(node, incoming, groups, place, transposed)
        inputs = self._axis(weight, second, CONSUMER)
        outputs = self._axis(weight, first, PRODUCER)
        assert inputs is not None and outputs is not None
        # Of g groups, inputs or outputs that have the same weight's index go together: every group keeps as many.
        entering = np.tile(inputs, groups) if not transposed else inputs
        leaving = outputs if not transposed else np.tile(outputs, groups)
        self._same_in_groups(inputs if transposed else outputs, groups)
        if incoming is None:
            self.atoms.keep(inputs, f"its inputs stay ({node.name})")
        else:
            self.atoms.unite(incoming, entering)
        self._biased(bias, leaving)
        return self._led(node, leaving, 1)

    def _led(self, node: fx.Node, leaving: Array, dim: int) -> Labels:
        """The channels that a layer makes, along one dimension; a single one is none that could go."""
        if len(leaving) == 1:
            return self._lone(node, leaving)
        rank = len(node.meta["shape"])
        return leaving.reshape([-1 if d == dim % rank else 1 for d in range(rank)])

    def _same_in_groups(self, atoms: Array, groups: int) -> None:
        if groups > 1:
            table = atoms.reshape(groups, -1)
            for row in table[1:]:
                self.atoms.unite(table[0], row)

    def _depthwise(self, node: fx.Node, incoming: Labels, groups: int, place: int, transposed: bool) -> Labels:
        _, weight, bias = _args(node)[:3]
        assert isinstance(weight, fx.Node)
        size = self.shapes[str(weight.target)]
        atoms = self._axis(weight, 0, PRODUCER)
        assert atoms is not None
        each = size[1] if transposed else len(atoms) // groups  # outputs of an input
        if transposed:
            leaving = np.repeat(atoms, each)
        else:
            leaving = atoms
            self._same_in_groups(atoms.reshape(groups, each).T.reshape(-1), each)
        if incoming is None:
            self.atoms.keep(atoms, f"its inputs stay ({node.name})")
        else:
            self.atoms.unite(incoming, atoms if transposed else atoms[::each])
        self._biased(bias, leaving)
        self.sizes.append((node.name, (place,), atoms if transposed else atoms[::each]))
        return self._led(node, leaving, 1)

    def _biased(self, bias: Any, leaving: Array) -> None:
        atoms = self._axis(bias, 0, PRODUCER)
        if atoms is not None:
            self.atoms.unite(atoms, leaving)
        elif bias is not None:
            self.atoms.keep(leaving, f"the bias is computed ({bias})")

    def _linear(self, node: fx.Node) -> Labels:
        x, weight, bias = (*_args(node), None)[:3]
        inputs, outputs = self._axis(weight, 1, CONSUMER), self._axis(weight, 0, PRODUCER)
        if inputs is None or outputs is None:
            return self._keep(node, "its weights are computed")
        incoming = self._channels(node, x, -1)
        if incoming is None:
            self.atoms.keep(inputs, f"its inputs stay ({node.name})")
        else:
            self.atoms.unite(incoming, inputs)
        self._biased(bias, outputs)
        return self._led(node, outputs, -1)

    def _batch_norm(self, node: fx.Node) -> Labels:
        return self._normed(node, _args(node)[1:5])

    _instance_norm = _batch_norm

    def _normed(self, node: fx.Node, tensors: Sequence[Any], dim: int = 1) -> Labels:
        channels = self._channels(node, _args(node)[0], dim)
        for one in tensors:
            atoms = self._axis(one, 0, PRODUCER)
            if atoms is None:
                continue
            if channels is None:
                self.atoms.keep(atoms, f"its inputs stay ({node.name})")
            else:
                self.atoms.unite(atoms, channels)
        return None if channels is None else self._read(node)

    def _group_norm(self, node: fx.Node) -> Labels:
        groups = int(_args(node)[1])
        channels = self._channels(node, _args(node)[0], 1)
        if channels is not None:  # a group's channels share their statistics: they go together
            table = channels.reshape(groups, -1)
            for column in table.T[1:]:
                self.atoms.unite(table[:, 0], column)
            self.sizes.append((node.name, (1,), table[:, 0]))
        return self._normed(node, _args(node)[2:4])

    def _layer_norm(self, node: fx.Node) -> Labels:
        over = _args(node)[1]
        if len(over) != 1:
            return self._keep(node, "a norm over several dimensions")
        channels = self._channels(node, _args(node)[0], -1)
        if channels is not None:
            self.atoms.shifting.update(channels.tolist())
            self.sizes.append((node.name, (1, 0), channels))
        return self._normed(node, _args(node)[2:4], -1)

    def _prelu(self, node: fx.Node) -> Labels:
        slope = _args(node)[1]
        assert isinstance(slope, fx.Node)
        if self.shapes.get(str(slope.target), (2,)) == (1,):
            return self._read(node)
        return self._normed(node, [slope])

    # ---------------------------------------------------------------------------------------- element by element

    def _pointwise(self, node: fx.Node) -> Labels:
        read = [one for one in node.all_input_nodes if one.meta["shape"] is not None]
        rank = len(node.meta["shape"])
        found = [_aligned(self.labels[one], rank) for one in read if self.labels[one] is not None]
        if not found:
            if any(one.op == "get_attr" for one in read):
                self._keep(node, "an operand stays")
            return None
        labels = found[0]
        dims = {dim for one in found for dim, size in enumerate(one.shape) if size > 1}
        if len(dims) > 1:
            return self._keep(node, "its operands have channels along different dimensions")
        for one in found[1:]:
            self.atoms.unite(*np.broadcast_arrays(labels, one))
            labels = labels if labels.size >= one.size else one
        for other in read:  # what has no labels there must be the same for all channels
            if self.labels[other] is None and any(dim in dims and size > 1 for dim, size in _sizes(other, rank)):
                return self._keep(node, "an operand stays")
        return labels

    def _where(self, node: fx.Node) -> Labels:
        return self._pointwise(node)

    def _spatial(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        if labels is not None and labels.shape[1] != labels.size:
            return self._keep(node, "pooling over channels")
        return labels

    def _reduce(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        if labels is None:
            return None
        dims = _args(node)[1] if len(_args(node)) > 1 else None
        dims = [dims] if isinstance(dims, int) else dims or range(labels.ndim)
        gone = {int(dim) % labels.ndim for dim in dims}
        if any(labels.shape[dim] > 1 for dim in gone):
            return self._keep(node, "a sum over channels")
        if len(node.meta["shape"]) == labels.ndim:
            return labels
        return labels.reshape([size for dim, size in enumerate(labels.shape) if dim not in gone])

    def _along(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        if labels is not None and labels.shape[int(_args(node)[1]) % labels.ndim] > 1:
            return self._keep(node, "a sum over channels")
        return labels

    # -------------------------------------------------------------------------------------------- what moves data

    def _view(self, node: fx.Node) -> Labels:
        """Also reshape; the sizes of its argument follow the cut."""
        return self._reshaped(node, sized=True)

    _reshape = __unsafe_view = _unflatten = _view

    def _flatten(self, node: fx.Node) -> Labels:
        return self._reshaped(node)

    def _squeeze(self, node: fx.Node) -> Labels:
        return self._reshaped(node)

    _unsqueeze = _squeeze

    def _reshaped(self, node: fx.Node, sized: bool = False) -> Labels:
        one = _args(node)[0]
        assert isinstance(one, fx.Node)
        labels = self.labels[one]
        if labels is None:
            return None
        before, after = one.meta["shape"], node.meta["shape"]
        moved = np.broadcast_to(labels, before).reshape(after)
        for dim in range(moved.ndim):
            if (moved == moved.take([0], axis=dim)).all():
                moved = moved.take([0], axis=dim)
        if moved.size > 1 and max(moved.shape) != moved.size:
            return self._keep(node, "channels are spread over several dimensions")
        if sized:
            self._resize(node, moved)
        return np.ascontiguousarray(moved)

    def _resize(self, node: fx.Node, labels: Array) -> None:
        """The size of the labelled dimension, among those in the second argument."""
        sizes = _args(node)[1] if operator_of(node) != "unflatten" else _args(node)[2]
        first = 0 if operator_of(node) != "unflatten" else int(_args(node)[1])
        for dim in (dim for dim, size in enumerate(labels.shape) if size > 1):
            told = sizes[dim - first]
            if isinstance(told, int) and told >= 0:
                place = (2 if first or operator_of(node) == "unflatten" else 1, dim - first)
                self.sizes.append((node.name, place, labels.reshape(-1)))

    def _expand(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        if labels is None:
            return None
        labels = _aligned(labels, len(node.meta["shape"]))
        self._resize(node, labels)
        return labels

    def _expand_as(self, node: fx.Node) -> Labels:
        return self._pointwise(node)

    def _permute(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        return None if labels is None else labels.transpose(_args(node)[1])

    def _transpose(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        return None if labels is None else np.swapaxes(labels, _args(node)[1], _args(node)[2])

    def _slice(self, node: fx.Node) -> Labels:
        _, dim, start, end, step = _args(node)
        labels = self._read(node)
        if labels is None or labels.shape[dim] == 1:
            return labels
        return self._taken(node, labels, dim, start or 0, end, step, (2, 3))

    def _narrow(self, node: fx.Node) -> Labels:
        return self._keep(node, "narrow cannot be followed") if self._read(node) is not None else None

    def _taken(
        self, node: fx.Node, labels: Array, dim: Any, start: Any, end: Any, step: Any, places: tuple[int, int]
    ) -> Labels:
        """A part of the channels: its ends follow the cut."""
        channels = labels.reshape(-1)
        if not all(isinstance(one, int) for one in (start, end, step)) or step != 1:
            return self._keep(node, "some channels are left out")
        begin, stop, _ = slice(start, end).indices(len(channels))
        for place, upto in zip(places, (begin, stop), strict=True):
            self.sizes.append((node.name, (place,), channels[:upto]))
        part = labels.take(np.arange(begin, stop), axis=dim)
        return part if part.size > 1 else self._lone(node, part)

    def _lone(self, node: fx.Node, labels: Array) -> Labels:
        self.atoms.keep(labels, f"a single channel ({node.name})")
        return None

    def _select(self, node: fx.Node) -> Labels:
        labels = self._read(node)
        if labels is None:
            return None
        dim = int(_args(node)[1]) % labels.ndim
        return self._keep(node, "one channel is taken") if labels.shape[dim] > 1 else labels.squeeze(dim)

    def _split_with_sizes(self, node: fx.Node) -> Any:
        """A list of labels. Its sizes follow the cut; `trace` writes every split and chunk with sizes."""
        one, dim = _args(node)[0], int(_args(node)[2])
        labels = self.labels[one]
        if labels is None:
            return None
        if labels.shape[dim] == 1:
            return [labels] * len(node.meta["shape"])
        widths = [shape[dim] for shape in node.meta["shape"]]
        parts = np.split(labels, np.cumsum(widths)[:-1], axis=dim)
        for number, part in enumerate(parts):
            self.sizes.append((node.name, (1, number), part.reshape(-1)))
        return [part if part.size > 1 else self._lone(node, part) for part in parts]

    def _getitem(self, node: fx.Node) -> Labels:
        found: Any = self._read(node)
        return None if found is None else cast(Labels, found[_args(node)[1]])

    def _cat(self, node: fx.Node) -> Labels:
        parts, dim = _args(node)[0], int(_args(node)[1])
        rank = len(node.meta["shape"])
        dim %= rank
        found = [self.labels[one] for one in parts]
        if all(labels is None for labels in found):
            return None
        if any(labels is not None and labels.size > 1 and labels.shape[dim] != labels.size for labels in found):
            return self._keep(node, "pieces are put together along another dimension")
        whole = []
        for one, labels in zip(parts, found, strict=True):
            if labels is None:
                labels = self.atoms.fresh(one.meta["shape"][dim])
                self.atoms.keep(labels, f"an operand stays ({node.name})")
            whole.append(labels.reshape(-1))
        return np.concatenate(whole).reshape([-1 if d == dim else 1 for d in range(rank)])

    def _pad(self, node: fx.Node) -> Labels:
        """Padding with channels of a constant: they are atoms without a tensor, and may go with what is added."""
        labels = self._read(node)
        if labels is None:
            return None
        amounts = [int(one) for one in _args(node)[1]]
        dim = int(np.argmax(labels.shape))
        at = 2 * (labels.ndim - 1 - dim)
        before, after = amounts[at : at + 2] if at < len(amounts) else (0, 0)
        if not before and not after:
            return labels
        mode = _args(node)[2] if operator_of(node) == "pad" else "constant"
        if min(before, after) < 0 or mode != "constant":
            return self._keep(node, "channels are padded with others")
        left, right = self.atoms.fresh(before), self.atoms.fresh(after)
        self.sizes += [(node.name, (1, at), left), (node.name, (1, at + 1), right)]
        whole = np.concatenate([left, labels.reshape(-1), right])
        return whole.reshape([-1 if d == dim else 1 for d in range(labels.ndim)])

    _constant_pad_nd = _pad


def _args(node: fx.Node) -> Any:
    """The arguments, whose types torch's stubs leave open."""
    return node.args


def _flat(labels: Any) -> list[Array]:
    if isinstance(labels, list):
        return [one for part in labels for one in _flat(part)]
    return [] if labels is None else [labels]


def _aligned(labels: Array, rank: int) -> Array:
    """With ones in front, as broadcasting has it."""
    return labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))


def _sizes(node: fx.Node, rank: int) -> list[tuple[int, int]]:
    """(dimension of the result, size) of an operand's dimensions."""
    shape = node.meta["shape"]
    return [(rank - len(shape) + dim, size) for dim, size in enumerate(shape)]
