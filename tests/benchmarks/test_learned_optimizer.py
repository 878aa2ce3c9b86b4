from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_map

from fleetgym.benchmarks import learned_optimizer as bench
from fleetgym.core import UserError
from fleetgym.merging.learned_optimizer import PES, Adam, LearnedOptimizer, Momentum, unroll

pytest.importorskip("sklearn")


@pytest.mark.parametrize("name", bench.FAMILIES)
def test_families_can_be_learned_on(name):
    found = bench.FAMILIES[name]
    task = found.make(found.width)
    few = replace(task, sets={"train": tree_map(lambda x: x[:200], task.sets["train"])})
    plain = unroll(Adam(task.spec, 0.02), few, 25, range(2)).measured["train"][0]
    assert bool((plain[:, -1] < plain[:, 0]).all())
    rule = LearnedOptimizer(task.spec, "deepset", symmetry=found.symmetry)
    gradient, info = PES(rule, task, pairs=1, horizon=2, truncation=2).estimate(0)
    assert bool(torch.isfinite(gradient).all()) and float(gradient.norm()) > 0 and info["resets"] == 0
    # Rules serve the width that they have not seen.
    other = found.make(found.other)
    for kind in found.kinds:
        learned = LearnedOptimizer(task.spec, kind, symmetry="np" if kind == "nfn" else found.symmetry)
        moved = learned.on(other.spec)
        assert sum(p.numel() for p in moved.parameters()) == sum(p.numel() for p in learned.parameters())


def test_a_search_finds_what_trains_best():
    task = bench.mlp_task(8)
    best, loss = bench.best_of(Momentum(task.spec), task, 10, (0, 1), {"alpha": torch.tensor([1e-4, 0.1, 1e9])})
    assert best == {"alpha": pytest.approx(0.1)}
    measured = bench.measure(Momentum(task.spec, 0.1), task, 10, (0, 1), 5)
    assert measured["score"] == pytest.approx(loss, rel=1e-4)
    assert [step for step, _ in measured["curve"]] == [0, 5, 10]
    assert measured["curve"][-1][1] == pytest.approx(loss, rel=1e-4) and measured["test"] != measured["score"]
    with pytest.raises(UserError, match="every setting of Momentum diverges on mlp-8"):
        bench.best_of(Momentum(task.spec), task, 10, (0, 1), {"alpha": torch.tensor([1e30])})


@pytest.mark.parametrize("tuned", [bench.tuned_momentum, bench.tuned_adam])
def test_tuned_rules(tuned):
    task = bench.mlp_task(4)
    small = replace(task, sets={name: (x[:64], y[:64]) for name, (x, y) in task.sets.items()})
    rule, found = tuned(small, 4, (7,))
    assert {name: p.item() for name, p in rule.named_parameters() if name in found["setting"]} == pytest.approx(
        found["setting"]
    )
    assert bench.measure(rule, small, 4, (7,))["score"] == pytest.approx(found["loss"], rel=1e-4)
    # Half or twice the step size is no better: the search went below its coarse grid.
    for factor in (0.5, 2.0):
        other = type(rule)(task.spec, **{**found["setting"], "alpha": factor * found["setting"]["alpha"]})
        assert bench.measure(other, small, 4, (7,))["score"] > found["loss"]


def test_heads_must_divide_the_width():
    with pytest.raises(UserError, match="multiple of 4"):
        bench.transformer_task(30)
