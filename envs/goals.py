"""Goals for training and goals held out from it, told apart without a list."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np

#: The choices of ``goals``.
GOALS = ("all", "train", "held_out")
#: One cell in so many is held out.
HELD_OUT_ONE_IN = 5
_CELL = 1e-3


def in_held_out_cell(vector: np.ndarray) -> bool:
    """Whether a vector of numbers, such as the place of an object, belongs to the held-out goals.

    It does if the BLAKE2b hash of its cells of a thousandth (rounded, little-endian int64) is divisible by five. Each
    cell is thus in one split, in every process and on every machine, and the splits are disjoint whatever the seeds.

    Args:
        vector: Metres or radians.
    """
    cells = np.floor(np.asarray(vector, np.float64) / _CELL + 0.5).astype("<i8")
    digest = hashlib.blake2b(cells.tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % HELD_OUT_ONE_IN == 0


def draw_goal(
    rng: np.random.Generator,
    low: Any,
    high: Any,
    goals: str,
    held_out: Callable[[np.ndarray], bool] = in_held_out_cell,
) -> np.ndarray:
    """Draws a vector uniformly from a box, from one split.

    Args:
        rng: Generator.
        low: Bounds [n].
        high: Bounds [n].
        goals: One of :data:`GOALS`.
        held_out: Which split a vector belongs to.
    """
    while True:
        vector = rng.uniform(low, high, size=len(low))
        if goals == "all" or held_out(vector) == (goals == "held_out"):
            return vector
