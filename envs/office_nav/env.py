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

    ## Description

    An agent stands in a corridor. Behind closed doors lie offices with coloured floors, and which of them are blue
    differs from building to building. In an alcove hangs a sign that tells where the nearest blue office is: in words
    ("right of and below the upper left corner"), or as a drawn floor plan. The words and the drawing are pixels, and
    they are seen only from the sign's own cell. Nothing rewards reading: it pays in the second episode of a trial,
    which plays in the same building.

    The geometry, colours, rewards, grammar and trials are those of Liu et al., "Simple Embodied Language Learning as a
    Byproduct of Meta-Reinforcement Learning", ICML 2023, and of its released environment, whose mistakes only
    `OfficeNav-Released-v0` keeps. Splits, letters and picture plans are ours: the pictures of the paper are not public.

    ## Action

    `Discrete(4)`; the released variant has `Discrete(7)`, MiniGrid's.

    | num | name | action | num as released |
    |---|---|---|---|
    | 0 | left | turn left | 0 |
    | 1 | right | turn right | 1 |
    | 2 | forward | go one cell forward; walls and closed doors stop the agent | 2 |
    | 3 | toggle | open or close the door ahead | 5 |
    | - | pickup, drop, done | nothing | 3, 4, 6 |

    ## Observation encoding

    `Dict`. The agent sees the 7 x 7 cells in front of it and stands in the middle of the lowest row, looking up. Walls
    and closed doors hide what lies behind them, so an office is seen only when its door is open.

    | key | space | meaning |
    |---|---|---|
    | `image` | `Box(0, 255, (56, 56, 3), uint8)` | these cells in RGB, 8 pixels each, indexed [y, x] |
    | | symbolic: `Box(0, 255, (7, 7, 3), uint8)` | MiniGrid's object, colour and state, indexed [x, y] |
    | `sign` | `Box(0, 255, (84, 84, 3), uint8)` | the sign for who stands on its cell, else zeros |
    | `on_sign` | `Discrete(2)` | 1 on the sign's cell |

    | cell | object | colour | state |
    |---|---|---|---|
    | not seen | 0 | 0 | 0 |
    | corridor; also the cell of the agent | 1 | 0 | 0 |
    | wall | 2 | 5 | 0 |
    | office | 3 | red 0, green 1, blue 2, purple 3, yellow 4, grey 5 | 0 |
    | door | 4 | 0 | 0 open, 1 closed |
    | sign | 6 | 2 | 0 |

    ## Rewards

    -0.05 for every step; the step into a blue office gives 1 instead. So an episode that enters it with its n-th action
    returns 1 - 0.05 (n - 1), and one that never does returns -1.5.

    ## Termination and truncation

    `terminated` in a blue office; other offices do nothing. `truncated` at step `horizon` (30). A further step raises
    `UserError`.

    ## Trials

    A trial is `episodes` (2) episodes in one building. `reset()` goes on to the trial's next episode, with all doors
    closed and a sign drawn anew for the same goal; after its last episode `reset()` begins the next trial in another
    building. `reset(seed=...)` begins trial 0 of that seed. `reset(options={...})` takes

    - `split`: begins a trial of that split, and later ones come from it as well, until a seed or another split is
      given;
    - `task_id`: begins a trial in that building; its split is `train` or `test` by the id unless `split` says
      otherwise;
    - `new_trial`: True begins a trial, False insists on going on with the present one.

    `info` has `trial` and `episode_index` (both from 0), `task_id` (the building), `phrase` (what the sign says, or the
    style of a picture), `phrase_id`, `goal` (the office that the sign names, the nearest blue one: row * columns +
    column) and `success`. All but `episode_index` would help an agent to cheat.

    ## Splits

    No building is both in `train` and in another split, and no sign of `phrases` or `style` hangs in another one.

    | split | buildings | what else is new |
    |---|---|---|
    | `train` | 0 to 999 | - |
    | `test` | 1000 to 1199 | nothing |
    | `phrases` | those of `test` that they fit | text only: just phrases with "3rd office in the 2nd row" |
    | `layout` | 1000 to 1199 | the floor plan: `tall_skinny`, or `standard` where that is the variant's own |
    | `style` | 1000 to 1199 | pictures only: 3 styles of drawing; the other splits have 12 others |

    ## Arguments

    - `render_mode`: None, `"rgb_array"` (the building from above, and the sign while the agent reads it) or `"ansi"`.
    - `split`: where trials come from, unless `reset` is told otherwise.
    - `view` (`"rgb"`, `"symbolic"`), `layout` (`"standard"`, `"tall"`, `"tall_skinny"`), `sign` (`"text"`,
      `"picture"`), `single_goal`: what the registered configurations differ in.
    - `horizon`, `episodes`: of an episode, in steps; of a trial, in episodes.
    - `train_tasks`, `test_tasks`: how many buildings there are.

    ## Vector and torch environments

    `gym.make_vec("OfficeNav-v0", num_envs=1024)` makes the native vector environment: one kernel steps all of them, in
    any of Gymnasium's three autoreset modes (`autoreset_mode="same_step"`). `infos` have the entries of `info` but
    `phrase`, as arrays. `fleetgym.envs.office_nav.TorchOfficeNav(num_envs, device="cuda")` keeps everything in tensors
    on one device. Environment `i` of seed `s` plays, bit for bit, what a single environment of seed `s + i` does.

    ## Version history

    - v0: first version.
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
        info: dict[str, Any] = dict(zip(kernels.INFO, rows.info()[:, 0].tolist()))
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
