"""``fleetgym merge`` on plain state dicts and with statistics; local training held near to the server's weights."""

import json

import pytest
import torch
from torch import nn

from fleetgym.agents.imitation import FleetLearner, ImitationConfig
from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.cli import main
from fleetgym.core import UserError, WeightSpec
from fleetgym.core.checkpoint import Checkpoint, load_tensors, save_tensors
from fleetgym.core.demonstrations import SequenceBatch
from fleetgym.core.files import write_json
from fleetgym.merging import merge, save_statistics
from fleetgym.merging.statistics import statistics


def policy(seed):
    torch.manual_seed(seed)
    return RecurrentPolicy(5, 2, hidden=8)


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    x, a = (torch.randn(4, 8, n, generator=generator) for n in (5, 2))
    return SequenceBatch(x, a, torch.ones(4, 8, dtype=torch.bool))


def test_state_dicts_of_a_declared_network_are_merged(tmp_path, capsys):
    from stable_baselines3 import PPO

    from fleetgym.agents.sb3 import actor

    nets = [actor(PPO("MlpPolicy", "Pendulum-v1", seed=seed, device="cpu")) for seed in range(2)]
    files = [str(tmp_path / f"{i}.safetensors") for i in range(2)]
    for net, file in zip(nets, files):
        save_tensors(file, net.state_dict())
    spec, out = tmp_path / "spec.json", tmp_path / "merged.safetensors"
    write_json(spec, WeightSpec.from_module(nets[0]).to_dict())
    for method in ("fleet_merge", "universe"):
        assert main(["merge", method, *files, "--spec", str(spec), "--out", str(out), "--overwrite"]) == 0
        assert "of 2 state dicts" in capsys.readouterr().out
        wanted = merge(method, nets)
        assert wanted.distance_after < wanted.distance_before
        assert all(torch.allclose(load_tensors(out)[key], v, atol=1e-6) for key, v in wanted.weights.items())
    nets[0].load_state_dict(load_tensors(out))

    for words, message in (
        (["fleet_merge", *files, "--out", str(tmp_path / "m.safetensors")], "give --spec"),
        (["fleet_merge", *files, "--spec", str(spec), "--out", str(tmp_path / "m")], ".safetensors file"),
        (["fleet_merge", "a.zip", "b.zip", "--out", str(tmp_path / "m")], "hold pickles"),
        (["fleet_merge", *files, "--spec", files[0], "--out", str(tmp_path / "m.safetensors")], "not valid JSON"),
    ):
        assert main(["merge", *words]) == 2
        assert message in capsys.readouterr().err
    spec.write_text(json.dumps({"schema": 1}))
    assert main(["merge", "average", *files, "--spec", str(spec), "--out", str(tmp_path / "m.safetensors")]) == 2
    assert "does not hold a WeightSpec" in capsys.readouterr().err


def test_statistics_and_a_base_come_from_files(tmp_path, capsys):
    policies = [policy(seed) for seed in range(2)]
    runs = [str(Checkpoint.save(tmp_path / str(i), p).path) for i, p in enumerate(policies)]
    sent = [statistics(p, batch(i)) for i, p in enumerate(policies)]
    files = [str(tmp_path / f"sent{i}.safetensors") for i in range(2)]
    for file, tensors in zip(files, sent):
        save_statistics(file, tensors)
    assert main(["merge", "regmean", *runs, "--statistics", *files, "--out", str(tmp_path / "m")]) == 0
    wanted = merge("regmean", policies, statistics=sent).weights
    assert all(torch.equal(Checkpoint.load(tmp_path / "m").weights[key], v) for key, v in wanted.items())
    assert main(["merge", "ties", *runs, "--base", runs[0], "--out", str(tmp_path / "n")]) == 0
    wanted = merge("ties", policies, base=policies[0]).weights
    assert all(torch.equal(Checkpoint.load(tmp_path / "n").weights[key], v) for key, v in wanted.items())
    capsys.readouterr()
    assert main(["merge", "regmean", *runs, "--statistics", files[0], "--out", str(tmp_path / "o")]) == 2
    assert "--statistics has 1 files for 2 models" in capsys.readouterr().err


def learner(**options):
    config = ImitationConfig(steps=60, batch_size=2, learning_rate=1e-2, **options)
    return FleetLearner([policy(0), policy(1)], [batch(0), batch(1)], config)


def apart(states):
    return sum(float((states[0][k] - states[1][k]).square().sum()) for k in states[0])


def test_fedprox_holds_robots_near_to_what_they_received():
    distances = []
    for proximal in (0.0, 1.0):
        fleet = learner(proximal=proximal)
        fleet.receive([policy(5).state_dict()])
        assert apart(fleet.stack.state_dicts()) == 0.0
        fleet.train(30)
        distances.append(apart(fleet.stack.state_dicts()))
    assert 0 < distances[1] < 0.5 * distances[0]
    with pytest.raises(UserError, match="proximal=-1"):
        learner(proximal=-1)


def test_fedprox_resumes_to_the_same_weights():
    whole = learner(proximal=0.5)
    whole.receive([policy(5).state_dict()])
    whole.train(6)
    tensors, meta = whole.state()
    resumed = learner(proximal=0.5)
    resumed.load_state({key: value.clone() for key, value in tensors.items()}, meta)
    for fleet in (whole, resumed):
        fleet.train(4)
    for a, b in zip(whole.stack.state_dicts(), resumed.stack.state_dicts()):
        assert all(torch.equal(v, b[key]) for key, v in a.items())


def test_the_proximal_gradient_is_that_of_the_term():
    fleet = learner(proximal=0.3)
    fleet.receive([policy(5).state_dict()])
    with torch.no_grad():
        for p in fleet.stack.parameters():
            p += 0.1
            p.grad = torch.zeros_like(p)
    fleet._hold()
    assert all(torch.allclose(p.grad, torch.full_like(p, 0.03), atol=1e-6) for p in fleet.stack.parameters())
    assert isinstance(fleet.stack, nn.Module)
