"""A small software raycaster: first-person pictures of rooms, doors, boxes and a sign, without OpenGL.

The world is a set of axis-aligned rectangles (rooms and doorways) joined by portals. A ray leaves the rectangle that it
is in through one of four sides; where there is an open portal it goes on in the next rectangle, else it has found its
wall. That needs one to five steps a ray instead of one a grid cell, and coordinates need not lie on a grid.

The compiled rules of ``OfficeNav3D-v0`` and the search for ways stand at the end of this file, because numba's cache
does not notice when a compiled function or a constant in another file changes: nothing here is imported from this
project.

Axes: x to the right and z downwards on a floor plan, y up; units are metres. A heading of 0 looks along +x, pi/2 along
-z, so that a growing heading turns left.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np

HEIGHT, WIDTH = 60, 80
#: Height of the rooms and of the eye, metres.
CEILING, EYE = 2.74, 1.5
#: Lower edge of the wall above doors, metres.
LINTEL = 2.2
#: Tangent of half the vertical field of view, 60 degrees.
HALF_VIEW = math.tan(math.radians(30.0))
#: Texels along the side of a texture, and metres that it covers.
TEXELS, TILE = 64, 1.37
_MIP_SIZES = (64, 32, 16, 8, 4, 2, 1)
MIP_OFFSETS = np.cumsum([0, *(size * size for size in _MIP_SIZES[:-1])]).astype(np.int64)
#: Texels are this many times finer on the sign than its bitmap, so that area means need no interpolation.
SIGN_SCALE = 4
_MAX_HITS = 24

OFFICES = 4
LEFT, RIGHT, FORWARD, OPEN = range(4)
TURN, STRIDE = math.pi / 6, 0.7
#: Radius of the agent, and half the side of a coloured box, metres.
RADIUS, CRATE = 0.4, 0.4
#: From the blue box's middle, metres: both radii and 1.1 steps, as in Miniworld's ``near``.
NEAR = RADIUS + CRATE * math.sqrt(2.0) + 1.1 * STRIDE
#: Doors that are closer than this are opened, metres.
REACH = 1.6
#: From this difference of green on, two pixels are told apart when it is asked whether a sign can be read.
CONTRAST = 48
#: What ``way`` looks for: an office's box, a place where the sign can be read, or the sight of a box.
TO_BOX, TO_SIGN, TO_SIGHT = range(3)
#: Side of the cells of ``way``, metres, and the shapes of its tables: x, z, heading, doors; x, z, heading.
CELL = 0.15
VISITED = (125, 81, 12, 1 << (OFFICES + 1))
MEMO = (125, 81, 72)


class Scene(NamedTuple):
    """A building for the raycaster: R rectangles, P portals at most on a side, D doors, S walls, F furniture.

    Attributes:
        rects: [R, 4] x0, x1, z0, z1.
        kinds: [R] which of a look's wall materials the rectangle has.
        portals: [R, 4, P, 2] from, to, along the side (0 x0, 1 x1, 2 z0, 3 z1).
        targets: [R, 4, P] the rectangle behind; -1 for none.
        portal_doors: [R, 4, P] the door in the portal; -1 for none.
        leaves: [L, 5] rectangle, side, from, to, door: where an open door's leaf lies flat against a wall.
        walls: [S, 4] x0, z0, x1, z1 of what cannot be walked through.
        doors: [D, 4] the same of the doors.
        furniture: [F, 8] x, z, half extents along x and z, y from, y to, rectangle, material.
        sign: [5] rectangle (on its x1 side), z from, z to, y from, y to.
    """

    rects: np.ndarray
    kinds: np.ndarray
    portals: np.ndarray
    targets: np.ndarray
    portal_doors: np.ndarray
    leaves: np.ndarray
    walls: np.ndarray
    doors: np.ndarray
    furniture: np.ndarray
    sign: np.ndarray


def build_scene(
    rects: list[tuple],
    links: list[tuple[int, int, int, float, float, int]],
    leaves: list[tuple],
    furniture: list[tuple],
    sign: tuple,
) -> Scene:
    """Puts a scene together; walls are what the links leave of the rectangles' sides.

    Args:
        rects: (x0, x1, z0, z1, kind).
        links: (rectangle a, rectangle b, side of a, from, to, door or -1): a portal, made in both directions.
        leaves: See ``Scene``.
        furniture: See ``Scene``.
        sign: See ``Scene``.
    """
    count = len(rects)
    sides: dict[tuple[int, int], list] = {(rect, side): [] for rect in range(count) for side in range(4)}
    doors: dict[int, tuple] = {}
    for a, b, side, low, high, door in links:
        sides[a, side].append((low, high, b, door))
        sides[b, side ^ 1].append((low, high, a, door))
        if door >= 0:
            at = rects[a][side]
            doors[door] = (at, low, at, high) if side < 2 else (low, at, high, at)
    most = max(len(found) for found in sides.values())
    portals = np.zeros((count, 4, most, 2))
    targets = np.full((count, 4, most), -1, np.int64)
    portal_doors = np.full((count, 4, most), -1, np.int64)
    walls = []
    for (rect, side), found in sides.items():
        x0, x1, z0, z1, _ = rects[rect]
        at, start, end = ((x0, x1)[side], z0, z1) if side < 2 else ((z0, z1)[side - 2], x0, x1)
        for index, (low, high, target, door) in enumerate(sorted(found)):
            portals[rect, side, index] = low, high
            targets[rect, side, index], portal_doors[rect, side, index] = target, door
            if low > start:
                walls.append((at, start, at, low) if side < 2 else (start, at, low, at))
            start = high
        if end > start:
            walls.append((at, start, at, end) if side < 2 else (start, at, end, at))
    return Scene(
        rects=np.array([rect[:4] for rect in rects], np.float64),
        kinds=np.array([rect[4] for rect in rects], np.int64),
        portals=portals,
        targets=targets,
        portal_doors=portal_doors,
        leaves=np.array(leaves, np.float64),
        walls=np.array(walls, np.float64),
        doors=np.array([doors[index] for index in range(len(doors))], np.float64),
        furniture=np.array(furniture, np.float64),
        sign=np.array(sign, np.float64),
    )


# ---------------------------------------------------------------------------------------------------- textures


def _noise(seed: int, smooth: int = 0) -> np.ndarray:
    """Noise [64, 64] of mean 0 and deviation 1 that repeats without a seam."""
    field = np.random.RandomState(seed).standard_normal((TEXELS, TEXELS))
    for _ in range(smooth):
        field = (field + np.roll(field, 1, 0) + np.roll(field, 1, 1) + np.roll(field, (1, 1), (0, 1))) / 4
    return (field - field.mean()) / field.std()


def _tinted(grey: np.ndarray, tint: tuple[float, float, float]) -> np.ndarray:
    return grey[..., None] * np.array(tint, np.float64)


def plaster(tint: tuple[float, float, float]) -> np.ndarray:
    """Rough plaster, [64, 64, 3], 0 to 255."""
    return _tinted(0.9 + 0.05 * _noise(1, 2) + 0.03 * _noise(2, 8), tint)


def brick(tint: tuple[float, float, float]) -> np.ndarray:
    """Eight courses of bricks with light mortar, [64, 64, 3], 0 to 255."""
    row, column = np.indices((TEXELS, TEXELS))
    course = row // 8
    shifted = (column + 8 * (course % 2)) % TEXELS
    tone = 0.82 + 0.2 * np.random.RandomState(3).random_sample((8, 4))[course, shifted // 16]
    picture = _tinted(tone + 0.04 * _noise(4, 1), tint)
    mortar = (row % 8 == 0) | (shifted % 16 == 0)
    picture[mortar] = (np.array([178.0, 172.0, 162.0]) * (0.95 + 0.04 * _noise(5, 1))[..., None])[mortar]
    return picture


def planks(tint: tuple[float, float, float], boards: int = 4) -> np.ndarray:
    """Boards with a grain along the columns, [64, 64, 3], 0 to 255."""
    row, column = np.indices((TEXELS, TEXELS))
    size = TEXELS // boards
    board = column // size
    tone = 0.82 + 0.22 * np.random.RandomState(6).random_sample(boards)[board]
    grain = _noise(7)
    for _ in range(5):
        grain = (grain + np.roll(grain, 1, 0) + np.roll(grain, 2, 0)) / 3
    tone = tone + 0.045 * grain / grain.std()
    end = (row + 29 * board) % TEXELS == 0
    return _tinted(np.where((column % size == 0) | end, 0.55, tone), tint)


def floor_boards(tint: tuple[float, float, float]) -> np.ndarray:
    """``planks`` half as wide, [64, 64, 3], 0 to 255."""
    return planks(tint, 8)


def stripes(tint: tuple[float, float, float]) -> np.ndarray:
    """Striped wallpaper, [64, 64, 3], 0 to 255."""
    column = np.indices((TEXELS, TEXELS))[1]
    return _tinted(np.where(column % 16 < 8, 0.98, 0.74) + 0.02 * _noise(8, 1), tint)


def ceiling_tiles(tint: tuple[float, float, float]) -> np.ndarray:
    """Ceiling tiles with dark joints, [64, 64, 3], 0 to 255."""
    row, column = np.indices((TEXELS, TEXELS))
    tone = 0.95 + 0.025 * _noise(9)
    return _tinted(np.where((row % 32 == 0) | (column % 32 == 0), 0.72, tone), tint)


def carpet(tint: tuple[float, float, float]) -> np.ndarray:
    """Carpet, [64, 64, 3], 0 to 255."""
    return _tinted(0.88 + 0.07 * _noise(10) + 0.03 * _noise(11, 6), tint)


def door_leaf(tint: tuple[float, float, float]) -> np.ndarray:
    """A leaf of a double door, hinge on the left: four panels and a handle, [64, 64, 3], 0 to 255."""
    picture = planks(tint, 2) * 0.2 + np.array(tint) * 0.75
    for top, bottom in ((5, 27), (34, 59)):
        for left in (6, 34):
            right = left + 22
            picture[top:bottom, left:right] *= 0.86
            picture[top : top + 2, left:right] *= 0.65
            picture[top:bottom, left : left + 2] *= 0.65
            picture[bottom - 2 : bottom, left:right] *= 1.25
    picture[:, :2] *= 0.5
    picture[:, -2:] *= 0.5
    picture[:2] *= 0.6
    picture[30:33, 54:61] = (228, 214, 140)
    return picture


def painted(tint: tuple[float, float, float]) -> np.ndarray:
    """A crate's face in one colour with darker edges, [64, 64, 3], 0 to 255."""
    row, column = np.indices((TEXELS, TEXELS))
    edge = np.minimum(np.minimum(row, column), np.minimum(TEXELS - 1 - row, TEXELS - 1 - column))
    return _tinted(np.where(edge < 4, 0.7, 1.0) + 0.015 * _noise(12), tint)


def pyramid(pictures: list[np.ndarray]) -> np.ndarray:
    """Textures with all their halvings: [number, 5461], uint32; level l begins at ``MIP_OFFSETS[l]``.

    Columns of the picture lie one after the other, because walls are drawn by columns. A texel has red in its lowest
    byte, then green, then blue.
    """
    result = np.zeros((len(pictures), MIP_OFFSETS[-1] + 1), np.uint32)
    for index, picture in enumerate(pictures):
        level = np.clip(picture, 0, 255).astype(np.float64)
        for size, offset in zip(_MIP_SIZES, MIP_OFFSETS):
            texels = np.rint(level).astype(np.uint32).transpose(1, 0, 2).reshape(-1, 3)
            result[index, offset : offset + size * size] = texels @ np.array([1, 1 << 8, 1 << 16], np.uint32)
            if size > 1:
                level = level.reshape(size // 2, 2, size // 2, 2, 3).mean((1, 3))
    return result


def sign_tables(bitmaps: np.ndarray) -> np.ndarray:
    """Sums over all pixels above and left of each, for exact means over any part of a sign.

    Args:
        bitmaps: [number, h, w], uint8.

    Returns:
        [number, SIGN_SCALE * h + 1, SIGN_SCALE * w + 1], int32.
    """
    fine = np.repeat(np.repeat(bitmaps, SIGN_SCALE, 1), SIGN_SCALE, 2).astype(np.int32)
    table = np.zeros((fine.shape[0], fine.shape[1] + 1, fine.shape[2] + 1), np.int32)
    table[:, 1:, 1:] = fine.cumsum(1, dtype=np.int32).cumsum(2, dtype=np.int32)
    return table


# ---------------------------------------------------------------------------------------------------- geometry


@numba.njit(cache=True, inline="always")
def _clamp(value, low, high):
    return low if value < low else (high if value > high else value)


@numba.njit(cache=True)
def segment_distance2(x, z, segment):
    """Squared distance of a point from an axis-aligned segment (x0, z0, x1, z1)."""
    dx = x - _clamp(x, segment[0], segment[2])
    dz = z - _clamp(z, segment[1], segment[3])
    return dx * dx + dz * dz


@numba.njit(cache=True)
def blocked(scene, x, z, radius, open_doors):
    """Whether a disc touches a wall, a closed door or a piece of furniture; ``open_doors`` has a bit a door."""
    limit = (radius - 1e-9) ** 2  # standing exactly that far away is no touch, however it was rounded
    for index in range(scene.walls.shape[0]):
        if segment_distance2(x, z, scene.walls[index]) < limit:
            return True
    for index in range(scene.doors.shape[0]):
        if not (open_doors >> index) & 1 and segment_distance2(x, z, scene.doors[index]) < limit:
            return True
    for index in range(scene.furniture.shape[0]):
        piece = scene.furniture[index]
        dx = x - _clamp(x, piece[0] - piece[2], piece[0] + piece[2])
        dz = z - _clamp(z, piece[1] - piece[3], piece[1] + piece[3])
        if dx * dx + dz * dz < limit:
            return True
    return False


@numba.njit(cache=True)
def rect_of(scene, x, z):
    """The rectangle that a point lies in; -1 outside of all."""
    for index in range(scene.rects.shape[0]):
        rect = scene.rects[index]
        if rect[0] <= x <= rect[1] and rect[2] <= z <= rect[3]:
            return index
    return -1


# ---------------------------------------------------------------------------------------------------- pictures


@numba.njit(cache=True, inline="always")
def _level(texels_per_pixel):
    level = 0
    while texels_per_pixel > 1.5 and level < 6:
        texels_per_pixel *= 0.5
        level += 1
    return level


@numba.njit(cache=True, inline="always")
def _put(frame, row, column, texel, light):
    """Writes a texel times light / 256; red and blue are multiplied at once."""
    pair = ((texel & np.uint32(0xFF00FF)) * light) >> 8
    frame[row, column, 0] = pair & 255
    frame[row, column, 1] = (((texel >> 8) & 255) * light) >> 8
    frame[row, column, 2] = (pair >> 16) & 255


@numba.njit(cache=True, inline="always")
def _fade(depth):
    return _clamp(1.06 - 0.03 * depth, 0.5, 1.0)


@numba.njit(cache=True)
def _slice(frame, column, depth, low, high, texture, u, shade, rows_per_texture):
    """Draws a column's piece of something upright: heights low to high at a depth, texture column u in [0, 1)."""
    height = frame.shape[0]
    pitch = HALF_VIEW / (0.5 * height)
    scale = 1.0 / (depth * pitch)
    top, bottom = (height - 1) * 0.5 - (high - EYE) * scale, (height - 1) * 0.5 - (low - EYE) * scale
    first, last = max(0, int(math.ceil(top))), min(height - 1, int(math.floor(bottom)))
    level = _level(depth * pitch * TEXELS / rows_per_texture)
    size = TEXELS >> level
    offset = MIP_OFFSETS[level] + min(size - 1, int(u * size)) * size
    light = int(256.0 * shade * _fade(depth))
    step = depth * pitch / rows_per_texture * size
    v = (high - EYE) / rows_per_texture * size - ((height - 1) * 0.5 - first) * step
    for row in range(first, last + 1):
        texel = offset + (int(v) & (size - 1))
        _put(frame, row, column, texture[texel], light)
        v += step
    return first, last


@numba.njit(cache=True, inline="always")
def _plane(frame, column, start, end, texture, x, z, ray_x, ray_z, row_depth, row_level, row_light):
    """Draws a column's piece of the floor or the ceiling."""
    for row in range(start, end):
        away, level, light = row_depth[row], row_level[row], row_light[row]
        size = TEXELS >> level
        scale = size / TILE
        # 64 tiles are added because the eye may see beyond the origin, and int() rounds towards zero.
        u, v = int((x + away * ray_x + 64 * TILE) * scale), int((z + away * ray_z + 64 * TILE) * scale)
        texel = MIP_OFFSETS[level] + (u & (size - 1)) * size + (v & (size - 1))
        _put(frame, row, column, texture[texel], light)


@numba.njit(cache=True)
def draw(frame, scene, x, z, heading, open_doors, wall_materials, floor, ceiling, door, crates, textures, sign):
    """Draws what is seen from (x, EYE, z).

    Args:
        frame: [height, width, 3], uint8; written.
        scene: The building.
        x: Eye, metres.
        z: Eye, metres.
        heading: Radians; 0 along +x, growing to the left.
        open_doors: A bit a door.
        wall_materials: [kinds] texture of each kind of rectangle.
        floor: Texture of the floor.
        ceiling: Texture of the ceiling.
        door: Texture of the doors.
        crates: [C, 8] x, z, half extent, cosine and sine of its turn, height, rectangle, texture.
        textures: Of ``pyramid``.
        sign: [h, w] of ``sign_tables``.
    """
    height, width = frame.shape[0], frame.shape[1]
    pitch = HALF_VIEW / (0.5 * height)
    forward_x, forward_z = math.cos(heading), -math.sin(heading)
    right_x, right_z = -forward_z, forward_x
    here = rect_of(scene, x, z)
    hit_depth, hit_far = np.empty(_MAX_HITS), np.empty(_MAX_HITS)
    hit_low, hit_high = np.empty(_MAX_HITS), np.empty(_MAX_HITS)
    hit_u, hit_shade, hit_tile = np.empty(_MAX_HITS), np.empty(_MAX_HITS), np.empty(_MAX_HITS)
    hit_texture = np.empty(_MAX_HITS, np.int64)
    middle = (height - 1) * 0.5
    floor_texture, ceiling_texture = textures[floor], textures[ceiling]
    # All pixels of a row see floor or ceiling at one depth.
    row_depth, row_level, row_light = np.empty(height), np.empty(height, np.int64), np.empty(height, np.int64)
    for row in range(height):
        away = (CEILING - EYE) / ((middle - row) * pitch) if row < middle else EYE / max(1e-9, (row - middle) * pitch)
        row_depth[row], row_level[row] = away, _level(away * pitch * TEXELS / TILE)
        row_light[row] = int(256.0 * _fade(away))
    for column in range(width):
        across = (column - (width - 1) * 0.5) * pitch
        ray_x, ray_z = forward_x + right_x * across, forward_z + right_z * across
        slope_x = 1.0 / ray_x if abs(ray_x) > 1e-12 else 1e12
        slope_z = 1.0 / ray_z if abs(ray_z) > 1e-12 else 1e12
        rect, hits = here, 0
        depth, side, along = 0.05, 0, 0.0
        low_end, high_end, door_here = 0.0, 0.0, -1
        for _ in range(16):
            box = scene.rects[rect]
            depth_x = ((box[1] if ray_x > 0 else box[0]) - x) * slope_x
            depth_z = ((box[3] if ray_z > 0 else box[2]) - z) * slope_z
            if depth_x < depth_z:
                depth, side = depth_x, (1 if ray_x > 0 else 0)
                along = z + depth * ray_z
            else:
                depth, side = depth_z, (3 if ray_z > 0 else 2)
                along = x + depth * ray_x
            # Upright things inside of this rectangle: furniture, then crates.
            for index in range(scene.furniture.shape[0] + crates.shape[0]):
                if index < scene.furniture.shape[0]:
                    piece = scene.furniture[index]
                    if int(piece[6]) != rect:
                        continue
                    local_x, local_z, dir_x, dir_z = x - piece[0], z - piece[1], ray_x, ray_z
                    half_x, half_z, low, high, texture = piece[2], piece[3], piece[4], piece[5], int(piece[7])
                else:
                    crate = crates[index - scene.furniture.shape[0]]
                    if int(crate[6]) != rect:
                        continue
                    off_x, off_z = x - crate[0], z - crate[1]
                    local_x, local_z = off_x * crate[3] + off_z * crate[4], off_z * crate[3] - off_x * crate[4]
                    dir_x, dir_z = ray_x * crate[3] + ray_z * crate[4], ray_z * crate[3] - ray_x * crate[4]
                    half_x, half_z, low, high, texture = crate[2], crate[2], 0.0, crate[5], int(crate[7])
                inverse_x = 1.0 / dir_x if abs(dir_x) > 1e-12 else 1e12
                inverse_z = 1.0 / dir_z if abs(dir_z) > 1e-12 else 1e12
                a, b = (-half_x - local_x) * inverse_x, (half_x - local_x) * inverse_x
                near_x, far_x = min(a, b), max(a, b)
                a, b = (-half_z - local_z) * inverse_z, (half_z - local_z) * inverse_z
                near_z, far_z = min(a, b), max(a, b)
                near, far = max(near_x, near_z), min(far_x, far_z)
                if near < far and near > 0.02 and hits < _MAX_HITS:
                    if near_x > near_z:
                        face_u, face_shade = (local_z + near * dir_z + half_z) / (2 * half_z), 1.0
                    else:
                        face_u, face_shade = (local_x + near * dir_x + half_x) / (2 * half_x), 0.8
                    hit_depth[hits], hit_far[hits], hit_low[hits], hit_high[hits] = near, far, low, high
                    hit_u[hits], hit_shade[hits], hit_texture[hits] = face_u, face_shade, texture
                    hit_tile[hits] = high - low
                    hits += 1
            target, door_here = -1, -1
            for index in range(scene.targets.shape[2]):
                if scene.targets[rect, side, index] < 0:
                    break
                low_end, high_end = scene.portals[rect, side, index, 0], scene.portals[rect, side, index, 1]
                if low_end < along < high_end:
                    target, door_here = scene.targets[rect, side, index], scene.portal_doors[rect, side, index]
                    break
            if target < 0:
                break
            if door_here >= 0 or scene.kinds[rect] != scene.kinds[target]:
                if hits < _MAX_HITS:  # the wall above the opening
                    hit_depth[hits], hit_far[hits], hit_low[hits], hit_high[hits] = depth, -1.0, LINTEL, CEILING
                    hit_u[hits], hit_shade[hits] = along / TILE - math.floor(along / TILE), 1.0 if side < 2 else 0.85
                    hit_texture[hits], hit_tile[hits] = wall_materials[scene.kinds[rect]], TILE
                    hits += 1
                if door_here >= 0 and not (open_doors >> door_here) & 1:
                    break
            rect, door_here = target, -1
        depth = max(depth, 0.05)
        # The wall, the closed door or the leaf of an open one that the ray ends at.
        shade = 1.0 if side < 2 else 0.85
        if door_here >= 0:
            part = 2.0 * (along - low_end) / (high_end - low_end)
            u = part if part < 1.0 else 2.0 - part
            first, last = _slice(frame, column, depth, 0.0, CEILING, textures[door], min(u, 0.999), shade, LINTEL)
        else:
            material, tile = wall_materials[scene.kinds[rect]], TILE
            u = along / TILE - math.floor(along / TILE)
            first, last = _slice(frame, column, depth, 0.0, CEILING, textures[material], u, shade, tile)
            for index in range(scene.leaves.shape[0]):
                leaf = scene.leaves[index]
                if (
                    int(leaf[0]) == rect
                    and int(leaf[1]) == side
                    and min(leaf[2], leaf[3]) < along < max(leaf[2], leaf[3])
                    and (open_doors >> int(leaf[4])) & 1
                ):
                    u = min(0.999, (along - leaf[2]) / (leaf[3] - leaf[2]))
                    _slice(frame, column, depth, 0.0, LINTEL, textures[door], u, shade, LINTEL)
            if int(scene.sign[0]) == rect and side == 1 and scene.sign[1] < along < scene.sign[2]:
                _draw_sign(frame, column, scene, x, z, forward_x, forward_z, across, depth, sign)
        # Ceiling above and floor below.
        _plane(frame, column, 0, first, ceiling_texture, x, z, ray_x, ray_z, row_depth, row_level, row_light)
        _plane(frame, column, last + 1, height, floor_texture, x, z, ray_x, ray_z, row_depth, row_level, row_light)
        # What stands before the wall, the farthest first.
        for _ in range(hits):
            farthest = 0
            for index in range(1, hits):
                if hit_depth[index] > hit_depth[farthest]:
                    farthest = index
            near, far, high = hit_depth[farthest], hit_far[farthest], hit_high[farthest]
            texture = textures[hit_texture[farthest]]
            if far > 0.0 and high < EYE:  # a box's upper face
                start = max(0, int(math.ceil(middle - (high - EYE) / (far * pitch))))
                end = min(height - 1, int(math.floor(middle - (high - EYE) / (near * pitch))))
                light = int(256.0 * 1.1 * _fade(near))
                mean = texture[MIP_OFFSETS[6]]  # the smallest level
                for row in range(start, end + 1):
                    frame[row, column, 0] = min(255, ((mean & 255) * light) >> 8)
                    frame[row, column, 1] = min(255, (((mean >> 8) & 255) * light) >> 8)
                    frame[row, column, 2] = min(255, (((mean >> 16) & 255) * light) >> 8)
            u, tile = _clamp(hit_u[farthest], 0.0, 0.999), hit_tile[farthest]
            _slice(frame, column, near, hit_low[farthest], high, texture, u, hit_shade[farthest], tile)
            hit_depth[farthest] = -1.0


@numba.njit(cache=True)
def _draw_sign(frame, column, scene, x, z, forward_x, forward_z, across, depth, sign):
    """The sign's part of a column: each pixel is the mean of the sign over the pixel's area."""
    height = frame.shape[0]
    pitch = HALF_VIEW / (0.5 * height)
    wall = scene.rects[int(scene.sign[0]), 1]
    rows, columns = sign.shape[0] - 1, sign.shape[1] - 1
    wide, tall = columns / (scene.sign[2] - scene.sign[1]), rows / (scene.sign[4] - scene.sign[3])
    left, right = 0.0, 0.0
    for edge in range(2):
        offset = across + (edge - 0.5) * pitch
        away = (wall - x) / max(1e-6, forward_x - forward_z * offset)
        place = (z + away * (forward_z + forward_x * offset) - scene.sign[1]) * wide
        if edge == 0:
            left = place
        else:
            right = place
    u0 = int(_clamp(left, 0.0, columns - 1.0))
    u1 = int(_clamp(max(right, u0 + 1.0), u0 + 1.0, float(columns)))
    middle = (height - 1) * 0.5
    first = max(0, int(math.ceil(middle - (scene.sign[4] - EYE) / (depth * pitch))))
    last = min(height - 1, int(math.floor(middle - (scene.sign[3] - EYE) / (depth * pitch))))
    for row in range(first, last + 1):
        up = EYE + depth * (middle - row) * pitch
        v0 = int(_clamp((scene.sign[4] - up - 0.5 * depth * pitch) * tall, 0.0, rows - 1.0))
        v1 = int(_clamp((scene.sign[4] - up + 0.5 * depth * pitch) * tall, v0 + 1.0, float(rows)))
        total = sign[v1, u1] - sign[v0, u1] - sign[v1, u0] + sign[v0, u0]
        mean = total // ((v1 - v0) * (u1 - u0))
        frame[row, column, 0] = mean
        frame[row, column, 1] = mean
        frame[row, column, 2] = mean


# ---------------------------------------------------------------------------------------------------- the office


@numba.njit(cache=True)
def _picture(frame, one, scene, textures, signs, looks, crate_textures):
    # One environment's frame; its boxes stand where its building has them.
    crates = np.empty((OFFICES, 8))
    other = 1
    for office in range(OFFICES):
        crates[office, 0], crates[office, 1] = 1.2, 3.0 * (OFFICES - 1 - office) + 1.2
        crates[office, 2], crates[office, 5] = CRATE, 2 * CRATE
        crates[office, 3], crates[office, 4] = math.cos(one.turns[office]), math.sin(one.turns[office])
        crates[office, 6] = 5 + 3 * office
        if office == one.goal:
            crates[office, 7] = crate_textures[one.look, 0]
        else:
            crates[office, 7] = crate_textures[one.look, other]
            other += 1
    look = looks[one.look]
    draw(
        frame, scene, one.x, one.z, one.heading, one.doors, look[:3], look[3], look[4], look[5], crates, textures,
        signs[one.phrase],
    )  # fmt: skip


@numba.njit(cache=True)
def pictures(frames, state, which, scenes, textures, signs, looks, crate_textures):
    """Draws the frames of the environments for which ``which`` is true."""
    for index in range(state.shape[0]):
        if which[index]:
            one = state[index]
            _picture(frames[index], one, scenes[one.layout], textures, signs, looks, crate_textures)


@numba.njit(cache=True)
def _free(scene, x, z, open_doors):
    """Whether the agent can stand at a place: it touches no wall, closed door, piece of furniture or box."""
    if blocked(scene, x, z, RADIUS, open_doors):
        return False
    for office in range(OFFICES):
        dx, dz = x - 1.2, z - (3.0 * (OFFICES - 1 - office) + 1.2)
        if dx * dx + dz * dz < (RADIUS + CRATE * math.sqrt(2.0)) ** 2:
            return False
    return True


@numba.njit(cache=True)
def _opened(scene, x, z, open_doors):
    """The open doors, a bit each, after all within reach have been opened."""
    for door in range(scene.doors.shape[0]):
        if segment_distance2(x, z, scene.doors[door]) < REACH * REACH:
            open_doors |= 1 << door
    return open_doors


@numba.njit(cache=True)
def _near(x, z, office):
    """Whether an office's box is reached."""
    dx, dz = x - 1.2, z - (3.0 * (OFFICES - 1 - office) + 1.2)
    return dx * dx + dz * dz < NEAR * NEAR


@numba.njit(cache=True)
def _move(one, scene, action):
    """One step of one environment; returns whether the blue box is reached."""
    if action == LEFT:
        one.heading += TURN
    elif action == RIGHT:
        one.heading -= TURN
    elif action == FORWARD:
        x, z = one.x + STRIDE * math.cos(one.heading), one.z - STRIDE * math.sin(one.heading)
        if _free(scene, x, z, one.doors):
            one.x, one.z = x, z
    else:
        one.doors = _opened(scene, one.x, one.z, one.doors)
    one.steps += 1
    return _near(one.x, one.z, one.goal)


@numba.njit(cache=True)
def advance(
    frames, state, actions, stepping, scenes, textures, signs, looks, crates, horizon, reward, terminated, truncated
):
    """Steps the environments for which ``stepping`` is true, and draws all; the others get reward 0 and no end."""
    for index in range(state.shape[0]):
        one = state[index]
        reward[index], terminated[index], truncated[index] = 0.0, False, False
        if stepping[index]:
            if _move(one, scenes[one.layout], actions[index]):
                reward[index], terminated[index] = 1.0, True
            truncated[index] = one.steps >= horizon and not terminated[index]
            one.running = 0 if terminated[index] or truncated[index] else 1
        _picture(frames[index], one, scenes[one.layout], textures, signs, looks, crates)


# ---------------------------------------------------------------------------------------------------- the sign's pixels


@numba.njit(cache=True)
def sign_views(frames, one, scene, textures, signs, looks, crate_textures):
    """What would be seen with each of the signs: frames [signs, height, width, 3] are written."""
    phrase = one.phrase
    for index in range(frames.shape[0]):
        one.phrase = index
        _picture(frames[index], one, scene, textures, signs, looks, crate_textures)
    one.phrase = phrase


@numba.njit(cache=True)
def contrast(frames, meanings):
    """By how many pixels at least two signs of different meanings differ; green by ``CONTRAST`` makes a difference.

    Args:
        frames: Of ``sign_views``.
        meanings: [signs] what each sign means; an integer.
    """
    least = frames.shape[1] * frames.shape[2]
    for one in range(frames.shape[0]):
        for two in range(one):
            if meanings[one] == meanings[two]:
                continue
            count = 0
            for row in range(frames.shape[1]):
                for column in range(frames.shape[2]):
                    # signed: int() of a uint8 has no sign here
                    apart = np.int64(frames[one, row, column, 1]) - np.int64(frames[two, row, column, 1])
                    count += abs(apart) >= CONTRAST
                if count >= least:
                    break
            least = min(least, count)
    return least


@numba.njit(cache=True)
def contrasts(counts, state, which, scenes, textures, signs, looks, crate_textures, meanings):
    """``contrast`` of the environments for which ``which`` is true, 0 of the others: counts [n] are written."""
    frames = np.empty((signs.shape[0], HEIGHT, WIDTH, 3), np.uint8)
    for index in range(state.shape[0]):
        one = state[index]
        counts[index] = 0
        if which[index] and may_see_sign(one.x, one.heading, one.doors):
            sign_views(frames, one, scenes[one.layout], textures, signs, looks, crate_textures)
            counts[index] = contrast(frames, meanings)


@numba.njit(cache=True)
def may_see_sign(x, heading, open_doors):
    """False where the sign cannot be in the frame: the door to it is shut, or the agent looks away; x > 8 at least."""
    return x > 8.0 and math.cos(heading) > 0.1 and (open_doors >> OFFICES) & 1 == 1


# ---------------------------------------------------------------------------------------------------- ways


@numba.njit(cache=True)
def sees_box(scene, x, z, heading, open_doors, office):
    """Whether an office's box is well in view from the middle room or the doorway.

    Its door is open, its middle within 30 degrees of straight ahead, and the line to it clear of the doorway's edges by
    0.15 m.
    """
    if not (open_doors >> office) & 1 or x > 7.0 or x < 2.4:
        return False
    away_x, away_z = x - 1.2, z - (3.0 * (OFFICES - 1 - office) + 1.2)
    distance = math.sqrt(away_x * away_x + away_z * away_z)
    if -away_x * math.cos(heading) + away_z * math.sin(heading) < distance * math.cos(math.pi / 6):
        return False
    clear = 0.5 * (scene.doors[office, 3] - scene.doors[office, 1]) - 0.15
    if x <= 3.4 and abs(away_z) > clear:
        return False
    for edge in (2.4, 3.4):
        if x > edge and abs(away_z) * (edge - 1.2) > clear * away_x:
            return False
    return True


@numba.njit(cache=True)
def way(actions, pose, scene, one, seek, which, relevant, least, visited, stamp, memo, scenes_tables, meanings):
    """The shortest sequence of actions from where an environment's agent is to what is sought, breadth first.

    Places less than ``CELL`` apart with the same heading and relevant doors count as one, so that it can be longer than
    the shortest by a little; its steps are exact, whatever the cells.

    Args:
        actions: [most] int64, written; sequences that are longer are not looked for.
        pose: [3] x, z and heading at the end; written.
        scene: The building.
        one: [1] state of the environment; x, z, heading, doors and look are read, and what it is set to meanwhile is
            put back.
        seek: ``TO_BOX``, ``TO_SIGN`` or ``TO_SIGHT``.
        which: The office of ``TO_BOX``; a bit for each office of which one must be seen, of ``TO_SIGHT``.
        relevant: A bit for each door that may be opened on the way.
        least: The contrast from which a sign counts as legible, of ``TO_SIGN``.
        visited: int32 ``VISITED``; entries are ``stamp`` where this search has been.
        stamp: Differs from those of all searches before.
        memo: int16 ``MEMO`` of this building: the contrast at the middle of a cell, -1 where not known yet. It only
            spares the exact one where there is little.
        scenes_tables: textures, signs, looks and textures of boxes, as ``pictures`` has them.
        meanings: See ``contrast``.

    Returns:
        The number of actions; -1 if there is no way.
    """
    textures, signs, looks, crate_textures = scenes_tables
    most, limit = len(actions), 400_000
    xs, zs, doors = np.empty(limit), np.empty(limit), np.empty(limit, np.int64)
    turns, depths = np.empty(limit, np.int64), np.empty(limit, np.int64)
    parents, taken = np.empty(limit, np.int64), np.empty(limit, np.int64)
    x0, z0, heading0, doors0 = one[0].x, one[0].z, one[0].heading, one[0].doors
    frames = np.empty((signs.shape[0] if seek == TO_SIGN else 0, HEIGHT, WIDTH, 3), np.uint8)
    xs[0], zs[0], doors[0], turns[0], depths[0], parents[0] = x0, z0, doors0, 0, 0, -1
    end, node, found = 1, 0, -1
    while node < end:
        x, z, open_doors, heading = xs[node], zs[node], doors[node], heading0 + turns[node] * TURN
        if seek == TO_BOX:
            done = _near(x, z, which)
        elif seek == TO_SIGHT:
            done = False
            for office in range(OFFICES):
                if (which >> office) & 1 and sees_box(scene, x, z, heading, open_doors, office):
                    done = True
        else:
            done = False
            if may_see_sign(x, heading, open_doors) and math.cos(heading) > 0.5:
                bins = memo.shape[2]
                part = heading / (2 * math.pi)
                at_x, at_z, at_turn = int(x / CELL), int(z / CELL), int((part - math.floor(part)) * bins) % bins
                if memo[at_x, at_z, at_turn] < 0:
                    one[0].x, one[0].z = (at_x + 0.5) * CELL, (at_z + 0.5) * CELL
                    one[0].heading, one[0].doors = (at_turn + 0.5) / bins * 2 * math.pi, 1 << OFFICES
                    sign_views(frames, one[0], scene, textures, signs, looks, crate_textures)
                    memo[at_x, at_z, at_turn] = contrast(frames, meanings)
                if memo[at_x, at_z, at_turn] >= 0.85 * least:
                    one[0].x, one[0].z, one[0].heading, one[0].doors = x, z, heading, open_doors
                    sign_views(frames, one[0], scene, textures, signs, looks, crate_textures)
                    done = contrast(frames, meanings) >= least
        if done:
            found = node
            break
        if depths[node] < most and end + 4 <= limit:
            for action in range(4):
                new_x, new_z, new_doors, turn = x, z, open_doors, turns[node]
                if action == LEFT:
                    turn = (turn + 1) % 12
                elif action == RIGHT:
                    turn = (turn + 11) % 12
                elif action == FORWARD:
                    new_x, new_z = x + STRIDE * math.cos(heading), z - STRIDE * math.sin(heading)
                    if not _free(scene, new_x, new_z, open_doors):
                        continue
                else:
                    new_doors = _opened(scene, x, z, open_doors)
                    if (new_doors & relevant) == (open_doors & relevant):
                        continue
                key_x, key_z, key = int(new_x / CELL), int(new_z / CELL), new_doors & relevant
                if visited[key_x, key_z, turn, key] != stamp:
                    visited[key_x, key_z, turn, key] = stamp
                    xs[end], zs[end], doors[end], turns[end] = new_x, new_z, new_doors, turn
                    depths[end], parents[end], taken[end] = depths[node] + 1, node, action
                    end += 1
        node += 1
    one[0].x, one[0].z, one[0].heading, one[0].doors = x0, z0, heading0, doors0
    if found < 0:
        return -1
    pose[0], pose[1], pose[2] = xs[found], zs[found], heading0 + turns[found] * TURN
    length = depths[found]
    while parents[found] >= 0:
        actions[depths[found] - 1] = taken[found]
        found = parents[found]
    return length
