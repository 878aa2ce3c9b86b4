"""OfficeNav: geometry, dynamics, trials, splits, and that single and vector environments agree."""

import copy
import hashlib
import itertools
import json
import pickle
import subprocess
import sys
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode

import fleetgym  # noqa: F401  (registers the ids)
from fleetgym.core.errors import UserError
from fleetgym.envs import suite
from fleetgym.envs.office_nav import kernels, language, rng, signs, tiles
from fleetgym.envs.office_nav.buildings import building, buildings
from fleetgym.envs.office_nav.env import OfficeNavEnv
from fleetgym.envs.office_nav.layout import COLOURS, LAYOUTS, layout
from fleetgym.envs.office_nav.variants import SPLITS, VARIANTS, resolve_variant, tables
from fleetgym.envs.office_nav.vector import OfficeNavVectorEnv

GOLDEN = Path(__file__).resolve().parents[1] / "golden" / "office_nav.json"
LEFT, RIGHT, FORWARD, TOGGLE = range(4)


def path_to(plan, office):
    """The released code's shortest path into an office, for the released layouts' coordinates."""
    x, y = plan.office_xy[office]
    hall = [3, 3, 9, 9, 15, 15][office % plan.columns]
    turn = LEFT if x < hall else RIGHT
    return [FORWARD] * (hall - 1) + [LEFT] + [FORWARD] * (plan.start[1] - y) + [turn, TOGGLE, FORWARD, FORWARD]


# -- Geometry, buildings, bits -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LAYOUTS)
def test_single_goal_buildings_have_one(name):
    table = buildings(300, name, True)
    assert ((table == 0).sum(1) == 1).all() and all(set(row) == set(range(6)) for row in table.tolist())
    counts = np.bincount(np.argmax(table == 0, 1), minlength=layout(name).offices)
    assert counts.min() > 300 / layout(name).offices / 3


def test_bits_are_the_same_for_integers_arrays_and_kernels():
    seeds = [0, 1, 12345, 2**63 - 1, 2**63, 2**64 - 1]
    for seed, trial, episode in itertools.product(seeds, (0, 5, 10**9), (0, 2)):
        expected = rng.bits(seed, trial, episode, 0)
        assert 0 <= expected < 1 << 32
        assert rng.bits(np.array([seed], np.uint64), trial, episode, 0)[0] == expected
        assert kernels._bits(np.uint64(seed).astype(np.int64), trial, episode, 0) == expected
    many = rng.bits(np.arange(20000), 3, 1, 0)
    assert len(np.unique(many)) > 19990
    share = np.bincount(rng.pick(many, 12)) / len(many)
    assert abs(share - 1 / 12).max() < 0.01
    assert abs((many[:, None] >> np.arange(32, dtype=np.uint64) & np.uint64(1)).mean(0) - 0.5).max() < 0.02


# -- Views and dynamics against MiniGrid -------------------------------------------------------------------------------


def minigrid_twin(env):
    """The same building in MiniGrid's own classes, with the agent where ours is."""
    pytest.importorskip("minigrid")
    from minigrid.core.grid import Grid
    from minigrid.core.mission import MissionSpace
    from minigrid.core.world_object import Ball, Door, Floor, Wall
    from minigrid.minigrid_env import MiniGridEnv

    class Marker(Ball):
        def can_overlap(self):
            return True

        def can_pickup(self):
            return False

    state = env._rows.state[:, 0]
    plan = env._rows.tables.layouts[state[kernels.LAYOUT]]
    colours = env._rows.tables.colours[state[kernels.LAYOUT], state[kernels.TASK]]

    class Twin(MiniGridEnv):
        def _gen_grid(self, width, height):
            self.grid = Grid(width, height)
            for y, x in np.argwhere(plan.walls):
                self.grid.set(x, y, Wall())
            for k in range(plan.offices):
                self.grid.set(*plan.office_xy[k], Floor(COLOURS[colours[k]]))
                self.grid.set(*plan.door_xy[k], Door("red"))
            self.grid.set(*plan.sign_xy, Marker("blue"))
            self.agent_pos, self.agent_dir, self.mission = np.array(plan.start[:2]), plan.start[2], ""

    twin = Twin(MissionSpace(lambda: ""), width=plan.width, height=plan.height, max_steps=10**6)
    observation, _ = twin.reset()
    return twin, observation["image"]


@pytest.mark.parametrize(("name", "split"), [("OfficeNav-Symbolic-v0", "train"), ("OfficeNav-Tall-v0", "train")])
@pytest.mark.parametrize("layout_split", [False, True])
def test_views_and_moves_are_minigrid_s(name, split, layout_split):
    env = OfficeNavEnv(name, view="symbolic", split="layout" if layout_split else split, horizon=400)
    random = np.random.default_rng(0)
    places = set()
    for seed in range(3):
        observation, info = env.reset(seed=seed)
        twin, image = minigrid_twin(env)
        np.testing.assert_array_equal(observation["image"], image)
        for _ in range(400):
            # Doors are opened when one is ahead, so that the walk gets around.
            door = image[3, 5, 0] == 4 and image[3, 5, 2] == 1
            action = int(random.choice(4, p=[0.15, 0.15, 0.2, 0.5] if door else [0.16, 0.16, 0.6, 0.08]))
            before = twin.agent_pos
            observation, reward, terminated, truncated, info = env.step(action)
            image = twin.step([0, 1, 2, 5][action])[0]["image"]
            np.testing.assert_array_equal(observation["image"], image)
            state = env._rows.state[:, 0]
            assert tuple(twin.agent_pos) == (state[kernels.X], state[kernels.Y])
            cell = twin.grid.get(*twin.agent_pos)
            on_goal = cell is not None and cell.type == "floor" and cell.color == "blue"
            assert terminated == (on_goal and tuple(before) != tuple(twin.agent_pos))
            assert reward == (1.0 if terminated else -0.05)
            assert observation["on_sign"] == (cell is not None and cell.type == "ball")
            places.add((*map(int, twin.agent_pos), twin.agent_dir))
            if terminated or truncated:
                break
    assert len(places) > 40


def test_tiles_differ():
    pictures = tiles.atlas().reshape(2 * tiles.KINDS, -1)
    assert len(np.unique(pictures, axis=0)) == 2 * tiles.KINDS


# -- Trials ------------------------------------------------------------------------------------------------------------


def test_sign_is_seen_after_eight_steps_and_says_the_goal():
    env = gym.make("OfficeNav-v0")
    said = set()
    for seed in range(40):
        observation, info = env.reset(seed=seed)
        for action in [FORWARD] * 5 + [RIGHT] + [FORWARD] * 2:
            assert not observation["on_sign"] and not observation["sign"].any()
            observation, *_, info = env.step(action)
        assert observation["on_sign"] == 1
        np.testing.assert_array_equal(observation["sign"], signs.text_sign(info["phrase"]))
        assert language.resolve(info["phrase"]) == info["goal"] and language.HELD_OUT not in info["phrase"]
        assert env.unwrapped._rows.tables.phrases[0][info["phrase_id"]] == info["phrase"]
        said.add(info["phrase"])
        observation, *_ = env.step(LEFT)
        assert observation["on_sign"] == 1
        [env.step(LEFT), env.step(FORWARD)]
        observation, *_ = env.step(LEFT)
        assert not observation["on_sign"] and not observation["sign"].any()
    assert len(said) > 15


def test_picture_is_the_composed_plan():
    env = gym.make("OfficeNav-Map-v0")
    styles = signs.picture_styles("standard")
    shown = set()
    for seed in range(10):
        env.reset(seed=seed)
        for action in [FORWARD] * 5 + [RIGHT] + [FORWARD] * 2:
            observation, *_, info = env.step(action)
        style = styles.names.index(info["phrase"])
        assert style == info["phrase_id"] and styles.train[style]
        colours = tables(VARIANTS["OfficeNav-Map-v0"]).colours[0, info["task_id"], :12]
        np.testing.assert_array_equal(observation["sign"], signs.compose(styles, style, colours))
        shown.add(style)
    assert len(shown) > 3


def test_a_trial_is_two_episodes_in_one_building():
    env = OfficeNavEnv("OfficeNav-Symbolic-v0")
    told = [env.reset(seed=4)[1]] + [env.reset()[1] for _ in range(9)]
    assert [(info["trial"], info["episode_index"]) for info in told] == [(t, e) for t in range(5) for e in (0, 1)]
    for first, second in zip(told[::2], told[1::2]):
        assert first["task_id"] == second["task_id"] and first["goal"] == second["goal"]
    assert len({info["task_id"] for info in told}) > 3
    assert any(first["phrase"] != second["phrase"] for first, second in zip(told[::2], told[1::2]))
    assert told[:4] == [env.reset(seed=4)[1]] + [env.reset()[1] for _ in range(3)]
    # Doors are closed again.
    env.reset(seed=4)
    for action in path_to(layout("standard"), 0)[:-2]:
        env.step(action)
    assert env._rows.state[kernels.DOORS, 0]
    env.reset()
    assert not env._rows.state[kernels.DOORS, 0]


def test_reset_options():
    env = OfficeNavEnv("OfficeNav-Symbolic-v0")
    _, info = env.reset(seed=1, options={"task_id": 17})
    assert (info["task_id"], info["trial"], info["episode_index"]) == (17, 0, 0)
    assert env.reset()[1]["task_id"] == 17  # the trial goes on
    _, info = env.reset(options={"task_id": 1100})
    assert (info["task_id"], info["trial"], info["episode_index"]) == (1100, 1, 0)
    _, info = env.reset(options={"split": "test"})
    assert info["trial"] == 2 and info["task_id"] >= 1000
    later = [env.reset()[1]["task_id"] for _ in range(6)]
    assert min(later) >= 1000 and len(set(later)) > 2  # the split stays
    assert env.reset(options={"new_trial": True})[1]["episode_index"] == 0
    assert env.reset(options={"new_trial": False})[1]["episode_index"] == 1
    assert env.reset(seed=1)[1]["task_id"] < 1000  # until a seed
    _, info = env.reset(options={"split": "layout", "task_id": 1003})
    assert env._rows.state[kernels.LAYOUT, 0] == 1 and info["task_id"] == 1003
    assert OfficeNavEnv("OfficeNav-Symbolic-v0", split="test").reset(seed=0)[1]["task_id"] >= 1000


# -- Splits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "OfficeNav-Released-v0"])
def test_splits_are_disjoint(name):
    table = tables(VARIANTS[name])
    train, test = table.pool("train"), table.pool("test")
    assert (len(train), len(test)) == (1000, 200) and not set(train) & set(test)
    kinds = {split: {table.colours[0, task].tobytes() for task in ids} for split, ids in zip("ab", (train, test))}
    assert not kinds["a"] & kinds["b"] and len(kinds["a"]) == 1000
    for split in table.splits[1:]:
        assert set(table.pool(split)) <= set(test) and len(table.pool(split)) > 50
    own, held_out = table.layouts
    assert own.name != held_out.name and table.layout_of.tolist() == [0, 0, 0, 1, 0]
    assert not np.array_equal(own.walls, held_out.walls) if own.walls.shape == held_out.walls.shape else True
    if table.variant.sign == "text":
        assert "style" not in table.splits
        possible = {}
        for split in table.splits:
            index = SPLITS.index(split)
            chances = np.diff(table.cumulative[index], prepend=0, axis=1)
            assert (chances >= 0).all()
            goals = set(table.goals[table.layout_of[index], table.pool(split)].tolist())
            assert all(table.cumulative[index, goal, -1] == rng.UNIT for goal in goals)
            strings = table.phrases[table.layout_of[index]]
            possible[split] = {strings[p] for goal in goals for p in np.flatnonzero(chances[goal])}
        held = possible["phrases"]
        assert held and all(language.HELD_OUT in phrase for phrase in held)
        assert held <= language.held_out_phrases(own.offices)
        for split in ("train", "test", "layout"):
            assert not any(language.HELD_OUT in phrase for phrase in possible[split])
        if name == "OfficeNav-v0":
            assert len(held) == 9 and len(possible["train"]) == 117
    else:
        assert "phrases" not in table.splits
        assert not set(table.styles("style")) & set(table.styles("train"))
        assert len(table.styles("train")) >= 10 and len(table.styles("style")) >= 2
        assert set(table.styles("test")) == set(table.styles("train")) == set(table.styles("layout"))


def test_splits_are_what_reset_shows():
    env = OfficeNavEnv("OfficeNav-Symbolic-v0", split="phrases")
    told = [env.reset(seed=0)[1]] + [env.reset()[1] for _ in range(300)]
    assert {info["phrase"] for info in told} == language.held_out_phrases()
    assert all(language.resolve(info["phrase"]) == info["goal"] for info in told)
    env = OfficeNavEnv("OfficeNav-Map-v0", split="style")
    told = [env.reset(seed=0)[1]] + [env.reset()[1] for _ in range(20)]
    styles = signs.picture_styles("standard")
    assert {info["phrase"] for info in told} == {styles.names[i] for i in styles.indices("style")}


def test_what_is_drawn_is_what_the_tables_say():
    table = tables(VARIANTS["OfficeNav-Symbolic-v0"])
    envs = OfficeNavVectorEnv(3000, variant="OfficeNav-Symbolic-v0")
    _, info = envs.reset(seed=11)
    for row in range(0, 3000, 97):
        pool = table.pool("train")
        task = int(pool[rng.pick(rng.bits(11 + row, 0, 0, rng.TASK), len(pool))])
        top = rng.top24(rng.bits(11 + row, 0, 1, rng.SIGN))
        goal = int(table.goals[0, task])
        sign = language.draw(table.cumulative[0], goal, top)
        assert (task, goal, sign) == tuple(int(info[key][row]) for key in ("task_id", "goal", "phrase_id"))
    goal = np.bincount(info["goal"]).argmax()
    drawn = np.bincount(info["phrase_id"][info["goal"] == goal], minlength=126)
    expected = np.diff(table.cumulative[0, goal], prepend=0) / rng.UNIT
    assert abs(drawn / drawn.sum() - expected).max() < 0.06 and not drawn[expected == 0].any()


def test_released_is_as_released():
    table = tables(VARIANTS["OfficeNav-Released-v0"])
    assert table.splits == ("train", "test") and table.pool("train").tolist() == table.pool("test").tolist()
    assert table.tasks == 200 and len(table.phrases[0]) == 106
    for split in ("train", "test"):
        np.testing.assert_array_equal(table.cumulative[SPLITS.index(split), :12], language.released_phrase_table()[1])
    np.testing.assert_array_equal(table.colours[0, :, :12], buildings(200, "standard", False, False))
    env = gym.make("OfficeNav-Released-v0")
    assert env.action_space.n == 7 and env.observation_space["image"].shape == (7, 7, 3)
    env.reset(seed=0)
    doors = env.unwrapped._rows.state
    for action in (3, 4, 6):
        before = doors[kernels.X : kernels.STEP, 0].copy()
        env.step(action)
        np.testing.assert_array_equal(before, doors[kernels.X : kernels.STEP, 0])
    env.reset(seed=0)
    for action in path_to(layout("standard"), 0)[:-2]:
        env.step(5 if action == TOGGLE else action)
    assert doors[kernels.DOORS, 0] == 1
    phrases = {env.reset(seed=seed)[1]["phrase"] for seed in range(400)}
    assert phrases <= set(table.phrases[0]) and len(phrases) > 60
    assert any("5th office" in phrase or "4th row" in phrase for phrase in phrases)
    assert not any("lower" in phrase for phrase in phrases)
    # The leak: the held-out office is named by the held-out phrase in half of its episodes.
    goal_6 = int(np.flatnonzero(table.goals[0] == 6)[0])
    said = [env.reset(seed=seed, options={"task_id": goal_6})[1]["phrase"] for seed in range(100)]
    assert 30 < said.count(language.HELD_OUT) < 70
    assert not any(language.HELD_OUT in phrase for phrase in said if phrase != language.HELD_OUT)


# -- Gymnasium's contracts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_check_env_has_nothing_to_say(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        env = gym.make(name, render_mode="rgb_array")
        check_env(env.unwrapped)
        env.reset(seed=0)
        frame = env.render()
        assert frame.dtype == np.uint8 and frame.ndim == 3
        text = gym.make(name, render_mode="ansi")
        text.reset(seed=0)
        assert ">" in text.render() and "trial 0, episode 1 of 2" in text.render()
        gym.make_vec(name, num_envs=2).reset(seed=0)


def test_render_shows_the_sign_to_who_stands_on_it():
    env = gym.make("OfficeNav-v0", render_mode="ansi")
    pictures = gym.make("OfficeNav-v0", render_mode="rgb_array")
    env.reset(seed=3), pictures.reset(seed=3)
    assert "sign:" not in env.render()
    before = pictures.render()
    for action in [FORWARD] * 5 + [RIGHT] + [FORWARD] * 2:
        *_, info = env.step(action)
        pictures.step(action)
    assert env.render().endswith(f"sign: {info['phrase']}") and "v" in env.render()
    panel = pictures.render()[:, -192:]
    assert (panel == 255).all(-1).sum() > 20000 and not (before[:, -192:] == 255).all(-1).any()


def play(envs, actions, seed):
    """A hash of all that a vector environment returns."""
    digest = hashlib.sha256()
    observation, info = envs.reset(seed=seed)
    for action in actions:
        for key in ("image", "sign", "on_sign"):
            digest.update(np.ascontiguousarray(observation[key]).tobytes())
        for key in kernels.INFO:
            digest.update(np.asarray(info[key], np.int64).tobytes())
        observation, *rest, info = envs.step(action)
        for part in rest:
            digest.update(part.tobytes())
    return digest.hexdigest()


def some_actions(steps, number, kinds=4, seed=0):
    """Random ones with a preference: walk to the sign first, in half of the environments."""
    random = np.random.default_rng(seed)
    actions = random.choice(4, (steps, number), p=[0.2, 0.2, 0.4, 0.2])
    to_sign = np.array([FORWARD] * 5 + [RIGHT] + [FORWARD] * 2)
    for begin in range(0, steps - 8, 30):
        actions[begin : begin + 8, ::2] = to_sign[:, None]
    return actions if kinds == 4 else np.array([0, 1, 2, 5])[actions]


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize("name", VARIANTS)
def test_vector_is_singles_side_by_side(name, mode):
    number, steps = 5, 260
    kinds = len(VARIANTS[name].actions)
    envs = gym.make_vec(name, num_envs=number, autoreset_mode=mode, split="test")
    twins = gym.vector.SyncVectorEnv(
        [lambda: gym.make(name, split="test").unwrapped for _ in range(number)], autoreset_mode=mode
    )
    assert envs.metadata["autoreset_mode"] == mode and envs.observation_space == twins.observation_space
    assert envs.single_action_space == twins.single_action_space
    (mine, mine_info), (theirs, their_info) = envs.reset(seed=7), twins.reset(seed=7)
    ended = 0
    for action in some_actions(steps, number, kinds):
        for key in theirs:
            np.testing.assert_array_equal(mine[key], theirs[key])
        assert mine in envs.observation_space
        for key in kernels.INFO:
            np.testing.assert_array_equal(mine_info[key][mine_info[f"_{key}"]], their_info[key][their_info[f"_{key}"]])
        mine, *my_rest, mine_info = envs.step(action)
        theirs, *their_rest, their_info = twins.step(action)
        for one, two in zip(my_rest, their_rest):
            assert one.dtype == two.dtype
            np.testing.assert_array_equal(one, two)
        done = my_rest[1] | my_rest[2]
        ended += done.sum()
        if mode == AutoresetMode.SAME_STEP:
            assert ("final_obs" in mine_info) == ("final_obs" in their_info) == done.any()
            if done.any():
                np.testing.assert_array_equal(mine_info["_final_obs"], their_info["_final_obs"])
                for row in range(number):
                    one, two = mine_info["final_obs"][row], their_info["final_obs"][row]
                    assert (one is None) == (two is None) == (not done[row])
                    for key in two or ():
                        np.testing.assert_array_equal(one[key], two[key])
                for key in kernels.INFO:
                    one, two = mine_info["final_info"], their_info["final_info"]
                    np.testing.assert_array_equal(one[key][done], two[key][done])
        elif mode == AutoresetMode.DISABLED and done.any():
            mine, mine_info = envs.reset(options={"reset_mask": done})
            theirs, their_info = twins.reset(options={"reset_mask": done})
            for key in kernels.INFO:
                np.testing.assert_array_equal(mine_info[key][done], their_info[key][done])
            their_info = mine_info
    assert ended > 30


def test_thousands_of_steps_of_many():
    """Vector environments of any size agree row by row: row i of many is the one row with seed + i."""
    many = OfficeNavVectorEnv(300, variant="OfficeNav-v0")
    few = OfficeNavVectorEnv(3, variant="OfficeNav-v0")
    actions = some_actions(120, 300, seed=5)
    (all_seen, _), (seen, _) = many.reset(seed=20), few.reset(seed=217)
    for action in actions:
        for key in seen:
            np.testing.assert_array_equal(all_seen[key][197:200], seen[key])
        all_seen, all_rewards, *_ = many.step(action)
        seen, rewards, *_ = few.step(action[197:200])
        np.testing.assert_array_equal(all_rewards[197:200], rewards)


def test_vector_reset_options():
    envs = OfficeNavVectorEnv(4, variant="OfficeNav-Symbolic-v0")
    _, info = envs.reset(seed=[5, 6, 7, 8], options={"task_id": [1, 2, 1003, 4]})
    assert info["task_id"].tolist() == [1, 2, 1003, 4]
    assert envs.reset()[1]["task_id"].tolist() == [1, 2, 1003, 4]
    _, info = envs.reset(options={"split": ["train", "test", "phrases", "layout"]})
    assert info["trial"].tolist() == [1] * 4 and (info["task_id"] >= 1000).tolist() == [False, True, True, True]
    _, info = envs.reset(options={"reset_mask": np.array([True, False, False, True])})
    assert info["episode_index"].tolist() == [1, 0, 0, 1]
    same = OfficeNavEnv("OfficeNav-Symbolic-v0")
    assert same.reset(seed=6)[1]["task_id"] == envs.reset(seed=5)[1]["task_id"][1]


def test_observations_stay_for_one_more_step():
    for copies, stays in ((False, 1), (True, 5)):
        envs = OfficeNavVectorEnv(3, variant="OfficeNav-v0", copy=copies)
        kept = envs.reset(seed=0)[0]
        before = kept["image"].copy()
        for _ in range(stays):
            envs.step(np.array([RIGHT, LEFT, FORWARD]))
            np.testing.assert_array_equal(kept["image"], before)


def test_unseeded_resets_differ():
    first = [OfficeNavVectorEnv(50, variant="OfficeNav-Symbolic-v0").reset()[1]["task_id"].tolist() for _ in range(2)]
    assert first[0] != first[1] and len(set(first[0])) > 20
    assert len({OfficeNavEnv("OfficeNav-Symbolic-v0").reset()[1]["task_id"] for _ in range(20)}) > 10


@pytest.mark.parametrize("name", ["OfficeNav-v0", "OfficeNav-Map-v0"])
def test_pickling_in_the_middle_of_an_episode(name):
    env = gym.make(name)
    env.reset(seed=2)
    for action in [FORWARD] * 5 + [RIGHT] + [FORWARD]:
        env.step(action)
    for twin in (pickle.loads(pickle.dumps(env)), pickle.loads(pickle.dumps(env.unwrapped))):
        saved = env.unwrapped._rows.state.copy()
        one, two = env.step(FORWARD), twin.step(FORWARD)
        for key in one[0]:
            np.testing.assert_array_equal(one[0][key], two[0][key])
        assert one[1:] == two[1:]
        np.testing.assert_array_equal(one[0]["on_sign"], 1)
        env.unwrapped._rows.state[:] = saved
    envs = OfficeNavVectorEnv(3, variant=name)
    envs.reset(seed=0)
    actions = some_actions(40, 3)
    [envs.step(action) for action in actions[:11]]
    twin = pickle.loads(pickle.dumps(envs))
    for action in actions[11:]:
        one, two = envs.step(action), twin.step(action)
        np.testing.assert_array_equal(one[0]["image"], two[0]["image"])
        np.testing.assert_array_equal(one[0]["sign"], two[0]["sign"])


def golden_run(name):
    kinds = len(VARIANTS[name].actions)
    return play(OfficeNavVectorEnv(4, variant=name), some_actions(100, 4, kinds), 0)


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_other_processes_play_the_same(method):
    name, number = "OfficeNav-Map-v0", 2
    apart = gym.make_vec(name, number, "async", vector_kwargs={"context": method, "autoreset_mode": "SameStep"})
    here = gym.make_vec(name, number)
    (one, _), (two, _) = apart.reset(seed=3), here.reset(seed=3)
    for action in some_actions(40, number):
        for key in two:
            np.testing.assert_array_equal(one[key], two[key])
        one, *one_rest, _ = apart.step(action)
        two, *two_rest, _ = here.step(action)
        np.testing.assert_array_equal(one_rest, two_rest)
    apart.close()


def test_a_fresh_process_makes_it_by_the_module_s_name():
    program = "import gymnasium; print(gymnasium.make('fleetgym:OfficeNav-v0').reset(seed=0)[1])"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(gym.make("OfficeNav-v0").reset(seed=0)[1]) and not done.stderr


@pytest.mark.parametrize("name", VARIANTS)
def test_specs_and_copies_make_the_same(name):
    env = gym.make(name, horizon=20)
    twins = [env, gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))]
    told = [twin.reset(seed=3)[1] for twin in twins]
    for twin in twins:
        [twin.step(action) for action in [FORWARD] * 5 + [RIGHT, FORWARD]]
    twins += [copy.deepcopy(env), copy.deepcopy(env.unwrapped)]
    assert told[0] == told[1]
    for action in [FORWARD, *[LEFT] * 12]:
        first, *others = [twin.step(action) for twin in twins]
        for other in others:
            assert other[1:] == first[1:]
            assert all(np.array_equal(first[0][key], other[0][key]) for key in first[0])
    assert first[3]
    envs = gym.make_vec(name, num_envs=2, horizon=20)
    again = gym.make_vec(gym.envs.registration.EnvSpec.from_json(envs.spec.to_json()), num_envs=2)
    assert again.variant.horizon == 20
    np.testing.assert_array_equal(envs.reset(seed=1)[1]["task_id"], again.reset(seed=1)[1]["task_id"])


@pytest.mark.parametrize("name", ["OfficeNav-v0", "OfficeNav-Symbolic-v0"])
def test_gymnasium_s_wrappers(name, tmp_path):
    stacked = gym.wrappers.FrameStackObservation(gym.make(name), 3)
    assert stacked.reset(seed=0)[0] in stacked.observation_space
    assert stacked.step(FORWARD)[0] in stacked.observation_space
    flat = gym.wrappers.FlattenObservation(gym.make(name))
    assert flat.reset(seed=0)[0] in flat.observation_space and flat.step(FORWARD)[0] in flat.observation_space
    counted = gym.wrappers.RecordEpisodeStatistics(gym.make(name, horizon=4))
    counted.reset(seed=0)
    assert [counted.step(LEFT)[4] for _ in range(4)][-1]["episode"]["l"] == 4
    many = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec(name, num_envs=3, horizon=4))
    many.reset(seed=0)
    assert [many.step(np.zeros(3, int))[4] for _ in range(4)][-1]["episode"]["l"].tolist() == [4] * 3
    short = gym.make(name, max_episode_steps=5)
    short.reset(seed=0)
    assert [short.step(LEFT)[3] for _ in range(5)] == [False] * 4 + [True]


def test_stable_baselines3_trains_on_it():
    from stable_baselines3 import PPO

    env = gym.make("OfficeNav-Symbolic-v0", horizon=8)
    model = PPO("MultiInputPolicy", env, n_steps=16, batch_size=16, n_epochs=1, seed=0)
    model.learn(32)
    assert model.ep_info_buffer[-1]["l"] <= 8


@pytest.mark.parametrize("name", VARIANTS)
def test_golden_trace(name):
    """A change of behaviour needs a new version of the id, and ``tests/golden/make_office_nav.py`` run anew."""
    assert golden_run(name) == json.loads(GOLDEN.read_text())[name]


def test_the_suite_lists_the_variants():
    office = suite("office_nav")
    assert office.tasks[: len(VARIANTS)] == tuple(VARIANTS)
    assert office.make("OfficeNav-Tall-v0").reset(seed=0)[0]["image"].shape == (56, 56, 3)
    assert office.make_vec("quick", num_envs=3).num_envs == 3
    with pytest.raises(UserError, match="one task"):
        office.make_vec("all")


# -- Bad input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task_id": 1200}, "0 to 1199.*train has 0 to 999, test 1000 to 1199"),
        ({"task_id": -1}, "task_id -1"),
        ({"task_id": 1.5}, "task_id 1.5"),
        ({"task_id": True}, "task_id True"),
        ({"task_id": 3, "split": "test"}, "not in split 'test', whose 200 ids are 1000"),
        ({"split": "validation"}, "train, test, phrases, layout"),
        ({"split": "style"}, "train, test, phrases, layout"),
        ({"split": 3}, "split 3"),
        ({"spilt": "test"}, "task_id, split, new_trial"),
        ({"new_trial": "yes"}, "True or False"),
        ({"new_trial": False, "task_id": 3}, "leave one of them out"),
    ],
)
def test_bad_reset_options(options, words):
    for env in (OfficeNavEnv("OfficeNav-Symbolic-v0"), OfficeNavVectorEnv(2, variant="OfficeNav-Symbolic-v0")):
        env.reset(seed=0)
        before, drawn = env._rows.state.copy(), env.np_random.bit_generator.state
        with pytest.raises(UserError, match=words):
            env.reset(options=options)
        np.testing.assert_array_equal(env._rows.state, before)
        assert env.np_random.bit_generator.state == drawn


def test_a_finished_trial_does_not_go_on():
    env = OfficeNavEnv("OfficeNav-Symbolic-v0")
    with pytest.raises(UserError, match="first reset"):
        env.reset(options={"new_trial": False})
    env.reset(seed=0)
    env.reset(options={"new_trial": False})
    with pytest.raises(UserError, match="trial is finished .2 of 2"):
        env.reset(options={"new_trial": False})
    assert env.reset()[1]["trial"] == 1
    with pytest.raises(UserError, match="a seed"):
        env.reset(seed=0, options={"new_trial": False})
    drawn = env.np_random.bit_generator.state
    for seed, options in ((-1, None), (1.5, None), ("a", None), (True, None), (5, {"task_id": 1200})):
        with pytest.raises(UserError, match="seed" if options is None else "task_id 1200"):
            env.reset(seed=seed, options=options)
    assert env.np_random.bit_generator.state == drawn and env.reset()[1]["episode_index"] == 1


@pytest.mark.parametrize("action", [4, -1, 1.0, "left", None, True, np.array([1, 2]), np.float32(1)])
def test_bad_action(action):
    env = OfficeNavEnv("OfficeNav-Symbolic-v0")
    for call in (lambda: env.step(0), env.sign):
        with pytest.raises(UserError, match="before reset"):
            call()
    env.reset(seed=0)
    with pytest.raises(UserError, match="0 left, 1 right, 2 forward, 3 toggle"):
        env.step(action)
    assert env._rows.state[kernels.STEP, 0] == 0


def test_bad_actions_of_a_vector():
    envs = OfficeNavVectorEnv(3, variant="OfficeNav-Symbolic-v0", autoreset_mode="disabled")
    with pytest.raises(UserError, match="reset"):
        envs.step(np.zeros(3, int))
    envs.reset(seed=0)
    for actions in (np.zeros(2, int), np.zeros(3), np.zeros((3, 1), int), [[0], [0], [0]], [[0], [1, 2]], None, "abc"):
        with pytest.raises(UserError, match="give 3 integers from 0 to 3"):
            envs.step(actions)
    with pytest.raises(UserError, match="action 4 of environment 1"):
        envs.step([0, 4, 0])
    with pytest.raises(UserError, match="action -1 of environment 2"):
        envs.step([0, 1, -1])
    assert not envs._rows.state[kernels.STEP].any()
    for _ in range(30):
        envs.step([0, 0, 0])
    with pytest.raises(UserError, match="environment 0: its episode has ended"):
        envs.step([0, 0, 0])
    for mask in (np.zeros(3, bool), np.ones(2, bool), [1, 0, 1]):
        with pytest.raises(UserError, match="reset_mask"):
            envs.reset(options={"reset_mask": mask})
    with pytest.raises(UserError, match="2 seeds for 3"):
        envs.reset(seed=[1, 2])
    for seed in (1.5, np.float64(2), np.bool_(True), np.array(3), "7"):
        with pytest.raises(UserError, match="non-negative integer"):
            envs.reset(seed=seed)
    for make in (lambda: OfficeNavEnv(), lambda: envs, lambda: gym.make_vec("OfficeNav-v0", num_envs=2)):
        with pytest.raises(UserError, match="give a dict with any of task_id, split, new_trial"):
            make().reset(options=["split"])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"variant": "OfficeNav-v9"}, "OfficeNav-Symbolic-v0"),
        ({"split": "holdout"}, "train, test, phrases, layout"),
        ({"layout": "round"}, "standard, tall, tall_skinny"),
        ({"view": "depth"}, "rgb, symbolic"),
        ({"sign": "braille"}, "text, picture"),
        ({"horizon": 0}, "at least 1"),
        ({"horizon": 2.5}, "horizon 2.5"),
        ({"episodes": True}, "episodes True"),
        ({"train_tasks": 10**12}, "at most 1000000"),
        ({"test_tasks": 0}, "at least 1"),
        ({"test_tasks": 1}, "take more"),
        ({"single_goal": "yes"}, "False, True"),
        ({"variant": ["OfficeNav-v0"]}, "OfficeNav-Symbolic-v0"),
        ({"split": None}, "train, test, phrases, layout"),
        ({"colour": "red"}, "unknown option 'colour'.*view, layout, sign, single_goal, train_tasks"),
        ({"render_mode": "human"}, "rgb_array, ansi"),
        ({"variant": "OfficeNav-Released-v0", "layout": "tall"}, "as released"),
    ],
)
def test_bad_arguments(arguments, words):
    for make in (OfficeNavEnv, OfficeNavVectorEnv):
        with pytest.raises(UserError, match=words):
            make(**arguments)


def test_bad_numbers_and_modes():
    for number in (0, -1, 1.5, True, 10**20):
        with pytest.raises(UserError, match="num_envs"):
            OfficeNavVectorEnv(number)
    with pytest.raises(UserError, match="same_step"):
        OfficeNavVectorEnv(2, autoreset_mode="sometimes")
    with pytest.raises(UserError, match="num_envs"):
        gym.make_vec("OfficeNav-v0", num_envs=0)
    with pytest.raises(UserError, match="task id"):
        building(-1)
    with pytest.raises(UserError, match="layout"):
        layout("round")
    assert resolve_variant("Symbolic").view == "symbolic"
