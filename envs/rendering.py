"""Quick pictures of MuJoCo scenes without a screen."""

from __future__ import annotations

import atexit
import weakref
from collections.abc import Mapping
from typing import Any

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.render import NO_GL_HELP, choose_gl

choose_gl()  # before MuJoCo is imported

import mujoco  # noqa: E402
import numpy as np  # noqa: E402

_open_cameras: weakref.WeakSet[Camera] = weakref.WeakSet()


class Camera:
    """A camera on a simulation, made for speed: no shadows, reflections, sky or anti-aliasing.

    On software OpenGL this is ten times as fast as MuJoCo's default. The OpenGL context belongs to the thread that
    draws the first frame.

    Args:
        model: A ``mujoco.MjModel``. Its visual settings are changed; they do not touch the physics.
        height: Pixels.
        width: Pixels.
        camera: Name of a camera of the model; or a mapping with ``lookat`` [3] and ``distance``, metres, ``azimuth``
        and
            ``elevation``, degrees, for a camera of one's own; or None for MuJoCo's free camera.
        upside_down: Whether the model has this camera the wrong way up; the picture is then turned by 180 degrees.

    Raises:
        UserError: The model has no such camera, or the size is not positive.
    """

    def __init__(
        self,
        model: Any,
        height: int,
        width: int,
        camera: str | Mapping[str, Any] | None = None,
        *,
        upside_down: bool = False,
    ) -> None:
        if height < 1 or width < 1:
            raise UserError(f"a picture of {height} x {width} pixels; both must be positive")
        names = [model.camera(index).name for index in range(model.ncam)]
        if isinstance(camera, str) and camera not in names:
            raise unknown("camera", camera, names)
        if isinstance(camera, Mapping):
            free = mujoco.MjvCamera()
            free.lookat[:] = camera["lookat"]
            free.distance, free.azimuth, free.elevation = camera["distance"], camera["azimuth"], camera["elevation"]
            camera = free
        self.model, self.height, self.width, self.camera = model, height, width, camera
        self.upside_down = upside_down
        self._renderer: Any = None

    def render(self, data: Any) -> np.ndarray:
        """Draws the scene.

        Args:
            data: The ``mujoco.MjData`` to draw.

        Returns:
            RGB picture [height, width, 3], uint8.

        Raises:
            UserError: OpenGL does not work here; the message says what to install.
        """
        if self._renderer is None:
            self._renderer = self._open()
        self._renderer.update_scene(data, camera=-1 if self.camera is None else self.camera)
        picture = self._renderer.render()
        return picture[::-1, ::-1].copy() if self.upside_down else picture.copy()

    def _open(self) -> Any:
        backend = choose_gl()
        if backend == "disable":
            raise UserError(f"cannot draw pictures: {NO_GL_HELP}")
        visual = self.model.vis
        visual.quality.offsamples = 0
        visual.quality.shadowsize = 0
        visual.global_.offwidth = max(visual.global_.offwidth, self.width)
        visual.global_.offheight = max(visual.global_.offheight, self.height)
        try:
            renderer = mujoco.Renderer(self.model, self.height, self.width)
        except Exception as error:  # each back end fails in its own way
            raise UserError(
                f"cannot draw pictures with the OpenGL back end {backend or 'of the system'!r} ({error}); {NO_GL_HELP} "
                "(the environment variable MUJOCO_GL chooses: egl, osmesa, glfw)"
            ) from error
        for flag in (
            mujoco.mjtRndFlag.mjRND_SHADOW,
            mujoco.mjtRndFlag.mjRND_REFLECTION,
            mujoco.mjtRndFlag.mjRND_SKYBOX,
            mujoco.mjtRndFlag.mjRND_HAZE,
        ):
            renderer.scene.flags[flag] = False
        if not _open_cameras:
            # MuJoCo has just registered the end of OpenGL; what is registered after it runs before it.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _open_cameras.add(self)
        return renderer

    def close(self) -> None:
        """Frees the OpenGL context; the camera may be used again, with a new one."""
        if self._renderer is not None:
            renderer, self._renderer = self._renderer, None
            _open_cameras.discard(self)
            renderer.close()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # at the end of the process OpenGL may be gone already
            pass


def _close_all() -> None:
    for camera in list(_open_cameras):
        camera.close()
