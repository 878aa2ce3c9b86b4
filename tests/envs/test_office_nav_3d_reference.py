"""Who reads in the 3D office: reference policies, shortest ways, and the metrics with true, swapped and blank signs."""

import ast
import math
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import env3d, raycast, reference3d
from fleetgym.envs.office_nav.env3d import MEANINGS, TEXTS, OfficeNav3DEnv, OfficeNav3DVectorEnv
from fleetgym.envs.office_nav.metrics3d import LEGIBLE, reading3d
from fleetgym.envs.office_nav.raycast import FORWARD, LEFT, OPEN, TO_BOX, TO_SIGHT, TO_SIGN
from fleetgym.envs.office_nav.reference3d import NonReader3D, OracleReader3D, RandomPolicy3D

TRIALS = 24


@pytest.fixture(scope="module")
def oracle():
    return {sign: reading3d(OracleReader3D(), trials=TRIALS, sign=sign) for sign in ("true", "swapped", "blank")}


# ------------------------------------------------------------------------------------------------------- the policies


def test_the_reader_goes_where_the_sign_says(oracle):
    true, swapped, blank = (oracle[sign] for sign in ("true", "swapped", "blank"))
    assert true.success[:, 1].all() and (true.entered[:, 1] == true.named).all() and true.saw_sign[:, 0].all()
    np.testing.assert_array_equal(true.returns, true.success)
    assert (true.length[true.success] <= 30).all() and (true.length[~true.success] == 30).all()
    assert (swapped.named != true.named).all() and set(swapped.named) <= set(range(4))
    assert (swapped.entered[:, 1] == swapped.named).all() and not swapped.success.any()
    assert (blank.named == -1).all() and (blank.entered == -1).all() and not blank.success.any()
    assert true.summary()["first_named"] == 1.0 and blank.summary()["doors_before_goal"] is None
    assert blank.doors[:, 1].max() == 0 and true.doors[:, 1].min() >= 1


def test_the_reader_reaches_what_shortest_ways_promise(oracle):
    """It ends first episodes in as many steps as reading and walking take, and second ones as walking takes."""
    reach = reference3d.reach(TRIALS)
    steps = np.minimum(reach.read + reach.after, 31)
    np.testing.assert_array_equal(oracle["true"].success[:, 0], steps <= 30)
    np.testing.assert_array_equal(oracle["true"].length[:, 0], np.minimum(steps, 30))
    assert (reach.direct <= 30).all() and (reach.read <= 30).all()
    summary = reach.summary()
    assert summary["read"] == summary["reached"] == 1.0
    assert summary["read_and_reached"] == oracle["true"].success[:, 0].mean()


def test_the_non_reader_does_not_care_what_the_sign_says():
    played = {sign: reading3d(NonReader3D(), trials=60, sign=sign) for sign in ("true", "swapped")}
    for name in ("returns", "length", "doors", "entered", "saw_sign"):
        np.testing.assert_array_equal(getattr(played["true"], name), getattr(played["swapped"], name))
    true = played["true"]
    assert true.success[:, 1].mean() > 0.9 and 0.4 < true.success[:, 0].mean() < 0.95
    assert (true.entered[true.success] == np.repeat(true.named[:, None], 2, 1)[true.success]).all()
    assert not (true.entered[:, 1] == played["swapped"].named).any()
    again = true.success[:, 0]
    assert true.success[again, 1].all()  # what was found is found again


def test_random():
    played = reading3d(RandomPolicy3D(seed=1), trials=60)
    assert played.success.mean() < 0.1
    again = reading3d(RandomPolicy3D(seed=1), trials=60)
    np.testing.assert_array_equal(played.doors, again.doors)
    assert played.doors.max() > 0 and (played.doors[:, 0] != played.doors[:, 1]).any()


@pytest.mark.parametrize("kind", [OracleReader3D, NonReader3D])
@pytest.mark.parametrize("split", ["train", "layout", "phrases", "style"])
def test_other_splits(kind, split):
    played = reading3d(kind(), trials=8, split=split, seed=7)
    assert played.success[:, 1].mean() >= (1.0 if kind is OracleReader3D else 0.75)


def test_a_single_environment_is_played_like_one_of_many(oracle):
    policy, env = OracleReader3D(), gym.make("OfficeNav3D-v0", split="test", disable_env_checker=True)
    policy.attach(env)
    frame, state, start = env.reset(seed=3)[0], None, True
    for episode in range(2):
        steps, over = 0, False
        while not over:
            action, state = policy.predict(frame, state, np.array([start]))
            assert isinstance(action, int)
            frame, reward, terminated, truncated, _ = env.step(action)
            steps, over, start = steps + 1, terminated or truncated, False
        assert (reward, steps) == (oracle["true"].returns[3, episode], oracle["true"].length[3, episode])
        frame, start = env.reset()[0], True


def test_the_reader_forgets_when_a_trial_ends():
    """Ten episodes in a row by the default autoreset: it reads in every other one, and in all with episodes=1."""
    for episodes in (2, 1):
        env, policy = OfficeNav3DVectorEnv(3), OracleReader3D(episodes)
        policy.attach(env)
        frames, state, start = env.reset(seed=20)[0], None, np.ones(3, bool)
        opened = [[] for _ in range(3)]
        for _ in range(150):
            actions, state = policy.predict(frames, state, start)
            before = env.trials.state.copy()
            frames, _, terminated, truncated, infos = env.step(actions)
            start = terminated | truncated
            for row in np.flatnonzero(start):
                opened[row].append((int(before["episode"][row]), bool(before["doors"][row] & 16), terminated[row]))
        for episode, sign_door, success in sum(opened, []):
            assert sign_door == (episode == 1 or episodes == 1)
            assert success or episode == 1 or episodes == 1
        assert min(map(len, opened)) >= 5


def test_policies_say_what_they_need():
    env = OfficeNav3DEnv()
    with pytest.raises(UserError, match="call attach"):
        OracleReader3D().predict(env.reset(seed=0)[0])
    with pytest.raises(UserError, match="OfficeNav3D-v0, not in OfficeNavEnv"):
        NonReader3D().attach(gym.make("OfficeNav-Symbolic-v0", disable_env_checker=True))
    policy = OracleReader3D()
    policy.attach(env)
    with pytest.raises(UserError, match="2 observations"):
        policy.predict(np.zeros((2, 60, 80, 3), np.uint8))
    with pytest.raises(UserError, match="at least 1"):
        OracleReader3D(episodes=0)
    for options, message in (
        ({"sign": "false"}, "swapped"),
        ({"trials": 0}, "at least 1"),
        ({"split": "nowhere"}, "train, test"),
        ({"seed": -1}, "non-negative"),
    ):
        with pytest.raises(UserError, match=message):
            reading3d(RandomPolicy3D(), **{"trials": 2, **options})


# ------------------------------------------------------------------------------------------------------- its senses


def place(env, x, z, heading, doors, **fields):
    for name, value in {"x": x, "z": z, "heading": heading, "doors": doors, **fields}.items():
        env.trials.state[name][0] = value
    frame = np.zeros((1, 60, 80, 3), np.uint8)
    env.trials.draw(frame, np.ones(1, bool))
    return frame[0]


def test_signs_are_read_from_pixels():
    """All texts from many places, with noise; not the state's phrase, but what the frame shows."""
    env, rng = OfficeNav3DEnv(), np.random.default_rng(0)
    env.reset(seed=0)
    for number in range(60):
        shown = number % len(TEXTS)
        frame = place(env, rng.uniform(12.5, 13), rng.uniform(5.2, 6.8), rng.uniform(-0.2, 0.2), 16, phrase=shown)
        env.trials.state["phrase"] = (shown + 1) % len(TEXTS)
        noisy = np.clip(frame + rng.normal(0, 10, frame.shape), 0, 255).astype(np.uint8)
        assert reference3d.read(env.trials, 0, frame) == MEANINGS[shown] == reference3d.read(env.trials, 0, noisy)
    for x, heading, doors in ((9.2, 0.0, 16), (13.0, math.pi, 16), (9.2, 0.0, 15), (12.4, 0.8, 16)):
        assert reference3d.read(env.trials, 0, place(env, x, 6.0, heading, doors, phrase=0)) is None


def test_contrast_counts_pixels():
    env = OfficeNav3DEnv()
    env.reset(seed=0)
    place(env, 12.6, 6.0, 0.0, 16)
    before = env.trials.state.copy()
    views = env.trials.sign_views(0).astype(int)
    counts = [
        (abs(views[one] - views[two])[..., 1] >= raycast.CONTRAST).sum()
        for one in range(len(TEXTS))
        for two in range(one)
        if MEANINGS[one] != MEANINGS[two]
    ]
    assert env.trials.contrasts(np.ones(1, bool))[0] == min(counts) > LEGIBLE
    assert (env.trials.state == before).all()
    for index in range(len(TEXTS)):
        np.testing.assert_array_equal(views[index], place(env, 12.6, 6.0, 0.0, 16, phrase=index))
    assert env.trials.contrasts(np.zeros(1, bool))[0] == 0


def test_boxes_that_count_as_seen_are_seen():
    """Where ``sees_box`` says so, the box has at least four pixels, and blue ones are told from all other colours."""
    env, rng = OfficeNav3DEnv(), np.random.default_rng(1)
    env.reset(seed=0)
    scene, counted = env3d.world().scenes[0], 0
    while counted < 150:
        x, z, heading = rng.uniform(3.0, 7.0), rng.uniform(0.5, 11.5), math.pi + rng.uniform(-1.0, 1.0)
        office = int(rng.integers(4))
        if not raycast.sees_box(scene, x, z, heading, 15, office):
            continue
        counted += 1
        look = int(rng.integers(70))
        frame = place(env, x, z, heading, 1 << office, goal=office, look=look)
        assert reference3d.blue_office(env.trials, 0, frame) == office
        other = place(env, x, z, heading, 1 << office, goal=(office + 1) % 4, look=look)
        assert (frame != other).any(-1).sum() >= 4 and reference3d.blue_office(env.trials, 0, other) == -1
    assert not raycast.sees_box(scene, 5.0, 1.2, math.pi, 7, 3) and raycast.sees_box(scene, 5.0, 1.2, math.pi, 8, 3)
    assert not raycast.sees_box(scene, 5.0, 1.2, 0.0, 8, 3)


@pytest.mark.parametrize("seek", [TO_BOX, TO_SIGN, TO_SIGHT])
def test_ways_lead_where_they_should(seek):
    """Walked in the environment they end where they say, not sooner, and where what is sought is found."""
    env, ways = OfficeNav3DEnv(horizon=100, split="test"), reference3d.Ways()
    for seed in range(6):
        env.reset(seed=seed)
        scene, one = env3d.world().scenes[0], env.trials.state
        office = seed % 4
        which = {TO_BOX: office, TO_SIGN: 0, TO_SIGHT: 1 << office}[seek]
        before = one.copy()
        actions, pose = ways.find(one, seek, which)
        assert (one == before).all() and len(actions)
        one["goal"] = office if seek == TO_BOX else one["goal"]
        for number, action in enumerate(actions):
            _, _, terminated, _, _ = env.step(int(action))
            assert terminated == (seek == TO_BOX and number == len(actions) - 1)
        assert env.pose[:2] == pytest.approx(tuple(pose[:2])) and math.cos(env.pose[2] - pose[2]) == pytest.approx(1)
        if seek == TO_SIGN:
            assert env.trials.contrasts(np.ones(1, bool))[0] >= LEGIBLE
        elif seek == TO_SIGHT:
            assert raycast.sees_box(scene, *env.pose, int(one["doors"][0]), office)


def test_the_way_is_short():
    """Straight ahead through a door: five steps, the door among them."""
    env = OfficeNav3DEnv()
    env.reset(seed=0, options={"task_id": 1})
    place(env, 5.6, 7.2, math.pi, 0)
    actions, _ = reference3d.Ways().find(env.trials.state, TO_BOX, 1)
    assert sorted(actions.tolist()) == [FORWARD] * 4 + [OPEN]
    place(env, 5.6, 7.2, math.pi + math.pi / 6, 0)
    assert reference3d.Ways().find(env.trials.state, TO_BOX, 1)[0].tolist().count(LEFT) <= 1
    place(env, 0.4, 0.4, 0.0, 0)  # behind closed doors that it may not open
    env.trials.state["x"] = 1.2
    actions, pose = reference3d.Ways().find(env.trials.state, TO_BOX, 1)
    assert len(actions) == 0 and pose[0] == 1.2


def test_the_phrase_of_each_environment():
    env = OfficeNav3DVectorEnv(3, phrase="second room")
    said = env.reset(seed=0, options={"phrase": ["first room", "", None]})[1]["phrase_id"]
    assert [TEXTS[index] for index in said] == ["first room", "", "second room"]
    assert [TEXTS[index] for index in env.reset()[1]["phrase_id"]] == ["first room", "", "second room"]
    mask = np.array([True, False, False])
    said = env.reset(options={"phrase": "fourth room", "reset_mask": mask})[1]["phrase_id"]
    assert TEXTS[said[0]] == "fourth room" and env.trials.said.tolist() == [3, env3d.BLANK, 1]
    assert (env.reset(seed=0)[1]["phrase_id"] == 1).all()
    single = OfficeNav3DEnv()
    truth = single.reset(seed=0)[1]
    lie = single.reset(seed=0, options={"phrase": "right of third room"})[1]
    assert lie == {**truth, "phrase": "right of third room", "phrase_id": TEXTS.index("right of third room")}
    assert single.reset(seed=0)[1] == truth
    for wrong in ("fifth room", 3, ["first room", "first room"]):
        with pytest.raises(UserError, match="phrase"):
            single.reset(options={"phrase": wrong})


def test_nothing_compiled_is_imported():
    """Numba's cache does not notice changes in another file: what is compiled stands in one file and imports none."""
    folder = Path(raycast.__file__).parent
    roots = [
        name
        for node in ast.walk(ast.parse((folder / "raycast.py").read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    ]
    assert set(roots) == {"__future__", "math", "typing", "numba", "numpy"}
    for name in ("env3d.py", "reference3d.py", "metrics3d.py"):
        assert "njit" not in (folder / name).read_text(encoding="utf-8")
