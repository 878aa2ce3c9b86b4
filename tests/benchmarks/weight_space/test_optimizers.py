import dataclasses

import pytest
import torch

from fleetgym.benchmarks import learned_optimizer as families
from fleetgym.benchmarks.weight_space import TASKS, command
from fleetgym.benchmarks.weight_space.optimizers import OptimizerMLP
from fleetgym.benchmarks.weight_space.task import Job, settings
from fleetgym.core import UserError
from fleetgym.merging.learned_optimizer import unroll

pytest.importorskip("sklearn")

TINY = {"steps": 3, "horizon": 4, "truncation": 2, "runs": 1, "hidden": 4, "tuning": 1, "networks": 2, "every": 2}


@pytest.fixture
def tiny(monkeypatch):
    """The perceptrons' task in seconds."""

    def make(width=4):
        task = families.mlp_task(width)
        return dataclasses.replace(task, sets={name: (x[:64], y[:64]) for name, (x, y) in task.sets.items()})

    monkeypatch.setitem(families.FAMILIES, "mlp", families.Family(make, 4, 6))
    return OptimizerMLP(**TINY)


def job(tmp_path, method, seed=0, device="cpu"):
    return Job("optimizer_mlp", method, seed, device, tmp_path / f"{method}-{seed}")


def test_rows_of_all_methods_and_their_pictures(tiny, tmp_path):
    rows = []
    for method in tiny.methods():
        row = tiny.run(job(tmp_path, method))
        assert [step for step, _ in row["curve"]] == [step for step, _ in row["other_width"]["curve"]] == [0, 2, 4]
        assert row["score"] == pytest.approx(row["curve"][-1][1], rel=1e-4) != row["other_width"]["score"]
        assert ("tuned_again" in row) == (method in ("sgdm", "adam"))
        rows.append({"method": method, **row})
    # All methods meet the same networks.
    assert len({row["curve"][0][1] for row in rows}) == 1
    scores = {row["method"]: row["score"] for row in rows}
    # On perceptrons nfn is unf by another way.
    assert scores.pop("nfn") == pytest.approx(scores["unf"], rel=1e-5)
    assert len(set(scores.values())) == 4
    assert tiny.plot(rows, tmp_path / "curves.png").stat().st_size > 5000
    text = command.table([{"task": "optimizer_mlp", "seed": 0, **row} for row in rows])
    assert "`unf`" in text and "lower is better" in text


def test_a_learned_rule_begins_as_momentum(tiny, tmp_path):
    still = dataclasses.replace(tiny, last=0.0, learning_rate=1e-12)
    task = families.FAMILIES["mlp"].make(4)
    rule = still.learn(task, job(tmp_path, "unf"))
    plain = families.Momentum(task.spec, still.alpha, still.gamma)
    ends = [unroll(r, task, 4, (5,)).measured["train"][0, 0, -1] for r in (rule, plain)]
    assert torch.allclose(*ends, rtol=1e-5)
    taught = dataclasses.replace(tiny, learning_rate=0.05).learn(task, job(tmp_path, "unf", 1))
    assert not torch.allclose(unroll(taught, task, 4, (5,)).measured["train"][0, 0, -1], ends[0], rtol=1e-3)


def test_stopped_meta_training_goes_on(tiny, tmp_path):
    task = families.FAMILIES["mlp"].make(4)
    whole = tiny.learn(task, job(tmp_path, "unf"))
    again = tiny.learn(task, job(tmp_path, "unf"))  # from the state of the last step: nothing is left to do
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))
    other = tiny.learn(task, job(tmp_path, "unf", 1))
    assert not torch.equal(whole.trunk[0].weight, other.trunk[0].weight)


@pytest.mark.parametrize("name", [name for name in TASKS.names() if name.startswith("optimizer_")])
def test_tasks_are_there(name):
    task = settings(TASKS.get(name), "quick")
    assert task.name == name and task.methods()[:2] == ("sgdm", "adam") and task.methods()[-1] == "unf"
    assert task.horizon % task.truncation == 0


def test_bad_settings(tiny, tmp_path):
    with pytest.raises(UserError, match=r"optimizer_mlp.horizon=50 is no multiple of optimizer_mlp.truncation=20"):
        OptimizerMLP(horizon=50)
    with pytest.raises(UserError, match=r"networks=501"):
        OptimizerMLP(networks=501)
    with pytest.raises(UserError, match=r"optimizer_mlp.runs=0"):
        OptimizerMLP(runs=0)
    with pytest.raises(UserError, match="unknown method 'lion'"):
        tiny.run(job(tmp_path, "lion"))
    with pytest.raises(UserError, match="--device cuda"):
        tiny.run(job(tmp_path, "sgdm", device="cuda"))
