import json

import pytest
import torch

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.cli import main
from fleetgym.core import Checkpoint, EvalRecord
from fleetgym.core.rollout import evaluate

FAST = ["--episodes", "2", "--max-steps", "5"]


@pytest.fixture
def policy():
    torch.manual_seed(0)
    return RecurrentPolicy(39, 4, hidden=8)


@pytest.fixture
def checkpoint(tmp_path, policy):
    Checkpoint.save(tmp_path / "robot", policy)
    return tmp_path / "robot"


def test_one_environment(tmp_path, checkpoint, policy, capsys):
    words = ["eval", str(checkpoint), "--env", "MetaWorld/reach-v3", *FAST, "--seed", "5"]
    assert main([*words, "--out", str(tmp_path / "record.json")]) == 0
    out = capsys.readouterr().out
    assert "reach-v3  0/2 = 0.00 (95% interval 0.00 to 0.66)" in out and "record.json" in out
    record = EvalRecord.load(tmp_path / "record.json")
    assert record.system == "robot" and record.task == "reach-v3" and list(record.seeds) == [5, 6]
    assert record.provenance["weights_sha256"] == Checkpoint.load(checkpoint).weights_sha256

    from fleetgym.envs import suite

    env = suite("meta_world").make_fn("reach-v3", goals="held_out")
    assert evaluate(policy, env, [5, 6], max_steps=5).returns == record.returns
    assert main([*words, "--out", str(tmp_path / "record.json")]) == 2
    assert "exists already" in capsys.readouterr().err


def test_several_tasks_are_one_record(tmp_path, checkpoint, capsys):
    words = ["eval", str(checkpoint), "--suite", "meta_world", "--tasks", "reach-v3", "push-v3", *FAST]
    assert main([*words, "--json"]) == 0
    record = EvalRecord.from_dict(json.loads(capsys.readouterr().out))
    assert record.per_task() == {"reach-v3": (0, 2), "push-v3": (0, 2)}
    assert record.task == "meta_world/reach-v3,push-v3"
    assert main([*words, "--workers", "2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("all       0/4 = 0.00")


def test_the_task_set_of_the_checkpoint_is_used(tmp_path, capsys):
    Checkpoint.save(tmp_path / "mt", RecurrentPolicy(49, 4, hidden=8), info={"task_set": "mt10"})
    assert main(["eval", str(tmp_path / "mt"), "--env", "reach-v3", *FAST]) == 0
    Checkpoint.save(tmp_path / "other", RecurrentPolicy(49, 4, hidden=8))
    assert main(["eval", str(tmp_path / "other"), "--env", "reach-v3", *FAST]) == 2
    assert "49" in capsys.readouterr().err
    assert main(["eval", str(tmp_path / "other"), "--env", "reach-v3", "--task-set", "mt10", *FAST]) == 0


def test_ctrl_c_keeps_the_finished_tasks(tmp_path, checkpoint, capsys, monkeypatch):
    import fleetgym.core.rollout as module

    real = module.evaluate

    def second_is_interrupted(*args, **options):
        if options["task"] == "push-v3":
            raise KeyboardInterrupt
        return real(*args, **options)

    monkeypatch.setattr(module, "evaluate", second_is_interrupted)
    words = ["eval", str(checkpoint), "--suite", "meta_world", "--tasks", "reach-v3", "push-v3", *FAST]
    assert main([*words, "--out", str(tmp_path / "record.json")]) == 130
    assert not (tmp_path / "record.json").exists()
    assert EvalRecord.load(tmp_path / "record.partial.json").per_task() == {"reach-v3": (0, 2)}


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "either --env"),
        (["--env", "reach-v3", "--suite", "meta_world"], "either --env"),
        (["--env", "reach-v3", "--tasks", "push-v3"], "--tasks goes with --suite"),
        (["--suite", "metaworld"], "'meta_world'"),
        (["--suite", "meta_world", "--tasks", "mt9"], "'mt10'"),
        (["--env", "reech-v3"], "'reach-v3'"),
        (["--env", "Pendulum-v1", "--task-set", "mt10"], "belongs to no suite"),
        (["--env", "Pendulum-v1"], "39"),
        (["--env", "reach-v3", "--out", "record.txt"], ".json"),
    ],
)
def test_bad_input(checkpoint, capsys, words, message):
    assert main(["eval", str(checkpoint), *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_weights_that_are_not_finite(tmp_path, policy, capsys):
    policy.encoder.weight.data[0, 0] = float("nan")
    Checkpoint.save(tmp_path / "sick", policy)
    assert main(["eval", str(tmp_path / "sick"), "--env", "reach-v3"]) == 2
    assert "encoder.weight" in capsys.readouterr().err
