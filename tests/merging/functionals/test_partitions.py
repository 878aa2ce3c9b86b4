from itertools import product

import pytest
import torch
from torch import nn

from fleetgym.core import Axis, UserError, WeightSpec
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.partitions import Plan, atoms_of, bell, formula, partitions


def square(n):
    return WeightSpec({"w": (Axis("h"), Axis("h"))}, {"h": n})


def mlp(*sizes):
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return WeightSpec.from_module(nn.Sequential(*layers[:-1])).free("in", "out")


def cell(gates, inputs=16, hidden=64):
    """The tensors of a recurrent cell: input and hidden weights, with one bias each, or one bias and a read-out."""
    rows = Axis("h", gates)
    axes = {"ih": (rows, Axis("in")), "hh": (rows, Axis("h")), "b_ih": (rows,), "b_hh": (rows,)}
    return WeightSpec(axes, {"h": hidden, "in": inputs})


def rnn():
    axes = {"ih": "h in", "hh": "h h", "b": "h", "ho": "out h", "b_o": "out"}
    groups = {"h": 64, "in": 16, "out": 10}
    return WeightSpec({key: tuple(Axis(name) for name in names.split()) for key, names in axes.items()}, groups)


@pytest.mark.parametrize(
    ("spec", "count"),
    [
        (square(4), 15),
        (mlp(3, 4, 5), 32),
        (mlp(3, 4, 5, 2), 62),
        (rnn(), 81),
        (cell(3), 585),
        (mlp(2, 3, 3, 2).fix("in", "out"), 114),
    ],
    ids=["square", "two layers", "three layers", "rnn", "gru", "hnp"],
)
def test_numbers_of_terms(spec, count):
    plan = Plan.of(Layout.of(spec))
    assert plan.count == count == sum(term.fold for term in plan.terms)
    assert Plan.of(Layout.of(spec)) is plan
    # Nothing is nested or small here, so that the count is the paper's.
    parts = plan.layout.parts
    assert count == sum(formula(a, b) * a.fold * b.fold for a, b in product(parts, parts))


def test_bell_numbers():
    assert [bell(n) for n in range(9)] == [1, 1, 2, 5, 15, 52, 203, 877, 4140]


@pytest.mark.parametrize("dims", ["a", "a a", "a b", "a a a", "a b a", "a b c a"])
def test_enumeration_is_the_formula(dims):
    spec = WeightSpec({"w": tuple(map(Axis, dims.split())), "v": (Axis("a"),)}, dict.fromkeys("abc", 9))
    layout = Layout.of(spec)
    for output, source in product(layout, layout):
        found = list(partitions(atoms_of(layout, output), atoms_of(layout, source)))
        assert len(found) == len(set(found)) == formula(output, source)


def test_small_groups_have_fewer_terms():
    assert [Plan.of(Layout.of(square(n))).count for n in (1, 2, 3, 4, 5)] == [1, 8, 14, 15, 15]
    assert Plan.of(Layout.of(square(1)), prune=False).count == 15


def test_nested_groups_have_two_indices():
    spec = WeightSpec({"q": (Axis("q"), Axis("e")), "v": (Axis("v"),)}, {"q": 6, "v": 15, "e": 4, "heads": 3})
    layout = Layout.of(WeightSpec(spec.axes, spec.groups, nested={"q": "heads", "v": "heads"}))
    atoms = atoms_of(layout, layout["q"])
    assert [(a.label, a.size, a.parent) for a in atoms] == [("heads", 3, None), ("q", 2, 0), ("e", 4, None)]
    # The same head or another one; in the same head the same channel or another one; the same e or another one.
    assert len(list(partitions(atoms, atoms))) == 3 * 2
    assert len(list(partitions(atoms, atoms_of(layout, layout["v"])))) == 2


def test_products_are_few():
    gru, three = Plan.of(Layout.of(cell(3))), Plan.of(Layout.of(mlp(3, 4, 5, 2)))
    assert [product.labels for product in gru.products] == [("h", "in"), ("h", "h"), ("h",), ("in",), ()]
    assert len(three.products) == 8 and len(three.terms) == 62
    for plan in (gru, three):
        placed = {(p, row, column) for p, row, column in plan.places}
        assert len(placed) == len(plan.terms)
        for term, (p, row, column) in zip(plan.terms, plan.places):
            assert plan.products[p].inputs[row].part == term.input
            assert plan.products[p].outputs[column].part == term.output


def test_caps():
    layout = Layout.of(rnn())
    whole = Plan.of(layout)
    ranks = [Plan.of(layout, max_rank=rank) for rank in (0, 1, 2)]
    assert ranks[0].count < ranks[1].count < ranks[2].count == whole.count
    for rank, plan in enumerate(ranks):
        assert all(term.carried <= rank or term.identity for term in plan.terms)
        assert sum(term.identity for term in plan.terms) == len(layout)
    few = Plan.of(layout, max_terms=20)
    assert few.count == 20 and all(term in whole.terms for term in few.terms)
    assert [term for term in few.terms if term.identity] == [term for term in whole.terms if term.identity]
    assert Plan.of(layout, max_terms=10**6).terms == whole.terms
    with pytest.raises(UserError, match="max_terms=4: 5 are needed"):
        Plan.of(layout, max_terms=4)
    with pytest.raises(UserError, match="max_rank=-1"):
        Plan.of(layout, max_rank=-1)


def test_a_transformer_is_planned_quickly():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(3, 8)
            self.block = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, dropout=0.0)

        def forward(self, x):
            return self.block(self.embed(x)).mean(1)

    plan = Plan.of(Layout.of(WeightSpec.from_module(Net().eval(), torch.zeros(2, 5, 3)).free("in", "out")))
    assert len(plan.products) < 30 < 300 < len(plan.terms)
