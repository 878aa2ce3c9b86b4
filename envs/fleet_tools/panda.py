"""The Franka Emika Panda: kinematics, masses and a MuJoCo model made of primitives, and inverse kinematics.

Sources: the arm's Denavit-Hartenberg parameters and limits are Franka's (Franka Control Interface documentation, "Robot
and interface specifications"); the links' masses, centres and inertias are those published with Franka's robot
description, after C. Gaz et al., "Dynamic Identification of the Franka Emika Panda Robot With Retrieval of Feasible
Parameters Using Penalty-Based Optimization", RA-L 4(4), 2019. The shapes are ours: capsules along the links.
"""

from __future__ import annotations

import numba
import numpy as np

#: Joint limits, radians; largest speeds, radians a second; largest torques, newton metres.
LOWER = np.array([-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973])
UPPER = np.array([2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973])
SPEED = np.array([2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61])
TORQUE = (87.0, 87.0, 87.0, 87.0, 12.0, 12.0, 12.0)
#: Franka's "ready" pose: the hand points down, its x axis away from the base.
READY = np.array([0.0, -np.pi / 4, 0.0, -3 * np.pi / 4, 0.0, np.pi / 2, np.pi / 4])
#: From the hand's frame to between its finger tips, along z, metres.
TCP = 0.1034
#: From the flange to the hand: no offset, turned by -45 degrees; from joint 7 to the flange, metres.
FLANGE = 0.107
#: The hand's rotation when it points straight down with its x axis along that of the world; the tool's in the hand,
#: whose z axis points down.
DOWN = np.diag([1.0, -1.0, -1.0])
#: Where the hand without an arm may be told to go: between the finger tips, metres, and the length of its rotation
#: vector from pointing straight down, radians.
HAND_LOW, HAND_HIGH = np.array([0.15, -0.6, 0.0]), np.array([0.85, 0.6, 0.8])
HAND_TURNED = 1.8
#: Position servos: stiffness, N m/rad, and damping, N m s/rad. Damped a little less than critically for the arm's
#: inertia, so that a target that moves is followed within a control step.
STIFFNESS = (4500.0, 4500.0, 3500.0, 3500.0, 2000.0, 2000.0, 2000.0)
DAMPING = (190.0, 190.0, 130.0, 130.0, 50.0, 50.0, 40.0)
#: Reflected inertia of the drives, kg m^2, and friction's damping, N m s/rad.
ARMATURE, FRICTION = 0.1, 1.0

# a, d and alpha of joint i in Craig's convention: x by alpha and a, then z by q and d.
_A = np.array([0.0, 0.0, 0.0, 0.0825, -0.0825, 0.0, 0.088])
_D = np.array([0.333, 0.0, 0.316, 0.0, 0.384, 0.0, 0.0])
_ALPHA = np.array([0.0, -np.pi / 2, np.pi / 2, np.pi / 2, -np.pi / 2, np.pi / 2, np.pi / 2])
_COS, _SIN = np.round(np.cos(_ALPHA)), np.round(np.sin(_ALPHA))
_HALF = np.sqrt(0.5)
#: Mass, kg; centre of mass, m; inertia about it, kg m^2 (xx, yy, zz, xy, xz, yz), in the link's frame.
_INERTIALS = (
    (4.970684, (0.003875, 0.002081, -0.04762), (0.70337, 0.70661, 0.0091170, -0.000139, 0.0067720, 0.019169)),
    (0.646926, (-0.003141, -0.02872, 0.003495), (0.0079620, 0.028110, 0.025995, -0.003925, 0.010254, 0.000704)),
    (3.228604, (0.027518, 0.039252, -0.066502), (0.037242, 0.036155, 0.01083, -0.004761, -0.011396, -0.012805)),
    (3.587895, (-0.05317, 0.104419, 0.027454), (0.025853, 0.019552, 0.028323, 0.007796, -0.001332, 0.008641)),
    (1.225946, (-0.011953, 0.041065, -0.038437), (0.035549, 0.029474, 0.008627, -0.002117, -0.004037, 0.000229)),
    (1.666555, (0.060149, -0.014117, -0.010517), (0.001964, 0.004354, 0.005433, 0.000109, -0.001158, 0.000341)),
    (0.735522, (0.010517, -0.004252, 0.061597), (0.012516, 0.010027, 0.004815, -0.000428, -0.001196, -0.000741)),
)
#: Capsules of the links: two ends and the radius, metres.
_SHAPES = (
    ((0, 0, -0.27, 0, 0, -0.1, 0.062), (0, -0.05, 0, 0, 0.05, 0, 0.062), (0, 0, -0.1, 0, 0, 0, 0.058)),
    ((0, 0, -0.05, 0, 0, 0.05, 0.06), (0, 0, 0, 0, -0.14, 0, 0.058)),
    ((0, 0, -0.14, 0, 0, -0.08, 0.06), (0, 0, -0.08, 0.0825, 0, 0, 0.052), (0.0825, -0.05, 0, 0.0825, 0.05, 0, 0.054)),
    ((0, 0, -0.05, 0, 0, 0.05, 0.054), (0, 0, 0, -0.0825, 0.09, 0, 0.052), (-0.0825, 0.09, 0, -0.0825, 0.14, 0, 0.058)),
    ((0, 0, -0.26, 0, 0, -0.2, 0.058), (0, 0.03, -0.2, 0, 0.07, -0.05, 0.042), (0, 0.01, -0.02, 0, 0.06, 0, 0.05)),
    ((0, 0, -0.05, 0, 0, 0.02, 0.048), (0, 0, 0, 0.088, -0.02, 0, 0.045)),
    ((0, 0, -0.03, 0, 0, 0.06, 0.045),),
)


@numba.njit(cache=True)
def forward(q: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where the hand is.

    Args:
        q: Joint angles [7], radians.

    Returns:
        Position [3] of the point between the finger tips, metres, rotation [3, 3] of the hand, both in the base's
        frame, and the geometric Jacobian [6, 7] of that point (velocity, then angular velocity).
    """
    position = np.zeros(3)
    rotation = np.eye(3)
    places, axes = np.empty((7, 3)), np.empty((7, 3))
    for i in range(7):
        position = position + rotation[:, 0] * _A[i]
        turned = rotation.copy()
        turned[:, 1] = rotation[:, 1] * _COS[i] + rotation[:, 2] * _SIN[i]
        turned[:, 2] = -rotation[:, 1] * _SIN[i] + rotation[:, 2] * _COS[i]
        position = position + turned[:, 2] * _D[i]
        c, s = np.cos(q[i]), np.sin(q[i])
        rotation = turned.copy()
        rotation[:, 0] = turned[:, 0] * c + turned[:, 1] * s
        rotation[:, 1] = -turned[:, 0] * s + turned[:, 1] * c
        places[i], axes[i] = position, rotation[:, 2]
    position = position + rotation[:, 2] * (FLANGE + TCP)
    hand = rotation.copy()
    hand[:, 0] = (rotation[:, 0] - rotation[:, 1]) * _HALF
    hand[:, 1] = (rotation[:, 0] + rotation[:, 1]) * _HALF
    jacobian = np.empty((6, 7))
    for i in range(7):
        arm = position - places[i]
        a = axes[i]
        jacobian[0, i] = a[1] * arm[2] - a[2] * arm[1]
        jacobian[1, i] = a[2] * arm[0] - a[0] * arm[2]
        jacobian[2, i] = a[0] * arm[1] - a[1] * arm[0]
        jacobian[3:, i] = a
    return position, hand, jacobian


@numba.njit(cache=True)
def rotation_vector(r: np.ndarray) -> np.ndarray:
    """The rotation vector [3] (axis times angle within 0..pi, radians) of a rotation matrix [3, 3]."""
    v = np.array([r[2, 1] - r[1, 2], r[0, 2] - r[2, 0], r[1, 0] - r[0, 1]])
    sine = 0.5 * np.sqrt(v[0] * v[0] + v[1] * v[1] + v[2] * v[2])
    cosine = 0.5 * (r[0, 0] + r[1, 1] + r[2, 2] - 1.0)
    angle = np.arctan2(sine, cosine)
    if sine > 1e-6:
        return v * (0.5 * angle / sine)
    if cosine > 0.0:
        return 0.5 * v
    # Half a turn: the axis is the largest column of (R + 1) / 2.
    i = 0
    for j in range(1, 3):
        if r[j, j] > r[i, i]:
            i = j
    axis = r[:, i].copy()
    axis[i] += 1.0
    return axis * (angle / np.sqrt((axis * axis).sum()))


@numba.njit(cache=True)
def rotation_matrix(v: np.ndarray) -> np.ndarray:
    """The rotation matrix [3, 3] of a rotation vector [3], radians (Rodrigues' formula)."""
    angle = np.sqrt((v * v).sum())
    a = 1.0 - angle * angle / 6.0 if angle < 1e-4 else np.sin(angle) / angle
    b = 0.5 - angle * angle / 24.0 if angle < 1e-4 else (1.0 - np.cos(angle)) / (angle * angle)
    x, y, z = v[0], v[1], v[2]
    k = np.array([[0.0, -z, y], [z, 0.0, -x], [-y, x, 0.0]])
    return np.eye(3) + a * k + b * (k @ k)


@numba.njit(cache=True)
def inverse(
    q: np.ndarray,
    position: np.ndarray,
    rotation: np.ndarray,
    rest: np.ndarray,
    iterations: int,
    damping: float,
    pull: float,
) -> tuple[np.ndarray, float, float]:
    """Joint angles at which the hand is as wanted, by damped least squares within the joint limits.

    Each iteration steps by ``J^T (J J^T + damping^2)^-1 e``, with a pull towards ``rest`` in the null space of J
    (Wampler, "Manipulator Inverse Kinematic Solutions Based on Vector Formulations and Damped Least-Squares Methods",
    IEEE Trans. SMC 16, 1986), and is cut to the limits.

    Args:
        q: Where to begin [7].
        position: Wanted place of the point between the finger tips [3], metres, in the base's frame.
        rotation: Wanted rotation of the hand [3, 3].
        rest: Joint angles to stay near to [7].
        iterations: At most so many.
        damping: Of the least squares; a rotation by one radian counts as one metre.
        pull: Share of the way to ``rest`` that the null space takes in an iteration.

    Returns:
        Joint angles [7], and the errors that remain: metres, radians.
    """
    q = q.copy()
    far, turned = np.inf, np.inf
    for iteration in range(iterations + 1):
        at, hand, jacobian = forward(q)
        error = np.empty(6)
        error[:3] = position - at
        error[3:] = rotation_vector(rotation @ hand.T)
        far, turned = np.sqrt((error[:3] ** 2).sum()), np.sqrt((error[3:] ** 2).sum())
        if iteration == iterations or (far < 1e-5 and turned < 1e-5):
            break
        gram = jacobian @ jacobian.T
        for i in range(6):
            gram[i, i] += damping * damping
        towards = pull * (rest - q)
        step = jacobian.T @ np.linalg.solve(gram, error - jacobian @ towards) + towards
        q = np.minimum(np.maximum(q + step, LOWER), UPPER)
    return q, far, turned


# Kernels stand where their constants are: Numba keeps the machine code of a file until that file changes.


@numba.njit(cache=True)
def arm_target(q: np.ndarray, change: np.ndarray, seconds: float) -> np.ndarray:
    """Joint angles [7] at which the hand is moved in its own frame.

    Where that asks a joint for more than its largest speed, as near to a singular pose, all joints go the same share of
    the way.

    Args:
        q: Joint angles of the moment [7], radians.
        change: Translation of the point between the finger tips [3], metres, and rotation vector [3], radians.
        seconds: Time that there is for it.
    """
    place, hand, _ = forward(q)
    wanted, _, _ = inverse(q, place + hand @ change[:3], hand @ rotation_matrix(change[3:]), READY, 4, 0.02, 0.02)
    return q + (wanted - q) / max(1.0, (np.abs(wanted - q) / SPEED).max() / seconds)


@numba.njit(cache=True)
def _from_down(hand: np.ndarray) -> np.ndarray:
    """The rotation vector [3] of a hand [3, 3] from pointing straight down."""
    rotation = hand.copy()
    rotation[1:] *= -1.0  # DOWN @ hand
    return rotation_vector(rotation)


@numba.njit(cache=True)
def hand_target(place: np.ndarray, hand: np.ndarray, change: np.ndarray) -> np.ndarray:
    """What the six servos of the hand alone are to reach when it is moved in its own frame, cut to their limits.

    Args:
        place: Of the hand's frame [3], metres.
        hand: Its rotation [3, 3].
        change: Translation of the point between the finger tips [3], metres, and rotation vector [3], radians.

    Returns:
        The place between the finger tips [3], metres, and the rotation vector from pointing straight down [3].
    """
    target = np.empty(6)
    turn = rotation_matrix(change[3:])
    moved = np.zeros((3, 3))
    for i in range(3):
        x = place[i] + hand[i, 2] * TCP
        for j in range(3):
            x += hand[i, j] * change[j]
            for k in range(3):
                moved[i, j] += hand[i, k] * turn[k, j]
        target[i] = min(max(x, HAND_LOW[i]), HAND_HIGH[i])
    turned = _from_down(moved)
    length = np.sqrt((turned * turned).sum())
    target[3:] = turned * min(1.0, HAND_TURNED / max(length, 1e-9))
    return target


@numba.njit(cache=True)
def write_poses(place: np.ndarray, hand: np.ndarray, head: np.ndarray, tool: np.ndarray, out: np.ndarray) -> None:
    """Writes what the state says of hand and tool.

    Args:
        place: Of the hand's frame [3], metres.
        hand: Its rotation [3, 3].
        head: Where the tool's working end is [3], metres.
        tool: The tool's rotation [3, 3].
        out: The state [27 or more]. Entries 0 to 2 become the point between the finger tips, 3 to 5 the hand's rotation
            vector from pointing straight down, 21 to 23 ``head``, and 24 to 26 the tool's rotation vector.
    """
    for i in range(3):
        out[i] = place[i] + hand[i, 2] * TCP
        out[21 + i] = head[i]
    out[3:6] = _from_down(hand)
    out[24:27] = rotation_vector(tool)


def _numbers(*values: float) -> str:
    return " ".join(f"{value:.9g}" for value in values)


def arm_xml(hand: str) -> str:
    """MJCF of the arm, its base at the origin of its parent.

    Collisions: the links with bit 2 (the table and what stands on it), not with one another.

    Args:
        hand: MJCF of what is in the hand's body.
    """
    frames = (
        'pos="0 0 0.333"',
        'quat="1 -1 0 0"',
        'pos="0 -0.316 0" quat="1 1 0 0"',
        'pos="0.0825 0 0" quat="1 1 0 0"',
        'pos="-0.0825 0.384 0" quat="1 -1 0 0"',
        'quat="1 1 0 0"',
        'pos="0.088 0 0" quat="1 1 0 0"',
    )
    inner = f'<body name="hand" pos="0 0 {FLANGE}" quat="0.9238795325 0 0 -0.3826834324" gravcomp="1">{hand}</body>'
    for i in reversed(range(7)):
        mass, centre, inertia = _INERTIALS[i]
        capsules = "".join(
            f'<geom class="arm" type="capsule" fromto="{_numbers(*shape[:6])}" size="{shape[6]}"/>'
            for shape in _SHAPES[i]
        )
        inner = (
            f'<body name="link{i + 1}" {frames[i]} gravcomp="1">'
            f'<inertial mass="{mass}" pos="{_numbers(*centre)}" fullinertia="{_numbers(*inertia)}"/>'
            f'<joint name="joint{i + 1}" axis="0 0 1" range="{_numbers(LOWER[i], UPPER[i])}" '
            f'armature="{ARMATURE}" damping="{FRICTION}"/>{capsules}{inner}</body>'
        )
    return (
        '<body name="link0"><inertial mass="0.629769" pos="-0.041018 -0.00014 0.049974" '
        'diaginertia="0.00315 0.00388 0.004285"/>'
        '<geom class="arm" type="cylinder" fromto="0 0 0 0 0 0.06" size="0.085"/>'
        '<geom class="arm" type="capsule" fromto="-0.06 0 0.06 0 0 0.06" size="0.055"/>'
        f"{inner}</body>"
    )


def actuators_xml() -> str:
    """MJCF of the joints' position servos."""
    return "".join(
        f'<position name="servo{i + 1}" joint="joint{i + 1}" kp="{STIFFNESS[i]}" kv="{DAMPING[i]}" '
        f'forcerange="{-TORQUE[i]} {TORQUE[i]}" ctrlrange="{_numbers(LOWER[i], UPPER[i])}"/>'
        for i in range(7)
    )
