"""How hard and how deep things touch, in every time step of an episode: what an honest success is checked with."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.fleet_tools.simulation import Contacts


class Touch(gym.Wrapper):
    """Notes the deepest overlap of two shapes and the largest force on the tool, time step by time step.

    ``info["depth"]``, metres, and ``info["force"]``, newtons, are the largest since the reset. Observations, rewards
    and motion are those without it; a step takes about four times as long.

    Args:
        env: A tool-use environment.

    Raises:
        UserError: The environment is none of fleet-tools.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        if not hasattr(env.unwrapped, "contacts"):
            raise UserError(f"{env}: Touch measures tools; give it an environment such as FleetTools/Hammer-v0")
        #: For each episode begun, the largest so far.
        self.episodes: list[Contacts] = []

    def reset(self, **options: Any) -> tuple[Any, dict[str, Any]]:
        """Begins an episode, and with it an entry of ``episodes``."""
        self.env.unwrapped.sim.after_step = None
        observation, info = self.env.reset(**options)
        self.episodes.append(Contacts(0.0, 0.0))
        self.env.unwrapped.sim.after_step = self._note
        return observation, {**info, **self.episodes[-1]._asdict()}

    def step(self, action: np.ndarray) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Makes one control step."""
        *rest, info = self.env.step(action)
        return *rest, {**info, **self.episodes[-1]._asdict()}

    def close(self) -> None:
        """Stops measuring, and closes the environment."""
        self.env.unwrapped.sim.after_step = None
        super().close()

    def _note(self) -> None:
        now, worst = self.env.unwrapped.contacts(), self.episodes[-1]
        self.episodes[-1] = Contacts(max(worst.depth, now.depth), max(worst.force, now.force))
