"""Zoos: collections of trained networks to read with other networks, made here and cached, or published.

``make_zoo("cartpole")`` gives a :class:`Zoo`; the names are in :data:`ZOOS`. Published collections are read from the
user's files by :func:`small_cnn_zoo` and :func:`inr_zoo`.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

from fleetgym.core.registry import Registry

ZOOS: Registry[Any] = Registry("zoo", group="fleetgym.zoos")
"""Name -> :class:`~fleetgym.benchmarks.zoos.zoo.Maker`, a dataclass of settings."""
ZOOS.register("addition_gru", "fleetgym.benchmarks.zoos.addition:AdditionGRU")
ZOOS.register("cartpole", "fleetgym.benchmarks.zoos.cartpole:CartPole")
ZOOS.register("cartpole_gru", "fleetgym.benchmarks.zoos.cartpole:CartPoleGRU")
ZOOS.register("digits_cnn", "fleetgym.benchmarks.zoos.digits_cnn:DigitsCNN")
ZOOS.register("digits_sirens", "fleetgym.benchmarks.zoos.sirens:DigitsSirens")
ZOOS.register("digits_tickets", "fleetgym.benchmarks.zoos.tickets:DigitsTickets")
ZOOS.register("meta_world", "fleetgym.benchmarks.zoos.meta_world:MetaWorld")
ZOOS.register("mnist_sirens", "fleetgym.benchmarks.zoos.sirens:MNISTSirens")

_HOME = {"Zoo": "zoo", "cache_folder": "zoo", "inr_zoo": "published", "small_cnn_zoo": "published"}
__all__ = ["ZOOS", "make_zoo", *_HOME]


def make_zoo(
    name: str,
    *,
    folder: str | os.PathLike | None = None,
    device: str = "cpu",
    progress: bool = True,
    **settings: Any,
) -> Any:
    """A zoo from the cache, or made and put there.

    Args:
        name: A name in :data:`ZOOS`.
        folder: Of the cache; by default :func:`cache_folder`.
        device: Where the networks are trained.
        progress: Whether to show a progress bar.
        settings: Fields of the maker.

    Returns:
        The :class:`~fleetgym.benchmarks.zoos.zoo.Zoo`.

    Raises:
        UserError: Unknown name, settings that the maker does not have or that cannot be, or a package that is missing.
    """
    import dataclasses

    from fleetgym.benchmarks.zoos.zoo import make
    from fleetgym.core.errors import unknown

    kind = ZOOS.get(name)
    fields = [item.name for item in dataclasses.fields(kind)]
    for setting in settings:
        if setting not in fields:
            raise unknown(f"setting of the zoo {name!r}", setting, fields)
    return make(kind(**settings), folder=folder, device=device, progress=progress)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"fleetgym.benchmarks.zoos.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fleetgym.benchmarks.zoos' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
