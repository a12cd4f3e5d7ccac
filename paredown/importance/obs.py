"""Optimal brain surgeon for whole units, with the remaining weights re-fitted after every removal.

The unit whose removal raises the layer's output error least goes first; the others are updated in closed form, and so
on down to nothing. One pass gives the nested family of all widths with their errors (ZipLM, arXiv:2302.04089; the
identities, and the curvature that turns output error into divergence, are derived in Hassibi and Stork 1992 and in
Frantar and Alistarh 2022, arXiv:2208.11580).

Legend: X inputs with the bias last, D model width, U units, S inputs per unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from paredown.importance._evidence import Evidence
from paredown.types import Array

NEEDS = ("gram", "curvature")

DAMPING = 1e-2  # of the mean diagonal, as in SparseGPT and ZipLM: keeps the inverse stable with few rows
STEPS = 100  # rounds of elimination per sub-layer; removing several units jointly keeps their joint error exact


@dataclass(frozen=True)
class Elimination:
    """`order` [U]: units in the order they go. `errors` [U+1]: the error with the first k of them gone; errors[0] = 0."""

    order: Array
    errors: Array


def damped(gram: Array) -> Array:
    """The Gram matrix with its diagonal raised, the bias entry (last) left as it is; dead inputs get the mean."""
    out = gram.astype(np.float64)
    diagonal = np.diagonal(out)[:-1]
    alive = diagonal[diagonal > 0]
    extra = DAMPING * (alive.mean() if len(alive) else 1.0)
    index = np.arange(len(out) - 1)
    out[index, index] += extra
    return out


def _root(curvature: Array | None, width: int) -> Tensor:
    """L with L L' = curvature + 1e-3 of its mean diagonal; the identity without curvature."""
    if curvature is None:
        return torch.eye(width, dtype=torch.float64)
    matrix = torch.from_numpy(curvature).double()
    mean = float(matrix.diagonal().mean())
    if mean <= 0:
        return torch.eye(width, dtype=torch.float64)
    return torch.linalg.cholesky(matrix + 1e-3 * mean * torch.eye(width, dtype=torch.float64))


def eliminate(gram: Array, weight: Array, positions: Array, *, curvature: Array | None = None) -> Elimination:
    """Greedy removal of all units. `gram` [X, X], `weight` [X, D] with the bias row last, `positions` [U, S].

    Errors are sums over the rows of `gram` of e' C e, e the change of the output and C the curvature.
    Cost: about X^3 multiplications, a second for X = 1536 on two cores.
    """
    inverse = torch.linalg.inv(torch.from_numpy(damped(gram)))
    table = torch.from_numpy(positions)
    units, size = table.shape
    w = torch.from_numpy(weight.astype(np.float64)) @ _root(curvature, weight.shape[1])
    left = torch.arange(units)
    order: list[int] = []
    errors = [0.0]
    step = max(1, -(-units // STEPS))
    while len(left):
        cost = _costs(inverse, w, table[left])
        take = min(step, len(left))
        chosen = left[torch.topk(cost, take, largest=False, sorted=True).indices]
        gone = table[chosen].flatten()
        block = inverse[gone][:, gone]
        solved = torch.linalg.solve(block, torch.cat([w[gone], inverse[gone]], dim=1))
        total = float((w[gone] * solved[:, : w.shape[1]]).sum())
        column = inverse[:, gone]
        w = w - column @ solved[:, : w.shape[1]]
        inverse = inverse - column @ solved[:, w.shape[1] :]
        w[gone] = 0
        inverse[gone] = 0
        inverse[:, gone] = 0
        order += chosen.tolist()
        errors += [errors[-1] + total * (k + 1) / take for k in range(take)]
        left = left[~torch.isin(left, chosen)]
    return Elimination(np.asarray(order), np.maximum.accumulate(np.asarray(errors)))


def _costs(inverse: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """[units left]: tr(W_M' (Hinv_MM)^-1 W_M), the exact rise of the damped error when unit M goes."""
    if table.shape[1] == 1:
        index = table[:, 0]
        return w[index].square().sum(1) / inverse[index, index].clamp(min=1e-300)
    blocks = inverse[table[:, :, None], table[:, None, :]]
    rows = w[table]
    return (rows * torch.linalg.solve(blocks, rows)).sum((1, 2))


def score(evidence: Evidence) -> Array:
    """[U]: what each unit's removal adds to the error, per text, in the order of elimination.

    A later unit never scores below an earlier one (the steps are joined by a running maximum), so ranking the scores
    gives back the elimination, and the sum of those that go is the error of that width.
    """
    assert evidence.gram is not None
    weight = np.concatenate([evidence.outgoing, evidence.bias[None]])
    result = eliminate(evidence.gram, weight, evidence.positions, curvature=evidence.curvature)
    values = np.empty(len(result.order))
    values[result.order] = np.maximum.accumulate(np.diff(result.errors))
    return values / max(evidence.texts, 1)
