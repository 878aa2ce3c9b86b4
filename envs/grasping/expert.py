"""The scripted expert: to the nearest grasp, first to a stand-off, then straight in.

The grasp is the goal that ``reset`` has found (:mod:`fleetgym.envs.grasping.grasps`). Each action is computed from
where the hand is, so the expert finds its way back after a knock, and labels states that others have reached.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.grasping.grasps import waypoint
from fleetgym.envs.grasping.names import FAMILIES
from fleetgym.envs.grasping.poses import action_of, inverse, shortened


def label(X_WH: np.ndarray, goal: np.ndarray, remaining: int) -> np.ndarray:
    """The expert's action [6], within -1..1, at a pose of the hand.

    Args:
        X_WH: The hand's pose [4, 4].
        goal: The grasp [4, 4].
        remaining: Steps that are left, the next one included; 1 goes to the grasp at once.
    """
    return shortened(action_of(inverse(X_WH) @ waypoint(X_WH, goal, remaining)))


class Expert:
    """The scripted expert of one family, a ``Policy`` with ``attach``; see the module.

    Args:
        family: A task's name: ``"Procedural"``, ``"Named"``, ``"Household"`` or ``"YCB"``.

    Raises:
        UserError: Unknown family.
    """

    def __init__(self, family: str) -> None:
        if family not in FAMILIES:
            raise unknown("grasping task", family, FAMILIES)
        self.family = family
        self.name = f"antipodal expert of {family}"
        self._env: Any = None

    def attach(self, env: Any) -> None:
        """Gives it the environment whose state it may know.

        Raises:
            UserError: It is not one of this family.
        """
        env = env.unwrapped
        if getattr(env, "family", None) != self.family:
            raise UserError(
                f"this expert plays {self.family}, not {getattr(env, 'family', env)}; make the expert of that task"
            )
        self._env = env

    def action_at(self, X_WH: np.ndarray, remaining: int) -> np.ndarray:
        """The action [6] at any pose of the hand in the scene of the moment: the label of DAgger and DART.

        Args:
            X_WH: The hand's pose [4, 4].
            remaining: Steps that are left, the next one included.

        Raises:
            UserError: It was not attached, or no episode has begun.
        """
        if self._env is None:
            raise UserError("the expert reads the simulation: attach(env) comes first; rollout does it with num_envs=1")
        if self._env.goal is None:
            raise UserError("no episode has begun, so there is no grasp to go to; call env.reset() first")
        return label(X_WH, self._env.goal, remaining)

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """The action [1, 6] for the one environment that it was attached to; the observation is not read.

        Raises:
            UserError: It was not attached, or no episode has begun.
        """
        env = self._env
        pose = None if env is None else env.hand
        return self.action_at(pose, 1 if env is None else env.remaining)[None], None


def expert(family: str, **options: Any) -> Expert:
    """The scripted expert of a family of objects.

    Raises:
        UserError: Unknown family, or options (it has none).
    """
    if options:
        raise UserError(f"the experts of grasping have no options, {sorted(options)} were given")
    return Expert(family)
