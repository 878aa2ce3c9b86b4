"""Random numbers that depend on what they are for, and on nothing else.

A generator made from keys such as ``("fleet_merge", robot, round)`` gives the same stream in every process, whatever
was drawn before it. So the order of the work, the number of workers and a resume in the middle change nothing.
"""

from __future__ import annotations

import hashlib
import operator
import random
from typing import TYPE_CHECKING

import numpy as np

from fleetgym.core.errors import UserError

if TYPE_CHECKING:
    import torch


def _entropy(keys: tuple[int | str, ...]) -> int:
    if not keys:
        raise UserError("a generator needs at least one key, such as generator('collect', 3)")
    # Python's hash() of a string differs from process to process; blake2 does not. The type and the length are part of
    # the text, so that 3 and "3", or ("ab", "c") and ("a", "bc"), are different keys.
    digest = hashlib.blake2b(digest_size=16)
    for key in keys:
        if isinstance(key, str):
            text = f"s{len(key)}:{key}"
        else:
            try:
                text = f"i{operator.index(key)};"
            except TypeError:
                raise UserError(f"seed key {key!r} is a {type(key).__name__}; use integers and strings") from None
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "big")


def generator(*keys: int | str) -> np.random.Generator:
    """A NumPy generator for these keys, the same in every process and on every machine.

    Args:
        *keys: Integers and strings that say what the numbers are for, most general first.

    Returns:
        A new PCG64 generator, independent of those of other keys.

    Raises:
        UserError: No key, or a key that is neither an integer nor a string.
    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(_entropy(keys))))


def torch_generator(*keys: int | str, device: str = "cpu") -> torch.Generator:
    """A torch generator for these keys; see ``generator``.

    Args:
        *keys: Integers and strings that say what the numbers are for.
        device: Where the numbers will be drawn; the streams of devices differ.

    Returns:
        A new generator.

    Raises:
        UserError: No key, or a key that is neither an integer nor a string.
    """
    import torch

    return torch.Generator(device=device).manual_seed(_entropy(keys) >> 65)  # torch takes 63 bits


def seed_everything(seed: int, threads: int | None = 1) -> None:
    """Seeds the global generators of Python, NumPy and torch, and fixes torch's thread count.

    Our own code draws from ``generator`` and ``torch_generator``; the global generators matter to what we call, above
    all to the initial weights of torch modules.

    Args:
        seed: Not negative.
        threads: Threads of torch's CPU kernels. The order of sums, and so the last bits of a result, depends on it;
            for small networks one thread is also the fastest. None leaves it as it is.

    Raises:
        UserError: A negative seed.
    """
    import torch

    if seed < 0:
        raise UserError(f"seed {seed} is negative; use 0 or more")
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if threads is not None:
        torch.set_num_threads(threads)
