"""Sine and cosine of a float32 array in one pass, compiled by numba.

One range reduction serves both, and each is a polynomial in the square of the remainder, so that the loop becomes
vector instructions: about a seventh of the time of ``torch.sin`` and ``torch.cos`` on the processor it was measured on.
"""

from __future__ import annotations

import numba
import numpy as np

_f = np.float32
_INVERSE, _HALF, _ONE, _TWO = _f(1 / np.pi), _f(0.5), _f(1), _f(2)
# pi in three parts (Cody and Waite): k times the first two is exact for k below 2^13.
_PI_A, _PI_B = _f(3.140625), _f(9.675025939941406e-4)
_PI_C = _f(np.pi - 3.140625 - 9.675025939941406e-4)
# Minimax in r^2 on [0, (pi / 2)^2]; largest errors 1.7e-11 (sine over r) and 2.2e-10 before rounding.
_S1, _S2, _S3, _S4, _S5 = (
    _f(c) for c in (-1.66666666e-1, 8.33333098e-3, -1.98408619e-4, 2.75253044e-6, -2.38897787e-8)
)
_C1, _C2, _C3, _C4, _C5 = (
    _f(c) for c in (-4.99999994e-1, 4.16666363e-2, -1.38883614e-3, 2.47601613e-5, -2.60514952e-7)
)


def _compiled(function):
    # Contraction into fused multiply-adds alone: re-association would undo the three parts of pi.
    try:
        return numba.njit(cache=True, nogil=True, fastmath={"contract"})(function)
    except RuntimeError:  # no folder that could be written: compile anew in each process
        return numba.njit(nogil=True, fastmath={"contract"})(function)


@_compiled
def sincos(angle, bias, scale, cosine):
    """Writes the sine and the cosine of scale * (angle + bias).

    Magnitudes of what they are taken of must be below 2e4 rad; there they are within 2e-7 of the exact values.

    Args:
        angle: float32 [N, M, H], overwritten with the sine.
        bias: float32 [N, H].
        scale: float32.
        cosine: float32 [N, M, H], overwritten.
    """
    for n in range(angle.shape[0]):
        for m in range(angle.shape[1]):
            for h in range(angle.shape[2]):
                x = scale * (angle[n, m, h] + bias[n, h])
                k = np.floor(x * _INVERSE + _HALF)
                r = ((x - k * _PI_A) - k * _PI_B) - k * _PI_C
                sign = _ONE - _TWO * (k - _TWO * np.floor(k * _HALF))  # (-1)^k
                u = r * r
                s = r + r * u * (_S1 + u * (_S2 + u * (_S3 + u * (_S4 + u * _S5))))
                c = _ONE + u * (_C1 + u * (_C2 + u * (_C3 + u * (_C4 + u * _C5))))
                angle[n, m, h] = sign * s
                cosine[n, m, h] = sign * c
