import dataclasses

import numpy as np
import pytest
import torch

from fleetgym.core.errors import UserError
from fleetgym.core.pictures import psnr
from fleetgym.envs import fields
from fleetgym.envs.fields import voxel, voxel_kernels
from fleetgym.envs.fields.captures import Capture, Intrinsics, check_poses, rays
from fleetgym.envs.fields.marching import contract, march
from fleetgym.envs.fields.voxel import Voxels

CAMERA = Intrinsics.from_fov(np.pi / 2, 32, 32)


def looking(eye, target, roll=0.0):
    """A camera at ``eye`` that looks at ``target``."""
    back = (eye - target) / np.linalg.norm(eye - target)
    right = np.cross([np.cos(roll), np.sin(roll), 0.1], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(back, right), back], 1)
    pose[:3, 3] = eye
    return pose


def approach(views, rng):
    """A hand's way down to an object at the origin, from 0.35 m to 0.12 m."""
    start, end = np.array([0.2, -0.1, 0.3]), np.array([0.02, 0.03, 0.12])
    steps = np.linspace(0, 1, views)
    return np.stack(
        [looking(start + s * (end - start), rng.uniform(-0.02, 0.02, 3) + [0.02, 0, 0], 0.5 * s) for s in steps]
    )


def box_scene(poses, camera=CAMERA, colour=(0.9, 0.2, 0.1)):
    """Pictures of a box on a patterned floor, its sides in different shades, and where the box is seen."""
    lines = rays(poses, camera, np.float64)
    origin, way = lines[..., :3], lines[..., 3:]
    with np.errstate(divide="ignore", invalid="ignore"):
        near, far = (np.array([-0.03, -0.04, 0.0]) - origin) / way, (np.array([0.03, 0.04, 0.05]) - origin) / way
        enter, leave = np.minimum(near, far), np.maximum(near, far).min(-1)
        hit = (enter.max(-1) < leave) & (enter.max(-1) > 0)
        floor = origin + way * (-origin[..., 2:] / way[..., 2:])
    floor_seen = (way[..., 2] < 0) & (np.abs(floor[..., :2]) < 2).all(-1)
    with np.errstate(invalid="ignore"):
        wave = np.sin(50 * floor[..., :1]) * np.sin(40 * floor[..., 1:2] + 1)
    stripes = 0.55 + 0.25 * wave * np.array([1.0, 0.8, 0.5])
    out = np.where(floor_seen[..., None], stripes, 1.0)
    shade = np.array([0.6, 0.8, 1.0])[enter.argmax(-1)]
    out = np.where(hit[..., None], shade[..., None] * np.array(colour), out)
    return (255 * np.nan_to_num(out)).round().astype(np.uint8), hit


def capture_of(seed=0, views=12, **options):
    poses = approach(views, np.random.default_rng(seed))
    masks = np.ones((views, 32, 32), bool)
    masks[:, 22:, :6] = masks[:, 22:, 26:] = False
    images, _ = box_scene(poses, **options)
    images[~masks] = 0  # the gripper, which must not be learned
    return Capture(images, poses, CAMERA, masks)


def small_layout(**options):
    defaults = dict(grids=((5, 0.0), (6, 0.6)), scale=0.3, near=0.05, far=2.0, coarse=9, fine=7, merge=False)
    return voxel._Layout(**{**defaults, "background": (0.9, 0.8, 1.0), **options})


def random_field(layout, dtype=np.float64):
    rng = np.random.default_rng(0)
    return rng.normal(-1, 2, layout.nodes).astype(dtype), rng.normal(0, 1, (layout.nodes, 3)).astype(dtype)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(np.float64, 1e-6), (np.float32, 2e-3)])
def test_the_kernels_gradient_is_that_of_autograd(merge, dtype, bound):
    layout = small_layout(merge=merge)
    density, colour = random_field(layout, dtype)
    lines = rays(approach(3, np.random.default_rng(1)), Intrinsics.from_fov(1.5, 9, 8), dtype).reshape(-1, 6)
    wanted = np.random.default_rng(2).uniform(size=(len(lines), 3)).astype(dtype)
    chosen, centre = np.arange(0, len(lines), 2), np.array([0.01, 0.02, 0.03])
    *grids, edges = layout.arrays(dtype)
    made = np.zeros_like(density), np.zeros_like(colour)
    loss = voxel_kernels.step(
        voxel_kernels.constants(dtype), lines, wanted, chosen, 0, density, colour, centre.astype(dtype), dtype(0.3),
        *grids, edges, layout.fine, merge, np.array(layout.background, dtype), *made,
    )  # fmt: skip

    leaves = [torch.as_tensor(x, dtype=torch.float64)[None].requires_grad_() for x in (density, colour)]
    scenes = voxel._Grids(layout, *leaves, torch.as_tensor(centre)[None])
    seen, _, _ = march(
        scenes, torch.as_tensor(lines[chosen]).double(), torch.zeros(len(chosen), dtype=torch.long),
        **layout.walk(leaves[0]),
    )  # fmt: skip
    expected = (seen - torch.as_tensor(wanted[chosen])).square().mean()
    expected.backward()
    assert abs(loss - expected.item()) < bound
    for ours, leaf in zip(made, leaves):
        theirs = leaf.grad[0].numpy()
        assert np.abs(theirs).max() > 1e-4
        assert np.abs(ours - theirs).max() < bound * np.abs(theirs).max()


@pytest.mark.parametrize("merge", [False, True])
def test_the_kernels_pictures_are_those_of_torch(merge):
    layout = small_layout(merge=merge)
    density, colour = random_field(layout, np.float32)
    lines = rays(approach(2, np.random.default_rng(1)), CAMERA).reshape(-1, 6)
    out = np.empty((len(lines), 5), np.float32)
    voxel._draw_numba(layout, lines, density, colour, np.zeros(3), out)
    leaves = [torch.as_tensor(x, dtype=torch.float64)[None] for x in (density, colour)]
    grids = voxel._Grids(layout, *leaves, torch.zeros(1, 3, dtype=torch.float64))
    seen, distance, left = march(
        grids, torch.as_tensor(lines).double(), torch.zeros(len(lines), dtype=torch.long),
        **layout.walk(leaves[0]),
    )  # fmt: skip
    drawn = torch.cat([seen, distance[:, None], left[:, None]], 1).numpy()
    assert drawn[:, :3].std() > 0.05 and 0.01 < drawn[:, 4].mean() < 0.9
    assert np.abs(out - drawn).max() < 1e-3 and np.abs(out - drawn).mean() < 1e-5


def test_smoothness_of_the_kernel_is_that_of_torch():
    layout = small_layout()
    density, _ = random_field(layout)
    touched = np.random.default_rng(3).uniform(size=density.shape) < 0.7
    made = np.where(touched, 1.0, 0.0)
    for (size, _), start in zip(layout.grids, layout.starts):
        voxel_kernels.smooth(density, made, size, start, 0.01)
    leaf = torch.as_tensor(density)[None].requires_grad_()
    total = 0
    for (size, _), start in zip(layout.grids, layout.starts):
        cube = leaf[0, start : start + size**3].reshape(size, size, size)
        total = total + sum(cube.diff(dim=axis).abs().sum() for axis in range(3))
    (0.01 * total).backward()
    expected = leaf.grad[0].numpy() * touched
    assert np.abs(made - touched - expected).max() < 1e-12 and np.abs(expected).max() > 0.02
    ours = voxel.smoothness_gradient(layout, leaf.detach(), torch.as_tensor(touched)[None], 0.01)
    assert np.abs(ours[0].numpy() - expected).max() < 1e-12


def test_contraction():
    q = torch.randn(2000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 5
    u = contract(q)
    inside = q.abs().amax(1) <= 1
    assert inside.any() and torch.equal(u[inside], q[inside])
    assert u.abs().max() < 2 and contract(torch.tensor([[1e6, 0.0, -5.0]]))[0, 0] > 1.999
    assert torch.allclose(u / u.abs().amax(1, keepdim=True), q / q.abs().amax(1, keepdim=True))  # along the ray
    further = contract(1.01 * q)
    assert (further.abs().amax(1) > u.abs().amax(1)).all()
    edge = torch.tensor([[1.0, 0.3, -0.2]], dtype=torch.float64)
    assert torch.allclose(contract(edge * (1 + 1e-9)), edge, atol=1e-8)


def test_rays_of_a_camera():
    pose = looking(np.array([0.3, 0.1, 0.4]), np.zeros(3))
    lines = rays(pose[None], Intrinsics.from_fov(np.pi / 2, 3, 5), np.float64)[0]
    assert np.allclose(lines[1, 2, 3:], -pose[:3, 2]) and np.allclose(lines[..., :3], [0.3, 0.1, 0.4])
    up = lines[0, 2, 3:] @ pose[:3, :3]
    assert np.allclose(up / -up[2], [0, 2 / 3, -1])  # a third of the half picture above the middle
    assert (lines[1, 4, 3:] @ pose[:3, 0]) > 0.5
    assert np.allclose(np.linalg.norm(lines[..., 3:], axis=-1), 1)


@pytest.fixture(scope="module")
def fitted():
    capture = capture_of()
    return capture, fields.fit("voxel", [capture], centre=[0, 0, 0.025], iterations=60, seed=3, residuals=False)


def perturbed(poses, rng, size=1.0):
    out = poses.copy()
    for pose in out:
        angle, axis = size * rng.uniform(0, 0.2), rng.normal(size=3)
        axis /= np.linalg.norm(axis)
        cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
        pose[:3, :3] = pose[:3, :3] @ (np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross)
        pose[:3, 3] += size * rng.uniform(-0.03, 0.03, 3)
    return out


def test_a_box_is_seen_from_where_no_camera_was(fitted):
    capture, found = fitted
    poses = perturbed(capture.poses, np.random.default_rng(5))
    truth, box = box_scene(poses)
    drawn = fields.render(found, poses)
    assert drawn.shape == (1, 12, 32, 32, 3) and drawn.dtype == np.uint8
    seen = capture.masks
    assert psnr(drawn[0], truth, seen) > psnr(capture.images, truth, seen) + 3
    assert psnr(drawn[0], truth, seen & box) > psnr(capture.images, truth, seen & box) + 3
    assert psnr(drawn[0], truth, seen) > 24
    report = found.report[0]
    assert report.failed is None and report.iterations == 60 and report.views == 12 and report.seconds > 0
    assert abs(report.psnr - psnr(found.render(capture.poses)[0], capture.images, seen)) < 1


def test_distances_of_a_wall():
    layout = small_layout(grids=((33, 0.0),), coarse=60, fine=40)
    density = np.full((33, 33, 33), -20.0, np.float32)
    density[:, :, :13] = 40.0  # the value 4, where density begins, is at u = -0.425
    weights = {"density": torch.as_tensor(density).reshape(1, -1), "colour": torch.zeros(1, 33**3, 3)}
    found = Voxels(weights, dataclasses.asdict(layout), np.zeros((1, 3)), CAMERA, [voxel.Report(0)])
    poses = looking(np.array([0.0, 0.01, 0.2]), np.zeros(3))[None]
    distance = found.distances(poses)[0, 0]
    lines = rays(poses, CAMERA, np.float64)[0]
    surface = lines[..., 2:3] + lines[..., 5:6] * distance[..., None]
    middle = np.abs(lines[..., 3:5]).max(-1) < 0.5
    assert middle.sum() > 200 and np.abs(surface[middle] + 0.3 * 0.425).max() < 0.01
    weights["density"].fill_(-20.0)
    assert np.isinf(found.distances(poses)).all()


def test_what_the_field_lacks_is_taken_from_its_views(fitted, tmp_path):
    capture, plain = fitted
    found = fields.fit("voxel", [capture], centre=[0, 0, 0.025], iterations=60, seed=3)
    assert torch.equal(found.weights["density"], plain.weights["density"])
    seen = capture.masks
    assert psnr(found.render(capture.poses)[0], capture.images, seen) > found.report[0].psnr + 3
    poses = perturbed(capture.poses, np.random.default_rng(5))
    truth, box = box_scene(poses)
    for where in (seen, seen & box):
        assert psnr(found.render(poses)[0], truth, where) > psnr(plain.render(poses)[0], truth, where) + 0.1
    images = capture.images.copy()
    images[~seen] = 255  # masked pixels are black; what they are must not matter
    other = dataclasses.replace(capture, images=images)
    again = fields.fit("voxel", [other], centre=[0, 0, 0.025], iterations=60, seed=3)
    assert np.array_equal(again.render(poses), found.render(poses))
    found.save(tmp_path / "kept")
    difference = Voxels.load(tmp_path / "kept").render(poses).astype(int) - found.render(poses)
    assert np.abs(difference).mean() < 0.5


def test_equal_seeds_equal_fields(fitted):
    capture, found = fitted
    options = dict(centre=[0, 0, 0.025], iterations=60, residuals=False)
    again = fields.fit("voxel", [capture], seed=3, **options)
    other = fields.fit("voxel", [capture], seed=4, **options)
    assert torch.equal(again.weights["density"], found.weights["density"])
    assert torch.equal(again.weights["colour"], found.weights["colour"])
    assert not torch.equal(other.weights["density"], found.weights["density"])


def test_many_at_once_are_as_one_by_one(fitted):
    capture, _ = fitted
    second = capture_of(1, colour=(0.1, 0.3, 0.9))
    options = dict(iterations=8, batch=200, seed=0)
    both = fields.fit("voxel", [capture, second], centre=[[0, 0, 0.02], [0, 0.01, 0.02]], **options)
    assert len(both) == 2
    poses = np.stack([capture.poses[:2], second.poses[1:3]])
    drawn = both.render(poses)
    for n, (one, centre) in enumerate(((capture, [0, 0, 0.02]), (second, [0, 0.01, 0.02]))):
        alone = fields.fit("voxel", one, centre=centre, **options)
        assert torch.equal(alone.weights["density"][0], both.weights["density"][n])
        assert np.array_equal(alone.render(poses[n])[0], drawn[n])
        assert np.array_equal(both.render(poses[n], scenes=[n])[0], drawn[n])
    assert not np.array_equal(drawn[0], drawn[1])


def test_torch_fits_as_well():
    capture, second = capture_of(), capture_of(1, colour=(0.1, 0.3, 0.9))
    options = dict(centre=[0, 0, 0.025], grids=((12, 0.0), (24, 0.5)), iterations=40, batch=400)
    found = fields.fit("voxel", [capture, second], backend="torch", **options)
    ours = fields.fit("voxel", [capture, second], **options)
    for mine, theirs in zip(ours.report, found.report):
        assert theirs.psnr > 20 and abs(mine.psnr - theirs.psnr) < 1.5


def test_fields_are_saved_and_loaded(fitted, tmp_path):
    capture, found = fitted
    found.save(tmp_path / "kept")
    again = Voxels.load(tmp_path / "kept")
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["fields.json", "fields.safetensors"]
    difference = again.render(capture.poses).astype(int) - found.render(capture.poses)
    assert np.abs(difference).mean() < 0.2
    assert again.report == found.report and again.intrinsics == CAMERA and again.config == found.config
    found.save(tmp_path / "kept")  # in the place of the former
    (tmp_path / "kept" / "fields.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="fields.safetensors"):
        Voxels.load(tmp_path / "kept")
    with pytest.raises(UserError, match="does not exist"):
        Voxels.load(tmp_path / "none")


def spoil(change):
    capture = capture_of(views=5)
    images, poses, masks = capture.images.copy(), capture.poses.copy(), capture.masks.copy()
    if change == "few":
        return dataclasses.replace(capture, images=images[:2], poses=poses[:2], masks=masks[:2])
    if change == "none":
        return dataclasses.replace(capture, poses=None)
    if change == "one missing":
        return dataclasses.replace(capture, poses=poses[:4])
    if change == "ragged":
        return dataclasses.replace(capture, images=[*images[:4], images[4][:20]])
    if change == "floats":
        return dataclasses.replace(capture, images=images / 255)
    if change == "nan":
        images = images / 255
        images[3, 2, 2] = np.nan
        return dataclasses.replace(capture, images=images)
    if change == "size":
        return dataclasses.replace(capture, intrinsics=Intrinsics.from_fov(1.5, 48, 48))
    if change == "mirrored":
        poses[1, :3, 0] *= -1
    elif change == "scaled":
        poses[2, :3, :3] *= 1.1
    elif change == "not a number":
        poses[4, 0, 3] = np.nan
    elif change == "masked":
        masks[:] = False
    elif change == "one masked":
        masks[3] = False
    elif change == "mask size":
        masks = masks[:, :10]
    elif change == "mask type":
        masks = masks.astype(np.uint8)
    return Capture(images, poses, CAMERA, masks)


SPOILT = {
    "few": "2 views; at least 3",
    "none": "no poses; give",
    "one missing": r"poses of shape \[4, 4, 4\] for 5 views",
    "ragged": r"view 4 has the shape \(20, 32, 3\).*one size",
    "floats": "float64; give uint8",
    "nan": "view 3 holds pixels that are not finite; drop it",
    "size": r"want \[V, 48, 48, 3\]",
    "mirrored": "pose of view 1 is mirrored.*flip one axis",
    "scaled": "pose of view 2 is not rigid; take scale",
    "not a number": "pose of view 4 is not finite; drop",
    "masked": "all pixels of all views are masked",
    "one masked": "all pixels of view 3 are masked; drop",
    "mask size": "masks of shape",
    "mask type": "give booleans",
}


@pytest.mark.parametrize("change", SPOILT)
def test_unusable_captures_are_named(change):
    with pytest.raises(UserError, match=f"capture 1: .*{SPOILT[change]}"):
        fields.fit("voxel", [capture_of(views=5), spoil(change)], iterations=1)


def test_one_unusable_capture_spoils_none_of_the_others():
    good = capture_of(views=5)
    captures = [spoil(change) for change in ("mirrored", "nan", "few")]
    options = dict(iterations=5, batch=100)
    found = fields.fit("voxel", [captures[0], good, *captures[1:]], on_error="skip", **options)
    alone = fields.fit("voxel", [good], **options)
    assert sorted(found.failed) == [0, 2, 3] and "mirrored" in found.failed[0] and "not finite" in found.failed[2]
    assert [report.psnr is None for report in found.report] == [True, False, True, True]
    assert np.array_equal(found.render(good.poses, scenes=[1]), alone.render(good.poses))
    with pytest.raises(UserError, match="scene 0 has no field .*mirrored"):
        found.render(good.poses)
    none = fields.fit("voxel", captures, on_error="skip", **options)
    assert len(none.failed) == 3 and none.render(good.poses, scenes=[]).shape[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations=0"),
        ({"batch": 0}, "batch=0"),
        ({"near": 0.0}, "near=0.0"),
        ({"scale": -1}, "scale=-1"),
        ({"grids": ((1, 0.0),)}, "grids="),
        ({"samples": (1, 4)}, "samples="),
        ({"centre": [0, 0]}, r"centre of shape \[2\]"),
        ({"centre": [0, np.nan, 0]}, "capture 0: centre"),
        ({"learning_rate": 0}, "learning_rate=0"),
        ({"on_error": "hope"}, "on_error='hope'"),
        ({"backend": "jax"}, "backend='jax'"),
        ({"background": (2, 0, 0)}, "background="),
        ({"hold_out": 3}, "3 are held out"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        fields.fit("voxel", [capture_of(views=5)], **options)


def test_bad_views_of_a_field(fitted):
    capture, found = fitted
    for poses, message in (
        (None, "no poses"),
        (2 * capture.poses, "not rigid"),
        (capture.poses[None].repeat(2, 0), "for 1 scenes"),
        ("here", "array of numbers"),
    ):
        with pytest.raises(UserError, match=message):
            found.render(poses)
    with pytest.raises(UserError, match="scene 7"):
        found.render(capture.poses, scenes=[7])
    with pytest.raises(UserError, match="no capture"):
        fields.fit("voxel", [])
    with pytest.raises(UserError, match="others have"):
        fields.fit("voxel", [capture, dataclasses.replace(capture, intrinsics=Intrinsics.from_fov(1, 32, 32))])
    for numbers in ((0, 4, 4), (np.pi, 4, 4), (1, 0, 4)):
        with pytest.raises(UserError, match="fov|pixels|focal"):
            Intrinsics.from_fov(*numbers)
    assert check_poses(capture.poses[:0]).shape == (0, 4, 4)


def test_held_out_views_judge_a_fit():
    capture = capture_of()
    found = fields.fit("voxel", [capture], hold_out=3, iterations=40)
    report = found.report[0]
    held = [2, 6, 10]
    assert report.views == 9
    drawn = found.render(capture.poses[held])[0]
    assert report.held_out == pytest.approx(psnr(drawn, capture.images[held], capture.masks[held]))
    kept = capture.subset(np.setdiff1d(np.arange(12), held))
    alone = fields.fit("voxel", [kept], iterations=40)
    assert torch.equal(alone.weights["density"], found.weights["density"])


def test_cameras_look_at_the_middle():
    target = np.array([0.4, -0.1, 0.05])
    eyes = target + np.array([[0.3, 0, 0.2], [0, 0.3, 0.25], [-0.2, 0.1, 0.3]])
    found = voxel.middle(np.stack([looking(eye, target) for eye in eyes]))
    assert np.abs(found - target).max() < 0.01


def bullet_scene(name, scale, rng, size=64, views=24):
    """What a palm camera sees of an object on a table on its way down to it, and from poses beside that way.

    Returns:
        A capture, the poses of the hand, and a function of camera poses: pictures, and where the object is seen.
    """
    bullet = pytest.importorskip("pybullet")
    import pybullet_data

    data, client = pybullet_data.getDataPath(), bullet.connect(bullet.DIRECT)
    bullet.setGravity(0, 0, -9.81, physicsClientId=client)
    bullet.loadURDF(f"{data}/plane.urdf", [0, 0, -0.63], physicsClientId=client)
    bullet.loadURDF(f"{data}/table/table.urdf", [0.5, 0, -0.626], physicsClientId=client)
    turn = bullet.getQuaternionFromEuler([np.pi / 2, 0, rng.uniform(-np.pi, np.pi)])
    body = bullet.loadURDF(f"{data}/{name}", [0.5, 0, 0.1], turn, globalScaling=scale, physicsClientId=client)
    for _ in range(360):
        bullet.stepSimulation(physicsClientId=client)
    target = np.mean(bullet.getAABB(body, physicsClientId=client), axis=0)
    lens = bullet.computeProjectionMatrixFOV(90, 1, 0.02, 3)

    def look(poses):
        pictures, where = [], []
        for pose in poses:
            view = np.linalg.inv(pose).T.ravel().tolist()
            _, _, rgb, _, seen = bullet.getCameraImage(
                size, size, view, lens, lightDirection=(0.4, 0.3, 1), lightAmbientCoeff=0.6, lightDiffuseCoeff=0.4,
                lightSpecularCoeff=0, shadow=0, renderer=bullet.ER_TINY_RENDERER, physicsClientId=client,
            )  # fmt: skip
            pictures.append(np.reshape(rgb, (size, size, 4))[..., :3].astype(np.uint8))
            where.append(np.reshape(seen, (size, size)) == body)
        return np.stack(pictures), np.stack(where)

    hand_eye = np.eye(4)  # right is the hand's y, up its x, and the view its z
    hand_eye[:3, :3], hand_eye[:3, 3] = [[0, 1, 0], [1, 0, 0], [0, 0, -1]], [0.036, 0, 0.036]
    polar, around, far = rng.uniform(0, 1), rng.uniform(np.pi / 2, 1.5 * np.pi), rng.uniform(0.3, 0.45)
    way = np.array([np.sin(polar) * np.cos(around), np.sin(polar) * np.sin(around), np.cos(polar)])
    steps = np.linspace(0, 1, views)
    aims = target + 0.02 * rng.uniform(-1, 1, 3) * (1 - steps[:, None])
    eyes = [looking(target + way * (far + s * (0.12 - far)), aim, 0.5 * s) for s, aim in zip(steps, aims)]
    hands = np.stack(eyes) @ np.linalg.inv([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0], [0, 0, 0, 1]])
    rows, columns = np.mgrid[:size, :size] / size
    gripper = (rows > 0.62) & ((columns < 0.21) | (columns > 0.79))
    masks = np.broadcast_to(~gripper, (views, size, size))
    camera = Intrinsics.from_fov(np.pi / 2, size, size, shift=(0.5, -0.5))
    return Capture(look(hands @ hand_eye)[0], hands @ hand_eye, camera, masks), hands, hand_eye, look


@pytest.mark.slow
def test_a_palm_camera_on_its_way_to_a_grasp():
    rows = []
    for name, scale in (("duck_vhacd.urdf", 1.0), ("teddy_vhacd.urdf", 1.0), ("random_urdfs/005/005.urdf", 0.65)):
        rng = np.random.default_rng(0)
        capture, hands, hand_eye, look = bullet_scene(name, scale, rng)
        grasp = hands[-1, :3, 3] + 0.12 * hands[-1, :3, 2]
        fields.fit("voxel", [capture], centre=grasp, iterations=1)  # compiles
        found = fields.fit("voxel", [capture], centre=grasp)
        hands = np.concatenate([perturbed(hands[:-4], rng), perturbed(hands[-4:], rng, 0.4)])
        truth, body = look(hands @ hand_eye)
        drawn, seen = found.render(hands @ hand_eye)[0], capture.masks
        rows.append([psnr(drawn, truth, seen), psnr(drawn, truth, seen & body), found.report[0].seconds])
        assert rows[-1][0] > psnr(capture.images, truth, seen) + 3, name
        assert rows[-1][1] > psnr(capture.images, truth, seen & body) + 3, name
    overall, body, seconds = np.mean(rows, 0)
    assert overall > 24.5 and body > 20 and seconds < 5, rows
