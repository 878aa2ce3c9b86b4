"""What acts: Stable-Baselines3's ``predict`` and nothing else, so that its models are policies here and ours are there.

Source: ``BasePolicy.predict`` of Stable-Baselines3 and ``RecurrentActorCriticPolicy.predict`` of sb3-contrib.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from fleetgym.core.errors import UserError

#: One observation, or a batch of them: an array, or a mapping of arrays for a ``gymnasium.spaces.Dict``.
Observation = Any
#: The memory of a recurrent policy; only the policy that made it can read it.
State = Any


@runtime_checkable
class Policy(Protocol):
    """Anything with the ``predict`` of Stable-Baselines3.

    Every SB3 and sb3-contrib model is one already, and whatever runs an SB3 model (such as
    ``stable_baselines3.common.evaluation.evaluate_policy``) runs any object of this kind.
    """

    def predict(
        self,
        observation: Observation,
        state: State | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, State | None]:
        """Chooses actions.

        Args:
            observation: A batch [B, ...] or a single observation [...], in numpy.
            state: What the previous call returned, or None at the beginning. Opaque to the caller, who therefore
                keeps the batch size constant for as long as it passes the state on.
            episode_start: Bool [B]; True clears the memory of that row before it acts. None means that no row starts.
            deterministic: Whether to take the most likely action instead of sampling.

        Returns:
            The action, [B, ...] for a batch and [...] for a single observation, and the next state (None for a
            policy without memory).
        """
        ...


class FunctionPolicy:
    """A policy without memory made of a function of one observation; scripted experts are of this kind.

    Args:
        function: Maps one observation (an array such as [Do], or a mapping) to one action.
        action_space: A ``gymnasium.spaces.Space``; if it is a Box, actions are clipped to it and take its dtype.
        observation_ndim: Number of dimensions of one observation, by which a batch is told from a single one:
            1 for a vector, 3 for a picture. For mappings it counts the dimensions of their first entry.
    """

    def __init__(
        self, function: Callable[[Any], Any], action_space: Any | None = None, *, observation_ndim: int = 1
    ) -> None:
        self.function = function
        self.action_space = action_space
        self.observation_ndim = observation_ndim
        low, high = getattr(action_space, "low", None), getattr(action_space, "high", None)
        self._bounds = None if low is None or high is None else (low, high)

    def predict(
        self,
        observation: Observation,
        state: State | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, State | None]:
        """Applies the function to each row; ``state`` is handed back as it came. See ``Policy.predict``.

        Raises:
            UserError: The observation has neither the dimensions of one nor those of a batch.
        """
        mapping = isinstance(observation, Mapping)
        first = next(iter(observation.values())) if mapping else observation
        extra = np.ndim(first) - self.observation_ndim
        if extra == 0:
            action = np.asarray(self.function(observation))
        elif extra == 1 and mapping:
            rows = range(len(first))
            action = np.stack([self.function({key: value[i] for key, value in observation.items()}) for i in rows])
        elif extra == 1:
            action = np.stack([self.function(row) for row in observation])
        else:
            raise UserError(
                f"observation of shape {np.shape(first)}: this policy takes {self.observation_ndim} dimensions, "
                f"or {self.observation_ndim + 1} for a batch; pass observation_ndim= to FunctionPolicy"
            )
        if self._bounds is not None:
            action = np.clip(action, *self._bounds).astype(self.action_space.dtype, copy=False)
        return action, state
