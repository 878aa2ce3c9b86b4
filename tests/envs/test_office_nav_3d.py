"""OfficeNav3D: the released geometry and rules, trials, splits, pictures and the sign that can be read in them."""

import concurrent.futures
import itertools
import math
import multiprocessing
import pickle
import time
import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import env3d, raycast
from fleetgym.envs.office_nav.env3d import HELD_OUT, PHRASES, SPLITS, OfficeNav3DEnv, OfficeNav3DVectorEnv
from fleetgym.envs.office_nav.raycast import FORWARD, LEFT, OPEN, RIGHT

NUM_ENVS = 6


def put(env, x, z, heading, doors=0, **fields):
    """Puts the agent somewhere and returns what it sees."""
    state = env.trials.state
    for name, value in {"x": x, "z": z, "heading": heading, "doors": doors, **fields}.items():
        state[name][0] = value
    frame = np.zeros((1, 60, 80, 3), np.uint8)
    env.trials.draw(frame, np.ones(1, bool))
    return frame[0]


@pytest.fixture
def env():
    env = OfficeNav3DEnv()
    env.reset(seed=0, options={"task_id": 0})
    return env


def walk_to(env, goal_x, goal_z, steps=60):
    """Turns and walks towards a point; opens what is in the way. The last step's outcome."""
    outcome = None
    for _ in range(steps):
        x, z, heading = env.pose
        if math.hypot(goal_x - x, goal_z - z) < 0.5:
            return outcome
        off = (math.atan2(-(goal_z - z), goal_x - x) - heading + math.pi) % (2 * math.pi) - math.pi
        if abs(off) > math.pi / 12 + 1e-9:
            outcome = env.step(LEFT if off > 0 else RIGHT)
        else:
            outcome = env.step(FORWARD)
            if env.pose[:2] == (x, z):
                outcome = env.step(OPEN)
        if outcome[2] or outcome[3]:
            return outcome
    return outcome


# ------------------------------------------------------------------------------------------------ the interface


def test_gymnasium_checks():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gym.make("OfficeNav3D-v0", render_mode="rgb_array", disable_env_checker=True).unwrapped)
    assert OfficeNav3DEnv().reset(seed=1)[0].shape == (60, 80, 3)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_plays_what_single_ones_play(mode):
    """All outputs over 600 steps of six environments, through many trials, for each autoreset mode."""
    vector = OfficeNav3DVectorEnv(NUM_ENVS, autoreset_mode=mode, horizon=12)
    singles = [OfficeNav3DEnv(horizon=12) for _ in range(NUM_ENVS)]
    frames, infos = vector.reset(seed=5)
    for index, single in enumerate(singles):
        frame, info = single.reset(seed=5 + index)
        np.testing.assert_array_equal(frames[index], frame)
        assert info["task_id"] == infos["task_id"][index] and info["phrase"] == PHRASES[infos["phrase_id"][index]][0]
    over = np.zeros(NUM_ENVS, bool)
    rng = np.random.default_rng(0)
    successes = 0
    for number in range(600):
        actions = rng.choice(4, size=NUM_ENVS, p=(0.15, 0.15, 0.5, 0.2))
        if number % 40 == 0:  # to make some reach the goal: before an open door of the goal's office
            for trials in (vector.trials, *(single.trials for single in singles)):
                trials.state["x"], trials.state["heading"], trials.state["doors"] = 3.9, math.pi, 31
                trials.state["z"] = 3.0 * (3 - trials.state["goal"]) + 1.2
            actions[:] = FORWARD
        if mode == AutoresetMode.DISABLED and over.any():
            with pytest.raises(UserError, match="its episode has ended; call reset"):
                vector.step(actions)
            frames, infos = vector.reset(options={"reset_mask": over})
            for index in np.flatnonzero(over):
                frame, info = singles[index].reset()
                np.testing.assert_array_equal(frames[index], frame)
                assert info["trial"] == infos["trial"][index] and infos["_trial"][index]
            over[:] = False
        was_over = over
        frames, reward, terminated, truncated, infos = vector.step(actions)
        for index, single in enumerate(singles):
            if mode == AutoresetMode.NEXT_STEP and was_over[index]:
                frame, info = single.reset()
                outcome = (0.0, False, False)
            else:
                frame, *outcome, info = single.step(actions[index])
                outcome = tuple(outcome)
            assert outcome == (reward[index], terminated[index], truncated[index])
            successes += outcome[1]
            if mode == AutoresetMode.SAME_STEP and (outcome[1] or outcome[2]):
                np.testing.assert_array_equal(infos["final_obs"][index], frame)
                assert infos["_final_obs"][index] and infos["final_info"]["_success"][index]
                assert infos["final_info"]["success"][index] == info["success"] == outcome[1]
                frame, info = single.reset()
            np.testing.assert_array_equal(frames[index], frame)
            for key in ("trial", "episode_index", "task_id", "goal", "success"):
                assert infos[key][index] == info[key] and infos[f"_{key}"][index], key
            assert PHRASES[infos["phrase_id"][index]][0] == info["phrase"]
        over = terminated | truncated
    assert successes > 10 and infos["trial"].min() > 5


def test_frames_that_were_returned_do_not_change():
    vector = OfficeNav3DVectorEnv(2, autoreset_mode="same_step", horizon=3)
    kept = [vector.reset(seed=0)[0]]
    copies = [kept[0].copy()]
    for number in range(8):
        kept.append(vector.step(np.array([0, 2]))[0] if number != 4 else vector.reset(seed=3)[0])
        copies.append(kept[-1].copy())
    for now, then in zip(kept, copies):
        np.testing.assert_array_equal(now, then)


def test_same_seed_same_episode_whatever_came_before():
    def play(env):
        frames = [env.reset(seed=11)[0]]
        for action in np.random.default_rng(1).integers(4, size=20):
            frames.append(env.step(action)[0])
        return np.array(frames)

    env = OfficeNav3DEnv()
    first = play(env)
    env.reset(seed=3)
    env.reset()
    np.testing.assert_array_equal(first, play(env))
    assert not np.array_equal(env.reset(seed=12)[0], first[0])
    before = np.random.get_state()[1].copy()
    env.reset()
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def hash_of_play(env):
    frames = [env.step(action)[0] for action in (2, 0, 2, 3, 1)]
    return np.array(frames).tobytes()


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_pickles_go_on_where_they_were_in_other_processes_too(method):
    env = OfficeNav3DEnv()
    env.reset(seed=4)
    env.step(FORWARD)
    copy, sent = pickle.loads(pickle.dumps(env)), pickle.loads(pickle.dumps(env))
    context = multiprocessing.get_context(method)
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        there = pool.submit(hash_of_play, sent).result()
    assert hash_of_play(env) == hash_of_play(copy) == there
    vector = OfficeNav3DVectorEnv(2)
    vector.reset(seed=4)
    other = pickle.loads(pickle.dumps(vector))
    np.testing.assert_array_equal(vector.step(np.array([2, 2]))[0], other.step(np.array([2, 2]))[0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda env: env.reset(options={"task_id": 240}), "integer from 0 to 239"),
        (lambda env: env.reset(options={"task_id": True}), "integer from 0 to 239"),
        (lambda env: env.reset(options={"task_id": 200, "split": "train"}), "which has 0 to 199"),
        (lambda env: env.reset(options={"task_id": 200, "split": "phrases"}), "202, 206"),
        (lambda env: env.reset(options={"split": "validation"}), "train, test, phrases, layout, style"),
        (lambda env: env.reset(options={"taskid": 1}), "task_id, split, new_trial"),
        (lambda env: env.reset(options={"new_trial": 1}), "True or False"),
        (lambda env: env.reset(seed=-1), "non-negative integer"),
        (lambda env: OfficeNav3DVectorEnv(2).reset(options={"task_id": [1, 2, 3]}), "one for each environment"),
        (lambda env: env.step(4), "0 left, 1 right, 2 forward, 3 open"),
        (lambda env: env.step(-1), "0 left"),
        (lambda env: env.step(0.5), "0 left"),
        (lambda env: env.step(None), "0 left"),
        (lambda env: OfficeNav3DEnv(split="nowhere"), "train, test"),
        (lambda env: OfficeNav3DEnv(split="style", released=True), "train, test"),
        (lambda env: OfficeNav3DEnv(released=True).reset(options={"task_id": 3}), "0 to 2"),
        (lambda env: OfficeNav3DEnv(horizon=0), "at least one step"),
        (lambda env: OfficeNav3DEnv(phrase="fifth room"), "nearest"),
        (lambda env: OfficeNav3DEnv(render_mode="human"), "rgb_array"),
        (lambda env: OfficeNav3DEnv(render_mode="ansi").render(), "render before reset"),
        (lambda env: OfficeNav3DEnv().sign(), "sign before reset"),
        (lambda env: OfficeNav3DVectorEnv(2).render(), "no render_mode"),
        (lambda env: OfficeNav3DVectorEnv(2, render_mode="ansi").render(), "render before reset"),
        (
            lambda env: OfficeNav3DVectorEnv(2).reset(options={"reset_mask": np.array([True, False])}),
            "first reset is of",
        ),
        (lambda env: OfficeNav3DVectorEnv(0), "num_envs is 0; it is an integer from 1 to"),
        (lambda env: OfficeNav3DVectorEnv(2, autoreset_mode="never"), "next_step"),
        (lambda env: OfficeNav3DVectorEnv(2).reset(seed=[1]), "1 seeds for 2"),
        (lambda env: OfficeNav3DVectorEnv(2).reset(options={"reset_mask": np.zeros(2, bool)}), "a True in it"),
        (lambda env: OfficeNav3DVectorEnv(2).step(np.zeros(3, int)), "integers are due"),
        (lambda env: OfficeNav3DVectorEnv(2).step(np.array([0, 9])), "0 left"),
    ],
)
def test_bad_input(env, call, message):
    with pytest.raises(UserError, match=message):
        call(env)


def test_steps_need_an_episode(env):
    """The same words as in 2D; gym.make's own wrapper is the first to speak before the first reset."""
    with pytest.raises(UserError, match="step before reset; call reset"):
        OfficeNav3DEnv().step(0)
    with pytest.raises(UserError, match="step before reset; call reset"):
        OfficeNav3DVectorEnv(2).step(np.zeros(2, int))
    for number in range(30):
        truncated = env.step(LEFT)[3]
        assert truncated == (number == 29)
    for env_id, options in (("OfficeNav3D-v0", {"horizon": 1}), ("OfficeNav-Symbolic-v0", {"horizon": 1})):
        made = gym.make(env_id, disable_env_checker=True, **options)
        made.reset(seed=0)
        assert made.step(LEFT)[3]
        with pytest.raises(UserError, match="the episode has ended; call reset\\(\\) before the next step"):
            made.step(LEFT)


# ------------------------------------------------------------------------------------------------ trials and splits


def test_trials():
    env = OfficeNav3DEnv()
    seen = []
    for number in range(8):
        _, info = env.reset(seed=9 if number == 0 else None)
        seen.append((info["trial"], info["episode_index"], info["task_id"]))
        env.step(FORWARD)
    assert [entry[:2] for entry in seen] == [(n // 2, n % 2) for n in range(8)]
    assert all(seen[n][2] == seen[n + 1][2] for n in range(0, 8, 2)) and len({entry[2] for entry in seen}) > 2
    with pytest.raises(UserError, match="new_trial"):
        env.reset(options={"new_trial": False})
    assert env.reset()[1]["trial"] == 4
    assert env.reset(options={"new_trial": True})[1]["trial"] == 5
    info = env.reset(options={"new_trial": False})[1]
    assert (info["trial"], info["episode_index"]) == (5, 1)
    info = env.reset(options={"task_id": 201})[1]
    assert (info["task_id"], info["goal"], info["episode_index"]) == (201, 1, 0)
    assert env.reset()[1]["episode_index"] == 1
    assert env.reset()[1]["task_id"] >= 200
    assert env.reset(seed=9)[1]["task_id"] == seen[0][2]
    assert env.reset(seed=9, options={"split": "style"})[1]["task_id"] >= 200
    assert env.reset()[1]["task_id"] >= 200 and env.reset()[1]["task_id"] >= 200
    vector = OfficeNav3DVectorEnv(3)
    infos = vector.reset(seed=9, options={"task_id": [3, 201, 5], "split": ["train", "style", None]})[1]
    assert infos["task_id"].tolist() == [3, 201, 5]
    assert vector.trials.state["look"].tolist() == [0, 60, 1]


def test_start_is_in_the_released_region_and_uniform():
    vector = OfficeNav3DVectorEnv(2000)
    vector.reset(seed=0)
    state = vector.trials.state
    for name, low, high in (("x", 6, 9), ("z", 4, 6), ("heading", 0, 2 * math.pi)):
        places = (state[name] - low) / (high - low)
        assert places.min() >= 0 and places.max() <= 1
        assert np.histogram(places, 10, (0, 1))[0].min() > 150
    assert not state["doors"].any()


def test_splits_are_disjoint():
    world = env3d.world()
    train = {tuple(look) + tuple(box) for look, box in zip(world.looks[:50], world.crates[:50])}
    test = {tuple(look) + tuple(box) for look, box in zip(world.looks[50:60], world.crates[50:60])}
    assert len(train) == 50 and len(test) == 10 and not train & test
    assert not set(world.looks[60:, :4].ravel()) & set(world.looks[:60].ravel())
    ids, phrases = {}, {}
    for split in SPLITS:
        vector = OfficeNav3DVectorEnv(1500, split=split)
        infos = vector.reset(seed=1)[1]
        ids[split] = set(infos["task_id"].tolist())
        phrases[split] = {PHRASES[index][0] for index in infos["phrase_id"]}
        assert (np.array([goal for _, goal in PHRASES])[infos["phrase_id"]] == infos["goal"]).all()
        assert (vector.trials.state["layout"] == (split == "layout")).all()
        assert ((vector.trials.state["look"] >= 60) == (split == "style")).all()
    assert ids["train"] == set(range(200)) and ids["test"] == ids["style"] == ids["layout"] == set(range(200, 240))
    assert ids["phrases"] == {202 + 4 * n for n in range(10)}
    assert phrases.pop("phrases") == {HELD_OUT}
    assert all(found == {phrase for phrase, _ in PHRASES} - {HELD_OUT} for found in phrases.values())


def test_phrases_as_released():
    """Half direct, half a neighbour, and no goal in the fourth office: by count over 6,000 trials."""
    vector = OfficeNav3DVectorEnv(6000, released=True)
    infos = vector.reset(seed=0)[1]
    assert set(infos["goal"]) == {0, 1, 2} and (infos["goal"] == infos["task_id"]).all()
    assert (vector.trials.state["look"] == 0).all()
    shares = {PHRASES[index][0]: (infos["phrase_id"] == index).mean() * 3 for index in range(len(PHRASES))}
    expected = {"first room": 0.5, "left of second room": 0.5, "second room": 0.5, "right of first room": 0.25}
    expected |= {"left of third room": 0.25, "third room": 0.5, "right of second room": 0.25}
    expected |= {"left of fourth room": 0.25, "fourth room": 0, "right of third room": 0}
    for phrase, share in expected.items():
        assert abs(shares[phrase] - share) < 0.05, phrase
    meaning = {"left": -1, "right": 1}
    for phrase, goal in PHRASES:
        words = phrase.split()
        named = env3d.ORDINALS.index(words[-2])
        assert goal == named + (meaning[words[0]] if len(words) > 2 else 0) == env3d.resolve(phrase)


# ------------------------------------------------------------------------------------------------ the rules


def test_actions(env):
    put(env, 7.0, 5.0, 0.0)
    env.step(LEFT)
    assert env.pose == pytest.approx((7.0, 5.0, math.pi / 6))
    env.step(RIGHT)
    env.step(FORWARD)
    assert env.pose == pytest.approx((7.7, 5.0, 0.0))
    put(env, 7.0, 5.0, math.pi / 2)
    env.step(FORWARD)
    assert env.pose == pytest.approx((7.0, 4.3, math.pi / 2))  # left of +x is -z


def test_nothing_is_walked_through(env):
    """400 random walks of 150 steps, with and without open doors never leave the rooms or come nearer than 0.4 m."""
    vector = OfficeNav3DVectorEnv(400, autoreset_mode="same_step")
    vector.reset(seed=0)
    rng = np.random.default_rng(0)
    scene = env3d.world().scenes[0]
    for _ in range(150):
        vector.step(rng.choice(4, size=400, p=(0.15, 0.1, 0.65, 0.1)))
        state = vector.trials.state
        for x0, z0, x1, z1 in scene.walls:
            apart = np.hypot(state["x"] - np.clip(state["x"], x0, x1), state["z"] - np.clip(state["z"], z0, z1))
            assert apart.min() >= 0.4 - 1e-8
        for x, z, half_x, half_z, *_ in scene.furniture:
            dx = np.maximum(np.abs(state["x"] - x) - half_x, 0)
            assert np.hypot(dx, np.maximum(np.abs(state["z"] - z) - half_z, 0)).min() >= 0.4 - 1e-8
    # beyond a closed door is nobody
    closed = (state["doors"] & 16) == 0
    assert (state["x"][closed] < 10.8).all() and (state["x"][~closed] > 10.8).any()


@pytest.mark.parametrize("layout", [0, 1])
def test_walls_close_the_building(layout):
    """Each side of each rectangle is covered exactly once by walls and openings, and openings lead back."""
    scene = env3d.world().scenes[layout]
    total = 0.0
    for rect, (x0, x1, z0, z1) in enumerate(scene.rects):
        total += 2 * (x1 - x0) + 2 * (z1 - z0)
        for side, index in itertools.product(range(4), range(scene.targets.shape[2])):
            target = scene.targets[rect, side, index]
            if target >= 0:
                low, high = scene.portals[rect, side, index]
                total -= high - low
                back = scene.targets[target, side ^ 1] == rect
                assert (scene.portals[target, side ^ 1][back] == (low, high)).all() and back.sum() == 1
                assert scene.rects[rect][side] == scene.rects[target][side ^ 1]
    length = np.abs(scene.walls[:, 2:] - scene.walls[:, :2]).sum()
    assert length == pytest.approx(total)
    assert len(scene.doors) == 5


@pytest.mark.parametrize("goal", range(4))
def test_only_the_blue_box_counts(goal):
    env = OfficeNav3DEnv(horizon=200)
    for office in range(4):
        env.reset(seed=office, options={"task_id": goal, "new_trial": True})
        x, z = env3d.office_centre(office)
        walk_to(env, 5.0, z)
        _, reward, terminated, _, info = walk_to(env, x + 1.2, z)
        assert (reward, terminated, info["success"]) == ((1.0, True, True) if office == goal else (0.0, False, False))
        if office == goal:
            distance = math.hypot(env.pose[0] - x, env.pose[1] - z)
            assert distance < raycast.NEAR < distance + raycast.STRIDE


def test_doors_block_until_opened_and_close_again(env):
    z = env3d.office_centre(1)[1]
    shut = put(env, 4.5, z, math.pi)
    env.step(FORWARD)
    assert env.pose[0] == pytest.approx(3.8)
    env.step(FORWARD)
    assert env.pose[0] == pytest.approx(3.8)
    put(env, 4.5, z, math.pi)
    opened = env.step(OPEN)[0]
    assert np.abs(opened.astype(int) - shut).mean() > 10
    assert env.trials.state["doors"][0] == 2
    for _ in range(2):
        env.step(FORWARD)
    assert env.pose[0] == pytest.approx(3.1)
    env.reset()
    assert env.trials.state["doors"][0] == 0
    put(env, 7.0, z, math.pi)
    env.step(OPEN)
    assert env.trials.state["doors"][0] == 0  # too far


def shortest(scene, pose, reached):
    """The fewest turns and steps from a pose to where ``reached(x, z)``, all doors being open."""
    (x, z, heading), seen, ways = pose, set(), 0
    places = [(x, z, 0)]
    while places:
        following = []
        for x, z, turn in places:
            if reached(x, z):
                return ways
            angle = heading + turn * raycast.TURN
            ahead = (x + raycast.STRIDE * math.cos(angle), z - raycast.STRIDE * math.sin(angle), turn)
            for place in (ahead, (x, z, (turn + 1) % 12), (x, z, (turn - 1) % 12)):
                key = round(place[0] / 0.3), round(place[1] / 0.3), place[2]
                if key not in seen and (place[2] != turn or not raycast.blocked(scene, *place[:2], 0.4, 31)):
                    seen.add(key)
                    following.append(place)
        places, ways = following, ways + 1


@pytest.mark.parametrize("split, door", [("test", 6.0), ("layout", 7.9)])
def test_thirty_steps_do_for_the_sign_and_for_each_office(split, door):
    """Reading in the first episode, walking in the second: each needs one more step, to open the door."""
    env = OfficeNav3DEnv(split=split)
    env.reset(seed=2)
    scene = env3d.world().scenes[env.trials.state["layout"][0]]
    assert shortest(scene, env.pose, lambda x, z: x > 11.5 and abs(z - door) < 1.5) < 25
    for office in range(4):
        x0, z0 = env3d.office_centre(office)
        assert shortest(scene, env.pose, lambda x, z: math.hypot(x - x0, z - z0) < raycast.NEAR) < 25  # noqa: B023


# ------------------------------------------------------------------------------------------------ the pictures


def read(frame, distance, board=6.0):
    """Which phrase a frame, seen straight on, shows: the one whose bitmap correlates best with the pixels."""
    pitch = math.tan(math.radians(30)) / 30
    columns = 39.5 + (np.linspace(-4.2, 4.2, 70, endpoint=False) + 0.06) / (distance * pitch)
    rows = 29.5 - (np.linspace(2.69, 0.05, 22, endpoint=False) - 0.06 - 1.5) / (distance * pitch)
    keep_rows, keep = (rows > 0) & (rows < 59), (columns > 0) & (columns < 79)
    grey = frame[..., 1].astype(float)
    seen = grey[np.ix_(np.rint(rows[keep_rows]).astype(int), np.rint(columns[keep]).astype(int))]
    scores = []
    for phrase, _ in PHRASES:
        bitmap = env3d.sign_bitmap(phrase)[np.ix_(keep_rows, keep)].astype(float)
        scores.append(np.corrcoef(bitmap.ravel(), seen.ravel())[0, 1])
    return PHRASES[int(np.argmax(scores))][0], max(scores)


@pytest.mark.parametrize("distance", [5.5, 6.0, 6.5])
def test_sign_is_readable_in_the_pixels(env, distance):
    for index, (phrase, _) in enumerate(PHRASES):
        found, score = read(put(env, 18.6 - distance, 6.0, 0.0, 31, phrase=index), distance)
        assert found == phrase and score > 0.55
    # and from other places in the room all signs differ
    for x, z, heading in ((12.0, 4.0, -0.3), (13.0, 8.0, 0.3), (11.3, 6.0, 0.0)):
        frames = [put(env, x, z, heading, 31, phrase=index) for index in range(len(PHRASES))]
        for one, two in itertools.combinations(frames, 2):
            assert np.abs(one.astype(int) - two).max() > 60


def test_sign_is_seen_only_where_it_hangs(env):
    """In the middle room with the door shut the phrase changes no pixel; behind an open door it does."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        x, z, heading = rng.uniform(4.1, 9.1), rng.uniform(2.5, 9), rng.uniform(0, 2 * math.pi)
        np.testing.assert_array_equal(put(env, x, z, heading, 15, phrase=0), put(env, x, z, heading, 15, phrase=4))
    assert (put(env, 8.0, 6.0, 0.0, 16, phrase=0) != put(env, 8.0, 6.0, 0.0, 16, phrase=4)).any()
    assert (put(env, 13.0, 6.0, math.pi, 16, phrase=0) == put(env, 13.0, 6.0, math.pi, 16, phrase=4)).all()


def test_sign_swap_and_blank():
    for phrase in ("fourth room", ""):
        env = OfficeNav3DEnv(phrase=phrase)
        info = env.reset(seed=0, options={"task_id": 0})[1]
        assert info["phrase"] == phrase and info["goal"] == 0
    blank = put(env, 12.4, 6.0, 0.0, 31)
    assert (blank[28:32, 30:50] == 255).all()


@pytest.mark.parametrize("goal", range(4))
def test_boxes_are_seen_in_their_colours(env, goal):
    for office in range(4):
        z = env3d.office_centre(office)[1]
        frame = put(env, 4.2, z, math.pi, 31, goal=goal, look=0)
        box = frame[47:54, 38:42].reshape(-1, 3).mean(0)
        assert box.argmax() == (2 if office == goal else 0) and box.max() > 1.8 * np.delete(box, box.argmax()).max()
        shut = put(env, 4.2, z, math.pi, 0, goal=goal, look=0)
        assert (shut == put(env, 4.2, z, math.pi, 0, goal=(goal + 1) % 4, look=0)).all()


def test_pixels_stand_where_geometry_says(env):
    """The upper edge of the wall, straight ahead: its row is that of the pinhole camera, for many distances."""
    for distance in (2.5, 3.0, 4.0, 5.0, 7.0):
        for heading, x, z in ((math.pi / 2, 6.0, distance), (-math.pi / 2, 6.0, 12 - distance)):
            frame = put(env, x, z, heading, 0, look=0).astype(int)
            top = 29.5 - (2.74 - 1.5) / (distance * math.tan(math.radians(30)) / 30)
            ceiling = frame[: math.ceil(top), 39:41].reshape(-1, 3)
            wall = frame[math.ceil(top) : 30, 39:41].reshape(-1, 3)
            if len(ceiling):  # grey above, green below
                assert (np.ptp(ceiling, axis=1) < 12).all()
            assert (np.ptp(wall, axis=1) > 20).all()


def test_no_pixel_is_left_out(env):
    """Frames drawn onto black and onto white are the same, from everywhere that one can stand, on both floor plans."""
    rng = np.random.default_rng(0)
    trials = OfficeNav3DVectorEnv(3000).trials
    trials.begin(np.ones(3000, bool))
    trials.state["layout"], trials.state["look"] = np.arange(3000) % 2, rng.integers(70, size=3000)
    trials.state["doors"], trials.state["heading"] = rng.integers(32, size=3000), rng.uniform(0, 7, 3000)
    rects = env3d.world().scenes[0].rects
    for index in range(3000):
        x0, x1, z0, z1 = env3d.world().scenes[index % 2].rects[index % len(rects)]
        trials.state["x"][index] = rng.uniform(x0 + min(0.1, (x1 - x0) / 3), x1 - min(0.1, (x1 - x0) / 3))
        trials.state["z"][index] = rng.uniform(z0 + 0.1, z1 - 0.1)
    black, white = np.zeros((3000, 60, 80, 3), np.uint8), np.full((3000, 60, 80, 3), 255, np.uint8)
    trials.draw(black, np.ones(3000, bool))
    trials.draw(white, np.ones(3000, bool))
    np.testing.assert_array_equal(black, white)


def test_render():
    env = OfficeNav3DEnv(render_mode="rgb_array")
    env.reset(seed=0)
    first = env.render()
    assert first.shape == (240, 692, 3) and first.dtype == np.uint8
    env.step(LEFT)
    assert (env.render() != first).any()
    vector = OfficeNav3DVectorEnv(2, render_mode="rgb_array")
    vector.reset(seed=0)
    np.testing.assert_array_equal(vector.render()[0], first)


def test_characters():
    """Every character of the middle room's row of a known state, and what changes when doors open and agents turn."""
    env = OfficeNav3DEnv(render_mode="ansi")
    env.reset(seed=0, options={"task_id": 1, "phrase": "left of third room"})
    put(env, 7.05, 6.3, 0.1)
    lines = env.render().split("\n")
    assert len(lines) == 24 and {len(line) for line in lines[:22]} == {65}
    assert lines[22].startswith("trial 0, episode 1 of 2, step 0 of 30, task 1, at (7.0, 6.3) looking 6 degrees")
    assert lines[23] == "sign: left of third room"
    plan = "\n".join(lines[:22])
    letters = [line[6] for line in lines[:22] if line[6].isalpha()]
    assert letters == ["r", "r", "b", "r"]  # the second office, counted from below, has the blue box
    assert plan.count(">") == 1 and lines[11][25] == ">" and "/" not in plan and plan.count("%") > 10
    assert lines[11].startswith("##   ") and lines[11].count("D") == 3 and lines[11][-1] == "S"
    assert sum(line[-2] == "S" or line[-1] == "S" for line in lines[:22]) == 14  # 8.4 m
    for heading, letter in ((math.pi / 2, "^"), (math.pi, "<"), (-math.pi / 2, "v"), (2 * math.pi, ">")):
        put(env, 7.05, 6.3, heading)
        assert env.render().split("\n")[11][25] == letter
    put(env, 7.05, 6.3, 0.0, 16)
    text = env.render()
    assert text.count("/") == 2 * 6 and text.count("D") == plan.count("D") - 2 * 6
    for look in range(70):
        put(env, 7.05, 6.3, 0.0, look=look)
        colours = env.trials.box_colours(0)
        assert colours[1] == "blue" and colours.count("blue") == 1 and set(colours) <= set(env3d.COLOURS)
    vector = OfficeNav3DVectorEnv(2, render_mode="ansi")
    vector.reset(seed=0)
    single = OfficeNav3DEnv(render_mode="ansi")
    single.reset(seed=1)
    assert vector.render()[1] == single.render() != vector.render()[0]


def test_the_sign_as_a_picture():
    env = OfficeNav3DEnv()
    seen = set()
    for phrase in env3d.TEXTS:
        env.reset(seed=0, options={"phrase": phrase})
        picture = env.sign()
        assert picture.shape == (88, 280, 3) and picture.dtype == np.uint8
        np.testing.assert_array_equal(picture[::4, ::4, 1], env3d.sign_bitmap(phrase))
        seen.add(picture.tobytes())
    assert len(seen) == len(env3d.TEXTS)


def test_pose_of_many():
    vector, single = OfficeNav3DVectorEnv(2), OfficeNav3DEnv()
    vector.reset(seed=4)
    single.reset(seed=5)
    assert tuple(vector.pose[1]) == single.pose and vector.pose.shape == (2, 3)
    assert vector.autoreset_mode == vector.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP


def test_speed():
    """A tenth of what it reaches on an idle core: this only notices when something breaks."""
    vector = OfficeNav3DVectorEnv(64)
    vector.reset(seed=0)
    actions = np.random.default_rng(0).integers(4, size=(50, 64))
    start = time.process_time()
    for row in actions:
        vector.step(row)
    assert 50 * 64 / (time.process_time() - start) > 3000


def test_a_vector_s_horizon_and_bad_input():
    envs = gym.make_vec("OfficeNav3D-v0", num_envs=2, max_episode_steps=3, autoreset_mode="disabled")
    envs.reset(seed=0)
    assert [envs.step(np.zeros(2, int))[3].tolist() for _ in range(3)][-2:] == [[False] * 2, [True] * 2]
    with pytest.raises(UserError, match="give a dict"):
        envs.reset(options=["split"])
    for number in (0, True, 2.5, 10**20):
        with pytest.raises(UserError, match="integer from 1"):
            OfficeNav3DVectorEnv(number)
