"""Merging policies that lie in files, one at a time."""

import weakref

import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.core.checkpoint import Checkpoint, load_tensors, save_tensors
from fleetgym.merging import merge, merge_files
from fleetgym.merging.fleet_merge import RunningMean, align_one_by_one
from fleetgym.merging.matching import MatchResult
from fleetgym.merging.mergers import average, mean_distance


def policy(seed, hidden=12, **options):
    torch.manual_seed(seed)
    return RecurrentPolicy(5, 2, hidden=hidden, **options)


@pytest.fixture
def fleet(tmp_path):
    policies = [policy(seed) for seed in range(5)]
    return policies, [Checkpoint.save(tmp_path / str(i), p).path for i, p in enumerate(policies)]


@pytest.mark.parametrize("method", ["average", "fleet_merge"])
@pytest.mark.parametrize("options", [{}, {"coefficients": [1, 2, 0, 4, 1]}, {"norms": False}, {"norms": True}])
def test_files_give_what_policies_in_memory_give(fleet, tmp_path, method, options):
    policies, paths = fleet
    merged = merge_files(paths, tmp_path / "out", method=method, **options)
    wanted = merge(method, policies, **options)
    assert merged.elements == wanted.elements
    assert merged.distance_before == pytest.approx(wanted.distance_before)
    assert merged.distance_after == pytest.approx(wanted.distance_after)
    assert (merged.distance_after < merged.distance_before) == (method == "fleet_merge")
    saved = Checkpoint.load(tmp_path / "out").weights
    for key, value in wanted.weights.items():
        assert torch.allclose(merged.weights[key], value, atol=1e-6)
        assert torch.equal(saved[key], merged.weights[key])


def test_policies_with_statistics_of_their_own_are_pooled(tmp_path):
    policies = [policy(seed) for seed in range(3)]
    for i, p in enumerate(policies):
        p.normaliser.mean.fill_(float(i))
        p.normaliser.std.fill_(1.0 + i)
    paths = [Checkpoint.save(tmp_path / str(i), p).path for i, p in enumerate(policies)]
    merged, wanted = merge_files(paths, method="average"), merge("average", policies)
    assert all(torch.allclose(merged.weights[key], v, atol=1e-5) for key, v in wanted.weights.items())
    assert torch.allclose(merged.weights["normaliser.mean"], torch.ones(5))


def test_no_more_than_three_sets_of_weights_are_alive():
    spec = WeightSpec.from_module(policy(0))
    alive, most = [], []

    def reader(seed):
        def read():
            # Who still holds a policy that was read before?
            most.append(sum(reference() is not None for reference in alive))
            state = {key: value.clone() for key, value in policy(seed).state_dict().items()}
            alive.append(weakref.ref(state["encoder.weight"]))
            return state

        return read

    done = align_one_by_one(spec, [reader(seed) for seed in range(6)], max_passes=3)
    assert len(done.history) > 2  # passes against the mean of all others, too
    assert len(most) > 18 and max(most) <= 1  # at most the one just read; besides it the mean, and a moved copy


def test_no_file_stays_in_memory(fleet, tmp_path, monkeypatch):
    _, paths = fleet
    alive, most, load = [], [], Checkpoint.load

    def tracked(path):
        most.append(sum(reference() is not None for reference in alive))
        loaded = load(path)
        alive.append(weakref.ref(loaded.weights["encoder.weight"]))
        return loaded

    monkeypatch.setattr(Checkpoint, "load", tracked)
    merge_files(paths, tmp_path / "out")
    assert len(most) > 6 and max(most) == 0


def test_a_running_mean_comes_and_goes():
    states = [policy(seed).state_dict() for seed in range(4)]
    spec = WeightSpec.from_module(policy(0))
    running = RunningMean(spec)
    for state, weight in zip(states, (1.0, 2.0, 0.0, 3.0)):
        running.change(state, weight)
    wanted = average(states, [1, 2, 0, 3])
    like = {key: value.new_empty(0) for key, value in states[0].items()}
    assert all(torch.allclose(running.weights(like)[key], v, atol=1e-6) for key, v in wanted.items())
    without = running.without(states[1], 2.0)
    wanted = average(states, [1, 0, 0, 3])
    assert all(torch.allclose(without[key], v, atol=1e-6) for key, v in wanted.items())
    running.change(states[3], -3.0)
    wanted = average(states, [1, 2, 0, 0])
    assert all(torch.allclose(running.weights(like)[key], v, atol=1e-6) for key, v in wanted.items())
    plain = RunningMean(spec)
    for state in states:
        plain.change(state, 1.0)
    assert plain.distance(4) == pytest.approx(mean_distance(spec, states), rel=1e-9)
    same = RunningMean(spec)
    for _ in range(3):
        same.change(states[0], 0.3)
    assert same.distance(3) == 0.0
    assert all(torch.equal(same.weights(like)[key], v) for key, v in states[0].items())


def test_plain_state_dicts(tmp_path):
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        nets.append(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)))
        save_tensors(tmp_path / f"{seed}.safetensors", nets[-1].state_dict())
    files = [tmp_path / f"{seed}.safetensors" for seed in range(3)]
    spec = WeightSpec.from_module(nets[0])
    merged = merge_files(files, tmp_path / "out.safetensors", spec=spec)
    wanted = merge("fleet_merge", nets)
    written = load_tensors(tmp_path / "out.safetensors")
    assert all(torch.allclose(written[key], v, atol=1e-6) for key, v in wanted.weights.items())
    assert torch.equal(written["0.weight"], merged.weights["0.weight"])
    with pytest.raises(UserError, match="plain state dicts need spec="):
        merge_files(files)


def test_statistics_of_batches_are_averaged_and_not_scaled(tmp_path):
    nets, files = [], [tmp_path / f"{i}.safetensors" for i in range(3)]
    for seed, file in enumerate(files):
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
        net[1].running_var += torch.rand(8)
        nets.append(net.eval())
        save_tensors(file, net.state_dict())
    spec = WeightSpec.from_module(nets[0], torch.randn(3, 6))
    merged, wanted = merge_files(files, spec=spec), merge("fleet_merge", nets, example_input=torch.randn(3, 6))
    assert merged.history[-1]["norm_factor"] == pytest.approx(wanted.history[-1]["norm_factor"])
    assert merged.history[-1]["norm_factor"] > 1.05
    assert all(torch.allclose(merged.weights[key], value, atol=1e-6) for key, value in wanted.weights.items())
    variances = [state["1.running_var"] for state in wanted.aligned]
    torch.testing.assert_close(merged.weights["1.running_var"], sum(variances) / 3)


def test_an_alignment_that_parts_the_networks_is_undone(monkeypatch):
    from fleetgym.merging import fleet_merge

    policies = [policy(0) for _ in range(3)]
    for seed, p in enumerate(policies):
        p.normaliser.mean.fill_(0.1 * seed)
    spec, states = WeightSpec.from_module(policies[0]), [p.state_dict() for p in policies]

    def bad(*_, **__):
        return MatchResult(spec.random(0), 1.0, 0.5, 0.0, 1)

    monkeypatch.setattr(fleet_merge, "match", bad)
    for reference in ("mean", "first"):
        done = align_one_by_one(spec, [lambda s=s: s for s in states], reference=reference, coefficients=[1, 2, 3])
        assert all(element.is_identity for element in done.elements) and done.agree
        wanted = average(states, [1, 2, 3])
        assert all(torch.allclose(done.mean[key], value, atol=1e-6) for key, value in wanted.items())


def test_bad_input_is_named(fleet, tmp_path):
    _, paths = fleet
    with pytest.raises(UserError, match="unknown merger that works one policy at a time 'regmean'"):
        merge_files(paths, method="regmean")
    with pytest.raises(UserError, match="at least two"):
        merge_files(paths[:1])
    with pytest.raises(UserError, match="unknown option of matcher 'lap' 'sweep'; nearest: 'sweeps'"):
        merge_files(paths, matcher="lap", sweep=2)
    other = Checkpoint.save(tmp_path / "wide", policy(9, hidden=8)).path
    with pytest.raises(UserError, match="wide cannot be merged with .*: its config is"):
        merge_files([*paths, other], tmp_path / "out")
    sick = policy(0)
    with torch.no_grad():
        sick.encoder.weight[0, 0] = float("nan")
    sick = Checkpoint.save(tmp_path / "sick", sick).path
    with pytest.raises(UserError, match="sick: 'encoder.weight' has 1 NaN"):
        merge_files([*paths, sick], tmp_path / "out")
    with pytest.raises(UserError, match="out='.*out.safetensors': such policies are merged into a folder"):
        merge_files(paths, tmp_path / "out.safetensors")
    plain = [tmp_path / f"{i}.safetensors" for i in range(2)]
    with pytest.raises(UserError, match="out='.*out': such policies are merged into a file that ends in .safetensors"):
        merge_files(plain, tmp_path / "out", spec=WeightSpec.from_module(policy(0)))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.safetensors").exists()
