"""``fleetgym train bc``: it trains, a killed run goes on to the same file, bad input."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from gymnasium import spaces

from fleetgym.cli import main
from fleetgym.core import Checkpoint, Demonstrations, Episode

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def episodes(count=6, time=20, size=3, seed=0):
    rng = np.random.default_rng(seed)
    out = []
    for i in range(count):
        observations = rng.normal(size=(time + 1, size))
        actions = np.tanh(observations[:-1, :2]).astype(np.float32)
        zeros = np.zeros(time)
        out.append(Episode(i, observations, actions, zeros, zeros > 1, zeros > 1, True))
    return out


@pytest.fixture
def dataset(tmp_path):
    Demonstrations(episodes()).save(tmp_path / "demos")
    return tmp_path / "demos"


def test_trains_and_writes_a_checkpoint(dataset, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        main(["train", "bc", str(dataset), "--out", str(out), "--steps", "150", "--cell", "mlp", "--hidden", "16"]) == 0
    )
    assert "after 150 steps" in capsys.readouterr().out
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    checkpoint = Checkpoint.load(out / "checkpoints" / "last")
    assert checkpoint.info["episodes"] == 6
    mean = Demonstrations.load(dataset).statistics().mean
    np.testing.assert_allclose(checkpoint.weights["normaliser.mean"], mean, atol=1e-6)
    action, _ = checkpoint.module().predict(np.zeros(3, np.float32))
    assert action.shape == (2,)


def test_a_killed_run_resumes_to_the_same_file(dataset, tmp_path):
    def command(out, *more):
        words = [
            "train",
            "bc",
            str(dataset),
            "--out",
            str(tmp_path / out),
            "--steps",
            "400",
            "--save-every",
            "0",
            *more,
        ]
        return [sys.executable, "-m", "fleetgym", *words]

    subprocess.run(command("whole"), check=True, env=ENVIRONMENT, capture_output=True)
    process = subprocess.Popen(command("killed"), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (tmp_path / "killed" / "state.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "checkpoints").exists()
    subprocess.run(command("killed", "--resume"), check=True, env=ENVIRONMENT, capture_output=True)
    files = [tmp_path / out / "checkpoints" / "last" / "model.safetensors" for out in ("whole", "killed")]
    assert files[0].read_bytes() == files[1].read_bytes()
    metrics = [(tmp_path / out / "metrics.jsonl").read_text() for out in ("whole", "killed")]
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "bcc"], "unknown training system 'bcc'; nearest: 'bc'"),
        (["train", "--out", "x"], "the name comes before '--out'"),
        (["train", "bc", "--out", "x"], "no dataset"),
        (["train", "bc", "nowhere", "--out", "x"], "nowhere"),
        (["train", "bc", "{dataset}", "--out", "{dataset}"], "not empty and not a run's folder"),
        (["train", "bc", "{dataset}", "--out", "x", "--steps", "0"], "steps=0"),
    ],
)
def test_bad_input(dataset, tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    code = main([word.format(dataset=dataset) for word in words])
    assert code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_runs_with_other_statistics_merge(dataset, tmp_path):
    Demonstrations(episodes(seed=1)).save(tmp_path / "other")
    for i, path in enumerate((dataset, tmp_path / "other")):
        assert main(["train", "bc", str(path), "--out", str(tmp_path / str(i)), "--steps", "2", "--hidden", "8"]) == 0
    assert main(["merge", "fleet_merge", str(tmp_path / "0"), str(tmp_path / "1"), "--out", str(tmp_path / "m")]) == 0
    means = [Checkpoint.load(tmp_path / f"{i}/checkpoints/last").weights["normaliser.mean"] for i in range(2)]
    merged = Checkpoint.load(tmp_path / "m")
    np.testing.assert_allclose(merged.weights["normaliser.mean"], (means[0] + means[1]) / 2, atol=1e-6)


def test_datasets_that_do_not_fit(dataset, tmp_path, capsys):
    Demonstrations(episodes(size=4)).save(tmp_path / "other")
    assert main(["train", "bc", str(dataset), str(tmp_path / "other"), "--out", str(tmp_path / "run")]) == 2
    assert "do not concatenate" in capsys.readouterr().err


def test_resume_with_another_config(dataset, tmp_path, capsys):
    base = ["train", "bc", str(dataset), "--out", str(tmp_path / "run"), "--hidden", "8"]
    assert main([*base, "--steps", "5"]) == 0
    assert main([*base, "--steps", "5"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main([*base, "--steps", "6", "--resume"]) == 2
    assert "imitation.steps (folder: 5, now: 6)" in capsys.readouterr().err
    assert main([*base, "--steps", "5", "--resume"]) == 0


def test_discrete_actions(tmp_path, capsys):
    discrete = [Episode(0, np.zeros((4, 3)), np.array([0, 1, 1]), *[np.zeros(3)] * 3)]
    Demonstrations(discrete, action_space=spaces.Discrete(2)).save(tmp_path / "discrete")
    assert main(["train", "bc", str(tmp_path / "discrete"), "--out", str(tmp_path / "run")]) == 2
    assert "action space Discrete(2)" in capsys.readouterr().err
