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
from scipy.optimize import isotonic_regression
from torch import Tensor

from paredown.importance._evidence import Evidence
from paredown.types import Array

UNITS = ("head", "neuron", "channel")
NEEDS = ("gram", "curvature")

DAMPING = 1e-2  # of the mean diagonal, as in SparseGPT and ZipLM: keeps the inverse stable with few rows
STEPS = 100  # rounds of elimination per sub-layer; removing several units jointly keeps their joint error exact


@dataclass(frozen=True)
class Elimination:
    """`order` [U]: units in the order they go. `errors` [U+1]: the error without the first k of them; errors[0] = 0."""

    order: Array
    errors: Array


def damped(gram: Array) -> Array:
    """The Gram matrix [X, X] with its diagonal raised, except the bias entry (last)."""
    out = gram.astype(np.float64)
    diagonal = np.diagonal(out)[:-1]
    alive = diagonal[diagonal > 0]
    index = np.arange(len(out) - 1)
    out[index, index] += DAMPING * (alive.mean() if len(alive) else 1.0)
    out[-1, -1] = out[-1, -1] or 1.0  # no rows at all
    return out


def _root(curvature: Array | None, width: int) -> Tensor:
    """L with L L' = curvature + 1e-3 of its mean diagonal; the identity without curvature."""
    identity = torch.eye(width, dtype=torch.float64)
    matrix = identity if curvature is None else torch.from_numpy(curvature).double()
    mean = float(matrix.diagonal().mean())
    if curvature is None or mean <= 0:
        return identity
    return _cholesky(matrix + 1e-3 * mean * identity)


def _cholesky(matrix: Tensor) -> Tensor:
    root: Tensor = torch.linalg.cholesky(matrix)
    return root


def eliminate(gram: Array, weight: Array, positions: Array, *, curvature: Array | None = None) -> Elimination:
    """Greedy removal of all units. `gram` [X, X], `weight` [X, D] with the bias row last, `positions` [U, S].

    Errors are sums over the rows of `gram` of e' C e, e the change of the output and C the curvature, plus the damping
    of the change of the weights. With more than 100 units several go at once: the errors are exact where a round ends,
    and shared out inside it by the units' own costs. Inputs that are always zero carry nothing, whatever their weights.
    Cost: about X^3 multiplications; on one core 0.7 s for X = 1536 and 7 s for X = 3072, measured.
    """
    dead = torch.from_numpy(np.diagonal(gram) <= 0)
    scaled = torch.from_numpy(damped(gram))
    scale = float(scaled.diagonal()[:-1].mean()) if len(scaled) > 1 else 1.0
    inverse = torch.cholesky_inverse(_cholesky(scaled / scale))
    w = torch.from_numpy(weight.astype(np.float64)).masked_fill(dead[:, None], 0.0) @ _root(curvature, weight.shape[1])
    table = torch.from_numpy(np.ascontiguousarray(positions))  # of the units left, in rows of what is left of `inverse`
    left = torch.arange(len(table))
    order: list[int] = []
    errors = [0.0]
    step = max(1, -(-len(table) // STEPS))
    while len(left):
        costs = _costs(inverse, w, table)
        taken = torch.topk(costs, min(step, len(left)), largest=False, sorted=True)
        gone = table[taken.indices].flatten()
        rows = _others(len(inverse), gone)
        across = inverse[gone]
        solved = torch.linalg.solve(across[:, gone], torch.cat([w[gone], across[:, rows]], dim=1))
        rise = max(float((w[gone] * solved[:, : w.shape[1]]).sum()), 0.0)
        column = across[:, rows].T
        w = w[rows].addmm_(column, solved[:, : w.shape[1]], alpha=-1)
        inverse = inverse[rows][:, rows].addmm_(column, solved[:, w.shape[1] :], alpha=-1)
        total = float(taken.values.sum())
        part = taken.values.cumsum(0) / total if total > 0 else torch.linspace(1 / len(gone), 1, len(taken.values))
        errors += [errors[-1] + rise * float(share) for share in part]
        order += left[taken.indices].tolist()
        stay = _others(len(left), taken.indices)
        left, table = left[stay], torch.searchsorted(rows, table[stay])
    return Elimination(np.asarray(order, dtype=np.int64), np.asarray(errors) * scale)


def _others(count: int, gone: Tensor) -> Tensor:
    """The indices below `count` that are not among those that go, in order."""
    keep = torch.ones(count, dtype=torch.bool)
    keep[gone] = False
    return keep.nonzero()[:, 0]


def _costs(inverse: Tensor, w: Tensor, table: Tensor) -> Tensor:
    """[units left]: tr(W_M' (Hinv_MM)^-1 W_M), the exact rise of the damped error when unit M goes."""
    rows = w[table]
    if table.shape[1] == 1:
        index = table[:, 0]
        return rows[:, 0].square().sum(1) / inverse[index, index].clamp(min=1e-300)
    blocks = inverse[table[:, :, None], table[:, None, :]]
    costs: Tensor = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2)).clamp(min=0)
    return costs


def score(evidence: Evidence) -> Array:
    """[U]: what each unit's removal adds to the error, per text, in the order of elimination.

    A later unit always scores above an earlier one, so ranking the scores gives back the elimination. Where a removal
    costs less than the one before it, both get their mean (isotonic regression): the sum of those that go is the error
    of that width, or just below it inside such a run.
    """
    assert evidence.gram is not None
    weight = np.concatenate([evidence.outgoing, evidence.bias[None]])
    result = eliminate(evidence.gram, weight, evidence.positions, curvature=evidence.curvature)
    rising = isotonic_regression(np.diff(result.errors)).x
    rising += np.arange(len(rising)) * 1e-12 * rising[-1]  # ties would lose the order
    values = np.empty(len(rising))
    values[result.order] = rising
    return values / max(evidence.texts, 1)
