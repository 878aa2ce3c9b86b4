import pytest
import torch
from torch import nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.merging import MATCHERS, match
from fleetgym.merging.matching import Problem, ascend, soft_assign


class Net(nn.Module):
    def __init__(self, cell="GRU", width=64, inputs=44, actions=4, layers=1, **options):
        super().__init__()
        self.encoder = nn.Linear(inputs, width)
        self.core = getattr(nn, cell)(width, width, layers, batch_first=True, **options)
        self.head = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, actions))

    def forward(self, x, state=None):
        x, state = self.core(torch.tanh(self.encoder(x)), state)
        return self.head(x), state


def make(seed, **options):
    torch.manual_seed(seed)
    net = Net(**options)
    return WeightSpec.from_module(net), net.state_dict()


def planted(seed, noise, **options):
    """A network, a noisy copy that was moved by a random element, and the element that moves it back."""
    spec, weights = make(seed, **options)
    generator = torch.Generator().manual_seed(seed + 1000)  # not the seed of the weights: those are not independent
    noisy = {k: v + noise * v.std() * torch.randn(v.shape, generator=generator) for k, v in weights.items()}
    element = spec.random(seed + 100)
    return spec, weights, spec.apply(noisy, element), element.inverse(), spec.distance(weights, noisy)


@pytest.mark.parametrize("method", ["lap", "frank_wolfe", "sinkhorn"])
@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_permuted_copy_is_found(method, cell):
    spec, weights, copy, truth, _ = planted(3, 0.0, cell=cell, width=24, inputs=10)
    result = match(spec, weights, copy, method, **({"steps": 60} if method == "sinkhorn" else {}))
    assert result.element == truth
    assert result.distance_after == 0.0 < result.distance_before
    assert result.distance_before == pytest.approx(spec.distance(weights, copy))


@pytest.mark.parametrize("cell", ["RNN", "GRU", "LSTM"])
def test_a_planted_element_with_noise_as_large_as_the_weights_is_fully_recovered(cell):
    for seed in range(3):
        spec, weights, copy, truth, distance = planted(seed, 1.0, cell=cell, width=64)
        result = match(spec, weights, copy)
        assert result.element == truth  # every unit and every sign
        assert result.distance_after == pytest.approx(distance, rel=1e-5)
    spec, weights, copy, truth, _ = planted(5, 1.0, cell=cell, width=32, layers=2)
    assert match(spec, weights, copy).element == truth


def test_gru_128_with_planted_noise_is_fully_recovered():
    spec, weights, copy, truth, _ = planted(0, 1.0, width=128)
    assert match(spec, weights, copy).element == truth


def test_under_strong_noise_it_ends_below_the_planted_distance():
    # The nearest element need not be the planted one any more, but the search must get at least as near.
    for seed, noise in ((0, 2.5), (1, 2.5), (0, 3.0)):
        spec, weights, copy, truth, distance = planted(seed, noise, width=64)
        result = match(spec, weights, copy)
        assert result.distance_after <= distance * (1 + 1e-6)
        right = sum(
            int(((result.element.perms[g] == truth.perms[g]) & (result.element.signs[g] == truth.signs[g])).sum())
            for g in spec.groups
        )
        if noise == 2.5:  # at 3, an element that has nothing to do with the planted one may lie as near
            assert right / sum(spec.groups.values()) > 0.9
        else:
            assert match(spec, weights, copy, annealing=0).distance_after > result.distance_after


def test_independent_grus_come_17_per_cent_nearer():
    drops = {}
    for name, options in {
        "frank_wolfe": {},
        "unsigned": {"signs": False},
        "lap": {"method": "lap"},
    }.items():
        drop = []
        for seed in range(4):
            spec, a = make(2 * seed)
            _, b = make(2 * seed + 1)
            result = match(spec, a, b, **options)
            drop.append(1 - result.distance_after / result.distance_before)
        drops[name] = sum(drop) / len(drop)
    assert drops["frank_wolfe"] >= 0.175
    assert drops["frank_wolfe"] > drops["unsigned"] + 0.01  # the signs pay
    assert drops["unsigned"] > drops["lap"] + 0.01
    assert drops["lap"] > 0.05


@pytest.mark.parametrize("method", ["lap", "frank_wolfe", "sinkhorn"])
@pytest.mark.parametrize("signs", [True, False])
def test_never_worse_than_no_alignment(method, signs):
    for seed in range(4):
        # A small step from a trained pair: nothing but the identity is good, and a hasty rounding would be worse.
        spec, a = make(seed, width=12, inputs=5)
        generator = torch.Generator().manual_seed(seed)
        scale = 0.0 if seed == 0 else 0.3 * seed
        b = {k: v + scale * v.std() * torch.randn(v.shape, generator=generator) for k, v in a.items()}
        options = {"steps": 1} if method == "sinkhorn" else {}
        result = match(spec, a, b, method, signs=signs, **options)
        assert result.distance_after <= result.distance_before
        assert spec.distance(a, spec.apply(b, result.element)) == pytest.approx(result.distance_after, abs=1e-9)
        if not signs:
            assert all(bool((s == 1).all()) for s in result.element.signs.values())


def test_a_bad_matcher_is_overruled_by_the_identity():
    def wild(problem, generator):
        perm = {g: torch.randperm(n, generator=generator)[None] for g, n in problem.sizes.items()}
        return {g: (p, torch.ones(p.shape, dtype=torch.float64)) for g, p in perm.items()}, 1

    MATCHERS.register("wild", wild)
    try:
        spec, a = make(0, width=12)
        b = {k: v + 0.01 for k, v in a.items()}
        result = match(spec, a, b, "wild")
        assert result.element.is_identity and result.distance_after == result.distance_before > 0
    finally:
        MATCHERS._items.pop("wild")


def test_close_networks_are_not_searched_unless_asked_to():
    spec, a = make(0, width=32)
    b = {k: v + 0.3 * v.std() * torch.randn(v.shape, generator=torch.Generator().manual_seed(0)) for k, v in a.items()}
    quick, slow = match(spec, a, b), match(spec, a, b, thorough=True)
    assert quick.element.is_identity and slow.element.is_identity
    assert quick.iterations == 1 < slow.iterations


@pytest.mark.parametrize("method", ["lap", "frank_wolfe", "sinkhorn"])
def test_repeats_and_changes_no_input(method):
    spec, a = make(0, width=16)
    _, b = make(1, width=16)
    kept = [{k: v.clone() for k, v in w.items()} for w in (a, b)]
    options = {"steps": 20} if method == "sinkhorn" else {}
    torch.manual_seed(7)
    first = match(spec, a, b, method, **options)
    torch.manual_seed(8)  # the global generator plays no part
    again = match(spec, a, b, method, **options)
    assert first.element == again.element
    assert all(torch.equal(v, old[k]) for w, old in zip((a, b), kept) for k, v in w.items())


def test_the_gradient_is_that_of_the_objective():
    spec, a = make(0, cell="LSTM", width=6, inputs=4, layers=2)
    _, b = make(1, cell="LSTM", width=6, inputs=4, layers=2)
    problem = Problem.build(spec, a, b)
    identity = problem.identity()
    base = spec.distance(a, b)
    for seed in range(5):
        element = spec.random(seed)
        vertex = {g: (element.perms[g][None], element.signs[g][None].double()) for g in spec.groups}
        gain = float(problem.value_at(vertex) - problem.value_at(identity))
        assert base - 2 * gain == pytest.approx(spec.distance(a, spec.apply(b, element)), rel=1e-9)
        dense, at = problem.gradient(problem.dense(vertex)), problem.gradient_at(vertex)
        assert all(torch.allclose(dense[g], at[g]) for g in spec.groups)
    # Finite difference along a random direction.
    point = problem.barycentre()
    direction = {g: torch.randn(x.shape, dtype=x.dtype) for g, x in point.items()}

    def value(step):
        at = {g: x + step * direction[g] for g, x in point.items()}
        linear = {g: problem.linear[g] for g in at}
        return float(0.5 * (problem.inner(problem.gradient(at), at) + problem.inner(linear, at)))

    slope = float(problem.inner(problem.gradient(point), direction))
    assert (value(1e-4) - value(-1e-4)) / 2e-4 == pytest.approx(slope, rel=1e-6)


def test_frank_wolfe_climbs_within_the_polytope():
    spec, a = make(0, width=16)
    _, b = make(1, width=16)
    problem = Problem.build(spec, a, b)
    values = []
    for iterations in (1, 2, 4, 8, 16):
        point, _ = ascend(problem, problem.barycentre(2), iterations)
        linear = {g: problem.linear[g].expand_as(point[g]) for g in point}
        value = 0.5 * (problem.inner(problem.gradient(point), point) + problem.inner(linear, point))
        values.append(float(value[0]))
        assert float(value[0]) == pytest.approx(float(value[1]))
        for x in point.values():
            plus, minus = (x[:, 0] + x[:, 1]) / 2, (x[:, 0] - x[:, 1]) / 2
            assert float(plus.min()) > -1e-9 and float(minus.min()) > -1e-9
            assert torch.allclose(x[:, 0].sum(-1), torch.ones(2, 16).double())
            assert torch.allclose(x[:, 0].sum(-2), torch.ones(2, 16).double())
    assert values == sorted(values)
    soft = soft_assign(problem, problem.barycentre(), torch.tensor([1.0, 2.0]), balance=30)
    assert all(torch.allclose(x[:, 0].sum(-1), torch.ones(1, 16).double(), atol=1e-3) for x in soft.values())


def test_both_directions_residual_and_mlp_networks_match_too():
    torch.manual_seed(0)
    nets = [
        nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 2)),
        nn.Sequential(nn.Linear(6, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 2)),
    ]
    for net in nets:
        spec, weights = WeightSpec.from_module(net), net.state_dict()
        element = spec.random(1)
        for method in ("lap", "frank_wolfe"):
            assert match(spec, weights, spec.apply(weights, element), method).element == element.inverse()

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.GRU(6, 10, 2, bidirectional=True, batch_first=True)
            self.out = nn.Linear(20, 2)

        def forward(self, x):
            return self.out(self.core(x)[0])

    both = Both()
    spec, weights = WeightSpec.from_module(both), both.state_dict()
    element = spec.random(1)
    assert match(spec, weights, spec.apply(weights, element)).distance_after == 0.0


def test_bad_input_is_named():
    spec, a = make(0, width=8)
    _, b = make(1, width=8)
    with pytest.raises(UserError, match="unknown matcher 'frank_wolf'; nearest: 'frank_wolfe'"):
        match(spec, a, b, "frank_wolf")
    with pytest.raises(UserError, match="unknown option of matcher 'lap' 'sweep'; nearest: 'sweeps'"):
        match(spec, a, b, "lap", sweep=3)
    with pytest.raises(UserError, match="annealing=-1: it must be at least 0"):
        match(spec, a, b, annealing=-1)
    with pytest.raises(UserError, match="sweeps=-2: it must be at least 0"):
        match(spec, a, b, "git_rebasin", sweeps=-2)
    with pytest.raises(UserError, match="temperature=0.0: it must be at least 1e-06"):
        match(spec, a, b, "sinkhorn", temperature=0.0)
    with pytest.raises(UserError, match=r"'encoder.bias' has 1 NaN or infinite entries of 8"):
        match(spec, a, {**b, "encoder.bias": torch.tensor([float("nan")] + [0.0] * 7)})
    with pytest.raises(UserError, match=r"weights: 'encoder.bias' has shape \(9,\), expected \(8,\)"):
        match(spec, a, {**b, "encoder.bias": torch.zeros(9)})
