import math

import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.merging.functionals import (
    FourierFeatures,
    IOEncoding,
    LayerEncoding,
    LearnedEncoding,
    NFPool,
    WeightBatch,
)
from fleetgym.merging.functionals.pool import QueryPool


def mlp_spec():
    return WeightSpec.from_module(
        nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    )


def policy_spec():
    return WeightSpec.from_module(RecurrentPolicy(3, 2, hidden=4))


def random(spec, channels, batch=3, dtype=torch.float64):
    spec = WeightSpec(spec.axes, spec.groups, buffers=spec.buffers, nested=spec.nested)
    x = WeightBatch(spec, torch.zeros(0, 0, channels))
    torch.manual_seed(0)
    return spec, x.replace(torch.randn(batch, x.layout.size, channels, dtype=dtype))


def nfn_features(x):
    from nfn.common import WeightSpaceFeatures, network_spec_from_wsfeat

    tensors = x.tensors()
    weights = [t.permute(0, 3, 1, 2) for t in tensors.values() if t.dim() == 4]
    biases = [t.permute(0, 2, 1) for t in tensors.values() if t.dim() == 3]
    features = WeightSpaceFeatures(weights, biases)
    return features, network_spec_from_wsfeat(features, set_all_dims=True)


def test_fourier_features():
    _, x = random(mlp_spec(), 2)
    layer = FourierFeatures(2, 6, scale=0.5)
    out = layer(x)
    assert out.channels == layer.channels == 12 and not list(layer.parameters())
    angle = 2 * math.pi * float((x.data[1, 7] * layer.frequencies[:, 4].double()).sum())
    assert math.isclose(float(out.data[1, 7, 4]), math.sin(angle), abs_tol=1e-6)
    assert math.isclose(float(out.data[1, 7, 10]), math.cos(angle), abs_tol=1e-6)
    kept = FourierFeatures(2, 6, scale=0.5, keep=True)
    assert kept.channels == 14 and torch.equal(kept(x).data, torch.cat([out.data, x.data], -1))
    assert torch.equal(layer.frequencies, FourierFeatures(2, 6, scale=0.5).frequencies)
    assert 0.3 < float(FourierFeatures(1, 1000, scale=0.5).frequencies.std()) < 0.7


@pytest.mark.parametrize("free", [False, True])
def test_io_encoding_is_that_of_nfn(free):
    pytest.importorskip("nfn")
    from nfn.layers import IOSinusoidalEncoding

    spec = mlp_spec().free("in", "out") if free else mlp_spec()
    _, x = random(spec, 1, dtype=torch.float32)
    ours = nfn_features(IOEncoding(x.layout, 3, 5.0)(x))[0]
    features, network = nfn_features(x)
    theirs = IOSinusoidalEncoding(network, 5.0, 3)(features)
    for a, b in zip(ours.weights + ours.biases, theirs.weights + theirs.biases):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("spec", [mlp_spec, policy_spec])
@pytest.mark.parametrize("kind", [IOEncoding, LayerEncoding, LearnedEncoding])
def test_encodings_keep_the_symmetry_of_hidden_units_and_break_that_of_inputs(kind, spec):
    spec, x = random(spec(), 4)
    layer = kind(x.layout, *(() if kind is IOEncoding else (4,))).double()
    element = spec.random(2)
    assert torch.equal(layer(x.apply(element)).data, layer(x).apply(element).data)
    free, x = random(spec.free("in", "out"), 4)
    layer = kind(x.layout, *(() if kind is IOEncoding else (4,))).double()
    perms = {"in": torch.tensor([1, 2, 0]), "out": torch.tensor([1, 0])}
    element = free.identity()
    element.perms.update(perms)
    gap = float((layer(x.apply(element)).data - layer(x).apply(element).data).detach().abs().max())
    assert gap == 0 if kind is LayerEncoding else gap > 0.01


def test_learned_encoding_names_tensors_inputs_and_outputs():
    spec, x = random(mlp_spec(), 2)
    layer = LearnedEncoding(spec, 2)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "tensors": (6, 2),
        "ends.in_3": (3, 2),
        "ends.out_2": (2, 2),
    }
    added = x.replace(layer(x).data - x.data).tensors()
    t, i, o = layer.tensors.double(), layer.ends["in_3"].double(), layer.ends["out_2"].double()
    assert torch.allclose(added["0.weight"][0, 4, 2], t[0] + i[2])
    assert torch.allclose(added["4.weight"][2, 1, 3], t[4] + o[1])
    assert torch.allclose(added["4.bias"][2, 0], t[5] + o[0]) and torch.allclose(added["2.weight"][0, 0, 0], t[2])


def test_pools_are_those_of_nfn():
    pytest.importorskip("nfn")
    from nfn.layers import HNPPool, NPPool

    for spec, kind in ((mlp_spec().free("in", "out"), NPPool), (mlp_spec(), HNPPool)):
        _, x = random(spec, 2)
        pool = NFPool(x.layout, ("mean",))
        theirs = kind(nfn_features(x)[1])(nfn_features(x)[0]).flatten(1)
        ours = pool(x)
        assert ours.shape == theirs.shape == (3, 2 * pool.features)
        assert torch.allclose(ours.sort(1).values, theirs.sort(1).values, atol=1e-12)


@pytest.mark.parametrize("spec", [mlp_spec, policy_spec])
def test_pools_are_invariant(spec):
    spec, x = random(spec(), 4)
    moved = x.apply(spec.random(3))
    assert not torch.equal(moved.data, x.data)
    wrong = x.replace(x.data.roll(1, 1))
    for pool in (NFPool(spec, ("mean", "std", "max", "min")), QueryPool(spec, 4, 3, 6, 2).double()):
        assert float((pool(moved) - pool(x)).detach().abs().max()) < 1e-12
        if isinstance(pool, NFPool):
            assert pool(x).shape == (3, 4 * pool.features)
            assert float((pool(wrong) - pool(x)).abs().max()) > 1e-3
        else:
            assert pool(x).shape == (3, 3, 6)
            assert float((pool(x.replace(x.data.square())) - pool(x)).detach().abs().max()) > 1e-3


def test_equal_values_have_a_finite_gradient():
    spec, x = random(mlp_spec(), 2)
    data = torch.ones_like(x.data).requires_grad_()
    NFPool(spec)(x.replace(data)).sum().backward()
    assert torch.isfinite(data.grad).all()
    values = NFPool(spec, ("std",))(x)
    part, view = next(iter(x))
    assert torch.allclose(values[:, : part.fold * 2], view.flatten(1, -2).std(1, unbiased=False))


def test_bad_input_is_refused():
    spec, x = random(mlp_spec(), 2)
    for make, message in (
        (lambda: FourierFeatures(0), "channels=0"),
        (lambda: FourierFeatures(1, 0), "size=0"),
        (lambda: FourierFeatures(1, 2, scale=0), "scale=0"),
        (lambda: IOEncoding(spec, 0), "bands=0"),
        (lambda: LearnedEncoding(spec, 0), "channels=0"),
        (lambda: NFPool(spec, ("median",)), "unknown statistic 'median'"),
        (lambda: NFPool(spec, ()), r"stats=\(\)"),
        (lambda: NFPool(spec, "mean"), "stats='mean'"),
        (lambda: QueryPool(spec, 4, 2, 6, 4), "heads=4 do not divide size=6"),
        (lambda: LearnedEncoding(spec, 3)(x), "LearnedEncoding takes 3 channels, the batch has 2"),
        (lambda: FourierFeatures(1)(x), "FourierFeatures takes 1 channels"),
    ):
        with pytest.raises(UserError, match=message):
            make()
