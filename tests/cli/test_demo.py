import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from PIL import Image

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.cli import main
from fleetgym.core import Checkpoint, render


class Slide(gym.Env):
    """A square that slides; drawn without any OpenGL."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}  # noqa: RUF012

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(2), {}

    def step(self, action):
        self.t += 1
        return np.full(2, float(self.t)), 0.0, False, False, {}

    def render(self):
        frame = np.zeros((24, 64, 3), np.uint8)
        frame[4:12, self.t : self.t + 8] = 255
        return frame


@pytest.fixture
def words(tmp_path):
    gym.register("Slide-v0", lambda **options: Slide(**options), max_episode_steps=30)
    torch.manual_seed(0)
    Checkpoint.save(tmp_path / "robot", RecurrentPolicy(2, 1, hidden=4))
    yield ["demo", "Slide-v0", "--policy", str(tmp_path / "robot")]
    del gym.registry["Slide-v0"]


def test_film_of_a_policy(words, tmp_path, capsys):
    assert main([*words, "--steps", "10", "--out", str(tmp_path / "film.gif")]) == 0
    out = capsys.readouterr().out
    assert "Slide-v0, seed 0: 10 steps" in out and "6 frames at 10 a second" in out
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 6 and film.size == (64, 24) and film.info["duration"] == 100
    small = ["--steps", "4", "--shrink", "3", "--out", str(tmp_path / "small.gif")]
    assert main([*words, *small]) == 0
    with Image.open(tmp_path / "small.gif") as film:
        assert film.size == (21, 8)
    assert main([*words, "--steps", "4", "--every", "1", "--fps", "30", "--out", str(tmp_path / "film.mp4")]) == 0
    assert (tmp_path / "film.mp4").stat().st_size > 500


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere the system brings OpenGL")
def test_without_opengl_one_line_says_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(render, "choose_gl", lambda: "disable")
    assert main(["demo", "reach-v3", "--out", str(tmp_path / "film.gif")]) == 1
    error = capsys.readouterr().err
    assert error == render.NO_GL_HELP + "\n" and not (tmp_path / "film.gif").exists()


def test_film_of_an_expert(tmp_path, capsys):
    if render.choose_gl() == "disable":
        pytest.skip("no OpenGL here")
    assert main(["demo", "reach-v3", "--steps", "12", "--every", "3", "--out", str(tmp_path / "film.gif")]) == 0
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 5
        film.seek(4)
        assert np.asarray(film.convert("RGB")).std() > 10


def test_film_in_three_dimensions(tmp_path, capsys):
    assert main(["demo", "OfficeNav3D-v0", "--seed", "1", "--shrink", "4", "--out", str(tmp_path / "film.gif")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  episode 2"))
    assert line.endswith(" steps, solved, return 1")


@pytest.mark.parametrize(
    ("env_id", "split"),
    [("OfficeNav-v0", "test"), ("OfficeNav-Map-v0", "layout"), ("OfficeNav-Released-v0", "train")],
)
def test_film_of_a_whole_trial_needs_no_opengl(tmp_path, capsys, monkeypatch, env_id, split):
    monkeypatch.setattr(render, "choose_gl", lambda: "disable")
    words = ["demo", env_id, "--seed", "3", "--split", split, "--out", str(tmp_path / "film.gif")]
    assert main(words) == 0
    first, second = (line for line in capsys.readouterr().out.splitlines() if line.startswith("  episode"))
    steps = [int(line.split()[2]) for line in (first, second)]
    assert second.split()[4] == "solved," and steps[1] < steps[0]  # it remembers what it read
    with Image.open(tmp_path / "film.gif") as film:
        black = []
        for index in range(film.n_frames):
            film.seek(index)
            frame = np.asarray(film.convert("RGB"))[:, -180:]
            black.append((frame.max(-1) == 0).mean())
        assert film.n_frames > 20
    assert black[0] > 0.3 > min(black)  # the sign is seen where the agent stands before it
    assert main([*words[:2], "--seed", "3", "--split", "tset", "--out", str(tmp_path / "other.gif")]) == 2
    assert "split 'tset'" in capsys.readouterr().err and not (tmp_path / "other.gif").exists()


@pytest.mark.parametrize(
    "change,message",
    [
        (["--out", "film.avi"], "end the name in .gif or .mp4"),
        (["--steps", "0"], "--steps 0"),
        (["--every", "0"], "--every 0"),
        (["--shrink", "0"], "--shrink 0"),
        (["--split", "test"], "--split test: Slide-v0 has no trials"),
    ],
)
def test_bad_input(words, capsys, change, message):
    assert main([*words, *change]) == 2
    assert message in capsys.readouterr().err
    assert main(["demo", "Slide-v0"]) == 2
    assert "no expert; pass --policy" in capsys.readouterr().err
    assert main(["demo", "Slyde-v0"]) == 2
    assert "'Slide-v0'" in capsys.readouterr().err
