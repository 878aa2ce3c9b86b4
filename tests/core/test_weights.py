import copy
import json

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fleetgym.core import Axis, Element, UserError, WeightSpec


class Recurrent(nn.Module):
    """Normaliser, encoder, recurrent core, head: the shape of our policies, with everything that cells offer."""

    def __init__(self, cell, layers=1, bias=True, **options):
        super().__init__()
        self.register_buffer("mean", torch.randn(5))
        self.register_buffer("std", torch.rand(5) + 0.5)
        self.encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh())
        self.core = cell(6, 7, num_layers=layers, bias=bias, batch_first=True, **options)
        width = (options.get("proj_size") or 7) * (2 if options.get("bidirectional") else 1)
        self.head = nn.Sequential(nn.Linear(width, 8), nn.Tanh(), nn.Linear(8, 3))

    def forward(self, obs, state=None):
        x = self.encoder(((obs - self.mean) / self.std).clamp(-5, 5))
        if state is None:
            x, state = self.core(x)
        else:
            x, state = self.core(x, state)
        return self.head(x), state


class Norm(nn.Module):
    def __init__(self, norm=None):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.norm = nn.LayerNorm(8) if norm is None else norm
        self.inner = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = x + self.inner(self.norm(x))
        return self.last(x)


class Gated(nn.Module):
    """A product of two heads of one layer, cut out of it, joined with the input, scaled and shifted by parameters."""

    def __init__(self):
        super().__init__()
        self.both = nn.Linear(5, 16)
        self.scale = nn.Parameter(torch.rand(8))
        self.shift = nn.Parameter(torch.rand(8))
        self.out = nn.Linear(13, 4)
        self.W = nn.Parameter(torch.randn(4, 6))
        self.end = nn.Linear(6, 2)

    def forward(self, x):
        a, b = self.both(x).chunk(2, dim=-1)
        h = torch.tanh(a) * torch.sigmoid(b) * self.scale + self.shift
        h = torch.tanh(self.out(torch.cat([h, x], dim=-1)))
        return self.end(torch.tanh(h @ self.W)[..., 0:6])


class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 2)

    def forward(self, x):
        return self.b(torch.cumsum(torch.tanh(self.a(x)), -1))


class Tied(nn.Module):
    """The same layer applied twice, so what goes in and what comes out is one group."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.again = nn.Linear(8, 8)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        x = torch.tanh(self.again(torch.tanh(self.again(x))))
        return self.last(x)


class Last(nn.Module):
    """Reads the memory after the last step, not the outputs."""

    def __init__(self):
        super().__init__()
        self.core = nn.LSTM(5, 6, num_layers=2, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        _, (h, c) = self.core(x)
        return self.head(torch.tanh(h[-1]))


def mlp(activation, depth=3):
    layers = [nn.Linear(5, 7), activation()]
    for _ in range(depth - 1):
        layers += [nn.Linear(7, 7), activation()]
    return nn.Sequential(*layers, nn.Linear(7, 3))


CASES = {f"{cell.__name__}-{n}-{bias}": (lambda cell=cell, n=n, bias=bias: Recurrent(cell, n, bias))
         for cell in (nn.RNN, nn.GRU, nn.LSTM) for n in (1, 2, 3) for bias in (True, False)}  # fmt: skip
CASES |= {
    "rnn-relu": lambda: Recurrent(nn.RNN, 2, nonlinearity="relu"),
    "lstm-projection": lambda: Recurrent(nn.LSTM, 2, proj_size=4),
    "gru-both-ways": lambda: Recurrent(nn.GRU, 2, bidirectional=True),
    "lstm-both-ways-projection": lambda: Recurrent(nn.LSTM, 2, bidirectional=True, proj_size=3),
    "mlp-tanh": lambda: mlp(nn.Tanh),
    "mlp-relu": lambda: mlp(nn.ReLU),
    "mlp-hardtanh": lambda: mlp(nn.Hardtanh),
    "residual-layernorm": Norm,
    "residual-identity": lambda: Norm(nn.Identity()),
    "gated": Gated,
    "tied": Tied,
    "last-memory": Last,
}


@pytest.mark.parametrize("name", CASES)
def test_a_random_element_leaves_the_function_alone(name):
    torch.manual_seed(0)
    module = CASES[name]()
    spec = WeightSpec.from_module(module)
    assert spec.groups
    for seed in range(3):
        assert spec.check(module, rng=seed) < 1e-5
    module.double()
    for seed in range(3):
        assert spec.check(module, rng=seed) < 1e-12
        weights = module.state_dict()
        moved = spec.apply(weights, spec.random(seed))
        assert any(not torch.equal(moved[key], weights[key]) for key in weights)


@pytest.mark.parametrize("name", ["GRU-1-True", "LSTM-2-False", "mlp-tanh"])
def test_the_check_sees_a_wrong_spec(name):
    torch.manual_seed(0)
    module = CASES[name]()
    spec = WeightSpec.from_module(module)
    key = next(k for k, axes in spec.axes.items() if len(axes) == 2 and not axes[1].fixed)
    rows, columns = spec.axes[key]
    wrong = WeightSpec({**spec.axes, key: (rows, Axis(name="in", size=spec.shapes[key][1]))}, spec.groups, spec.signed,
                       spec.buffers, spec.inputs, spec.memory)  # fmt: skip
    assert wrong.check(module) > 1e-3
    with pytest.raises(UserError, match="moves the output"):
        wrong.verify(module)
    assert spec.verify(module) < 1e-5


def test_axes_of_a_gru_policy():
    spec = WeightSpec.from_module(Recurrent(nn.GRU))
    assert spec.groups == {"encoder.0": 6, "core.0": 7, "head.0": 8}
    assert spec.signed == {"encoder.0": True, "core.0": True, "head.0": True}
    gates = Axis("core.0", 3, (False, False, True))
    assert spec.axes["core.weight_hh_l0"] == (gates, Axis("core.0", 1, (True,)))
    assert spec.axes["core.weight_ih_l0"] == (gates, Axis("encoder.0", 1, (True,)))
    assert spec.axes["core.bias_hh_l0"] == (gates,)
    assert spec.axes["encoder.0.weight"][1] == Axis(name="in", size=5)
    assert spec.axes["head.2.bias"] == (Axis(name="out", size=3),)
    assert spec.axes["mean"] == (Axis(name="in", size=5),)
    assert spec.buffers == ("mean", "std") and spec.memory == (1,) and spec.inputs == (5,)
    assert "mean" not in spec.cost_keys and "head.2.bias" in spec.cost_keys
    lstm = WeightSpec.from_module(Recurrent(nn.LSTM))
    assert lstm.axes["core.weight_ih_l0"][0] == Axis("core.0", 4, (False, False, True, False))


@pytest.mark.parametrize(
    ("name", "signed"),
    [
        ("mlp-tanh", True),
        ("mlp-relu", False),
        ("mlp-hardtanh", True),
        ("rnn-relu", None),
        ("residual-layernorm", False),
    ],
)
def test_signs_follow_the_activation(name, signed):
    spec = WeightSpec.from_module(CASES[name]())
    if signed is None:  # the cells are relu, the encoder and head are tanh
        assert [spec.signed[g] for g in ("encoder.0", "core.0", "core.1", "head.0")] == [True, False, False, True]
    else:
        assert set(spec.signed.values()) == {signed}
    for seed in range(3):
        signs = spec.random(seed).signs
        assert all(bool((signs[group] == 1).all()) for group in spec.groups if not spec.signed[group])
    assert spec.random(0).perms.keys() == spec.groups.keys()


def test_residual_sums_tie_groups():
    spec = WeightSpec.from_module(Norm())
    assert set(spec.groups.values()) == {8, 16} and len(spec.groups) == 2
    assert WeightSpec.from_module(Norm(nn.Identity())).signed["first"] is True


def test_the_memory_moves_with_the_symmetry():
    torch.manual_seed(1)
    module = Recurrent(nn.GRU).double()
    spec = WeightSpec.from_module(module)
    element = spec.random(3)
    other = copy.deepcopy(module)
    other.load_state_dict(spec.apply(module.state_dict(), element))
    x = torch.randn(2, 4, 5).double()
    _, state = module(x)
    _, moved = other(x)
    expected = state[..., element.perms["core.0"]] * element.signs["core.0"]
    assert torch.allclose(moved, expected, atol=1e-12)
    again = [m(x, s)[0] for m, s in ((module, state), (other, moved))]
    assert torch.allclose(*again, atol=1e-12)


@pytest.mark.parametrize("name", ["GRU-2-True", "gru-both-ways", "residual-layernorm"])
def test_group_laws(name):
    spec = WeightSpec.from_module(CASES[name]())
    weights = {key: torch.randn(shape) for key, shape in spec.shapes.items()}
    for seed in range(5):
        rng = np.random.default_rng(seed)
        g, h, k = (spec.random(rng) for _ in range(3))
        identity = spec.identity()
        assert (g @ h) @ k == g @ (h @ k)
        assert g @ identity == g == identity @ g
        assert g @ g.inverse() == identity == g.inverse() @ g
        assert (g @ h).inverse() == h.inverse() @ g.inverse()
        two, one = spec.apply(spec.apply(weights, h), g), spec.apply(weights, g @ h)
        assert all(torch.equal(two[key], one[key]) for key in weights)
        back = spec.apply(spec.apply(weights, g), g.inverse())
        assert all(torch.equal(back[key], weights[key]) for key in weights)
        assert Element.from_dict(json.loads(json.dumps(g.to_dict()))) == g
    assert identity.is_identity and not g.is_identity


def test_random_takes_any_generator_and_repeats():
    spec = WeightSpec.from_module(mlp(nn.Tanh))
    assert spec.random(3) == spec.random(3) == spec.random(np.random.default_rng(3))
    assert spec.random(torch.Generator().manual_seed(1)) == spec.random(torch.Generator().manual_seed(1))
    assert spec.random(3) != spec.random(4)


def test_apply_touches_no_input_and_acts_on_batches():
    module = Recurrent(nn.LSTM, 2)
    spec = WeightSpec.from_module(module)
    weights = module.state_dict()
    kept = copy.deepcopy(weights)
    g = spec.random(0)
    moved = spec.apply(weights, g)
    assert all(torch.equal(weights[key], kept[key]) for key in kept)
    assert all(moved[key].data_ptr() != weights[key].data_ptr() for key in kept)
    batch = {key: torch.stack([value, 2 * value]) for key, value in weights.items()}
    both = spec.apply(batch, g, batched=True)
    assert all(torch.equal(both[key][0], moved[key]) and torch.equal(both[key][1], 2 * moved[key]) for key in moved)
    only = spec.permute(weights, {"core.0": g.perms["core.0"]})
    assert torch.equal(only["encoder.0.weight"], weights["encoder.0.weight"])
    with pytest.raises(UserError, match=r"unknown group 'core'; nearest: .*'core.0'"):
        spec.permute(weights, {"core": g.perms["core.0"]})


def test_json_round_trip():
    for make in CASES.values():
        spec = WeightSpec.from_module(make())
        assert WeightSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert "core" in str(WeightSpec.from_module(CASES["GRU-1-True"]()))
    with pytest.raises(UserError, match="schema 9"):
        WeightSpec.from_dict({**spec.to_dict(), "schema": 9})


def test_foreign_weights_and_elements_are_refused():
    spec = WeightSpec.from_module(mlp(nn.Tanh))
    weights = {key: torch.zeros(shape) for key, shape in spec.shapes.items()}
    with pytest.raises(UserError, match=r"'0.weight' has shape \(7, 6\), expected \(7, 5\)"):
        spec.apply({**weights, "0.weight": torch.zeros(7, 6)}, spec.identity())
    with pytest.raises(UserError, match=r"lacks '6.bias' of shape \(3,\)"):
        spec.apply({key: value for key, value in weights.items() if key != "6.bias"}, spec.identity())
    with pytest.raises(UserError, match="has 'more' of shape"):
        spec.apply({**weights, "more": torch.zeros(1)}, spec.identity())
    identity = spec.identity()
    with pytest.raises(UserError, match="not a permutation"):
        spec.apply(weights, Element({**identity.perms, "0": torch.zeros(7, dtype=torch.int64)}, identity.signs))
    with pytest.raises(UserError, match=r"permutation of group '0': expected shape \(7,\), got \(6,\)"):
        spec.apply(weights, Element({**identity.perms, "0": torch.arange(6)}, identity.signs))
    relu = WeightSpec.from_module(mlp(nn.ReLU))
    flipped = Element(identity.perms, {g: -s for g, s in identity.signs.items()})
    with pytest.raises(UserError, match="signs must be 1"):
        relu.apply(weights, flipped)


def test_an_operation_without_a_rule_is_named():
    with pytest.raises(UserError, match="no symmetry rule for 'cumsum'"):
        WeightSpec.from_module(Loud())
    nested = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Bilinear(4, 4, 2))
    with pytest.raises(UserError, match=r"no symmetry rule for 'Bilinear' \(in 2\)"):
        WeightSpec.from_module(nested)
    # Fixing what goes through it is right, too, only less.
    spec = WeightSpec.from_module(Loud(), strict=False)
    assert spec.groups == {}
    assert spec.check(Loud()) == 0.0


def test_a_forward_that_branches_on_values_is_refused():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return self.a(x) if x.sum() > 0 else x

    with pytest.raises(UserError, match="cannot trace Branch"):
        WeightSpec.from_module(Branch())


def test_sizes_come_from_an_example_where_the_module_does_not_show_them():
    class Pool(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x)).mean(1)
            return self.b(F.relu(h.reshape(-1, 6)))

    with pytest.raises(UserError, match="example_input"):
        WeightSpec.from_module(Pool())
    spec = WeightSpec.from_module(Pool(), torch.zeros(2, 4, 5))
    assert spec.groups == {"a": 6} and spec.signed == {"a": False}
    assert spec.check(Pool(), torch.randn(2, 4, 5)) < 1e-5


def test_preprocessing_of_observations_may_do_anything():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = torch.cumsum(torch.flip(x, (-1,)), -1)
            return self.b(torch.tanh(self.a(torch.sort(x, -1)[0]))).clamp(-1, 0.5)

    module = Odd()
    spec = WeightSpec.from_module(module)
    assert spec.groups == {"a": 6}
    assert spec.check(module, torch.randn(4, 5)) < 1e-5


def test_bare_layers():
    assert WeightSpec.from_module(nn.Linear(3, 4)).groups == {}
    two = nn.GRU(3, 4, num_layers=2, batch_first=True)
    spec = WeightSpec.from_module(two)
    assert list(spec.groups.values()) == [4]  # the last layer is the output
    assert spec.check(two, torch.randn(2, 5, 3)) < 1e-5


def test_the_check_leaves_the_module_as_it_was():
    module = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 2))
    module.train()
    module[1].eval()
    kept = copy.deepcopy(module.state_dict())
    assert WeightSpec.from_module(module).check(module) < 1e-5
    assert module.training and module[0].training and not module[1].training
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())


def test_inputs_and_outputs_are_freed_and_fixed_again():
    spec = WeightSpec.from_module(nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 5)))
    free = spec.free("in", "out")
    assert free.groups == {**spec.groups, "in": 2, "out": 5} and free.axes["2.bias"] == (Axis("out"),)
    assert free.fix("in", "out") == spec == spec.fix("in", "out") and free.free("in", "out") == free
    assert spec.free("in").groups == {**spec.groups, "in": 2}
    assert free.axes["0.weight"] == (Axis("0", 1, (True,)), Axis("in"))
    element = free.random(0)
    assert set(element.perms) == {"0", "in", "out"} and bool((element.signs["in"] == 1).all())


def test_axes_of_one_name_and_several_lengths_are_freed_apart():
    axes = {"a": (Axis("h"), Axis(name="in", size=2)), "b": (Axis(parts=(Axis("h"), Axis(name="in", size=4))),)}
    spec = WeightSpec(axes, {"h": 3})
    free = spec.free("in")
    assert free.groups == {"h": 3, "in.2": 2, "in.4": 4} and free.shapes == spec.shapes
    assert free.fix("in") == spec
    named = WeightSpec({"a": (Axis("out"), Axis(name="out", size=2))}, {"out": 3})  # a module may be called so
    assert named.free("out").groups == {"out": 3, "out.2": 2}


def test_names_that_cannot_be_freed_or_fixed():
    spec = WeightSpec({"a": (Axis("h"), Axis(name="fixed", size=2))}, {"h": 3})
    with pytest.raises(UserError, match="nothing in common"):
        spec.free("fixed")
    with pytest.raises(UserError, match="unknown fixed axis 'inn'"):
        spec.free("inn")
    with pytest.raises(UserError, match="unknown group 'hh'"):
        spec.fix("hh")
