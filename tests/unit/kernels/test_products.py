"""Products of the sparse kernels against dense ones: every storage, odd shapes, guard pages, several threads."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paredown.errors import ParedownError, UnsupportedModel
from paredown.kernels import _simd
from paredown.kernels.encoder import BLOCKS, DENSE, SPARSE, Weights, product, use_threads
from paredown.kernels.program import Program, aligned, empty
from paredown.types import Array

KINDS = {"rows": SPARSE, "blocks": BLOCKS, "dense": DENSE}
Place = Callable[[Array], Array]


def sparse(outputs: int, inputs: int, zeros: float, seed: int) -> Array:
    random = np.random.default_rng(seed)
    weight = random.standard_normal((outputs, inputs), dtype=np.float32)
    return weight * (random.random(weight.shape) >= zeros).astype(np.float32)


def multiplied(weight: Array, kind: int, panels: int, panel: int, threads: int, place: Place = aligned) -> float:
    """The largest error of W x + b, relative to the sum of |w x|; arrays lie where `place` puts them."""
    random = np.random.default_rng(1)
    outputs, inputs = weight.shape
    bias = random.standard_normal(outputs, dtype=np.float32)
    program = Program()
    program.matrix(np.ones((4, 3), np.float32), None, DENSE)  # so that no offset of the second is zero
    number = program.matrix(weight, bias, kind)
    weights = program.weights()
    if place is guarded:
        weights = Weights(*map(guarded, weights))
    x = place(random.standard_normal((panels, inputs, panel), dtype=np.float32))
    y = place(np.full((panels, -(-outputs // 4) * 4, panel), np.nan, np.float32))
    use_threads(threads)
    product(x, y, weights, number, threads)
    want = np.einsum("ok,pkt->pot", weight.astype(np.float64), x) + bias[:, None]
    scale = np.einsum("ok,pkt->pot", np.abs(weight).astype(np.float64), np.abs(x)) + np.abs(bias)[:, None]
    return float((np.abs(y[:, :outputs] - want) / np.maximum(scale, 1e-30)).max())


@pytest.mark.parametrize("kind", KINDS)
@given(
    st.integers(1, 70),
    st.integers(1, 500),
    st.sampled_from([0.0, 0.3, 0.8, 0.99, 1.0]),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_a_product_is_the_dense_one(
    kind: str, outputs: int, inputs: int, zeros: float, panels: int, sixteens: int, threads: int
) -> None:
    weight = sparse(outputs, inputs, zeros, outputs + inputs)
    assert multiplied(weight, KINDS[kind], panels, 16 * sixteens, threads) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_empty_rows_and_inputs_give_the_bias(kind: str) -> None:
    weight = sparse(40, 300, 0.5, 0)
    weight[::3] = 0
    weight[:, :200] = 0  # a whole part of the inputs
    assert multiplied(weight, KINDS[kind], 2, 64, 2) < 1e-6
    assert multiplied(np.zeros((8, 0), np.float32), KINDS[kind], 1, 64, 1) < 1e-6


def guarded(array: Array) -> Array:
    """A copy whose last byte is the last one before a page that nobody may touch."""
    page = mmap.PAGESIZE
    pages = max(1, -(-array.nbytes // page))
    memory = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for forbidden in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(forbidden), ctypes.c_size_t(page), 0) == 0
    held = np.frombuffer(memory, array.dtype, array.size, (pages + 1) * page - array.nbytes).reshape(array.shape)
    held[...] = array
    return held  # which holds the memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mprotect"), reason="guard pages are made by mprotect")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(4, 1), (7, 193), (36, 384), (1, 5)])
@pytest.mark.parametrize("panel", [16, 48, 64])
def test_nothing_outside_the_arrays_is_touched(kind: str, shape: tuple[int, int], panel: int) -> None:
    for zeros in (0.0, 0.7, 1.0):  # an access beyond an end would kill the process
        assert multiplied(sparse(*shape, zeros, 3), KINDS[kind], 2, panel, 2, guarded) < 1e-6


def test_blocks_are_stored_once() -> None:
    weight = np.repeat(sparse(5, 100, 0.8, 0), 4, axis=0)
    entries = int((weight[::4] != 0).sum())
    program = Program()
    program.matrix(weight, None, BLOCKS)
    assert len(program.weights().inputs) == entries
    program.matrix(weight, None, SPARSE)
    assert len(program.weights().inputs) == entries + 4 * entries


def test_memory_begins_at_a_whole_vector() -> None:
    assert all(empty((3, size)).ctypes.data % 64 == 0 for size in range(1, 40))


def test_too_many_inputs_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="65,536"):
        Program().matrix(np.zeros((1, 2**16 + 1), np.float32), None, SPARSE)


def test_an_unknown_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_simd.ASKED, "neon")
    with pytest.raises(ParedownError, match="avx512, avx2, plain"):
        _simd.level()


def test_a_level_that_the_cpu_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_simd.llvm, "get_host_cpu_features", lambda: {"avx2": True, "fma": True})
    monkeypatch.delenv(_simd.ASKED, raising=False)
    assert _simd.level() == "avx2"
    monkeypatch.setenv(_simd.ASKED, "avx512")
    with pytest.raises(ParedownError, match="no more than avx2"):
        _simd.level()
