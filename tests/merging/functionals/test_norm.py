import pytest
import torch
from torch import nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.merging.functionals import NFLinear, NFNorm, WeightBatch, fast
from fleetgym.merging.functionals.norm import NFBlock


@pytest.fixture
def spec():
    net = nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 3))
    return WeightSpec.from_module(net, torch.zeros(1, 2)).free("in", "out")


def batch(spec, channels, seed=0, dtype=torch.float64):
    layout = NFNorm(spec, 2).layout
    generator = torch.Generator().manual_seed(seed)
    return WeightBatch(layout, torch.randn(4, layout.size, channels, generator=generator, dtype=dtype))


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("affine", [None, "shared"])
@pytest.mark.parametrize("least", [0, 1 << 17], ids=["compiled", "plain"])
def test_it_is_layer_norm(monkeypatch, spec, least, affine, dtype, error):
    monkeypatch.setattr(fast, "LEAST_NORM", least)
    x, norm = batch(spec, 6, dtype=dtype), NFNorm(spec, 6, affine).to(dtype)
    if affine is not None:
        with torch.no_grad():
            norm.scale.normal_(generator=torch.Generator().manual_seed(1))
            norm.shift.normal_(generator=torch.Generator().manual_seed(2))
    row = [None, None] if affine is None else [norm.scale[0], norm.shift[0]]
    x.data.requires_grad_()
    ours, theirs = norm(x).data, nn.functional.layer_norm(x.data, (6,), *row)
    torch.testing.assert_close(ours, theirs, rtol=error, atol=error)
    given = torch.randn_like(ours)
    wanted = [x.data, *norm.parameters()]
    for a, b in zip(torch.autograd.grad(ours, wanted, given), torch.autograd.grad(theirs, wanted, given)):
        torch.testing.assert_close(a, b, rtol=10 * error, atol=10 * error)


@pytest.mark.parametrize("least", [0, 1 << 17], ids=["compiled", "plain"])
def test_each_part_has_its_scale_and_shift(monkeypatch, spec, least):
    monkeypatch.setattr(fast, "LEAST_NORM", least)
    x, norm = batch(spec, 3), NFNorm(spec, 3).double()
    plain = NFNorm(spec, 3, None)(x)
    with torch.no_grad():
        norm.scale.normal_(generator=torch.Generator().manual_seed(1))
        norm.shift.normal_(generator=torch.Generator().manual_seed(2))
    found = norm(x)
    assert norm.scale.shape == (len(x.layout.parts), 3)
    for n, part in enumerate(x.layout.parts):
        torch.testing.assert_close(found.view(part), plain.view(part) * norm.scale[n] + norm.shift[n])


def test_it_commutes_with_the_symmetry(spec):
    x, norm = batch(spec, 4), NFNorm(spec, 4).double()
    with torch.no_grad():
        norm.scale.normal_(generator=torch.Generator().manual_seed(1))
    layout = x.layout
    swap = torch.arange(layout.size)
    middle = next(part for part in layout.parts if part.name == "0.bias")
    swap[middle.offset : middle.offset + middle.length] = swap[middle.offset : middle.offset + middle.length].flip(0)
    moved = norm(x.replace(x.data[:, swap])).data
    torch.testing.assert_close(moved, norm(x).data[:, swap])
    wrong = torch.arange(layout.size).flip(0)  # mixes parts, whose scales differ
    assert not torch.allclose(norm(x.replace(x.data[:, wrong])).data, norm(x).data[:, wrong])


@pytest.mark.parametrize("least", [0, 1 << 17], ids=["compiled", "plain"])
def test_equal_channels_have_finite_gradients(monkeypatch, spec, least):
    monkeypatch.setattr(fast, "LEAST_NORM", least)
    x, norm = batch(spec, 4), NFNorm(spec, 4).double()
    data = x.data[..., :1].expand(-1, -1, 4).clone().requires_grad_()
    out = norm(x.replace(data)).data
    assert torch.equal(out, torch.zeros_like(out))
    (slope,) = torch.autograd.grad(out, data, torch.randn_like(out))
    assert torch.isfinite(slope).all()


def test_nan_stays_where_it_is(monkeypatch, spec):
    monkeypatch.setattr(fast, "LEAST_NORM", 0)
    x = batch(spec, 4)
    x.data[1, 2, 3] = float("nan")
    found = fast.normalise(fast.Norm((x.layout.size,), 1e-5, "relu"), x.data, None, None)
    assert found[1, 2].isnan().all() and found.isnan().sum() == 4


def test_second_derivatives_and_transforms(monkeypatch, spec):
    monkeypatch.setattr(fast, "LEAST_NORM", 0)
    x, norm = batch(spec, 3), NFNorm(spec, 3, eps=0.1).double()

    def function(data, scale, shift):
        return torch.func.functional_call(norm, {"scale": scale, "shift": shift}, x.replace(data)).data

    data = x.data[:1].requires_grad_()
    assert torch.autograd.gradcheck(function, (data, norm.scale, norm.shift))
    assert torch.autograd.gradgradcheck(function, (data, norm.scale, norm.shift))
    single = torch.func.vmap(lambda data: norm(x.replace(data[None])).data[0])(x.data)
    torch.testing.assert_close(single, norm(x).data)


@pytest.mark.parametrize("channels", [0, 1])
def test_one_channel_is_refused(spec, channels):
    with pytest.raises(UserError, match=f"NFNorm with {channels} channel.*one-channel normalisation"):
        NFNorm(spec, channels)


def test_other_bad_input(spec):
    with pytest.raises(UserError, match="affine.*parts"):
        NFNorm(spec, 2, "parts")
    with pytest.raises(UserError, match="eps=0"):
        NFNorm(spec, 2, eps=0)
    with pytest.raises(UserError, match="takes 2 channels, the batch has 3"):
        NFNorm(spec, 2)(batch(spec, 3))
    linear = NFLinear(spec, 1, 4, symmetry=None)
    with pytest.raises(UserError, match="activation.*rely"):
        NFBlock(linear, NFNorm(spec, 4), "rely")
    with pytest.raises(UserError, match="gives 4 channels, the norm takes 3"):
        NFBlock(linear, NFNorm(spec, 3))
    with pytest.raises(UserError, match="different layouts"):
        NFBlock(linear, NFNorm(spec.fix("in"), 4))
