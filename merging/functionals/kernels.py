"""Layer normalisation over channels in one pass over memory, compiled by numba when it is first wanted.

torch's kernels make a pass each for mean, variance, scaling and activation, and need further ones for a scale and a
shift that differ from part to part. A row of channels fits in a processor's registers and nearest cache, so that here
forward reads the input and writes the output once, and backward reads its two or three inputs and writes once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

# Sums may be reordered, so that they become vector instructions; NaN and infinities keep their meaning.
_FASTMATH = {"arcp", "contract", "nsz", "reassoc"}


def _forward(
    x: Any, y: Any, mean: Any, rstd: Any, scale: Any, shift: Any, ends: Any, eps: Any, affine: bool, relu: bool
) -> None:
    networks, _, channels = x.shape
    zero, one, width = x.dtype.type(0), x.dtype.type(1), x.dtype.type(channels)
    for n in range(networks):
        begin = 0
        for row in range(len(ends)):
            for p in range(begin, ends[row]):
                source, target = x[n, p], y[n, p]
                total = zero
                for c in range(channels):
                    total += source[c]
                middle = total / width
                total = zero
                for c in range(channels):
                    total += (source[c] - middle) * (source[c] - middle)
                factor = one / np.sqrt(total / width + eps)
                if affine:
                    for c in range(channels):
                        target[c] = (source[c] - middle) * factor * scale[row, c] + shift[row, c]
                else:
                    for c in range(channels):
                        target[c] = (source[c] - middle) * factor
                if relu:
                    for c in range(channels):
                        target[c] = zero if target[c] < zero else target[c]
                mean[n, p] = middle
                rstd[n, p] = factor
            begin = ends[row]


def _backward(
    g: Any, x: Any, y: Any, mean: Any, rstd: Any, scale: Any, ends: Any, dx: Any, sums: Any, affine: bool, relu: bool
) -> None:
    networks, _, channels = x.shape
    zero, width = x.dtype.type(0), x.dtype.type(channels)
    normal, slope = np.empty(channels, x.dtype), np.empty(channels, x.dtype)
    for n in range(networks):
        begin = 0
        for row in range(len(ends)):
            for p in range(begin, ends[row]):
                middle, factor = mean[n, p], rstd[n, p]
                source, given, target = x[n, p], g[n, p], dx[n, p]
                if relu:
                    result = y[n, p]
                    for c in range(channels):
                        slope[c] = zero if result[c] <= zero else given[c]
                else:
                    for c in range(channels):
                        slope[c] = given[c]
                for c in range(channels):
                    normal[c] = (source[c] - middle) * factor
                if affine:
                    for c in range(channels):
                        sums[0, row, c] += slope[c] * normal[c]
                        sums[1, row, c] += slope[c]
                        slope[c] *= scale[row, c]
                first, second = zero, zero
                for c in range(channels):
                    first += slope[c]
                    second += slope[c] * normal[c]
                first /= width
                second /= width
                for c in range(channels):
                    target[c] = factor * (slope[c] - first - normal[c] * second)
            begin = ends[row]


@functools.cache
def norms() -> tuple[Callable[..., None], Callable[..., None]]:
    """Layer normalisation forward and backward, for float32 or float64 and any strides.

    Forward is called with x [N, P, C], where to write the result [N, P, C], mean and inverse standard deviation
    [N, P], then scale and shift [rows, C], where in P each row's stretch ends (int64 [rows]), eps in the type of x, and
    whether there are scale and shift, and a ReLU. Backward is called with the gradient, x, forward's result, mean and
    inverse standard deviation, scale and ends, where to write the gradient of x, where to add those of scale and shift
    [2, rows, C], and the same two flags.
    """
    import numba

    made = []
    for function in (_forward, _backward):
        try:
            made.append(numba.njit(cache=True, nogil=True, fastmath=_FASTMATH)(function))
        except RuntimeError:  # no folder that could be written: compile anew in each process
            made.append(numba.njit(nogil=True, fastmath=_FASTMATH)(function))
    return made[0], made[1]
