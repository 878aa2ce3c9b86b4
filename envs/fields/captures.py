"""What a camera saw of a scene that stood still: pictures, where each was taken from, and which pixels count."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError

__all__ = ["Capture", "Intrinsics", "check_poses", "rays"]

#: Fewer views than this do not show where things are.
MIN_VIEWS = 3
# How far R R^T may be from the identity: poses that passed through float32 are within 1e-6.
_RIGID = 1e-3


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera without distortion.

    The pixel in row r and column c shows what lies along ((c + 0.5 - cx) / fx, (cy - r - 0.5) / fy, -1) in the
    camera's axes (x right, y up, looks along -z).

    Attributes:
        fx: Focal length in pixels, along a row.
        fy: Focal length in pixels, along a column.
        cx: Column of the principal point; width / 2 is the middle.
        cy: Row of the principal point.
        height: Rows.
        width: Columns.

    Raises:
        UserError: A focal length that is not positive and finite, or a size below one pixel.
    """

    fx: float
    fy: float
    cx: float
    cy: float
    height: int
    width: int

    def __post_init__(self) -> None:
        numbers = (self.fx, self.fy, self.cx, self.cy)
        if not all(map(math.isfinite, numbers)) or min(self.fx, self.fy) <= 0:
            raise UserError(f"fx, fy, cx, cy = {numbers}: they must be finite, and focal lengths positive")
        if min(self.height, self.width) < 1:
            raise UserError(f"a picture of {self.height} x {self.width} pixels: it has one pixel or more")

    @classmethod
    def from_fov(cls, fov: float, height: int, width: int, *, shift: tuple[float, float] = (0.0, 0.0)) -> Intrinsics:
        """Square pixels and a vertical field of view.

        Args:
            fov: Angle from the upper to the lower edge, radians.
            height: Rows.
            width: Columns.
            shift: What is added to (cx, cy). PyBullet's TinyRenderer shows what lies at a pixel's left and lower edges
                instead of its middle: (0.5, -0.5) says so.

        Raises:
            UserError: An angle outside (0, pi), or a size below one pixel.
        """
        if not 0 < fov < math.pi:
            raise UserError(f"fov={fov}: it is an angle in radians between 0 and pi")
        focal = height / 2 / math.tan(fov / 2)
        return cls(focal, focal, width / 2 + shift[0], height / 2 + shift[1], int(height), int(width))

    def resized(self, height: int, width: int) -> Intrinsics:
        """The same camera with pictures of another size."""
        down, across = height / self.height, width / self.width
        return Intrinsics(self.fx * across, self.fy * down, self.cx * across, self.cy * down, height, width)


@dataclass(frozen=True, eq=False)
class Capture:
    """Views of one scene; :meth:`checked` says whether a field can be fitted to them.

    Attributes:
        images: [V, h, w, 3] uint8.
        poses: Camera to world, OpenGL axes (x right, y up, looks along -z), metres; [V, 4, 4].
        intrinsics: Of all the views.
        masks: True where a pixel shows the scene and not, say, the robot's own gripper; [V, h, w], or None for all.
    """

    images: Any
    poses: Any
    intrinsics: Intrinsics
    masks: Any = None

    def checked(self, name: str = "capture") -> Capture:
        """The same with arrays of the right types.

        Args:
            name: What errors call it.

        Raises:
            UserError: Too few views; images of mixed size, of another size than the camera's or with values that are
                not finite; poses that are missing, mirrored, not rigid or not finite; masks of another shape, or that
                leave no pixel. The message names the capture, the view and the fix.
        """
        if isinstance(self.images, Sequence):
            shapes = [np.shape(image) for image in self.images]
            odd = next((v for v, shape in enumerate(shapes) if shape != shapes[0]), None)
            if odd is not None:
                raise UserError(
                    f"{name}: view {odd} has the shape {shapes[odd]} and view 0 {shapes[0]}; "
                    "bring all images to one size, and the intrinsics with them"
                )
        images = np.asarray(self.images)
        if not isinstance(self.intrinsics, Intrinsics):
            raise UserError(f"{name}: intrinsics {self.intrinsics!r}; give an Intrinsics, such as Intrinsics.from_fov")
        size = (self.intrinsics.height, self.intrinsics.width)
        if images.ndim != 4 or images.shape[1:] != (*size, 3):
            raise UserError(
                f"{name}: images of shape {list(images.shape)}; the intrinsics want [V, {size[0]}, {size[1]}, 3]"
            )
        if len(images) < MIN_VIEWS:
            raise UserError(
                f"{name}: {len(images)} views; at least {MIN_VIEWS} are needed, taken from different places"
            )
        if images.dtype != np.uint8:
            finite = np.isfinite(images).all((1, 2, 3)) if images.dtype.kind == "f" else np.ones(len(images), bool)
            if not finite.all():
                raise UserError(
                    f"{name}: view {int(np.argmin(finite))} holds pixels that are not finite; drop it, or mend them"
                )
            raise UserError(
                f"{name}: images of type {images.dtype}; give uint8, 0 to 255, "
                "as in (255 * images).round().astype('uint8') for images from 0 to 1"
            )
        if self.poses is None:
            raise UserError(f"{name}: no poses; give the camera's pose in the world for each view, [V, 4, 4]")
        poses = check_poses(self.poses, name)
        if poses.shape != (len(images), 4, 4):
            raise UserError(f"{name}: poses of shape {list(poses.shape)} for {len(images)} views; give one for each")
        if self.masks is None:
            masks = np.ones(images.shape[:3], bool)
        else:
            masks = np.asarray(self.masks)
            if masks.shape != images.shape[:3] or masks.dtype != bool:
                raise UserError(
                    f"{name}: masks of shape {list(masks.shape)} and type {masks.dtype}; "
                    f"give booleans {list(images.shape[:3])}, True where a pixel shows the scene"
                )
        seen = masks.any((1, 2))
        if not seen.any():
            raise UserError(f"{name}: all pixels of all views are masked; True marks the pixels that show the scene")
        if not seen.all():
            raise UserError(f"{name}: all pixels of view {int(np.argmin(seen))} are masked; drop it, or mend its mask")
        return Capture(images, poses, self.intrinsics, masks)

    def subset(self, views: Any) -> Capture:
        """Some of the views, of a checked capture; ``views`` indexes them."""
        return Capture(self.images[views], self.poses[views], self.intrinsics, self.masks[views])


def check_poses(poses: Any, name: str = "poses") -> np.ndarray:
    """Rigid transforms as float64.

    Args:
        poses: [..., 4, 4].
        name: What errors call them.

    Raises:
        UserError: Another shape, values that are not finite, a mirrored matrix or one that is not rigid; the message
            names the first.
    """
    try:
        poses = np.asarray(poses, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: poses that are not one array of numbers [V, 4, 4]: {error}") from None
    if poses.ndim < 2 or poses.shape[-2:] != (4, 4):
        raise UserError(f"{name}: poses of shape {list(poses.shape)}; give camera-to-world matrices [..., 4, 4]")
    flat = poses.reshape(-1, 4, 4)
    turn = flat[:, :3, :3]
    with np.errstate(invalid="ignore", over="ignore"):
        faults = (
            (~np.isfinite(flat).all((1, 2)), "is not finite", "drop the view, or mend its pose"),
            (
                np.linalg.det(np.nan_to_num(turn, posinf=0, neginf=0)) < 0,
                "is mirrored (its determinant is negative)",
                "flip one axis: x is right, y is up, and the camera looks along -z",
            ),
            (
                (np.abs(turn @ turn.swapaxes(1, 2) - np.eye(3)).max((1, 2), initial=0) > _RIGID)
                | (np.abs(flat[:, 3] - np.array([0, 0, 0, 1])).max(1, initial=0) > _RIGID),
                "is not rigid",
                "take scale and shear out: the rows of the rotation have length 1 and are orthogonal, and the last row "
                "is 0 0 0 1",
            ),
        )
        for wrong, what, fix in faults:
            if wrong.any():
                raise UserError(f"{name}: the pose of view {int(np.argmax(wrong))} {what}; {fix}")
    return poses


def rays(poses: np.ndarray, camera: Intrinsics, dtype: Any = np.float32) -> np.ndarray:
    """The rays of all pixels: origins, and directions of length 1, in the world.

    Args:
        poses: Camera to world, [M, 4, 4].
        camera: The intrinsics.
        dtype: Of the result.

    Returns:
        [M, h, w, 6].
    """
    right = (np.arange(camera.width) + 0.5 - camera.cx) / camera.fx
    up = (camera.cy - np.arange(camera.height) - 0.5) / camera.fy
    way = np.stack(np.broadcast_arrays(right, up[:, None], -1.0), -1)
    way = way / np.linalg.norm(way, axis=-1, keepdims=True)
    out = np.empty((len(poses), camera.height, camera.width, 6), dtype)
    out[..., :3] = poses[:, None, None, :3, 3]
    out[..., 3:] = np.einsum("vij,hwj->vhwi", poses[:, :3, :3], way)
    return out


def surfaces(distances: np.ndarray, poses: np.ndarray, camera: Intrinsics, farthest: float = 1.0) -> np.ndarray:
    """Where the surfaces are that pictures show.

    Args:
        distances: Of each pixel's surface along its ray [M, h, w], metres.
        poses: Camera to world, [M, 4, 4].
        camera: The intrinsics.
        farthest: What is farther is left out, metres.

    Returns:
        Points in the world [P, 3], metres.
    """
    seen = rays(poses, camera, np.float64)
    points = seen[..., :3] + np.where(np.isfinite(distances), distances, 0.0)[..., None] * seen[..., 3:]
    return points[distances < farthest]
