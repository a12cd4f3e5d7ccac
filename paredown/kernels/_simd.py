"""Vector loops as LLVM code, made for the CPU at hand by numba: no compiler is needed, and none is asked for.

Every function here is a numba intrinsic on addresses (int64) of aligned float32 memory. Matrices of activations lie
[features, tokens]: a step is the number of bytes from one feature to the next, and one vector holds LANES tokens of one
feature. Products accumulate in registers, rows x vectors of them at a time (the register blocking of Goto and van de
Geijn 2008 for the dense case; Wilkinson, Cheshmi and Dehnavi 2023, arXiv:2306.12410, for the sparse one).

numba keeps compiled kernels by the file that they are in, encoder.py: who changes this one touches that.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from paredown.errors import ParedownError

ASKED = "PAREDOWN_SIMD"  # the environment variable that names a level
LEVELS = {"avx512": 16, "avx2": 8, "plain": 4}  # vectors of so many floats; plain is whatever LLVM makes of four


def level() -> str:
    """The widest of LEVELS that this CPU has, or the one that the environment asks for."""
    have = llvm.get_host_cpu_features()
    widest = "avx512" if have.get("avx512f") else "avx2" if have.get("avx2") and have.get("fma") else "plain"
    asked = os.environ.get(ASKED, widest)
    if asked not in LEVELS:
        raise ParedownError(f"{ASKED} is {asked!r}; choose {', '.join(LEVELS)}")
    if LEVELS[asked] > LEVELS[widest]:
        raise ParedownError(f"{ASKED} is {asked}, and this CPU has no more than {widest}")
    return asked


LEVEL = level()
LANES = LEVELS[LEVEL]
ALIGN = 4 * LANES

WAITING = 8  # sums that keep two units of four cycles each busy
CHAINS = 12  # sums that do not wait for each other: two units of four cycles each want eight

_F32, _I8, _I16, _I32, _I64 = ir.FloatType(), ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
_VEC, _IVEC = ir.VectorType(_F32, LANES), ir.VectorType(_I32, LANES)


class _Code:
    """An IR builder with the few words that the loops below are written in."""

    def __init__(self, builder: ir.IRBuilder):
        self.b = builder

    def word(self, value: int) -> ir.Constant:
        return ir.Constant(_I64, value)

    def full(self, value: float) -> ir.Constant:
        return ir.Constant(_VEC, [value] * LANES)

    def at(self, address: ir.Value, kind: ir.Type) -> ir.Value:
        return self.b.inttoptr(address, kind.as_pointer())

    def load(self, address: ir.Value) -> ir.Value:
        return self.b.load(self.at(address, _VEC), align=ALIGN)

    def store(self, value: ir.Value, address: ir.Value) -> None:
        self.b.store(value, self.at(address, _VEC), align=ALIGN)

    def number(self, address: ir.Value) -> ir.Value:
        return self.b.load(self.at(address, _F32), align=4)

    def plus(self, address: ir.Value, offset: int) -> ir.Value:
        return self.b.add(address, self.word(offset)) if offset else address

    def spread(self, value: ir.Value) -> ir.Value:
        nothing = ir.Constant(_VEC, ir.Undefined)
        one = self.b.insert_element(nothing, value, ir.Constant(_I32, 0))
        return self.b.shuffle_vector(one, nothing, ir.Constant(ir.VectorType(_I32, LANES), [0] * LANES))

    def call(self, name: str, *values: ir.Value) -> ir.Value:
        """An LLVM intrinsic on vectors of float32."""
        full = f"llvm.{name}.v{LANES}f32"
        module = self.b.module
        kind = ir.FunctionType(_VEC, [_VEC] * len(values))
        return self.b.call(module.globals.get(full) or ir.Function(module, kind, full), values)

    def fma(self, a: ir.Value, b: ir.Value, c: ir.Value) -> ir.Value:
        """a b + c, in one instruction where the CPU has one."""
        return self.call("fmuladd", a, b, c)

    def variable(self, value: ir.Value | None = None, kind: ir.Type = _VEC) -> ir.Value:
        place = cgutils.alloca_once(self.b, kind)  # which LLVM keeps in a register
        if value is not None:
            self.b.store(value, place)
        return place

    def exp(self, x: ir.Value) -> ir.Value:
        """e^x to 2 in 10^7, for x <= 88: 2^n p(r), the polynomial of Cephes' expf."""
        x = self.call("maxnum", x, self.full(-87.0))
        n = self.call("floor", self.fma(x, self.full(1.44269504088896341), self.full(0.5)))
        r = self.fma(n, self.full(-0.693359375), x)
        r = self.fma(n, self.full(2.12194440e-4), r)
        p = self.full(1.9875691500e-4)
        for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
            p = self.fma(p, r, self.full(c))
        p = self.b.fadd(self.fma(p, self.b.fmul(r, r), r), self.full(1.0))
        power = self.b.fptosi(n, _IVEC)
        bits = self.b.shl(self.b.add(power, ir.Constant(_IVEC, [127] * LANES)), ir.Constant(_IVEC, [23] * LANES))
        return self.b.fmul(p, self.b.bitcast(bits, _VEC))


def _intrinsic(count: int, body: Callable[..., None]) -> Any:
    """A numba intrinsic of `count` int64 arguments that returns nothing; `body(code, *values)` writes its LLVM code."""

    def typed(body: Callable[..., None] = body, count: int = count) -> tuple[Any, Any]:
        def codegen(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[ir.Value]) -> Any:
            body(_Code(builder), *values)
            return context.get_dummy_value()

        return types.void(*[types.int64] * count), codegen

    names = ", ".join(f"a{i}" for i in range(count))
    scope: dict[str, Any] = {"typed": typed}
    exec(f"def kernel(typingctx, {names}):\n    return typed()\n", scope)  # numba asks for the arguments by name
    return intrinsic(scope["kernel"])


def products(rows: int, vectors: int, *, indexed: bool) -> Any:
    """`f(x, step, index, values, across, down, count, y, ystep, bias, add)`: for `rows` rows r and `vectors` vectors of
    tokens, y[r] (+)= sum over i < count of value[i, r] x[index[i]].

    `index` are uint16 features; without `indexed` they are 0, 1, 2, ... value[i, r] lies `across` i + `down` r bytes
    behind `values`. With `bias` not 0, y starts from bias[r] (and from add[r] where `add` is not 0), otherwise from
    what it holds.
    """

    chains = max(1, WAITING // (rows * vectors)) if indexed else 1  # sums that entries take turns in

    def body(
        code: _Code,
        x: ir.Value,
        step: ir.Value,
        index: ir.Value,
        values: ir.Value,
        across: ir.Value,
        down: ir.Value,
        count: ir.Value,
        y: ir.Value,
        ystep: ir.Value,
        bias: ir.Value,
        add: ir.Value,
    ) -> None:
        b = code.b
        places = [
            [code.plus(b.add(y, b.mul(ystep, code.word(r))), 4 * LANES * v) for v in range(vectors)]
            for r in range(rows)
        ]
        sums, *more = [[[code.variable() for _ in range(vectors)] for _ in range(rows)] for _ in range(chains)]
        with b.if_else(b.icmp_signed("==", bias, code.word(0))) as (going_on, anew):
            with going_on:
                for r in range(rows):
                    for v in range(vectors):
                        b.store(code.load(places[r][v]), sums[r][v])
            with anew:
                start = [code.spread(code.number(code.plus(bias, 4 * r))) for r in range(rows)]
                with b.if_else(b.icmp_signed("==", add, code.word(0))) as (alone, together):
                    with alone:
                        for r in range(rows):
                            for v in range(vectors):
                                b.store(start[r], sums[r][v])
                    with together:
                        for r in range(rows):
                            row = b.add(add, b.mul(ystep, code.word(r)))
                            for v in range(vectors):
                                b.store(b.fadd(start[r], code.load(code.plus(row, 4 * LANES * v))), sums[r][v])

        def entry(i: ir.Value, into: list[list[ir.Value]]) -> None:
            i_x = i
            if indexed:
                feature = b.load(code.at(b.add(index, b.shl(i, code.word(1))), _I16), align=2)
                i_x = b.zext(feature, _I64)
            row = b.add(x, b.mul(i_x, step))
            loaded = [code.load(code.plus(row, 4 * LANES * v)) for v in range(vectors)]
            first = b.add(values, b.mul(i, across))
            for r in range(rows):
                value = code.spread(code.number(b.add(first, b.mul(down, code.word(r)))))
                for v in range(vectors):
                    b.store(code.fma(value, loaded[v], b.load(into[r][v])), into[r][v])

        together = b.sdiv(count, code.word(chains))
        if more:
            for part in more:
                for r in range(rows):
                    for v in range(vectors):
                        b.store(code.full(0.0), part[r][v])
            with cgutils.for_range(b, together) as loop:
                for number, part in enumerate((sums, *more)):
                    entry(b.add(b.mul(loop.index, code.word(chains)), code.word(number)), part)
            for part in more:
                for r in range(rows):
                    for v in range(vectors):
                        b.store(b.fadd(b.load(sums[r][v]), b.load(part[r][v])), sums[r][v])
        done = b.mul(together, code.word(chains)) if more else code.word(0)
        with cgutils.for_range(b, b.sub(count, done)) as loop:
            entry(b.add(done, loop.index), sums)
        for r in range(rows):
            for v in range(vectors):
                code.store(b.load(sums[r][v]), places[r][v])

    return _intrinsic(11, body)


def _softmax(code: _Code, x: ir.Value, step: ir.Value, count: ir.Value, inverse: ir.Value) -> None:
    """x[i] = exp(x[i] - max) over i < count, for one vector; 1 / their sum into `inverse`."""
    b = code.b
    top, total = code.variable(code.full(-3.0e38)), code.variable(code.full(0.0))
    with cgutils.for_range(b, count) as loop:
        b.store(code.call("maxnum", b.load(top), code.load(b.add(x, b.mul(loop.index, step)))), top)
    highest = b.load(top)
    with cgutils.for_range(b, count) as loop:
        place = b.add(x, b.mul(loop.index, step))
        value = code.exp(b.fsub(code.load(place), highest))
        code.store(value, place)
        b.store(b.fadd(b.load(total), value), total)
    code.store(b.fdiv(code.full(1.0), b.load(total)), inverse)


def _moved(
    code: _Code, x: ir.Value, step: ir.Value, y: ir.Value, ystep: ir.Value, count: ir.Value, fours: ir.Value
) -> None:
    """y[i, j] = x[i, j] over i < count features and j < 4 fours tokens, both beginning at multiples of four floats."""
    b, four = code.b, ir.VectorType(_F32, 4)
    with cgutils.for_range(b, count) as loop:
        source, place = b.add(x, b.mul(loop.index, step)), b.add(y, b.mul(loop.index, ystep))
        with cgutils.for_range(b, fours) as inner:
            offset = b.mul(inner.index, code.word(16))
            value = b.load(code.at(b.add(source, offset), four), align=16)
            b.store(value, code.at(b.add(place, offset), four), align=16)


def _scaled(code: _Code, x: ir.Value, step: ir.Value, count: ir.Value, by: ir.Value) -> None:
    """x[i] *= by, for one vector."""
    b = code.b
    factor = code.load(by)
    with cgutils.for_range(b, count) as loop:
        place = b.add(x, b.mul(loop.index, step))
        code.store(b.fmul(code.load(place), factor), place)


def _normed(
    code: _Code, x: ir.Value, step: ir.Value, count: ir.Value, weight: ir.Value, bias: ir.Value, constants: ir.Value
) -> None:
    """Layer norm over `count` features of one vector of tokens, in place; `constants` holds 1 / count and epsilon."""
    b = code.b
    share, epsilon = (code.spread(code.number(code.plus(constants, 4 * i))) for i in range(2))
    total, square = code.variable(code.full(0.0)), code.variable(code.full(0.0))
    with cgutils.for_range(b, count) as loop:
        b.store(b.fadd(b.load(total), code.load(b.add(x, b.mul(loop.index, step)))), total)
    mean = b.fmul(b.load(total), share)
    with cgutils.for_range(b, count) as loop:
        off = b.fsub(code.load(b.add(x, b.mul(loop.index, step))), mean)
        b.store(code.fma(off, off, b.load(square)), square)
    inverse = b.fdiv(code.full(1.0), code.call("sqrt", b.fadd(b.fmul(b.load(square), share), epsilon)))
    with cgutils.for_range(b, count) as loop:
        place, four = b.add(x, b.mul(loop.index, step)), b.shl(loop.index, code.word(2))
        scale = b.fmul(inverse, code.spread(code.number(b.add(weight, four))))
        shift = code.spread(code.number(b.add(bias, four)))
        code.store(code.fma(b.fsub(code.load(place), mean), scale, shift), place)


def _tanh_like(code: _Code, x: ir.Value) -> ir.Value:
    """1 / (1 + e^-x)"""
    b = code.b
    return b.fdiv(code.full(1.0), b.fadd(code.full(1.0), code.exp(b.fsub(code.full(0.0), x))))


ERF_ENDS = 5.5  # where erf(x / sqrt 2) is 1 to 4 in 10^8


def _erf_polynomial(degree: int = 15) -> list[float]:
    """Coefficients, of u = 2 x^2 / ERF_ENDS^2 - 1 from the constant on, of erf(x / sqrt 2) / x for 0 <= x <= ERF_ENDS:
    its interpolation at the Chebyshev nodes.
    """
    u = np.cos(np.pi * (np.arange(200) + 0.5) / 200)
    x = ERF_ENDS * np.sqrt((u + 1) / 2)
    values = [math.erf(each / math.sqrt(2)) / each for each in x]
    series = np.polynomial.chebyshev.chebfit(u, values, degree)
    return [float(c) for c in np.polynomial.chebyshev.cheb2poly(series)]


ERF = _erf_polynomial()


def _gelu(code: _Code, x: ir.Value) -> ir.Value:
    """x (1 + erf(x / sqrt 2)) / 2, by a polynomial of `ERF` for erf(x / sqrt 2) / x."""
    b = code.b
    near = code.call("minnum", code.call("maxnum", x, code.full(-ERF_ENDS)), code.full(ERF_ENDS))
    u = code.fma(b.fmul(near, near), code.full(2 / ERF_ENDS**2), code.full(-1.0))
    p = code.full(ERF[-1])
    for c in ERF[-2::-1]:
        p = code.fma(p, u, code.full(c))
    half = b.fmul(x, code.full(0.5))
    return code.fma(half, b.fmul(p, near), half)


def _gelu_tanh(code: _Code, x: ir.Value) -> ir.Value:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, which is x times the logistic function of twice that."""
    b = code.b
    cubed = b.fmul(b.fmul(x, x), x)
    inner = b.fmul(code.fma(cubed, code.full(0.044715), x), code.full(2 * 0.7978845608028654))
    return b.fmul(x, _tanh_like(code, inner))


def _silu(code: _Code, x: ir.Value) -> ir.Value:
    return code.b.fmul(x, _tanh_like(code, x))


def _relu(code: _Code, x: ir.Value) -> ir.Value:
    return code.call("maxnum", x, code.full(0.0))


def _activation(function: Callable[[_Code, ir.Value], ir.Value]) -> Any:
    """`f(x, count)`: the function of `count` vectors, in place."""

    def body(code: _Code, x: ir.Value, count: ir.Value) -> None:
        with cgutils.for_range(code.b, count) as loop:
            place = code.b.add(x, code.b.mul(loop.index, code.word(4 * LANES)))
            code.store(function(code, code.load(place)), place)

    return _intrinsic(2, body)


def _multiply_adds(code: _Code, x: ir.Value, steps: ir.Value) -> None:
    """x = a x + b, CHAINS of them side by side, `steps` times, in registers."""
    b = code.b
    a = code.load(x)
    sums = [code.variable(b.fadd(a, code.full(0.01 * i))) for i in range(CHAINS)]
    with cgutils.for_range(b, steps):
        for one in sums:
            b.store(code.fma(b.load(one), a, a), one)
    total = b.load(sums[0])
    for one in sums[1:]:
        total = b.fadd(total, b.load(one))
    code.store(total, x)


multiply_adds = _intrinsic(2, _multiply_adds)
moved = _intrinsic(6, _moved)
softmax = _intrinsic(4, _softmax)
scaled = _intrinsic(4, _scaled)
normed = _intrinsic(6, _normed)
gelu, gelu_tanh, silu, relu = (_activation(f) for f in (_gelu, _gelu_tanh, _silu, _relu))
