"""``gym.make("Grasping/Procedural-v0")``: grasping with a camera in the palm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.utils.seeding import np_random

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.fleet_tools.panda import READY, rotation_vector
from fleetgym.envs.grasping.grasps import depth_inside, grasps_of, plan
from fleetgym.envs.grasping.names import HORIZON, env_id, resolve_objects
from fleetgym.envs.grasping.objects import Thing, load
from fleetgym.envs.grasping.poses import FAR, HAND_EYE, check_pose, delta, intrinsics, inverse, pose, rigid
from fleetgym.envs.grasping.simulation import SUBSTEPS, TARGET, TIMESTEP, Simulation, hand_pose, solve

#: What an observation may hold, besides ``pose`` and ``remaining``, which it always holds.
OBSERVATIONS = ("rgb", "depth", "segmentation", "points", "state")
DISTURBANCES = ("none", "knocks")
#: Steps after which a knock comes, and its largest size: metres and radians along and about each axis.
KNOCK_STEPS, KNOCK = (3, 7), np.array([0.04] * 3 + [0.2] * 3)
#: Points of the target in an observation, at most; numbers of the state.
POINTS, STATE_SIZE = 1024, 22
#: How far the object must have risen, metres.
RISE = 0.08
#: Scenes that a reset tries before it gives up, and starts in each.
SCENES, STARTS = 60, 4
#: A hand that points straight down.
_DOWN = np.diag([1.0, -1.0, -1.0])
#: Places of the hand's frame that are between the fingers, near the palm; an object that covers two of them can be
#: grasped. They are where ten pixels of GA-DDPG's picture must be nearer than 4.5 cm to the camera.
_BETWEEN = np.array([[x, y, 0.081] for x in (-0.008, 0.0, 0.009, 0.018, 0.0276) for y in (-0.011, 0.0, 0.011, 0.0225)])


class GraspingEnv(gym.Env):
    """An arm with a camera in its palm, a table, and an object to be grasped and lifted.

    ## Task

    A Franka Panda looks at an object on a table with a camera that is fixed to its hand. In 20 steps it must bring the
    open gripper to a place where the fingers close on the object: in six dimensions, from where the picture is taken.
    Then a script closes the fingers and lifts. The arm moves by PyBullet's physics, 30 time steps of 1/240 s a step.

    | id | objects |
    |---|---|
    | `Grasping/Procedural-v0` | 1,000 solids of a few convex pieces: 900 for training, 100 held out |
    | `Grasping/Named-v0` | duck, teddy, lego, cube, sphere, jenga, block, soccerball: for training |
    | `Grasping/YCB-v0` | nine household objects of the YCB set: held out |

    The task is that of GA-DDPG (Wang et al., "Goal-Auxiliary Actor-Critic for 6D Robotic Grasping with Point Clouds",
    CoRL 2021), on which SPARTN was measured (Zhou et al., "NeRF in the Palm of Your Hand", CVPR 2023). Camera, action,
    horizon, script, success and the nine held-out objects are theirs. Differences: the training objects are those of
    `pybullet_data` (procedural ones scaled by 0.65; three of their meshes are broken, which `reset` never draws), and
    ones of ShapeNet's classes that are made from numbers (`Household`), instead of ShapeNet's meshes; rotations are
    rotation vectors; the arm starts 20 to 36 cm from the object, which is what it reaches; the objects of the YCB set
    have colours of ours in place of their labels; no random textures. The YCB set needs the extra `grasping`.

    ## Observation

    `Dict`; `observation` says which of the first five it holds. S is `image_size`.

    | key | space | meaning |
    |---|---|---|
    | `rgb` | `[S, S, 3]`, uint8 | the palm's camera: field of view 90 degrees, sees 2 cm to 3 m |
    | `depth` | `[S, S]`, float32 | distance along the view, m; 3 where there is nothing |
    | `segmentation` | `[S, S]`, uint8 | 0 background, 1 the object, 2 the gripper |
    | `points` | `[4, 1024]`, float32 | what is seen of the object, in the hand's frame, m; last row: 1 point, 0 none |
    | `state` | `[22]`, float64 | see below |
    | `pose` | `[4, 4]`, float64 | the hand's pose in the world, as reached |
    | `remaining` | `[1]`, float32 | steps that are left over min(horizon, 20), and at least one step's worth |

    | index of `state` | meaning | unit |
    |---|---|---|
    | 0-2 | the hand's place | m |
    | 3-5 | its rotation, from pointing straight down | rad |
    | 6-12 | the arm's joints | rad |
    | 13-14 | opening of each finger | m |
    | 15 | as `remaining` | |
    | 16-18 | the object's place (its centre of volume) | m |
    | 19-21 | its rotation vector | rad |

    The world's frame is that of the arm's base: x over the table, z up, the table's top at z = 0. The camera is at
    `pose @ HAND_EYE` with OpenGL's axes (`fleetgym.envs.grasping.poses`).

    The gripper is drawn once and pasted by depth; the rest is drawn without the arm. Outside of the gripper the picture
    is equal to that of the whole scene as long as no other part of the arm comes into view; the gripper's pixels are
    the same ones but for the light, which stays that of a hand that points down. The picture after the last step, with
    closed fingers, is drawn as a whole.

    ## Action

    `Box(-1, 1, (6,))`, float32: how the hand shall move from where it is, in its own frame. The commanded pose is
    `pose @ delta(action)`.

    | index | meaning | 1 means |
    |---|---|---|
    | 0-2 | translation along x, y, z; z is where the fingers point, y is how they close | 0.06 m |
    | 3-5 | rotation vector | pi / 6 rad |

    Actions beyond the bounds, or not finite, are refused with an error; the episode may go on with another one.

    ## Reward

    1 at the end of an episode in which the object was lifted, else 0.

    ## Success

    `info["success"]`, a bool: after closing and lifting by 25 cm the object is more than 8 cm higher than at the
    start. False before the end.

    ## Termination and truncation

    `terminated` is True at step `horizon`, or when the object is between the fingers, near the palm; fingers then close
    and lift, within that step. It is also True, without a lift, when the object has fallen by 3 cm. `truncated` is
    never True. `info["grasping"]` is True in the step in which the fingers close. Further steps raise
    `gymnasium.error.ResetNeeded`.

    ## Disturbance

    `disturbance="knocks"`: after the steps 3 and 7 the hand is moved by up to 4 cm along and 0.2 rad about each of its
    axes, drawn uniformly by `reset`. A knock uses up no step; the step's observation comes after it, and
    `info["knocked"]` is True.

    ![The expert recovers from two knocks](Grasping-knocks.gif)

    The scene from outside; on the right what the palm sees, and below it the same views rendered by a field of the
    scene (`fleetgym bench spartn --preset quick --film expert --film-seed 3`).

    ## Randomisation

    `reset` draws the object, its place (x 0.45 to 0.55 m, y -0.1 to 0.1 m) and yaw, lets it come to rest, and draws
    the camera's place on a shell about it (20 to 36 cm, within a radian of the vertical, on the arm's side), where it
    looks to and its roll. All comes from the environment's own generator: the same seed gives the same episode in any
    process. A scene counts if the arm reaches the start and the expert finds a grasp from there; else `reset` draws
    again, and `info["redrawn"]` says how often. `info` also tells `object`. `options={"object": name}` fixes it, and
    `options={"scene": seed}` the whole scene: object and place are those of that seed, only the start is drawn.

    ## Arguments

    - `family`: part of the id.
    - `objects`: `"all"`, `"train"`, `"held_out"`, or names of objects.
    - `observation`: one of the keys above, or several.
    - `image_size`: S, at least 16.
    - `horizon`: steps; 40 gives a policy as many again after the 20 that `remaining` counts.
    - `disturbance`: `"none"` or `"knocks"`.
    - `render_mode`: None or `"rgb_array"`, a view of the scene from outside.
    - `render_size`: (height, width) of that view, pixels; `height` and `width` set one of them.

    ## Version history

    - v0: the first.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / (SUBSTEPS * TIMESTEP))}

    def __init__(
        self,
        family: str = "Procedural",
        *,
        objects: str | Sequence[str] = "all",
        observation: str | Sequence[str] = ("rgb",),
        image_size: int = 64,
        horizon: int = HORIZON,
        disturbance: str = "none",
        render_mode: str | None = None,
        render_size: tuple[int, int] = (240, 320),
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        self.objects = resolve_objects(family, objects)
        self.family = family
        keys = (observation,) if isinstance(observation, str) else tuple(observation)
        for key in keys:
            if key not in OBSERVATIONS:
                raise unknown("observation", key, OBSERVATIONS)
        if disturbance not in DISTURBANCES:
            raise unknown("disturbance", disturbance, DISTURBANCES)
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise unknown("render mode", render_mode, self.metadata["render_modes"])
        if not isinstance(image_size, (int, np.integer)) or image_size < 16:
            raise UserError(f"image_size={image_size}: the gripper is a few pixels then; use an integer of 16 or more")
        if not isinstance(horizon, (int, np.integer)) or horizon < 8:
            raise UserError(f"horizon={horizon}: the straight approach alone takes 5 steps; use 8 or more, 20 is usual")
        load(family, self.objects[0])  # says at once if the extra is missing
        self.keys, self.image_size, self.horizon = keys, int(image_size), int(horizon)
        self.disturbance, self.render_mode = disturbance, render_mode
        self._size = height or render_size[0], width or render_size[1]
        size = self.image_size
        every: dict[str, spaces.Space] = {
            "rgb": spaces.Box(0, 255, (size, size, 3), np.uint8),
            "depth": spaces.Box(0.0, FAR, (size, size), np.float32),
            "segmentation": spaces.Box(0, 2, (size, size), np.uint8),
            "points": spaces.Box(-np.inf, np.inf, (4, POINTS), np.float32),
            "state": spaces.Box(-np.inf, np.inf, (STATE_SIZE,), np.float64),
        }
        always = {
            "pose": spaces.Box(-np.inf, np.inf, (4, 4), np.float64),
            "remaining": spaces.Box(0.0, 1.0, (1,), np.float32),
        }
        self.observation_space = spaces.Dict({**{key: every[key] for key in OBSERVATIONS if key in keys}, **always})
        self.action_space = spaces.Box(-1.0, 1.0, (6,), np.float32)
        self._made: Simulation | None = None
        self._steps, self._running = 0, False
        #: The grasp that the expert goes to, the hand's pose [4, 4]; None before the first reset.
        self.goal: np.ndarray | None = None
        #: Name of the object of the episode; it, and its height when the episode began, metres.
        self.object = ""
        self.thing: Thing | None = None
        self._height = 0.0
        self._knocks: list[np.ndarray] = []

    @property
    def sim(self) -> Simulation:
        """The two physics clients; made when they are first needed."""
        if self._made is None:
            self._made = Simulation()
        return self._made

    @property
    def hand(self) -> np.ndarray:
        """The hand's pose X_WH [4, 4], as reached."""
        return self.sim.hand_pose()

    @property
    def plan_steps(self) -> int:
        """Steps that the expert's way and ``remaining`` count: the horizon, but at most 20."""
        return min(self.horizon, HORIZON)

    @property
    def remaining(self) -> int:
        """Steps that are left of :attr:`plan_steps`, at least 1."""
        return max(self.plan_steps - self._steps, 1)

    @property
    def gripper_mask(self) -> np.ndarray:
        """Where the open gripper covers the palm's picture [S, S], bool; the same for every pose."""
        return self.sim.gripper(self.image_size)[2]

    @property
    def gripper_picture(self) -> np.ndarray:
        """The open gripper's colours [S, S, 3], uint8; they count where :attr:`gripper_mask` is True."""
        return self.sim.gripper(self.image_size)[0]

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins an episode; see the class for what is drawn.

        Args:
            seed: Seed of the environment's generator; None lets it go on.
            options: ``object``, the name of one of ``objects``; ``scene``, a seed: then the object and how it lies are
                those of the episode of that seed, and only where the arm starts is drawn.

        Returns:
            The observation, and an info with ``success``, ``grasping`` and ``knocked`` (False), ``object`` and
            ``redrawn``.

        Raises:
            UserError: An unknown option or object, or no scene could be found in which the object can be grasped.
        """
        options = dict(options or {})
        for name in options:
            if name not in ("object", "scene"):
                raise unknown("option of reset", name, ("object", "scene"))
        wanted, scene = options.get("object"), options.get("scene")
        if wanted is not None and wanted not in self.objects:
            raise unknown(f"object of this {env_id(self.family)}", wanted, self.objects)
        if scene is not None and (not isinstance(scene, (int, np.integer)) or scene < 0):
            raise UserError(f"scene={scene!r}: it is the seed of an episode, an integer of 0 or more")
        super().reset(seed=seed)
        rng = self.np_random if scene is None else np_random(int(scene))[0]
        self._running = False
        reasons: Counter[str] = Counter()
        while reasons.total() < SCENES:
            name = self.objects[int(rng.integers(len(self.objects)))]
            name = wanted if wanted is not None else name
            try:
                thing = load(self.family, name)
            except UserError as error:
                if name == wanted or len(self.objects) == 1:
                    raise
                reasons[str(error)] += 1  # three of the procedural meshes are flat or broken
                continue
            reason = self._begin(rng, name, thing)
            if reason is None:
                break
            reasons[reason] += 1
        else:
            told = ", ".join(f"{reason} ({count} times)" for reason, count in sorted(reasons.items()))
            raise UserError(
                f"no scene of {wanted or ', '.join(self.objects[:3])} can be grasped, in {SCENES} tries: {told}; "
                "choose other objects"
            )
        if scene is not None:
            rng = self.np_random
            self._stand_anew(rng)
        self._knocks = [rng.uniform(-KNOCK, KNOCK) for _ in KNOCK_STEPS]
        self._steps, self._running = 0, True
        info = {"success": False, "grasping": False, "knocked": False}
        info |= {"object": self.object, "redrawn": reasons.total()}
        return self._observe(), info

    def _begin(self, rng: np.random.Generator, name: str, thing: Thing) -> str | None:
        """Draws one scene; returns why it is of no use, or None."""
        sim, twin = self.sim, self.sim.twin
        place = np.array([rng.uniform(0.45, 0.55), rng.uniform(-0.1, 0.1), 0.0])
        yaw = rng.uniform(-np.pi, np.pi)
        starts = [rng.uniform(size=10) for _ in range(STARTS)]
        place[2] = 0.001 - min(piece[:, 2].min() for piece in thing.pieces)
        quaternion = np.array([0.0, 0.0, np.sin(yaw / 2), np.cos(yaw / 2)])
        twin.put(thing, place, quaternion)
        if not twin.settle():
            return "it did not come to rest"
        X_WO = twin.object_pose()
        if not (0.35 < X_WO[0, 3] < 0.65 and abs(X_WO[1, 3]) < 0.2 and -0.02 < X_WO[2, 3] < 0.3):
            return "it fell or rolled away"
        if thing.upright and X_WO[2, 2] < np.cos(np.radians(50)):
            return "it tipped over"
        poses = grasps_of(self.family, name)
        if not len(poses):
            return "it has no pair of sides that the gripper spans"
        reason = "the arm cannot reach a start"
        for draws in starts:
            joints = start_joints(X_WO[:3, 3], draws)
            if joints is None:
                continue
            goal = plan(poses, thing, X_WO, hand_pose(joints), joints, self.plan_steps)
            if goal is None:
                reason = "no grasp is within reach"
                continue
            at, turned = twin.at()
            sim.begin(thing, at, turned, joints)
            self.goal, self.object, self.thing, self._height = goal, name, thing, float(at[2])
            return None
        return reason

    def _stand_anew(self, rng: np.random.Generator) -> None:
        """Draws another start in the scene of the moment."""
        X_WO, poses = self.sim.twin.object_pose(), grasps_of(self.family, self.object)
        for _ in range(SCENES * STARTS):
            joints = start_joints(X_WO[:3, 3], rng.uniform(size=10))
            if joints is None:
                continue
            goal = plan(poses, self.thing, X_WO, hand_pose(joints), joints, self.plan_steps)
            if goal is not None:
                self.sim.begin(self.thing, *self.sim.twin.at(), joints)
                self.goal = goal
                return
        raise UserError(f"no start was found in this scene of {self.object}; choose the seed of another one")

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Makes one step; the last one also closes the fingers and lifts.

        Args:
            action: [6], within -1..1.

        Returns:
            Observation, reward, terminated, truncated (False), info.

        Raises:
            UserError: The action has another shape, is out of bounds or not finite; nothing has moved then.
            gymnasium.error.ResetNeeded: The episode is over, or was never begun.
        """
        action = checked_action(action, env_id(self.family))
        if not self._running:
            raise gym.error.ResetNeeded(
                f"no episode of {env_id(self.family)} is running ({self._steps} steps done); call reset()"
            )
        sim = self.sim
        sim.move(sim.hand_pose() @ delta(action))
        self._steps += 1
        fallen = sim.object_pose()[2, 3] < self._height - 0.03
        last = fallen or self._steps >= self.horizon or self._between()
        knocked = not last and self.disturbance == "knocks" and self._steps in KNOCK_STEPS
        if knocked:
            sim.move(knocked_pose(sim.hand_pose(), self._knocks[KNOCK_STEPS.index(self._steps)], sim.joints()))
        success, grasping = False, last and not fallen
        if last:
            self._running = False
        if grasping:
            sim.close_and_lift()
            success = bool(sim.object_pose()[2, 3] > self._height + RISE)
        info = {"success": success, "grasping": bool(grasping), "knocked": knocked, "object": self.object}
        return self._observe(), float(success), last, False, info

    def _between(self) -> bool:
        X_OH = inverse(self.sim.object_pose()) @ self.hand
        points = _BETWEEN @ X_OH[:3, :3].T + X_OH[:3, 3]
        inside = sum(depth_inside(point[None], self.thing.planes, self.thing.starts) > 0.0 for point in points)
        return inside >= 2

    def perturb(self, E: np.ndarray) -> None:
        """Moves the hand by a motion in its own frame, without a step: what DART does to its demonstrations.

        Args:
            E: A rigid matrix [4, 4]; the hand goes to ``hand @ E`` by the arm's own control.

        Raises:
            UserError: E is no pose, or no episode is running.
        """
        E = check_pose(E, "E")
        if not self._running:
            raise UserError("no episode is running, so there is no hand to perturb; call reset() first")
        self.sim.move(self.hand @ E)

    def observe(self) -> dict[str, np.ndarray]:
        """The observation of the moment, as ``step`` returns it; of use after :meth:`perturb`."""
        return self._observe()

    def _observe(self) -> dict[str, np.ndarray]:
        sim, out = self.sim, {}
        remaining = np.float32(self.remaining / self.plan_steps)
        X_WH = sim.hand_pose()
        if {"rgb", "depth", "segmentation", "points"} & set(self.keys):
            rgb, depth, labels = sim.palm(self.image_size)
            if "rgb" in self.keys:
                out["rgb"] = rgb
            if "depth" in self.keys:
                out["depth"] = np.minimum(depth, np.float32(FAR))
            if "segmentation" in self.keys:
                out["segmentation"] = labels
            if "points" in self.keys:
                out["points"] = target_points(depth, labels)
        if "state" in self.keys:
            X_WO = sim.object_pose()
            state = np.empty(STATE_SIZE)
            state[:3] = X_WH[:3, 3]
            state[3:6] = rotation_vector(_DOWN @ X_WH[:3, :3])
            state[6:13], state[13:15], state[15] = sim.joints(), sim.fingers(), remaining
            state[16:19] = X_WO[:3, 3]
            state[19:] = rotation_vector(X_WO[:3, :3])
            out["state"] = state
        out["pose"] = X_WH
        out["remaining"] = np.array([remaining], np.float32)
        return out

    def render_at(self, X_WC: np.ndarray) -> np.ndarray:
        """The scene without arm and gripper, from any pose of a camera: what the oracle baseline looks at.

        Args:
            X_WC: The camera's pose [4, 4], OpenGL's axes; its field of view is that of the palm's.

        Returns:
            Colours [S, S, 3], uint8.

        Raises:
            UserError: The pose is not rigid, or no episode has begun.
        """
        X_WC = check_pose(X_WC, "X_WC")
        if self.thing is None:
            raise UserError("no episode has begun, so there is no scene to draw; call reset() first")
        return self.sim.scene(X_WC, self.image_size)[0]

    def render(self) -> np.ndarray | None:
        """Draws the scene from outside: RGB [height, width, 3], uint8; None without ``render_mode="rgb_array"``."""
        if self.render_mode is None:
            gym.logger.warn('render() needs gym.make(..., render_mode="rgb_array")')
            return None
        return self.sim.outside(*self._size)

    def close(self) -> None:
        """Closes the physics clients."""
        if self._made is not None:
            self._made.close()
            self._made = None
        self._running = False


def start_pose(target: np.ndarray, draws: np.ndarray) -> np.ndarray | None:
    """A start: the camera looks at the object from a shell about it.

    Args:
        target: The object's place [3], metres.
        draws: Ten numbers [10] within 0..1.

    Returns:
        The hand's pose [4, 4], or None where it would be too low, or too near to or far from the arm's base.
    """
    theta, phi, r = draws[0], np.pi / 2 + np.pi * draws[1], 0.2 + 0.16 * draws[2]
    eye = target + r * np.array([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)])
    eye += 0.03 * (2 * draws[3:6] - 1)
    away = eye - (target + 0.02 * (2 * draws[6:9] - 1))
    away /= np.linalg.norm(away)
    # Up in the picture is away from the arm, so the hand's x axis is, when it points down.
    up = np.array([-np.cos(phi), -np.sin(phi), 0.0]) if theta > 0.2 else np.array([1.0, 0.0, 0.0])
    up -= (up @ away) * away
    up /= np.linalg.norm(up)
    rotation = np.stack([np.cross(up, away), up, away], 1)
    roll = 0.3 * (2 * draws[9] - 1)
    c, s = np.cos(roll), np.sin(roll)
    X_WC = pose(eye, rotation @ np.array([[c, -s, 0.0], [s, c, 0.0], [0.0, 0.0, 1.0]]))
    X_WH = X_WC @ inverse(HAND_EYE)
    place = X_WH[:3, 3]
    if place[2] < 0.16 or place[0] < 0.25 or np.linalg.norm(place) > 0.8:
        return None
    return X_WH


def start_joints(target: np.ndarray, draws: np.ndarray) -> np.ndarray | None:
    """The arm's joint angles [7] at a :func:`start_pose`; None where there is none, or the arm cannot reach it."""
    X_WH = start_pose(target, draws)
    if X_WH is not None:
        for seed in (READY, READY + [0, 0, 0, 0, 0, 0, 1.2], READY - [0, 0, 0, 0, 0, 0, 1.2]):
            joints, reached = solve(X_WH, seed)
            if reached:
                return joints
    return None


def knocked_pose(X_WH: np.ndarray, motion: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """Where a knock moves the hand: by its motion, or by half of it, and so on, where arm or table do not allow it.

    Args:
        X_WH: The hand's pose [4, 4].
        motion: Metres and radians [6], in the hand's frame.
        joints: The arm's joint angles [7].
    """
    for _ in range(4):
        goal = X_WH @ rigid(motion)
        if goal[2, 3] + 0.112 * min(goal[2, 2], 0.0) > 0.01 and solve(goal, joints)[1]:
            break
        motion = motion / 2
    return goal


def checked_action(action: Any, name: str) -> np.ndarray:
    """An action [6] as float64.

    Args:
        action: The candidate.
        name: The environment's id, for messages.

    Raises:
        UserError: Another shape, out of bounds or not finite.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (6,):
        raise UserError(f"the action has shape {action.shape}; {name} takes (6,)")
    if not np.abs(action).max() <= 1.0 + 1e-6:
        raise UserError(
            f"the action is {action.tolist()}; each entry must be finite and within -1..1 (np.clip cuts it)"
        )
    return action


def target_points(depth: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The object's points that the palm's camera sees, in the hand's frame.

    Args:
        depth: Distance along the view [S, S], metres.
        labels: Segmentation [S, S].

    Returns:
        [4, 1024], float32: x, y, z in metres, and 1 for a point or 0 for none. More points are
        thinned evenly.
    """
    rows, columns = np.nonzero(labels == TARGET)
    if len(rows) > POINTS:
        kept = np.arange(POINTS) * len(rows) // POINTS
        rows, columns = rows[kept], columns[kept]
    K = intrinsics(len(depth))
    z = depth[rows, columns].astype(np.float64)
    # Pixels' middles; rows go down, the camera's y axis up, and it looks along -z.
    camera = np.stack([(columns + 0.5 - K[0, 2]) / K[0, 0] * z, -(rows + 0.5 - K[1, 2]) / K[1, 1] * z, -z])
    out = np.zeros((4, POINTS), np.float32)
    out[:3, : len(z)] = HAND_EYE[:3, :3] @ camera + HAND_EYE[:3, 3:]
    out[3, : len(z)] = 1.0
    return out
