"""OpenGL back ends, films, tiling."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.core.render import BACKENDS, choose_gl, grid, grid_video, probe_gl, write_video

#: Draws a frame and ends without closing anything.
DRAW = """
import os, fleetgym
from fleetgym.envs import suite
env = suite("meta_world").make("reach-v3", render_mode="rgb_array", render_size=(48, 64))
env.reset(seed=0)
env.step(env.action_space.sample())
frame = env.render()
assert frame.shape == (48, 64, 3) and frame.std() > 10, frame.std()
print(os.environ.get("MUJOCO_GL"))
"""


def run(code, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("MUJOCO_GL", "PYOPENGL_PLATFORM")}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def frames():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 255, (32, 48, 3))
    return [((base + 8 * index) % 255).astype(np.uint8) for index in range(12)]


def chosen():
    return run("from fleetgym.core.render import choose_gl; print(choose_gl())").stdout.strip()


def test_a_frame_is_drawn_and_nothing_else_is_said():
    """Or, where no back end works, the error says what to install."""
    result = run(DRAW)
    if chosen() in BACKENDS:
        assert result.returncode == 0, result.stderr
        assert result.stderr == "" and result.stdout.strip() in BACKENDS
    else:
        assert "lavavu-osmesa" in result.stderr and "UserError" in result.stderr


def test_mujoco_may_have_been_imported_before():
    result = run("import mujoco\n" + DRAW)
    if chosen() in BACKENDS:
        assert result.returncode == 0 and result.stderr == "", result.stderr


def test_without_opengl_all_but_pictures_works():
    result = run(DRAW, MUJOCO_GL="disable")
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("fleetgym.core.errors.UserError: cannot draw pictures")
    assert 'File "<string>", line 7' in result.stderr  # that is render(); reset and step had worked


def test_choose_gl_respects_the_user():
    code = "from fleetgym.core.render import choose_gl; print(choose_gl())"
    assert run(code, MUJOCO_GL="off").stdout.strip() == "disable"
    assert run(code, MUJOCO_GL="glfw").stdout.strip() == "glfw"
    result = run(code, PYOPENGL_PLATFORM="osmesa")
    assert result.stdout.strip() in ("osmesa", "glfw", "disable") and result.stderr == ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
def test_the_library_of_triton_is_loaded_first(tmp_path):
    """After Mesa's, importing it would end the process; a small library stands for it, and the package is not run."""
    folder = tmp_path / "triton" / "_C"
    folder.mkdir(parents=True)
    (tmp_path / "triton" / "__init__.py").write_text("raise SystemExit('imported')")
    shutil.copy(np.random._common.__file__, folder / "libtriton.so")
    code = (
        "import ctypes, sys\nfrom fleetgym.core import render\nloaded, load = [], ctypes.CDLL\n"
        "ctypes.CDLL = lambda name, *mode: loaded.append(str(name)) or load(name, *mode)\n"
        "render.choose_gl()\nassert 'triton' not in sys.modules\nprint(*loaded, sep='\\n')\n"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    for value in ("", "glfw"):
        result = run(code, PYTHONPATH=path, MUJOCO_GL=value)
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[0] == str(folder / "libtriton.so")
    assert run(code, PYTHONPATH=path, MUJOCO_GL="disable").stdout.strip() == ""
    (folder / "libtriton.so").write_bytes(b"no library")
    assert run(code, PYTHONPATH=path).returncode == 0


@pytest.mark.skipif(find_spec("triton") is None, reason="torch without triton")
def test_triton_can_be_imported_after_a_picture():
    if chosen() in BACKENDS:
        result = run(DRAW + "import triton\nprint('imported')")
        assert result.returncode == 0 and result.stdout.endswith("imported\n"), result.stderr


def test_choose_gl_is_free_the_second_time_and_exports_the_choice():
    result = run(
        "import os, sys\nfrom fleetgym.core.render import choose_gl\n"
        "assert choose_gl() == choose_gl() == os.environ['MUJOCO_GL'] and 'mujoco' not in sys.modules"
    )
    if sys.platform.startswith("linux"):
        assert result.returncode == 0, result.stderr
    assert choose_gl() == choose_gl()


@pytest.mark.parametrize("backend", BACKENDS)
def test_probe_agrees_with_the_choice(backend):
    works, line = probe_gl(backend)
    assert line.startswith(backend) and "\n" not in line
    if chosen() == backend:
        assert works, line


def test_probe_knows_its_back_ends():
    with pytest.raises(UserError, match="'egl'"):
        probe_gl("elg")


def test_mp4(tmp_path, frames):
    from moviepy.video.io.VideoFileClip import VideoFileClip

    path = write_video(tmp_path / "new" / "film.mp4", frames, fps=10)
    with VideoFileClip(str(path)) as clip:
        assert clip.size == [48, 32] and clip.fps == 10 and abs(clip.duration - 1.2) < 0.01
        # H.264 halves the colours' resolution, so compare brightness.
        assert abs(clip.get_frame(0).mean() - frames[0].mean()) < 5
    assert [file.name for file in path.parent.iterdir()] == ["film.mp4"]


def test_mp4_of_odd_size(tmp_path, frames):
    from moviepy.video.io.VideoFileClip import VideoFileClip

    path = write_video(tmp_path / "film.mp4", [frame[:31, :47] for frame in frames], fps=10)
    with VideoFileClip(str(path)) as clip:
        assert clip.size == [46, 30]


def test_gif(tmp_path, frames):
    from PIL import Image

    path = write_video(tmp_path / "film.gif", frames, fps=20)
    with Image.open(path) as image:
        assert image.n_frames == 12 and image.size == (48, 32) and image.info["duration"] == 50
        image.seek(5)
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - frames[5]).mean() < 25


@pytest.mark.parametrize(
    ("name", "bad", "words"),
    [
        ("film.avi", [np.zeros((4, 4, 3), np.uint8)], ".mp4 or .gif"),
        ("film.mp4", [], "no frames"),
        ("film.mp4", [np.zeros((4, 4), np.uint8)], "(4, 4)"),
        ("film.gif", [np.zeros((4, 4, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], "(4, 6, 3)"),
    ],
)
def test_bad_films_leave_nothing_behind(tmp_path, name, bad, words):
    with pytest.raises(UserError) as error:
        write_video(tmp_path / name, bad)
    assert words in str(error.value)
    assert not list(Path(tmp_path).iterdir())


def test_a_film_that_cannot_be_encoded_leaves_the_old_one(tmp_path, frames, monkeypatch):
    path = tmp_path / "film.gif"
    write_video(path, frames)
    before = path.read_bytes()
    monkeypatch.setattr("PIL.Image.Image.save", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_video(path, frames)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_grid(frames):
    tiled = grid(frames[:3], columns=2, margin=2, fill=7)
    assert tiled.shape == (66, 98, 3) and tiled.dtype == np.uint8
    np.testing.assert_array_equal(tiled[:32, :48], frames[0])
    np.testing.assert_array_equal(tiled[:32, 50:], frames[1])
    np.testing.assert_array_equal(tiled[34:, :48], frames[2])
    assert (tiled[34:, 50:] == 7).all() and (tiled[32:34] == 7).all()
    assert grid(frames[:5]).shape == (66, 148, 3)


def test_grid_video_holds_the_last_frame(frames):
    film = list(grid_video([frames[:3], frames[:1]], columns=2))
    assert len(film) == 3
    np.testing.assert_array_equal(film[2], grid([frames[2], frames[0]], columns=2))


def test_floats_are_taken_as_colours_from_zero_to_one():
    assert grid([np.full((2, 2, 3), 0.5)])[0, 0, 0] == 128
