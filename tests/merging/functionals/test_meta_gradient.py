"""Update rules learned by differentiating through pieces of training."""

import math

import pytest
import torch
from torch import nn

from fleetgym.core import Run, UserError, WeightSpec
from fleetgym.merging.learned_optimizer import InnerTask, LearnedOptimizer, Momentum, load_rule, unroll
from fleetgym.merging.meta_gradient import TruncatedGradient, gradient_train


def _regression(hidden=6, dtype=torch.float32):
    truth = torch.randn(5, 3, generator=torch.Generator().manual_seed(5)).to(dtype)

    def batches(draws, n):
        x = torch.randn(n, 8, 5, generator=draws).to(dtype)
        return x, x @ truth

    def make():
        return nn.Sequential(nn.Linear(5, hidden), nn.Tanh(), nn.Linear(hidden, 3)).to(dtype)

    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(6)).to(dtype)
    loss = lambda network, data: (network(data[0]) - data[1]).square().mean()  # noqa: E731
    return InnerTask("regression", make, batches, loss, {"train": (x, x @ truth)})


@pytest.mark.parametrize("objective", ["log", "mean"])
def test_the_gradient_is_that_of_differences(objective):
    task = _regression(dtype=torch.float64)
    rule = LearnedOptimizer(task.spec, alpha=0.05, beta=0.5, hidden=4, scale="both").double()

    def estimator(theta=None):
        found = TruncatedGradient(rule, task, runs=2, horizon=6, truncation=3, objective=objective, cap=1e9)
        if theta is not None:
            found.theta = theta
        return found

    theta = estimator().theta
    gradient, info = estimator().estimate(0)
    assert info["resets"] == 0

    def value(theta):
        # The same draws, and the objective by hand from the weights after each number of steps.
        total = 0.0
        for steps in (1, 2, 3):
            found = estimator(theta)
            found.truncation = steps
            total += _after(found, objective)
        return total / 3

    def _after(found, objective):
        from torch.func import functional_call, grad_and_value, vmap

        from fleetgym.core.seeding import torch_generator

        layout = rule.layout
        draws = torch_generator("meta_gradient", task.name, 0, 0)
        weights = torch.stack([task.initial(layout, "meta_gradient", 0, 0, n).to(theta) for n in range(2)])
        moments = rule.fresh(2)
        own = found.parameters(found.theta)
        slope = vmap(grad_and_value(lambda w, b: task.value(layout, w, b)))
        for i in range(found.truncation):
            batch, other = task.batches(draws, 2), task.batches(draws, 2)
            g, _ = slope(weights, batch)
            weights, moments = functional_call(rule, own, (weights, g, moments, torch.full((2,), float(i)).to(theta)))
        losses = torch.vmap(lambda w, b: task.value(layout, w, b))(weights, other)
        return float((losses.log() if objective == "log" else losses).mean())

    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(len(theta), generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        step = 1e-6
        difference = (value(theta + step * direction) - value(theta - step * direction)) / (2 * step)
        assert float(gradient @ direction) == pytest.approx(difference, rel=1e-4, abs=1e-9)


def test_no_run_outweighs_the_others():
    task = _regression()
    options = {"runs": 4, "horizon": 20, "truncation": 10}
    rule = LearnedOptimizer(task.spec, alpha=0.05, beta=0.5, hidden=4, scale="both")
    gradients = [TruncatedGradient(rule, task, spread=s, **options).estimate(0)[0] for s in (math.inf, 1e9, 1.0)]
    assert torch.equal(gradients[0], gradients[1]) and not torch.allclose(gradients[0], gradients[2])

    # A step size at which some runs explode and some do not: the first gradient is theirs alone.
    edge = Momentum(task.spec, alpha=2.0, gamma=0.0)
    free, bound = (TruncatedGradient(edge, task, cap=1e30, spread=s, **options).estimate(0)[0] for s in (math.inf, 2.0))
    assert free.norm() > 5 * bound.norm() > 0

    tamed = TruncatedGradient(rule, task, spread=2.0, **options)._tamed
    states = torch.tensor([[3.0, 4.0], [0.0, 6.0], [300.0, 400.0], [math.nan, 1.0]])
    assert torch.allclose(tamed(states), torch.tensor([[3.0, 4.0], [0.0, 6.0], [7.2, 9.6], [0.0, 0.0]]))


def test_a_learned_rule_beats_the_one_it_began_as():
    task = _regression()
    start = LearnedOptimizer(task.spec, alpha=0.02, beta=1.0, hidden=8, scale="both")
    options = {"runs": 4, "horizon": 20, "truncation": 10, "lr": 0.01}
    learned = gradient_train(start, task, 30, report=lambda row: None, **options)
    ends = [unroll(r, task, 20, range(8)).measured["train"][0, :, -1].mean() for r in (start, learned.rule)]
    assert ends[1] < 0.7 * ends[0]
    assert learned.history[-1]["loss"] < learned.history[0]["loss"]


def test_a_resumed_run_gives_the_same_file(tmp_path, monkeypatch):
    task = _regression()
    start = LearnedOptimizer(task.spec, alpha=0.02, hidden=4)
    options = {"runs": 3, "horizon": 20, "truncation": 5, "save_every": 4, "log_every": 3, "report": lambda row: None}
    options |= {"judge": lambda rule: float(rule.alpha.detach()) ** 2, "judge_every": 5}
    for name in ("whole", "cut"):
        for stop in (7, None) if name == "cut" else (None,):
            with Run.open(tmp_path / name, {}, resume=True, tensorboard=False) as run:
                estimate = TruncatedGradient.estimate

                def dies(self, step, estimate=estimate, stop=stop):
                    if step == stop:
                        raise KeyboardInterrupt
                    return estimate(self, step)

                monkeypatch.setattr(TruncatedGradient, "estimate", dies)
                if stop is None:
                    gradient_train(start, task, 12, run=run, **options)
                else:
                    with pytest.raises(KeyboardInterrupt):
                        gradient_train(start, task, 12, run=run, **options)
                monkeypatch.setattr(TruncatedGradient, "estimate", estimate)
    files = [sorted((tmp_path / name / "checkpoints" / "last").glob("*.safetensors"))[0] for name in ("whole", "cut")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert load_rule(tmp_path / "cut").kind == "unf"


def test_the_rule_that_is_judged_best_is_kept():
    task = _regression()
    start = LearnedOptimizer(task.spec, alpha=0.02, hidden=4)
    seen = []

    def judge(rule):
        seen.append(rule.alpha.item())
        return {0: 3.0, 1: 2.0, 2: 1.0, 3: float("nan"), 4: 5.0}[len(seen) - 1]

    options = {"runs": 2, "horizon": 20, "truncation": 5, "report": lambda row: None}
    learned = gradient_train(start, task, 8, judge=judge, judge_every=2, log_every=8, **options)
    assert len(seen) == 5 and len(set(seen)) == 5  # the one to begin with, and after 2, 4, 6 and 8 steps
    assert learned.rule.alpha.item() == seen[2] and learned.history[-1]["judged"] == pytest.approx(8 / 3)


def test_runs_that_diverge_begin_anew():
    task = _regression()
    wild = TruncatedGradient(Momentum(task.spec, alpha=1e4), task, runs=3, horizon=20, truncation=10)
    gradient, info = wild.estimate(0)
    assert info["resets"] == 3 and bool(torch.isfinite(gradient).all())
    assert bool((wild.tensors["done"] == 0).all()) and bool(torch.isfinite(wild.tensors["weights"]).all())
    with pytest.raises(UserError, match="all 3 inner runs diverged"):
        gradient_train(Momentum(task.spec, alpha=1e4), task, 40, runs=3, horizon=20, truncation=10, lr=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"runs": 0}, "runs=0"),
        ({"horizon": 30, "truncation": 20}, "no multiple of truncation=20"),
        ({"objective": "final"}, "unknown objective 'final'"),
        ({"cap": 1.0}, "cap=1.0"),
        ({"spread": 0.5}, "spread=0.5"),
        ({"lr": 0.0}, "lr=0.0"),
        ({"steps": 0}, "steps=0"),
    ],
)
def test_bad_numbers_are_errors(options, message):
    task = _regression()
    with pytest.raises(UserError, match=message):
        gradient_train(LearnedOptimizer(task.spec), task, **{"steps": 1, **options})
    other = WeightSpec.from_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)))
    with pytest.raises(UserError, match="the rule is made for"):
        gradient_train(LearnedOptimizer(other), task, 1)
