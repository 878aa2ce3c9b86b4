"""A scripted expert for each task: keypoints, constraints, keyframes.

The expert knows the keypoints of tool and object. It solves for a pose of the tool that meets the task's constraints on
them (points that coincide, directions with given inner products), derives a few more poses from it (before, at and
after contact), and moves the hand from one to the next, each time by the error that is left. So it also finds its way
back when it is pushed aside, which makes its actions good labels under noise.

Source: L. Manuelli et al., "kPAM: KeyPoint Affordances for Category-Level Robotic Manipulation", ISRR 2019, as the
expert of fleet-tools uses it (L. Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024). There, SNOPT
solves for joint angles and a trajectory optimiser joins the keyframes; here least squares solve for the pose of the
tool, and the environment's own inverse kinematics follow the keyframes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.fleet_tools.names import check_task
from fleetgym.envs.fleet_tools.panda import rotation_matrix, rotation_vector

#: What the expert is doing; ``info["segment"]`` is an index into it, -1 without an expert.
SEGMENTS = ("approach", "stand-off", "contact", "act")
UP = np.array([0.0, 0.0, 1.0])


@dataclass(frozen=True)
class Keyframe:
    """A pose of the tool to go to.

    Attributes:
        segment: Index into :data:`SEGMENTS`.
        place: Of the tool's frame, [3], metres.
        rotation: Of the tool, [3, 3].
        speed: Largest step towards it, metres a control step.
        near: Distance from which on the next one is headed for, metres.
        steps: Control steps after which the next one is headed for in any case.
        turn: Largest step of rotation, radians a control step.
    """

    segment: int
    place: np.ndarray
    rotation: np.ndarray
    speed: float = 0.05
    near: float = 0.006
    steps: int = 30
    turn: float = 0.25


def solve_pose(
    keypoints: dict[str, np.ndarray],
    head: np.ndarray,
    axes: list[tuple[str, str, np.ndarray, float, float]],
    start: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """The pose of a tool that meets constraints on its keypoints.

    Args:
        keypoints: Places in the tool's frame, [3] each, metres.
        head: Where the keypoint ``head`` shall be, [3].
        axes: (from, to, direction, inner product, weight): the unit vector between two keypoints shall have this
            inner product with a direction [3].
        start: Rotation [3, 3] to begin the search at, and to stay near to.

    Returns:
        Place [3] and rotation [3, 3] of the tool's frame.

    Raises:
        UserError: The constraints contradict one another: what is left is above a hundredth.
    """
    from scipy.optimize import least_squares

    units = []
    for first, second, direction, product, weight in axes:
        difference = keypoints[second] - keypoints[first]
        units.append((difference / np.linalg.norm(difference), direction, product, weight))

    def residuals(v: np.ndarray) -> np.ndarray:
        rotation = start @ rotation_matrix(v)
        return np.array(
            [weight * (direction @ rotation @ unit - product) for unit, direction, product, weight in units]
            + list(1e-3 * v)
        )

    found = least_squares(residuals, np.zeros(3), xtol=1e-10, ftol=1e-10)
    left = np.abs(residuals(found.x)[: len(units)]).max()
    if left > 0.01:
        raise UserError(f"the constraints {axes} cannot be met together: an inner product is {left:.3f} off")
    rotation = start @ rotation_matrix(found.x)
    return head - rotation @ keypoints["head"], rotation


def _level(yaw: float) -> np.ndarray:
    return rotation_matrix(np.array([0.0, 0.0, yaw]))


def _hammer(env: Any) -> list[Keyframe]:
    sim, points = env.sim, env.sim.keypoints
    pin = sim.keypoint.copy()
    # Down with the face; the handle points back to the base, which the arm reaches best.
    yaw = np.arctan2(pin[1], pin[0])
    outward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    place, rotation = solve_pose(
        points, pin, [("head", "tail", UP, 1.0, 1.0), ("side", "head", np.cross(UP, outward), 0.0, 1.0)], _level(yaw)
    )
    frames = [Keyframe(0, place + 0.09 * UP, rotation, near=0.02)]
    frames += [Keyframe(1, place + 0.05 * UP, rotation, speed=0.03, near=0.004)]
    frames += [Keyframe(2, place + 0.003 * UP, rotation, speed=0.03, near=0.004)]
    # Not as far as the pin can go: against the end of its travel, the hand would press with all its force.
    frames += [Keyframe(3, place - 0.018 * UP, rotation, speed=0.04, steps=8)]
    for _ in range(3):  # blows that follow, if the first was not enough
        frames += [Keyframe(1, place + 0.05 * UP, rotation, near=0.01)]
        frames += [Keyframe(3, place - 0.022 * UP, rotation, speed=0.08, steps=8)]
    return [*frames, Keyframe(3, place + 0.1 * UP, rotation)]


def _wrench(env: Any) -> list[Keyframe]:
    sim, points = env.sim, env.sim.keypoints
    nut = sim.keypoint.copy()
    # The jaw fits in six directions; the best has room to turn clockwise.
    wanted = np.arctan2(nut[1], nut[0]) + 0.3
    fits = sim.first + np.pi / 6 + np.pi / 3 * np.arange(-3, 4)
    yaw = float(fits[np.argmin(np.abs(fits - wanted))])
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    axes = [
        ("tail", "head", UP, 0.0, 1.0),
        ("head", "side", UP, 0.0, 1.0),
        ("tail", "head", np.cross(UP, along), 0.0, 1.0),
    ]
    place, rotation = solve_pose(points, nut, axes, _level(yaw))
    back = -0.075 * along
    frames = [Keyframe(0, place + back + 0.08 * UP, rotation, near=0.02)]
    frames += [Keyframe(1, place + back, rotation, speed=0.03, near=0.002)]
    # The jaw is a millimetre or two wider than the nut: once more in line, then slowly over it.
    frames += [Keyframe(2, place - 0.032 * along, rotation, speed=0.03, near=0.0015, steps=6)]
    frames += [Keyframe(2, place, rotation, speed=0.014, near=0.003)]
    arm = place - nut
    for turn in np.linspace(0.0, -0.95, 9)[1:]:
        around = _level(turn)
        down = turn * sim.object_instance.pitch / (2 * np.pi) * UP
        frames.append(Keyframe(3, nut + around @ arm + down, around @ rotation, speed=0.025, near=0.008, turn=0.12))
    return frames


def _spatula(env: Any) -> list[Keyframe]:
    sim, points = env.sim, env.sim.keypoints
    patty = np.array([*sim.keypoint[:2], 0.0])
    yaw = sim.first
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    tilt = 0.06
    axes = [
        ("tail", "head", UP, -tilt, 1.0),
        ("head", "side", UP, 0.0, 1.0),
        ("tail", "head", np.cross(UP, along), 0.0, 1.0),
    ]
    under = patty + (sim.object_instance.radius + 0.012) * along + 0.001 * UP
    place, rotation = solve_pose(points, under, axes, _level(yaw))
    back = -(2 * sim.object_instance.radius + 0.045) * along
    frames = [Keyframe(0, place + back + 0.07 * UP, rotation, near=0.02)]
    frames += [Keyframe(1, place + back, rotation, speed=0.03, near=0.004)]
    frames += [Keyframe(2, place, rotation, speed=0.025, near=0.005)]
    # Out from under the stop, which the front edge would be caught by.
    place = place - 0.016 * along
    frames += [Keyframe(3, place, rotation, speed=0.02, near=0.004)]
    # A little tilted back about the middle of the blade, less than the patty would slide at, and up.
    centre = place + rotation @ (0.5 * (points["head"] + points["tail"]))
    lift = _level(yaw) @ rotation_matrix(np.array([0.0, -0.1, 0.0])) @ _level(-yaw) @ rotation
    offset = lift @ (0.5 * (points["head"] + points["tail"]))
    frames += [Keyframe(3, centre - offset + 0.03 * UP, lift, speed=0.02, turn=0.06)]
    return [*frames, Keyframe(3, centre - offset + 0.13 * UP - 0.03 * along, lift, speed=0.03, steps=60)]


def _knife(env: Any) -> list[Keyframe]:
    sim, points = env.sim, env.sim.keypoints
    middle = 0.5 * (sim.keypoint + sim.second)
    apart = sim.keypoint - sim.second
    apart = np.array([apart[0], apart[1], 0.0]) / np.hypot(apart[0], apart[1])
    along = np.cross(apart, UP)
    yaw = float(np.arctan2(along[1], along[0]))
    at = np.array([middle[0], middle[1], 0.006])
    axes = [("tail", "head", UP, -1.0, 1.0), ("side", "head", apart, 0.0, 1.0)]
    place, rotation = solve_pose(points, at, axes, _level(yaw))
    frames = [Keyframe(0, place + 0.12 * UP, rotation, near=0.02)]
    frames += [Keyframe(1, place + 0.075 * UP, rotation, speed=0.03, near=0.003)]
    frames += [Keyframe(2, place, rotation, speed=0.03, near=0.006)]
    return [*frames, Keyframe(3, place + 0.13 * apart, rotation, speed=0.02, steps=60)]


def _scoop(env: Any) -> list[Keyframe]:
    sim, points = env.sim, env.sim.keypoints
    made, yaw = sim.object_instance, sim.first
    along = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    # Where the ball would touch the far wall, on the tray's floor.
    left = (sim.wall - sim.keypoint[:2]) @ along[:2]
    ball = np.array([*sim.keypoint[:2], 0.0])
    floor = 2 * sim.mechanism.thin * UP
    tilt = 0.1
    axes = [
        ("tail", "head", UP, -tilt, 1.0),
        ("head", "side", UP, 0.0, 1.0),
        ("tail", "head", np.cross(UP, along), 0.0, 1.0),
    ]
    under = ball + (left - 0.003) * along + floor + 0.0005 * UP
    place, rotation = solve_pose(points, under, axes, _level(yaw))
    back = -(left + made.radius + 0.006) * along
    frames = [Keyframe(0, place + back + (made.height + 0.03) * UP, rotation, near=0.02)]
    frames += [Keyframe(1, place + back, rotation, speed=0.04, near=0.004)]
    frames += [Keyframe(2, place, rotation, speed=0.02, near=0.004, steps=15)]
    # Tilt back with the front edge below the top of the wall, which keeps the ball in, so that it rolls to the rear;
    # then rise and tilt more. To tilt further at once would bring the handle down onto the near wall.
    for angle, height, way in ((0.18, 0.012, 0.0), (0.25, 0.03, 0.0), (0.4, 0.09, 0.02)):
        tilted = _level(yaw) @ rotation_matrix(np.array([0.0, -angle, 0.0])) @ _level(-yaw) @ rotation
        raised = under - tilted @ points["head"] + height * UP - way * along
        frames.append(Keyframe(3, raised, tilted, speed=0.025, turn=0.1))
    return frames


def _whisk(env: Any) -> list[Keyframe]:
    sim, points = env.sim, env.sim.keypoints
    made, middle = sim.object_instance, sim.middle + 0.003 * UP
    yaw = np.arctan2(middle[1], middle[0])
    outward = np.array([np.cos(yaw), np.sin(yaw), 0.0])
    axes = [("head", "tail", UP, 1.0, 1.0), ("side", "tail", np.cross(UP, outward), 0.0, 1.0)]
    place, rotation = solve_pose(points, middle, axes, _level(yaw))
    frames = [Keyframe(0, place + (made.height + 0.03) * UP, rotation, near=0.01)]
    frames += [Keyframe(1, place, rotation, speed=0.04, near=0.004)]
    # Out to the wall behind the ball, and around with it: the way that leaves it outside of the whisk's circle.
    behind, radius = (
        sim.direction - 1.0,
        min(made.radius - made.ball - 0.003, made.radius - sim.tool_instance.bulb - 0.002),
    )
    for angle in behind + np.arange(0.0, 6 * np.pi, 0.35):
        around = radius * np.array([np.cos(angle), np.sin(angle), 0.0])
        frames.append(Keyframe(3 if frames[-1].segment > 1 else 2, place + around, rotation, speed=0.025, near=0.008))
    return frames


PLANS = {"pin": _hammer, "nut": _wrench, "patty": _spatula, "pieces": _knife, "bin": _scoop, "bowl": _whisk}


class Expert:
    """The scripted expert of one task, a ``Policy`` with ``attach``; see the module.

    Args:
        task: A task name.

    Raises:
        UserError: Unknown task.
    """

    def __init__(self, task: str) -> None:
        self.task = check_task(task)
        self.name = f"keypoint expert of {task}"
        self._env: Any = None
        self._frames: list[Keyframe] = []

    def attach(self, env: Any) -> None:
        """Gives it the environment whose state it may know."""
        env = env.unwrapped
        if getattr(env, "task", None) != self.task:
            raise UserError(
                f"this expert plays {self.task}, not {getattr(env, 'task', env)}; make the expert of that task"
            )
        self._env = env

    def predict(
        self,
        observation: Any,
        state: Any = None,
        episode_start: Any = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, Any]:
        """The action [1, 6] for the one environment that it was attached to; the observation is not read.

        Raises:
            UserError: It was not attached, or is to play in several environments.
        """
        if self._env is None:
            raise UserError("the expert reads the simulation: attach(env) comes first; rollout does it with num_envs=1")
        if episode_start is None or bool(np.any(episode_start)):
            self._plan()
        return self.action()[None], None

    def _plan(self) -> None:
        env = self._env
        self._frames = PLANS[env.object_kind](env)
        self._at, self._spent = 0, 0

    def action(self) -> np.ndarray:
        """The action [6] towards the keyframe, or the next one, where that is reached."""
        env = self._env
        sim = env.sim
        place = sim.tool_place
        rotation = sim.tool_rotation
        while True:
            frame = self._frames[self._at]
            left = frame.place - place
            turn = rotation_vector(frame.rotation @ rotation.T)
            far, angle = np.linalg.norm(left), np.linalg.norm(turn)
            last = self._at == len(self._frames) - 1
            if last or not ((far < frame.near and angle < 0.06) or self._spent >= frame.steps):
                break
            self._at, self._spent = self._at + 1, 0
        self._spent += 1
        env.segment = frame.segment
        # Both parts of the error shrink together, so that the tool goes straight.
        share = 1.0 / max(1.0, far / frame.speed, angle / frame.turn)
        X_HT, R_HT = sim.X_HT
        # The tool's next pose, and from it the hand's.
        new_rotation = rotation_matrix(share * turn) @ rotation
        new_place = place + share * left
        hand_rotation = new_rotation @ R_HT.T
        hand_place = new_place - hand_rotation @ X_HT
        return env.towards(hand_place, hand_rotation)


def expert(task: str, **options: Any) -> Expert:
    """The scripted expert of a task.

    Raises:
        UserError: Unknown task, or options (it has none).
    """
    if options:
        raise UserError(f"the experts of fleet_tools have no options, {sorted(options)} were given")
    return Expert(task)
