"""The weights of an encoder as the kernels read them: a few flat arrays.

Legend: O outputs, K inputs, M matrices, L layers, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from paredown.errors import UnsupportedModel
from paredown.kernels import encoder as kernels
from paredown.kernels.encoder import BLOCKS, DENSE, PART, SPARSE, Weights
from paredown.types import Array

ROWS_OF = {SPARSE: 1, BLOCKS: 4, DENSE: 4}  # outputs whose weights are stored together


@dataclass
class Program:
    """Grows by `matrix` and `vector`; `weights` gives what the kernels take."""

    matrices: list[list[int]] = field(default_factory=list)
    starts: list[Array] = field(default_factory=list)
    index: list[Array] = field(default_factory=list)
    values: list[Array] = field(default_factory=list)

    def vector(self, *parts: Array) -> int:
        """Where in the values these floats lie, one after the other."""
        place = sum(map(len, self.values))
        self.values += [np.asarray(part, dtype=np.float32).ravel() for part in parts]
        return place

    def matrix(self, weight: Array, bias: Array | None, kind: int) -> int:
        """The number of a weight matrix [O, K], stored as `kind` says; rows of zeros bring O to a multiple of 4.

        Raises UnsupportedModel for more inputs than an index can name.
        """
        weight, bias = _filled_up(weight, np.zeros(len(weight), np.float32) if bias is None else bias)
        outputs, inputs = weight.shape
        if inputs > 2**16:
            raise UnsupportedModel(f"the sparse engine takes matrices of up to 65,536 inputs; this one has {inputs:,}")
        starts, index, values = _compressed(weight, kind)
        entry = [0] * 9
        entry[kernels.KIND], entry[kernels.ROWS] = kind, ROWS_OF[kind]
        entry[kernels.OUT], entry[kernels.IN] = outputs, inputs
        entry[kernels.PARTS] = max(1, -(-inputs // PART[kind]))
        entry[kernels.STARTS] = sum(map(len, self.starts))
        entry[kernels.INDEX] = sum(map(len, self.index))
        entry[kernels.VALUES] = self.vector(values)
        entry[kernels.BIAS] = self.vector(bias)
        self.starts.append(starts)
        self.index.append(index)
        self.matrices.append(entry)
        return len(self.matrices) - 1

    def weights(self, layers: Sequence[Sequence[int]] = (), biased: Sequence[Sequence[int]] = ()) -> Weights:
        """What the kernels take. A layer has the columns of `kernels.encoder`; `biased` names its heads' biases."""
        starts, index, values = (
            np.concatenate(part) if part else np.zeros(0) for part in (self.starts, self.index, self.values)
        )
        heads = np.zeros((len(biased), max([1, *map(len, biased)])), np.int64)
        for row, own in zip(heads, biased, strict=True):
            row[: len(own)] = own
        return Weights(
            np.array(self.matrices, dtype=np.int64).reshape(-1, 9),
            starts.astype(np.int64),
            index.astype(np.uint16),
            aligned(values),
            np.array(layers, dtype=np.int64).reshape(-1, 7),
            heads,
        )


def _filled_up(weight: Array, bias: Array) -> tuple[Array, Array]:
    more = -len(weight) % 4
    return np.pad(weight, ((0, more), (0, 0))), np.pad(bias, (0, more))


def _compressed(weight: Array, kind: int) -> tuple[Array, Array, Array]:
    """Part by part of the inputs, group by group of outputs: where entries begin, their inputs, their values [entries,
    rows of a group]. An entry is an input of which one of the group's weights is not zero; of a dense one, any input.
    """
    (outputs, inputs), rows, size = weight.shape, ROWS_OF[kind], PART[kind]
    groups = weight.reshape(outputs // rows, rows, inputs).transpose(0, 2, 1)  # [groups, K, rows]
    here = np.ones(groups.shape[:2], bool) if kind == DENSE else (groups != 0).any(2)
    starts, index, values, done = [], [], [], 0
    for begin in range(0, max(1, inputs), size):
        part = here[:, begin : begin + size]
        counts = np.concatenate([[0], part.sum(1).cumsum()])
        starts.append(done + counts)
        done += int(counts[-1])
        index.append(np.nonzero(part)[1] + begin)
        values.append(groups[:, begin : begin + size][part].ravel())
    return np.concatenate(starts), np.concatenate(index), np.concatenate(values)


def aligned(values: Array) -> Array:
    """A float32 copy that begins at a multiple of 64 bytes."""
    found = empty(values.shape)
    found[...] = values
    return found


def empty(shape: tuple[int, ...]) -> Array:
    """Zeros [shape] float32 that begin at a multiple of 64 bytes."""
    size = int(np.prod(shape))
    raw = np.zeros(size + 16, dtype=np.float32)
    offset = (-raw.ctypes.data % 64) // 4
    return raw[offset : offset + size].reshape(shape)
