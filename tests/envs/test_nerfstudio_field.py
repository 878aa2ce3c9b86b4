import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetgym.core.errors import UserError
from fleetgym.core.optional import EXTRAS, Extra, install_line, installed
from fleetgym.core.pictures import psnr
from fleetgym.envs import fields
from fleetgym.envs.fields import nerfstudio
from fleetgym.envs.fields.captures import Capture, Intrinsics

with_nerfstudio = pytest.mark.skipif(not installed("nerfstudio"), reason=install_line("nerfstudio"))
# A model that a CPU fits in seconds.
SMALL = {
    "num_levels": 4, "log2_hashmap_size": 12, "max_res": 128, "num_proposal_samples_per_ray": (32, 16),
    "num_nerf_samples_per_ray": 16,
    "proposal_net_args_list": [
        {"hidden_dim": 16, "log2_hashmap_size": 12, "num_levels": 3, "max_res": 64, "use_linear": False}
    ],
}  # fmt: skip
OPTIONS = dict(centre=[0, 0, 0.025], batch=256, model=SMALL)


def radiance():
    """The scenes of the tests of voxels."""
    if "scenes_of_radiance" not in sys.modules:
        path = Path(__file__).with_name("test_radiance.py")
        spec = importlib.util.spec_from_file_location("scenes_of_radiance", path)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["scenes_of_radiance"]


def test_what_is_missing_is_said_with_the_lines_that_install_it(monkeypatch):
    extra = dataclasses.replace(EXTRAS["nerfstudio"], imports=("no_such_module",))
    monkeypatch.setitem(EXTRAS, "nerfstudio", extra)
    with pytest.raises(
        UserError, match=r"no_such_module is missing .*pip install 'fleetgym\[nerfstudio\]' && "
    ) as info:
        fields.fit("nerfstudio", [radiance().capture_of(views=4)])
    line = "pip install 'fleetgym[nerfstudio]' && pip install --no-deps nerfstudio==1.1.5"
    assert str(info.value).endswith(f"install it with: {line}")


def test_an_extra_without_a_second_line_has_one(monkeypatch):
    monkeypatch.setitem(EXTRAS, "moon", Extra(("no_such_module",), "going to the moon"))
    assert install_line("moon") == "pip install 'fleetgym[moon]'"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "splatfacto"}, "method='splatfacto' on 'cpu': .*gsplat, which needs CUDA; give device='cuda'"),
        ({"method": "nerfactor"}, "unknown method of nerfstudio 'nerfactor'; nearest: 'nerfacto'"),
        ({"iterations": 0}, "iterations=0"),
        ({"near": -1}, "near=-1"),
        ({"on_error": "hope"}, "on_error='hope'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        fields.fit("nerfstudio", [radiance().capture_of(views=4)], **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here")
def test_no_device():
    with pytest.raises(UserError, match="device='cuda': torch finds no CUDA device"):
        fields.fit("nerfstudio", [radiance().capture_of(views=4)], device="cuda")


@pytest.fixture(scope="module")
def fitted():
    capture = radiance().capture_of()
    return capture, fields.fit("nerfstudio", [capture], iterations=60, seed=3, **OPTIONS)


@with_nerfstudio
def test_a_scene_is_seen_from_where_no_camera_was(fitted):
    capture, found = fitted
    poses = radiance().perturbed(capture.poses, np.random.default_rng(5))
    truth, _ = radiance().box_scene(poses)
    drawn = fields.render(found, poses)
    assert drawn.shape == (1, 12, 32, 32, 3) and drawn.dtype == np.uint8
    assert psnr(drawn[0], truth, capture.masks) > psnr(capture.images, truth, capture.masks) + 1
    report = found.report[0]
    assert report.failed is None and report.iterations == 60 and report.views == 12 and report.seconds > 0
    # The pictures of the poses that were given: nerfstudio has neither turned nor moved nor scaled them.
    assert abs(report.psnr - psnr(found.render(capture.poses)[0], capture.images, capture.masks)) < 1


@with_nerfstudio
def test_the_traps_are_avoided(fitted):
    capture, found = fitted
    model = found.models[0]
    assert model.config.camera_optimizer.mode == "off" and not model.config.use_appearance_embedding
    assert model.config.implementation == "torch" and not model.config.disable_scene_contraction
    assert model.collider.near_plane == pytest.approx(0.02 / 0.2) and not model.collider.reset_near_plane
    assert not [name for name in found.weights if "lpips" in name or "camera_opt" in name]
    # Annealing is done in callbacks, which moved the sampler on; it is over.
    assert model.proposal_sampler._step == 59 and model.proposal_sampler._anneal == 1
    cameras = nerfstudio._cameras(capture.poses, capture.intrinsics, np.array([0, 0, 0.025]), 0.2, "cpu")
    bundle = cameras.generate_rays(3, keep_shape=True)
    lines = radiance().rays(capture.poses[3:4], capture.intrinsics)[0]
    assert np.abs(bundle.directions.numpy() - lines[..., 3:]).max() < 1e-5
    assert np.abs(0.2 * bundle.origins.numpy() + [0, 0, 0.025] - lines[..., :3]).max() < 1e-6


@with_nerfstudio
def test_masked_pixels_and_other_scenes_do_not_matter(fitted):
    capture, _ = fitted
    images = capture.images.copy()
    images[~capture.masks] = 255
    poses = capture.poses.copy()
    poses[1, :3, 0] *= -1
    mirrored = dataclasses.replace(capture, poses=poses)
    options = dict(iterations=3, seed=0, **OPTIONS)
    alone = fields.fit("nerfstudio", [capture], **options)
    other = fields.fit(
        "nerfstudio", [mirrored, dataclasses.replace(capture, images=images)], on_error="skip", **options
    )
    assert sorted(other.failed) == [0] and "mirrored" in other.failed[0]
    for name, value in alone.weights.items():
        assert torch.equal(value, other.weights[name.replace("0.", "1.", 1)]), name
    differs = fields.fit("nerfstudio", [capture], **{**options, "seed": 1})
    assert any(not torch.equal(value, alone.weights[name]) for name, value in differs.weights.items())


@with_nerfstudio
def test_models_are_saved_and_loaded_without_pickle(fitted, tmp_path):
    capture, found = fitted
    found.save(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["fields.json", "fields.safetensors"]
    again = nerfstudio.Nerfstudios.load(tmp_path / "kept")
    assert np.array_equal(again.render(capture.poses[:2]), found.render(capture.poses[:2]))
    assert again.report == found.report


@with_nerfstudio
def test_unknown_options_of_a_model(fitted):
    with pytest.raises(UserError, match="unknown option of nerfacto 'num_level'; nearest: 'num_levels'"):
        fields.fit("nerfstudio", [fitted[0]], model={"num_level": 4})


@with_nerfstudio
def test_held_out_views_and_another_camera(fitted):
    capture, _ = fitted
    found = fields.fit("nerfstudio", [capture], iterations=2, hold_out=3, **OPTIONS)
    report = found.report[0]
    assert report.views == 9 and report.held_out is not None
    small = Intrinsics.from_fov(np.pi / 2, 8, 6)
    assert found.render(capture.poses[:1], intrinsics=small).shape == (1, 1, 8, 6, 3)
    assert found.distances(capture.poses[:1], intrinsics=small).shape == (1, 1, 8, 6)
    with pytest.raises(UserError, match="2 views; at least 3"):
        few = Capture(capture.images[:2], capture.poses[:2], capture.intrinsics, capture.masks[:2])
        fields.fit("nerfstudio", [few])
