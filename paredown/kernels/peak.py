"""What the CPU's vector units can do at most: multiplications and additions in registers alone."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from paredown.kernels._simd import CHAINS, LANES, multiply_adds
from paredown.kernels.encoder import JIT
from paredown.kernels.program import empty

STEPS = 2_000_000


@njit(parallel=True, **JIT)
def _busy(memory, steps):
    base, stride = memory.ctypes.data, 4 * memory.shape[1]
    for thread in prange(memory.shape[0]):
        multiply_adds(base + thread * stride, steps)


def busy(threads: int) -> None:
    """Keeps so many cores multiplying and adding for tens of milliseconds."""
    memory = empty((threads, 16 * LANES))  # a cache line of its own for each
    memory[...] = np.float32(0.5)
    _busy(memory, STEPS)


def operations(threads: int) -> float:
    """The floating-point operations that `busy` takes."""
    return 2.0 * STEPS * CHAINS * LANES * threads
