import io
import os
import subprocess
import sys

import numpy as np
import pytest

from fleetgym.cli import main
from fleetgym.cli.play import braille, half_blocks, sign_text
from fleetgym.envs.office_nav import reference, signs
from fleetgym.envs.office_nav.layout import LAYOUTS

KEYS = {0: "a", 1: "d", 2: "w", 3: " "}


def play(monkeypatch, capsys, keys, *arguments):
    monkeypatch.setattr(sys, "stdin", io.StringIO(keys))
    code = main(["play", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_sign_is_shown_where_it_is_read(monkeypatch, capsys):
    code, out, _ = play(monkeypatch, capsys, "wwwwwdwwq", "OfficeNav-v0", "--seed", "3")
    assert code == 0
    before, after = out.split("step 7, return -0.35", 1)
    assert "┌" not in before and "┌" in after and "step 8, return -0.40" in after
    assert any(0x2800 < ord(character) < 0x2900 for character in after)


def test_an_episode_is_won_and_the_trial_goes_on(monkeypatch, capsys):
    import gymnasium as gym

    env = gym.make("OfficeNav-Symbolic-v0")
    goal = env.reset(seed=5)[1]["goal"]
    keys = "".join(KEYS[action] for action in reference.path_to_office(LAYOUTS["standard"], goal))
    code, out, _ = play(monkeypatch, capsys, keys + "wrzn", "OfficeNav-Symbolic-v0", "--seed", "5")
    assert code == 0 and "You are in the blue office!" in out and "The episode is over: r goes on." in out
    assert "trial 0, episode 2, step 0" in out and "'z' is no key." in out and "trial 1, episode 1, step 0" in out


@pytest.mark.parametrize("variant", ["OfficeNav-Map-v0", "OfficeNav-Released-v0", "OfficeNav3D-v0"])
def test_other_variants(monkeypatch, capsys, variant):
    code, out, _ = play(monkeypatch, capsys, "wwa dq", variant, "--seed", "0")
    assert code == 0 and "step 5" in out


def test_only_what_the_agent_sees(monkeypatch, capsys):
    code, out, _ = play(monkeypatch, capsys, "q", "OfficeNav-v0", "--view", "--seed", "0")
    assert code == 0 and out.count("▀") == 28 * 56


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["MetaWorld/reach-v3"], "cannot be played on the keyboard; play one of OfficeNav-v0"),
        (["OfficeNav-v0", "--split", "tst"], "split 'tst'"),
        (["OfficeNav-v0", "--task-id", "9999"], "task_id 9999"),
        (["OfficeNav-v0", "--seed", "-1"], "seed -1"),
    ],
)
def test_bad_input(monkeypatch, capsys, arguments, message):
    code, _, err = play(monkeypatch, capsys, "q", *arguments)
    assert code == 2 and message in err and err.count("\n") == 1


def test_pictures_in_characters():
    sign = signs.text_signs(["upper left corner"])[0]
    dots = sum(bin(ord(character) - 0x2800).count("1") for character in braille(sign) if character not in " \n")
    assert dots == (sign[..., 0] == 0).sum()
    assert half_blocks(np.zeros((3, 5, 3), np.uint8)).count("▀") == 10
    assert sign_text(sign, True).startswith("┌" + "─" * 42)


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no terminals here")
def test_on_a_terminal():
    leader, follower = os.openpty()
    command = [sys.executable, "-m", "fleetgym", "play", "OfficeNav-v0", "--seed", "3"]
    process = subprocess.Popen(command, stdin=follower, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    os.close(follower)
    screen = b""
    while b"q quit" not in screen and (piece := os.read(process.stdout.fileno(), 4096)):
        screen += piece
    os.write(leader, b"w\x1b[Aq")  # the arrow upwards is forward, too
    out, err = process.communicate(timeout=20)
    os.close(leader)
    assert process.returncode == 0 and b"step 2, return -0.10" in out, err
