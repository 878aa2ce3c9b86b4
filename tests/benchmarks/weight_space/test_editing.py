"""Editing what SIRENs show: the wanted images, the editors, what is measured."""

import base64
import dataclasses

import numpy as np
import pytest
import torch

from fleetgym.benchmarks.weight_space.editing import Contrast, Dilate, canonical, dilate, enhance, shown
from fleetgym.benchmarks.weight_space.task import Job
from fleetgym.benchmarks.zoos.images import digits
from fleetgym.core import Element
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator
from fleetgym.envs.fields.siren import render
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.training import select

pytest.importorskip("sklearn")
SMALL = Dilate(
    source="digits", images=60, channels=8, layers=2, width=8, blocks=1, mlp=16, steps=60, mlp_steps=5, nft_steps=5
)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def job(task, method, folder, seed=0):
    return Job(task.name, method, seed, "cpu", folder / f"{task.name}-{method}-{seed}")


def test_dilation_is_scipys():
    from scipy.ndimage import grey_dilation

    images = torch.from_numpy(generator("test_editing").random((3, 9, 7), np.float32))
    images[0] -= 5  # below zero at the border, where nothing is outside
    for image, found in zip(images.numpy(), dilate(images).numpy()):
        assert np.array_equal(found, grey_dilation(image, size=(3, 3), mode="constant", cval=-np.inf))


def test_contrast_is_pillows():
    from PIL import Image, ImageEnhance

    levels = generator("test_editing", "contrast").integers(40, 256, (4, 12, 12)).astype(np.uint8)
    found = enhance(torch.from_numpy(levels.astype(np.float32) / 255), 1.7) * 255
    for level, mine in zip(levels, found.numpy()):
        theirs = np.asarray(ImageEnhance.Contrast(Image.fromarray(level)).enhance(1.7), np.float32)
        assert np.abs(theirs - mine).max() < 1.5  # theirs has a whole number for the mean, and whole levels
    assert found.min() == 0 and found.max() == 255


@pytest.mark.parametrize("hidden", [(9,), (9, 7), (6, 8, 5)])
def test_canonical_weights_show_the_same(hidden):
    omega, sizes = 30.0, [2, *hidden, 1]
    torch.manual_seed(0)
    weights = {}
    for i, (a, b) in enumerate(zip(sizes, sizes[1:])):
        weights[f"layers.{i}.weight"] = torch.randn(4, b, a, dtype=torch.float64) / (1 if i == 0 else omega)
        weights[f"layers.{i}.bias"] = torch.randn(4, b, dtype=torch.float64)
    found = canonical(weights, omega)
    before, after = (render(w, (7, 5), omega=omega) for w in (weights, found))
    assert torch.allclose(before, after, atol=1e-9) and before.std() > 0.1
    assert (found["layers.0.weight"][..., 0] >= 0).all()
    for i in range(len(hidden)):
        assert found[f"layers.{i}.bias"].abs().max() <= np.pi / omega + 1e-9
        assert i == 0 or (found[f"layers.{i + 1}.weight"].sum(1) >= 0).all()
    # Networks that are the same but for signs and turns become the same.
    other = {key: value.clone() for key, value in weights.items()}
    other["layers.0.weight"][:, 1] *= -1
    other["layers.0.bias"][:, 1] = 4 * np.pi / omega - other["layers.0.bias"][:, 1]
    other["layers.1.weight"][:, :, 1] *= -1
    again = canonical(other, omega)
    assert all(torch.allclose(again[key], found[key], atol=1e-9) for key in found)
    assert not torch.allclose(other["layers.0.bias"], weights["layers.0.bias"])


@pytest.mark.parametrize("method", ["nfn_np", "nfn_hnp", "nft", "mlp"])
def test_an_edit_does_not_depend_on_the_order_of_hidden_units(method):
    zoo = SMALL._zoo(0, "cpu")
    batch = WeightBatch.stack(zoo.spec, {key: value[:4] for key, value in zoo.weights.items()})
    torch.manual_seed(0)
    model = SMALL.model(method, zoo.spec)
    model.normalise(model.fitted(batch))
    scale = model.scale if method == "mlp" else model.head[1]
    model.eval()

    def picture(weights):
        with torch.no_grad():
            return shown(model(weights), (8, 8), 30.0)

    # It begins near what there is.
    before = shown(batch, (8, 8), 30.0)
    assert 0 < (picture(batch) - before).abs().mean() < 0.1
    torch.nn.init.constant_(scale.factors, 0.2)
    drawn = zoo.spec.random(generator("test_editing", "moved"))
    # Sines allow signs as well, which none of the editors knows.
    moved = batch.apply(Element(drawn.perms, {group: sign.abs() for group, sign in drawn.signs.items()}))
    assert not torch.allclose(moved.data, batch.data) and torch.allclose(shown(moved, (8, 8), 30.0), before, atol=1e-3)
    same = (picture(moved) - picture(batch)).abs().mean()
    assert same > 0.01 if method == "mlp" else same < 1e-3


def test_rows(tmp_path):
    rows = {method: SMALL.run(job(SMALL, method, tmp_path)) for method in SMALL.methods()}
    zoo = SMALL._zoo(0, "cpu")
    images = digits()[0][zoo.targets["image"]]
    weights = WeightBatch.stack(zoo.spec, zoo.weights)
    before = shown(weights, (8, 8), 30.0)
    test, known = zoo.splits["test"], zoo.splits["train"]
    wanted = dilate(images)
    assert rows["nothing"]["score"] == pytest.approx(float((before - wanted)[test].square().mean()), rel=1e-4)
    line = np.polyfit(before[known].flatten(), wanted[known].flatten(), 1)
    affine = torch.from_numpy(np.polyval(line, before[test]))
    assert rows["affine"]["score"] == pytest.approx(float((affine - wanted[test]).square().mean()), rel=1e-3)
    for method in ("nfn_np", "nfn_hnp"):
        assert rows[method]["score"] < 0.95 * rows["nothing"]["score"]
        assert rows[method]["validation"] == pytest.approx(min(value for _, value in rows[method]["curve"]), rel=1e-5)
        assert rows[method]["parameters"] > 1000
    kept = np.frombuffer(base64.b64decode(rows["nothing"]["pictures"]["wanted"]), np.uint8).reshape(6, 8, 8)
    assert np.array_equal(kept[0], (wanted[test[0]] * 255).round().numpy())
    assert np.array_equal(kept[-1], (wanted[test[-1]] * 255).round().numpy())
    assert rows["fitted"]["score"] < 1e-4 < rows["affine"]["score"]
    # The same again, and something else with another seed.
    again = SMALL.run(job(SMALL, "nfn_np", tmp_path / "again"))
    assert again["score"] == rows["nfn_np"]["score"]
    assert SMALL.run(job(SMALL, "nothing", tmp_path, seed=1))["score"] != rows["nothing"]["score"]

    listed = [{**row, "method": method, "seed": 0} for method, row in rows.items()]
    path = Dilate.plot(listed, tmp_path / "sheet.png")
    from PIL import Image

    sheet = np.asarray(Image.open(path).convert("L"))
    assert sheet.shape[0] > 500 and sheet.std() > 30
    assert Dilate.plot([row for row in listed if row["method"] == "nothing"], tmp_path / "none.png") is None
    assert not (tmp_path / "none.png").exists()


def test_what_is_wanted_of_contrast(tmp_path):
    task = Contrast(source="digits", images=60, factor=3.0)
    row = task.run(job(task, "nothing", tmp_path))
    zoo = task._zoo(0, "cpu")
    images = digits()[0][zoo.targets["image"]]
    part = select(WeightBatch.stack(zoo.spec, zoo.weights), zoo.splits["test"])
    error = (shown(part, (8, 8), 30.0) - enhance(images, 3.0)[zoo.splits["test"]]).square().mean()
    assert row["score"] == pytest.approx(float(error), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"), [({"source": "photos"}, "photos"), ({"images": 3}, "images=3"), ({"steps": 0}, "steps=0")]
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **settings)


def test_an_unknown_method(tmp_path):
    with pytest.raises(UserError, match="nfn_pn"):
        SMALL.run(job(SMALL, "nfn_pn", tmp_path))
