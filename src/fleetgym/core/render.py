"""Pictures without a screen: which OpenGL MuJoCo uses, whether it works, and films made of frames.

MuJoCo takes its OpenGL back end from the environment variable ``MUJOCO_GL`` at the moment it is imported, and PyOpenGL
its platform from ``PYOPENGL_PLATFORM``. So whatever imports MuJoCo in this package calls ``choose_gl()`` first.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write

#: Back ends that render without a screen, the preferred one first.
BACKENDS = ("egl", "osmesa")
#: What to do where no back end works; ``fleetgym doctor`` and the errors of ``render()`` print it.
NO_GL_HELP = (
    "no OpenGL that renders without a screen was found; any one of these brings it: "
    "`pip install --no-deps lavavu-osmesa` (Linux x86-64, no system package), "
    "`apt-get install libegl1 libgl1-mesa-dri`, or `apt-get install libosmesa6`"
)
_OFF = ("disable", "disabled", "off", "false", "0")
_EGL_PLATFORM_DEVICE_EXT = 0x313F
# The wheel's libOSMesa names these by SONAME without a search path, so they are loaded first, in this order.
_OSMESA_WHEEL_ORDER = (
    "libpcre2-8",
    "libselinux",
    "libglapi",
    "libffi",
    "libtinfo",
    "libzstd",
    "libdrm",
    "libLLVM",
    "libOSMesa",
)
_chosen: str | None = None


def choose_gl() -> str:
    """Chooses MuJoCo's OpenGL back end and sets ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM``; prints nothing.

    A value that the user has set is respected. Otherwise, on Linux: EGL if it has a device that initialises, else
    OSMesa (the system's, or the one inside the ``lavavu-osmesa`` wheel), else GLFW if there is a display, else
    ``"disable"`` (everything but pictures works). Other systems bring their own OpenGL and are left alone. Child
    processes inherit the choice. Call it before MuJoCo is imported; the first call decides, later ones are free.

    Returns:
        ``"egl"``, ``"osmesa"``, ``"glfw"``, ``"disable"``, another value that the user has set, or ``""`` for the
        system's own.
    """
    global _chosen
    if _chosen is None:
        _chosen = _choose()
    return _chosen


def _choose() -> str:
    value = os.environ.get("MUJOCO_GL", "").lower().strip()
    if not sys.platform.startswith("linux"):
        return value
    if value not in _OFF:
        _load_triton()
    if value:
        return _check(value)
    platform = os.environ.get("PYOPENGL_PLATFORM", "").lower()
    # MuJoCo refuses to be imported where PyOpenGL has been told another platform.
    for backend, works in (("egl", _egl_works), ("osmesa", _load_osmesa)):
        if platform in ("", backend) and works():
            os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = backend
            break
    else:
        backend = "glfw" if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY") else "disable"
        os.environ["MUJOCO_GL"] = backend
    context = sys.modules.get("mujoco.gl_context")
    if context is not None and backend in BACKENDS:
        # Somebody imported MuJoCo before us, without a choice; this module is where it keeps its own.
        importlib.reload(context)
    return backend


def _check(value: str) -> str:
    """The user's own choice, if it can be; MuJoCo would fail in its import, with nothing that says why."""
    if value in _OFF:
        return "disable"
    if value == "osmesa" and not _load_osmesa():
        raise UserError(
            "the environment variable MUJOCO_GL asks for osmesa, but there is no libOSMesa: "
            "`pip install --no-deps lavavu-osmesa`, or `apt-get install libosmesa6`, or unset it"
        )
    if value == "egl" and not any(map(_loads, ("libEGL.so", "libEGL.so.1"))):
        raise UserError(
            "the environment variable MUJOCO_GL asks for egl, but there is no libEGL: "
            "`apt-get install libegl1 libgl1-mesa-dri`, or unset it to have a back end chosen"
        )
    return value


def _load_triton() -> None:
    """Loads the library of ``triton``, where torch has brought it, before any OpenGL.

    It carries an LLVM of its own, and so does Mesa, which makes its symbols visible to everything that is loaded after
    it: importing ``torch.optim`` after a picture would end the process with a segmentation fault. In this order both
    work. Only the library is loaded (0.1 s, 70 MB), not the package.
    """
    spec = find_spec("triton")
    for folder in (spec and spec.submodule_search_locations) or ():
        for library in Path(folder, "_C").glob("libtriton*.so"):
            with contextlib.suppress(OSError):
                ctypes.CDLL(str(library))


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _egl_works() -> bool:
    """Whether some EGL device initialises: libEGL alone says little, its drivers come in other packages."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        egl.eglGetProcAddress.restype = ctypes.c_void_p
        egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
        egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
        egl.eglTerminate.argtypes = [ctypes.c_void_p]
    except (OSError, AttributeError):
        return False
    query = egl.eglGetProcAddress(b"eglQueryDevicesEXT")
    display_of = egl.eglGetProcAddress(b"eglGetPlatformDisplayEXT")
    if not query or not display_of:
        return False
    pointer = ctypes.POINTER
    query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer(ctypes.c_void_p), pointer(ctypes.c_int))(query)
    display_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display_of)
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int()
    if not query(16, devices, ctypes.byref(count)):
        return False
    for device in devices[: count.value]:
        display = display_of(_EGL_PLATFORM_DEVICE_EXT, device, None)
        if display and egl.eglInitialize(display, None, None):
            egl.eglTerminate(display)
            return True
    return False


def _load_osmesa() -> bool:
    """Makes libOSMesa available to MuJoCo and PyOpenGL: the system's, else that of the ``lavavu-osmesa`` wheel."""
    if any(map(_loads, ("libOSMesa.so", *(f"libOSMesa.so.{version}" for version in range(9, 5, -1))))):
        return True
    folder = _osmesa_wheel()
    if folder is None or find_spec("OpenGL") is None:
        return False
    library = None
    try:
        for stem in _OSMESA_WHEEL_ORDER:
            for path in sorted(folder.glob(f"{stem}-*.so*")):
                library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    if library is None:
        return False
    # The wheel renames the library (its SONAME carries a hash), so PyOpenGL does not find it by name: hand it over.
    os.environ["PYOPENGL_PLATFORM"] = "osmesa"
    import OpenGL.platform as platform

    if not hasattr(platform.PLATFORM, "OSMesa"):
        return False  # PyOpenGL was imported before, for another platform
    platform.PLATFORM.GL = platform.PLATFORM.OSMesa = library
    platform.PLATFORM.install(vars(platform))
    return True


def _osmesa_wheel() -> Path | None:
    """The folder of shared libraries that the ``lavavu-osmesa`` wheel installs beside the packages."""
    for entry in sys.path:
        folder = Path(entry or ".") / "lavavu_osmesa.libs"
        if folder.is_dir():
            return folder
    return None


_PROBE = """
import json, os, time
try:
    from fleetgym.core.render import choose_gl
    choose_gl()
    import mujoco
    model = mujoco.MjModel.from_xml_string(
        '<mujoco><worldbody><light pos="0 0 3"/><geom size=".5" rgba="1 0 0 1"/></worldbody></mujoco>')
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with mujoco.Renderer(model, 48, 64) as renderer:
        renderer.update_scene(data)
        renderer.render()
        begin = time.perf_counter()
        frame = renderer.render()
        seconds = time.perf_counter() - begin
    report = {"red": float(frame[..., 0].mean()), "seconds": seconds}
except Exception as error:
    report = {"error": str(error).partition(", but ")[2] or f"{type(error).__name__}: {error}"}
print(json.dumps(report), flush=True)
os._exit(0)  # half-made contexts complain at the end
"""


def probe_gl(backend: str, timeout: float = 60.0) -> tuple[bool, str]:
    """Renders one frame with a back end, in a process of its own.

    Args:
        backend: ``"egl"``, ``"osmesa"`` or ``"glfw"``.
        timeout: Seconds after which the back end counts as hung.

    Returns:
        Whether a picture came out, and one line that says so or says why not.

    Raises:
        UserError: The back end is not one of these.
    """
    if backend not in (*BACKENDS, "glfw"):
        raise unknown("OpenGL back end", backend, (*BACKENDS, "glfw"))
    environment = {key: value for key, value in os.environ.items() if key != "PYOPENGL_PLATFORM"}
    environment["MUJOCO_GL"] = backend
    # The child must find this package even where it is run from a checkout that is not installed.
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    try:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        return False, f"{backend}: no frame after {timeout:.0f} s"
    lines = result.stdout.strip().splitlines()
    if not lines:
        return False, f"{backend}: the process ended with code {result.returncode}"
    report = json.loads(lines[-1])
    if "error" in report:
        return False, f"{backend}: {' '.join(report['error'].split())}"
    if report["red"] <= 1.0:
        return False, f"{backend}: the frame is blank"
    return True, f"{backend}: renders ({1000 * report['seconds']:.0f} ms a small frame)"


def check_frames(frames: Iterable[np.ndarray]) -> list[np.ndarray]:
    """Lists the frames as uint8 RGB arrays of one size.

    Args:
        frames: Arrays [H, W, 3], uint8, or floats within 0..1.

    Raises:
        UserError: No frames, or one of another shape; the message holds both shapes.
    """
    result: list[np.ndarray] = []
    for index, frame in enumerate(frames):
        frame = np.asarray(frame)
        if frame.dtype != np.uint8:
            frame = (np.clip(frame, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
        if frame.ndim != 3 or frame.shape[2] != 3:
            raise UserError(f"frame {index} has shape {frame.shape}; a frame is [height, width, 3]")
        if result and frame.shape != result[0].shape:
            raise UserError(f"frame {index} has shape {frame.shape}, frame 0 has {result[0].shape}; they must agree")
        result.append(frame)
    if not result:
        raise UserError('there are no frames to write; was the environment made with render_mode="rgb_array"?')
    return result


def write_video(path: str | os.PathLike, frames: Iterable[np.ndarray], fps: float = 30.0) -> Path:
    """Writes frames as an MP4 (H.264) or GIF film, by the suffix of ``path``; atomically.

    Args:
        path: A file name that ends in ``.mp4`` or ``.gif``.
        frames: RGB pictures [H, W, 3], uint8, all of one size. An odd height or width loses its last row or column
            in an MP4, whose colour planes need even sizes.
        fps: Frames a second. GIF viewers honour at most 50.

    Returns:
        The path.

    Raises:
        UserError: Another suffix, no frames, or frames of different shapes.
    """
    path = Path(path)
    if path.suffix.lower() not in (".mp4", ".gif"):
        raise UserError(f"cannot write a film to {path.name!r}; end the name in .mp4 or .gif")
    if not fps > 0:
        raise UserError(f"fps is {fps}; it must be positive")
    pictures = check_frames(frames)
    with atomic_write(path) as temporary:
        if path.suffix.lower() == ".gif":
            _write_gif(temporary, pictures, fps)
        else:
            _write_mp4(temporary, pictures, fps)
    return path


def _write_mp4(path: Path, frames: list[np.ndarray], fps: float) -> None:
    from moviepy.video.io.ImageSequenceClip import ImageSequenceClip

    height, width = (size - size % 2 for size in frames[0].shape[:2])
    clip = ImageSequenceClip([np.ascontiguousarray(frame[:height, :width]) for frame in frames], fps=fps)
    try:
        # One encoder thread: more of them fight over few cores, and the file would depend on their number.
        clip.write_videofile(
            str(path), codec="libx264", audio=False, logger=None, threads=1, ffmpeg_params=["-pix_fmt", "yuv420p"]
        )
    finally:
        clip.close()


def _write_gif(path: Path, frames: list[np.ndarray], fps: float) -> None:
    from PIL import Image

    # One palette for the whole film, from a few frames spread over it: no flicker, and files a third of the size.
    chosen = frames[:: max(1, len(frames) // 8)]
    mosaic = Image.fromarray(np.concatenate(chosen)).quantize(colors=128, method=Image.Quantize.MEDIANCUT)
    pictures = [Image.fromarray(frame).quantize(palette=mosaic, dither=Image.Dither.NONE) for frame in frames]
    # GIF counts time in hundredths of a second.
    duration = max(20, round(1000.0 / fps / 10.0) * 10)
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)


def grid(frames: Sequence[np.ndarray], columns: int | None = None, margin: int = 2, fill: int = 255) -> np.ndarray:
    """Tiles pictures of one size, row by row.

    Args:
        frames: N pictures [H, W, 3], uint8.
        columns: Pictures a row; None makes the grid about square.
        margin: Pixels between neighbours.
        fill: Grey level of margins and of empty cells.

    Returns:
        One picture [rows * H + margins, columns * W + margins, 3], uint8.
    """
    pictures = check_frames(frames)
    if columns is None:
        columns = int(np.ceil(np.sqrt(len(pictures))))
    rows = -(-len(pictures) // columns)
    height, width = pictures[0].shape[:2]
    canvas = np.full((rows * (height + margin) - margin, columns * (width + margin) - margin, 3), fill, np.uint8)
    for index, picture in enumerate(pictures):
        top, left = (index // columns) * (height + margin), (index % columns) * (width + margin)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def grid_video(
    films: Sequence[Sequence[np.ndarray]], columns: int | None = None, margin: int = 2
) -> Iterable[np.ndarray]:
    """Plays films side by side; one that has ended holds its last frame.

    Args:
        films: N sequences of frames [H, W, 3], all of one size.
        columns: Films a row; see ``grid``.
        margin: Pixels between neighbours.

    Yields:
        The tiled frames, as many as the longest film has.
    """
    films = [check_frames(film) for film in films]
    if not films:
        raise UserError("there are no films to tile")
    for step in range(max(map(len, films))):
        yield grid([film[min(step, len(film) - 1)] for film in films], columns, margin)
