"""NerfGrasping: what is seen is the scene, the arm moves as in the simulator, and what is refused."""

import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

pytest.importorskip("pybullet")

from fleetgym.core import UserError  # noqa: E402
from fleetgym.envs.fields import fit  # noqa: E402
from fleetgym.envs.fields.captures import Capture  # noqa: E402
from fleetgym.envs.grasping import poses  # noqa: E402
from fleetgym.envs.grasping.env import GraspingEnv  # noqa: E402
from fleetgym.envs.grasping.expert import Expert  # noqa: E402
from fleetgym.envs.grasping.nerf import NerfGraspingEnv, capture_episode  # noqa: E402

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "nerf_grasping.json"
SMALL = {"image_size": 32, "views": 24, "iterations": 60}


@pytest.fixture(scope="module")
def capture():
    return capture_episode(0, image_size=32, views=24)


@pytest.fixture(scope="module")
def fields(capture):
    return fit("voxel", [capture], iterations=30)


@pytest.fixture(scope="module")
def twin():
    env = gym.make("NerfGrasping-v0", disturbance="knocks", render_mode="rgb_array", **SMALL).unwrapped
    yield env
    env.close()


def play(env, seed):
    """An expert's episode: observations and infos."""
    expert = Expert(env.family)
    expert.attach(env)
    observation, info = env.reset(seed=seed)
    observations, infos, over = [observation], [info], False
    while not over:
        observation, reward, over, truncated, info = env.step(expert.predict(observation)[0][0])
        assert not truncated and reward == info["success"]
        observations.append(observation)
        infos.append(info)
    return observations, infos


def golden_run():
    """Where the hand is at each step of an expert's episode, and how bright each picture is."""
    env = NerfGraspingEnv(disturbance="knocks", **SMALL)
    observations, infos = play(env, 3)
    env.close()
    return {
        "success": infos[-1]["success"],
        "places": [np.round(o["pose"][:3, 3], 4).tolist() for o in observations],
        "pictures": [round(float(o["rgb"].mean()), 1) for o in observations],
    }


def test_the_checker_of_gymnasium(twin, fields):
    check_env(twin, skip_render_check=True)
    check_env(NerfGraspingEnv(fields, grasps=[twin.goal], image_size=32), skip_render_check=True)


def test_what_is_seen_is_the_scene_and_the_expert_lifts_it(twin):
    lifted, starts = [], []
    for seed in range(3):
        observation, _ = twin.reset(seed=seed)
        starts.append(observation["pose"])
        seen = twin.gripper_mask
        picture = twin.twin.sim.palm(32)[0]
        np.testing.assert_array_equal(observation["rgb"][seen], twin.twin.sim.gripper(32)[0][seen])
        error = ((observation["rgb"].astype(float) - picture) / 255)[~seen] ** 2
        assert -10 * np.log10(error.mean()) > 20
        before = twin.twin.sim.object_pose()[2, 3]
        observations, infos = play(twin, seed)
        assert [step for step, info in enumerate(infos) if info["knocked"]] == [3, 7]
        assert infos[-1]["grasping"] and not any(info["grasping"] for info in infos[:-1])
        lifted.append(infos[-1]["success"])
        assert lifted[-1] == (twin.twin.sim.object_pose()[2, 3] > before + 0.08)
    assert sum(lifted) >= 2
    # Other starts, one scene, which is that of the simulator's episode.
    assert np.abs(starts[0] - starts[1]).max() > 0.01
    other = GraspingEnv("Procedural")
    other.reset(seed=0)
    assert other.object == twin.twin.object
    twin.reset(seed=5)
    np.testing.assert_allclose(twin.twin.sim.object_pose(), other.sim.object_pose(), atol=1e-9)
    other.close()


def test_it_moves_as_the_simulator_does(twin):
    twin.reset(seed=4)
    other = GraspingEnv("Procedural", observation="state", disturbance="knocks")
    rng = np.random.default_rng(0)
    other.reset(seed=int(np.random.Generator(np.random.PCG64(np.random.SeedSequence(4))).integers(2**31)),
                options={"scene": 0})  # fmt: skip
    for _ in range(9):
        action = rng.uniform(-0.3, 0.3, 6)
        mine, theirs = twin.step(action)[0], other.step(action)[0]
        np.testing.assert_allclose(mine["pose"], theirs["pose"], atol=1e-9)
        np.testing.assert_allclose(mine["remaining"], theirs["remaining"])
    other.close()


def test_the_same_seed_gives_the_same_episode(twin):
    first = play(twin, 2)[0]
    play(twin, 6)
    other = NerfGraspingEnv(disturbance="knocks", **SMALL)
    for one, two in zip(first, play(other, 2)[0]):
        np.testing.assert_array_equal(one["rgb"], two["rgb"])
        np.testing.assert_array_equal(one["pose"], two["pose"])
    other.close()


def test_without_a_twin_a_known_grasp_counts(capture, tmp_path):
    simulator = GraspingEnv("Procedural")
    simulator.reset(seed=0)
    goal = simulator.goal
    simulator.close()
    fields = fit("voxel", [capture], iterations=30)
    fields.save(tmp_path / "scene")
    env = NerfGraspingEnv(tmp_path / "scene", grasps=[goal], image_size=24, disturbance="knocks")
    observations, infos = play(env, 0)
    assert infos[-1]["success"] and observations[0]["rgb"].shape == (24, 24, 3) and env.twin is None
    np.testing.assert_allclose(observations[-1]["pose"][:3, 3], goal[:3, 3], atol=0.01)
    # Where the hand goes without a disturbance is where the action sends it.
    commanded = observations[0]["pose"] @ poses.delta(np.full(6, 0.1))
    env.reset(seed=0)
    np.testing.assert_allclose(env.step(np.full(6, 0.1))[0]["pose"], commanded, atol=4e-3)
    env.reset(seed=0)
    steps = [env.step(np.zeros(6)) for _ in range(20)]
    assert not steps[-1][4]["success"] and steps[-1][2] and steps[-1][1] == 0
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(6))
    turned = [goal @ poses.rigid([0, 0, 0, 0, 0, np.pi])]
    assert play(NerfGraspingEnv(fields, grasps=turned, image_size=24), 0)[1][-1]["success"]
    off = [goal @ poses.rigid([0.03, 0, 0, 0, 0, 0])]
    other = NerfGraspingEnv(fields, grasps=off, image_size=24)
    other.reset(seed=0)
    other._joints = env._joints
    assert not other._grasps()


def test_pictures_of_it(twin, capture):
    twin.reset(seed=0)
    drawn = twin.render()
    assert drawn.shape == (240, 320 + 120, 3)
    upper, lower = drawn[:120, 320:].astype(int), drawn[120:, 320:].astype(int)
    assert 0.1 < np.abs(upper - lower).mean() < 25  # the simulator's and the field's
    env = NerfGraspingEnv(capture, episode=0, image_size=32, iterations=5)
    assert env.reset(seed=0)[0]["rgb"].shape == (32, 32, 3) and env.render() is None
    env.close()


def test_golden_trace():
    expected, found = json.loads(GOLDEN.read_text()), golden_run()
    assert found["success"] == expected["success"]
    np.testing.assert_allclose(found["places"], expected["places"], atol=2e-3)
    np.testing.assert_allclose(found["pictures"], expected["pictures"], atol=3.0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"episode": -1}, "episode=-1"),
        ({"grasps": [np.eye(4)], "episode": 3}, "both was given"),
        ({"grasps": np.eye(4)}, "both was given"),
        ({"tolerance": (0.0, 0.1)}, "tolerance"),
        ({"field": "voxle"}, "voxel"),
        ({"views": 2}, "views=2"),
        ({"iterations": 0}, "iterations=0"),
        ({"image_size": 8}, "image_size=8"),
        ({"disturbance": "wind"}, "disturbance"),
        ({"scene": 5, "episode": 0}, "scene is a int"),
        ({"scene": "nowhere", "episode": 0}, "nowhere"),
    ],
)
def test_arguments_are_refused(options, words):
    if options.get("grasps") is not None and "episode" not in options:
        options = {**options, "scene": None}
    with pytest.raises(UserError, match=words):
        NerfGraspingEnv(**options)


def test_scenes_are_refused(capture, fields):
    with pytest.raises(UserError, match="neither was given"):
        NerfGraspingEnv(capture)
    with pytest.raises(UserError, match="no poses"):
        NerfGraspingEnv(Capture(capture.images, None, capture.intrinsics), episode=0)
    mirrored = capture.poses @ np.diag([1.0, 1.0, -1.0, 1.0])
    with pytest.raises(UserError, match="mirrored"):
        NerfGraspingEnv(Capture(capture.images, mirrored, capture.intrinsics), episode=0)
    with pytest.raises(UserError, match="grasps.*mirror"):
        NerfGraspingEnv(capture, grasps=[np.diag([1.0, 1.0, -1.0, 1.0])])
    with pytest.raises(UserError, match=r"\[n, 4, 4\]"):
        NerfGraspingEnv(capture, grasps=np.eye(4))
    with pytest.raises(UserError, match="index=1: there are 1 fields"):
        NerfGraspingEnv(fields, episode=0, index=1)
    few = Capture(capture.images[:2], capture.poses[:2], capture.intrinsics)
    unfitted = fit("voxel", [few, capture], iterations=1, on_error="skip")
    with pytest.raises(UserError, match="field 0 was not fitted .*2 views"):
        NerfGraspingEnv(unfitted, episode=0)
    far = NerfGraspingEnv(fields, grasps=[poses.rigid([3.0, 0, 0.2, np.pi, 0, 0])], image_size=16)
    with pytest.raises(UserError, match="reaches no start"):
        far.reset(seed=0)


def test_actions_and_options_are_refused(twin):
    twin.reset(seed=0)
    with pytest.raises(UserError, match="within -1..1"):
        twin.step(np.full(6, 2.0))
    with pytest.raises(UserError, match="option of reset"):
        twin.reset(options={"object": "001"})
