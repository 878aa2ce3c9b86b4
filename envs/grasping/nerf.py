"""``gym.make("NerfGrasping-v0")``: grasping in a scene that is known from pictures alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from fleetgym.core import se3
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.seeding import generator
from fleetgym.envs.fleet_tools.panda import READY
from fleetgym.envs.grasping.env import (
    DISTURBANCES,
    KNOCK,
    KNOCK_STEPS,
    SCENES,
    STARTS,
    GraspingEnv,
    checked_action,
    knocked_pose,
    start_joints,
    start_pose,
)
from fleetgym.envs.grasping.grasps import CONTROL_POINTS, TCP
from fleetgym.envs.grasping.names import HORIZON
from fleetgym.envs.grasping.poses import FOV, HAND_EYE, delta
from fleetgym.envs.grasping.simulation import gripper_view, hand_pose, solve

ID = "NerfGrasping-v0"
#: Views of a capture go to the object from a start by this share of the distance at most, so that what the hand sees
#: near the end is known, too.
NEAREST = 0.35


class NerfGraspingEnv(gym.Env):
    """Grasping in a scene that is known from pictures: the palm's camera is a radiance field.

    ## Task

    That of `Grasping/Procedural-v0`: the same arm, action, horizon, start poses, disturbance and `remaining`. But what
    the palm sees is rendered by a field (`fleetgym.envs.fields`) that was fitted to pictures of one scene, with the
    gripper pasted. So a scene that somebody has walked around with a camera becomes an environment, and a policy can be
    tried, or taught by an expert, before the robot moves.

    | what `scene` is | what is shown | what success is |
    |---|---|---|
    | None | an episode of `Grasping/...-v0` (its seed is `episode`), captured by moving the camera | lifted |
    | a `Capture`, or a folder of fields | that, and `episode` is the scene's twin in the simulator | lifted |
    | a `Capture`, or a folder of fields | that, and `grasps` are known poses of the hand | within `tolerance` of one |

    With a twin the arm moves by its physics, closes its fingers on the twin's object and lifts it. Without one the hand
    goes exactly where the action sends it, as far as the arm reaches; nothing stops it.

    ## Observation

    `Dict`: `rgb` `[S, S, 3]`, uint8; `pose` `[4, 4]`, float64; `remaining` `[1]`, float32, as in
    `Grasping/Procedural-v0`. The field shows the scene as it was captured: what the hand pushes stays where it was, and
    the picture after the last step, too, has open fingers and the object on the table.

    ## Action, reward, termination, disturbance

    As in `Grasping/Procedural-v0`. Without a twin `terminated` is True at step `horizon`, or when the hand is within
    the tolerance of a known grasp; the reward is then 1. A grasp turned by half a turn about the fingers' direction is
    the same grasp.

    ## Randomisation

    `reset` draws where the arm starts, and the knocks; the scene stays. `info` has `success`, `grasping` and `knocked`.

    ## Rendering

    With a twin: the scene from outside, and beside it what the palm's camera would see in the simulator, above what the
    field shows. Without one: what the field shows.

    ## Arguments

    - `scene`: None, a `fleetgym.envs.fields.captures.Capture`, fitted fields, or the folder that their `save` wrote.
      Poses are in the frame of the arm's base: z up, the table's top at z = 0, metres.
    - `episode`: seed of the twin; 0 if `scene` is None.
    - `grasps`: poses of the hand at known grasps `[n, 4, 4]`.
    - `tolerance`: (metres, radians), of place and rotation.
    - `family`, `objects`: of the twin's environment.
    - `field`: kind of field; `iterations`: steps of its fit; `index`: which of the fields of a folder.
    - `views`: pictures that are taken if `scene` is None.
    - `image_size`, `horizon`, `disturbance`, `render_mode`, `render_size`: as in `Grasping/Procedural-v0`.

    ## Version history

    - v0: the first.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": GraspingEnv.metadata["render_fps"]}

    def __init__(
        self,
        scene: Any = None,
        *,
        episode: int | None = None,
        grasps: Any = None,
        tolerance: Sequence[float] = (0.01, 0.2),
        family: str = "Procedural",
        objects: str | Sequence[str] = "all",
        field: str = "voxel",
        iterations: int = 120,
        index: int = 0,
        views: int = 48,
        image_size: int = 64,
        horizon: int = HORIZON,
        disturbance: str = "none",
        render_mode: str | None = None,
        render_size: tuple[int, int] = (240, 320),
        height: int | None = None,
        width: int | None = None,
    ) -> None:
        from fleetgym.envs.fields import FIELDS
        from fleetgym.envs.fields.captures import Capture, Intrinsics

        if scene is None and episode is None:
            episode = 0
        if (episode is None) == (grasps is None):
            raise UserError(
                "give episode=, the seed of the scene's twin in the simulator, or grasps=, poses of the hand [n, 4, 4] "
                f"that grasp; {'neither' if episode is None else 'both'} was given"
            )
        if episode is not None and (not isinstance(episode, (int, np.integer)) or episode < 0):
            raise UserError(f"episode={episode!r}: it is the seed of an episode, an integer of 0 or more")
        if len(tolerance) != 2 or not min(tolerance) > 0:
            raise UserError(f"tolerance={tolerance}: metres and radians, both positive, such as (0.01, 0.2)")
        if views < 3:
            raise UserError(f"views={views}: a field needs at least 3")
        if iterations < 1:
            raise UserError(f"iterations={iterations}: a fit has at least 1")
        self.family, self.tolerance, self._kind = family, (float(tolerance[0]), float(tolerance[1])), field
        self._options = {"objects": objects, "image_size": image_size}
        # It checks its arguments, and these are the same.
        shared = {"horizon": horizon, "disturbance": disturbance, "render_mode": render_mode}
        sizes = {"render_size": render_size, "height": height, "width": width}
        self._inner = GraspingEnv(family, observation="state", **self._options, **shared, **sizes)
        self.twin: GraspingEnv | None = self._inner if episode is not None else None
        self.episode = None if episode is None else int(episode)
        self.known = None
        if grasps is not None:
            self.known = se3.check(grasps, "grasps")
            if self.known.ndim != 3 or not len(self.known):
                raise UserError(f"grasps of shape {list(self.known.shape)}; give poses of the hand [n, 4, 4]")
        self.image_size, self.horizon = int(image_size), int(horizon)
        self.disturbance, self.render_mode = disturbance, render_mode
        self._iterations, self._views, self._index = int(iterations), int(views), int(index)
        self._lens = Intrinsics.from_fov(FOV, self.image_size, self.image_size)
        found = FIELDS.get(field)  # an unknown kind is said now
        self._capture: Any = None
        self._fields: Any = None
        if isinstance(scene, (str, os.PathLike)):
            self._fields = found.load(scene)
        elif isinstance(scene, Capture):
            self._capture = scene.checked("scene")
        elif scene is not None:
            if not callable(getattr(scene, "render", None)):
                raise UserError(
                    f"scene is a {type(scene).__name__}; give a Capture (pictures with poses), fitted fields or their "
                    "folder, or None"
                )
            self._fields = scene
        if self._fields is not None:
            if not 0 <= self._index < len(self._fields):
                raise UserError(f"index={index}: there are {len(self._fields)} fields, from 0")
            if self._index in self._fields.failed:
                raise UserError(
                    f"field {index} was not fitted ({self._fields.failed[self._index]}); mend its capture, or choose "
                    "another one by index="
                )
        size = self.image_size
        self.observation_space = spaces.Dict(
            {
                "rgb": spaces.Box(0, 255, (size, size, 3), np.uint8),
                "pose": spaces.Box(-np.inf, np.inf, (4, 4), np.float64),
                "remaining": spaces.Box(0.0, 1.0, (1,), np.float32),
            }
        )
        self.action_space = spaces.Box(-1.0, 1.0, (6,), np.float32)
        self._joints, self._steps, self._running = np.array(READY), 0, False
        self._goal: np.ndarray | None = None
        self._knocks: list[np.ndarray] = []

    # What experts and others may know.

    @property
    def hand(self) -> np.ndarray:
        """The hand's pose X_WH [4, 4], as reached."""
        return hand_pose(self._joints) if self.twin is None else self.twin.hand

    @property
    def goal(self) -> np.ndarray | None:
        """The grasp that the expert goes to [4, 4]: the twin's, or the known one nearest to the start."""
        return self._goal if self.twin is None else self.twin.goal

    @property
    def plan_steps(self) -> int:
        """Steps that the expert's way and ``remaining`` count: the horizon, but at most 20."""
        return self._inner.plan_steps

    @property
    def remaining(self) -> int:
        """Steps that are left of :attr:`plan_steps`, at least 1."""
        return max(self.plan_steps - self._steps, 1)

    @property
    def gripper_mask(self) -> np.ndarray:
        """Where the open gripper covers the picture [S, S], bool; the same for every pose."""
        return gripper_view(self.image_size)[2]

    @property
    def fields(self) -> Any:
        """The fields; fitted when they are first needed, some seconds."""
        if self._fields is None:
            from fleetgym.envs.fields import fit

            capture = self._capture
            if capture is None:
                capture = capture_episode(self.episode, self.family, views=self._views, **self._options)
            self._fields = fit(self._kind, [capture], centre=self._middle(), iterations=self._iterations)
        return self._fields

    def _middle(self) -> np.ndarray:
        """Where the object is [3]."""
        if self.twin is None:
            return (self.known[:, :3, 3] + TCP * self.known[:, :3, 2]).mean(0)
        if self.twin.thing is None:
            self.twin.reset(seed=self.episode)
        return self.twin.sim.object_pose()[:3, 3]

    # Episodes.

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begins an episode: another start in the same scene.

        Args:
            seed: Seed of the environment's generator; None lets it go on.
            options: There are none.

        Returns:
            The observation, and an info with ``success``, ``grasping`` and ``knocked`` (all False).

        Raises:
            UserError: Options; no start that the arm reaches; or the scene cannot be captured or fitted.
        """
        for name in options or {}:
            raise unknown("option of reset", name, ())
        super().reset(seed=seed)
        self._running = False
        own = int(self.np_random.integers(2**31))
        if self.twin is not None:
            self.twin.reset(seed=own, options={"scene": self.episode})
        else:
            self._stand(np.random.default_rng(own))
        self._steps, self._running = 0, True
        return self._observe(), {"success": False, "grasping": False, "knocked": False}

    def _stand(self, rng: np.random.Generator) -> None:
        for _ in range(SCENES * STARTS):
            joints = start_joints(self._middle(), rng.uniform(size=10))
            if joints is not None:
                break
        else:
            raise UserError(
                f"the arm reaches no start about {np.round(self._middle(), 3).tolist()}, where the grasps are; poses "
                "are in the frame of the arm's base, metres"
            )
        self._joints = joints
        self._knocks = [rng.uniform(-KNOCK, KNOCK) for _ in KNOCK_STEPS]
        both = np.concatenate([self.known, self.known @ se3.pose([0, 0, 0], [0, 0, np.pi])])
        points = np.concatenate([CONTROL_POINTS, np.ones((len(CONTROL_POINTS), 1))], 1).T
        far = np.abs((both - hand_pose(joints)) @ points).sum((1, 2))
        self._goal = both[int(np.argmin(far))]

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Makes one step; with a twin the last one also closes the fingers and lifts.

        Args:
            action: [6], within -1..1.

        Returns:
            Observation, reward, terminated, truncated (False), info.

        Raises:
            UserError: The action has another shape, is out of bounds or not finite; nothing has moved then.
            gymnasium.error.ResetNeeded: The episode is over, or was never begun.
        """
        action = checked_action(action, ID)
        if not self._running:
            raise gym.error.ResetNeeded(f"no episode of {ID} is running ({self._steps} steps done); call reset()")
        if self.twin is not None:
            _, reward, last, _, told = self.twin.step(action)
            self._steps += 1
            info = {name: told[name] for name in ("success", "grasping", "knocked")}
        else:
            self._joints = solve(self.hand @ delta(action), self._joints)[0]
            self._steps += 1
            success = self._grasps()
            last = success or self._steps >= self.horizon
            knocked = not last and self.disturbance == DISTURBANCES[1] and self._steps in KNOCK_STEPS
            if knocked:
                motion = self._knocks[KNOCK_STEPS.index(self._steps)]
                self._joints = solve(knocked_pose(self.hand, motion, self._joints), self._joints)[0]
            reward, info = float(success), {"success": success, "grasping": last, "knocked": knocked}
        self._running = not last
        return self._observe(), reward, last, False, info

    def _grasps(self) -> bool:
        """Whether the hand is within the tolerance of a known grasp, or of one turned by half a turn."""
        both = np.concatenate([self.known, self.known @ se3.pose([0, 0, 0], [0, 0, np.pi])])
        off, turned = se3.parts(se3.inverse(both) @ self.hand)
        near = np.linalg.norm(off, axis=-1) <= self.tolerance[0]
        return bool((near & (np.linalg.norm(turned, axis=-1) <= self.tolerance[1])).any())

    def _observe(self) -> dict[str, np.ndarray]:
        X_WH = self.hand
        drawn = self.fields.render((X_WH @ HAND_EYE)[None], scenes=[self._index], intrinsics=self._lens)[0, 0]
        colours, _, mask = gripper_view(self.image_size)
        return {
            "rgb": np.where(mask[..., None], colours, drawn),
            "pose": X_WH,
            "remaining": np.array([self.remaining / self.plan_steps], np.float32),
        }

    def render(self) -> np.ndarray | None:
        """Draws the scene: RGB uint8; None without ``render_mode="rgb_array"``. See the class."""
        if self.render_mode is None:
            gym.logger.warn('render() needs gym.make(..., render_mode="rgb_array")')
            return None
        seen = self._observe()["rgb"]
        height = self._inner._size[0]
        if self.twin is None:
            return scaled(seen, height)
        half = height // 2
        beside = [scaled(self.twin.sim.palm(self.image_size)[0], half), scaled(seen, height - half)]
        width = max(picture.shape[1] for picture in beside)
        beside = [np.pad(picture, ((0, 0), (0, width - picture.shape[1]), (0, 0))) for picture in beside]
        return np.concatenate([self.twin.render(), np.concatenate(beside)], 1)

    def close(self) -> None:
        """Closes the twin's physics clients."""
        self._inner.close()
        self._running = False


def scaled(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture [S, S, 3] with the nearest pixels of another size: [size, size, 3]."""
    at = (np.arange(size) + 0.5) * len(picture) / size
    at = at.astype(int)
    return picture[at[:, None], at]


def capture_episode(
    episode: int,
    family: str = "Procedural",
    *,
    objects: str | Sequence[str] = "all",
    image_size: int = 64,
    views: int = 48,
) -> Any:
    """Pictures of the scene of an episode, taken over the starts' distribution and on the way from there to the object.

    Args:
        episode: Seed of the episode.
        family: Of ``Grasping/<family>-v0``.
        objects: Of that environment.
        image_size: Pixels a side.
        views: How many.

    Returns:
        A :class:`fleetgym.envs.fields.captures.Capture`, without gripper.

    Raises:
        UserError: See :class:`GraspingEnv`.
    """
    from fleetgym.envs.fields.captures import Capture, Intrinsics

    env = GraspingEnv(family, objects=objects, observation="state", image_size=image_size)
    try:
        env.reset(seed=episode)
        target = env.sim.object_pose()[:3, 3]
        rng = generator("capture", episode)
        poses: list[np.ndarray] = []
        while len(poses) < views:
            X_WH = start_pose(target, rng.uniform(size=10))
            if X_WH is None:
                continue
            X_WC = X_WH @ HAND_EYE
            X_WC[:3, 3] = target + rng.uniform(NEAREST, 1.0) * (X_WC[:3, 3] - target)
            poses.append(X_WC)
        images = np.stack([env.render_at(X_WC) for X_WC in poses])
    finally:
        env.close()
    return Capture(images, np.stack(poses), Intrinsics.from_fov(FOV, image_size, image_size))
