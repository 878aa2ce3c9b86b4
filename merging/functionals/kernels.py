"""Layer normalisation over channels in one pass over memory, compiled by numba when it is first wanted.

torch's kernels make a pass each for mean, variance, scaling and activation, and need further ones for a scale and a
shift that differ from part to part. A row of channels fits in a processor's registers and nearest cache, so that here
forward reads the input and writes the output once, and backward reads its two inputs and writes once. What a ReLU cut
is told again from the input, which costs less than to read forward's result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# Sums may be reordered, so that they become vector instructions; NaN and infinities keep their meaning.
_FASTMATH = {"arcp", "contract", "nsz", "reassoc"}


def _forward(x: Any, y: Any, mean: Any, rstd: Any, scale: Any, shift: Any, ends: Any, eps: Any, least: Any) -> None:
    networks, _, channels = x.shape
    zero, one = x.dtype.type(0), x.dtype.type(1)
    share = one / x.dtype.type(channels)
    for n in range(networks):
        begin = 0
        for row in range(len(ends)):
            a, b = scale[row], shift[row]
            for p in range(begin, ends[row]):
                source, target = x[n, p], y[n, p]
                total = zero
                for c in range(channels):
                    total += source[c]
                middle = total * share
                total = zero
                for c in range(channels):
                    total += (source[c] - middle) * (source[c] - middle)
                factor = one / np.sqrt(total * share + eps)
                for c in range(channels):
                    value = (source[c] - middle) * factor * a[c] + b[c]
                    target[c] = least if value < least else value
                mean[n, p] = middle
                rstd[n, p] = factor
            begin = ends[row]


def _backward(
    g: Any, x: Any, mean: Any, rstd: Any, scale: Any, shift: Any, ends: Any, dx: Any, sums: Any, least: Any
) -> None:
    networks, _, channels = x.shape
    zero, one = x.dtype.type(0), x.dtype.type(1)
    share = one / x.dtype.type(channels)
    for n in range(networks):
        begin = 0
        for row in range(len(ends)):
            # Views made once a row: looked up inside, they kept the loops from being vectors.
            a, b, to_scale, to_shift = scale[row], shift[row], sums[0, row], sums[1, row]
            for p in range(begin, ends[row]):
                middle, factor = mean[n, p], rstd[n, p]
                source, given, target = x[n, p], g[n, p], dx[n, p]
                first, second = zero, zero
                for c in range(channels):
                    normal = (source[c] - middle) * factor
                    slope = zero if normal * a[c] + b[c] <= least else given[c]
                    to_scale[c] += slope * normal
                    to_shift[c] += slope
                    slope *= a[c]
                    first += slope
                    second += slope * normal
                    target[c] = slope
                first *= share
                second *= share
                for c in range(channels):
                    target[c] = factor * (target[c] - first - (source[c] - middle) * factor * second)
            begin = ends[row]


@functools.cache
def norms() -> tuple[Callable[..., None], Callable[..., None]]:
    """Layer normalisation forward and backward, for float32 or float64 and any strides.

    Forward is called with x [N, P, C], where to write the result [N, P, C], mean and inverse standard deviation
    [N, P], then scale and shift [rows, C], where in P each row's stretch ends (int64 [rows]), and in the type of x eps
    and the least result: 0 for a ReLU, NaN for none. Backward is called with the gradient, x, mean and inverse standard
    deviation, scale, shift and ends, where to write the gradient of x, where to add those of scale and shift
    [2, rows, C], and the least result.
    """
    import numba

    made = []
    for function in (_forward, _backward):
        # A division is not checked: it would keep the loops from being vectors.
        options = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
        try:
            made.append(numba.njit(cache=True, **options)(function))
        except RuntimeError:  # no folder that could be written: compile anew in each process
            made.append(numba.njit(**options)(function))
    return made[0], made[1]
