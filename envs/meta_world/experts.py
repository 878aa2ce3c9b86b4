"""A scripted expert for each task, as a ``Policy``.

Source: the ``metaworld`` package's scripted policies. They see entries 0-38 of the observation and remember nothing.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError
from fleetgym.core.policy import FunctionPolicy
from fleetgym.envs.meta_world.rebind import fast_numpy, rebound_members
from fleetgym.envs.meta_world.tasks import check_task

_OBSERVATION_SIZE = 39


def _move(from_xyz: np.ndarray, to_xyz: np.ndarray, p: float) -> np.ndarray:
    """Upstream's ``move`` without its warning about actions beyond 1: they are clipped."""
    return p * (to_xyz - from_xyz)


@cache
def _script(task: str) -> Any:
    """Upstream's scripted policy of a task, silent and quick. It has no state, so one serves everybody."""
    from metaworld.policies import ENV_POLICY_MAP

    upstream = ENV_POLICY_MAP[task]
    return type(
        f"Quiet{upstream.__name__}", (upstream,), rebound_members(upstream, {"np": fast_numpy, "move": _move})
    )()


class Expert:
    """The scripted expert of one task: a function of one observation; picklable.

    Args:
        task: A task name.

    Raises:
        UserError: Unknown task.
    """

    def __init__(self, task: str) -> None:
        self.task = check_task(task)

    def __call__(self, observation: np.ndarray) -> np.ndarray:
        """Chooses an action.

        Args:
            observation: [39] or longer; what follows the first 39 entries (a one-hot) is ignored.

        Returns:
            Action [4], float32, within -1..1.
        """
        observation = np.asarray(observation, np.float64)
        if observation.ndim != 1 or observation.size < _OBSERVATION_SIZE:
            raise UserError(f"the expert of {self.task} takes observations of 39 entries, not of {observation.shape}")
        action = _script(self.task).get_action(observation[:_OBSERVATION_SIZE])
        return np.minimum(np.maximum(action, -1.0), 1.0).astype(np.float32)


def expert(task: str) -> FunctionPolicy:
    """The scripted expert of a task as a policy with ``predict``.

    Raises:
        UserError: Unknown task.
    """
    return FunctionPolicy(Expert(task), spaces.Box(-1.0, 1.0, (4,), dtype=np.float32))
