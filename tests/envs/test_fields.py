import numpy as np
import pytest
import torch

from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator
from fleetgym.core.weights import WeightSpec
from fleetgym.envs import fields
from fleetgym.envs.fields import siren
from fleetgym.envs.fields.siren import Siren, fit_sirens, places, render


def pictures(number, size=(12, 10), channels=1, dtype=torch.float32):
    """Smooth random pictures in 0..1: a few waves each."""
    rng = torch_generator("test_fields", number, channels)
    waves = 6 * torch.randn(number, 3, 2, channels, generator=rng, dtype=torch.float64)
    phases = 6 * torch.rand(number, 1, 3, channels, generator=rng, dtype=torch.float64)
    angles = torch.einsum("md,nkdc->nmkc", places(size, dtype=torch.float64), waves) + phases
    return (0.5 + 0.5 * torch.sin(angles).mean(2)).unflatten(1, size).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("hidden", "channels"), [((32, 32), 1), ((8,), 3), ((8, 12, 10), 2)])
def test_the_gradient_is_that_of_autograd(hidden, channels, dtype):
    images = pictures(5, channels=channels, dtype=dtype)
    sizes = [2, *hidden, channels]
    flat = siren._initial(sizes, 30.0, 5, 0, "independent", images)
    block = siren._Block(5, images.shape[1:3], sizes, 30.0, images)
    loss = block.loss(flat, images.flatten(1, 2).mT.contiguous())
    gradient = block.backward(flat)

    leaf = flat.double().requires_grad_()
    drawn = render(siren._views(leaf, siren._shapes(sizes)), images.shape[1:3])
    expected = (drawn - images).square().mean((1, 2, 3))
    expected.sum().backward()
    error = 1e-12 if dtype == torch.float64 else 1e-5
    assert (loss - expected.detach()).abs().max() < error
    assert (gradient - leaf.grad).abs().max() < error * leaf.grad.abs().max()
    assert (gradient[1:] - leaf.grad[:-1]).abs().max() > 0.1 * leaf.grad.abs().max()  # the networks differ


def test_sine_and_cosine_of_one_pass():
    from fleetgym.envs.fields.sincos import sincos

    rng = np.random.default_rng(0)
    angle = rng.uniform(-300, 300, (3, 500, 7)).astype(np.float32)
    bias = rng.normal(size=(3, 7)).astype(np.float32)
    exact = (np.float32(2) * (angle + bias[:, None])).astype(np.float64)  # the sum rounded, as in the pass
    cosine = np.empty_like(angle)
    sincos(angle, bias, np.float32(2), cosine)
    assert np.abs(angle - np.sin(exact)).max() < 2e-7
    assert np.abs(cosine - np.cos(exact)).max() < 2e-7


def test_fits_reach_the_images_and_are_drawn_in_any_size():
    images = pictures(6, channels=2)
    found = fields.fit("siren", images, progress=False)
    assert len(found) == 6 and found.psnr.min() > 35
    drawn = fields.render(found)
    error = (drawn - images).square().mean((1, 2, 3))
    assert torch.allclose(-10 * torch.log10(error), found.psnr, atol=0.05)
    module = found.siren(4)
    assert torch.allclose(module(places((12, 10))).unflatten(0, (12, 10)), drawn[4], atol=1e-5)
    assert fields.render(found, (24, 5)).shape == (6, 24, 5, 2)
    corners = fields.render(found, (2, 2))
    assert torch.allclose(corners[:, 1, 0], drawn[:, -1, 0], atol=1e-5)  # rows go down, columns to the right


def test_real_digits_reach_38_db():
    datasets = pytest.importorskip("sklearn.datasets")
    images = datasets.load_digits().images[:24] / 16
    # 28 x 28 in the style of MNIST: larger pictures of real digits.
    large = torch.nn.functional.interpolate(torch.as_tensor(images)[:, None], (28, 28), mode="bicubic")[:, 0].clip(0, 1)
    assert fit_sirens(large, progress=False).psnr.mean() > 38
    few, many = (fit_sirens(images, steps=steps, progress=False).psnr.mean() for steps in (10, 40))
    assert many > few + 10


def test_a_network_depends_on_its_image_and_the_seed_alone(monkeypatch):
    images = pictures(6)
    alone = fit_sirens(images[:2], steps=8, progress=False)
    again = fit_sirens(images[:2], steps=8, progress=False)
    together = fit_sirens(images, steps=8, progress=False)
    other = fit_sirens(images[:2], steps=8, seed=1, progress=False)
    monkeypatch.setitem(siren._BLOCK, "cpu", 1)  # one network a block
    apart = fit_sirens(images, steps=8, progress=False)
    for name, value in alone.weights.items():
        assert torch.equal(value, again.weights[name])
        assert torch.allclose(value, together.weights[name][:2], atol=1e-4)
        assert torch.allclose(together.weights[name], apart.weights[name], atol=1e-4)
        assert not torch.allclose(value, other.weights[name], atol=1e-2)


def test_initial_weights():
    images = pictures(3)
    sizes = [2, 32, 32, 1]
    shared = siren._initial(sizes, 30.0, 3, 0, "shared", images)
    own = siren._initial(sizes, 30.0, 3, 0, "independent", images)
    assert torch.equal(shared[0], shared[2]) and not torch.allclose(own[0], own[2], atol=1e-2)
    for name, value in siren._views(own, siren._shapes(sizes)).items():
        bound = siren._bounds(sizes, 30.0)[name]
        assert value.abs().max() <= bound and (value.numel() < 30 or value.abs().max() > 0.9 * bound)
    # Given: a stacked state dict, and one network's for all.
    stacked = {name: value.clone() for name, value in siren._views(own, siren._shapes(sizes)).items()}
    assert torch.equal(siren._initial(sizes, 30.0, 3, 9, stacked, images), own)
    single = {name: value[1] for name, value in stacked.items()}
    assert torch.equal(siren._initial(sizes, 30.0, 3, 9, single, images), own[1].expand(3, -1))
    begun = fit_sirens(images, steps=1, learning_rate=1e-9, init=stacked, progress=False)
    assert all(torch.allclose(begun.weights[name], value, atol=1e-7) for name, value in stacked.items())


def test_the_symmetry_of_a_siren():
    spec = WeightSpec.from_module(Siren(2, (5, 6), 3), torch.zeros(1, 2))
    assert sorted(spec.groups.values()) == [5, 6] and all(spec.signed.values())


def test_gradients_flow_through_a_drawing():
    weights = {name: value.detach()[None].requires_grad_() for name, value in Siren().state_dict().items()}
    render(weights, (3, 4)).sum().backward()
    assert weights["layers.2.bias"].grad.item() == pytest.approx(12)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.rand(4, 4)}, r"\[4, 4\]"),
        ({"images": torch.rand(0, 4, 4)}, r"\[0, 4, 4\]"),
        ({"images": torch.full((2, 4, 4), torch.nan)}, "image 0"),
        ({"hidden": ()}, "hidden layer"),
        ({"hidden": (4, 0)}, r"\[2, 4, 0, 1\]"),
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"omega": -1.0}, "omega=-1.0"),
        ({"init": "same"}, "'same'.*independent, shared"),
        ({"init": Siren(2, (4,)).state_dict()}, r"init does not fit.*layers\.0\.weight"),
        ({"dtype": torch.float16}, "float16"),
        ({"learning_rate": 1e30}, "diverged.*image 0"),
    ],
)
def test_bad_input(change, words):
    with pytest.raises(UserError, match=words):
        fit_sirens(**{"images": torch.rand(2, 4, 4), "steps": 3, "progress": False, **change})


def test_bad_weights_and_sizes():
    weights = {name: value[None] for name, value in Siren().state_dict().items()}
    with pytest.raises(UserError, match="height"):
        render(weights, (0, 3))
    with pytest.raises(UserError, match=r"layers\.1\.bias"):
        render({name: value for name, value in weights.items() if name != "layers.1.bias"}, (2, 2))
    with pytest.raises(UserError, match="kind of field"):
        fields.fit("sirens", torch.rand(1, 2, 2))
