"""Products of many small matrices with what is added to them, compiled by numba.

A tile of the result stays in registers while products are added up in it, from the sum of two given tensors on: what is
constant along an axis is added at no cost in memory, and the result is written once. Import this module only where it
is used; numba takes a second.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit
from numba.core import cgutils, types
from numba.extending import intrinsic

VECTOR_BYTES = 64
# Of a product's inner axis, how much is added up before the next rows: 64 kB of four vectors, what the second-level
# cache holds easily.
DEPTH = 256


@intrinsic(prefer_literal=True)
def _tile(
    context: Any,
    rows: Any,
    vectors: Any,
    like: Any,
    out: Any,
    out_row: Any,
    first: Any,
    first_row: Any,
    second: Any,
    second_row: Any,
    a: Any,
    a_row: Any,
    a_step: Any,
    b: Any,
    b_step: Any,
    depth: Any,
) -> Any:
    """``out[r] = first[r] + second[r] + sum over k of a[r, k] * b[k]`` for some rows of some vectors.

    Tensors are given by addresses, and ``row`` and ``step`` are in bytes; ``like`` is an array of their type. Rows and
    vectors are constants, chosen such that all sums and a row of b fit in registers.
    """
    height, width = rows.literal_value, vectors.literal_value
    scalar = ir.FloatType() if like.dtype == types.float32 else ir.DoubleType()
    size = like.dtype.bitwidth // 8
    vector = ir.VectorType(scalar, VECTOR_BYTES // size)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        out, out_row, first, first_row, second, second_row, a, a_row, a_step, b, b_step, depth = arguments[3:]

        def place(base: Any, row: Any, r: int, v: int, kind: Any) -> Any:
            there = builder.add(base, builder.mul(row, ir.Constant(row.type, r)))
            there = builder.add(there, ir.Constant(row.type, v * VECTOR_BYTES))
            return builder.inttoptr(there, kind.as_pointer())

        def read(base: Any, row: Any, r: int, v: int, kind: Any = vector) -> Any:
            return builder.load(place(base, row, r, v, kind), align=size)

        tile = [(r, v) for r in range(height) for v in range(width)]
        sums = {at: cgutils.alloca_once(builder, vector) for at in tile}
        for at in tile:
            builder.store(builder.fadd(read(first, first_row, *at), read(second, second_row, *at)), sums[at])
        # The rows after these of an a that lies row by row are fetched meanwhile.
        after = builder.add(a, builder.mul(a_row, ir.Constant(a_row.type, height)))
        along = builder.icmp_signed("==", a_step, ir.Constant(a_step.type, size))
        ahead = builder.select(along, ir.Constant(a_step.type, height * size), ir.Constant(a_step.type, 0))
        byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        fetch = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [byte, flag, flag, flag]), "llvm.prefetch.p0i8"
        )
        with cgutils.for_range(builder, depth) as loop:
            there = builder.inttoptr(builder.add(after, builder.mul(loop.index, ahead)), byte)
            builder.call(fetch, [there, flag(0), flag(3), flag(1)])
            x = builder.add(a, builder.mul(loop.index, a_step))
            y = builder.add(b, builder.mul(loop.index, b_step))
            right = [read(y, b_step, 0, v) for v in range(width)]
            for r in range(height):
                one = builder.insert_element(vector(ir.Undefined), read(x, a_row, r, 0, scalar), ir.IntType(32)(0))
                left = builder.shuffle_vector(one, one, ir.VectorType(ir.IntType(32), vector.count)([0] * vector.count))
                for v in range(width):
                    term = builder.fmul(left, right[v], flags=("contract",))
                    builder.store(builder.fadd(builder.load(sums[r, v]), term, flags=("contract",)), sums[r, v])
        for at in tile:
            builder.store(builder.load(sums[at]), place(out, out_row, *at, vector), align=size)
        return context.get_dummy_value()

    return types.void(rows, vectors, like, *[types.intp] * 12), emit


def _panel(vectors: int) -> Any:
    """Tiles below one another, over as many columns as there are numbers in ``vectors`` vectors."""

    @njit
    def panel(
        like: Any, height: Any, out: Any, first: Any, second: Any, a: Any, a_step: Any, b: Any, depth: Any
    ) -> None:
        o, f, s, x = out[0], first[0], second[0], a[0]
        while height > 0:
            # Of the heights that are compiled the tallest that fits: 24 of the 32 registers of AVX-512 hold sums.
            if height >= 6:
                rows = 6
                _tile(6, vectors, like, o, out[1], f, first[1], s, second[1], x, a[1], a_step, b[0], b[1], depth)
            elif height >= 4:
                rows = 4
                _tile(4, vectors, like, o, out[1], f, first[1], s, second[1], x, a[1], a_step, b[0], b[1], depth)
            elif height >= 2:
                rows = 2
                _tile(2, vectors, like, o, out[1], f, first[1], s, second[1], x, a[1], a_step, b[0], b[1], depth)
            else:
                rows = 1
                _tile(1, vectors, like, o, out[1], f, first[1], s, second[1], x, a[1], a_step, b[0], b[1], depth)
            height -= rows
            o, f, s, x = o + rows * out[1], f + rows * first[1], s + rows * second[1], x + rows * a[1]

    return panel


_wide, _slim = _panel(4), _panel(1)


@njit
def _place(tensor: Any, n: int, i: int, q: int) -> Any:
    """The address of the entry (n, i, 0, q), and the step to the next row in bytes; an axis of size 1 is broadcast."""
    shape, strides = tensor.shape, tensor.strides
    at = tensor.ctypes.data + (shape[0] > 1) * n * strides[0] + (shape[1] > 1) * i * strides[1] + q * strides[3]
    return at, (shape[2] > 1) * strides[2]


def _multiply(out: Any, a: Any, b: Any, first: Any, second: Any) -> None:
    lanes = VECTOR_BYTES // out.itemsize
    zero = np.zeros(4 * lanes, out.dtype)
    networks, groups, height, columns = out.shape
    depth, step = a.shape[3], a.strides[3]
    for n in range(networks):
        for i in range(groups):
            column = 0
            while column < columns:
                wide = column + 4 * lanes <= columns
                o, f, s = _place(out, n, i, column), _place(first, n, i, column), _place(second, n, i, column)
                for k in range(0, max(depth, 1), DEPTH):
                    if k > 0:
                        f, s = o, (zero.ctypes.data, 0)
                    x, y, some = _place(a, n, i, k), _place(b, n, i, column), min(DEPTH, depth - k)
                    y = y[0] + k * y[1], y[1]
                    if wide:
                        _wide(out, height, o, f, s, x, step, y, some)
                    else:
                        _slim(out, height, o, f, s, x, step, y, some)
                column += 4 * lanes if wide else lanes


_product = njit(_multiply)


def _sums(rows: Any, columns: Any, x: Any, ones: Any, zero: Any) -> None:
    turned = x.transpose(0, 2, 1, 3)
    for n in range(len(x)):
        part = slice(n, n + 1)
        _product(rows[part], ones[..., : x.shape[2]], x[part], zero, zero)
        _product(columns[part], ones[..., : x.shape[1]], turned[part], zero, zero)


def _compiled(function: Callable[..., None], *arguments: Any) -> Callable[..., None]:
    signature = types.void(*arguments)
    try:
        return njit(signature, cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that could be written: compile anew in each process
        return njit(signature, nogil=True)(function)


@functools.cache
def multiply(kind: str) -> Callable[..., None]:
    """``out = first + second + a @ b`` for arrays of four axes.

    It is called with out [N, I, J, Q], a [N, I, J, K], b [N, I, K, Q], and first and second as out; in the last four an
    axis of size 1 is broadcast, but for K and Q. Q is a multiple of ``VECTOR_BYTES``, and the last axis of all but a is
    contiguous; other strides are any. First may be out.

    Args:
        kind: ``"float32"`` or ``"float64"``.
    """
    return _compiled(_multiply, *[types.Array(getattr(types, kind), 4, "A")] * 5)


@functools.cache
def sums(kind: str) -> Callable[..., None]:
    """Sums along each of two axes, as products with ones; the second pass finds a network in the processor's cache.

    It is called with where to write the sums over J [N, I, 1, C] and over I [N, J, 1, C], then x [N, I, J, C], ones and
    zeros, both [1, 1, 1, as many as needed]. C is as Q of :func:`multiply`.

    Args:
        kind: ``"float32"`` or ``"float64"``.
    """
    return _compiled(_sums, *[types.Array(getattr(types, kind), 4, "A")] * 5)


@functools.cache
def worthwhile() -> bool:
    """Whether this processor has AVX-512: a tile takes its registers, and with fewer ones BLAS is faster."""
    return bool(binding.get_host_cpu_features().get("avx512f"))
