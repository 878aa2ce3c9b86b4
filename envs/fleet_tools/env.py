"""``gym.make("FleetTools/Hammer-v0")``: contact-rich tool use with a tool in hand."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.fleet_tools import instances
from fleetgym.envs.fleet_tools.mechanisms import MECHANISMS, ROLES
from fleetgym.envs.fleet_tools.names import ARMS, CONTROL_STEP, HORIZON, check_task, resolve_task_set
from fleetgym.envs.fleet_tools.observe import Observer, place_cameras, resolve_kinds
from fleetgym.envs.fleet_tools.panda import READY, TCP, inverse, rotation_matrix, rotation_vector, write_poses
from fleetgym.envs.fleet_tools.scene import DOWN, START, TIMESTEP
from fleetgym.envs.fleet_tools.simulation import Contacts, Simulation
from fleetgym.envs.goals import GOALS, draw_goal
from fleetgym.envs.rendering import Camera

#: Numbers of the state.
STATE_SIZE = 27
#: What an action of 1 means: metres and radians of the hand, radians of a joint.
TRANSLATION, ROTATION, JOINT = 0.08, 0.6, 0.2
_CHANGE = np.array([TRANSLATION] * 3 + [ROTATION] * 3)
#: Largest entry of an action, with a little room for rounding.
_MOST = 1.0 + 1e-6
CONTROLS = ("cartesian", "joint")
#: Our own view of the tool and what it is for; the other cameras are the scene's.
TABLE_CAMERA = {"lookat": (0.53, 0.0, 0.14), "distance": 0.72, "azimuth": 140.0, "elevation": -25.0}
CAMERAS = ("table", "front", "overhead", "wrist")
#: How the tool is held: along the handle and up, metres; about the fingers' axis and about the vertical, radians.
GRASP = np.array([0.015, 0.004, 0.1, 0.05])
#: Where the hand begins, about its start: metres, and yaw, radians.
SPREAD = np.array([0.04, 0.06, 0.04, 0.2])


class FleetToolsEnv(gym.Env):
    """Tools in the hand of a Panda arm: hammer, wrench, spatula and knife, each made from numbers.

    ## Task

    A Franka Panda stands at a table. Its gripper holds a tool, welded at a random offset; nothing has to be grasped.
    What the tool does, it does by contact alone: nothing else is welded, moved or set during an episode.

    | id | what is to be done | solved when |
    |---|---|---|
    | `FleetTools/Hammer-v0` | drive a pin into its block; dry friction holds it with 20 to 60 N | 1 cm deeper |
    | `FleetTools/Wrench-v0` | turn a hexagonal nut clockwise on its thread | turned by 0.4 rad |
    | `FleetTools/Spatula-v0` | lift a patty that lies before a low stop | its middle 5 cm above the table |
    | `FleetTools/Knife-v0` | push two pieces that stand side by side apart | 5 cm further apart |
    | `FleetTools/WrenchForHammer-v0` | the pin, with a wrench | as with the hammer |
    | `FleetTools/SpatulaForHammer-v0` | the pin, with a spatula | as with the hammer |
    | `FleetTools/Scoop-v0` | take a ball out of a tray with a scoop | it lies in the scoop, 5 cm above the table |
    | `FleetTools/Whisk-v0` | stir a ball in a bowl with a whisk | once around the bowl's middle, either way |

    Every id has a twin such as `FleetTools/Hammer-Hand-v0`: the hand without the arm, on servos of limited force, for
    speed. One control step lasts 80 ms, 20 time steps of MuJoCo.

    Tasks, mechanisms and criteria are those of fleet-tools (Wang et al., "Robot Fleet Learning via Policy Merging",
    ICLR 2024), which needs Drake and meshes; arm, tools and objects are made of primitives here, and the code is ours.
    Differences: all motion is MuJoCo's; the nut is a hexagon; the patty has a stop behind it; the pin must be hit with
    20 to 60 N instead of against damping alone; the second cross task is our choice; scoop and whisk, of which the
    release has tools' names only, are our own tasks.

    ## Tools and objects

    Twelve instances of each class of tool and object differ in their numbers (lengths, openings, masses, friction; see
    the table below). The first six are for training, the others are held out. A robot of a fleet is one tool:
    `gym.make("FleetTools/Hammer-v0", tool=3)`. Each `reset` draws tool and object from `tools` and `objects`.

    ## Observation

    `observation` names what is observed: one of these, or several.

    | name | what | shape, type |
    |---|---|---|
    | `state` | the numbers of the next table | `(27,)`, float64 |
    | `keypoints` | `head`, `tail` and `side` of the tool, and the object's keypoint, m | `(4, 3)`, float64 |
    | `points` | a cloud: x, y and z, m, and 0 for the tool, 1 for the object | `(4, 1024)`, float32 |
    | `wrist`, `overhead` | RGB picture of that camera | `(S, S, 3)`, uint8 |
    | with it `wrist_depth`, `overhead_depth` | depth along the direction of view, m | `(S, S)`, float32 |
    | `wrench` | force, N, and torque, N m, between tool and hand in the last 32 steps | `(32, 6)`, float64 |
    | `torque` | torques of the arm's motors, N m; zeros without the arm | `(7,)`, float64 |

    One name of an array gives a `Box`; several names, or a camera's, give a `Dict` with those keys. `S` is
    `image_size`. Keypoints, clouds and forces are in the hand's frame: the origin between the finger tips, the axes
    those of the hand, z along the fingers. `wrench` is what the tool exerts on the hand at the place where it is held,
    its weight included, at the end of each control step; the newest is last, and before the first step there are
    zeros. `torque` leaves out what carries the arm's own weight.

    The first 512 points of a cloud are on the tool, the others on those parts of the object that move. With
    `points_from="mesh"` they are fixed to the shapes' surfaces, uniform in area, drawn once for each instance; what
    lies inside of another shape is left out. With `points_from="depth"` they are what the cameras `wrist` and
    `overhead` see at 160 x 160 pixels, thinned by farthest-point sampling; they are repeated where there are fewer
    than 512, and zeros where nothing is seen. Cameras and `"depth"` need OpenGL; without it, making the environment is
    an error.

    The state: `Box(27,)`, float64. Rotations are rotation vectors, radians; places are in the frame of the arm's base,
    whose z axis points up and whose x axis points over the table; the table's top is at z = 0.

    | index | meaning | unit |
    |---|---|---|
    | 0-2 | the point between the finger tips | m |
    | 3-5 | rotation of the hand, from pointing straight down | rad |
    | 6-12 | joint angles of the arm; zeros without it | rad |
    | 13-14 | opening of each finger (half the handle's thickness) | m |
    | 15-17 | the object: the pin's head, the nut's middle, the patty, the first piece, the ball | m |
    | 18-20 | rotation of nut or patty; zeros (pin); place of the second piece | rad, m |
    | | the tray: x and y of the foot of its far wall, yaw; the middle of the bowl's floor | m, rad |
    | 21-23 | the tool's working end: keypoint `head` | m |
    | 24-26 | rotation of the tool | rad |
    | 27- | with `task_set`: one-hot of the task in that set; without the state it is the key `task` | |

    ## Action

    `Box(-1, 1, (6,))`, float32, with `control="cartesian"`: how the hand shall move from where it is, in its own frame.
    Damped least squares within the joint limits turn that into targets of the joints' position servos.

    | index | meaning | 1 means |
    |---|---|---|
    | 0-2 | translation of the point between the finger tips along x, y, z | 0.08 m |
    | 3-5 | rotation vector | 0.6 rad |

    `Box(-1, 1, (7,))` with `control="joint"`: how the joints shall turn from where they are, 1 means 0.2 rad.

    Actions beyond the bounds, or not finite, are refused with an error; the episode may go on with another one.

    ## Reward

    Between 0 and 1 a step: 0.2 for how near the tool's head is to the object's keypoint (1 - tanh of five times the
    distance), 0.6 for the share of what is wanted that is done; 1 where the task is solved.

    ## Success

    `info["success"]`, a bool, in the info of each step and of `reset`; of this one step: a task counts as solved if it
    was true at any step of the episode. `info["amount"]` is what is measured for it, in metres or radians.
    `info["segment"]` is what the expert says it is doing (0 approach, 1 stand-off, 2 contact, 3 act; -1 without one).

    ## Termination and truncation

    `terminated` is False, unless `terminate_on_success=True` ends the episode at its first success. `truncated` is True
    at step `horizon` (120). Further steps raise `gymnasium.error.ResetNeeded`.

    ## Randomisation

    `reset` draws the tool, the object, the object's pose, how the tool is held (1.5 cm along the handle, 4 mm up, 0.1
    and 0.05 rad) and where the hand begins (4, 6 and 4 cm, 0.2 rad), all uniformly, all from the environment's own
    generator: the same seed gives the same episode in any process. `reset`'s info tells `tool`, `object` and `pose`.
    `goals="held_out"` draws poses of the object from one fifth of all cells of a millimetre and a milliradian, and
    `goals="train"` from the others. `options={"pose": ..., "tool": ..., "object": ..., "hand": ...}` sets some of it.
    `randomise=0.3` scales every friction, mass and stiffness by its own factor within 0.7 .. 1.3.

    ## Arguments

    - `task`, `arm`: part of the id; `arm` is `"panda"` or `"hand"`.
    - `render_mode`: None or `"rgb_array"`.
    - `tool`, `thing`: the number of one tool and of one object, 0 to 11, in place of a split.
    - `tools`, `objects`: the splits that instances are drawn from: `"train"`, `"held_out"` or `"all"`.
    - `goals`: `"all"`, `"train"` or `"held_out"`.
    - `control`: `"cartesian"` or `"joint"`.
    - `task_set`: names of tasks, or a split's name; adds a one-hot to the observation.
    - `observation`, `points_from`: see above.
    - `image_size`: pixels along each side of the pictures that are observed.
    - `randomise`: strength of the domain randomisation, at least 0 and below 1.
    - `horizon`, `terminate_on_success`: see above.
    - `timestep`, `control_step`: seconds.
    - `render_size`: (height, width) of pictures, pixels; `height` and `width` set one of them.
    - `camera_name`: `"table"`, `"front"`, `"overhead"` or `"wrist"`.

    ## Version history

    - v0: the first.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": round(1 / CONTROL_STEP)}

    def __init__(
        self,
        task: str,
        *,
        arm: str = "panda",
        render_mode: str | None = None,
        tool: int | None = None,
        thing: int | None = None,
        tools: str = "train",
        objects: str = "train",
        goals: str = "all",
        control: str = "cartesian",
        task_set: str | Sequence[str] | None = None,
        observation: str | Sequence[str] = "state",
        points_from: str = "mesh",
        image_size: int = 84,
        randomise: float = 0.0,
        horizon: int = HORIZON,
        terminate_on_success: bool = False,
        timestep: float = TIMESTEP,
        control_step: float = CONTROL_STEP,
        render_size: tuple[int, int] = (240, 320),
        height: int | None = None,
        width: int | None = None,
        camera_name: str = "table",
    ) -> None:
        self.task = check_task(task)
        modes = self.metadata["render_modes"]
        for what, value, options in (
            ("arm", arm, ARMS),
            ("control", control, CONTROLS),
            ("split of tools", tools, instances.SPLITS),
            ("split of objects", objects, instances.SPLITS),
            ("choice of goals", goals, GOALS),
            ("render mode", render_mode, (None, *modes)),
            ("camera", camera_name, CAMERAS),
        ):
            if value not in options:
                raise unknown(what, value, [option for option in options if option])
        if control == "joint" and arm != "panda":
            raise UserError(f"control='joint' arm={arm!r}: the hand alone has no joints; use arm='panda'")
        if horizon < 1:
            raise UserError(f"horizon is {horizon}; an episode has at least one step")
        if not 0 <= randomise < 1:
            raise UserError(f"randomise={randomise}: factors of 1 - randomise must stay positive; use 0 to 0.9")
        steps = control_step / timestep if timestep > 0 else 0
        if not 0 < timestep <= 0.01 or abs(steps - round(steps)) > 1e-6 or round(steps) < 1:
            raise UserError(
                f"timestep={timestep} control_step={control_step}: the time step must be above 0 and at most 0.01 s, "
                "and the control step a multiple of it"
            )
        self.tool_kind, self.object_kind = ROLES[task]
        if tool is not None:
            instances.tool(self.tool_kind, tool)
        if thing is not None:
            instances.thing(self.object_kind, thing)
        self.task_set = None if task_set is None else resolve_task_set(task_set)
        if self.task_set is not None and task not in self.task_set:
            raise UserError(f"task {task!r} is not in the task set {self.task_set}; add it, or choose another set")
        one_hot_size = 0 if self.task_set is None else len(self.task_set)
        self.observation = kinds = resolve_kinds(observation)
        with_state = "state" in kinds
        self._observer = Observer(
            kinds, points_from, image_size, STATE_SIZE + one_hot_size, 0 if with_state else one_hot_size
        )
        #: Whether the state is all that is observed, which costs nothing more.
        self._state_only = kinds == ("state",)
        self.arm, self.control, self.goals = arm, control, goals
        self.tool_indices = instances.SPLITS[tools] if tool is None else (int(tool),)
        self.object_indices = instances.SPLITS[objects] if thing is None else (int(thing),)
        self.randomise, self.horizon, self.terminate_on_success = randomise, horizon, terminate_on_success
        self.timestep, self.substeps = timestep, round(steps)
        self.render_mode, self.camera_name = render_mode, camera_name
        self._size = height or render_size[0], width or render_size[1]
        self._view: Camera | None = None
        self.mechanism = MECHANISMS[self.object_kind]
        self._simulations: dict[tuple[int, int], Simulation] = {}
        self.sim = self._simulation(self.tool_indices[0], self.object_indices[0])
        self._observer.open(self.sim)
        self._one_hot = np.zeros(one_hot_size)
        if self.task_set is not None:
            self._one_hot[self.task_set.index(task)] = 1.0
        self.observation_space = self._observer.space()
        self.action_space = spaces.Box(-1.0, 1.0, (7 if control == "joint" else 6,), dtype=np.float32)
        self._steps, self._running = 0, False
        #: What the expert does; see ``info["segment"]``.
        self.segment = -1
        #: What the last reset drew: pose of the object, and the numbers of tool and object.
        self.pose, self.tool, self.thing = np.zeros(len(self.mechanism.low)), -1, -1

    def _simulation(self, tool: int, thing: int) -> Simulation:
        key = tool, thing
        if key not in self._simulations:
            made = instances.tool(self.tool_kind, tool), instances.thing(self.object_kind, thing)
            self._simulations[key] = Simulation(self.task, *made, self.arm, self.timestep, self._observer.sensors)
        return self._simulations[key]

    @property
    def model(self) -> Any:
        """The ``mujoco.MjModel``."""
        return self.sim.model

    @property
    def data(self) -> Any:
        """The ``mujoco.MjData``."""
        return self.sim.data

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins an episode; see the class for what is drawn.

        Args:
            seed: Seed of the environment's generator; None lets it go on.
            options: ``pose`` [n] of the object, ``tool`` and ``object`` (numbers), ``hand`` [3], the place between the
                finger tips, metres, in place of what would be drawn.

        Returns:
            The observation, and an info with ``success`` (False), ``tool``, ``object`` and ``pose``.

        Raises:
            UserError: An unknown option or instance, a pose outside of the bounds, or a place that the arm cannot
                reach. The episode that was running goes on.
        """
        options = dict(options or {})
        for name in options:
            if name not in ("pose", "tool", "object", "hand"):
                raise unknown("option of reset", name, ("pose", "tool", "object", "hand"))
        tool, thing, pose = options.get("tool"), options.get("object"), options.get("pose")
        if tool is not None:
            instances.tool(self.tool_kind, tool)
        if thing is not None:
            instances.thing(self.object_kind, thing)
        if pose is not None:
            pose = self._checked(pose)
        hand = options.get("hand")
        if hand is not None:
            hand = np.array(hand, np.float64)
            if hand.shape != (3,) or not np.isfinite(hand).all():
                raise UserError(
                    f"hand={options['hand']}: a place [x, y, z] in metres is wanted, such as {START.tolist()}"
                )
            self._start(hand, DOWN)
        super().reset(seed=seed)
        rng = self.np_random
        # Everything is drawn, whatever was given: so what is not given does not depend on it.
        drawn = [int(rng.integers(len(indices))) for indices in (self.tool_indices, self.object_indices)]
        tool = self.tool_indices[drawn[0]] if tool is None else int(tool)
        thing = self.object_indices[drawn[1]] if thing is None else int(thing)
        free = draw_goal(rng, self.mechanism.low, self.mechanism.high, self.goals)
        grasp, spread = rng.uniform(-GRASP, GRASP), rng.uniform(-SPREAD, SPREAD)
        place = START + spread[:3] if hand is None else hand
        rotation = DOWN @ rotation_matrix(np.array([0.0, 0.0, spread[3]]))
        joints = self._start(place, rotation)
        self.tool, self.thing, self.pose = tool, thing, free if pose is None else pose
        self.sim = self._simulation(tool, thing)
        self.sim.begin(self.pose, grasp, joints, (place, rotation))
        if self.randomise:
            self.sim.randomise(rng, self.randomise)
        self._steps, self._running, self.segment = 0, True, -1
        self._observer.begin()
        info = {"success": False, "tool": tool, "object": thing, "pose": tuple(self.pose.tolist())}
        return self._observe(), info

    def _checked(self, pose: Any) -> np.ndarray:
        low, high = np.array(self.mechanism.low), np.array(self.mechanism.high)
        names = ", ".join(self.mechanism.pose_names)
        given = np.array(pose, np.float64)
        if given.shape != low.shape:
            raise UserError(f"pose={pose}: {self.task} takes {len(low)} numbers: {names}")
        if not np.all((given >= low - 1e-9) & (given <= high + 1e-9)):
            raise UserError(f"pose={pose}: ({names}) must be within {low.tolist()} .. {high.tolist()}")
        return given

    def _start(self, place: np.ndarray, rotation: np.ndarray) -> np.ndarray | None:
        if self.arm != "panda":
            return None
        joints, far, turned = inverse(READY, place, rotation, READY, 100, 0.01, 0.1)
        if far > 1e-3 or turned > 1e-2:
            raise UserError(
                f"the arm cannot begin with its hand at {np.round(place, 3).tolist()}: it gets within {far:.3f} m and "
                f"{turned:.3f} rad; choose a place nearer to {START.tolist()}"
            )
        return joints

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Makes one control step.

        Args:
            action: [6], or [7] with joint control, within -1..1.

        Returns:
            Observation, reward, terminated, truncated, info.

        Raises:
            UserError: The action has another shape, is out of bounds or not finite; nothing has moved then.
            gymnasium.error.ResetNeeded: The episode is over, or was never begun.
        """
        action = np.asarray(action, np.float64)
        if action.shape != self.action_space.shape:
            raise UserError(f"the action has shape {action.shape}; {self.task} takes {self.action_space.shape}")
        # Written so that what is no number is refused; NumPy would take three times as long for so few.
        if not all([-_MOST <= entry <= _MOST for entry in action.tolist()]):
            raise UserError(
                f"the action is {action.tolist()}; each entry must be finite and within -1..1 (np.clip cuts it)"
            )
        if not self._running:
            raise gym.error.ResetNeeded(
                f"no episode of {self.task} is running ({self._steps} steps done); call reset()"
            )
        sim = self.sim
        self._steps += 1
        if self.control == "joint":
            sim.move_joints(JOINT * action, self.substeps)
        else:
            sim.move_hand(_CHANGE * action, self.substeps)
        if self._observer.sensors:
            self._observer.felt(sim)
        amount = self.mechanism.amount(sim)
        success = amount > self.mechanism.wanted
        terminated = self.terminate_on_success and success
        truncated = self._steps >= self.horizon
        self._running = not (terminated or truncated)
        info = {"success": success, "amount": amount, "segment": self.segment}
        return self._observe(), self._reward(amount, success), terminated, truncated, info

    def _reward(self, amount: float, success: bool) -> float:
        if success:
            return 1.0
        x, y, z = (self.sim.head - self.sim.keypoint).tolist()
        near = 1.0 - math.tanh(5.0 * math.sqrt(x * x + y * y + z * z))
        return 0.2 * near + 0.6 * max(amount / self.mechanism.wanted, 0.0)

    def _observe(self) -> Any:
        if self._state_only:
            return self._state()
        return self._observer.observe(self.sim, self._state, self._one_hot)

    def _state(self) -> np.ndarray:
        sim = self.sim
        out = np.empty(STATE_SIZE + self._one_hot.size)
        write_poses(sim.hand_place, sim.hand_rotation, sim.head, sim.tool_rotation, out)
        out[6:13] = sim.data.qpos[:7] if self.arm == "panda" else 0.0
        out[13:15] = sim.tool_instance.handle
        self.mechanism.state(sim, out[15:21])
        if self._one_hot.size:
            out[27:] = self._one_hot
        return out

    def towards(self, place: np.ndarray, rotation: np.ndarray) -> np.ndarray:
        """The Cartesian action [6], within -1..1, that moves the hand's frame towards a pose.

        Args:
            place: Of the hand's frame [3], metres.
            rotation: Of the hand [3, 3].
        """
        hand = self.sim.hand_rotation
        action = np.empty(6)
        action[:3] = hand.T @ (place + rotation[:, 2] * TCP - self.sim.tip) / TRANSLATION
        action[3:] = rotation_vector(hand.T @ rotation) / ROTATION
        return action / max(1.0, np.abs(action).max())

    def contacts(self) -> Contacts:
        """Depth of the deepest contact, metres, and the sum of the normal forces on the tool, newtons."""
        return self.sim.contacts()

    def render(self) -> np.ndarray | None:
        """Draws the scene: RGB [height, width, 3], uint8; None without ``render_mode="rgb_array"``.

        Raises:
            UserError: No OpenGL works here; the message says what to install.
        """
        if self.render_mode is None:
            gym.logger.warn('render() needs gym.make(..., render_mode="rgb_array")')
            return None
        if self._view is None:
            camera = TABLE_CAMERA if self.camera_name == "table" else self.camera_name
            self._view = Camera(self.sim.model, *self._size, camera)
        self._view.turn_to(self.sim.model)
        place_cameras(self.sim)
        return self._view.render(self.sim.data)

    def close(self) -> None:
        """Frees the OpenGL contexts."""
        self._observer.close()
        if self._view is not None:
            self._view.close()
