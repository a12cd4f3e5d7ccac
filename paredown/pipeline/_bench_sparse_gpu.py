"""The same question on a GPU: torch's dense product in float16 beside its sparse ones, CSR and 2:4.

Legend: O outputs, K inputs, N tokens.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from paredown.errors import ParedownError
from paredown.pipeline._settings import Progress
from paredown.sparsity import Pattern
from paredown.types import Array
from paredown.validation.timing import Timing, latency_ratio

DENSE, CSR, SEMI = "torch dense", "torch sparse CSR", "torch 2:4"
REPEATS = 20  # calls between two looks at the GPU's clock


def on_gpu(
    sizes: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    tokens: int,
    rounds: int,
    seed: int,
    progress: Progress,
) -> list[dict[str, Any]]:
    """A row per size, engine and sparsity, as `bench_sparse` gives them; 2:4 at its own sparsity of a half.

    Raises ParedownError without a GPU of CUDA.
    """
    import torch

    if not torch.cuda.is_available():
        raise ParedownError("There is no CUDA GPU here that torch can use; leave --device at cpu.")
    rows: list[dict[str, Any]] = []
    for inputs, outputs in sizes:
        progress.stage(f"Timing {inputs} to {outputs} on the GPU", rounds)
        generator = torch.Generator("cuda").manual_seed(seed)
        weight = torch.randn(outputs, inputs, generator=generator, device="cuda", dtype=torch.float16)
        x = torch.randn(inputs, tokens, generator=generator, device="cuda", dtype=torch.float16)
        calls = products(weight, x, sparsities)
        taken = interleaved(calls, rounds, _milliseconds, progress.advance)
        rows += as_rows(taken, inputs, outputs, tokens)
    return rows


def products(weight: Any, x: Any, sparsities: Sequence[float]) -> dict[tuple[str, float], Callable[[], Any]]:
    """By engine and sparsity, the product of the weights [O, K] with zeros and x [K, N]; an engine that cannot do a
    size (2:4 wants multiples of 64) is left out.
    """
    import torch

    found: dict[tuple[str, float], Callable[[], Any]] = {}
    for sparsity in sparsities:
        pattern = Pattern()
        zeroed = weight * pattern.kept(weight.abs().float().cpu(), pattern.zeros(weight.shape, sparsity)).to(weight)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
            compressed = zeroed.to_sparse_csr()
        found[DENSE, sparsity] = lambda w=zeroed: w @ x  # type: ignore[misc]
        found[CSR, sparsity] = lambda w=compressed: w @ x  # type: ignore[misc]
    if not any(size % 64 for size in weight.shape):
        half = weight * Pattern.parse("2:4").kept(weight.abs().float().cpu(), 0).to(weight)
        semi = torch.sparse.to_sparse_semi_structured(half)
        found[DENSE, 0.5] = lambda: half @ x
        found[SEMI, 0.5] = lambda: semi @ x
    return found


def interleaved(
    calls: Mapping[tuple[str, float], Callable[[], Any]],
    rounds: int,
    clock: Callable[[Callable[[], Any]], float],
    progress: Callable[[], None],
) -> dict[tuple[str, float], Array]:
    """Milliseconds [rounds] of every call, all of them in turn in every round, after one to warm up."""
    for call in calls.values():
        clock(call)
    taken: dict[tuple[str, float], list[float]] = {key: [] for key in calls}
    for _ in range(rounds):
        for key, call in calls.items():
            taken[key].append(clock(call))
        progress()
    return {key: np.array(values) for key, values in taken.items()}


def as_rows(taken: Mapping[tuple[str, float], Array], inputs: int, outputs: int, tokens: int) -> list[dict[str, Any]]:
    """The milliseconds [rounds] by engine and sparsity as rows, against the dense product at the same sparsity."""
    rows = []
    for (engine, sparsity), values in taken.items():
        milliseconds = float(np.median(values))
        whole = 2.0 * inputs * outputs * tokens / milliseconds / 1e6
        both = ((DENSE, taken[DENSE, sparsity]), (engine, values))
        dense, own = (Timing(name, column, column[:, None], 1) for name, column in both)
        rows.append(
            {
                **{"inputs": inputs, "outputs": outputs, "engine": engine, "sparsity": sparsity},
                **{"milliseconds": milliseconds, "speedup": latency_ratio(dense, own)},
                **{"gflops": whole if engine == DENSE else whole * (1 - sparsity), "dense_gflops": whole},
                "share_of_peak": None,
            }
        )
    return rows


def _milliseconds(call: Callable[[], Any]) -> float:
    """Of one call, by the GPU's own clock."""
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(REPEATS):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / REPEATS
