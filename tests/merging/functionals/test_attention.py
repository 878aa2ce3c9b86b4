import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.merging.functionals import NFAttention, WeightBatch


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.block = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True, dropout=0.0)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.block(self.embed(x)).mean(1))


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Linear(2, 4)
        self.mix = nn.Parameter(torch.randn(5, 3, 4))


def perceptron(*sizes):
    layers = [m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def bilinear_spec():
    from fleetgym.core.weights import Axis

    a, b, c, inputs = Axis("a"), Axis("b"), Axis("c"), Axis(name="in", size=2)
    axes = {"a.weight": (a, inputs), "a.bias": (a,), "b.weight": (b, inputs), "b.bias": (b,), "mix": (c, a, b)}
    return WeightSpec(axes, {"a": 3, "b": 4, "c": 5})


SPECS = {
    "mlp": lambda: WeightSpec.from_module(perceptron(2, 5, 5, 1)).free("in", "out"),
    "wide mlp": lambda: WeightSpec.from_module(perceptron(2, 3, 20, 2)).free("in", "out"),
    "gru": lambda: WeightSpec.from_module(RecurrentPolicy(3, 2, hidden=4)),
    "rnn": lambda: WeightSpec.from_module(RecurrentPolicy(3, 2, cell="rnn", hidden=4)).free("in", "out"),
    "cnn": lambda: WeightSpec.from_module(
        nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)),
        torch.zeros(2, 1, 7, 7),
    ),
    "transformer": lambda: WeightSpec.from_module(Attends().eval(), torch.zeros(2, 3, 3)),
    "three axes": bilinear_spec,
}


def unsigned(spec):
    return WeightSpec(spec.axes, spec.groups, buffers=spec.buffers, nested=spec.nested)


def made(name, channels=4, heads=2, batch=3, **options):
    spec = unsigned(SPECS[name]())
    torch.manual_seed(0)
    layer = NFAttention(spec, channels, heads, **options).double()
    return spec, layer, WeightBatch(spec, torch.randn(batch, layer.layout.size, channels, dtype=torch.float64))


@pytest.mark.parametrize("name", SPECS)
def test_it_is_equivariant(name):
    spec, layer, x = made(name)
    element = spec.random(1)
    out = layer(x)
    moved = layer(x.apply(element)).data
    assert float((moved - out.apply(element).data).detach().abs().max()) < 1e-10
    # Negative control: moving one tensor without those that share its groups is no symmetry.
    wrong = x.data.clone()
    part = max((part for part in layer.layout.parts if part.dims), key=lambda part: part.length)
    piece = wrong.narrow(1, part.offset, part.length).view(len(x), *part.sizes, -1)
    piece.copy_(piece.clone().roll(1, -2))
    both = out.data.clone()
    piece = both.narrow(1, part.offset, part.length).view(len(x), *part.sizes, -1)
    piece.copy_(piece.clone().roll(1, -2))
    assert float((layer(x.replace(wrong)).data - both).detach().abs().max()) > 1e-4


@pytest.mark.parametrize("means", [True, False])
@pytest.mark.parametrize("name", SPECS)
def test_blocks_and_plain_autograd_agree(name, means, monkeypatch):
    _, layer, x = made(name, batch=5, means=means)
    monkeypatch.setattr(NFAttention, "_block", lambda self, data: 2)
    parameters = [layer.weight, layer.bias, *layer.own.values()]
    x.data.requires_grad_()
    fast, plain = layer(x).data, layer._plain(x.data, parameters)
    assert torch.allclose(fast, plain, rtol=0, atol=1e-12)
    g = torch.randn_like(fast)
    ours, theirs = (torch.autograd.grad(out, [x.data, *parameters], g) for out in (fast, plain))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-11) for a, b in zip(ours, theirs))
    assert all(float(b.abs().max()) > 0 for b in theirs[:3])


def as_nfn(x):
    from nfn.common import WeightSpaceFeatures

    weights = [view.permute(0, 3, 1, 2) for part, view in x if len(part.dims) == 2]
    biases = [view.permute(0, 2, 1) for part, view in x if len(part.dims) == 1]
    return WeightSpaceFeatures(weights, biases)


@pytest.mark.parametrize("name", ["mlp", "wide mlp"])
def test_parity_with_nfn(name):
    pytest.importorskip("nfn")
    from nfn.common import network_spec_from_wsfeat
    from nfn.layers import NPAttention

    channels, heads = 8, 4
    _, layer, x = made(name, channels, heads)
    layer, x = layer.float(), x.to(torch.float32)
    features = as_nfn(x)
    theirs = NPAttention(network_spec_from_wsfeat(features, set_all_dims=True), channels, heads)
    (linear,) = [m for m in theirs.modules() if isinstance(m, nn.Linear)]
    with torch.no_grad():  # theirs has queries, keys and values of a head side by side
        weight = linear.weight.reshape(heads, 3, -1, channels).transpose(0, 1)
        layer.weight.copy_(weight.reshape(3 * channels, channels))
        layer.bias.copy_(linear.bias.reshape(heads, 3, -1).transpose(0, 1).reshape(-1))
        ours, theirs = as_nfn(layer(x)), theirs(features)
    for a, b in zip(ours.weights + ours.biases, theirs.weights + theirs.biases):
        assert torch.allclose(a, b, rtol=0, atol=1e-5)


def test_transforms_and_second_derivatives():
    _, layer, x = made("gru", batch=2)
    parameters = {key: torch.stack([value, 2 * value]) for key, value in layer.named_parameters()}
    run = torch.func.vmap(lambda p, d: torch.func.functional_call(layer, p, (x.replace(d),)).data, in_dims=(0, None))
    out = run(parameters, x.data)
    assert torch.allclose(out[0], layer(x).data, atol=1e-12) and not torch.allclose(out[1], out[0], atol=1e-3)

    def energy(data):
        return layer(x.replace(data)).data.square().sum()

    assert torch.allclose(torch.func.grad(energy)(x.data), torch.func.grad(energy)(x.data))
    leaf = x.data.clone().requires_grad_()
    (first,) = torch.autograd.grad(energy(leaf), leaf, create_graph=True)
    assert torch.allclose(first, torch.func.grad(energy)(x.data), atol=1e-12)
    direction = torch.randn_like(leaf)
    (second,) = torch.autograd.grad((first * direction).sum(), leaf)
    step = 1e-5
    there, back = (torch.func.grad(energy)(x.data + s * step * direction) for s in (1, -1))
    assert torch.allclose(second, (there - back) / (2 * step), rtol=1e-5, atol=1e-6)


def test_it_keeps_its_input_alone():
    _, layer, x = made("mlp", batch=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        layer(x.replace(x.data.requires_grad_()))
    assert sum(kept) == x.data.numel() + sum(p.numel() for p in layer.parameters())


def test_bad_input_is_refused():
    spec = SPECS["mlp"]()
    with pytest.raises(UserError, match="channels=0"):
        NFAttention(spec, 0)
    with pytest.raises(UserError, match="heads=3 do not divide channels=8; choose"):
        NFAttention(spec, 8, 3)
    with pytest.raises(UserError, match="heads=0"):
        NFAttention(spec, 8, 0)
    layer = NFAttention(spec, 4, 2)
    with pytest.raises(UserError, match="NFAttention takes 4 channels, the batch has 3"):
        layer(WeightBatch(spec, torch.zeros(2, layer.layout.size, 3)))
    with pytest.raises(UserError, match="another layout"):
        layer(WeightBatch(SPECS["gru"](), torch.zeros(2, 10, 4)))
