"""What can be observed besides the state: keypoints, point clouds, pictures with depth, forces and torques."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numba
import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.render import choose_gl
from fleetgym.core.seeding import generator
from fleetgym.envs.fleet_tools.instances import UNSEEN
from fleetgym.envs.fleet_tools.simulation import Simulation
from fleetgym.envs.rendering import Camera

choose_gl()  # before MuJoCo is imported

import mujoco  # noqa: E402

#: Everything that can be observed; the cameras are those of the scene.
KINDS = ("state", "keypoints", "points", "wrist", "overhead", "wrench", "torque")
VIEWS = ("wrist", "overhead")
SOURCES = ("mesh", "depth")
#: Points of a cloud: so many of the tool, then so many of the object.
POINTS = 512
#: Control steps that the history of forces and torques goes back.
HISTORY = 32
#: Pixels along each side of the pictures that clouds are made of, and of how many of them at most.
CLOUD_SIZE, _MOST_PIXELS = 160, 4096
#: Points that are drawn at a time, and how near to another shape a point counts as touching it, metres.
_DRAWN, _TOUCHING = 8 * POINTS, 1e-6


def resolve_kinds(observation: str | Sequence[str]) -> tuple[str, ...]:
    """The kinds of observation of one name, or of a sequence of names.

    Raises:
        UserError: Unknown kind, none, or one that is named twice.
    """
    kinds = (observation,) if isinstance(observation, str) else tuple(observation)
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("kind of observation", kind, KINDS)
    if not kinds:
        raise UserError(f"observation={observation!r} is empty; name some of {', '.join(KINDS)}")
    if len(set(kinds)) < len(kinds):
        raise UserError(f"observation={observation!r} names a kind twice; name each once")
    return kinds


# ---- shapes ----------------------------------------------------------------------------------------------------------


def moving_bodies(model: Any) -> tuple[list[int], list[int]]:
    """The bodies of the tool, and those of the object that can move; what stands still on the table is in neither.

    Args:
        model: The ``mujoco.MjModel`` of a scene.
    """
    tool, robot = model.body("tool").id, model.body_rootid[model.body("hand").id]
    held, moved = [], []
    for body in np.flatnonzero(model.body_geomnum).tolist():
        above = body
        while above not in (0, tool):
            above = int(model.body_parentid[above])
        if above == tool:
            held.append(body)
        elif model.body_rootid[body] != robot and model.body_weldid[body] != 0:
            moved.append(body)
    return held, moved


def _rotation(quaternion: np.ndarray) -> np.ndarray:
    out = np.empty(9)
    mujoco.mju_quat2Mat(out, quaternion)
    return out.reshape(3, 3)


def _on_ball(rng: np.random.Generator, number: int) -> np.ndarray:
    points = rng.normal(size=(number, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def _tube(rng: np.random.Generator, number: int, radius: float, half: float) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi, number)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle), rng.uniform(-half, half, number)], axis=1)


def _sphere(rng: np.random.Generator, number: int, size: np.ndarray) -> np.ndarray:
    return size[0] * _on_ball(rng, number)


def _box(rng: np.random.Generator, number: int, size: np.ndarray) -> np.ndarray:
    areas = np.array([size[1] * size[2], size[0] * size[2], size[0] * size[1]])
    points = rng.uniform(-1, 1, (number, 3))
    across = rng.choice(3, number, p=areas / areas.sum())
    rows = np.arange(number)
    points[rows, across] = np.where(points[rows, across] < 0, -1.0, 1.0)
    return points * size


def _cylinder(rng: np.random.Generator, number: int, size: np.ndarray) -> np.ndarray:
    radius, half = size[:2]
    points = _tube(rng, number, radius, half)
    # The mantle has 2 half of 2 half + radius of the surface, the two ends have the rest.
    end = rng.random(number) * (2 * half + radius) > 2 * half
    points[end, :2] *= np.sqrt(rng.random(number))[end, None]
    points[end, 2] = np.where(points[end, 2] < 0, -half, half)
    return points


def _capsule(rng: np.random.Generator, number: int, size: np.ndarray) -> np.ndarray:
    radius, half = size[:2]
    points, cap = _tube(rng, number, radius, half), radius * _on_ball(rng, number)
    cap[:, 2] += np.copysign(half, cap[:, 2])
    end = rng.random(number) * (half + radius) > half
    return np.where(end[:, None], cap, points)


def _ellipsoid(rng: np.random.Generator, number: int, size: np.ndarray) -> np.ndarray:
    # A ball's points, stretched; each is kept with a chance in proportion to how much its surroundings are stretched.
    kept = np.empty((0, 3))
    while len(kept) < number:
        points = _on_ball(rng, 2 * number)
        stretch = np.linalg.norm(points / size, axis=1) * size.min()
        kept = np.concatenate([kept, points[rng.random(len(points)) < stretch]])
    return kept[:number] * size


def _ellipsoid_area(a: float, b: float, c: float) -> float:
    # Knud Thomsen's formula; its error is 1.1% at most.
    p = 1.6075
    return 4 * np.pi * (((a * b) ** p + (a * c) ** p + (b * c) ** p) / 3) ** (1 / p)


_SURFACES: dict[int, tuple[Any, Any]] = {
    int(mujoco.mjtGeom.mjGEOM_SPHERE): (lambda s: 4 * np.pi * s[0] ** 2, _sphere),
    int(mujoco.mjtGeom.mjGEOM_BOX): (lambda s: 8 * (s[0] * s[1] + s[0] * s[2] + s[1] * s[2]), _box),
    int(mujoco.mjtGeom.mjGEOM_CYLINDER): (lambda s: 2 * np.pi * s[0] * (2 * s[1] + s[0]), _cylinder),
    int(mujoco.mjtGeom.mjGEOM_CAPSULE): (lambda s: 4 * np.pi * s[0] * (s[1] + s[0]), _capsule),
    int(mujoco.mjtGeom.mjGEOM_ELLIPSOID): (lambda s: _ellipsoid_area(*s), _ellipsoid),
}


def _depth_below(kind: int, size: np.ndarray, points: np.ndarray) -> np.ndarray:
    """How far points [N, 3] in a shape's frame are below its surface, metres, or a lower bound of it; negative outside.

    For an ellipsoid the sign is exact and the amount is of the right order.
    """
    if kind == mujoco.mjtGeom.mjGEOM_SPHERE:
        return size[0] - np.linalg.norm(points, axis=1)
    if kind == mujoco.mjtGeom.mjGEOM_BOX:
        return (size - np.abs(points)).min(axis=1)
    if kind == mujoco.mjtGeom.mjGEOM_ELLIPSOID:
        return (1.0 - np.linalg.norm(points / size, axis=1)) * size.min()
    radial = np.hypot(points[:, 0], points[:, 1])
    if kind == mujoco.mjtGeom.mjGEOM_CYLINDER:
        return np.minimum(size[0] - radial, size[1] - np.abs(points[:, 2]))
    return size[0] - np.hypot(radial, np.maximum(np.abs(points[:, 2]) - size[1], 0.0))


def sample_surface(model: Any, bodies: Sequence[int], number: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Points on the surface of bodies, uniform in area; what lies inside of another shape of the same body is left out.

    Args:
        model: A ``mujoco.MjModel`` whose bodies are made of primitive shapes.
        bodies: Numbers of bodies.
        number: How many points.
        rng: Generator.

    Returns:
        For each body its points [n, 3] in its own frame, metres; together ``number``.

    Raises:
        UserError: The bodies have no shapes, or shapes that are no primitives.
    """
    geoms = [
        geom for geom in range(model.ngeom) if model.geom_bodyid[geom] in bodies and model.geom_group[geom] != UNSEEN
    ]
    if not geoms:
        raise UserError(f"the bodies {list(bodies)} have no shapes to take points from")
    for geom in geoms:
        if int(model.geom_type[geom]) not in _SURFACES:
            raise UserError(
                f"shape {geom} is no sphere, box, cylinder, capsule or ellipsoid: its surface cannot be sampled; use "
                'points_from="depth"'
            )
    areas = np.array([_SURFACES[int(model.geom_type[geom])][0](model.geom_size[geom]) for geom in geoms])
    found: dict[int, list[np.ndarray]] = {body: [] for body in bodies}
    points, owners = np.empty((0, 3)), np.empty(0, int)
    while len(points) < number:
        chosen = np.sort(rng.choice(len(geoms), _DRAWN, p=areas / areas.sum()))
        drawn, free = np.empty((_DRAWN, 3)), np.ones(_DRAWN, bool)
        for index, geom in enumerate(geoms):
            mine = chosen == index
            kind, rotation = int(model.geom_type[geom]), _rotation(model.geom_quat[geom])
            local = _SURFACES[kind][1](rng, int(mine.sum()), model.geom_size[geom])
            drawn[mine] = local @ rotation.T + model.geom_pos[geom]
        for index, geom in enumerate(geoms):
            kind, rotation = int(model.geom_type[geom]), _rotation(model.geom_quat[geom])
            below = _depth_below(kind, model.geom_size[geom], (drawn - model.geom_pos[geom]) @ rotation)
            fellows = model.geom_bodyid[geoms][chosen] == model.geom_bodyid[geom]
            # Where surfaces coincide, as on top of a nut made of three boxes, the first shape has the points.
            covered = np.where(chosen > index, below > -_TOUCHING, below > _TOUCHING)
            free &= ~(covered & fellows & (chosen != index))
        shuffled = rng.permutation(np.flatnonzero(free))
        points = np.concatenate([points, drawn[shuffled]])
        owners = np.concatenate([owners, model.geom_bodyid[geoms][chosen[shuffled]]])
    for body in bodies:
        found[body] = points[:number][owners[:number] == body]
    return [found[body] for body in bodies]


def _compiled(function: Any) -> Any:
    try:
        return numba.njit(cache=True)(function)
    except RuntimeError:  # no folder that could be written: compile anew in each process
        return numba.njit(function)


@_compiled
def farthest_points(points: np.ndarray, number: int) -> np.ndarray:
    """Which points to keep so that they cover all of them: each next one is the farthest from those before.

    Source: Y. Eldar et al., "The Farthest Point Strategy for Progressive Image Sampling", IEEE TIP 6(9), 1997. The
    first is the one farthest from the mean, so that nothing is random.

    Args:
        points: [N, 3], at least one.
        number: How many to keep; where there are fewer, they are repeated in their order.

    Returns:
        Indices [number].
    """
    count = len(points)
    mean = np.zeros(3)
    for i in range(count):
        mean += points[i] / count
    nearest = np.empty(count)
    best = 0
    for i in range(count):
        nearest[i] = ((points[i] - mean) ** 2).sum()
        if nearest[i] > nearest[best]:
            best = i
    nearest[:] = np.inf
    out = np.empty(number, np.int64)
    for k in range(number):
        if k >= count:
            out[k] = out[k - count]
            continue
        out[k] = best
        x, y, z = points[best, 0], points[best, 1], points[best, 2]
        farthest = -1.0
        following = best
        for i in range(count):
            dx, dy, dz = points[i, 0] - x, points[i, 1] - y, points[i, 2] - z
            distance = dx * dx + dy * dy + dz * dz
            if distance < nearest[i]:
                nearest[i] = distance
            if nearest[i] > farthest:
                farthest, following = nearest[i], i
        best = following
    return out


# ---- observers -------------------------------------------------------------------------------------------------------


class Observer:
    """Makes the observations of one environment.

    Args:
        kinds: What is observed; see :data:`KINDS`.
        points_from: Where clouds come from: ``"mesh"`` or ``"depth"``.
        image_size: Pixels along each side of the pictures of ``wrist`` and ``overhead``.
        state_size: Numbers of the state, with the one-hot of the task where it is appended.
        task_size: Numbers of the one-hot where it stands alone, 0 without it.

    Raises:
        UserError: An image size below 1, or an unknown source of clouds.
    """

    def __init__(
        self, kinds: tuple[str, ...], points_from: str, image_size: int, state_size: int, task_size: int
    ) -> None:
        if points_from not in SOURCES:
            raise unknown("source of points", points_from, SOURCES)
        if isinstance(image_size, bool) or not isinstance(image_size, (int, np.integer)) or image_size < 1:
            raise UserError(f"image_size={image_size!r}: pictures have a positive whole number of pixels, such as 84")
        self.kinds, self.points_from, self.image_size = kinds, points_from, int(image_size)
        self.sensors = "wrench" in kinds
        self.views = tuple(view for view in VIEWS if view in kinds)
        #: Whether it takes OpenGL.
        self.draws = bool(self.views) or ("points" in kinds and points_from == "depth")
        self._wrenches: deque[np.ndarray] = deque(maxlen=HISTORY)
        self._clouds: WeakKeyDictionary[Simulation, _Cloud] = WeakKeyDictionary()
        self._cameras: dict[int, Camera] = {}
        self._task_size = task_size
        self._spaces = self._boxes(state_size)
        #: Whether an observation is one array, and not a dict of them.
        self.plain = len(self._spaces) == 1

    def _boxes(self, state_size: int) -> dict[str, spaces.Space]:
        def box(*shape: int) -> spaces.Box:
            return spaces.Box(-np.inf, np.inf, shape, dtype=np.float64)

        boxes: dict[str, spaces.Space] = {
            "state": box(state_size),
            "keypoints": box(4, 3),
            "points": spaces.Box(-np.inf, np.inf, (4, 2 * POINTS), dtype=np.float32),
            "wrench": box(HISTORY, 6),
            "torque": box(7),
        }
        boxes = {kind: boxes[kind] for kind in self.kinds if kind in boxes}
        size = self.image_size
        for view in self.views:
            boxes[view] = spaces.Box(0, 255, (size, size, 3), dtype=np.uint8)
            boxes[f"{view}_depth"] = spaces.Box(0.0, np.inf, (size, size), dtype=np.float32)
        if self._task_size:
            boxes["task"] = spaces.Box(0.0, 1.0, (self._task_size,), dtype=np.float64)
        return boxes

    def space(self) -> spaces.Space:
        """The space of observations: a Box for one array, else a Dict."""
        return next(iter(self._spaces.values())) if self.plain else spaces.Dict(self._spaces)

    def begin(self) -> None:
        """Begins an episode: nothing has been felt yet."""
        self._wrenches.clear()

    def felt(self, sim: Simulation) -> None:
        """Notes force and torque at the end of a control step."""
        self._wrenches.append(wrench(sim))

    def observe(self, sim: Simulation, state: Any, one_hot: np.ndarray) -> Any:
        """The observation of the moment.

        Args:
            sim: The scene.
            state: A function that returns the state.
            one_hot: Of the task.

        Raises:
            UserError: Pictures are wanted and OpenGL does not work here.
        """
        seen: dict[str, np.ndarray] = {}
        if self.draws:
            place_cameras(sim)
        for kind in self.kinds:
            if kind == "state":
                seen[kind] = state()
            elif kind == "keypoints":
                seen[kind] = keypoints(sim)
            elif kind == "points":
                seen[kind] = self._points(sim)
            elif kind == "wrench":
                seen[kind] = self._history()
            elif kind == "torque":
                seen[kind] = torque(sim)
            else:
                seen[kind], seen[f"{kind}_depth"] = self._camera(sim, self.image_size, kind).rgbd(sim.data)
        if self._task_size:
            seen["task"] = one_hot.copy()
        return next(iter(seen.values())) if self.plain else seen

    def _history(self) -> np.ndarray:
        out = np.zeros((HISTORY, 6))
        if self._wrenches:
            out[-len(self._wrenches) :] = self._wrenches
        return out

    def _points(self, sim: Simulation) -> np.ndarray:
        if self.points_from == "mesh":
            if sim not in self._clouds:
                self._clouds[sim] = _Cloud(sim)
            return self._clouds[sim].points(sim)
        return seen_points(sim, self._camera(sim, CLOUD_SIZE, VIEWS[0]))

    def _camera(self, sim: Simulation, size: int, view: str) -> Camera:
        if size not in self._cameras:
            self._cameras[size] = Camera(sim.model, size, size, view)
        camera = self._cameras[size]
        camera.turn_to(sim.model)
        camera.camera = view
        return camera

    def open(self, sim: Simulation) -> None:
        """Makes the OpenGL contexts that are needed.

        Raises:
            UserError: OpenGL does not work here; the message says what to install.
        """
        if self.views:
            self._camera(sim, self.image_size, self.views[0]).open()
        if self.draws and "points" in self.kinds and self.points_from == "depth":
            self._camera(sim, CLOUD_SIZE, VIEWS[0]).open()

    def close(self) -> None:
        """Frees the OpenGL contexts; the next observation makes new ones."""
        for camera in self._cameras.values():
            camera.close()
        self._cameras = {}


class _Cloud:
    """Fixed points on the surfaces of a scene's tool and object; they depend on the two instances only."""

    def __init__(self, sim: Simulation) -> None:
        self._parts: list[tuple[int, slice, np.ndarray]] = []
        end = 0
        for bodies, made in zip(moving_bodies(sim.model), (sim.tool_instance, sim.object_instance)):
            rng = generator("fleet_tools", "points", made.kind, made.index)
            for body, points in zip(bodies, sample_surface(sim.model, bodies, POINTS, rng)):
                if len(points):
                    self._parts.append((body, slice(end, end + len(points)), np.ascontiguousarray(points.T)))
                end += len(points)
        self._cloud = np.zeros((4, 2 * POINTS), np.float32)
        self._cloud[3, POINTS:] = 1.0

    def points(self, sim: Simulation) -> np.ndarray:
        out = self._cloud.copy()
        data, hand = sim.data, sim.hand_rotation.T
        tip = sim.tip
        for body, part, points in self._parts:
            turned = hand @ data.xmat[body].reshape(3, 3) @ points
            turned += (hand @ (data.xpos[body] - tip))[:, None]
            out[:3, part] = turned
        return out


def place_cameras(sim: Simulation) -> None:
    """Puts the cameras where the bodies are: the simulation's steps leave them where they were a time step ago."""
    mujoco.mj_camlight(sim.model, sim.data)


def keypoints(sim: Simulation) -> np.ndarray:
    """The tool's ``head``, ``tail`` and ``side`` and the object's keypoint [4, 3], in the hand's frame, metres."""
    # The frame's origin is between the finger tips.
    places = np.array([sim.head, sim.tail, sim.side, sim.keypoint])
    return (places - sim.tip) @ sim.hand_rotation


def wrench(sim: Simulation) -> np.ndarray:
    """Force and torque [6] that the tool exerts on the hand where it is held, in the hand's frame, N and N m.

    They are those of the last time step.
    """
    # The sensors have it the other way round, what the hand exerts, and in the tool's frame.
    return -(sim.data.sensordata[:6].reshape(2, 3) @ sim.X_HT[1].T).ravel()


def torque(sim: Simulation) -> np.ndarray:
    """Torques [7] of the arm's motors beyond what carries its weight, N m, of the last time step; zeros without arm."""
    return sim.data.qfrc_actuator[:7].copy() if sim.arm == "panda" else np.zeros(7)


def back_projected(sim: Simulation, view: str, depth: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Where pixels of a depth picture are, [N, 3] in the world's frame, metres.

    Args:
        sim: The scene.
        view: The camera's name.
        depth: [S, S], metres.
        pixels: [N, 2], rows and columns.
    """
    index = sim.model.camera(view).id
    height, width = depth.shape
    # Pixels are square; a camera looks along -z, with y up.
    slope = 2 * np.tan(0.5 * np.deg2rad(sim.model.cam_fovy[index])) / height
    rows, columns = pixels.T
    far = depth[rows, columns].astype(np.float64)
    x, y = slope * (columns + 0.5 - 0.5 * width), slope * (0.5 * height - rows - 0.5)
    rays = np.stack([x * far, y * far, -far], axis=1)
    return rays @ sim.data.cam_xmat[index].reshape(3, 3).T + sim.data.cam_xpos[index]


def seen_points(sim: Simulation, camera: Camera) -> np.ndarray:
    """The cloud [4, 1024], float32, of what the cameras at the wrist and overhead see of tool and object.

    Args:
        sim: The scene.
        camera: Draws; it is turned to one view after the other.
    """
    out = np.zeros((4, 2 * POINTS), np.float32)
    out[3, POINTS:] = 1.0
    views = []
    for view in VIEWS:
        camera.camera = view
        views.append((view, *camera.segmented(sim.data)))
    body_of = np.append(sim.model.geom_bodyid, -1)  # geom -1 is the background
    for part, bodies in enumerate(moving_bodies(sim.model)):
        places = [
            back_projected(sim, view, depth, np.argwhere(np.isin(body_of[geoms], bodies)))
            for view, geoms, depth in views
        ]
        places = np.concatenate(places)
        if len(places):
            places = places[:: -(-len(places) // _MOST_PIXELS)]
            chosen = places[farthest_points(places, POINTS)]
            out[:3, part * POINTS : (part + 1) * POINTS] = ((chosen - sim.tip) @ sim.hand_rotation).T
    return out
