"""Random bits by counter, so that NumPy, numba and torch draw the same ones.

``bits(seed, trial, episode, draw)`` is a hash, not a stream: there is no state that an implementation could advance
differently. Only integer additions, multiplications, shifts and xors modulo 2**64 are used.

How the draws of a trial are numbered (``trial`` counts from 0 after ``reset(seed=...)``):

- episode 0, draw ``TASK`` (0): which building of the split, ``pick(bits, size of the split's pool)``;
- episode ``e`` (1, 2, ...), draw ``SIGN`` (0): what the sign shows in that episode. For text the top 24 bits are
  looked up in the cumulative table of the goal's cell, ``top24(bits)``; for pictures it is ``pick(bits, number of the
  split's styles)``.

A building that ``reset`` is given by its id uses up no draw, and changes no other.
"""

from __future__ import annotations

from typing import Any

import numpy as np

TASK, SIGN = 0, 0
#: Cumulative tables are integers in units of 1 / UNIT.
UNIT = 1 << 24
GOLDEN, MIX_A, MIX_B = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = (1 << 64) - 1


def bits(seed: Any, trial: Any, episode: Any, draw: Any) -> Any:
    """32 random bits for a place in a trial.

    Source: the finaliser of SplitMix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA
    2014), applied after each of the four keys.

    Args:
        seed: The environment's seed, as an integer modulo 2**64; an int or an integer array.
        trial: Trials since that seed was given.
        episode: 0 for what belongs to the trial, else the episode's number from 1.
        draw: Which number of that episode.

    Returns:
        A Python int if all arguments are, else a uint64 array of their common shape, in both cases below 2**32.
    """
    if all(isinstance(key, int) for key in (seed, trial, episode, draw)):
        state = 0
        for key in (seed, trial, episode, draw):
            state = (state + GOLDEN * ((key + 1) & _MASK)) & _MASK
            state = ((state ^ (state >> 30)) * MIX_A) & _MASK
            state = ((state ^ (state >> 27)) * MIX_B) & _MASK
            state ^= state >> 31
        return state >> 32
    mixed = np.zeros(np.broadcast(seed, trial, episode, draw).shape, np.uint64)
    with np.errstate(over="ignore"):
        for key in (seed, trial, episode, draw):
            mixed = mixed + np.uint64(GOLDEN) * (np.asarray(key).astype(np.uint64) + np.uint64(1))
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(MIX_A)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(MIX_B)
            mixed = mixed ^ (mixed >> np.uint64(31))
    return mixed >> np.uint64(32)


def pick(bits32: Any, size: Any) -> Any:
    """One of ``size`` equally likely indices from 32 bits, ``bits * size // 2**32``."""
    if isinstance(bits32, int):
        return (bits32 * size) >> 32
    return ((bits32 * np.asarray(size).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def top24(bits32: Any) -> Any:
    """The top 24 of 32 bits, to be looked up in a cumulative table in units of 1 / ``UNIT``."""
    if isinstance(bits32, int):
        return bits32 >> 8
    return (bits32 >> np.uint64(8)).astype(np.int64)
