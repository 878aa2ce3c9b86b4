"""Several tasks side by side: ``gym.make_vec("MetaWorld/MT10")`` and ``suite("meta_world").make_vec(...)``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.meta_world.tasks import resolve_task_set
from fleetgym.envs.suite import make_task


def make_vec(
    tasks: str | Sequence[str],
    num_envs: int | None = None,
    *,
    asynchronous: bool = False,
    autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    one_hot: bool = True,
    goals: str = "all",
    **kwargs: Any,
) -> VectorEnv:
    """Makes a vector environment; environment ``i`` plays task ``i % len(tasks)``.

    Args:
        tasks: A split's name, or task names.
        num_envs: How many environments; None makes one a task.
        asynchronous: One process an environment (``AsyncVectorEnv``) instead of all in this one.
        autoreset_mode: What happens after an episode's last step; by default the next episode begins in that same step
            and the last observation and info stand in ``infos["final_obs"]`` and ``infos["final_info"]``.
        one_hot: Whether the task's one-hot is appended to the observations.
        goals: ``"all"``, ``"train"`` or ``"held_out"``.
        **kwargs: More arguments of ``MetaWorldEnv``.

    Returns:
        Observations are [num_envs, 39 + number of tasks], float64.

    Raises:
        UserError: Unknown task set, no environments, or an unknown autoreset mode.
    """
    tasks = resolve_task_set(tasks)
    num_envs = len(tasks) if num_envs is None else num_envs
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}; at least one is needed")
    if not isinstance(autoreset_mode, AutoresetMode):
        modes = {key: mode for mode in AutoresetMode for key in (mode.name.lower(), mode.value.lower())}
        if str(autoreset_mode).lower() not in modes:
            raise unknown("autoreset mode", autoreset_mode, [mode.name.lower() for mode in AutoresetMode])
        autoreset_mode = modes[str(autoreset_mode).lower()]
    task_set = tasks if one_hot else None
    makers = [
        functools.partial(make_task, "meta_world", tasks[index % len(tasks)], goals=goals, task_set=task_set, **kwargs)
        for index in range(num_envs)
    ]
    if not asynchronous:
        return SyncVectorEnv(makers, autoreset_mode=autoreset_mode)
    # Forking would copy whatever threads and OpenGL contexts the caller has.
    return AsyncVectorEnv(makers, autoreset_mode=autoreset_mode, context="forkserver")


def _make_split(split: str, num_envs: int = 1, **kwargs: Any) -> VectorEnv:
    # gym.make_vec says num_envs=1 where its caller says nothing: then it is one environment a task.
    return make_vec(split, None if num_envs == 1 else num_envs, **kwargs)


def mt10(num_envs: int = 1, **kwargs: Any) -> VectorEnv:
    """The entry point of ``gym.make_vec("MetaWorld/MT10")``; ``num_envs=1`` means one environment a task."""
    return _make_split("mt10", num_envs, **kwargs)


def mt50(num_envs: int = 1, **kwargs: Any) -> VectorEnv:
    """The entry point of ``gym.make_vec("MetaWorld/MT50")``; ``num_envs=1`` means one environment a task."""
    return _make_split("mt50", num_envs, **kwargs)
