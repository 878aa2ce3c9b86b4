"""Several grasping tasks side by side: ``suite("grasping").make_vec(...)``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gymnasium.vector import VectorEnv

from fleetgym.envs.vector import suite_vector


def make_vec(tasks: Sequence[str], num_envs: int | None = None, **options: Any) -> VectorEnv:
    """Makes a vector environment; environment ``i`` plays task ``i % len(tasks)``.

    Args:
        tasks: Task names.
        num_envs: How many environments; None makes one a task.
        **options: Of :func:`fleetgym.envs.vector.suite_vector`, or of ``GraspingEnv``.

    Raises:
        UserError: Unknown task set, no environments, or an unknown autoreset mode.
    """
    options.setdefault("one_hot", False)  # observations are Dicts, and a policy sees what the object is
    return suite_vector("grasping", tuple(tasks), num_envs, **options)
