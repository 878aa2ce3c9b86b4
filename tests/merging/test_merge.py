import copy

import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.merging import MERGERS, average, fleet_merge, interpolate, mean_distance, merge


def policy(seed, cell="gru", hidden=16, observation=9, **options):
    torch.manual_seed(seed)
    return RecurrentPolicy(observation, 4, cell, hidden=hidden, **options)


def moved(original, seed):
    other = copy.deepcopy(original)
    spec = WeightSpec.from_module(original)
    other.load_state_dict(spec.apply(original.state_dict(), spec.random(seed)))
    return other


def outputs(module, seed=0):
    size = module.config["observation_size"]
    x = torch.randn(3, 6, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return module(x)[0]


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mlp"])
@pytest.mark.parametrize("method", ["average", "fleet_merge"])
def test_identical_policies_come_back(method, cell):
    one = policy(0, cell)
    result = merge(method, [one, copy.deepcopy(one), copy.deepcopy(one)])
    assert equal(result.weights, one.state_dict())
    assert result.distance_before == result.distance_after == 0.0
    assert all(element.is_identity for element in result.elements)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mlp"])
@pytest.mark.parametrize("matcher", ["lap", "frank_wolfe", "sinkhorn"])
def test_a_moved_copy_merges_back_to_the_same_function(matcher, cell):
    one = policy(1, cell)
    options = {"steps": 60} if matcher == "sinkhorn" else {}
    result = merge("fleet_merge", [one, moved(one, 5)], matcher=matcher, **options)
    assert torch.allclose(outputs(result.module()), outputs(one), atol=1e-5)
    assert result.distance_before > 1 and result.distance_after == pytest.approx(0, abs=1e-9)
    naive = merge("average", [one, moved(one, 5)])
    assert naive.distance_after == naive.distance_before == pytest.approx(result.distance_before)
    assert not torch.allclose(outputs(naive.module()), outputs(one), atol=1e-2)


def test_many_moved_copies_with_noise_merge_to_their_mean():
    one = policy(2, hidden=24)
    fleet = []
    for seed in range(4):
        noisy = copy.deepcopy(one)
        with torch.no_grad():
            for p in noisy.parameters():
                p += 0.3 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        fleet.append(noisy)
    wanted = average([p.state_dict() for p in fleet])
    result = merge("fleet_merge", [fleet[0], *(moved(p, 10 + i) for i, p in enumerate(fleet[1:]))], norms=False)
    assert all(torch.allclose(result.weights[key], wanted[key], atol=1e-6) for key in wanted)
    distances = [entry["distance"] for entry in result.history]
    assert distances[0] == result.distance_before and distances[-1] == pytest.approx(result.distance_after)
    assert distances == sorted(distances, reverse=True)


def test_independent_policies_come_nearer_and_keep_their_functions():
    fleet = [policy(seed, observation=9) for seed in range(4)]
    result = merge("fleet_merge", fleet)
    assert result.distance_after < 0.95 * result.distance_before
    assert result.distance_before == pytest.approx(mean_distance(result.spec, [p.state_dict() for p in fleet]))
    pairs = [(i, j) for i in range(4) for j in range(i)]
    mean = sum(result.spec.distance(fleet[i].state_dict(), fleet[j].state_dict()) for i, j in pairs) / len(pairs)
    assert result.distance_before == pytest.approx(mean)
    for original, element, weights in zip(fleet, result.elements, result.aligned):
        assert equal(result.spec.apply(original.state_dict(), element), weights)
        same = copy.deepcopy(original)
        same.load_state_dict(weights)
        assert torch.allclose(outputs(same), outputs(original), atol=1e-5)
    assert result.elements[0].is_identity or len(result.history) > 2


@pytest.mark.parametrize("matcher", ["lap", "frank_wolfe"])
@pytest.mark.parametrize("reference", ["auto", "first", "mean", 2])
def test_never_worse_than_averaging(matcher, reference):
    base = policy(0, hidden=8)
    for scale in (0.1, 1.0, 3.0):
        fleet = []
        for seed in range(3):
            other = copy.deepcopy(base)
            with torch.no_grad():
                for p in other.parameters():
                    p += scale * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
            fleet.append(other)
        result = merge("fleet_merge", fleet, matcher=matcher, reference=reference)
        assert result.distance_after <= result.distance_before
    assert result.distance_after < result.distance_before  # at 3 x there is something to gain


def test_inputs_stay_and_results_repeat():
    fleet = [policy(seed) for seed in range(3)]
    kept = [copy.deepcopy(p.state_dict()) for p in fleet]
    fleet[1].train()
    fleet[2].eval()
    torch.manual_seed(1)
    first = merge("fleet_merge", fleet)
    torch.manual_seed(2)
    second = merge("fleet_merge", fleet)
    assert equal(first.weights, second.weights) and first.elements == second.elements
    assert all(equal(p.state_dict(), old) for p, old in zip(fleet, kept))
    assert fleet[1].training and not fleet[2].training
    for value in first.weights.values():
        value.zero_()
    first.module()
    assert all(equal(p.state_dict(), old) for p, old in zip(fleet, kept))
    assert not any(v.requires_grad for v in first.weights.values())


def test_coefficients_weigh_the_mean():
    a, b = policy(0), policy(1)
    result = merge("average", [a, b], coefficients=[3, 1])
    for key, value in result.weights.items():
        assert torch.allclose(value, 0.75 * a.state_dict()[key] + 0.25 * b.state_dict()[key], atol=1e-6)
    alone = merge("fleet_merge", [a, b], coefficients=[1, 0])
    assert torch.allclose(outputs(alone.module()), outputs(a), atol=1e-6)
    for bad in ([1], [1, -1], [0, 0], [1, float("nan")]):
        with pytest.raises(UserError, match="coefficients"):
            merge("average", [a, b], coefficients=bad)


def test_policies_with_statistics_of_their_own_are_pooled_first():
    torch.manual_seed(0)
    one = policy(0)
    with torch.no_grad():
        one.normaliser.mean.uniform_(-1, 1)
        one.normaliser.std.uniform_(0.5, 2)
    before = outputs(one)
    other = copy.deepcopy(one).renormalise(one.normaliser.mean + 1.0, one.normaliser.std * 3)
    kept = [copy.deepcopy(p.state_dict()) for p in (one, other)]
    for method in ("average", "fleet_merge"):
        result = merge(method, [one, moved(other, 3) if method == "fleet_merge" else other], coefficients=[1, 3])
        assert torch.allclose(outputs(result.module()), before, atol=1e-4)
        mean = one.normaliser.mean + 0.75
        assert torch.allclose(result.weights["normaliser.mean"], mean, atol=1e-5)
        variance = 0.25 * one.normaliser.std**2 + 0.75 * (3 * one.normaliser.std) ** 2 + 0.25 * 0.75
        assert torch.allclose(result.weights["normaliser.std"], variance.sqrt(), atol=1e-5)
        assert result.distance_after == pytest.approx(0, abs=1e-6)
    assert all(equal(p.state_dict(), old) for p, old in zip((one, other), kept))

    class Stubborn(nn.Module):
        def __init__(self, shift):
            super().__init__()
            self.normaliser = nn.Module()
            self.normaliser.register_buffer("mean", torch.zeros(3) + shift)
            self.normaliser.register_buffer("std", torch.ones(3))
            self.layer = nn.Linear(3, 2)

        def forward(self, x):
            return self.layer((x - self.normaliser.mean) / self.normaliser.std)

    with pytest.raises(UserError, match="policy 1 normalises observations by other statistics than policy 0"):
        merge("average", [Stubborn(0.0), Stubborn(1.0)])
    merge("average", [Stubborn(0.0), Stubborn(0.0)])


class Saved:
    """What merging needs of a checkpoint."""

    def __init__(self, path, module):
        self.path, self._module, self.weights = path, module, module.state_dict()

    def module(self, device="cpu"):
        return copy.deepcopy(self._module)


def test_checkpoints_and_state_dicts():
    a, b = policy(0), policy(1)
    wanted = merge("fleet_merge", [a, b])
    assert equal(merge("fleet_merge", [Saved("runs/a", a), Saved("runs/b", b)]).weights, wanted.weights)
    spec = WeightSpec.from_module(a)
    states = merge("fleet_merge", (spec, [a.state_dict(), b.state_dict()]))
    assert equal(states.weights, wanted.weights)
    with pytest.raises(UserError, match="load .weights into a module"):
        states.module()
    with pytest.raises(UserError, match=r"policy 1 \(runs/b\) cannot be merged with policy 0 \(runs/a\)"):
        merge("average", [Saved("runs/a", a), Saved("runs/b", policy(1, hidden=8))])


def test_policies_that_do_not_belong_together_are_named():
    a = policy(0)
    with pytest.raises(UserError, match=r"policy 2 .* its observation_size is 11, not 9; .*\(11,\).*\(9,\)"):
        merge("fleet_merge", [a, policy(1), policy(2, observation=11)])
    with pytest.raises(
        UserError, match=r"policy 1 .* its hidden is 8, not 16; .*'encoder.weight' .*\(8, 9\).*\(16, 9\)"
    ):
        merge("fleet_merge", [a, policy(1, hidden=8)])
    with pytest.raises(UserError, match="policy 1 .* its cell is 'lstm', not 'gru'"):
        merge("average", [a, policy(1, "lstm")])
    with pytest.raises(UserError, match="policy 1 .* its architecture is 'Linear', not 'recurrent_policy'"):
        merge("average", [a, nn.Linear(3, 3)])
    plain = [nn.Sequential(nn.Linear(3, n), nn.Tanh(), nn.Linear(n, 2)) for n in (4, 5)]
    with pytest.raises(
        UserError, match=r"policy 1 .* its '0.weight' has shape \(5, 3\), where that of policy 0 .*\(4, 3\)"
    ):
        merge("average", plain)
    short = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    with pytest.raises(UserError, match=r"its '2.bias' is missing, where that of policy 0 has shape \(2,\)"):
        merge("average", [plain[0], short])
    sick = policy(1)
    with torch.no_grad():
        sick.encoder.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="policy 1: 'encoder.weight' has 1 NaN or infinite entries"):
        merge("fleet_merge", [a, sick])


def test_names_and_options_are_checked_first():
    a, sick = policy(0), policy(1)
    with torch.no_grad():
        sick.encoder.weight[0, 0] = float("nan")
    for bad, message in (
        (lambda: merge("fleetmerge", [a, sick]), "unknown merger 'fleetmerge'; nearest: 'fleet_merge', 'average'"),
        (
            lambda: merge("fleet_merge", [a, sick], matcher="sinkhorm"),
            "unknown matcher 'sinkhorm'; nearest: 'sinkhorn'",
        ),
        (lambda: merge("fleet_merge", [a, sick], sign=False), "unknown option .* 'sign'; nearest: 'signs'"),
        (lambda: merge("average", [a, sick], matcher="lap"), "unknown option of merger 'average' 'matcher'"),
        (lambda: merge("average", [a]), "at least two policies, got 1"),
        (lambda: merge("average", a), "a list of at least two is wanted, got RecurrentPolicy"),
        (lambda: merge("average", [a, 3]), "policy 1 is a int, not a module or a checkpoint"),
        (lambda: merge("average", [a.state_dict(), a.state_dict()]), "give state dicts as"),
    ):
        with pytest.raises(UserError, match=message):
            bad()
    for options in ({"reference": "last"}, {"reference": 5}, {"max_passes": 0}):
        with pytest.raises(UserError, match=next(iter(options))):
            merge("fleet_merge", [a, policy(2)], **options)


def test_a_merger_of_ones_own():
    @MERGERS.register("first_one")
    def first_one(spec, state_dicts, *, loud=False):
        return dict(state_dicts[0]), [spec.identity() for _ in state_dicts], [{"loud": loud}]

    try:
        a, b = policy(0), policy(1)
        result = merge("first_one", [a, b], loud=True)
        assert equal(result.weights, a.state_dict()) and result.history == [{"loud": True}]
    finally:
        MERGERS._items.pop("first_one")


def test_align_for_benchmarks():
    fleet = [policy(seed).state_dict() for seed in range(3)]
    spec = WeightSpec.from_module(policy(0))
    elements, aligned, history = fleet_merge.align(
        spec, fleet, matcher="lap", signs=False, max_passes=1, reference="first"
    )
    assert elements[0].is_identity and equal(aligned[0], fleet[0])
    assert len(history) == 2 and history[1]["distance"] == pytest.approx(mean_distance(spec, aligned))
    merged = merge("fleet_merge", (spec, fleet), matcher="lap", signs=False, max_passes=1, norms=False)
    assert equal(merged.weights, average(aligned))


def test_the_mean_of_unrelated_policies_gets_their_norms_back():
    fleet = [policy(seed) for seed in range(4)]
    plain, scaled = (merge("fleet_merge", fleet, norms=norms) for norms in (False, True))
    assert plain.elements == scaled.elements
    for key in plain.spec.cost_keys:
        wanted = sum(float(p.state_dict()[key].norm()) for p in fleet) / 4
        assert float(scaled.weights[key].norm()) == pytest.approx(wanted, rel=1e-5)
        assert float(plain.weights[key].norm()) < wanted
        ratio = scaled.weights[key] / plain.weights[key]
        assert torch.allclose(ratio, ratio.flatten()[0].expand_as(ratio), rtol=1e-4)


def test_interpolation_runs_from_one_to_the_other():
    a, b = policy(0).state_dict(), policy(1).state_dict()
    assert equal(interpolate(a, b, 0.0), a) and equal(interpolate(a, b, 1.0), b)
    half = interpolate(a, b, 0.5)
    assert all(torch.allclose(half[key], (a[key] + b[key]) / 2) for key in half)
