import copy

import pytest
import torch
from torch import nn
from torch.func import grad_and_value

from fleetgym.core import Checkpoint, Element, Run, UserError, WeightSpec
from fleetgym.core.seeding import torch_generator
from fleetgym.merging.functionals import WeightBatch
from fleetgym.merging.learned_optimizer import (
    PES,
    Adam,
    InnerTask,
    LearnedOptimizer,
    Momentum,
    UNFOptimizer,
    load_rule,
    pes_train,
    trainable,
    unroll,
)


def mlp(inputs=5, hidden=6, outputs=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs))


class Recurrent(nn.Module):
    def __init__(self, hidden=4):
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.enter = nn.Linear(3, hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, 5)

    def forward(self, tokens):
        x, outputs = self.embed(tokens), []
        h = x.new_zeros(len(x), self.again.in_features)
        for i in range(x.shape[1]):
            h = torch.tanh(self.enter(x[:, i]) + self.again(h))
            outputs.append(self.head(h))
        return torch.stack(outputs, 1)


NETWORKS = {
    "mlp": (mlp, torch.zeros(2, 5)),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
        ),
        torch.zeros(2, 1, 8, 8),
    ),
    "rnn": (Recurrent, torch.zeros(2, 4, dtype=torch.long)),
}


def lively(rule, seed=0):
    """The rule with an f that matters."""
    with torch.no_grad():
        rule.beta.fill_(0.7)
        generator = torch.Generator().manual_seed(seed)
        for parameter in rule.parameters():
            if parameter.dim():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return rule


def noise_gradients(module, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter)


def count(rule):
    return sum(parameter.numel() for parameter in rule.parameters())


def regression(inputs=5, outputs=3, hidden=6, batch=8):
    """Linear regression data, a two-layer network."""
    generator = torch.Generator().manual_seed(5)
    truth = torch.randn(inputs, outputs, generator=generator)

    def batches(draws, n):
        x = torch.randn(n, batch, inputs, generator=draws)
        return x, x @ truth

    x = torch.randn(64, inputs, generator=generator)
    return InnerTask(
        "regression",
        lambda: nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, outputs)),
        batches,
        lambda network, data: (network(data[0]) - data[1]).square().mean(),
        {"train": (x, x @ truth)},
    )


# ---- the rule -------------------------------------------------------------------------------------------------------


def test_counts_are_those_of_the_paper():
    spec = WeightSpec.from_module(mlp(64, 32, 10))
    assert count(LearnedOptimizer(spec, "unf")) == 3783
    assert count(LearnedOptimizer(spec, "deepset")) == 2788
    assert LearnedOptimizer(spec, "unf").last.terms == 32
    # On a chain NFN spans the same maps, so that it has as many.
    assert count(LearnedOptimizer(spec, "nfn")) == 3783
    # Inputs and outputs as channels of their own take more.
    assert count(LearnedOptimizer(spec, "unf", symmetry="hidden")) > 3783


CASES = [
    (name, kind, symmetry)
    for name in NETWORKS
    for kind in ("unf", "nfn", "deepset")
    for symmetry in ("np", "hidden", "full")
    if kind == "unf" or (name == "mlp" and symmetry == "np") or (name == "cnn" and kind == "nfn" and symmetry != "full")
    if (name, kind) != ("rnn", "nfn")
]


@pytest.mark.parametrize(("name", "kind", "symmetry"), CASES)
def test_a_step_is_equivariant(name, kind, symmetry):
    make, example = NETWORKS[name]
    module = make()
    spec = WeightSpec.from_module(module, example)
    module = module.double()
    rule = lively(LearnedOptimizer(spec, kind, symmetry=symmetry).double())
    # Inputs and outputs move too where they may. Units behind tanh may also be negated: f knows of permutations only.
    read = rule.layout.spec
    element = Element(read.random(3).perms, read.identity().signs)

    def apply(state):
        return rule.layout.spec.apply(state, element)

    def stepped(weights, moved):
        here = copy.deepcopy(module)
        here.load_state_dict(weights)
        optimizer = UNFOptimizer(here, rule, spec=spec)
        for step in range(2):
            noise_gradients(here, step)
            if moved:
                grads = apply({key: p.grad for key, p in here.named_parameters()})
                for key, parameter in here.named_parameters():
                    parameter.grad = grads[key]
            optimizer.step()
        state = {key: p.detach() for key, p in here.named_parameters()}
        return state, {key: optimizer.state[p]["moments"] for key, p in here.named_parameters()}

    plain, moments = stepped(module.state_dict(), False)
    moved, moved_moments = stepped(apply(module.state_dict()), True)
    expected = apply(plain)
    assert max(float((expected[key] - moved[key]).abs().max()) for key in expected) < 1e-10
    for slot in range(rule.slots):
        wanted = apply({key: m[..., slot] for key, m in moments.items()})
        assert all(torch.allclose(wanted[key], moved_moments[key][..., slot], atol=1e-10) for key in wanted)
    # Gradients that stay where they were are seen: the check can fail.
    wrong, _ = stepped(apply(module.state_dict()), False)
    assert max(float((expected[key] - wrong[key]).abs().max()) for key in wrong) > 1e-3


def test_nfn_refuses_what_is_no_chain():
    make, example = NETWORKS["rnn"]
    with pytest.raises(UserError, match=r"again\.weight.*use UNFLinear"):
        LearnedOptimizer(WeightSpec.from_module(make(), example), "nfn")


def test_f_reads_the_other_weights_only_where_it_should():
    spec = WeightSpec.from_module(mlp())
    for kind, reads in (("deepset", False), ("unf", True), ("nfn", True)):
        rule = lively(LearnedOptimizer(spec, kind, scale="none"))
        x = torch.randn(1, rule.layout.size, generator=torch.Generator().manual_seed(1))
        t = torch.zeros(1)
        other = x.clone()
        other[0, 0] += 1.0  # the weight of input 0 to unit 0
        steps = [rule.correction(w, x, x[..., None].expand(-1, -1, 6), t) for w in (x, other)]
        assert (not torch.equal(steps[0][0, 1:], steps[1][0, 1:])) == reads


def test_without_f_it_is_torchs_momentum():
    ours, theirs = mlp(), mlp()
    rule = LearnedOptimizer(WeightSpec.from_module(ours), alpha=0.05, gamma=0.8, beta=0.0)
    optimizers = [
        UNFOptimizer(ours, rule),
        torch.optim.SGD(theirs.parameters(), lr=0.05, momentum=0.8),
    ]
    for step in range(5):
        for module, optimizer in zip((ours, theirs), optimizers):
            noise_gradients(module, step)
            optimizer.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.allclose(next(ours.parameters()), next(mlp().parameters()), atol=1e-2)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_baselines_are_those_of_torch(name):
    ours, theirs = mlp(), mlp()
    spec = WeightSpec.from_module(ours)
    if name == "adam":
        rule, reference = Adam(spec, 0.01, 0.8, 0.95), torch.optim.Adam(theirs.parameters(), 0.01, (0.8, 0.95))
    else:
        rule, reference = Momentum(spec, 0.02, 0.7), torch.optim.SGD(theirs.parameters(), 0.02, 0.7)
    optimizer = UNFOptimizer(ours, rule)
    for step in range(5):
        for module, one in ((ours, optimizer), (theirs, reference)):
            noise_gradients(module, step)
            one.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.parameters(), theirs.parameters()))


def test_the_formula_by_hand():
    """m = g m + gradient and W - alpha (m^{g0} + beta f), with the momenta of the paper."""
    spec = WeightSpec.from_module(mlp())
    rule = lively(LearnedOptimizer(spec).double())
    size = rule.layout.size
    generator = torch.Generator().manual_seed(2)
    w, g = torch.randn(2, 1, size, generator=generator, dtype=torch.float64)
    moments = torch.randn(1, size, 7, generator=generator, dtype=torch.float64)
    t = torch.tensor([3.0], dtype=torch.float64)
    new, after = rule(w, g, moments, t)
    decays = [0.9, 0.1, 0.5, 0.9, 0.99, 0.999, 0.9999]
    for slot, decay in enumerate(decays):
        assert torch.allclose(after[..., slot], decay * moments[..., slot] + g)
    f = rule.correction(w, g, after[..., 1:], t)
    assert torch.allclose(new, w - 0.1 * (after[..., 0] + 0.7 * f))
    assert rule.time(t).shape == (1, 11)
    assert float((f - rule.correction(w, g, after[..., 1:], t + 5)).detach().abs().max()) > 1e-4
    # The scale of the loss does not reach f, but it does where features are given as they are.
    assert torch.allclose(f, rule.correction(w, 7 * g, 7 * after[..., 1:], t))
    rule.scale = "none"
    plain = rule.correction(w, g, after[..., 1:], t)
    assert not torch.allclose(plain, rule.correction(w, 7 * g, 7 * after[..., 1:], t))


def test_a_rule_serves_other_widths_and_refuses_other_networks():
    rule = lively(LearnedOptimizer(WeightSpec.from_module(mlp(5, 6, 3))))
    wide = rule.on(WeightSpec.from_module(mlp(7, 20, 2)))
    assert count(wide) == count(rule) and wide.layout.size == 7 * 20 + 20 + 20 * 2 + 2
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), wide.parameters()))
    hidden = LearnedOptimizer(WeightSpec.from_module(mlp(5, 6, 3)), symmetry="hidden")
    hidden.on(WeightSpec.from_module(mlp(5, 9, 3)))
    with pytest.raises(UserError, match=r"last\.weights\.0.*shape"):
        hidden.on(WeightSpec.from_module(mlp(4, 6, 3)))
    with pytest.raises(UserError, match="put on 6 tensors"):
        deeper = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
        rule.on(WeightSpec.from_module(deeper))


# ---- the optimizer --------------------------------------------------------------------------------------------------


class Trained(nn.Module):
    """With what trips optimizers up: running statistics, a frozen tensor and one that is never used."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.last.bias.requires_grad_(False)

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def test_it_trains_a_module_in_the_usual_loop(tmp_path):
    torch.manual_seed(0)
    module = Trained()
    x = torch.randn(64, 4)
    y = torch.stack([x.prod(1), x.sum(1)], 1)
    frozen = module.last.bias.clone()
    optimizer = UNFOptimizer(module, example_input=torch.zeros(3, 4), lr=0.2)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (module(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    assert torch.equal(frozen, module.last.bias) and module.last.bias not in optimizer.state
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.0)
    optimizer.step()
    scheduler.step()
    before = module.first.weight.clone()
    optimizer.step()
    assert torch.equal(before, module.first.weight)  # lr is 0 now


def test_state_goes_out_and_comes_back(tmp_path):
    spec = WeightSpec.from_module(mlp())
    Checkpoint.save(tmp_path / "rule", lively(LearnedOptimizer(spec), 4))
    modules = [mlp(), mlp()]
    optimizers = [UNFOptimizer(module, tmp_path / "rule") for module in modules]
    assert optimizers[0].rule.beta == 0.7
    for step in range(3):
        noise_gradients(modules[0], step)
        optimizers[0].step()
    saved = copy.deepcopy(optimizers[0].state_dict())
    modules[1].load_state_dict(modules[0].state_dict())
    optimizers[1].load_state_dict(saved)
    for step in range(3, 6):
        for module, optimizer in zip(modules, optimizers):
            noise_gradients(module, step)
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(modules[0].parameters(), modules[1].parameters()))
    fresh = mlp()
    fresh.load_state_dict(modules[0].state_dict())
    without = UNFOptimizer(fresh, tmp_path / "rule")
    for module, optimizer in ((modules[0], optimizers[0]), (fresh, without)):
        noise_gradients(module, 6)
        optimizer.step()
    assert not torch.equal(fresh[0].weight, modules[0][0].weight)  # the state matters
    with pytest.raises(UserError, match="belongs to rule"):
        UNFOptimizer(mlp()).load_state_dict(saved)
    wide = UNFOptimizer(mlp(hidden=9), tmp_path / "rule")
    with pytest.raises(UserError, match=r"moments of '0\.weight' have shape \(6, 5, 7\), expected \(9, 5, 7\)"):
        wide.load_state_dict(saved)


def test_files(tmp_path):
    make, example = NETWORKS["cnn"]
    spec = WeightSpec.from_module(make(), example)
    rule = lively(LearnedOptimizer(spec, "unf", symmetry="full", scale="none"))
    Checkpoint.save(tmp_path / "rule", rule)
    back = load_rule(tmp_path / "rule")
    assert back.config == rule.config and back.layout == rule.layout
    assert all(torch.equal(a, b) for a, b in zip(rule.state_dict().values(), back.state_dict().values()))
    with torch.no_grad():
        rule.trunk[1].weight[0, 0] = float("nan")
    Checkpoint.save(tmp_path / "nan", rule)
    with pytest.raises(UserError, match=r"trunk\.1\.weight"):
        load_rule(tmp_path / "nan")


def test_tied_tensors_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix, self.out = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens):
            return self.out(torch.tanh(self.mix(self.embed(tokens))))

    module = Tied()
    optimizer = UNFOptimizer(module, example_input=torch.zeros(2, 3, dtype=torch.long))
    assert list(optimizer.spec.axes) == ["embed.weight", "mix.weight", "mix.bias"]
    before = module.out.weight.clone()
    module(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    assert module.out.weight is module.embed.weight and not torch.equal(before, module.out.weight)


def test_bad_parameters_are_named():
    module = mlp()
    spec = WeightSpec.from_module(module)
    named = dict(module.named_parameters())
    with pytest.raises(UserError, match=r"'0\.weight' has 7 entries along axis 0"):
        UNFOptimizer({**named, "0.weight": torch.zeros(7, 5)}, spec=spec)
    with pytest.raises(UserError, match=r"'2\.bias' with axes \[out 3\] is missing"):
        UNFOptimizer({k: v for k, v in named.items() if k != "2.bias"}, spec=spec)
    with pytest.raises(UserError, match=r"'4\.bias'.*belongs to another network"):
        UNFOptimizer({**named, "4.bias": torch.zeros(3)}, spec=spec)
    with pytest.raises(UserError, match="without names"):
        UNFOptimizer(module.parameters(), spec=spec)
    with pytest.raises(UserError, match="pass spec="):
        UNFOptimizer(module.named_parameters())
    with pytest.raises(UserError, match=r"'0\.bias' holds nan"):
        UNFOptimizer({**named, "0.bias": torch.full((6,), float("nan"))}, spec=spec)
    with pytest.raises(UserError, match="float16"):
        UNFOptimizer(mlp().half(), spec=spec)
    with pytest.raises(UserError, match=r"'2\.weight' has dtype torch.float64"):
        UNFOptimizer({**named, "2.weight": torch.zeros(3, 6, dtype=torch.float64)}, spec=spec)
    with pytest.raises(UserError, match="on_nan"):
        UNFOptimizer(module, on_nan="ignore")
    with pytest.raises(UserError, match="lr=-1"):
        UNFOptimizer(module, lr=-1)
    for options in ({"kind": "gnn"}, {"symmetry": "hnp"}, {"scale": "layer"}):
        with pytest.raises(UserError, match="unknown"):
            LearnedOptimizer(spec, **options)
    with pytest.raises(UserError, match="hidden=0"):
        LearnedOptimizer(spec, hidden=0)
    with pytest.raises(UserError, match="new UNFOptimizer"):
        UNFOptimizer(module).add_param_group({"params": [torch.zeros(3)]})
    with pytest.raises(UserError, match="unknown tensor"):
        trainable(spec, ["0.weigth"])


def test_bad_gradients_change_nothing():
    module = mlp()
    optimizer = UNFOptimizer(module)
    noise_gradients(module, 0)
    optimizer.step()
    module[2].weight.grad[1, 2] = float("nan")
    before, state = copy.deepcopy(module.state_dict()), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(UserError, match=r"'2\.weight' has 1 of 18 values"):
        optimizer.step()
    lenient = UNFOptimizer(module, on_nan="skip")
    lenient.load_state_dict(state)
    with pytest.warns(RuntimeWarning, match=r"'2\.weight'.*step skipped \(1"):
        lenient.step()
    assert lenient.skipped == 1
    assert all(torch.equal(before[key], value) for key, value in module.state_dict().items())
    for opt in (optimizer, lenient):
        for number, values in opt.state_dict()["state"].items():
            assert torch.equal(values["moments"], state["state"][number]["moments"])


# ---- meta-training --------------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """Its loss is a quadratic form of its weights; the symmetry is trivial."""

    def __init__(self):
        super().__init__()
        self.line = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.line(x)


def quadratic():
    def batches(draws, n):
        return torch.randn(n, 3, 2, generator=draws, dtype=torch.float64) * torch.tensor([2.0, 0.5]).double()

    return InnerTask("quadratic", lambda: Quadratic().double(), batches, lambda f, x: f(x).square().mean())


def true_gradient(task, rule, horizon, objective, truncation, count=20_000):
    """By differentiating through whole runs, their draws independent of those of PES."""
    generator = torch.Generator().manual_seed(77)
    layout = rule.layout
    w = (torch.rand(count, layout.size, generator=generator, dtype=torch.float64) * 2 - 1) / 2**0.5  # Linear's own
    moments, losses = rule.fresh(count), []
    slope = torch.func.vmap(grad_and_value(lambda v, b: task.value(layout, v, b)))
    for step in range(horizon):
        g, loss = slope(w, task.batches(generator, count))
        losses.append(loss)
        w, moments = rule(w, g, moments, w.new_full((count,), float(step)))
    kept = torch.stack(losses[-truncation:] if objective == "final" else losses)
    value = (kept.log() if objective == "log" else kept).mean()
    return torch.cat([x.reshape(1) for x in torch.autograd.grad(value, list(rule.parameters()))])


@pytest.mark.parametrize(("objective", "units"), [("mean", {}), ("final", {}), ("log", {"alpha": 0.5, "gamma": 2.0})])
def test_pes_is_unbiased_across_truncations(objective, units):
    task = quadratic()
    rule = Momentum(task.spec, 0.01, 0.3).double()
    horizon, truncation = 6, 3
    # By the chain rule: a step of one in theta is a step of one unit in the parameter.
    truth = true_gradient(task, rule, horizon, objective, truncation)
    truth = truth * torch.tensor([units.get("alpha", 1.0), units.get("gamma", 1.0)]).double()

    def estimates(persistent):
        pes = PES(
            rule,
            task,
            pairs=200,
            horizon=horizon,
            truncation=truncation,
            sigma=0.003,
            objective=objective,
            stagger=False,
            cap=1e9,
            units=units,
        )
        found = []
        for run in range(8):
            pieces = []
            for piece in range(horizon // truncation):
                pieces.append(pes.estimate(run * 2 + piece)[0])
                if not persistent:
                    pes.tensors["noise"].zero_()
            found.append(torch.stack(pieces).mean(0))
        found = torch.stack(found)
        return found.mean(0), found.std(0) / len(found) ** 0.5

    mean, error = estimates(True)
    assert bool(((mean - truth).abs() < 4 * error).all()), (mean, error, truth)
    assert float(error[0]) < 0.15 * abs(float(truth[0]))  # the agreement means something
    # Forgetting the perturbations of earlier pieces, as plain evolution strategies do, is seen.
    mean, error = estimates(False)
    assert bool(((mean - truth).abs() > 6 * error).any()), (mean, error, truth)


def test_meta_training_lowers_the_loss():
    task = regression()
    start = Momentum(task.spec, 0.02, 0.5)
    trained = pes_train(start, task, 60, pairs=6, horizon=20, truncation=5, lr=0.01, seed=1)
    assert start.alpha.item() == pytest.approx(0.02)
    before, after = (
        float(unroll(r, task, 20, range(8)).measured["train"][..., -1].mean()) for r in (start, trained.rule)
    )
    assert after < 0.7 * before
    assert [row["step"] for row in trained.history] == [20, 40, 60]


@pytest.mark.parametrize("kind", ["unf", "deepset"])
def test_a_resumed_run_gives_the_same_file(tmp_path, kind):
    task = regression(3, 2, 4)
    rule = LearnedOptimizer(task.spec, kind, hidden=4)
    options = {"pairs": 2, "horizon": 8, "truncation": 4, "lr": 0.01, "save_every": 3, "log_every": 2}

    def train(name, steps, stop=None):
        with Run.open(tmp_path / name, {"kind": kind}, resume=True, tensorboard=False) as run:
            if stop is not None:
                seen = run.save_state

                def save(step, *rest):
                    seen(step, *rest)
                    if step >= stop:
                        raise KeyboardInterrupt

                run.save_state = save
            return pes_train(rule, task, steps, run=run, **options)

    whole = train("whole", 8)
    with pytest.raises(KeyboardInterrupt):
        train("halves", 8, stop=3)
    resumed = train("halves", 8)
    names = ["checkpoints/last/model.safetensors", "metrics.jsonl"]
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "halves" / name).read_bytes()
    assert resumed.history == whole.history
    assert not torch.equal(whole.rule.trunk[0].weight, rule.trunk[0].weight)
    optimizer = UNFOptimizer(task.make(), tmp_path / "halves")  # a run's folder stands for its last checkpoint
    assert torch.equal(optimizer.rule.trunk[0].weight, whole.rule.trunk[0].weight)


def test_meta_training_in_units_and_with_reports():
    task = regression()
    start = Momentum(task.spec, 0.02, 0.5)
    options = {"pairs": 6, "horizon": 20, "truncation": 5, "seed": 1, "decay": False}
    # Adam's first step is as long as lr, in units.
    rows = []
    first = pes_train(start, task, 1, lr=0.01, units={"alpha": 0.1}, report=rows.append, **options).rule
    assert abs(first.alpha.item() - 0.02) == pytest.approx(0.001, rel=1e-3)
    assert abs(first.gamma.item() - 0.5) == pytest.approx(0.01, rel=1e-3)
    assert [row["step"] for row in rows] == [1]
    plain = pes_train(start, task, 1, lr=0.01, **options).rule
    assert abs(plain.alpha.item() - 0.02) == pytest.approx(0.01, rel=1e-3)


def test_a_correction_in_both_scales_grows_with_the_gradients():
    task = regression()
    generator = torch.Generator().manual_seed(3)
    size = Momentum(task.spec).layout.size
    w, g = torch.randn(2, 4, size, generator=generator).double()
    t = torch.zeros(4).double()

    def change(scale, factor):
        rule = LearnedOptimizer(task.spec, "unf", scale=scale, beta=1.0, hidden=4).double()
        with torch.no_grad():
            new, _ = rule(w, factor * g, rule.fresh(4), t)
        return w - new

    assert torch.allclose(change("both", 1000.0), 1000 * change("both", 1.0), rtol=1e-6)
    assert not torch.allclose(change("tensor", 1000.0), 1000 * change("tensor", 1.0), rtol=0.1)


def test_diverging_inner_runs_begin_anew_and_are_counted():
    task = regression()
    rule = Momentum(task.spec, 0.35, 0.9)  # some runs diverge
    pes = PES(rule, task, pairs=4, horizon=40, truncation=20)
    gradients, resets = [], 0
    for step in range(6):
        gradient, info = pes.estimate(step)
        gradients.append(gradient)
        resets += info["resets"]
    assert resets > 0 and bool(torch.isfinite(torch.stack(gradients)).all())
    assert bool(torch.isfinite(pes.tensors["noise"]).all())
    with pytest.raises(UserError, match="all 2 pairs of inner runs diverged"):
        pes_train(Momentum(task.spec, 50.0), task, 30, pairs=2, horizon=20, truncation=10, lr=1e-4)


def test_unrolling_settings_side_by_side_is_the_same_as_one_by_one():
    task = regression()
    alphas = torch.tensor([0.01, 0.05, 0.1])
    grid = unroll(Momentum(task.spec), task, 12, range(4), settings={"alpha": alphas}, every=5, chunk=6)
    assert grid.losses.shape == (3, 4, 12) and grid.places == [0, 5, 10, 12]
    assert grid.measured["train"].shape == (3, 4, 4)
    alone = unroll(Momentum(task.spec, 0.05), task, 12, range(4), every=5)
    assert torch.allclose(grid.losses[1], alone.losses[0], atol=1e-5)
    # and it is what the optimizer does in a loop
    module = task.make()
    module.load_state_dict(dict(zip(module.state_dict(), _unflat(task, 2).values())))
    optimizer = UNFOptimizer(module, Momentum(task.spec, 0.05))
    x, y = task.batches(torch_generator("minibatches", task.name, 2), 12)
    losses = []
    for i in range(12):
        optimizer.zero_grad()
        loss = task.loss(module, (x[i], y[i]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert torch.allclose(torch.tensor(losses), alone.losses[0, 2], atol=1e-5)


def _unflat(task, seed):
    rule = Momentum(task.spec)
    return WeightBatch(rule.layout, task.initial(rule.layout, seed)[None, :, None]).unstack()[0]


def test_bad_meta_training_is_refused():
    task = regression()
    rule = Momentum(task.spec)
    for options, words in (
        ({"horizon": 10, "truncation": 4}, "no multiple"),
        ({"pairs": 0}, "pairs=0"),
        ({"sigma": 0.0}, "sigma=0"),
        ({"cap": 1.0}, "cap=1"),
        ({"objective": "best"}, "unknown objective"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"units": {"alfa": 1.0}}, "unknown parameter of the rule 'alfa'"),
        ({"units": {"alpha": 0.0}}, "positive number"),
        ({"clip": 0.0}, "clip=0"),
        ({"log_every": 0}, "log_every=0"),
    ):
        with pytest.raises(UserError, match=words):
            pes_train(rule, task, 3, **options)
    with pytest.raises(UserError, match=r"rule\.on\(task\.spec\)"):
        pes_train(Momentum(regression(hidden=9).spec), task, 3)
    with pytest.raises(UserError, match="at least one of each"):
        unroll(rule, task, 0, [0])
    with pytest.raises(UserError, match="unknown parameter"):
        unroll(rule, task, 3, [0], settings={"momentum": torch.tensor([0.9])})
