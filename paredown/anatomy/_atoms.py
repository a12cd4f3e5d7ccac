"""Atoms, the single channels that operators tell to be the same, and the labels that say which atom is where.

The coupling rules are DepGraph's (Fang et al. 2023, arXiv:2301.12900), kept per channel instead of per layer, so that a
shortcut that pads or concatenates needs no rule of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import fx

from paredown.graph import operator_of
from paredown.types import Array

Labels = Array | None  # as many dimensions as the value, of size 1 where nothing changes along them; None: no atoms
PRODUCER, CONSUMER = "producer", "consumer"


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


class Labelling:
    """The labels of every value so far, and what rules need to give the next one its own."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]):
        self.atoms = Atoms()
        self.shapes = shapes  # of the tensors, by name
        self.labels: dict[Any, Any] = {}  # of every node's value
        self.sizes: list[tuple[str, tuple[int, ...], Array]] = []  # node, place of an integer, the atoms it counts

    def read(self, node: fx.Node) -> Labels:
        """The labels of what a node reads first."""
        found: Labels = self.labels[arguments(node)[0]]
        return found

    def keep(self, node: fx.Node, why: str) -> Labels:
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

    def channels(self, node: fx.Node, one: Any, dim: int) -> Labels:
        """[C]: the atoms along one dimension of an input, which must be the only one that has any."""
        labels = self.labels[one] if isinstance(one, fx.Node) else None
        if labels is None:
            return None
        dim %= labels.ndim
        if labels.shape[dim] != labels.size:
            self.atoms.keep(labels, f"channels lie along another dimension ({node.name})")
            return None
        return np.asarray(labels.reshape(-1))

    def axis(self, node: Any, axis: int, role: str) -> Array | None:
        """The atoms of an axis of a tensor of the network; None where it is computed, and cannot be cut."""
        if not isinstance(node, fx.Node) or node.op != "get_attr":
            return None
        name = str(node.target)
        return self.atoms.of(name, axis, self.shapes[name][axis], role)

    def led(self, node: fx.Node, leaving: Array, dim: int) -> Labels:
        """The channels that a layer makes, along one dimension; a single one is none that could go."""
        if len(leaving) == 1:
            return self.lone(node, leaving)
        rank = len(node.meta["shape"])
        return leaving.reshape([-1 if d == dim % rank else 1 for d in range(rank)])

    def lone(self, node: fx.Node, labels: Array) -> Labels:
        self.atoms.keep(labels, f"a single channel ({node.name})")
        return None

    def vector(self, node: fx.Node) -> Labels:
        """A tensor of one dimension labels its positions; another, and a layer's weight, is only what its readers make
        of it.
        """
        shape = self.shapes[str(node.target)]
        if len(shape) > 1 and all(weight_of(user) is node for user in node.users):
            return None
        wide = [axis for axis, size in enumerate(shape) if size > 1]
        if len(wide) != 1:
            return None
        atoms = self.atoms.of(str(node.target), wide[0], shape[wide[0]], PRODUCER)
        return atoms.reshape([shape[axis] if axis == wide[0] else 1 for axis in range(len(shape))])


Rule = Callable[[Labelling, fx.Node], Any]  # gives the labels of a node's value, a list for one of several values


def weight_of(node: fx.Node) -> fx.Node | None:
    """What a linear layer or a convolution multiplies with, where that is a tensor of the network."""
    kind = operator_of(node) if node.op == "call_function" else ""
    weight = arguments(node)[1] if kind == "linear" or kind.startswith("conv") else None
    return weight if isinstance(weight, fx.Node) and weight.op == "get_attr" else None


def arguments(node: fx.Node) -> Any:
    """The arguments, whose types torch's stubs leave open."""
    return node.args


def aligned(labels: Array, rank: int) -> Array:
    """With ones in front, as broadcasting has it."""
    return labels.reshape([1] * (rank - labels.ndim) + list(labels.shape))


def _flat(labels: Any) -> list[Array]:
    if isinstance(labels, list):
        return [one for part in labels for one in _flat(part)]
    return [] if labels is None else [labels]
