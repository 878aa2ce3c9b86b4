import dataclasses
import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetgym.core.errors import UserError
from fleetgym.core.pictures import psnr
from fleetgym.envs import fields
from fleetgym.envs.fields import fitting
from fleetgym.envs.fields import hash as hashing
from fleetgym.envs.fields.captures import Capture, Intrinsics, rays
from fleetgym.envs.fields.hash import Hashes
from fleetgym.envs.fields.marching import march


def radiance():
    """The scenes of the tests of voxels."""
    if "scenes_of_radiance" not in sys.modules:
        path = Path(__file__).with_name("test_radiance.py")
        spec = importlib.util.spec_from_file_location("scenes_of_radiance", path)
        sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[spec.name])
    return sys.modules["scenes_of_radiance"]


CAMERA = Intrinsics.from_fov(np.pi / 2, 32, 32)
SMALL = dict(levels=6, table=1 << 13, features=4, resolutions=(8, 128), hidden=32, batch=400)


def layout(**options):
    defaults = dict(levels=3, table=64, features=2, coarsest=2, finest=11, hidden=8, precision="float32", scale=0.3)
    rays_ = dict(near=0.05, far=2.0, coarse=6, fine=5, merge=False, background=(0.9, 0.8, 1.0))
    return hashing._Layout(**{**defaults, **rays_, **options})


def by_hand(tables, place, made):
    """Features at one place, corner by corner; tables [L, T, F]."""
    out = []
    for level, cells in enumerate(made.sizes):
        at = [min(int(x * cells), cells - 1) for x in place]
        total = np.zeros(made.features)
        for i, j, k in np.ndindex(2, 2, 2):
            node = [a + d for a, d in zip(at, (i, j, k))]
            share = np.prod([(x * cells - a) if d else 1 - (x * cells - a) for x, a, d in zip(place, at, (i, j, k))])
            if (cells + 1) ** 3 <= made.table:
                row = (node[0] * (cells + 1) + node[1]) * (cells + 1) + node[2]
            else:
                row = (node[0] ^ (node[1] * 2654435761) ^ (node[2] * 805459861)) % made.table
            total += share * tables[level, row]
        out.append(total)
    return np.concatenate(out)


def test_features_are_interpolated_between_the_entries_of_corners():
    made = layout()
    assert made.sizes == [2, 5, 11] and made.dense == 1
    rng = np.random.default_rng(0)
    tables, places = rng.normal(size=(2, 3, 64, 2)), rng.uniform(size=(2, 7, 3))
    places[0, 0], places[1, 0] = 0, 1  # the edges of space
    found = hashing._Lookup.apply(torch.as_tensor(tables), torch.as_tensor(places), made)
    for n in range(2):
        for p in range(7):
            assert np.abs(found[n, p].numpy() - by_hand(tables[n], places[n, p], made)).max() < 1e-12


def test_the_gradient_of_tables():
    made, rng = layout(), torch.Generator().manual_seed(0)
    tables = torch.randn(2, 3, 64, 2, generator=rng, dtype=torch.float64, requires_grad=True)
    places = torch.rand(2, 9, 3, generator=rng, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda t: hashing._Lookup.apply(t, places, made), tables)


def test_a_scene_among_others_is_drawn_with_its_own_tables():
    made = layout()
    weights = {name: torch.stack([made.first(seed)[name] for seed in range(3)]) for name in made.shapes}
    weights["tables"] *= 100
    centres = torch.tensor([[0.0, 0, 0], [0.1, 0, 0], [0, 0.1, 0]])
    lines = torch.as_tensor(rays(radiance().approach(3, np.random.default_rng(1)), Intrinsics.from_fov(1.5, 4, 4)))
    flat = lines.reshape(3, -1, 6)
    walk = made.walk(flat)
    together = march(
        hashing._Tables(made, weights, centres), flat.flatten(0, 1), torch.arange(3).repeat_interleave(16), **walk
    )[0]
    assert together.std() > 0.01
    for n in range(3):
        mine = {name: value[n : n + 1] for name, value in weights.items()}
        alone = march(
            hashing._Tables(made, mine, centres[n : n + 1]), flat[n], torch.zeros(16, dtype=torch.long), **walk
        )[0]
        assert torch.allclose(alone, together[16 * n : 16 * n + 16], atol=1e-5)


@pytest.fixture(scope="module")
def fitted():
    capture = radiance().capture_of()
    return capture, fields.fit("hash", [capture], centre=[0, 0, 0.025], iterations=60, seed=3, **SMALL)


def test_a_box_is_seen_from_where_no_camera_was(fitted):
    capture, found = fitted
    poses = radiance().perturbed(capture.poses, np.random.default_rng(5))
    truth, box = radiance().box_scene(poses)
    drawn = fields.render(found, poses)
    assert drawn.shape == (1, 12, 32, 32, 3) and drawn.dtype == np.uint8
    seen = capture.masks
    assert psnr(drawn[0], truth, seen) > psnr(capture.images, truth, seen) + 2
    assert psnr(drawn[0], truth, seen & box) > psnr(capture.images, truth, seen & box) + 2
    report = found.report[0]
    assert report.failed is None and report.iterations == 60 and report.views == 12 and report.seconds > 0
    assert abs(report.psnr - psnr(found.render(capture.poses)[0], capture.images, seen)) < 1
    # The box is 0.05 m high, and cameras come from 0.35 m to 0.12 m.
    distance = found.distances(poses)[0]
    assert distance.shape == (12, 32, 32) and 0.05 < np.median(distance[box]) < 0.25
    (points,) = found.surfaces(poses, size=16, farthest=0.5)
    few = found.distances(poses, intrinsics=capture.intrinsics.resized(16, 16))[0]
    assert points.shape == ((few < 0.5).sum(), 3)
    # The first point lies that far from the first camera.
    assert np.linalg.norm(points[0] - poses[0, :3, 3]) == pytest.approx(few[few < 0.5][0], abs=1e-6)
    near = np.abs(points[:, :2]).max(1) < 0.02  # what is seen about the middle is the box
    assert near.sum() > 20 and 0.02 < np.median(points[near, 2]) < 0.07


def test_equal_seeds_equal_fields(fitted):
    capture, _ = fitted
    options = dict(centre=[0, 0, 0.025], iterations=4, **SMALL)
    found, again, other = (fields.fit("hash", [capture], seed=seed, **options) for seed in (3, 3, 4))
    assert all(torch.equal(again.weights[name], value) for name, value in found.weights.items())
    assert not torch.equal(other.weights["tables"], found.weights["tables"])


def test_masked_pixels_do_not_matter(fitted):
    capture, _ = fitted
    images = capture.images.copy()
    images[~capture.masks] = 255
    options = dict(iterations=4, **SMALL)
    found, other = (fields.fit("hash", [c], **options) for c in (capture, dataclasses.replace(capture, images=images)))
    assert torch.equal(found.weights["tables"], other.weights["tables"])


def test_many_at_once_are_as_one_by_one(fitted, monkeypatch):
    capture, _ = fitted
    second = radiance().capture_of(1, colour=(0.1, 0.3, 0.9))
    second.masks[:, :5] = False  # not as many rays as the first
    options = dict(iterations=5, seed=0, **SMALL)
    both = fields.fit("hash", [capture, second], centre=[[0, 0, 0.02], [0, 0.01, 0.02]], **options)
    poses = np.stack([capture.poses[:2], second.poses[1:3]])
    drawn = both.render(poses)
    for n, (one, centre) in enumerate(((capture, [0, 0, 0.02]), (second, [0, 0.01, 0.02]))):
        alone = fields.fit("hash", one, centre=centre, **options)
        assert torch.allclose(alone.weights["tables"][0], both.weights["tables"][n], atol=1e-4)
        assert np.abs(alone.render(poses[n])[0].astype(int) - drawn[n]).max() <= 2
    assert np.abs(drawn[0].astype(int) - drawn[1]).mean() > 1
    monkeypatch.setattr(fitting, "_ROOM", 1)  # a scene and a ray at a time
    parts = fields.fit("hash", [capture, second], centre=[[0, 0, 0.02], [0, 0.01, 0.02]], **options)
    assert torch.allclose(parts.weights["tables"], both.weights["tables"], atol=1e-4)


def test_pictures_drawn_in_parts_are_whole(fitted, monkeypatch):
    capture, found = fitted
    whole = found.render(capture.poses[:2])
    monkeypatch.setattr(fitting, "_ROOM", 300 * hashing._Layout(**found.config).ray)
    assert np.array_equal(found.render(capture.poses[:2]), whole)
    small = Intrinsics.from_fov(np.pi / 2, 16, 8)
    assert found.render(capture.poses[:2], intrinsics=small).shape == (1, 2, 16, 8, 3)


def test_sixteen_bits_in_the_networks(fitted):
    capture, found = fitted
    half = fields.fit("hash", [capture], centre=[0, 0, 0.025], iterations=60, seed=3, precision="bfloat16", **SMALL)
    assert not torch.equal(half.weights["tables"], found.weights["tables"])
    assert abs(half.report[0].psnr - found.report[0].psnr) < 1.5


def test_fields_are_saved_and_loaded(fitted, tmp_path):
    capture, found = fitted
    found.save(tmp_path / "kept")
    again = Hashes.load(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["fields.json", "fields.safetensors"]
    difference = again.render(capture.poses[:3]).astype(int) - found.render(capture.poses[:3])
    assert np.abs(difference).mean() < 0.5
    assert again.report == found.report and again.intrinsics == CAMERA and again.config == found.config
    with pytest.raises(UserError, match="not of fleetgym.voxels/1"):
        fields.FIELDS.get("voxel").load(tmp_path / "kept")
    (tmp_path / "kept" / "fields.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="fields.safetensors"):
        Hashes.load(tmp_path / "kept")


def test_one_unusable_capture_spoils_none_of_the_others(fitted):
    good = fitted[0]
    mirrored = good.poses.copy()
    mirrored[1, :3, 0] *= -1
    bad = dataclasses.replace(good, poses=mirrored)
    few = Capture(good.images[:2], good.poses[:2], CAMERA, good.masks[:2])
    options = dict(iterations=3, **SMALL)
    with pytest.raises(UserError, match="capture 1: .*pose of view 1 is mirrored"):
        fields.fit("hash", [good, bad], **options)
    found = fields.fit("hash", [bad, good, few], on_error="skip", **options)
    alone = fields.fit("hash", [good], **options)
    assert sorted(found.failed) == [0, 2] and "mirrored" in found.failed[0] and "2 views" in found.failed[2]
    assert np.array_equal(found.render(good.poses[:2], scenes=[1]), alone.render(good.poses[:2]))
    with pytest.raises(UserError, match="scene 0 has no field .*mirrored"):
        found.render(good.poses)


def test_a_fit_that_diverges_is_named(fitted, monkeypatch):
    good = fitted[0]
    first = hashing._Layout.first
    monkeypatch.setattr(
        hashing._Layout, "first", lambda self, seed: {k: v * torch.nan for k, v in first(self, seed).items()}
    )
    with pytest.raises(UserError, match="capture 0: the fit diverged; lower learning_rate"):
        fields.fit("hash", [good], iterations=1, **SMALL)
    found = fields.fit("hash", [good], iterations=1, on_error="skip", **SMALL)
    assert "diverged" in found.failed[0] and not found.weights["tables"].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"batch": 0}, "batch=0"),
        ({"levels": 0}, "levels=0"),
        ({"table": 1000}, "table=1000: .*power of two"),
        ({"resolutions": (64, 8)}, "resolutions="),
        ({"hidden": 0}, "hidden=0"),
        ({"precision": "int8"}, "precision='int8'"),
        ({"samples": (1, 4)}, "samples="),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"near": 0.0}, "near=0.0"),
        ({"on_error": "hope"}, "on_error='hope'"),
        ({"hold_out": 10}, "10 are held out"),
    ],
)
def test_options_out_of_range(fitted, options, message):
    with pytest.raises(UserError, match=message):
        fields.fit("hash", [fitted[0]], **options)


def test_held_out_views_judge_a_fit(fitted):
    capture, _ = fitted
    found = fields.fit("hash", [capture], hold_out=3, iterations=4, **SMALL)
    held, report = [2, 6, 10], found.report[0]
    assert report.views == 9
    drawn = found.render(capture.poses[held])[0]
    assert report.held_out == pytest.approx(psnr(drawn, capture.images[held], capture.masks[held]))
