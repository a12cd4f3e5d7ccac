"""What a criterion may look at: matrices with one row per input of the output projection, never a layer.

Legend: X inputs of the output projection, D model width, U units, S inputs per unit.
"""

from __future__ import annotations

from dataclasses import dataclass

from paredown.types import Array


@dataclass(frozen=True)
class Evidence:
    """`positions` [U, S] says which inputs each unit owns; `outgoing` [X, D] are its weights, `bias` [D].

    `incoming` [U, Z] are the producers' entries of each unit. `gram`, `curvature` and `gradients` are those of
    `paredown.calibration.Statistics`.
    """

    positions: Array
    outgoing: Array
    bias: Array
    incoming: Array
    gram: Array | None = None
    curvature: Array | None = None
    gradients: Array | None = None
    texts: int = 0
    seed: int = 0
