"""The kernels' own tests once more for every width of vectors that this CPU has, compiled anew, on four threads, with
an allocator that overwrites what is given back: memory that is read after that is seen.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from paredown.kernels import _simd

HERE = Path(__file__).parent
OVERWRITTEN = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0:glibc.malloc.perturb=85"}  # any other libc ignores it
TESTS = [HERE / "test_products.py", HERE.parent / "targets" / "test_sparse_cpu.py"]
WIDEST = _simd.LEVELS[_simd.level()]


@pytest.mark.parametrize("level", [name for name, lanes in _simd.LEVELS.items() if lanes <= WIDEST])
def test_a_level_computes_the_same(level: str) -> None:
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, TESTS)],
        env={**own, **OVERWRITTEN, _simd.ASKED: level, "NUMBA_NUM_THREADS": "4"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
