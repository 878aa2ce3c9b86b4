import json
import subprocess
import sys

import pytest

from fleetgym.cli import doctor, main
from fleetgym.core import render
from fleetgym.core.optional import EXTRAS, Extra


def test_the_findings_of_this_machine(capsys):
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] and found["packages"]["mujoco"] and found["cores"] >= 1
    if sys.platform.startswith("linux"):
        assert set(found["gl"]["tried"]) == {"egl", "osmesa", "glfw"}
        assert all(outcome["message"] for outcome in found["gl"]["tried"].values())
    assert found["gl"]["works"] or found["gl"]["advice"]
    assert found["ffmpeg"]["works"] and found["extras"]["dev"]["installed"]


@pytest.fixture
def quick(monkeypatch):
    """Back ends that answer at once; returns the table of answers."""
    answers = {
        "egl": (False, "egl: no\n device"),
        "osmesa": (False, "osmesa: none"),
        "glfw": (False, "glfw: no display"),
    }
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(render, "probe_gl", lambda name: answers[name])
    monkeypatch.setattr(render, "choose_gl", lambda: "disable")
    return answers


def test_no_gl_is_said_in_a_line_and_is_no_failure(capsys, quick):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "GL egl             no: no device" in lines
    (line,) = [line for line in lines if line.startswith("rendering ")]
    assert "off: no OpenGL" in line and "pip install" in line


def test_a_back_end_that_works_is_offered(capsys, quick, monkeypatch):
    quick["osmesa"] = (True, "osmesa: renders (9 ms a small frame)")
    assert "off: set MUJOCO_GL=osmesa" in run(capsys)
    monkeypatch.setattr(render, "choose_gl", lambda: "osmesa")
    assert "rendering          osmesa" in run(capsys)


def run(capsys):
    assert main(["doctor"]) == 0
    return capsys.readouterr().out


def test_a_missing_extra_has_its_line(capsys, quick, monkeypatch):
    monkeypatch.setitem(EXTRAS, "moon", Extra(("no_such_module",), "going to the moon"))
    assert "extra moon         going to the moon: pip install 'fleetgym[moon]'" in run(capsys)


def test_no_ffmpeg_is_no_failure(capsys, quick, monkeypatch):
    def absent(*arguments, **options):
        raise FileNotFoundError("ffmpeg")

    monkeypatch.setattr(subprocess, "run", absent)
    assert doctor._ffmpeg()["works"] is False
    assert "films              no: ffmpeg; pip install imageio-ffmpeg" in run(capsys)


def test_words_that_do_not_fit(capsys):
    assert main(["doctor", "heal"]) == 2
    assert "fleetgym doctor" in capsys.readouterr().err
