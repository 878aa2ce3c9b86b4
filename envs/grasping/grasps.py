"""Grasps of an object: antipodal pairs on its convex pieces, and the one that the hand can go to from where it is.

A grasp is found on the very pieces that collide in the simulation. A point of the surface, a ray inwards, near the
normal, and the point where it leaves the object make a pair; it holds if the line between them lies in both friction
cones (V.-D. Nguyen, "Constructing Force-Closure Grasps", IJRR 7(3), 1988). A pair gives grasps all around its line.
Those that would push the open gripper into the object are dropped; what is left is kept for the object. In a scene, the
nearest to the hand that the arm reaches without hitting table or object is the goal, as in the goal sets of GA-DDPG's
expert (L. Wang, Y. Xiang and D. Fox, "Manipulation Trajectory Optimization with Online Grasp Synthesis and Selection",
RSS 2020).
"""

from __future__ import annotations

import functools

import numba
import numpy as np

from fleetgym.core.seeding import generator
from fleetgym.envs.fleet_tools.panda import READY, TCP
from fleetgym.envs.fleet_tools.panda import inverse as inverse_kinematics
from fleetgym.envs.grasping.names import HORIZON
from fleetgym.envs.grasping.objects import Thing, hull, load
from fleetgym.envs.grasping.poses import between, inverse, pose

#: Points drawn on an object's surface, and grasps about each pair's line.
SAMPLES, ROLLS = 400, 12
#: Distances of a pair, metres, and the friction coefficient of its cones.
NARROWEST, WIDEST, FRICTION = 0.004, 0.074, 0.45
#: Spread of the rays about the normal.
SPREAD = 0.25
#: Room about the gripper, metres: to the object, and above the table.
MARGIN, ABOVE = 0.002, 0.004
#: Way of the straight approach, metres, and its steps.
STANDOFF, TAIL = 0.08, 5
#: Highest z of the approach's direction in the world: the hand comes from above, more or less.
STEEPEST = -0.3
#: Grasps that are tried in a scene, at most, in the order of their cost.
TRIES = 60
#: Pairs of an object that are kept, at most.
PAIRS = 150


def _gripper() -> np.ndarray:
    grid = [(x, side * y, z) for x in (-0.0105, 0.0, 0.0105) for y in (0.041, 0.05, 0.06) for side in (-1, 1)
            for z in np.linspace(0.06, 0.112, 6)]  # fmt: skip
    grid += [(x, y, z) for x in (-0.032, 0.0, 0.032) for y in np.linspace(-0.1, 0.1, 9) for z in (0.0, 0.035, 0.066)]
    grid += [(0.036 + x, y, 0.036) for x in (0.0, 0.01) for y in (-0.01, 0.01)]
    return np.array(grid)


#: Points [n, 3] of the open gripper and of the camera, in the hand's frame, metres.
GRIPPER = _gripper()
#: The boxes that these points fill [3, 2, 3], lowest and highest corners: two fingers and the palm.
SOLID = np.array(
    [
        [[-0.0105, 0.041, 0.06], [0.0105, 0.06, 0.112]],
        [[-0.0105, -0.06, 0.06], [0.0105, -0.041, 0.112]],
        [[-0.032, -0.1, 0.0], [0.032, 0.1, 0.066]],
    ]
)
#: Points [6, 3] whose motion measures how far apart two poses are; the fingers' tips lie on the closing axis, y.
CONTROL_POINTS = np.array(
    [[0, 0, 0], [0, 0, 0], [0, 0.053, 0.075], [0, -0.053, 0.075], [0, 0.053, 0.105], [0, -0.053, 0.105]]
)


@numba.njit(cache=True)
def depth_inside(points: np.ndarray, planes: np.ndarray, starts: np.ndarray) -> float:
    """How deep the deepest of points [n, 3] is inside of convex pieces, metres; negative: the distance that is left.

    The distance is that to the pieces' faces extended, so never more than the true one.
    """
    deepest = -np.inf
    for i in range(points.shape[0]):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        for piece in range(starts.size - 1):
            highest = -np.inf
            for k in range(starts[piece], starts[piece + 1]):
                value = planes[k, 0] * x + planes[k, 1] * y + planes[k, 2] * z + planes[k, 3]
                if value > highest:
                    highest = value
                    if -highest <= deepest:
                        break
            if -highest > deepest:
                deepest = -highest
    return deepest


@numba.njit(cache=True)
def _inside_any(points: np.ndarray, planes: np.ndarray, starts: np.ndarray, margin: float) -> bool:
    for i in range(points.shape[0]):
        x, y, z = points[i, 0], points[i, 1], points[i, 2]
        for piece in range(starts.size - 1):
            inside = True
            for k in range(starts[piece], starts[piece + 1]):
                if planes[k, 0] * x + planes[k, 1] * y + planes[k, 2] * z + planes[k, 3] > margin:
                    inside = False
                    break
            if inside:
                return True
    return False


@numba.njit(cache=True)
def _leave(
    origin: np.ndarray, direction: np.ndarray, planes: np.ndarray, starts: np.ndarray
) -> tuple[float, np.ndarray]:
    """How far a ray from the surface goes within the union of pieces, and the normal [3] where it leaves it."""
    normal = np.zeros(3)
    at = 0.0
    again = True
    while again:
        again = False
        for piece in range(starts.size - 1):
            enter, leave, face = -np.inf, np.inf, -1
            for k in range(starts[piece], starts[piece + 1]):
                n = planes[k, :3]
                rate = n[0] * direction[0] + n[1] * direction[1] + n[2] * direction[2]
                value = n[0] * origin[0] + n[1] * origin[1] + n[2] * origin[2] + planes[k, 3]
                if rate > 1e-9:
                    t = -value / rate
                    if t < leave:
                        leave, face = t, k
                elif rate < -1e-9:
                    enter = max(enter, -value / rate)
                elif value > 0:
                    leave = -np.inf
            if face >= 0 and enter <= at + 2e-4 and leave > at + 1e-6 and leave > enter:
                at = leave
                normal = planes[face, :3].copy()
                again = True
    return at, normal


@numba.njit(cache=True)
def _free_grasps(
    centres: np.ndarray,
    closing: np.ndarray,
    rolls: int,
    gripper: np.ndarray,
    planes: np.ndarray,
    starts: np.ndarray,
    margin: float,
    tcp: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Hand poses (place [n, 3], rotation [n, 3, 3]) about pairs at which the open gripper is clear of the object."""
    count = centres.shape[0] * rolls
    places, rotations = np.empty((count, 3)), np.empty((count, 3, 3))
    found = 0
    moved = np.empty_like(gripper)
    for i in range(centres.shape[0]):
        y = closing[i]
        smallest = np.argmin(np.abs(y))
        first = np.zeros(3)
        first[smallest] = 1.0
        first -= (first * y).sum() * y
        first /= np.sqrt((first * first).sum())
        second = np.cross(y, first)
        for roll in range(rolls):
            angle = 2.0 * np.pi * roll / rolls
            z = np.cos(angle) * first + np.sin(angle) * second
            rotation = np.empty((3, 3))
            rotation[:, 0] = np.cross(y, z)
            rotation[:, 1] = y
            rotation[:, 2] = z
            free = True
            for back in (0.0, 0.02, 0.04, 0.08):
                place = centres[i] - (tcp + back) * z
                for j in range(gripper.shape[0]):
                    for a in range(3):
                        moved[j, a] = (
                            place[a]
                            + rotation[a, 0] * gripper[j, 0]
                            + rotation[a, 1] * gripper[j, 1]
                            + rotation[a, 2] * gripper[j, 2]
                        )
                if _inside_any(moved, planes, starts, margin):
                    free = False
                    break
            if free:
                places[found], rotations[found] = centres[i] - tcp * z, rotation
                found += 1
    return places[:found].copy(), rotations[:found].copy()


def antipodal(thing: Thing, samples: int = SAMPLES) -> np.ndarray:
    """Hand poses [n, 4, 4], in the object's frame, that hold an object; the same for each call.

    Args:
        thing: The object.
        samples: Points drawn on its surface.
    """
    rng = generator("grasps", thing.name, samples)
    corners = np.concatenate([hull(piece)[2] for piece in thing.pieces])
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    areas = np.linalg.norm(normals, axis=1)
    chosen = rng.choice(len(corners), samples, p=areas / areas.sum())
    weights = rng.dirichlet(np.ones(3), samples)
    points = (weights[:, :, None] * corners[chosen]).sum(1)
    out = normals[chosen] / areas[chosen, None]
    directions = -out + SPREAD * rng.normal(size=(samples, 3))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    cosine = 1 / np.sqrt(1 + FRICTION**2)
    centres, closing = [], []
    for point, normal, direction in zip(points, out, directions):
        if -(normal @ direction) < cosine:
            continue
        # A point on a face between two pieces lies within the object.
        if _inside_any((point + 3e-4 * normal)[None], thing.planes, thing.starts, 0.0):
            continue
        width, leaving = _leave(point, direction, thing.planes, thing.starts)
        if NARROWEST <= width <= WIDEST and leaving @ direction >= cosine:
            centres.append(point + 0.5 * width * direction)
            closing.append(direction)
        if len(centres) == PAIRS:
            break
    if not centres:
        return np.empty((0, 4, 4))
    places, rotations = _free_grasps(
        np.array(centres), np.array(closing), ROLLS, GRIPPER, thing.planes, thing.starts, MARGIN, TCP
    )
    poses = np.tile(np.eye(4), (len(places), 1, 1))
    poses[:, :3, :3], poses[:, :3, 3] = rotations, places
    return poses


@functools.lru_cache(maxsize=256)
def grasps_of(family: str, name: str) -> np.ndarray:
    """:func:`antipodal` of an object by its name, kept."""
    poses = antipodal(load(family, name))
    poses.setflags(write=False)
    return poses


def waypoint(X_WH: np.ndarray, goal: np.ndarray, remaining: int) -> np.ndarray:
    """Where the hand shall be after the next step.

    The last :data:`TAIL` steps go straight in from the stand-off; those before go there on the shortest way.

    Args:
        X_WH: Where the hand is [4, 4].
        goal: The grasp [4, 4].
        remaining: Steps that are left, the next one included.
    """
    ahead = max(remaining - 1, 0)
    stand = goal.copy()
    stand[:3, 3] -= min(ahead, TAIL) * (STANDOFF / TAIL) * goal[:3, 2]
    if ahead < TAIL:
        return stand
    return between(X_WH, stand, 1.0 / (remaining - TAIL))


def _reachable(X_WH: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, bool]:
    rotation = np.ascontiguousarray(X_WH[:3, :3])
    tip = X_WH[:3, 3] + rotation[:, 2] * TCP
    found, far, turned = inverse_kinematics(q, tip, rotation, READY, 60, 0.02, 0.02)
    return found, far < 3e-3 and turned < 0.03


def plan(
    poses: np.ndarray, thing: Thing, X_WO: np.ndarray, X_WH: np.ndarray, q: np.ndarray, steps: int = HORIZON
) -> np.ndarray | None:
    """The grasp to go to from where the hand is.

    Args:
        poses: Grasps in the object's frame [n, 4, 4].
        thing: The object.
        X_WO: Its pose [4, 4].
        X_WH: The hand's [4, 4].
        q: Joint angles there [7].
        steps: Steps that the way is cut into.

    Returns:
        The hand's pose [4, 4] at the grasp, in the world; None if no grasp can be reached without hitting anything.
    """
    if not len(poses):
        return None
    goals = X_WO @ poses
    goals = goals[goals[:, 2, 2] < STEEPEST]
    if not len(goals):
        return None
    # The gripper above the table, at the grasp; further back it is higher, as it comes from above.
    lowest = (np.einsum("nj,kj->nk", goals[:, 2, :3], GRIPPER) + goals[:, 2, 3, None]).min(1)
    goals = goals[lowest > ABOVE]
    if not len(goals):
        return None
    # Half a turn about the approach holds as well, and puts the camera on the other side.
    goals = np.concatenate([goals, goals @ np.diag([-1.0, -1.0, 1.0, 1.0])])
    at = goals @ np.concatenate([CONTROL_POINTS, np.ones((6, 1))], 1).T
    now = X_WH @ np.concatenate([CONTROL_POINTS, np.ones((6, 1))], 1).T
    far = np.linalg.norm(at[:, :3] - now[None, :3], axis=1).mean(1)
    centre = goals[:, :3, 3] + TCP * goals[:, :3, 2]
    cost = far + np.linalg.norm(centre - X_WO[:3, 3], axis=1) + 0.1 * (1.0 + goals[:, 2, 2])
    X_OW = inverse(X_WO)
    for index in np.argsort(cost, kind="stable")[:TRIES]:
        if _clear(goals[index], thing, X_OW, X_WH, q, steps):
            return goals[index]
    return None


def _clear(goal: np.ndarray, thing: Thing, X_OW: np.ndarray, X_WH: np.ndarray, q: np.ndarray, steps: int) -> bool:
    """Whether the hand gets to a grasp: the arm reaches each way-point, and the gripper hits nothing."""
    stand = goal @ pose(np.array([0.0, 0.0, -STANDOFF]), np.eye(3))
    if not _reachable(goal, _reachable(stand, q)[0])[1]:
        return False
    at = X_WH
    for remaining in range(steps, 0, -1):
        at = waypoint(at, goal, remaining)
        q, reached = _reachable(at, q)
        if not reached:
            return False
        points = GRIPPER @ at[:3, :3].T + at[:3, 3]
        if points[:, 2].min() < ABOVE:
            return False
        margin = MARGIN if remaining <= TAIL + 1 else 0.006
        if _inside_any(points @ X_OW[:3, :3].T + X_OW[:3, 3], thing.planes, thing.starts, margin):
            return False
    # The way up.
    for rise in (0.05, 0.12):
        q, reached = _reachable(pose(goal[:3, 3] + [0.0, 0.0, rise], goal[:3, :3]), q)
        if not reached:
            return False
    return True
