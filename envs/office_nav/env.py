"""One OfficeNav environment: ``gym.make("OfficeNav-v0")``."""

from __future__ import annotations

import operator
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import kernels
from fleetgym.envs.office_nav.variants import Variant, resolve_variant
from fleetgym.envs.office_nav.vector import Rows, observation_space


class OfficeNavEnv(gym.Env):
    """An office building in which the blue office is to be found; a floor plan on the wall says where it is.

    **Observation**, a dict: ``image``, the 7 x 7 cells in front of the agent, which walls and closed doors hide; as
    pixels (uint8 [56, 56, 3]) or, in symbolic variants, as MiniGrid's numbers for object, colour and state (uint8
    [7, 7, 3], x first). ``sign``: uint8 [84, 84, 3], the floor plan for who stands on its cell, else zeros.
    ``on_sign``: whether the agent stands there.

    **Actions**: 0 turn left, 1 turn right, 2 forward, 3 open or close the door ahead. (The released variant has
    MiniGrid's seven: 3, 4 and 6 do nothing, 5 is the door.)

    **Rewards**: -0.05 for every step; the step into a blue office gives 1 instead and terminates the episode. After
    ``horizon`` steps (30) it is truncated.

    **Trials**: a trial is ``episodes`` (2) episodes in one building. ``reset()`` goes on to the trial's next episode,
    with all doors closed and a sign drawn anew for the same goal; after its last episode ``reset()`` begins the next
    trial in another building. ``info`` has ``trial``, ``episode`` (from 1), ``task_id`` (the building), ``phrase``
    (what the sign says, or the style of a picture), ``phrase_id``, ``goal`` (the office that the sign names, the
    nearest blue one: row * columns + column) and ``success``. All but ``episode`` would help an agent to cheat.

    Source: Liu et al., "Simple Embodied Language Learning as a Byproduct of Meta-Reinforcement Learning", ICML 2023.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}

    def __init__(
        self,
        variant: str | Variant = "OfficeNav-v0",
        *,
        split: str = "train",
        render_mode: str | None = None,
        **changes: Any,
    ):
        """Builds the environment.

        Args:
            variant: An id of ``VARIANTS``.
            split: Where trials come from, unless ``reset`` is told otherwise.
            render_mode: None, ``"rgb_array"`` (the whole building) or ``"ansi"``.
            **changes: Attributes of ``Variant`` to change, such as ``horizon``.

        Raises:
            UserError: Unknown variant, split, render mode or attribute; the message names what is allowed.
        """
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render_mode {render_mode!r}: it is None, {', '.join(self.metadata['render_modes'])}")
        self.variant = resolve_variant(variant, changes)
        self.render_mode = render_mode
        self.observation_space = observation_space(self.variant)
        self.action_space = spaces.Discrete(len(self.variant.actions))
        self._kinds = len(self.variant.actions)
        self._rows = Rows(self.variant, split, 1)
        self._rgb = self.variant.view == "rgb"
        self._reward, self._flags = np.zeros(1), (np.zeros(1, bool), np.zeros(1, bool))
        self._action, self._on_sign = np.zeros(1, np.int64), np.zeros(1, np.int64)
        self._nothing = np.zeros((1, 1), np.uint64)

    def _observe(self) -> tuple[dict[str, Any], dict[str, Any]]:
        # New arrays on every call: they are the caller's.
        rows = self._rows
        image, sign = np.empty(self.variant.image_shape, np.uint8), np.zeros((84, 84, 3), np.uint8)
        flat = image.reshape(1, -1)
        words = flat.view(np.uint64) if self._rgb else self._nothing
        sign_words, drawn = sign.reshape(1, -1).view(np.uint64), np.full(1, -1)
        kernels.observe(rows.sights, rows.state, flat, words, self._rgb, sign_words, drawn, self._on_sign)
        info: dict[str, Any] = dict(zip(kernels.INFO, rows.state[: len(kernels.INFO), 0].tolist()))
        info["phrase"], info["success"] = rows.phrase(0), bool(info["success"])
        return {"image": image, "sign": sign, "on_sign": self._on_sign[0]}, info

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Goes on to the trial's next episode, or begins a trial.

        Args:
            seed: Begins trial 0 of that seed, in the split that the environment was made with.
            options: ``split``: ``"train"``, ``"test"``, ``"phrases"``, ``"layout"`` or ``"style"`` (text variants have
                no ``style``, picture variants no ``phrases``): begins a trial of that split, and later ones come from
                it as well, until a seed or another split is given. ``task_id``: begins a trial in that building; its
                split is ``train`` or ``test`` by the id unless ``split`` says otherwise. ``new_trial``: True begins a
                trial, False insists on going on with the present one.

        Raises:
            UserError: Unknown option or split, an impossible task id, or ``new_trial=False`` when the trial is
                finished; the message names what is allowed. Nothing has been reset then.
        """
        self._rows.reset([seed], options, lambda: int(self.np_random.integers(1 << 63)))
        if seed is not None:  # known to be good by now
            super().reset(seed=int(seed))
        return self._observe()

    def step(self, action: int) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves the agent.

        Raises:
            UserError: An action that does not exist, no reset before, or the episode has ended. Nothing has moved then.
        """
        rows = self._rows
        try:
            number = -1 if isinstance(action, bool) else operator.index(action)
        except TypeError:
            number = -1
        if not 0 <= number < self._kinds:
            allowed = ", ".join(f"{index} {name}" for index, name in enumerate(self.variant.actions))
            raise UserError(f"action {action!r} does not exist; the actions are {allowed}")
        if not rows.started[0]:
            raise UserError("step before reset; call reset() first")
        self._action[0] = number
        terminated, truncated = self._flags
        code = kernels.step(rows.rules, rows.state, self._action, kernels.DISABLED, self._reward, terminated, truncated)
        if code < 0:
            raise UserError("the episode has ended; call reset() before the next step")
        observation, info = self._observe()
        return observation, float(self._reward[0]), bool(terminated[0]), bool(truncated[0]), info

    def render(self) -> np.ndarray | str | None:
        """The whole building: uint8 [height, width, 3], or a string.

        Raises:
            UserError: Not reset yet.
        """
        if self.render_mode is None:
            gym.logger.warn("render() without a render_mode; make it with render_mode='rgb_array' or 'ansi'")
            return None
        if not self._rows.started[0]:
            raise UserError("render before reset; call reset() first")
        return self._rows.frame(0) if self.render_mode == "rgb_array" else self._rows.text(0)

    def sign(self) -> np.ndarray:
        """What hangs at the sign's place in this episode, wherever the agent is; uint8 [84, 84, 3].

        Raises:
            UserError: Not reset yet.
        """
        if not self._rows.started[0]:
            raise UserError("sign before reset; call reset() first")
        return self._rows.sign(0)
