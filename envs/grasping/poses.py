"""Poses of the hand, what an action means, and where the camera sits.

Frames: ``X_WH`` is the pose of the hand in the world, a rigid matrix [4, 4], metres. The fingers close along the hand's
y axis and point along its z axis. The camera is fixed to the hand, ``X_WC = X_WH @ HAND_EYE``, and has OpenGL's axes:
x to the right, y up, and it looks along -z.

Sources: semantics and limits of the action, field of view and place of the camera are those of GA-DDPG (L. Wang,
Y. Xiang, W. Yang, A. Mousavian and D. Fox, "Goal-Auxiliary Actor-Critic for 6D Robotic Grasping with Point Clouds",
CoRL 2021); rotations are rotation vectors here, Euler angles there.
"""

from __future__ import annotations

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.fleet_tools.panda import rotation_matrix, rotation_vector

#: What an action of 1 means: metres and radians.
TRANSLATION, ROTATION = 0.06, np.pi / 6
#: Both, one for each entry of an action.
SCALE = np.array([TRANSLATION] * 3 + [ROTATION] * 3)
#: The camera's pose in the hand's frame: right is the hand's +y, up its +x, and it looks along +z.
HAND_EYE = np.array([[0.0, 1.0, 0.0, 0.036], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.036], [0.0, 0.0, 0.0, 1.0]])
HAND_EYE.setflags(write=False)
#: Field of view of the camera, radians, both ways; nearest and farthest distance that it sees, metres.
FOV = np.pi / 2
NEAR, FAR = 0.02, 3.0


def intrinsics(size: int) -> np.ndarray:
    """The camera's matrix [3, 3] for pictures of ``size`` pixels: focal lengths and the middle, in pixels."""
    middle = size / 2
    focal = middle / np.tan(FOV / 2)
    return np.array([[focal, 0.0, middle], [0.0, focal, middle], [0.0, 0.0, 1.0]])


def pose(place: np.ndarray, rotation: np.ndarray) -> np.ndarray:
    """The rigid matrix [4, 4] of a place [3], metres, and a rotation matrix [3, 3]."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, place
    return out


def inverse(X: np.ndarray) -> np.ndarray:
    """The inverse [4, 4] of a rigid matrix [4, 4]."""
    out = np.eye(4)
    out[:3, :3] = X[:3, :3].T
    out[:3, 3] = -X[:3, :3].T @ X[:3, 3]
    return out


def rigid(v: np.ndarray) -> np.ndarray:
    """The rigid matrix [4, 4] of a translation, metres, and a rotation vector, radians, together [6]."""
    v = np.asarray(v, np.float64)
    return pose(v[:3], rotation_matrix(np.ascontiguousarray(v[3:])))


def delta(action: np.ndarray) -> np.ndarray:
    """T(a): the motion of the hand, in its own frame, that an action commands.

    The commanded next pose is ``X_WH @ delta(action)``.

    Args:
        action: [6]; 1 means 0.06 m and pi / 6 rad.

    Returns:
        A rigid matrix [4, 4].

    Raises:
        UserError: Another shape, or numbers that are not finite.
    """
    action = np.asarray(action, np.float64)
    if action.shape != (6,) or not np.isfinite(action).all():
        raise UserError(f"the action {action.tolist()} is not six finite numbers: translation, rotation vector")
    return rigid(action * SCALE)


def action_of(T: np.ndarray) -> np.ndarray:
    """The action [6] that commands a motion of the hand; it is not cut to the bounds. Inverse of :func:`delta`.

    Args:
        T: A rigid matrix [4, 4], in the hand's frame.

    Raises:
        UserError: Another shape, or not rigid: mirrored, scaled or skewed.
    """
    T = check_pose(T, "T")
    turn = rotation_vector(np.ascontiguousarray(T[:3, :3]))
    return np.concatenate([T[:3, 3], turn]) / SCALE


def check_pose(X: np.ndarray, name: str) -> np.ndarray:
    """Returns a pose [4, 4] as float64 if it is rigid.

    Raises:
        UserError: It is not; the message names it by ``name``.
    """
    X = np.asarray(X, np.float64)
    if X.shape != (4, 4) or not np.isfinite(X).all():
        raise UserError(f"{name} has shape {X.shape}; a pose is a finite matrix [4, 4]")
    off = np.abs(X[:3, :3] @ X[:3, :3].T - np.eye(3)).max()
    if off > 1e-4 or np.linalg.det(X[:3, :3]) < 0 or np.abs(X[3] - [0, 0, 0, 1]).max() > 1e-6:
        raise UserError(
            f"{name} is not rigid (R R^T is {off:.2g} off the identity, det R = {np.linalg.det(X[:3, :3]):.3f}); give "
            "a rotation and a translation without scale or mirror"
        )
    return X


def shortened(action: np.ndarray) -> np.ndarray:
    """An action [6] within -1..1 of the same direction: too long ones are scaled as a whole, so the way is kept."""
    return action / max(1.0, float(np.abs(action).max()))


def between(first: np.ndarray, second: np.ndarray, share: float) -> np.ndarray:
    """A pose [4, 4] on the way: places go straight, rotations along the shortest arc.

    Args:
        first: [4, 4].
        second: [4, 4].
        share: 0 at the first pose, 1 at the second.
    """
    turn = rotation_vector(np.ascontiguousarray(first[:3, :3].T @ second[:3, :3]))
    place = first[:3, 3] + share * (second[:3, 3] - first[:3, 3])
    return pose(place, first[:3, :3] @ rotation_matrix(share * turn))
