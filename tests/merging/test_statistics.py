"""Statistics in place of data, and the mergers that take them."""

import copy

import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.core.demonstrations import SequenceBatch
from fleetgym.merging import load_statistics, merge, save_statistics, sent_bytes
from fleetgym.merging.statistics import Sketch, pack, refit_last, statistics, unpack


def policy(seed, cell="gru", hidden=10, observation=6, **options):
    torch.manual_seed(seed)
    return RecurrentPolicy(observation, 2, cell, hidden=hidden, **options)


def episodes(seed, count=6, steps=12, observation=6):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(count, steps, dtype=torch.bool)
    mask[count // 2 :, steps - 4 :] = False
    x = torch.randn(count, steps, observation, generator=generator) + seed
    return SequenceBatch(x * mask[..., None], torch.randn(count, steps, 2, generator=generator), mask)


def error(module, batch, teacher):
    with torch.no_grad():
        return float((module(batch.observations)[0] - teacher(batch.observations)[0])[batch.mask].square().mean())


def test_packing_keeps_a_symmetric_matrix_in_half_the_bytes():
    x = torch.randn(5, 5)
    assert torch.allclose(unpack(pack(x + x.T)).float(), x + x.T)
    assert pack(x + x.T).numel() == 15


def test_gram_is_the_second_moment_of_what_layers_see():
    net, batch = policy(0), episodes(1)
    made = statistics(net, batch)
    assert set(made) == {"count", "gram/encoder", "gram/core.0", "gram/head.0", "gram/head.2"}
    assert int(made["count"]) == int(batch.mask.sum())
    x = torch.cat([batch.observations[batch.mask], torch.ones(int(batch.mask.sum()), 1)], 1)
    assert torch.allclose(unpack(made["gram/encoder"]).float(), x.T @ x / len(x), atol=1e-4)
    with torch.no_grad():
        e = torch.tanh(net.encoder(batch.observations))
        h = net.core(e)[0]
    before = torch.cat([torch.zeros(6, 1, 10), h[:, :-1]], 1)
    z = torch.cat([e, before, torch.ones(6, 12, 1)], -1)[batch.mask]
    assert torch.allclose(unpack(made["gram/core.0"]).float(), z.T @ z / len(z), atol=1e-5)
    # What lies behind the mask plays no part.
    other = copy.copy(batch)
    other.observations[~batch.mask] = 1e3
    again = statistics(net, other)
    assert all(torch.equal(made[key], again[key]) for key in made)
    assert sent_bytes(made) == 8 + 4 * sum(n * (n + 1) // 2 for n in (7, 21, 11, 11))


def test_statistics_travel_as_safetensors(tmp_path):
    made = statistics(policy(0), episodes(1), ("gram", "fisher", "sketch"), segments=2)
    size = save_statistics(tmp_path / "a.safetensors", made)
    back = load_statistics(tmp_path / "a.safetensors")
    assert back.keys() == made.keys() and all(torch.equal(back[key], made[key]) for key in made)
    assert sent_bytes(made) < size < sent_bytes(made) + 4096
    save_statistics(tmp_path / "b.safetensors", {"fisher/x": torch.tensor([float("nan")])})
    with pytest.raises(UserError, match="b.safetensors: 'fisher/x' holds values that are not finite"):
        load_statistics(tmp_path / "b.safetensors")


def test_fisher_of_a_linear_policy_is_known():
    net = nn.Linear(3, 2)
    batch = episodes(0, count=400, steps=4, observation=3)
    found = statistics(net, batch, ("fisher",), draws=8)["fisher/weight"]
    # a = W x + b with unit variance: the derivative by W_ij squared is x_j^2 on average.
    wanted = batch.observations[batch.mask].square().mean(0).expand(2, -1)
    assert torch.allclose(found, wanted, rtol=0.15)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mlp"])
@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("align", [True, False])
def test_equal_policies_come_back(cell, method, align):
    one = policy(0, cell)
    kind = "gram" if method == "regmean" else method
    sent = [statistics(one, episodes(seed), (kind,)) for seed in range(2)]
    result = merge(method, [one, copy.deepcopy(one)], statistics=sent, align=align)
    assert all(torch.allclose(result.weights[key], v, atol=1e-4) for key, v in one.state_dict().items())


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics_move_with_the_alignment(cell, method):
    # A robot whose units are in another order sends statistics in that order; merged, nothing of it is seen.
    first, second = policy(0, cell), policy(0, cell)
    with torch.no_grad():
        for p in second.parameters():
            p += 0.2 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    kind = "gram" if method == "regmean" else method
    batches = [episodes(0), episodes(1)]
    spec = WeightSpec.from_module(first)
    turned = policy(0, cell)
    turned.load_state_dict(spec.apply(second.state_dict(), spec.random(3)))
    results = [
        merge(method, [first, other], statistics=[statistics(p, b, (kind,)) for p, b in zip((first, other), batches)])
        for other in (second, turned)
    ]
    assert not results[1].elements[1].is_identity
    for key, value in results[0].weights.items():
        assert torch.allclose(value, results[1].weights[key], atol=2e-3), key


def test_regmean_solves_a_linear_layer_exactly():
    # Two linear maps that agree with one common map on what each robot sees: RegMean finds it, averaging does not.
    truth = torch.randn(2, 6)
    nets, sent = [], []
    for seed in range(2):
        seen = torch.zeros(6)
        seen[3 * seed : 3 * seed + 3] = 1  # each robot sees half of the dimensions
        net = nn.Sequential(nn.Linear(6, 2, bias=False))
        net[0].weight.data = truth * seen + 5 * (1 - seen)
        batch = episodes(seed, count=50)
        batch.observations.mul_(seen)
        nets.append(net)
        sent.append(statistics(net, batch))
    merged = merge("regmean", nets, statistics=sent, shrink=1.0, align=False)
    assert torch.allclose(merged.weights["0.weight"], truth, atol=1e-3)
    assert (merge("average", nets).weights["0.weight"] - truth).abs().max() > 1
    with pytest.raises(UserError, match="statistics 0 hold no gram"):
        merge("regmean", nets, statistics=[{}, {}])
    with pytest.raises(UserError, match="1 statistics for 2 policies"):
        merge("regmean", nets, statistics=sent[:1])
    with pytest.raises(UserError, match="needs statistics="):
        merge("regmean", nets)


def test_regmean_of_recurrent_policies_is_nearer_to_both_than_the_mean():
    base = policy(0)
    nets = []
    for seed in range(2):
        net = copy.deepcopy(base)
        with torch.no_grad():
            for p in net.parameters():
                p += 0.6 * p.std() * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed))
        nets.append(net)
    batches = [episodes(2 * seed, count=30) for seed in range(2)]
    sent = [statistics(net, batch) for net, batch in zip(nets, batches)]
    errors = {
        name: sum(error(result.module(), batch, net) for net, batch in zip(nets, batches))
        for name, result in (
            ("regmean", merge("regmean", nets, statistics=sent, align=False)),
            ("average", merge("average", nets)),
        )
    }
    assert errors["regmean"] < 0.8 * errors["average"]


def test_the_last_layer_is_refitted_as_if_the_data_were_there():
    net, batches = policy(0), [episodes(0), episodes(1)]
    sent = [statistics(net, batch, ("last",)) for batch in batches]
    fitted = refit_last(net, sent, example_input=torch.zeros(1, 1, 6), ridge=1e-9)
    with torch.no_grad():
        z = [torch.tanh(net.head[0](net.core(torch.tanh(net.encoder(b.observations)))[0]))[b.mask] for b in batches]
    z = torch.cat([torch.cat(z), torch.ones(sum(map(len, z)), 1)], 1).double()
    wanted = torch.linalg.lstsq(z, torch.cat([b.actions[b.mask] for b in batches]).double()).solution
    assert torch.allclose(fitted.head[2].weight.double(), wanted[:-1].T, rtol=1e-2, atol=1e-2)
    assert torch.equal(fitted.head[0].weight, net.head[0].weight)
    assert not torch.equal(fitted.head[2].weight, net.head[2].weight)


def linear_world(seed, count=40, steps=20):
    """Episodes of x' = A x + B a + noise, with a constant dimension that marks the world."""
    generator = torch.Generator().manual_seed(seed)
    a = 0.95 * torch.eye(3) + 0.05 * torch.randn(3, 3, generator=generator)
    b = 0.3 * torch.randn(3, 2, generator=generator)
    x, actions = [2 + torch.randn(count, 3, generator=generator)], []
    for _ in range(steps):
        actions.append(0.5 * torch.randn(count, 2, generator=generator))
        x.append(x[-1] @ a.T + actions[-1] @ b.T + 0.01 * torch.randn(count, 3, generator=generator))
    mark = torch.full((count, steps, 1), float(seed))
    mask = torch.ones(count, steps, dtype=torch.bool)
    return SequenceBatch(torch.cat([torch.stack(x[:-1], 1), mark], -1), torch.stack(actions, 1), mask), a, b


@pytest.mark.parametrize("segments", [1, 3])
def test_a_sketch_knows_a_linear_world(segments):
    batch, a, b = linear_world(1)
    made = statistics(None, batch, ("sketch",), segments=segments)
    world = Sketch.of(made)
    assert world.vary.tolist() == [True, True, True, False] and world.length == 20
    scale = world.scale
    dynamics = world.transition[-1][:, :3] * scale[:, None] / scale  # back from standardised units
    assert torch.allclose(dynamics, a.double(), atol=0.05)
    assert torch.allclose(world.transition[-1][:, 3:5] * scale[:, None], b.double(), atol=0.05)
    generator = torch.Generator().manual_seed(0)
    first = world.observe(world.start(2000, generator))
    assert torch.allclose(first[:, :3].mean(0), batch.observations[:, 0, :3].mean(0), atol=0.1)
    assert torch.allclose(first[:, :3].std(0), batch.observations[:, 0, :3].std(0), rtol=0.2)
    assert bool((first[:, 3] == 1).all())
    assert sent_bytes(made) < 4 * batch.observations.numel()
    with pytest.raises(UserError, match="too few for a sketch of 900 segments"):
        statistics(None, batch, ("sketch",), segments=900)


def test_distilling_merges_policies_that_averaging_cannot():
    teachers, batches = [], []
    for seed in range(2):
        batch, *_ = linear_world(seed)
        teacher = policy(10 + seed, "gru", hidden=12, observation=4)  # functions that have nothing in common
        teachers.append(teacher)
        batches.append(batch)
    sent = [statistics(t, b, ("sketch",), segments=1) for t, b in zip(teachers, batches)]
    options = {"steps": 200, "episodes": 24, "refreshes": 1, "batch_size": 6, "learning_rate": 1e-2}
    result = merge("distill", teachers, statistics=sent, **options)
    short = [merge("distill", teachers, statistics=sent, **{**options, "steps": 4}).weights for _ in range(2)]
    assert all(torch.equal(v, short[1][k]) for k, v in short[0].items())  # by seed alone
    assert result.history[-1]["loss"] < 0.2 * result.history[0]["loss"] or result.history[-1]["loss"] < 1e-3
    errors = [
        sum(error(merged.module(), b, t) for b, t in zip(batches, teachers))
        for merged in (result, merge("average", teachers), merge("fleet_merge", teachers))
    ]
    assert errors[0] < 0.2 * min(errors[1:])
    with pytest.raises(UserError, match="statistics 0 hold no sketch"):
        merge("distill", teachers, statistics=[{}, {}])
    spec = WeightSpec.from_module(teachers[0])
    with pytest.raises(UserError, match="runs the policies"):
        merge("distill", (spec, [t.state_dict() for t in teachers]), statistics=sent)


def test_bad_input_is_named():
    net, batch = policy(0), episodes(0)
    with pytest.raises(UserError, match="unknown kind of statistics 'grams'; nearest: 'gram'"):
        statistics(net, batch, ("grams",))
    with pytest.raises(UserError, match="unknown option of the statistics gram 'segments'"):
        statistics(net, batch, segments=2)
    with pytest.raises(UserError, match="statistics of a int"):
        statistics(net, 3)
    empty = SequenceBatch(batch.observations, batch.actions, torch.zeros_like(batch.mask))
    with pytest.raises(UserError, match="have no step"):
        statistics(net, empty)
    with pytest.raises(UserError, match="two directions"):
        statistics(nn.GRU(3, 4, bidirectional=True, batch_first=True), episodes(0, observation=3))
