import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.core.run import Run
from fleetgym.merging.functionals import NFN, NFT, UNF, ProbeEncoder, StatNN, WeightBatch
from fleetgym.merging.functionals.models import run_networks
from fleetgym.merging.functionals.training import batch_indices, evaluate, fit, kendall_tau, predict


def mlp(*sizes):
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def unsigned(spec):
    return WeightSpec(spec.axes, spec.groups, buffers=spec.buffers, nested=spec.nested)


def zoo(count, make=lambda: mlp(3, 6, 5, 2), seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        nets = [make() for _ in range(count)]
        for net in nets:  # networks as they are made are alike; trained ones are not
            gain = 0.3 + 2 * torch.rand(())
            for parameter in net.parameters():
                parameter.data *= gain
    spec = unsigned(WeightSpec.from_module(nets[0]))
    return nets, spec, WeightBatch.stack(spec, [net.state_dict() for net in nets])


def policy():
    return RecurrentPolicy(3, 2, hidden=4)


READERS = {
    "nfn np": lambda spec, **o: NFN(spec, 2, hidden=(6, 5), **o),
    "nfn hnp": lambda spec, **o: NFN(spec, 2, hidden=(6, 5), symmetry="hnp", **o),
    "nft": lambda spec, **o: NFT(spec, 2, width=8, blocks=2, heads=2, frequencies=4, **o),
    "unf": lambda spec, **o: UNF(spec, 2, hidden=(4, 3), **o),
    "unf free": lambda spec, **o: UNF(spec.free("in", "out"), 2, hidden=(4, 3), **o),
}
CASES = [(name, mlp) for name in READERS] + [(name, policy) for name in ("nft", "unf")]


def readers(name, make, **options):
    """A model, networks in its layout, and an element that moves hidden units alone."""
    nets, spec, _ = zoo(4, (lambda: mlp(3, 6, 5, 2)) if make is mlp else policy)
    torch.manual_seed(1)
    model = READERS[name](spec, **options)
    x = WeightBatch.stack(model.layout, [net.state_dict() for net in nets])
    model.normalise(x)
    element = model.layout.spec.random(1)
    element.perms.update({g: torch.arange(n) for g, n in model.layout.groups.items() if g in ("in", "out")})
    return x.to(torch.float64), model.double().eval(), element


def swapped_inputs(x):
    """The same networks with their first two inputs exchanged."""
    free = unsigned(x.layout.spec.free("in") if "in" not in x.layout.groups else x.layout.spec)
    element = free.identity()
    element.perms["in"] = torch.tensor([1, 0, 2])
    others = {"normaliser.mean": torch.zeros(3).double(), "normaliser.std": torch.ones(3).double()}
    states = [{**{k: v for k, v in others.items() if k in free.axes}, **state} for state in x.unstack()]
    return WeightBatch.stack(x.layout, WeightBatch.stack(free, states).apply(element).unstack())


@pytest.mark.parametrize(("name", "make"), CASES)
def test_pooled_heads_are_invariant(name, make):
    x, model, element = readers(name, make)
    out = model(x)
    assert out.shape == (4, 2) and not torch.equal(x.apply(element).data, x.data)
    assert float((model(x.apply(element)) - out).detach().abs().max()) < 1e-10
    assert float((model(swapped_inputs(x)) - out).detach().abs().max()) > 1e-6  # another function


@pytest.mark.parametrize(("name", "make"), CASES)
def test_editors_are_equivariant_and_begin_near_the_identity(name, make):
    x, model, element = readers(name, make, head="editor")
    with torch.no_grad():
        out = model(x)
        assert out.layout == x.layout and 0 < float((out.data - x.data).abs().max()) < 0.2
        model.head[-1].factors.fill_(1.0)
        out, moved = model(x), model(x.apply(element))
        assert float((moved.data - out.apply(element).data).abs().max()) < 1e-10
        assert float((moved.data - out.data).abs().max()) > 1e-3
        gap = model(swapped_inputs(x)).data - swapped_inputs(out).data
        assert float(gap.abs().max()) > 1e-6


def test_statistics_of_weights():
    _, spec, x = zoo(30)
    model = NFN(spec, hidden=(4,))
    model.normalise(x)
    for _, view in model._standard(x):
        assert torch.allclose(view.flatten(0, -2).mean(0), torch.zeros(()), atol=1e-5)
        assert torch.allclose(view.flatten(0, -2).std(0, unbiased=False), torch.ones(()), atol=1e-3)
    model.normalise(x, by="weight")
    assert torch.allclose(model._standard(x).data.std(0, unbiased=False), torch.ones(()), atol=1e-3)
    still = x.replace(torch.zeros_like(x.data))
    model.normalise(still)
    assert torch.isfinite(model(still)).all()
    with pytest.raises(UserError, match="unknown normalisation 'all'"):
        model.normalise(x, by="all")


def test_the_seven_statistics():
    _, spec, x = zoo(3)
    tensor = x.tensors()["0.weight"][1].flatten()
    q = torch.quantile(tensor, torch.tensor([0, 0.25, 0.5, 0.75, 1]))
    wanted = torch.cat([torch.stack([tensor.mean(), tensor.var(unbiased=False)]), q])
    model = StatNN(spec, 3)
    assert torch.allclose(model.statistics(x)[1, :7], wanted, atol=1e-6)
    assert model(x).shape == (3, 3)
    lone = StatNN(WeightSpec.from_module(mlp(1, 1)))
    assert torch.isfinite(lone(WeightBatch.stack(lone.layout, [mlp(1, 1).state_dict() for _ in range(2)]))).all()


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn", "mlp"])
def test_networks_run_together_as_they_do_alone(cell):
    make = lambda: RecurrentPolicy(3, 2, cell=cell, hidden=4, layers=2)  # noqa: E731
    nets, spec, x = zoo(3, make)
    inputs = torch.randn(5, 4, 3)
    tensors = {key: tensor[..., 0] for key, tensor in x.tensors().items()}
    rest = {k: v for k, v in nets[0].state_dict().items() if k not in tensors}
    assert "normaliser.mean" in rest and nets[0].training
    together = run_networks(nets[0], tensors, inputs, rest)
    with torch.no_grad():
        alone = torch.stack([net(inputs)[0] for net in nets])
    assert torch.allclose(together, alone, atol=1e-6) and nets[0].training
    probes = ProbeEncoder(spec, nets[0], (4, 3), 2, probes=5)
    assert probes.responses(x).shape == (3, 5 * 4 * 2)
    probes(x).sum().backward()
    assert float(probes.probes.grad.abs().max()) > 0
    assert not any(name.startswith("_network") for name, _ in probes.named_parameters())
    spec = WeightSpec.from_module(nets[0])  # signs too leave the function alone
    probes.eval()
    assert torch.allclose(probes(WeightBatch.stack(spec, x.unstack()).apply(spec.random(1))), probes(x), atol=1e-4)


def test_probes_in_units():
    nets, spec, x = zoo(3)
    mean, std = torch.tensor([2.0, 0.0, -1.0]), torch.tensor([0.1, 1.0, 5.0])
    probes = ProbeEncoder(spec, nets[0], (3,), probes=5, units=(mean, std))
    wanted = torch.stack([net(mean + std * probes.probes).flatten() for net in nets])
    assert torch.allclose(probes.responses(x), wanted, atol=1e-5)


def test_a_bidirectional_network_runs():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.core = nn.GRU(2, 3, 2, bidirectional=True, bias=False)

        def forward(self, x):
            return self.core(x)[0]

    nets = [Both() for _ in range(2)]
    tensors = {key: torch.stack([net.state_dict()[key] for net in nets]) for key in nets[0].state_dict()}
    inputs = torch.randn(4, 5, 2)
    together = run_networks(nets[0], tensors, inputs)
    assert torch.allclose(together, torch.stack([net(inputs) for net in nets]), atol=1e-6)


def labelled(count, seed):
    """Networks and how they do: how large their outputs are on fixed inputs, ranked into [0, 1]."""
    nets, spec, x = zoo(count, seed=seed)
    inputs = torch.linspace(-1, 1, 24).view(8, 3)
    with torch.no_grad():
        values = torch.stack([net(inputs).abs().mean() for net in nets])
    return spec, x, nets[0], (values / 1.5).clamp(0, 1)


LEARNERS = {
    "nfn": lambda spec, net: NFN(spec, hidden=(8, 8), head="regressor", head_hidden=32),
    "nft": lambda spec, net: NFT(spec, width=8, blocks=1, frequencies=4, scale=0.3, head="regressor", head_hidden=32),
    "unf": lambda spec, net: UNF(spec, hidden=(8, 8), head="regressor", head_hidden=32),
    "stat": lambda spec, net: StatNN(spec, hidden=32),
    "probe": lambda spec, net: ProbeEncoder(spec, net, (3,), probes=8, hidden=32),
}


@pytest.mark.parametrize(
    ("name", "least"), [("nfn", 0.4), ("nft", 0.45), ("unf", 0.35), ("stat", 0.45), ("probe", 0.65)]
)
def test_models_learn_how_networks_do(name, least):
    spec, x, net, y = labelled(192, 1)
    _, other, _, truth = labelled(96, 2)
    torch.manual_seed(0)
    model = LEARNERS[name](spec, net)
    model.normalise(x)
    before = evaluate(model, other, truth, "bce")
    options = {"steps": 50, "batch_size": 48, "learning_rate": 1e-2, "warmup": 5, "evaluate_every": 10}
    fitted = fit(model, x, y, validation=(other, truth), **options)
    after = evaluate(model, other, truth, "bce")
    assert after["tau"] > max(least, before["tau"]) and after["loss"] < before["loss"]
    assert fitted.score == after["score"] == max(row["validation_score"] for row in fitted.history)
    assert [row["step"] for row in fitted.history] == [10, 20, 30, 40, 50]


def test_an_editor_learns():
    spec, x, *_ = labelled(64, 1)
    from fleetgym.merging.functionals.training import select, train

    model = NFN(spec, head="editor", hidden=(8,))
    model.normalise(x)
    x = model.fitted(x)

    def loss(index, rng):
        batch = select(x, index)
        return (model(batch).data - 0.5 * batch.data).square().mean()

    start = loss(torch.arange(64), None).item()
    train(model, loss, 64, steps=60, batch_size=32, learning_rate=1e-2)
    assert loss(torch.arange(64), None).item() < 0.2 * start


def fit_once(steps, run=None, seed=0, **options):
    spec, x, _, y = labelled(48, 1)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = UNF(spec, hidden=(3,), head_hidden=8, dropout=0.2)
    state = torch.get_rng_state()
    fitted = fit(
        model, x, y, validation=(x, y), steps=steps, batch_size=16, evaluate_every=4, seed=seed, run=run, **options
    )
    assert torch.equal(state, torch.get_rng_state())
    return fitted, torch.cat([p.detach().flatten() for p in model.state_dict().values()])


def test_training_is_deterministic_and_resumes(tmp_path):
    whole, weights = fit_once(12)
    torch.manual_seed(99)  # the global generator decides nothing
    again, same = fit_once(12)
    assert torch.equal(weights, same) and whole == again
    assert not torch.equal(weights, fit_once(12, seed=1)[1])

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 8:
            raise Stop

    with pytest.raises(Stop), Run.open(tmp_path / "run", {}, tensorboard=False) as run:
        fit_once(12, run=run, report=stop)
    with Run.open(tmp_path / "run", {}, resume=True, tensorboard=False) as run:
        assert run.resumed_step == 4
        resumed, weights_again = fit_once(12, run=run)
        assert [row["step"] for row in run.metrics()] == [4, 8, 12]
    assert resumed == whole and torch.equal(weights, weights_again)


def test_batches_and_ranks():
    seen = torch.cat([batch_indices(10, 5, step, 0) for step in (2, 3)])
    assert sorted(seen.tolist()) == list(range(10))
    assert not torch.equal(batch_indices(10, 5, 0, 0), batch_indices(10, 5, 0, 1))
    assert kendall_tau(torch.arange(5), torch.tensor([0, 1, 2, 4, 3])) == pytest.approx(0.8)
    assert kendall_tau(torch.zeros(5), torch.arange(5)) == 0.0
    assert predict(nn.Linear(2, 3), torch.randn(7, 2), batch_size=3).shape == (7, 3)


def test_classes_are_learned():
    torch.manual_seed(0)
    x = torch.randn(60, 2)
    y = (x[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(2, 2))
    fitted = fit(model, x, y, loss="cross_entropy", validation=(x, y), steps=100, batch_size=20, learning_rate=0.1)
    assert fitted.score > 0.95 and fitted.history[-1]["validation_accuracy"] > 0.95


def test_bad_input_is_refused():
    _, spec, x = zoo(4)
    y = torch.rand(4)
    model = StatNN(spec, hidden=4)
    nan = y.clone()
    nan[2] = torch.nan
    gru = WeightSpec.from_module(policy())
    for make, message in (
        (lambda: NFN(spec, head="pooled"), "unknown head 'pooled'"),
        (lambda: NFN(spec, symmetry="all"), "unknown symmetry 'all'"),
        (lambda: NFN(spec, channels=0), "channels=0"),
        (lambda: NFN(spec, 0), "outputs=0"),
        (lambda: NFN(spec, hidden=()), r"hidden=\(\)"),
        (lambda: UNF(spec, hidden=(4, 0)), "hidden=.4, 0."),
        (lambda: NFT(spec, width=10, heads=4), "heads=4 do not divide channels=10"),
        (lambda: NFT(spec, blocks=0), "blocks=0"),
        (lambda: ProbeEncoder(spec, mlp(3, 6, 5, 2), (4,)), "does not take 64 inputs of shape"),
        (lambda: ProbeEncoder(spec, mlp(3, 6, 5, 2), (3,), probes=0), "probes=0"),
        (lambda: UNF(gru, hidden=(2,))(x), "UNF was made for another layout"),
        (lambda: fit(model, x, y, loss="l1"), "unknown loss 'l1'"),
        (lambda: fit(model, x, y[:3]), "4 networks and 3 targets"),
        (lambda: fit(model, x, y[:, None]), r"targets have shape \(4, 1\)"),
        (lambda: fit(model, x, nan), "target 2 is nan"),
        (lambda: fit(model, x, y + 1), r"targets in \[0, 1\]"),
        (lambda: fit(model, x, y, loss="cross_entropy"), "classes 0, 1"),
        (lambda: fit(model, x, y, batch_size=1), "batch normalisation needs at least two"),
        (lambda: fit(model, x, y, steps=0), "steps=0"),
        (lambda: fit(model, x, y, learning_rate=0), "learning_rate=0"),
    ):
        with pytest.raises(UserError, match=message):
            make()
    with pytest.raises(UserError, match="chain|UNF"):
        NFN(gru)
