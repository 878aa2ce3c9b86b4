"""Copies of other people's functions with some of their global names replaced.

Meta-World's task classes spend most of a step outside MuJoCo: a general rotation class for one quaternion, array
functions on single numbers, argument checks. Those helpers are global names in each task's module. Rather than edit the
package, or patch its modules for everybody, we take a copy of each method whose global names are looked up in a
namespace of ours; upstream's classes stay as they are, and everything not replaced is still upstream's own code.
"""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any

import numpy as np


def rebind(function: types.FunctionType, replacements: Mapping[str, Any]) -> types.FunctionType:
    """A copy of ``function`` for which the global names in ``replacements`` mean something else.

    A name that the function's module does not have is not added. The closure is shared with the original, so that
    ``super()`` without arguments still starts from the class that the function was written in.
    """
    module = function.__globals__
    namespace = {**module, **{name: value for name, value in replacements.items() if name in module}}
    copy = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    copy.__doc__ = function.__doc__
    copy.__module__ = function.__module__
    copy.__qualname__ = function.__qualname__
    return copy


def unwrap(function: types.FunctionType) -> types.FunctionType:
    """The function inside one of upstream's checking decorators (a closure called ``inner`` over ``func``)."""
    if function.__name__ == "inner" and "func" in function.__code__.co_freevars:
        return function.__closure__[function.__code__.co_freevars.index("func")].cell_contents
    return function


def rebound_members(cls: type, replacements: Mapping[str, Any]) -> dict[str, Any]:
    """The methods, static methods and properties that ``cls`` itself defines, rebound; ready for a subclass's body."""
    members: dict[str, Any] = {}
    for name, value in vars(cls).items():
        if isinstance(value, types.FunctionType):
            members[name] = rebind(unwrap(value), replacements)
        elif isinstance(value, staticmethod):
            members[name] = staticmethod(rebind(unwrap(value.__func__), replacements))
        elif isinstance(value, property) and value.fget is not None:
            members[name] = property(rebind(value.fget, replacements), value.fset, value.fdel, value.__doc__)
    return members


def _norm(x: Any, ord: Any = None, axis: Any = None, keepdims: bool = False) -> Any:
    """``np.linalg.norm``, quick for the Euclidean norm of one real vector (the same sum and root, unchecked)."""
    if (ord is None or ord == 2) and axis is None and type(x) is np.ndarray and x.ndim == 1 and x.dtype == np.float64:
        return np.float64(math.sqrt(x.dot(x)))
    return np.linalg.norm(x, ord, axis, keepdims)


#: numpy with a quick ``linalg.norm``; everything else is numpy's.
fast_numpy = types.SimpleNamespace(**{name: getattr(np, name) for name in np.__all__ if hasattr(np, name)})
fast_numpy.linalg = types.SimpleNamespace(**{name: getattr(np.linalg, name) for name in np.linalg.__all__})
fast_numpy.linalg.norm = _norm


class FastRotation:
    """The part of scipy's ``Rotation`` that the tasks use: the quaternion of one rotation matrix.

    Source: F. L. Markley, "Unit Quaternion from Rotation Matrix", J. Guidance, Control and Dynamics 31(2), 2008: of
    four formulas the one with the largest divisor, which also fixes the quaternion's sign.
    """

    __slots__ = ("matrix",)

    def __init__(self, matrix: np.ndarray) -> None:
        self.matrix = matrix

    @classmethod
    def from_matrix(cls, matrix: np.ndarray) -> FastRotation:
        """Takes an orthonormal 3x3 matrix; it is not checked (MuJoCo's are orthonormal)."""
        return cls(matrix)

    def as_quat(self) -> np.ndarray:
        """The unit quaternion (x, y, z, w)."""
        (a, b, c), (d, e, f), (g, h, i) = self.matrix.tolist()
        trace = a + e + i
        largest = max(a, e, i, trace)
        # On ties the first of x, y, z, w wins, as in scipy.
        if largest == a:
            x, y, z, w = 1.0 - trace + 2.0 * a, d + b, g + c, h - f
        elif largest == e:
            x, y, z, w = b + d, 1.0 - trace + 2.0 * e, h + f, c - g
        elif largest == i:
            x, y, z, w = c + g, f + h, 1.0 - trace + 2.0 * i, d - b
        else:
            x, y, z, w = h - f, c - g, d - b, 1.0 + trace
        scale = 1.0 / math.sqrt(x * x + y * y + z * z + w * w)
        return np.array((x * scale, y * scale, z * scale, w * scale))


def fast_tolerance(
    x: Any,
    bounds: tuple[float, float] = (0.0, 0.0),
    margin: Any = 0.0,
    sigmoid: str = "gaussian",
    value_at_margin: float = 0.1,
) -> Any:
    """``metaworld.utils.reward_utils.tolerance`` for one number and the two sigmoids that the tasks use.

    1 within the bounds, falling to ``value_at_margin`` at a distance of ``margin`` from them. The formula is
    dm_control's (Y. Tassa et al., "DeepMind Control Suite", 2018); other arguments go to upstream's function.
    """
    if not isinstance(x, float) or sigmoid not in ("long_tail", "gaussian"):
        from metaworld.utils.reward_utils import tolerance

        return tolerance(x, bounds, margin, sigmoid, value_at_margin)
    x = float(x)
    lower, upper = bounds
    if lower > upper or margin < 0:
        raise ValueError(f"tolerance() with bounds {bounds} and margin {margin}: both must not be negative")
    if lower <= x <= upper:
        return 1.0
    if margin == 0:
        return 0.0
    distance = (lower - x if x < lower else x - upper) / float(margin)
    if sigmoid == "long_tail":
        scaled = distance * math.sqrt(1.0 / value_at_margin - 1.0)
        return 1.0 / (scaled * scaled + 1.0)
    scaled = distance * math.sqrt(-2.0 * math.log(value_at_margin))
    return math.exp(-0.5 * scaled * scaled)
