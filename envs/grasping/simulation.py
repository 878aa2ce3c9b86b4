"""The two PyBullet scenes of an episode: one with the arm, for physics, and its twin without, for pictures.

The twin holds table, floor and object only. The object's pose is copied into it, TinyRenderer draws it, and the
gripper, which is always at the same place of the palm's pictures, is pasted by depth. That is several times faster than
to draw the arm's meshes, and equal outside of the gripper.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from fleetgym.envs.fleet_tools.panda import READY, TCP, forward
from fleetgym.envs.fleet_tools.panda import inverse as inverse_kinematics
from fleetgym.envs.grasping.bullet import Client, p
from fleetgym.envs.grasping.objects import Thing, band_texture, data_folder, piece_file
from fleetgym.envs.grasping.poses import FAR, FOV, HAND_EYE, NEAR, inverse, pose

#: Seconds of a time step of the physics; time steps of a control step.
TIMESTEP, SUBSTEPS = 1 / 240, 30
#: Arm: gains and largest force of the position control, and the fingers' force, newtons.
POSITION_GAIN, VELOCITY_GAIN, ARM_FORCE, FINGER_FORCE = 0.2, 1.0, 250.0, 60.0
#: Opening of one finger, metres.
OPEN = 0.04
#: Links of PyBullet's Panda: the first that is rigid to the hand, and the fingers.
WRIST, FINGERS = 6, (9, 10)
#: Mass of each object, kilograms.
MASS = 0.1
#: Time steps to close, and to lift in so many parts; how far up, metres.
CLOSE_STEPS, LIFT_STEPS, LIFT_PARTS, LIFT = 120, 36, 10, 0.25
#: Values of the segmentation.
BACKGROUND, TARGET, GRIPPER = 0, 1, 2
_LIGHT: dict[str, Any] = {
    "lightDirection": [0.4, 0.3, 1.0],
    "lightAmbientCoeff": 0.6,
    "lightDiffuseCoeff": 0.4,
    "lightSpecularCoeff": 0.0,
    "shadow": 0,
    "renderer": p.ER_TINY_RENDERER,
}
# Looking at the table from the side opposite the arm.
_OUTSIDE = ([1.15, -0.75, 0.65], [0.38, 0.0, 0.18], [0.0, 0.0, 1.0])


class Scene:
    """Table and floor in a physics client; the table's top is at z = 0."""

    def __init__(self) -> None:
        self.client = Client()
        self.body: int | None = None
        self._shapes: dict[str, tuple[int, int, int | None]] = {}
        client, data = self.client, str(data_folder())
        client.setGravity(0, 0, -9.81)
        client.setTimeStep(TIMESTEP)
        client.setPhysicsEngineParameter(deterministicOverlappingPairs=1)
        # Drawn in this order: what the table hides of the floor is not shaded then.
        self.table = client.loadURDF(f"{data}/table/table.urdf", [0.5, 0, -0.625], useFixedBase=True)
        client.loadURDF(f"{data}/plane.urdf", [0, 0, -0.63])

    def put(self, thing: Thing, place: np.ndarray, quaternion: np.ndarray) -> None:
        """Replaces the object by another, at a place [3] with a quaternion [4] (x, y, z, w)."""
        client = self.client
        self.clear()
        if thing.name not in self._shapes:
            self._shapes[thing.name] = self._shape(thing)
        collision, visual, texture = self._shapes[thing.name]
        self.body = client.createMultiBody(MASS, collision, visual, list(place), list(quaternion))
        client.changeDynamics(
            self.body, -1, lateralFriction=1.0, spinningFriction=0.02, rollingFriction=0.001, collisionMargin=0.001
        )
        if texture is not None:
            client.changeVisualShape(self.body, -1, textureUniqueId=texture)

    def _shape(self, thing: Thing) -> tuple[int, int, int | None]:
        client = self.client
        if len(thing.pieces) == 1:
            collision = client.createCollisionShape(p.GEOM_MESH, vertices=thing.pieces[0].tolist())
        else:
            with piece_file(thing) as file:  # several pieces are read from files only
                collision = client.createCollisionShape(p.GEOM_MESH, fileName=file)
        corners = thing.corners
        normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
        visual = client.createVisualShape(
            p.GEOM_MESH,
            vertices=corners.reshape(-1, 3).tolist(),
            indices=list(range(3 * len(corners))),
            normals=np.repeat(normals, 3, axis=0).tolist(),
            uvs=thing.uvs.reshape(-1, 2).tolist(),
            rgbaColor=[*thing.colour, 1.0],
        )
        texture = None
        if thing.bands is not None:
            with band_texture(thing.bands) as file:
                texture = client.loadTexture(file)
        elif thing.texture is not None:
            texture = client.loadTexture(thing.texture)
        return collision, visual, texture

    def clear(self) -> None:
        """Takes the object away."""
        if self.body is not None:
            self.client.removeBody(self.body)
            self.body = None

    def at(self) -> tuple[np.ndarray, np.ndarray]:
        """Place [3] and quaternion [4] (x, y, z, w) of the object."""
        place, quaternion = self.client.getBasePositionAndOrientation(self.body)
        return np.array(place), np.array(quaternion)

    def object_pose(self) -> np.ndarray:
        """The object's pose in the world [4, 4]."""
        place, quaternion = self.at()
        return pose(place, np.array(p.getMatrixFromQuaternion(quaternion.tolist())).reshape(3, 3))

    def settle(self, least: int = 120, most: int = 960) -> bool:
        """Lets the object come to rest; returns whether it did within ``most`` time steps."""
        client = self.client
        for done in range(1, most + 1):
            client.stepSimulation()
            if done >= least and done % 30 == 0:
                linear, angular = client.getBaseVelocity(self.body)
                if max(map(abs, linear)) < 2e-3 and max(map(abs, angular)) < 0.03:
                    return True
        return False

    def picture(self, X_WC: np.ndarray, size: int, flags: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What a camera sees.

        Args:
            X_WC: Its pose [4, 4], OpenGL's axes.
            size: Height and width, pixels.
            flags: Of PyBullet's ``getCameraImage``.

        Returns:
            Colours [size, size, 3], uint8; depth along the view [size, size], float32, metres, :data:`FAR` where there
            is nothing; PyBullet's numbers of the bodies [size, size], -1 where there is nothing.
        """
        view = inverse(X_WC).T.ravel().tolist()
        near, far = NEAR, FAR
        projection = list(p.computeProjectionMatrixFOV(np.degrees(FOV), 1.0, near, far))
        # TinyRenderer looks at the lower left corner of a pixel; by this half pixel it looks at the middle, so that
        # poses.intrinsics() holds.
        projection[8] = projection[9] = 1.0 / size
        _, _, rgba, depth, bodies = self.client.getCameraImage(size, size, view, projection, flags=flags, **_LIGHT)
        rgb = np.ascontiguousarray(np.asarray(rgba, np.uint8).reshape(size, size, 4)[..., :3])
        depth = np.asarray(depth, np.float64).reshape(size, size)
        metres = far * near / (far - (far - near) * depth)
        return rgb, metres.astype(np.float32), np.asarray(bodies).reshape(size, size)

    def close(self) -> None:
        """Closes the physics client."""
        self.client.close()


class Simulation(Scene):
    """The scene with the arm, its twin for pictures, and the way the hand is moved."""

    def __init__(self) -> None:
        super().__init__()
        client = self.client
        self.twin = Scene()
        self.robot = client.loadURDF(f"{data_folder()}/franka_panda/panda.urdf", useFixedBase=True)
        for finger in FINGERS:
            client.changeDynamics(self.robot, finger, lateralFriction=2.0, spinningFriction=0.05)
        gear = client.createConstraint(
            self.robot, FINGERS[0], self.robot, FINGERS[1], p.JOINT_GEAR, [1, 0, 0], [0, 0, 0], [0, 0, 0]
        )
        client.changeConstraint(gear, gearRatio=-1, erp=0.1, maxForce=50)
        self._fingers = OPEN
        self.set_joints(READY)

    # Poses.

    def joints(self) -> np.ndarray:
        """Angles [7] of the arm's joints, radians."""
        return np.array([state[0] for state in self.client.getJointStates(self.robot, range(7))])

    def fingers(self) -> np.ndarray:
        """Opening [2] of each finger, metres."""
        return np.array([state[0] for state in self.client.getJointStates(self.robot, FINGERS)])

    def hand_pose(self) -> np.ndarray:
        """The hand's pose X_WH [4, 4]; the base of the arm is the world's frame."""
        return hand_pose(self.joints())

    def set_joints(self, q: np.ndarray) -> None:
        """Puts the arm at joint angles [7], at rest, with open fingers."""
        client = self.client
        for joint in range(7):
            client.resetJointState(self.robot, joint, float(q[joint]), 0.0)
        for finger in FINGERS:
            client.resetJointState(self.robot, finger, OPEN, 0.0)
        self._fingers = OPEN
        self._control(np.asarray(q, np.float64))

    # Motion.

    def _control(self, q: np.ndarray) -> None:
        client = self.client
        client.setJointMotorControlArray(
            self.robot,
            range(7),
            p.POSITION_CONTROL,
            targetPositions=q.tolist(),
            forces=[ARM_FORCE] * 7,
            positionGains=[POSITION_GAIN] * 7,
            velocityGains=[VELOCITY_GAIN] * 7,
        )
        client.setJointMotorControlArray(
            self.robot, FINGERS, p.POSITION_CONTROL, targetPositions=[self._fingers] * 2, forces=[FINGER_FORCE] * 2
        )

    def steps(self, count: int) -> None:
        """Makes so many time steps."""
        for _ in range(count):
            self.client.stepSimulation()

    def move(self, X_WH: np.ndarray, steps: int = SUBSTEPS) -> bool:
        """Moves the hand to a pose [4, 4]; returns whether the arm can reach it. It goes as near as it can."""
        q, reached = solve(X_WH, self.joints())
        self._control(q)
        self.steps(steps)
        return reached

    def close_and_lift(self) -> None:
        """Closes the fingers and lifts the hand by 25 cm, straight up."""
        goal = self.hand_pose()
        self._fingers = 0.0
        self._control(self.joints())
        self.steps(CLOSE_STEPS)
        for _ in range(LIFT_PARTS):
            goal[2, 3] += LIFT / LIFT_PARTS
            q, reached = solve(goal, self.joints())
            if not reached:
                break
            self._control(q)
            self.steps(LIFT_STEPS)

    # Pictures.

    def begin(self, thing: Thing, place: np.ndarray, quaternion: np.ndarray, joints: np.ndarray) -> None:
        """Puts the object at a place [3] with a quaternion [4], in both scenes, and the arm at joint angles [7]."""
        self.put(thing, place, quaternion)
        self.set_joints(joints)
        self.twin.put(thing, place, quaternion)

    def _sync(self) -> None:
        place, quaternion = self.at()
        self.twin.client.resetBasePositionAndOrientation(self.twin.body, place.tolist(), quaternion.tolist())

    def scene(self, X_WC: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The scene without the arm: colours, depth and segmentation (0 or 1) from a camera's pose [4, 4]."""
        self._sync()
        rgb, depth, bodies = self.twin.picture(X_WC, size)
        return rgb, depth, np.where(bodies == self.twin.body, TARGET, BACKGROUND).astype(np.uint8)

    def full(self, X_WC: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """As :meth:`scene`, with the arm, drawn as a whole: slow."""
        rgb, depth, bodies = self.picture(X_WC, size)
        labels = np.where(bodies == self.body, TARGET, BACKGROUND)
        return rgb, depth, np.where(bodies == self.robot, GRIPPER, labels).astype(np.uint8)

    @staticmethod
    def gripper(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """:func:`gripper_view`."""
        return gripper_view(size)

    def palm(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What the palm's camera sees: colours, depth and segmentation.

        With open fingers the gripper is pasted where it is nearer than the scene. When the fingers have closed, which
        is in the last picture of an episode only, the scene is drawn as a whole.
        """
        X_WC = self.hand_pose() @ HAND_EYE
        if self._fingers != OPEN:
            return self.full(X_WC, size)
        rgb, depth, labels = self.scene(X_WC, size)
        colours, near, mask = self.gripper(size)
        front = mask & (near < depth)
        rgb[front], depth[front], labels[front] = colours[front], near[front], GRIPPER
        return rgb, depth, labels

    def outside(self, height: int, width: int) -> np.ndarray:
        """The whole scene from outside: RGB [height, width, 3], uint8."""
        view = p.computeViewMatrix(*_OUTSIDE)
        projection = p.computeProjectionMatrixFOV(45.0, width / height, 0.05, 6.0)
        rgba = self.client.getCameraImage(width, height, view, projection, **_LIGHT)[2]
        return np.ascontiguousarray(np.asarray(rgba, np.uint8).reshape(height, width, 4)[..., :3])

    def close(self) -> None:
        """Closes both physics clients."""
        super().close()
        self.twin.close()


@functools.lru_cache(maxsize=8)
def gripper_view(size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The open gripper as the palm's camera sees it: colours, depth and mask [size, size], drawn once a size."""
    alone = Client()
    robot = alone.loadURDF(f"{data_folder()}/franka_panda/panda.urdf", useFixedBase=True)
    for joint in range(7):
        alone.resetJointState(robot, joint, float(READY[joint]))
    for finger in FINGERS:
        alone.resetJointState(robot, finger, OPEN)
    scene = Scene.__new__(Scene)
    scene.client = alone
    X_WC = hand_pose(READY) @ HAND_EYE
    rgb, depth, bodies = scene.picture(X_WC, size, p.ER_SEGMENTATION_MASK_OBJECT_AND_LINKINDEX)
    alone.close()
    # The parts that are rigid to the hand, not the arm's foot behind it.
    kept = rgb, depth, (bodies >= 0) & ((bodies >> 24) - 1 >= WRIST)
    for array in kept:
        array.setflags(write=False)
    return kept


def hand_pose(q: np.ndarray) -> np.ndarray:
    """The hand's pose [4, 4] at joint angles [7]."""
    tip, rotation, _ = forward(np.asarray(q, np.float64))
    return pose(tip - rotation[:, 2] * TCP, rotation)


def solve(X_WH: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, bool]:
    """Joint angles [7] that bring the hand to a pose [4, 4], from joint angles [7] on.

    Returns:
        The joint angles, and whether the pose is reached, within 3 mm and 0.03 rad.
    """
    rotation = np.ascontiguousarray(X_WH[:3, :3])
    tip = X_WH[:3, 3] + rotation[:, 2] * TCP
    found, far, turned = inverse_kinematics(np.asarray(q, np.float64), tip, rotation, READY, 60, 0.02, 0.02)
    return found, bool(far < 3e-3 and turned < 0.03)
