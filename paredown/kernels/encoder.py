"""A whole text encoder as one call: sparse and dense products, attention, norms, all on one layout, on all cores.

Activations lie in panels of P tokens, [panel, features, P]: a weight is multiplied with the P tokens of a feature at
once, whether its neighbours are zeros or not; layer norm and softmax run down the features or the keys, a vector of
tokens at a time; nothing is transposed between layers. Texts follow each other without padding.

Legend: N tokens, B texts, O outputs, K inputs, D model width, H heads, P tokens of a panel.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
from numba import config, njit, prange, set_num_threads

from paredown.kernels import _simd
from paredown.kernels._simd import LANES, moved, normed, scaled, softmax
from paredown.types import Array

SPARSE, BLOCKS, DENSE = 0, 1, 2  # how a matrix is stored: by rows, by 4 x 1 blocks, whole in groups of 4 rows
KIND, ROWS, OUT, IN, PARTS, STARTS, INDEX, VALUES, BIAS = range(9)  # columns of the table of matrices
QKV, PROJECT, UP, DOWN, HEADS, NORM, FFN_NORM = range(7)  # columns of the table of layers
# Inputs of a product at a time. 192 with 64 tokens each are what the L1 cache holds; the fewer of them a row reads, the
# less they matter beside going over the outputs once more.
PART = {SPARSE: 256, BLOCKS: 384, DENSE: 192}
_DENSE_PART = PART[DENSE]
QUERIES = 64  # of a head whose attention is held at a time
ALIGNED = 4  # a text begins at a multiple of so many tokens, so that four keys lie side by side
GELU, GELU_TANH, RELU, SILU = range(4)


class Weights(NamedTuple):
    """What a `Program` holds: matrices [M, 9]; where their entries begin, inputs, values; which matrices and vectors
    make a layer, layers [L, 7]; biased [L, H], which head's position bias is added to a head's scores.
    """

    matrices: Array
    table: Array
    inputs: Array
    values: Array
    layers: Array
    biased: Array


class Room(NamedTuple):
    """Memory to work in: x, y [panels, D, P]; qkv [panels, 3*H*K + 4, P] and mid [panels or threads, F, P] for the
    widest layer; scratch [threads, floats], beginning with LANES zeros.
    """

    x: Array
    y: Array
    qkv: Array
    mid: Array
    scratch: Array


def use_threads(threads: int) -> None:
    """So many cores from here on, where numba's pool has them."""
    set_num_threads(min(threads, int(config.NUMBA_NUM_THREADS)))  # type: ignore[attr-defined]


def scratch_floats(size: int, longest: int) -> int:
    """The floats that attention needs of a thread's memory, for heads of `size` and texts of up to so many tokens."""
    return LANES + (2 * size + longest + ALIGNED + 5) * QUERIES


_one1, _one2, _one4, _one8 = (_simd.products(1, n, indexed=True) for n in (1, 2, 4, 8))
_four1, _four2, _four4 = (_simd.products(4, n, indexed=True) for n in (1, 2, 4))
_all1, _all2, _all4 = (_simd.products(4, n, indexed=False) for n in (1, 2, 4))
LEVEL = _simd.LEVEL  # of vector instructions that all here is made for
_WIDE = LEVEL == "avx512"  # 32 registers: four rows by four vectors of sums fit
_gelu, _gelu_tanh, _relu, _silu = _simd.gelu, _simd.gelu_tanh, _simd.relu, _simd.silu

# What is compiled is kept on disk, but not for a level that was asked for: the key knows the CPU, not the level.
JIT: dict[str, Any] = {
    **{"cache": not os.environ.get(_simd.ASKED), "error_model": "numpy"},
    **{"boundscheck": False, "nogil": True},
}


# With its types stated it is compiled once, not for every kind of integer that it is called with: seconds each.
@njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8, i8, i8, i8)", **JIT)
def _multiply(matrix, starts, index, values, x, y, add, first, last, step):
    """Rows `first` to `last` (multiples of 4) of y = W x + bias (+ add) for one panel, by the addresses of x and y."""
    kind, outputs, parts = matrix[KIND], matrix[OUT], matrix[PARTS]
    rows = matrix[ROWS]
    groups = outputs // rows
    tokens = step // (4 * LANES)
    weights = values + 4 * matrix[VALUES]
    bias = values + 4 * matrix[BIAS]
    across, down = 4 * rows, 4
    for part in range(parts):
        table = matrix[STARTS] + part * (groups + 1)
        xs = x + part * _DENSE_PART * step if kind == DENSE else x
        for group in range(first // rows, last // rows):
            begin = starts[table + group]
            count = starts[table + group + 1] - begin
            if part and not count:
                continue
            at, own = index + 2 * (matrix[INDEX] + begin), weights + 4 * rows * begin
            row = y + group * rows * step
            b = 0 if part else bias + 4 * rows * group
            a = 0 if part or not add else add + group * rows * step
            v = 0
            while v < tokens:
                o = v * 4 * LANES
                left = tokens - v
                extra = a + o if a else 0
                if kind == SPARSE:
                    if left >= 8:
                        _one8(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 8
                    elif left >= 4:
                        _one4(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 4
                    elif left >= 2:
                        _one2(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 2
                    else:
                        _one1(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 1
                elif kind == BLOCKS:
                    if _WIDE and left >= 4:
                        _four4(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 4
                    elif left >= 2:
                        _four2(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 2
                    else:
                        _four1(xs + o, step, at, own, across, down, count, row + o, step, b, extra)
                        v += 1
                elif _WIDE and left >= 4:
                    _all4(xs + o, step, 0, own, across, down, count, row + o, step, b, extra)
                    v += 4
                elif left >= 2:
                    _all2(xs + o, step, 0, own, across, down, count, row + o, step, b, extra)
                    v += 2
                else:
                    _all1(xs + o, step, 0, own, across, down, count, row + o, step, b, extra)
                    v += 1


@njit(**JIT)
def _activate(activation, x, vectors):
    if activation == GELU:
        _gelu(x, vectors)
    elif activation == GELU_TANH:
        _gelu_tanh(x, vectors)
    elif activation == RELU:
        _relu(x, vectors)
    else:
        _silu(x, vectors)


@njit(**JIT)
def _norm(x, step, width, weight, constants):
    """Layer norm of one panel in place; weight [width] and bias [width] follow each other."""
    for v in range(step // (4 * LANES)):
        normed(x + v * 4 * LANES, step, width, weight, weight + 4 * width, constants)


@njit(**JIT)
def _attention(qkv, start, count, wanted, head, heads, size, bias, biased, scratch):
    """One head of one text, of the first `wanted` of its tokens: in qkv [panels, 3*H*K, P] what the head gives takes
    the place of its queries, which are scaled. `bias` [H, T, T] is added to its scores, of head `biased`.
    """
    panel = qkv.shape[2]
    step = 4 * panel
    stride = qkv.shape[1] * step
    base = qkv.ctypes.data
    q0, k0, v0 = head * size, (heads + head) * size, (2 * heads + head) * size
    whole = (size + 3) // 4 * 4  # rows of values are multiplied by four: what is too much is not read
    zero, free = scratch.ctypes.data, scratch[LANES:]  # the first of a thread's floats are zeros
    queries = free[: size * QUERIES].reshape(size, QUERIES)
    scores = free[size * QUERIES : (size + count + ALIGNED) * QUERIES].reshape(count + ALIGNED, QUERIES)
    end = (size + count + ALIGNED) * QUERIES
    found = free[end : end + whole * QUERIES].reshape(whole, QUERIES)
    inverse = free[end + whole * QUERIES :]
    qa, sa, ca, ia = queries.ctypes.data, scores.ctypes.data, found.ctypes.data, inverse.ctypes.data
    row = 4 * QUERIES
    for begin in range(0, wanted, QUERIES):
        many = min(QUERIES, wanted - begin)
        vectors = (many + LANES - 1) // LANES
        i = 0
        while i < many:
            token = start + begin + i
            length = min(many - i, panel - token % panel)
            held = base + (token // panel) * stride + q0 * step + 4 * (token % panel)
            moved(held, step, qa + 4 * i, row, size, (length + ALIGNED - 1) // ALIGNED)
            i += length
        for d in range(size):
            for t in range(many, vectors * LANES):
                queries[d, t] = 0.0
        for j in range(0, count, ALIGNED):
            token = start + j
            keys = base + (token // panel) * stride + k0 * step + 4 * (token % panel)
            v = 0
            while v < vectors:
                o = v * 4 * LANES
                if _WIDE and vectors - v >= 4:
                    _all4(qa + o, row, 0, keys, step, 4, size, sa + j * row + o, row, zero, 0)
                    v += 4
                elif vectors - v >= 2:
                    _all2(qa + o, row, 0, keys, step, 4, size, sa + j * row + o, row, zero, 0)
                    v += 2
                else:
                    _all1(qa + o, row, 0, keys, step, 4, size, sa + j * row + o, row, zero, 0)
                    v += 1
        if bias.shape[0]:
            for j in range(count):
                for t in range(many):
                    scores[j, t] += bias[biased, begin + t, j]
        for v in range(vectors):
            softmax(sa + v * 4 * LANES, row, count, ia + v * 4 * LANES)
        for d in range(0, whole, 4):
            j = 0
            while j < count:
                token = start + j
                lane = token % panel
                length = min(count - j, panel - lane)
                held = base + (token // panel) * stride + (v0 + d) * step + 4 * lane
                v = 0
                while v < vectors:
                    o = v * 4 * LANES
                    fresh = 0 if j else zero
                    if _WIDE and vectors - v >= 4:
                        _all4(sa + j * row + o, row, 0, held, 4, step, length, ca + d * row + o, row, fresh, 0)
                        v += 4
                    elif vectors - v >= 2:
                        _all2(sa + j * row + o, row, 0, held, 4, step, length, ca + d * row + o, row, fresh, 0)
                        v += 2
                    else:
                        _all1(sa + j * row + o, row, 0, held, 4, step, length, ca + d * row + o, row, fresh, 0)
                        v += 1
                j += length
        for v in range(vectors):
            scaled(ca + v * 4 * LANES, row, size, ia + v * 4 * LANES)
        i = 0
        while i < many:
            token = start + begin + i
            length = min(many - i, panel - token % panel)
            held = base + (token // panel) * stride + q0 * step + 4 * (token % panel)
            moved(ca + 4 * i, row, held, step, size, (length + ALIGNED - 1) // ALIGNED)
            i += length


@njit(**JIT)
def _splits(panels, threads, rows):
    """Into how many parts a product's rows are cut so that all threads have work: one where panels are enough."""
    return 1 if panels >= threads else max(1, min((threads + panels - 1) // panels, rows // 32))


@njit(**JIT)
def _chunk(rows, splits):
    return (rows + 4 * splits - 1) // (4 * splits) * 4


@njit("void(i8[::1], i8[::1], i8, i8, i8, i8, i8, i8, i8, i8, i8, i8)", parallel=True, **JIT)
def _panels(matrix, starts, index, values, x, wide, y, out, add, panels, threads, step):
    """`_multiply` of so many panels, which are `wide` bytes apart in x and `out` bytes in y and in what is added."""
    splits = _splits(panels, threads, matrix[OUT])
    rows = _chunk(matrix[OUT], splits)
    for task in prange(panels * splits):
        p, s = task // splits, task % splits
        begin, end = min(s * rows, matrix[OUT]), min((s + 1) * rows, matrix[OUT])
        more = add + p * out if add else 0
        _multiply(matrix, starts, index, values, x + p * wide, y + p * out, more, begin, end, step)


@njit(**JIT)
def product(x, y, weights, number, threads):
    """y [panels, O, P] = W x + bias of the matrix of that number, for x [panels, K, P]; O as the `Program` has it."""
    step = 4 * x.shape[2]
    ia, va = weights.inputs.ctypes.data, weights.values.ctypes.data
    own, out = x.shape[1] * step, y.shape[1] * step
    matrix = weights.matrices[number]
    _panels(matrix, weights.table, ia, va, x.ctypes.data, own, y.ctypes.data, out, 0, x.shape[0], threads, step)


@njit(**JIT)
def _gathered(x, qkv, starts, heads, size):
    """The first token of text b becomes token b: of the stream in place, of the heads' outputs where keys were."""
    panel = x.shape[2]
    for b in range(starts.shape[0]):
        p, lane = starts[b] // panel, starts[b] % panel
        to, place = b // panel, b % panel
        for f in range(x.shape[1]):
            x[to, f, place] = x[p, f, lane]
        for f in range(heads * size):
            qkv[to, heads * size + f, place] = qkv[p, f, lane]


@njit(parallel=True, **JIT)
def forward(room, weights, starts, counts, size, activation, constants, first_only, bias):
    """The stream behind the last layer, in the memory of `room.x`; with `first_only` that of the first token of every
    text alone, token b for text b.

    `starts`, `counts` [B]: where a text's tokens lie; `size` of a head; `constants` [2] of layer norm: one over the
    width, epsilon; `bias` [H, T, T], or empty. All of it is read by its address and therefore the caller's to hold: an
    array made in here would be given back as soon as its address is taken.
    """
    x, y, qkv, mid, scratch = room
    matrices, table, index, values, layers, biased = weights
    panels, width, panel = x.shape
    step = 4 * panel
    vectors = panel // LANES
    ia, va = index.ctypes.data, values.ctypes.data
    xa, ya, qa, ma = x.ctypes.data, y.ctypes.data, qkv.ctypes.data, mid.ctypes.data
    stream, qstride, mstride = width * step, qkv.shape[1] * step, mid.shape[1] * step
    ca = constants.ctypes.data
    threads = scratch.shape[0]
    for number in range(layers.shape[0]):
        layer = layers[number]
        heads = layer[HEADS]
        project, up, down = matrices[layer[PROJECT]], matrices[layer[UP]], matrices[layer[DOWN]]
        norm, ffn_norm = va + 4 * layer[NORM], va + 4 * layer[FFN_NORM]
        context = qa
        if heads:
            matrix = matrices[layer[QKV]]
            _panels(matrix, table, ia, va, xa, stream, qa, qstride, 0, panels, threads, step)
            last = first_only and number == layers.shape[0] - 1
            for thread in prange(threads):
                for task in range(thread, counts.shape[0] * heads, threads):
                    text, head = task // heads, task % heads
                    start, count, wanted = starts[text], counts[text], min(1, counts[text]) if last else counts[text]
                    own = biased[number, head]
                    _attention(qkv, start, count, wanted, head, heads, size, bias, own, scratch[thread])
        if first_only and number == layers.shape[0] - 1:
            _gathered(x, qkv, starts, heads, size)
            context = qa + heads * size * step
            panels = (counts.shape[0] + panel - 1) // panel
        if panels >= threads:
            for thread in prange(threads):
                ms = ma + thread * mstride
                for p in range(panels * thread // threads, panels * (thread + 1) // threads):
                    xs, ys = xa + p * stream, ya + p * stream
                    _multiply(project, table, ia, va, context + p * qstride, ys, xs, 0, width, step)
                    _norm(ys, step, width, norm, ca)
                    _multiply(up, table, ia, va, ys, ms, 0, 0, up[OUT], step)
                    _activate(activation, ms, up[OUT] * vectors)
                    _multiply(down, table, ia, va, ms, xs, ys, 0, width, step)
                    _norm(xs, step, width, ffn_norm, ca)
            continue
        _panels(project, table, ia, va, context, qstride, ya, stream, xa, panels, threads, step)
        for p in range(panels):
            _norm(ya + p * stream, step, width, norm, ca)
        splits = _splits(panels, threads, up[OUT])
        rows = _chunk(up[OUT], splits)
        for task in prange(panels * splits):
            p, s = task // splits, task % splits
            begin, end = min(s * rows, up[OUT]), min((s + 1) * rows, up[OUT])
            _multiply(up, table, ia, va, ya + p * stream, ma + p * mstride, 0, begin, end, step)
            _activate(activation, ma + p * mstride + begin * step, (end - begin) * vectors)
        _panels(down, table, ia, va, ma, mstride, xa, stream, ya, panels, threads, step)
        for p in range(panels):
            _norm(xa + p * stream, step, width, ffn_norm, ca)


@njit(parallel=True, **JIT)
def packed(stream, starts, counts, x):
    """The tokens of padded texts [B, T, D] into panels."""
    panel = x.shape[2]
    for b in prange(starts.shape[0]):
        for t in range(counts[b]):
            p, lane = (starts[b] + t) // panel, (starts[b] + t) % panel
            for f in range(x.shape[1]):
                x[p, f, lane] = stream[b, t, f]


@njit(parallel=True, fastmath={"reassoc"}, **JIT)
def pooled(x, starts, counts, first_only, out):
    """`out` [B, D]: the mean of a text's tokens, or its first one as `forward` leaves it."""
    panel = x.shape[2]
    for b in prange(starts.shape[0]):
        begin = np.int64(b) if first_only else starts[b]
        end = begin + (1 if first_only else counts[b])
        out[b] = 0.0
        share = np.float32(1.0) / np.float32(max(1, end - begin))
        t = begin
        while t < end:
            p, first = t // panel, t % panel
            last = min(panel, first + end - t)
            for f in range(x.shape[1]):
                total = np.float32(0.0)
                for lane in range(first, last):
                    total += x[p, f, lane]
                out[b, f] += total * share
            t += last - first
