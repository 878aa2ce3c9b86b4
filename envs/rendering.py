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

#: Shapes that a scene may show.
_MOST_SHAPES = 10000
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
            and ``elevation``, degrees, for a camera of one's own; or None for MuJoCo's free camera. The attribute of
            this name may be set to the name of another camera of the model: the next picture is taken with that one.
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
        self._context: Any = None
        self._fresh = True

    def render(self, data: Any) -> np.ndarray:
        """Draws the scene.

        Args:
            data: The ``mujoco.MjData`` to draw.

        Returns:
            RGB picture [height, width, 3], uint8.

        Raises:
            UserError: OpenGL does not work here; the message says what to install.
        """
        picture = np.empty((self.height, self.width, 3), np.uint8)
        self._draw(data, picture, None)
        return self._upright(picture)

    def rgbd(self, data: Any) -> tuple[np.ndarray, np.ndarray]:
        """Draws the scene once, for its colours and its depth.

        Args:
            data: The ``mujoco.MjData`` to draw.

        Returns:
            RGB picture [height, width, 3], uint8, and depth [height, width], float32: metres along the direction of
            view from the camera's plane to what is seen at the middle of each pixel; the far plane where nothing is.

        Raises:
            UserError: OpenGL does not work here; the message says what to install.
        """
        picture, depth = np.empty((self.height, self.width, 3), np.uint8), self._buffer()
        self._draw(data, picture, depth)
        return self._upright(picture), self._upright(self._metres(depth))

    def segmented(self, data: Any) -> tuple[np.ndarray, np.ndarray]:
        """Draws the scene once, for which shape is where, and how far away.

        Args:
            data: The ``mujoco.MjData`` to draw.

        Returns:
            Numbers of the model's geoms [height, width], int32, -1 where there is none, and depth as in :meth:`rgbd`.

        Raises:
            UserError: OpenGL does not work here; the message says what to install.
        """
        colours, depth = np.empty((self.height, self.width, 3), np.uint8), self._buffer()
        self._draw(data, colours, depth, segment=True)
        scene = self._scene
        # A shape's colour is its number in the scene plus one, the lowest byte first; 0 is the background.
        geoms = np.full(scene.ngeom + 1, -1, np.int32)
        for geom in scene.geoms[: scene.ngeom]:
            if geom.segid != -1 and geom.objtype == mujoco.mjtObj.mjOBJ_GEOM:
                geoms[geom.segid + 1] = geom.objid
        return self._upright(geoms[colours @ np.array([1, 256, 65536])]), self._upright(self._metres(depth))

    def turn_to(self, model: Any) -> None:
        """Makes it a camera on another scene that has a camera of this name.

        The OpenGL context, which takes long to make, is kept where neither scene has brought meshes, height fields or
        skins to it and both have equally many textures, which must be the same.

        Args:
            model: The other scene's ``mujoco.MjModel``.
        """
        kept = self.model.ntex == model.ntex
        if not kept or any(scene.nmesh or scene.nhfield or scene.nskin for scene in (self.model, model)):
            self.close()
        self.model = model

    def open(self) -> None:
        """Makes the OpenGL context now, and not with the first picture.

        Raises:
            UserError: OpenGL does not work here; the message says what to install.
        """
        if self._context is not None:
            return
        backend = choose_gl()
        if backend == "disable":
            raise UserError(f"cannot draw pictures: {NO_GL_HELP}")
        visual = self.model.vis
        visual.quality.offsamples = 0
        visual.quality.shadowsize = 0
        visual.global_.offwidth = max(visual.global_.offwidth, self.width)
        visual.global_.offheight = max(visual.global_.offheight, self.height)
        context = None
        try:
            context = mujoco.gl_context.GLContext(self.width, self.height)
            context.make_current()
            drawer = mujoco.MjrContext(self.model, mujoco.mjtFontScale.mjFONTSCALE_100)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN, drawer)
        except Exception as error:  # each back end fails in its own way
            if context is not None:
                context.free()
            raise UserError(
                f"cannot draw pictures with the OpenGL back end {backend or 'of the system'!r} ({error}); {NO_GL_HELP} "
                "(the environment variable MUJOCO_GL chooses: egl, osmesa, glfw)"
            ) from error
        # The depth's floating-point numbers are finest near 0; with the far plane there, they are fine everywhere.
        drawer.readDepthMap = mujoco.mjtDepthMap.mjDEPTH_ZEROFAR
        self._scene = mujoco.MjvScene(self.model, _MOST_SHAPES)
        for flag in (
            mujoco.mjtRndFlag.mjRND_SHADOW,
            mujoco.mjtRndFlag.mjRND_REFLECTION,
            mujoco.mjtRndFlag.mjRND_SKYBOX,
            mujoco.mjtRndFlag.mjRND_HAZE,
        ):
            self._scene.flags[flag] = False
        if not _open_cameras:
            # MuJoCo has just registered the end of OpenGL; what is registered after it runs before it.
            atexit.unregister(_close_all)
            atexit.register(_close_all)
        _open_cameras.add(self)
        self._context, self._fresh = (context, drawer), True

    def _draw(self, data: Any, colours: np.ndarray, depth: np.ndarray | None, segment: bool = False) -> None:
        """Draws into ``colours`` and ``depth``, the lowest row first, as OpenGL has it."""
        self.open()
        if self._fresh:
            # A context's first frame differs from all later ones in the last bits, in MuJoCo's own renderer as well.
            self._fresh = False
            self._draw(data, colours, depth, segment)
        context, drawer = self._context
        camera, scene = self._eye(), self._scene
        mujoco.mjv_updateScene(
            self.model, data, mujoco.MjvOption(), None, camera, mujoco.mjtCatBit.mjCAT_ALL.value, scene
        )
        scene.flags[mujoco.mjtRndFlag.mjRND_SEGMENT] = scene.flags[mujoco.mjtRndFlag.mjRND_IDCOLOR] = segment
        context.make_current()
        frame = mujoco.MjrRect(0, 0, self.width, self.height)
        mujoco.mjr_render(frame, scene, drawer)
        mujoco.mjr_readPixels(colours, depth, frame, drawer)

    def _eye(self) -> Any:
        if isinstance(self.camera, mujoco.MjvCamera):
            return self.camera
        eye = mujoco.MjvCamera()
        if self.camera is None:
            mujoco.mjv_defaultFreeCamera(self.model, eye)
        else:
            eye.type, eye.fixedcamid = mujoco.mjtCamera.mjCAMERA_FIXED, self.model.camera(self.camera).id
        return eye

    def _buffer(self) -> np.ndarray:
        return np.empty((self.height, self.width), np.float32)

    def _metres(self, depth: np.ndarray) -> np.ndarray:
        """Metres of what is read from the depth's buffer: 0 on the far plane, 1 on the near one."""
        visual, extent = self.model.vis.map, self.model.stat.extent
        near, far = visual.znear * extent, visual.zfar * extent
        return (near * far / (near + depth.astype(np.float64) * (far - near))).astype(np.float32)

    def _upright(self, picture: np.ndarray) -> np.ndarray:
        """OpenGL's lowest row is the first; a camera that is upside down has its pictures turned as well."""
        return picture[:, ::-1].copy() if self.upside_down else picture[::-1].copy()

    def close(self) -> None:
        """Frees the OpenGL context; the camera may be used again, with a new one."""
        if self._context is not None:
            (context, drawer), self._context = self._context, None
            _open_cameras.discard(self)
            context.make_current()
            drawer.free()
            context.free()

    def __del__(self) -> None:
        try:
            self.close()
        except Exception:  # at the end of the process OpenGL may be gone already
            pass


def _close_all() -> None:
    for camera in list(_open_cameras):
        camera.close()
