import contextlib
import signal

import minari
import numpy as np
import pytest

from fleetgym.cli import main, targets
from fleetgym.core import Demonstrations


def test_expert_demonstrations_of_a_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    assert main(["collect", "reach-v3", "--episodes", "3", "--seed", "7", "--out", str(tmp_path / "reach-v3")]) == 0
    out = capsys.readouterr().out
    assert "reach-v3: solved 3/3 = 1.00" in out and "CPU-seconds" in out and "written to" in out
    demos = Demonstrations.load(tmp_path / "reach-v3").expect(39, 4)
    assert [episode.seed for episode in demos] == [7, 8, 9] and all(episode.success for episode in demos)
    assert demos.info["task"] == "reach-v3" and demos.info["expert"] == "expert of reach-v3"
    dataset = minari.load_dataset("reach-v3")
    env = dataset.recover_environment()
    np.testing.assert_array_equal(env.reset(seed=8)[0], demos[1].observations[0])
    env.close()

    assert main(["collect", "MetaWorld/reach-v3", "--out", str(tmp_path / "reach-v3")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_workers_collect_the_same(tmp_path, capsys):
    words = ["collect", "push-v3", "--episodes", "4", "--noise", "0.3", "--keep", "all", "--max-steps", "20"]
    assert main([*words, "--out", str(tmp_path / "one")]) == 0
    assert main([*words, "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    assert main([*words, "--out", str(tmp_path / "all"), "--goals", "held_out"]) == 0
    one, two, other = (Demonstrations.load(tmp_path / name) for name in ("one", "two", "all"))
    for a, b in zip(one, two, strict=True):
        np.testing.assert_array_equal(a.observations, b.observations)
        np.testing.assert_array_equal(a.actions, b.actions)
    assert one.info == two.info and one.info["action_noise"] == 0.3
    assert not np.array_equal(one[0].observations[0], other[0].observations[0])


def test_demonstrations_of_reading(tmp_path, capsys):
    words = ["collect", "OfficeNav-Symbolic-v0", "--episodes", "4", "--out", str(tmp_path / "read"), "--num-envs", "2"]
    assert main(words) == 0
    assert "solved 4/4" in capsys.readouterr().out
    demos = Demonstrations.load(tmp_path / "read")
    dataset = minari.MinariDataset(tmp_path / "read" / "data")
    env = dataset.recover_environment()
    for demo, stored in zip(demos, dataset.iterate_episodes(), strict=True):
        read = demo.observations["on_sign"] == 1
        assert read.any() and (demo.observations["sign"][read] > 0).any()
        np.testing.assert_array_equal(demo.observations["image"], stored.observations["image"])
        observation, _ = env.reset(seed=demo.seed)
        for step, action in enumerate(demo.actions):
            np.testing.assert_array_equal(observation["sign"], demo.observations["sign"][step])
            observation, _, terminated, _, _ = env.step(action)
        assert terminated
    env.close()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_keeps_what_is_finished(tmp_path, capsys, monkeypatch, workers):
    @contextlib.contextmanager
    def impatient(total, description):
        seen = []

        def advance(*_):
            seen.append(1)
            if len(seen) == 20:
                signal.raise_signal(signal.SIGINT)

        yield advance

    monkeypatch.setattr(targets, "episode_bar", impatient)
    # A shell's background jobs ignore Ctrl-C, and so would the tests that are run in one: without end.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    words = ["collect", "reach-v3", "--episodes", "100000", "--workers", workers, "--max-steps", "10", "--keep", "all"]
    try:
        assert main([*words, "--out", str(tmp_path / "part")]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "interrupted\n"
    kept = Demonstrations.load(tmp_path / "part")
    assert len(kept) == 20 and kept.info["interrupted"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["reech-v3"], "unknown task or environment 'reech-v3'; nearest: 'reach-v3'"),
        (["Pendulum-v1"], "no expert; pass --policy"),
        (["reach-v3", "--episodes", "0"], "--episodes 0"),
        (["reach-v3", "--workers", "0"], "--workers 0"),
        (["reach-v3", "--noise", "-1"], "must not be negative"),
        (["reach-v3", "--policy", "nowhere"], "nowhere does not exist"),
        (["reach-v3", "--max-steps", "1"], "none of the 20 episodes"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(tmp_path, capsys, words, message):
    assert main(["collect", *words, "--out", str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_demonstrations_of_an_expert_that_is_told_its_environment(tmp_path, capsys):
    words = ["collect", "OfficeNav3D-v0", "--episodes", "3", "--keep", "all", "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    capsys.readouterr()
    demos = Demonstrations.load(tmp_path / "one")
    # In its thirty steps a first episode does not always reach the goal by way of the sign.
    assert len(demos) == 3 and any(demo.success for demo in demos)
    assert main([*words, str(tmp_path / "two"), "--num-envs", "2"]) == 2
    assert "num_envs=2: a OracleReader3D plays in one environment at a time" in capsys.readouterr().err
