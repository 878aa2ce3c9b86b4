"""``gym.make("MetaWorld/reach-v3")``: Meta-World's tasks as Gymnasium environments that keep their seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.goals import GOALS, draw_goal, in_held_out_cell
from fleetgym.envs.meta_world.sim import FRAME_SIZE, HIGH, LOW, OBSERVATION_SIZE, simulation
from fleetgym.envs.meta_world.tasks import HORIZON, check_task, resolve_task_set
from fleetgym.envs.rendering import Camera

#: Our own view of the whole table; the other cameras are upstream's.
TABLE_CAMERA = {"lookat": (0.0, 0.65, 0.1), "distance": 1.45, "azimuth": 150.0, "elevation": -33.0}
CAMERAS = ("table", "corner", "corner2", "corner3", "corner4", "topview", "behindGripper", "gripperPOV")
#: Entries of the random vector that a task draws and then ignores: they do not tell goals apart.
IGNORED_ENTRIES = {
    "basketball-v3": (2,),
    "bin-picking-v3": (2, 3, 4, 5),
    "disassemble-v3": (3, 4, 5),
    "push-back-v3": (5,),
    "push-v3": (5,),
    "push-wall-v3": (5,),
    "shelf-place-v3": (2,),
    "stick-pull-v3": (2, 5),
    "stick-push-v3": (2, 5),
    "sweep-into-v3": (2, 3, 4, 5),
}


def is_held_out(task: str, vector: np.ndarray) -> bool:
    """Whether a random vector belongs to the held-out goals.

    See :func:`fleetgym.envs.goals.in_held_out_cell`.

    Args:
        task: A task name; entries that the task ignores are left out of the hash.
        vector: The random vector, metres.
    """
    vector = np.asarray(vector, np.float64)
    if task in IGNORED_ENTRIES:
        vector = np.delete(vector, IGNORED_ENTRIES[task])
    return in_held_out_cell(vector)


def observation_space(num_tasks: int = 0) -> spaces.Box:
    """The space of observations, the same for all tasks; ``num_tasks`` is the length of the one-hot."""
    return spaces.Box(
        np.concatenate([LOW, np.zeros(num_tasks)]), np.concatenate([HIGH, np.ones(num_tasks)]), dtype=np.float64
    )


class MetaWorldEnv(gym.Env):
    """Meta-World's fifty manipulation tasks, seeded, quick and with held-out goals.

    ## Task

    A Sawyer arm stands behind a table. Its hand points down and is moved through space; its two-finger gripper opens
    and closes. Each of the fifty ids `MetaWorld/<task>-v3` is one task with one kind of object (a door, a drawer, a
    puck, ...) at a place drawn anew for each episode. One control step lasts 12.5 ms. Physics, rewards and success are
    those of the `metaworld` package, number by number.

    ## Observation

    `Box(39,)`, float64. What an object's entries mean depends on the task; without a second object they are zero.

    | index | meaning | min | max | unit |
    |---|---|---|---|---|
    | 0-2 | position of the hand (x right, y away from the arm, z up) | -0.525, 0.348, -0.0525 | 0.525, 1.025, 0.7 | m |
    | 3 | opening of the gripper: 0 closed, 1 open | -1 | 1 | - |
    | 4-6 | position of the first object | -10 | 10 | m |
    | 7-10 | orientation of the first object, a quaternion | -1 | 1 | - |
    | 11-13 | position of the second object | -10 | 10 | m |
    | 14-17 | orientation of the second object, a quaternion | -1 | 1 | - |
    | 18-35 | entries 0-17 one step ago | | | |
    | 36-38 | position of the goal; zeros with `goal_observable=False` | -1 | 1 | m |
    | 39- | with `task_set`: one-hot of the task in that set | 0 | 1 | - |

    Values beyond the bounds are clipped, as upstream does for the hand. All tasks have the same space.

    ## Action

    `Box(-1, 1, (4,))`, float32.

    | index | meaning | min | max | unit |
    |---|---|---|---|---|
    | 0-2 | move of the hand's target along x, y, z | -1 | 1 | cm |
    | 3 | closing of the gripper: 1 closes, -1 opens | -1 | 1 | - |

    ## Reward

    Upstream's dense reward, version 2, between 0 and 10 a step: products of smooth terms for reaching, grasping and
    placing; 10 where the task is solved.

    ## Success

    `info["success"]`, a bool, in the info of each step and of `reset`. It tells of this one step; a task counts as
    solved if it was true at any step of the episode. `info` also has upstream's `near_object`, `grasp_success`,
    `grasp_reward`, `in_place_reward`, `obj_to_target` and `unscaled_reward`.

    ## Termination and truncation

    `terminated` is False, unless `terminate_on_success=True` ends the episode at its first success. `truncated` is True
    at step `horizon` (500). Further steps raise `gymnasium.error.ResetNeeded`.

    ## Randomisation

    `reset` draws one vector of three or six numbers, uniformly: where the object is and where it should go (metres). It
    is the environment's attribute `random_vector`; the goal stands in `reset`'s `info["goal"]`. The same seed gives the
    same episode to the bit, in any process, whatever was played before; without a seed the environment's own generator
    goes on. The global numpy generator is neither read nor changed. `options={"random_vector": v}` sets the vector
    instead.

    `goals="held_out"` draws from one fifth of all goals and `goals="train"` from the others: a goal belongs to the
    fifth by a hash of its millimetre cell (`is_held_out`), so the two are disjoint for any seeds. On average it
    takes five draws to hit it. The task with the fewest cells, window-close, has 151.

    An episode begins as upstream's benchmark begins it (the vector fixed, two passes of the task's reset).

    ## Arguments

    - `task`: the task's name, such as `"reach-v3"`; part of the id.
    - `render_mode`: None or `"rgb_array"`.
    - `goals`: `"all"`, `"train"` or `"held_out"`.
    - `goal_observable`: whether entries 36-38 tell the goal.
    - `task_set`: `"quick"`, `"mt10"`, `"mt50"` or a sequence of task names; appends a one-hot to the observation.
    - `horizon`: steps after which the episode is truncated.
    - `terminate_on_success`: whether success ends the episode.
    - `render_size`: (height, width) of pictures, pixels; `height` and `width` set one of them.
    - `camera_name`: `"table"`, or one of upstream's (turned upright): `"corner"`, `"corner2"`, `"corner3"`,
    `"corner4"`, `"topview"`, `"behindGripper"`, `"gripperPOV"`.

    ## Version history

    - v3: as in `metaworld` 3, with upstream's seeding, horizon and success mended.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 80}

    def __init__(
        self,
        task: str,
        *,
        render_mode: str | None = None,
        goals: str = "all",
        goal_observable: bool = True,
        task_set: str | Sequence[str] | None = None,
        horizon: int = HORIZON,
        terminate_on_success: bool = False,
        render_size: tuple[int, int] = (240, 320),
        height: int | None = None,
        width: int | None = None,
        camera_name: str = "table",
    ) -> None:
        self.task = check_task(task)
        if goals not in GOALS:
            raise unknown("choice of goals", goals, GOALS)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise unknown("render mode", render_mode, self.metadata["render_modes"])
        if camera_name not in CAMERAS:
            raise unknown("camera", camera_name, CAMERAS)
        if horizon < 1:
            raise UserError(f"horizon is {horizon}; an episode has at least one step")
        self.task_set = None if task_set is None else resolve_task_set(task_set)
        if self.task_set is not None and task not in self.task_set:
            raise UserError(f"task {task!r} is not in the task set {self.task_set}; add it, or choose another set")
        self.render_mode, self.camera_name = render_mode, camera_name
        self.goals, self.goal_observable = goals, goal_observable
        self.horizon, self.terminate_on_success = horizon, terminate_on_success
        self.simulation = simulation(task)
        size = (height or render_size[0], width or render_size[1])
        camera = TABLE_CAMERA if camera_name == "table" else camera_name
        # Upstream has its corner cameras the wrong way up.
        self._camera = Camera(self.simulation.model, *size, camera, upside_down=camera_name.startswith("corner"))
        self._one_hot = np.zeros(0)
        if self.task_set is not None:
            self._one_hot = np.zeros(len(self.task_set))
            self._one_hot[self.task_set.index(task)] = 1.0
        self.observation_space = observation_space(self._one_hot.size)
        self.action_space = spaces.Box(-1.0, 1.0, (4,), dtype=np.float32)
        self._steps, self._running = 0, False

    @property
    def random_vector(self) -> np.ndarray:
        """What the last ``reset`` drew: the places of object and goal, [3] or [6], metres."""
        return np.array(self.simulation._last_rand_vec)

    @property
    def model(self) -> Any:
        """The ``mujoco.MjModel``."""
        return self.simulation.model

    @property
    def data(self) -> Any:
        """The ``mujoco.MjData``."""
        return self.simulation.data

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode; see the class for what is drawn.

        Args:
            seed: Seed of the environment's generator; None lets it go on.
            options: ``{"random_vector": v}`` sets the random vector (of the task's own bounds) instead of drawing it.

        Returns:
            The observation, and an info with ``success`` (False) and ``goal`` [3], metres.

        Raises:
            UserError: A random vector of the wrong size, outside of the bounds, or one that the task rejects.
        """
        super().reset(seed=seed)
        vector = (options or {}).get("random_vector")
        draw = self._draw if vector is None else self._given(vector)
        observation = self.simulation.begin(draw)
        self._steps, self._running = 0, True
        info = {
            "success": False,
            "goal": np.array(self.simulation._get_pos_goal(), np.float64),
        }
        return self._output(observation), info

    def _draw(self) -> np.ndarray:
        space = self.simulation._random_reset_space
        return draw_goal(self.np_random, space.low, space.high, self.goals, lambda v: is_held_out(self.task, v))

    def _given(self, vector: Any) -> Any:
        space = self.simulation._random_reset_space
        vector = np.array(vector, np.float64)
        if vector.shape != space.shape:
            raise UserError(f"random_vector has shape {vector.shape}; {self.task} takes {space.shape}")
        # Upstream's bounds are float64 copies of decimal numbers: allow for rounding.
        if not np.all((vector >= space.low - 1e-9) & (vector <= space.high + 1e-9)):
            raise UserError(f"random_vector {vector} is outside of {space.low} .. {space.high} of {self.task}")
        vectors = iter([vector])

        def give() -> np.ndarray:
            for value in vectors:
                return value
            raise UserError(f"{self.task} rejects the random_vector {vector}: its object and goal are too close")

        return give

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Makes one control step of 12.5 ms.

        Args:
            action: [4] numbers; beyond -1..1 they count as clipped.

        Returns:
            Observation, reward, terminated, truncated, info.

        Raises:
            UserError: The action has another shape, or is not finite.
            gymnasium.error.ResetNeeded: The episode is over, or was never begun.
        """
        action = np.asarray(action, np.float32)
        if action.shape != (4,):
            raise UserError(f"the action has shape {action.shape}; {self.task} takes (4,): x, y, z, gripper")
        if not math.isfinite(action.sum()):
            raise UserError(f"the action is {action.tolist()}; each entry must be a finite number")
        if not self._running:
            raise gym.error.ResetNeeded(
                f"no episode of {self.task} is running ({self._steps} steps done); call reset()"
            )
        self._steps += 1
        observation, reward, info = self.simulation.advance(action)
        info["success"] = success = bool(info["success"])
        terminated = self.terminate_on_success and success
        truncated = self._steps >= self.horizon
        self._running = not (terminated or truncated)
        return self._output(observation), reward, terminated, truncated, info

    def _output(self, observation: np.ndarray) -> np.ndarray:
        if not self.goal_observable:
            observation[2 * FRAME_SIZE :] = 0.0
        if self._one_hot.size:
            return np.concatenate([observation[:OBSERVATION_SIZE], self._one_hot])
        return observation

    def render(self) -> np.ndarray | None:
        """Draws the scene: RGB [height, width, 3], uint8; None without ``render_mode="rgb_array"``.

        Raises:
            UserError: No OpenGL works here; the message says what to install.
        """
        if self.render_mode is None:
            gym.logger.warn('render() needs gym.make(..., render_mode="rgb_array")')
            return None
        return self._camera.render(self.simulation.data)

    def close(self) -> None:
        """Frees the OpenGL context."""
        self._camera.close()
