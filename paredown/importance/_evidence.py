"""What a criterion may look at: matrices with a row per input of the output projection, or figures between places of
the residual stream; never a layer.

Legend: X inputs of the output projection, D model width, U units, S inputs per unit, Z producers' entries per unit,
P places of the stream.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np

from paredown.types import Array


@dataclass(frozen=True)
class Evidence:
    """Of one group of heads or neurons; None where the criterion does not ask for it.

    `positions` [U, S] says which inputs each unit owns; `outgoing` [X, D] are its weights, `bias` [D]. `incoming`
    [U, Z] are the producers' entries of each unit. `gram`, `curvature`, `moments` and `gates` are those of
    `paredown.calibration.Statistics`, over `rows` tokens of `texts` texts; the two gradients have the shapes of the
    weights. `attention` [2, U]: of each head, 1 - entropy / log T and the largest probability, means over rows.
    `learned` [U]: a gate on each unit after some steps of training. `ablated` [U]: what the answers lose without it.
    `scale` [U]: of channels, what the norms behind them multiply with, where there are any.
    """

    positions: Array
    outgoing: Array
    bias: Array
    incoming: Array
    rows: int = 0
    texts: int = 0
    seed: int = 0
    gram: Array | None = None
    curvature: Array | None = None
    moments: Array | None = None
    gates: Array | None = None
    incoming_gradients: Array | None = None
    outgoing_gradients: Array | None = None
    attention: Array | None = None
    learned: Array | None = None
    ablated: Array | None = None
    scale: Array | None = None

    @property
    def alive(self) -> Array:
        """[U]: whether anything reads the unit."""
        return np.asarray(np.abs(self.outgoing[self.positions]).sum(axis=(1, 2)) > 0)


@dataclass(frozen=True)
class Streams:
    """How the residual stream differs between its P places: before each sub-layer, and after the last; all [P, P].

    `cosine`: mean over tokens of the cosine. `flat_cosine`: mean over texts of the cosine of all of a text's tokens as
    one vector. `angle`: mean over texts of arccos(cosine) / pi. `change`: mean over tokens of |x_q - x_p| / |x_p|.
    """

    cosine: Array
    flat_cosine: Array
    angle: Array
    change: Array


@dataclass(frozen=True)
class DepthEvidence:
    """Of U pieces of a model's depth, its layers or its sub-layers: piece u lies between places[u] and places[u + 1].

    `removed(pieces)` is the divergence from the dense model without some of them. `drop` pieces are meant to go.
    """

    places: Array
    drop: int
    seed: int = 0
    streams: Streams | None = None
    removed: Callable[[Collection[int]], float] | None = None

    def between(self, table: Array) -> Array:
        """[U]: the entries of a [P, P] table from before each piece to behind it."""
        return np.asarray(table[self.places[:-1], self.places[1:]])
