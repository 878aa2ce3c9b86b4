"""The zoo of Meta-World policies: small, but from demonstrations to measured success."""

import pytest
import torch

from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos import meta_world as module
from fleetgym.benchmarks.zoos.meta_world import MetaWorld
from fleetgym.core.errors import UserError
from fleetgym.core.rollout import evaluate
from fleetgym.envs import suite


def test_two_tasks(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_AT_ONCE", 2)
    settings = {"tasks": ("reach-v3", "button-press-topdown-v3"), "hidden": 8, "steps": (15, 30), "max_steps": 60}
    settings |= {"policies": 4, "episodes": 2, "demonstrations": (1, 2), "noise": (0.0, 0.1)}
    zoo = make_zoo("meta_world", folder=tmp_path, progress=False, **settings)
    assert zoo.targets["task"].tolist() == [0, 0, 1, 1] and zoo.network["observation_size"] == 39
    assert set(zoo.targets["success"].tolist()) <= {0.0, 0.5, 1.0}
    assert (zoo.weights["normaliser.mean"] == zoo.weights["normaliser.mean"][0]).all()
    assert zoo.weights["normaliser.std"].min() > 0 and not (zoo.weights["normaliser.mean"] == 0).all()
    assert (zoo.weights["core.weight_hh_l0"][0] - zoo.weights["core.weight_hh_l0"][1]).abs().max() > 0.1
    env = suite("meta_world").make_fn("reach-v3", goals="held_out")
    seeds = range(module._EVALUATION_SEED, module._EVALUATION_SEED + 2)
    again = evaluate(zoo.module(1), env, seeds, max_steps=60, stop_on_success=True, num_envs=2)
    assert again.success == float(zoo.targets["success"][1])
    assert torch.equal(zoo.groups, torch.arange(4))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": ("reach-v9",)}, "'reach-v9'"),
        ({"cell": "gnu"}, "'gnu'"),
        ({"policies": 0}, "policies=0"),
        ({"steps": (9, 3)}, r"steps=\(9, 3\)"),
    ],
)
def test_bad_settings(change, words):
    with pytest.raises(UserError, match=words):
        MetaWorld(**change)
