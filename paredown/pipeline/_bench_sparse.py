"""Where sparsity begins to pay on this CPU: one product, dense and with zeros, by every engine, timed in turn.

Legend: O outputs, K inputs, N tokens.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from paredown.cores import cores
from paredown.errors import BadData, MissingExtra
from paredown.pipeline._bench_sparse_gpu import CSR, DENSE, on_gpu
from paredown.pipeline._settings import Progress, Silent
from paredown.sparsity import Pattern
from paredown.types import Array, canonical_json, finite
from paredown.validation import timing
from paredown.validation.machine import card

PEAK, OURS = "peak", "paredown "
WORK = 16e9  # dense operations of one timed call: a process that slept has cold caches for its first milliseconds


def bench_sparse(
    sizes: Sequence[tuple[int, int]] = ((384, 1536), (1536, 384), (768, 3072)),
    *,
    sparsities: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95),
    patterns: Sequence[str] = ("unstructured", "4x1"),
    tokens: int = 1024,
    device: str = "cpu",
    threads: int | None = None,
    rounds: int = 9,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """For each size (K, O) and sparsity, how fast W x is for `tokens` columns of x, against torch's dense product.

    A row has `milliseconds`, `speedup` with its interval, `gflops` (of weights that are not zero), `dense_gflops` (as
    if none were), and `share_of_peak`, of `gflops` in what the vector units do at most, measured in the same run.
    `breaks_even` is the least sparsity tried from which on an engine is faster than the dense one, or None. Ours works
    on panels of 64 tokens, as in a whole encoder; bringing them there is not in its time.

    On the `device` "cuda" torch's sparse products are timed instead, CSR and 2:4 in float16, and there is no peak.
    Raises BadData, MissingExtra, ParedownError without such a device.
    """
    progress = progress or Silent()
    shapes = [Pattern.parse(name) for name in patterns]
    _check(sizes, sparsities, shapes, tokens, device)
    if device == "cuda":
        found = on_gpu(sizes, sparsities, tokens, rounds, seed, progress)
        return _facts(found, sizes, device=device, tokens=tokens, threads=None, level=None)
    try:
        import numba  # noqa: F401
    except ImportError as error:
        raise MissingExtra("numba", "sparse") from error
    engines = [DENSE, CSR, *(OURS + str(pattern) for pattern in shapes), PEAK]
    own = threads or cores()
    rows: list[dict[str, Any]] = []
    peak = 0.0
    for inputs, outputs in sizes:
        progress.stage(f"Timing {inputs} to {outputs}, {len(engines)} engines in turn", rounds)
        random = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "product.npz")
            weight = random.standard_normal((outputs, inputs), dtype=np.float32)
            np.savez(path, weight=weight, x=random.standard_normal((tokens, inputs), dtype=np.float32))
            repeats = max(1, round(WORK / (2 * inputs * outputs * tokens)))
            options = {"sparsities": list(sparsities), "repeats": repeats}
            which = [{"which": np.array([i])} for i in range(len(sparsities))]
            taken = timing.measure(
                [timing.Alternative(name, f"{__name__}:load", path, {**options, "engine": name}) for name in engines],
                which[:1],
                singles=which,
                rounds=rounds,
                threads=own,
                seed=seed,
                progress=lambda done, of: progress.advance(rounds / of),
            )
        peak = max(peak, _peak(taken[PEAK], own))
        for name in engines[:-1]:
            for i, sparsity in enumerate(sparsities):
                dense, its = (_only(taken[one], i) for one in (DENSE, name))
                seconds = float(np.median(its.single_ms)) / 1e3 / repeats
                whole = 2.0 * inputs * outputs * tokens / seconds / 1e9
                done = whole if name == DENSE else whole * (1 - sparsity)
                rows.append(
                    {
                        **{"inputs": inputs, "outputs": outputs, "engine": name, "sparsity": sparsity},
                        **{"milliseconds": 1e3 * seconds, "speedup": timing.latency_ratio(dense, its)},
                        **{"gflops": done, "dense_gflops": whole},
                    }
                )
    for row in rows:
        row["share_of_peak"] = row["gflops"] / peak
    from paredown.kernels.encoder import LEVEL

    return _facts(rows, sizes, device=device, tokens=tokens, threads=own, level=LEVEL, peak_gflops=peak)


def _facts(rows: Sequence[dict[str, Any]], sizes: Sequence[tuple[int, int]], **about: Any) -> dict[str, Any]:
    engines = [name for name in dict.fromkeys(row["engine"] for row in rows) if name != DENSE]
    even = [
        {"inputs": k, "outputs": o, "engine": name, "sparsity": _breaks_even(rows, k, o, name)}
        for k, o in sizes
        for name in engines
    ]
    facts = {"rows": list(rows), "breaks_even": even, **about, "machine": card()}
    plain: dict[str, Any] = json.loads(canonical_json(finite(facts)))
    return plain


def _check(
    sizes: Sequence[tuple[int, int]], sparsities: Sequence[float], shapes: Sequence[Pattern], tokens: int, device: str
) -> None:
    if not sizes or not sparsities or not shapes or tokens < 1:
        raise BadData("There is nothing to time: name a size, a sparsity, a pattern and at least one token.")
    if any(size < 1 for pair in sizes for size in pair):
        raise BadData("A size is inputs x outputs, both above 0.")
    if device not in ("cpu", "cuda"):
        raise BadData(f"There is no device {device!r}; choose cpu or cuda.")
    if any(not 0 <= sparsity < 1 for sparsity in sparsities):
        raise BadData("A sparsity is the share of zeros: from 0 to below 1.")
    for pattern in shapes:
        if pattern.kind == "n:m":
            raise BadData(f"{pattern} says its sparsity itself; give unstructured or blocks such as 4x1.")
        for k, o in sizes:
            if not pattern.fits((o, k)):
                raise BadData(f"{k} inputs and {o} outputs do not divide into {pattern}.")


def _breaks_even(rows: Sequence[Mapping[str, Any]], inputs: int, outputs: int, engine: str) -> float | None:
    own = [row for row in rows if (row["inputs"], row["outputs"], row["engine"]) == (inputs, outputs, engine)]
    found = None
    for row in sorted(own, key=lambda row: -float(row["sparsity"])):
        if row["speedup"].value <= 1:
            break
        found = float(row["sparsity"])
    return found


def _only(taken: timing.Timing, which: int) -> timing.Timing:
    return timing.Timing(taken.name, taken.offline_seconds, taken.single_ms[:, [which]], taken.texts)


def _peak(taken: timing.Timing, threads: int) -> float:
    """GFLOP/s, of the fastest call: a peak is what can be done, not what is done at most times."""
    from paredown.kernels import peak

    return peak.operations(threads) / float(taken.single_ms.min()) / 1e6


class _Product:
    """One engine with the matrix at every sparsity; `which` of the inputs picks one."""

    def __init__(self, path: str, threads: int, engine: str, sparsities: Sequence[float], repeats: int):
        import torch

        torch.set_num_threads(threads)
        with np.load(path) as held:
            weight, x = held["weight"], held["x"]
        self._repeats, self._threads = repeats, threads
        pattern = Pattern.parse(engine.removeprefix(OURS)) if engine.startswith(OURS) else Pattern()
        kept = [_zeroed(weight, pattern, sparsity) for sparsity in sparsities]
        tokens = torch.from_numpy(x)
        self._calls: list[Any]
        if engine == DENSE:
            held_dense = [torch.from_numpy(one) for one in kept]
            self._calls = [lambda w=w: torch.nn.functional.linear(tokens, w) for w in held_dense]
        elif engine == CSR:
            columns = tokens.T.contiguous()
            rows = [torch.from_numpy(one).to_sparse_csr() for one in kept]
            self._calls = [lambda w=w: w @ columns for w in rows]
        elif engine == PEAK:
            from paredown.kernels import encoder as kernels
            from paredown.kernels import peak

            self._repeats = 1
            kernels.use_threads(threads)
            self._calls = [lambda: peak.busy(threads)] * len(kept)
        else:
            self._calls = self._ours(kept, pattern, x)

    def _ours(self, kept: Sequence[Array], pattern: Pattern, x: Array) -> list[Any]:
        from paredown.kernels import encoder as kernels
        from paredown.kernels.program import Program, aligned, empty

        program = Program()
        kind = kernels.BLOCKS if pattern.rows % 4 == 0 else kernels.SPARSE
        numbers = [program.matrix(one, None, kind) for one in kept]
        weights = program.weights()
        panels = -(-len(x) // 64)
        filled = np.pad(x, ((0, panels * 64 - len(x)), (0, 0)))
        columns = aligned(filled.reshape(panels, 64, -1).transpose(0, 2, 1))
        y = self.y = empty((panels, -(-len(kept[0]) // 4) * 4, 64))
        kernels.use_threads(self._threads)
        return [lambda n=n: kernels.product(columns, y, weights, n, self._threads) for n in numbers]

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        import torch

        call = self._calls[int(inputs["which"][0])]
        with torch.inference_mode():
            for _ in range(self._repeats):
                call()
        return {}

    def close(self) -> None:
        self._calls = []


def load(path: Path | str, *, threads: int, engine: str, sparsities: Sequence[float], repeats: int) -> _Product:
    """What `timing` calls in a process of its own for every engine."""
    return _Product(str(path), threads, engine, sparsities, repeats)


def _zeroed(weight: Array, pattern: Pattern, sparsity: float) -> Array:
    import torch

    scores = torch.from_numpy(np.abs(weight))
    stay = pattern.kept(scores, pattern.zeros((weight.shape[0], weight.shape[1]), sparsity))
    return np.ascontiguousarray(weight * stay.numpy())
