"""Meta-World's task classes with the same numbers at several times the speed, and resets that depend on nothing else.

``simulation(task)`` gives an object of a subclass of upstream's task class. What it computes is what upstream computes,
to rounding (``tests/envs/test_parity.py`` compares them); what it no longer does is look up every body by name, scan
contacts in Python, build a general rotation for each quaternion, and settle the arm twice for a reset that needs it
once.
"""

from __future__ import annotations

import copy
import math
import types
from functools import cache, lru_cache
from typing import Any

from fleetgym.core.render import choose_gl
from fleetgym.envs.meta_world.rebind import FastRotation, fast_numpy, fast_tolerance, rebind, rebound_members
from fleetgym.envs.meta_world.tasks import check_task

choose_gl()  # before MuJoCo is imported

import mujoco  # noqa: E402
import numpy as np  # noqa: E402
from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # noqa: E402
from metaworld.sawyer_xyz_env import SawyerXYZEnv  # noqa: E402
from metaworld.utils import reward_utils  # noqa: E402

#: Size of an observation without a one-hot, and of its current part (the other parts: the previous one, the goal).
OBSERVATION_SIZE = 39
FRAME_SIZE = 18

#: Tasks in which a loose part comes to rest differently where the goal has moved its support, or in which the moved
#: body may touch the arm: here the arm is settled anew with the goal in place. In all others the settled state does not
#: depend on the goal.
SETTLES_WITH_GOAL = frozenset(
    {
        "box-close-v3",
        "disassemble-v3",
        "door-lock-v3",
        "door-unlock-v3",
        "handle-press-side-v3",
        "handle-press-v3",
        "handle-pull-side-v3",
        "handle-pull-v3",
        "peg-unplug-side-v3",
    }
)

_REPLACEMENTS = {
    "np": fast_numpy,
    "Rotation": FastRotation,
    "reward_utils": types.SimpleNamespace(**{**vars(reward_utils), "tolerance": fast_tolerance}),
    "tolerance": fast_tolerance,
}
# Upstream bounds the hand, the gripper and the goal, and leaves objects unbounded. The bounds here are the same for all
# tasks; those of goals and objects are beyond anything in a scene (the table is 2 m wide), so that they only ever meet
# an object that has fallen off it.
_HAND = SawyerXYZEnv._HAND_SPACE
_OBJECTS = np.array([10.0, 10.0, 10.0, 1.0, 1.0, 1.0, 1.0] * 2)
#: Bounds of an observation [39].
LOW = np.concatenate([_HAND.low, [-1.0], -_OBJECTS] * 2 + [-np.ones(3)])
HIGH = np.concatenate([_HAND.high, [1.0], _OBJECTS] * 2 + [np.ones(3)])
_MOCAP_QUAT = np.array([1.0, 0.0, 1.0, 0.0])


class _NamedViews:
    """Stands in for ``MjData`` where tasks read it by name: each view is looked up once and then kept.

    Whatever is not looked up by name is the data's own attribute.
    """

    def __init__(self, data: mujoco.MjData) -> None:
        self._data = data

        def views(lookup: Any, names: tuple[str, ...]) -> Any:
            def view(name: str) -> types.SimpleNamespace:
                found = lookup(name)
                # These arrays are windows on MuJoCo's memory: they show the state of the moment, for as long as it
                # lives.
                return types.SimpleNamespace(**{key: getattr(found, key) for key in names})

            return cache(view)

        self.body = views(data.body, ("id", "xpos", "xquat", "xmat"))
        self.site = views(data.site, ("id", "xpos", "xmat"))
        self.geom = views(data.geom, ("id", "xpos", "xmat"))
        self.joint = views(data.joint, ("id", "qpos", "qvel"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._data, name)


class FastSawyer(SawyerXYZEnv):
    """What all tasks share: stepping, observing and resetting the arm. Stands before upstream's class in the MRO."""

    task: str

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._views: _NamedViews | None = None
        super().__init__(*args, **kwargs)
        self._partially_observable = False
        self._freeze_rand_vec = True
        self._set_task_called = True
        self.__dict__.pop("sawyer_observation_space", None)
        self._bind()

    def _initialize_simulation(self) -> tuple[mujoco.MjModel, mujoco.MjData]:
        # Compiling a scene takes 0.1 s; several simulations of one task copy the compiled one.
        model = copy.copy(_compiled(self.fullpath))
        return model, mujoco.MjData(model)

    def _bind(self) -> None:
        model, data = self.model, self.data
        self._raw = data
        self._views = views = _NamedViews(data)
        self._hand = views.body("hand").xpos
        self._fingers = views.body("rightclaw").xpos, views.body("leftclaw").xpos
        self._tips = views.site("rightEndEffector").xpos, views.site("leftEndEffector").xpos
        self._pads = views.geom("leftpad_geom").id, views.geom("rightpad_geom").id
        self._mocap_pos, self._mocap_quat, self._ctrl = data.mocap_pos, data.mocap_quat, data.ctrl
        self._observation = np.zeros(OBSERVATION_SIZE)
        size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_INTEGRATION)
        self._almost_settled = np.empty(size)
        self._is_settled = False
        # A task writes what it randomises into the model and into attributes; each reset begins from these.
        self._first_body_pos, self._first_site_pos = model.body_pos.copy(), model.site_pos.copy()
        self._first_attributes = dict(self.__dict__)
        self._first_arrays = {
            name: value.copy()
            for name, value in self.__dict__.items()
            if isinstance(value, np.ndarray) and value.flags.owndata and not name.startswith(("_first", "_almost"))
        }

    # ---------------------------------------------------------------- looked up once

    def get_endeff_pos(self) -> np.ndarray:
        """Where the hand is, [3], metres."""
        return self._hand if self._views is not None else super().get_endeff_pos()

    @property
    def tcp_center(self) -> np.ndarray:
        """The middle between the finger tips, [3], metres."""
        if self._views is None:
            return super().tcp_center
        right, left = self._tips
        return (right + left) / 2.0

    def get_body_com(self, body_name: str) -> np.ndarray:
        """Where a body is, [3], metres; a window on MuJoCo's memory."""
        return self._views.body(body_name).xpos if self._views is not None else super().get_body_com(body_name)

    def _get_site_pos(self, site_name: str) -> np.ndarray:
        return self._views.site(site_name).xpos.copy()

    def touching_object(self, object_geom_id: int) -> bool:
        """Whether both finger pads press on a geom."""
        contact = self._raw.contact
        pairs = contact.geom
        touching = (pairs == object_geom_id).any(axis=1)
        if not touching.any():
            return False
        rows = np.flatnonzero(touching)
        pairs, addresses, force = pairs[rows], contact.efc_address[rows], self._raw.efc_force
        return all(
            sum(force[address] for pair, address in zip(pairs, addresses, strict=True) if pad in pair) > 0
            for pad in self._pads
        )

    # ---------------------------------------------------------------- observing

    def _get_curr_obs_combined_no_goal(self) -> np.ndarray:
        if self._views is None:
            return np.zeros(FRAME_SIZE)
        frame = np.zeros(FRAME_SIZE)
        frame[:3] = self._hand
        right, left = self._fingers
        gap = right - left
        # The fingers are at most 0.1 m apart, so this is the opening from 0 to 1.
        frame[3] = min(max(math.sqrt(gap.dot(gap)) / 0.1, 0.0), 1.0)
        positions, quaternions = self._get_pos_objects(), self._get_quat_objects()
        frame[4:7], frame[7:11] = positions[:3], quaternions[:4]
        if len(positions) > 3:
            frame[11:14], frame[14:18] = positions[3:], quaternions[4:]
        return frame

    def _get_obs(self) -> np.ndarray:
        frame = self._get_curr_obs_combined_no_goal()
        observation = self._observation
        observation[:FRAME_SIZE] = frame
        observation[FRAME_SIZE : 2 * FRAME_SIZE] = self._prev_obs
        observation[2 * FRAME_SIZE :] = self._get_pos_goal()
        self._prev_obs = frame
        return observation

    def _clipped(self, observation: np.ndarray) -> np.ndarray:
        return np.minimum(np.maximum(observation, LOW), HIGH)

    # ---------------------------------------------------------------- stepping

    def advance(self, action: np.ndarray) -> tuple[np.ndarray, float, dict[str, Any]]:
        """One control step of 12.5 ms: five MuJoCo steps.

        Args:
            action: [4] float32: the hand's move in centimetres along x, y, z, and the closing of the gripper.

        Returns:
            The observation [39], the reward, and upstream's info.
        """
        model, data = self.model, self._raw
        # The arithmetic (float32 actions, float64 positions) is upstream's, to the bit.
        move = np.minimum(np.maximum(action[:3], -1.0), 1.0) * self.action_scale
        target = self._mocap_pos[0] + move
        self._mocap_pos[0] = np.minimum(np.maximum(target, self.mocap_low), self.mocap_high)
        self._mocap_quat[0] = _MOCAP_QUAT
        grip = float(action[3])
        self._ctrl[0], self._ctrl[1] = grip, -grip
        mujoco.mj_step(model, data, nstep=self.frame_skip)
        # mj_step leaves positions one substep behind the state that it ends in; the reward also reads contact forces.
        mujoco.mj_forward(model, data)
        self.data = self._views
        try:
            observation = self._clipped(self._get_obs())
            reward, info = self.evaluate_state(observation, action)
        finally:
            self.data = data
        return observation, float(reward), info

    # ---------------------------------------------------------------- resetting

    def begin(self, draw: Any) -> np.ndarray:
        """Begins an episode, whatever was played before.

        Upstream's benchmark resets a task twice with the same random vector: the first pass moves bodies in the model,
        the second one sees them moved. So do we, on a model put back to how it was loaded; the settling of the arm
        (250 MuJoCo steps a pass) is done once for the object, except in ``SETTLES_WITH_GOAL``.

        Args:
            draw: Called without arguments for a random vector, and again if a task rejects it.

        Returns:
            The observation [39].
        """
        self._restore()
        self._draw = draw
        mujoco.mj_resetData(self.model, self._raw)
        self._pristine = True
        self.reset_model()
        self._draw = None  # the second pass takes the same vector
        mujoco.mj_resetData(self.model, self._raw)
        self._pristine = False
        observation = self.reset_model()
        observation[FRAME_SIZE : 2 * FRAME_SIZE] = observation[:FRAME_SIZE]
        self._prev_obs = observation[:FRAME_SIZE].copy()
        return self._clipped(observation)

    def _restore(self) -> None:
        self.model.body_pos[:], self.model.site_pos[:] = self._first_body_pos, self._first_site_pos
        kept = {name: self.__dict__[name] for name in ("_is_settled", "_first_attributes", "_first_arrays")}
        self.__dict__.clear()
        self.__dict__.update(kept["_first_attributes"])
        self.__dict__.update({name: value.copy() for name, value in kept["_first_arrays"].items()})
        self.__dict__.update(kept)

    def _get_state_rand_vec(self) -> np.ndarray:
        if self._draw is not None:
            self._last_rand_vec = self._draw()
        return self._last_rand_vec

    def _reset_hand(self, steps: int = 50) -> None:
        model, data = self.model, self._raw
        shortcut = self._is_settled and (self._pristine or self.task not in SETTLES_WITH_GOAL)
        if shortcut:
            mujoco.mj_setState(model, data, self._almost_settled, mujoco.mjtState.mjSTATE_INTEGRATION)
        else:
            for _ in range(steps * self.frame_skip - 1):
                self._hold_hand()
                mujoco.mj_step(model, data)
            if self._pristine and not self._is_settled:
                mujoco.mj_getState(model, data, self._almost_settled, mujoco.mjtState.mjSTATE_INTEGRATION)
                self._is_settled = True
        # The last substep is always made: it computes everything that is not part of the state.
        self._hold_hand()
        mujoco.mj_step(model, data)
        self.init_tcp = self.tcp_center

    def _hold_hand(self) -> None:
        self._mocap_pos[0] = self.hand_init_pos
        self._mocap_quat[0] = _MOCAP_QUAT
        self._ctrl[0], self._ctrl[1] = -1.0, 1.0

    _gripper_caging_reward = rebind(SawyerXYZEnv._gripper_caging_reward, _REPLACEMENTS)


@lru_cache(maxsize=2)  # 21 MB each
def _compiled(path: str) -> mujoco.MjModel:
    return mujoco.MjModel.from_xml_path(path)


@cache
def simulation_class(task: str) -> type[FastSawyer]:
    """The quick subclass of upstream's class for a task.

    Raises:
        UserError: Unknown task.
    """
    upstream = ALL_V3_ENVIRONMENTS[check_task(task)]
    members = rebound_members(upstream, _REPLACEMENTS)
    # __init__ stays upstream's own; so it is looked up after FastSawyer's, which calls it.
    del members["__init__"]
    return type(f"Fast{upstream.__name__}", (FastSawyer, upstream), {**members, "task": task})


def simulation(task: str) -> FastSawyer:
    """A new simulation of a task; see ``FastSawyer``."""
    return simulation_class(task)()
