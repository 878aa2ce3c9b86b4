"""Several tool-use tasks side by side: ``suite("fleet_tools").make_vec(...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import VectorEnv

from fleetgym.envs.fleet_tools.names import resolve_task_set
from fleetgym.envs.vector import suite_vector


def make_vec(tasks: str | Sequence[str], num_envs: int | None = None, **options: Any) -> VectorEnv:
    """Makes a vector environment; environment ``i`` plays task ``i % len(tasks)``.

    Args:
        tasks: A split's name, or task names.
        num_envs: How many environments; None makes one a task.
        **options: Of :func:`fleetgym.envs.vector.suite_vector`, or of ``FleetToolsEnv``.

    Returns:
        Observations are [num_envs, 27 + number of tasks], float64, where ``observation`` asks for nothing else.

    Raises:
        UserError: Unknown task set, no environments, or an unknown autoreset mode.
    """
    return suite_vector("fleet_tools", resolve_task_set(tasks), num_envs, **options)
