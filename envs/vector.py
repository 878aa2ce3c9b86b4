"""Environments of a suite side by side, in this process or one each."""

from __future__ import annotations

import functools
from typing import Any

from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.suite import make_task


def suite_vector(
    suite_name: str,
    tasks: tuple[str, ...],
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
        suite_name: Of a registered suite.
        tasks: Task names.
        num_envs: How many environments; None makes one a task.
        asynchronous: One process an environment (``AsyncVectorEnv``) instead of all in this one.
        autoreset_mode: What happens after an episode's last step; by default the next episode begins in that same step
            and the last observation and info stand in ``infos["final_obs"]`` and ``infos["final_info"]``.
        one_hot: Whether the task's one-hot is appended to the observations.
        goals: ``"all"``, ``"train"`` or ``"held_out"``.
        **kwargs: More arguments of the environment.

    Raises:
        UserError: No environments, or an unknown autoreset mode.
    """
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
        functools.partial(make_task, suite_name, tasks[index % len(tasks)], goals=goals, task_set=task_set, **kwargs)
        for index in range(num_envs)
    ]
    if not asynchronous:
        return SyncVectorEnv(makers, autoreset_mode=autoreset_mode)
    # Forking would copy whatever threads and OpenGL contexts the caller has.
    return AsyncVectorEnv(makers, autoreset_mode=autoreset_mode, context="forkserver")
