"""Matchers beside Frank-Wolfe, merging in a common frame, and mergers by task vectors."""

import copy

import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.merging import correlations, match, match_many, merge
from fleetgym.merging.fleet_merge import align
from fleetgym.merging.mergers import mean_distance
from fleetgym.merging.universe import Universe


def policy(seed, cell="gru", hidden=12, **options):
    torch.manual_seed(seed)
    return RecurrentPolicy(5, 2, cell, hidden=hidden, **options)


def tuned(base, seed, scale=0.1):
    """As if trained from ``base`` on another task."""
    other = copy.deepcopy(base)
    with torch.no_grad():
        for p in other.parameters():
            p += scale * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
    return other


# ---- matchers -------------------------------------------------------------------------------------------------------


def test_git_rebasin_matches_feed_forward_networks_as_published():
    def net(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))

    spec, a = WeightSpec.from_module(net(0)), net(0).state_dict()
    found = match(spec, a, spec.apply(a, spec.random(1)), "git_rebasin")
    assert found.distance_after == 0.0
    drops = []
    for seed in range(3):
        b = net(10 + seed).state_dict()
        results = [match(spec, a, b, method, seed=seed) for method in ("git_rebasin", "frank_wolfe")]
        drops.append([1 - r.distance_after / r.distance_before for r in results])
        # At its end no single group's assignment lowers the distance further.
        moved = spec.apply(b, results[0].element)
        assert match(spec, a, moved, "git_rebasin").element.is_identity
    mean = torch.tensor(drops).mean(0)
    assert 0.05 < mean[0] < mean[1]
    orders = {match(spec, a, net(10).state_dict(), "git_rebasin", seed=seed).distance_after for seed in range(4)}
    assert len(orders) > 1  # the order of the groups is random, and matters


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mlp"])
def test_git_rebasin_is_guarded_for_recurrent_networks(cell):
    a, b = policy(0, cell), policy(1, cell)
    spec = WeightSpec.from_module(a)
    found = match(spec, a.state_dict(), b.state_dict(), "git_rebasin")
    assert found.distance_after <= found.distance_before
    moved = spec.apply(a.state_dict(), spec.random(0))
    assert match(spec, a.state_dict(), moved, "git_rebasin").distance_after <= spec.distance(a.state_dict(), moved)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mlp"])
@pytest.mark.parametrize("layers", [1, 2])
def test_activations_find_units_by_what_they_do(cell, layers):
    one = policy(0, cell, layers=layers)
    spec = WeightSpec.from_module(one)
    element = spec.random(1)
    weights = one.state_dict()
    moved = spec.apply(weights, element)
    inputs = torch.randn(8, 10, 5, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(8, 10, dtype=torch.bool)
    mask[4:, 6:] = False
    table = correlations(spec, one, weights, moved, inputs, mask)
    assert table.keys() == spec.groups.keys()
    found = match(spec, weights, moved, "activations", correlations=table)
    assert found.element == element.inverse() and found.distance_after == 0.0  # signs from negative correlations
    assert all(torch.equal(v, weights[k]) for k, v in one.state_dict().items())


def test_activations_ignore_weights_that_do_nothing():
    # The same function with large weights on inputs that never vary: the weights lie, the activations do not.
    one = policy(0, "mlp")
    other = copy.deepcopy(one)
    with torch.no_grad():
        other.encoder.weight[:, 0] += 50 * torch.randn(12, generator=torch.Generator().manual_seed(0))
    spec = WeightSpec.from_module(one)
    element = spec.random(1)
    moved = spec.apply(other.state_dict(), element)
    inputs = torch.randn(64, 1, 5, generator=torch.Generator().manual_seed(0))
    inputs[..., 0] = 0
    table = correlations(spec, one, one.state_dict(), moved, inputs)
    found = match(spec, one.state_dict(), moved, "activations", correlations=table, guard=False)
    assert found.element == element.inverse()
    with pytest.raises(UserError, match="correlations of group 'encoder': expected shape .12, 12., got nothing"):
        match(spec, one.state_dict(), moved, "activations", correlations={})


@pytest.mark.parametrize("method", ["lap", "git_rebasin", "frank_wolfe", "sinkhorn"])
def test_many_pairs_at_once(method):
    options = {"steps": 30} if method == "sinkhorn" else {}
    spec = WeightSpec.from_module(policy(0))
    pairs = [(policy(2 * s).state_dict(), policy(2 * s + 1).state_dict()) for s in range(3)]
    planted = [spec.apply(a, spec.random(s)) for s, (a, _) in enumerate(pairs)]
    references = [a for a, _ in pairs] * 2
    weights = [b for _, b in pairs] + planted
    found = match_many(spec, references, weights, method, **options)
    for result, a, b in zip(found, references, weights):
        assert spec.distance(a, spec.apply(b, result.element)) == pytest.approx(result.distance_after, abs=1e-9)
        assert result.distance_after <= result.distance_before
    if method in ("lap", "frank_wolfe"):
        assert all(result.distance_after == 0 for result in found[3:])
    if method == "lap":  # nothing random, no common schedule: each pair as if alone
        for result, a, b in zip(found, references, weights):
            assert result.element == match(spec, a, b, method).element
    with pytest.raises(UserError, match="2 references for 1"):
        match_many(spec, references[:2], weights[:1])


# ---- a common frame --------------------------------------------------------------------------------------------------


def test_cycles_close_by_construction():
    fleet = [policy(seed) for seed in range(4)]
    result = merge("universe", fleet)
    maps = {
        (i, j): result.elements[i].inverse() @ result.elements[j] for i in range(4) for j in range(4)
    }  # from j to i
    for i in range(4):
        for j in range(4):
            for k in range(4):
                assert maps[i, k] @ maps[k, j] == maps[i, j]
    # Pairs matched one by one do not close.
    spec, states = result.spec, [p.state_dict() for p in fleet]
    pair = {(i, j): match(spec, states[i], states[j]).element for i, j in ((0, 1), (0, 2), (2, 1))}
    assert pair[0, 2] @ pair[2, 1] != pair[0, 1]


def test_the_frame_is_at_least_as_good_as_one_after_the_other():
    gained = 0
    for start in range(3):
        fleet = [policy(10 * start + seed, hidden=10) for seed in range(4)]
        one_by_one, joint = merge("fleet_merge", fleet), merge("universe", fleet)
        assert joint.distance_after <= one_by_one.distance_after * (1 + 1e-9)
        gained += joint.distance_after < one_by_one.distance_after
        assert joint.distance_after == pytest.approx(mean_distance(joint.spec, joint.aligned))
    assert gained >= 1
    moved = [policy(0) for _ in range(3)]
    spec = WeightSpec.from_module(moved[0])
    for seed, p in enumerate(moved):
        p.load_state_dict(spec.apply(p.state_dict(), spec.random(seed)))
    assert merge("universe", moved).distance_after == pytest.approx(0, abs=1e-9)


def test_the_gradient_of_the_frame_and_its_climb():
    states = [policy(seed, hidden=6).state_dict() for seed in range(3)]
    spec = WeightSpec.from_module(policy(0, hidden=6))
    worlds = Universe(spec, states, [1, 2, 1])
    point = worlds.problem.dense(worlds.problem.assign(worlds.problem.linear))
    centre = worlds.problem.barycentre()
    point = {g: 0.5 * point[g] + 0.5 * centre[g] for g in point}
    direction = {
        g: torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(1)) for g, x in point.items()
    }

    def value(step):
        return worlds.value({g: x + step * direction[g] for g, x in point.items()})

    slope = float(worlds.problem.inner(worlds.gradient(point), direction).sum())
    assert (value(1e-4) - value(-1e-4)) / 2e-4 == pytest.approx(slope, rel=1e-5)
    # The objective is that of all pairs of moved networks.
    elements = [spec.identity(), spec.random(1), spec.random(2)]
    from fleetgym.merging.universe import _vertex

    moved = [spec.apply(state, element) for state, element in zip(states, elements)]
    shares = [0.75, 1.5, 0.75]
    keys = [key for key in spec.cost_keys if not all(axis.fixed for axis in spec.axes[key])]
    wanted = sum(
        shares[i] * shares[j] * float((moved[i][key].double() * moved[j][key].double()).sum())
        for i in range(3)
        for j in range(i)
        for key in keys
    )
    assert worlds.value(worlds.problem.dense(_vertex(worlds.problem, elements))) == pytest.approx(wanted, rel=1e-5)
    _, values = worlds.climb(point, 20)
    assert len(values) > 2 and values == sorted(values)


def test_alignment_has_one_frame_too():
    states = [policy(seed).state_dict() for seed in range(3)]
    spec = WeightSpec.from_module(policy(0))
    elements, moved, _ = align(spec, states)
    for state, element, weights in zip(states, elements, moved):
        assert all(torch.equal(v, weights[k]) for k, v in spec.apply(state, element).items())


# ---- task vectors ----------------------------------------------------------------------------------------------------


def test_task_arithmetic_adds_what_training_added():
    base = policy(0)
    fleet = [tuned(base, seed) for seed in range(3)]
    start = base.state_dict()
    merged = merge("task_arithmetic", fleet, base=base, scaling=0.7)
    for key, value in merged.weights.items():
        wanted = start[key] + 0.7 * sum(p.state_dict()[key] - start[key] for p in fleet)
        assert torch.allclose(value, wanted, atol=1e-5)
    plain = merge("task_arithmetic", fleet, base=base)
    wanted = merge("average", fleet)
    assert all(torch.allclose(plain.weights[k], v, atol=1e-6) for k, v in wanted.weights.items())


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare"])
def test_task_vectors_are_aligned_to_the_base_first(method):
    base = policy(0)
    fleet = [tuned(base, seed) for seed in range(2)]
    spec = WeightSpec.from_module(base)
    turned = copy.deepcopy(fleet[1])
    turned.load_state_dict(spec.apply(turned.state_dict(), spec.random(2)))
    wanted = merge(method, fleet, base=base, align=False)
    found, raw = (merge(method, [fleet[0], turned], base=base, align=align) for align in (True, False))
    assert all(torch.allclose(found.weights[k], v, atol=1e-5) for k, v in wanted.weights.items())
    assert not torch.allclose(raw.weights["encoder.weight"], wanted.weights["encoder.weight"], atol=1e-2)
    other = policy(0)
    other.normaliser.mean.fill_(1.0)
    with pytest.raises(UserError, match="the base's 'normaliser.mean' is not that of the policies"):
        merge(method, fleet, base=other)
    with pytest.raises(UserError, match="needs base="):
        merge(method, fleet)


def test_ties_by_hand():
    base = nn.Linear(4, 1, bias=False)
    nets = [copy.deepcopy(base) for _ in range(3)]
    vectors = torch.tensor([[3.0, -2.0, 0.1, 1.0], [1.0, -4.0, 0.2, -3.0], [-2.0, 0.1, 5.0, -1.0]])
    with torch.no_grad():
        for net, vector in zip(nets, vectors):
            net.weight += vector
    # The two largest of each: (3, -2, 0, 0), (0, -4, 0, -3), (-2, 0, 5, 0); elected signs + - + -.
    merged = merge("ties", nets, base=base, keep=0.5, scaling=2.0)
    wanted = base.weight + 2 * torch.tensor([[3.0, -3.0, 5.0, -3.0]])
    assert torch.allclose(merged.weights["weight"], wanted, atol=1e-5)
    with pytest.raises(UserError, match="keep=0"):
        merge("ties", nets, base=base, keep=0)


def test_dare_drops_and_rescales():
    base = nn.Linear(100, 50, bias=False)
    nets = [copy.deepcopy(base) for _ in range(2)]
    with torch.no_grad():
        for net in nets:
            net.weight += 1.0
    change = merge("dare", nets, base=base, drop=0.75, seed=1).weights["weight"] - base.weight.detach()
    assert float(change.mean()) == pytest.approx(1.0, abs=0.1)  # right on average
    assert float((change.abs() < 1e-5).float().mean()) == pytest.approx(0.75**2, abs=0.05)
    assert torch.equal(
        change, merge("dare", nets, base=base, drop=0.75, seed=1).weights["weight"] - base.weight.detach()
    )
    with pytest.raises(UserError, match="drop=1"):
        merge("dare", nets, base=base, drop=1.0)
