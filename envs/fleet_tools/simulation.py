"""One compiled scene with its state: placing, gripping, moving, and where everything is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

from fleetgym.core.render import choose_gl
from fleetgym.envs.fleet_tools.instances import Instance
from fleetgym.envs.fleet_tools.mechanisms import MECHANISMS
from fleetgym.envs.fleet_tools.panda import (
    DOWN,
    LOWER,
    TCP,
    UPPER,
    arm_target,
    hand_target,
    rotation_matrix,
    rotation_vector,
)
from fleetgym.envs.fleet_tools.scene import compiled

choose_gl()  # before MuJoCo is imported

import mujoco  # noqa: E402
import numpy as np  # noqa: E402

#: A target is led from the old to the new one in so many pieces of a control step.
PIECES = 4
#: What domain randomisation scales, besides the servos' stiffness.
_RANDOMISED = ("geom_friction", "body_mass", "dof_frictionloss")
_BODIES = ("hand", "tool", "object", "pin", "nut", "stop", "other", "vessel")
_JOINTS = ("slide", "turn", "thread")


class Contacts(NamedTuple):
    """How things touch.

    Attributes:
        depth: How far the two shapes of the deepest contact overlap, metres.
        force: Sum of the normal forces on the tool, newtons.
    """

    depth: float
    force: float


class Simulation:
    """A scene of one tool, one object and one arm.

    Sites and bodies are windows on MuJoCo's memory: ``keypoint`` (of the object), ``head``, ``tail`` and ``side`` (of
    the tool), ``second`` (of the other piece) are places [3], metres, of the moment.

    Args:
        task: A task name.
        tool: The tool.
        made: The object.
        arm: ``"panda"`` or ``"hand"``.
        timestep: Seconds.
        sensors: Whether force and torque between hand and tool are measured.
    """

    keypoint: np.ndarray
    head: np.ndarray

    def __init__(
        self, task: str, tool: Instance, made: Instance, arm: str, timestep: float, sensors: bool = False
    ) -> None:
        self.model = model = copy.copy(compiled(task, tool, made, arm, timestep, sensors))
        self.data = data = mujoco.MjData(model)
        self.tool_instance, self.object_instance, self.arm = tool, made, arm
        self.mechanism = MECHANISMS[made.kind]
        bodies = {model.body(index).name: index for index in range(model.nbody)}
        joints = {model.joint(index).name: int(model.joint(index).qposadr[0]) for index in range(model.njnt)}
        for name in _BODIES:
            if name in bodies:
                setattr(self, name, bodies[name])
        for index in range(model.nsite):
            setattr(self, model.site(index).name, data.site(index).xpos)
        for name in _JOINTS:
            if name in joints:
                setattr(self, name, joints[name])
        self.free = [joints[name] for name in ("object", "other") if name in joints]
        self.hand_place, self.hand_rotation = data.xpos[self.hand], data.xmat[self.hand].reshape(3, 3)
        self.tool_place, self.tool_rotation = data.xpos[self.tool], data.xmat[self.tool].reshape(3, 3)
        self.keypoints = {name: model.site(name).pos.copy() for name in ("head", "tail", "side")}
        self.target = data.ctrl[: 7 if arm == "panda" else 6]
        self._split: tuple[int, list[int]] = (0, [])
        self.X_HT = np.zeros(3), np.eye(3)
        self._wrench = np.zeros(6)
        self._fingers = [model.geom(name).id for name in ("left", "right")]
        self.first = 0.0
        #: Called after each time step, for whoever must see all of them; they are then made one by one.
        self.after_step: Callable[[], None] | None = None
        names = ("body_pos", "body_quat", "geom_pos", "body_inertia", "actuator_gainprm", "actuator_biasprm")
        self._fresh = [(getattr(model, name), getattr(model, name).copy()) for name in (*names, *_RANDOMISED)]

    def rotation_of(self, body: int) -> np.ndarray:
        """A body's rotation vector [3], radians."""
        return rotation_vector(self.data.xmat[body].reshape(3, 3))

    @property
    def tip(self) -> np.ndarray:
        """The point between the finger tips [3], metres."""
        return self.hand_place + self.hand_rotation[:, 2] * TCP

    def begin(self, pose: np.ndarray, grasp: np.ndarray, joints: np.ndarray | None, hand: tuple[Any, Any]) -> None:
        """Puts everything in its place, at rest.

        Args:
            pose: Of the object; see the mechanism.
            grasp: How the tool is held: shifted along its handle and up, metres, turned about the fingers' axis and
                about the vertical, radians.
            joints: Angles of the arm [7], radians; None for the hand alone.
            hand: Place [3] between the finger tips and rotation [3, 3] of the hand.
        """
        model, data = self.model, self.data
        for present, fresh in self._fresh:
            present[:] = fresh
        mujoco.mj_resetData(model, data)
        along, up, pitch, yaw = grasp
        rotation = DOWN @ rotation_matrix(np.array([0.0, pitch, 0.0])) @ rotation_matrix(np.array([0.0, 0.0, yaw]))
        place = np.array([0.0, 0.0, TCP]) + rotation @ np.array([-along, 0.0, up])
        model.body_pos[self.tool] = place
        mujoco.mju_mat2Quat(model.body_quat[self.tool], rotation.ravel())
        self.X_HT = place, rotation
        for finger, side in zip(self._fingers, (1, -1)):
            model.geom_pos[finger, 1] = side * (self.tool_instance.handle + 0.008)
        self.mechanism.place(self, pose)
        if joints is not None:
            data.qpos[:7] = data.ctrl[:7] = joints
        else:
            data.qpos[:3] = data.ctrl[:3] = hand[0]
            mujoco.mju_mat2Quat(data.qpos[3:7], (DOWN @ hand[1]).ravel())
            data.ctrl[3:6] = rotation_vector(DOWN @ hand[1])
        mujoco.mj_forward(model, data)

    def randomise(self, rng: np.random.Generator, strength: float) -> None:
        """Scales friction, masses, the joints' dry friction and the servos' stiffness, each by its own factor.

        Args:
            rng: Generator.
            strength: Factors are uniform within 1 - strength .. 1 + strength.
        """

        def factors(number: int) -> np.ndarray:
            return 1.0 + strength * rng.uniform(-1.0, 1.0, number)

        model = self.model
        model.geom_friction[:] *= factors(model.ngeom)[:, None]
        heavier = factors(model.nbody)
        model.body_mass[:] *= heavier
        model.body_inertia[:] *= heavier[:, None]
        model.dof_frictionloss[:] *= factors(model.nv)
        if model.nu:
            stiffer = factors(model.nu)
            model.actuator_gainprm[:, 0] *= stiffer
            model.actuator_biasprm[:, 1] *= stiffer
        mujoco.mj_forward(model, self.data)

    def move_joints(self, change: np.ndarray, substeps: int) -> None:
        """Lets the arm go to its present joint angles plus ``change`` [7], radians, for ``substeps`` time steps."""
        self._servo(np.minimum(np.maximum(self.data.qpos[:7] + change, LOWER), UPPER), substeps)

    def move_hand(self, change: np.ndarray, substeps: int) -> None:
        """Lets the hand go to its present pose moved in its own frame, for ``substeps`` time steps.

        Args:
            change: Translation of the point between the finger tips [3], metres, and rotation vector [3], radians.
            substeps: Time steps.
        """
        if self.arm == "panda":
            wanted = arm_target(self.data.qpos[:7], change, substeps * self.model.opt.timestep)
        else:
            wanted = hand_target(self.hand_place, self.hand_rotation, change)
        self._servo(wanted, substeps)

    def _servo(self, wanted: np.ndarray, substeps: int) -> None:
        model, data, target = self.model, self.data, self.target
        if self._split[0] != substeps:
            self._split = substeps, _shares(substeps)
        # A target is led to where it shall be, so that nothing jerks.
        piece = (wanted - target) / PIECES
        for steps in self._split[1]:
            target += piece
            if self.after_step is not None:
                for _ in range(steps):
                    mujoco.mj_step(model, data)
                    self.after_step()
            elif steps:
                mujoco.mj_step(model, data, steps)
        # A step leaves places as they were before its last integration.
        mujoco.mj_kinematics(model, data)

    def contacts(self) -> Contacts:
        """Depth and force of the moment's contacts."""
        contact = self.data.contact
        if not len(contact.dist):
            return Contacts(0.0, 0.0)
        on_tool = (self.model.geom_bodyid[contact.geom] == self.tool).any(axis=1) & (contact.efc_address >= 0)
        force = 0.0
        for index in np.flatnonzero(on_tool):
            mujoco.mj_contactForce(self.model, self.data, index, self._wrench)
            force += float(self._wrench[0])
        return Contacts(max(0.0, -float(contact.dist.min())), force)

    def energy(self) -> float:
        """Kinetic energy, joules."""
        mujoco.mj_energyVel(self.model, self.data)
        return float(self.data.energy[1])


def _shares(substeps: int) -> list[int]:
    """``substeps`` in :data:`PIECES` parts that differ by one at most."""
    ends = [substeps * piece // PIECES for piece in range(PIECES + 1)]
    return [end - start for start, end in zip(ends, ends[1:])]
