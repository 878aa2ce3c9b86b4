"""Several tasks side by side: ``gym.make_vec("MetaWorld/MT10")`` and ``suite("meta_world").make_vec(...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import VectorEnv

from fleetgym.envs.meta_world.tasks import resolve_task_set
from fleetgym.envs.vector import suite_vector


def make_vec(tasks: str | Sequence[str], num_envs: int | None = None, **options: Any) -> VectorEnv:
    """Makes a vector environment; environment ``i`` plays task ``i % len(tasks)``.

    Args:
        tasks: A split's name, or task names.
        num_envs: How many environments; None makes one a task.
        **options: Of :func:`fleetgym.envs.vector.suite_vector`, or of ``MetaWorldEnv``.

    Returns:
        Observations are [num_envs, 39 + number of tasks], float64.

    Raises:
        UserError: Unknown task set, no environments, or an unknown autoreset mode.
    """
    return suite_vector("meta_world", resolve_task_set(tasks), num_envs, **options)


def _make_split(split: str, num_envs: int = 1, **kwargs: Any) -> VectorEnv:
    # gym.make_vec says num_envs=1 where its caller says nothing: then it is one environment a task.
    return make_vec(split, None if num_envs == 1 else num_envs, **kwargs)


def mt10(num_envs: int = 1, **kwargs: Any) -> VectorEnv:
    """The entry point of ``gym.make_vec("MetaWorld/MT10")``; ``num_envs=1`` means one environment a task."""
    return _make_split("mt10", num_envs, **kwargs)


def mt50(num_envs: int = 1, **kwargs: Any) -> VectorEnv:
    """The entry point of ``gym.make_vec("MetaWorld/MT50")``; ``num_envs=1`` means one environment a task."""
    return _make_split("mt50", num_envs, **kwargs)
