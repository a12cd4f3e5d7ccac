"""How much of each matrix is zero, so that of all of them together the asked share is.

Legend: O outputs, K inputs, S sparsities tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from paredown import registry
from paredown.calibration import Batch
from paredown.errors import ParedownError, UnsupportedModel
from paredown.network import Network
from paredown.sparsity._pattern import Pattern
from paredown.sparsity._solve import loss_of, matrices_of, matrix, streamed
from paredown.types import Array

ALLOCATIONS = ("uniform", "global", "owl", "measured")
OUTLIER, SPREAD = 5.0, 0.08  # M and lambda of OWL, as published
TRIED = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)  # sparsities at which a matrix's error is measured
MOST = 0.98  # of a matrix: what has no weights left passes nothing on


def allocate(
    dense: Network, sparsity: float, pattern: Pattern, batches: Sequence[Batch], *, how: str = "uniform"
) -> dict[str, float]:
    """By name, the share of zeros of every matrix that divides into the pattern; weighted by size they make `sparsity`.

    "uniform": the same everywhere. "global": one threshold on the weights of all matrices. "owl": layers with outliers
    keep more (Yin et al. 2024, arXiv:2310.05175, section 3.2). "measured": zeros go where they cost the output of their
    matrix least, as a share of it, by Wanda's choice on the batches. Raises ParedownError for another word, and for
    n:m with another one than "uniform"; UnsupportedModel where nothing divides.
    """
    if how not in ALLOCATIONS:
        raise ParedownError(f"There is no allocation {how!r}; there are {', '.join(ALLOCATIONS)}.")
    if pattern.kind == "n:m" and how != "uniform":
        raise ParedownError(f"{pattern} has the same share of zeros everywhere: leave the allocation at uniform.")
    found = {name: matrix(part) for name, part in matrices_of(dense.model, dense.layout).items()}
    weights = {n: w for n, w in found.items() if w.numel() and pattern.fits((w.shape[0], w.shape[1]))}
    if not weights:
        raise UnsupportedModel(f"no matrix of this model divides into {pattern}")
    sizes = np.array([weight.numel() for weight in weights.values()], dtype=np.float64)
    seen = streamed(dense, list(weights), batches)
    if how == "uniform":
        shares = np.full(len(weights), sparsity)
    elif how == "global":
        shares = _global(weights, sparsity, pattern)
    elif how == "owl":
        shares = _owl(dense, weights, sparsity, sizes, seen)
    else:
        shares = _least_error(_errors(weights, pattern, seen), sizes, sparsity)
    return dict(zip(weights, _within(shares, sizes, sparsity).tolist(), strict=True))


def _global(weights: Mapping[str, Tensor], sparsity: float, pattern: Pattern) -> Array:
    """The share of each matrix's weights, or blocks, that are below the threshold which that share of all is below."""
    scores = [
        weight.abs().unflatten(0, (-1, pattern.rows)).unflatten(2, (-1, pattern.columns)).sum((1, 3)).flatten()
        for weight in weights.values()
    ]
    threshold = np.quantile(torch.cat(scores).numpy(), sparsity)
    return np.array([float((one < threshold).double().mean()) for one in scores])


def _owl(
    dense: Network,
    weights: Mapping[str, Tensor],
    sparsity: float,
    sizes: Array,
    seen: Iterator[tuple[str, Tensor]],
) -> Array:
    """sparsity + SPREAD at the layer with fewest outliers to sparsity - SPREAD at that with most, an outlier being a
    |W_ij| |x_j| above OUTLIER times their mean over the layer.
    """
    prefix = f"{dense.layout.layers}."
    layers = np.array([int(name.removeprefix(prefix).partition(".")[0]) for name in weights])
    products: dict[int, list[Tensor]] = {}
    for (name, gram), layer in zip(seen, layers, strict=True):
        products.setdefault(int(layer), []).append((weights[name].double().abs() * gram.diagonal().sqrt()).flatten())
    outliers = np.zeros(len(layers))
    for layer, parts in products.items():
        every = torch.cat(parts)
        outliers[layers == layer] = float((every > OUTLIER * every.mean()).double().mean())
    span = float(np.ptp(outliers))
    ratio = 2 * SPREAD * (outliers - outliers.min()) / span if span > 0 else np.zeros(len(layers))
    return np.asarray(sparsity - (ratio - np.average(ratio, weights=sizes)))


def _errors(weights: Mapping[str, Tensor], pattern: Pattern, seen: Iterator[tuple[str, Tensor]]) -> Array:
    """[matrices, S]: what each matrix's output loses as a share of it at the sparsities of TRIED."""
    solve: Callable[..., Tensor] = registry.find("sparsity", "wanda").solve
    found = []
    for name, gram in seen:
        weight = weights[name]
        shape = (weight.shape[0], weight.shape[1])
        tried = (solve(weight, gram, pattern, pattern.zeros(shape, share)) for share in TRIED)
        found.append([loss_of(weight, one, gram) for one in tried])
    return np.maximum.accumulate(np.array(found), axis=1)


def _least_error(errors: Array, sizes: Array, sparsity: float) -> Array:
    """The shares of least total error [matrices]: the next zeros always go where they cost least per weight, which is
    exact on the lower convex hull of each matrix's curve (errors [matrices, S] at TRIED).
    """
    steps: list[tuple[float, int, float, float]] = []  # price of a weight, matrix, from which share to which
    for i, row in enumerate(errors):
        hull = _hull([(0.0, 0.0), *zip(TRIED, row.tolist(), strict=True)])
        steps += [((e1 - e0) / ((s1 - s0) * sizes[i]), i, s0, s1) for (s0, e0), (s1, e1) in zip(hull, hull[1:])]  # noqa: B905
    left = sparsity * float(sizes.sum())
    shares = np.zeros(len(sizes))
    for _, i, begin, end in sorted(steps):
        taken = min(left, (end - begin) * float(sizes[i]))
        shares[i] += taken / sizes[i]
        left -= taken
    return shares


def _hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The lower convex hull of points by rising first coordinate."""
    hull: list[tuple[float, float]] = []
    for x, y in points:
        while len(hull) > 1 and (hull[-1][1] - hull[-2][1]) * (x - hull[-2][0]) >= (y - hull[-2][1]) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((x, y))
    return hull


def _within(shares: Array, sizes: Array, sparsity: float) -> Array:
    """The shares cut to [0, MOST] (or to a larger `sparsity`), what is cut off spread over the others."""
    most = max(MOST, sparsity)
    for _ in range(len(shares) + 1):
        shares = np.clip(shares, 0.0, most)
        short = sparsity - float(np.average(shares, weights=sizes))
        free = shares < most if short > 0 else shares > 0
        if abs(short) < 1e-12 or not free.any():
            break
        shares = shares + np.where(free, short * sizes.sum() / sizes[free].sum(), 0.0)
    return shares
