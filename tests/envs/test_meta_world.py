"""Meta-World's environments: seeds, goals, spaces, errors, experts, golden traces."""

import json
import multiprocessing
import pickle
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

import fleetgym  # noqa: F401
from fleetgym.core.errors import UserError
from fleetgym.envs import suite
from fleetgym.envs.meta_world.env import IGNORED_ENTRIES, MetaWorldEnv, is_held_out
from fleetgym.envs.meta_world.sim import SETTLES_WITH_GOAL
from fleetgym.envs.meta_world.tasks import SPLITS, TASKS

GOLDEN = Path(__file__).parents[1] / "golden" / "meta_world.json"
META_WORLD = suite("meta_world")


def play(env, seed, steps=15, action_seed=0):
    """Observations, rewards and successes of seeded random actions."""
    rng = np.random.default_rng(action_seed)
    observation, info = env.reset(seed=seed)
    observations, rewards = [observation], []
    for _ in range(steps):
        observation, reward, _, _, info = env.step(rng.uniform(-1, 1, 4).astype(np.float32))
        observations.append(observation)
        rewards.append(reward)
    return np.array(observations), np.array(rewards)


@pytest.fixture(scope="module", params=TASKS)
def env(request):
    """Each task's environment; pytest runs all tests of one before it makes the next (making one takes 0.15 s)."""
    env = gym.make(f"MetaWorld/{request.param}", disable_env_checker=True)
    assert env.spec.max_episode_steps == 500
    yield env.unwrapped
    env.close()


def test_gymnasium_checks(env):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env, skip_render_check=True)


def test_golden_trace_and_reset_from_seed(env):
    """The same seed gives the same bits whatever was played before; and the numbers of the committed trace."""
    first = play(env, 7, 30)
    play(env, 3, 5, action_seed=1)
    env.reset()
    again = play(env, 7, 30)
    np.testing.assert_array_equal(first[0], again[0])
    np.testing.assert_array_equal(first[1], again[1])
    golden = json.loads(GOLDEN.read_text())[env.task]
    np.testing.assert_allclose(env.random_vector, golden["random_vector"], rtol=0, atol=1e-9)
    np.testing.assert_allclose(first[0][[0, 10, 30]], golden["observations"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(first[1].sum(), golden["return"], rtol=0, atol=1e-6)


def test_settling_does_not_depend_on_the_goal(env, monkeypatch):
    """The shortcut of reset against settling the arm in full, also at the corners of the random vector's box."""
    if env.task in SETTLES_WITH_GOAL:
        return
    space = env.simulation._random_reset_space
    env.reset(seed=0)
    for vector in (env.random_vector, space.low, space.high):
        try:
            quick, _ = env.reset(options={"random_vector": vector})
        except UserError as error:
            assert "rejects" in str(error)
            continue
        state = env.data.qpos.copy()
        with monkeypatch.context() as patch:
            patch.setattr("fleetgym.envs.meta_world.sim.SETTLES_WITH_GOAL", frozenset({env.task}))
            full, _ = env.reset(options={"random_vector": vector})
        np.testing.assert_allclose(quick, full, rtol=0, atol=1e-9)
        np.testing.assert_allclose(state, env.data.qpos, rtol=0, atol=1e-9)


def _play_elsewhere(task):
    return play(META_WORLD.make(task), 11)


def test_same_seed_in_another_env_and_in_another_process():
    tasks = ["door-open-v3", "stick-pull-v3"]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        elsewhere = pool.map(_play_elsewhere, tasks)
    for task, (observations, rewards) in zip(tasks, elsewhere, strict=True):
        here = play(META_WORLD.make(task), 11)
        np.testing.assert_array_equal(here[0], observations)
        np.testing.assert_array_equal(here[1], rewards)


def test_reset_without_seed_goes_on_with_its_own_generator():
    def goals(env):
        env.reset(seed=5)
        return [env.unwrapped.random_vector] + [env.reset() and env.unwrapped.random_vector for _ in range(3)]

    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    one, two = goals(META_WORLD.make("reach-v3")), goals(META_WORLD.make("reach-v3"))
    np.testing.assert_array_equal(one, two)
    assert len({goal.tobytes() for goal in one}) == 4
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_goal_splits_are_disjoint_and_quick(env, monkeypatch):
    """Cells, not vectors, are held out: no millimetre cell of the entries that matter is in both splits."""
    cells = {}
    for goals in ("train", "held_out"):
        monkeypatch.setattr(env, "goals", goals)
        cells[goals] = set()
        for seed in range(3):
            env.reset(seed=seed)
            assert is_held_out(env.task, env.random_vector) == (goals == "held_out")
        env.reset(seed=0)
        for _ in range(200):
            vector = np.delete(env._draw(), IGNORED_ENTRIES.get(env.task, ()))
            cells[goals].add(tuple(np.floor(vector * 1000 + 0.5).astype(int)))
    assert not cells["train"] & cells["held_out"]
    assert len(cells["held_out"]) > 20


def test_one_in_five_is_held_out():
    env = MetaWorldEnv("pick-place-v3")
    env.reset(seed=0)
    share = np.mean([is_held_out("pick-place-v3", env._draw()) for _ in range(4000)])
    assert 0.17 < share < 0.23


@pytest.mark.parametrize("task", sorted(IGNORED_ENTRIES))
def test_ignored_entries_are_ignored(task):
    env = MetaWorldEnv(task)
    space = env.simulation._random_reset_space
    observation, _ = env.reset(seed=0)
    vector = env.random_vector
    for entry in IGNORED_ENTRIES[task]:
        for bound in (space.low[entry], space.high[entry]):
            other = vector.copy()
            other[entry] = bound
            try:
                changed, _ = env.reset(options={"random_vector": other})
            except UserError as error:
                assert "rejects" in str(error)
                continue
            np.testing.assert_allclose(changed, observation, rtol=0, atol=1e-9)


def test_goal_can_be_hidden_and_set():
    env = META_WORLD.make("reach-v3", goal_observable=False)
    observation, info = env.reset(seed=0)
    assert not observation[36:39].any() and info["goal"].any()
    observation, *_ = env.step(env.action_space.sample())
    assert not observation[36:39].any()
    vector = [0.0, 0.65, 0.02, 0.1, 0.85, 0.2]
    _, info = env.reset(options={"random_vector": vector})
    np.testing.assert_allclose(info["goal"], vector[3:])
    np.testing.assert_array_equal(env.unwrapped.random_vector, vector)


def test_one_hot():
    env = META_WORLD.make("push-v3", task_set="mt10")
    plain, _ = META_WORLD.make("push-v3").reset(seed=0)
    observation, _ = env.reset(seed=0)
    assert env.observation_space.shape == (49,) and env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation[:39], plain)
    np.testing.assert_array_equal(observation[39:], np.eye(10)[1])
    observation, *_ = env.step(env.action_space.sample())
    np.testing.assert_array_equal(observation[39:], np.eye(10)[1])
    check_env(MetaWorldEnv("push-v3", task_set=("push-v3", "reach-v3")), skip_render_check=True)


def test_horizon_and_success():
    env = MetaWorldEnv("reach-v3", horizon=3)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(np.zeros(4))
    _, info = env.reset(seed=0)
    assert info["success"] is False
    for step in range(3):
        *_, terminated, truncated, info = env.step(np.zeros(4))
        assert terminated is False and truncated is (step == 2) and type(info["success"]) is bool
        assert {"near_object", "grasp_success", "grasp_reward", "in_place_reward", "obj_to_target"} <= set(info)
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.zeros(4))

    expert, env = META_WORLD.expert("reach-v3"), META_WORLD.make("reach-v3", terminate_on_success=True)
    observation, _ = env.reset(seed=0)
    for _ in range(200):
        observation, _, terminated, _, info = env.step(expert.predict(observation)[0])
        assert terminated == info["success"]
        if terminated:
            break
    assert terminated


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: META_WORLD.make("reech-v3"), "'reach-v3'"),
        (lambda: META_WORLD.expert("door-opn-v3"), "'door-open-v3'"),
        (lambda: META_WORLD.make_fn("reech-v3"), "'reach-v3'"),
        (lambda: suite("metaworld"), "'meta_world'"),
        (lambda: MetaWorldEnv("reach"), "'reach-v3'"),
        (lambda: META_WORLD.make("reach-v3", goals="test"), "'train'"),
        (lambda: MetaWorldEnv("reach-v3", goals="heldout"), "'held_out'"),
        (lambda: META_WORLD.make("reach-v3", task_set="mt11"), "'mt10'"),
        (lambda: META_WORLD.make("hammer-v3", task_set="mt10"), "not in the task set"),
        (lambda: MetaWorldEnv("reach-v3", camera_name="corner9"), "'corner'"),
        (lambda: MetaWorldEnv("reach-v3", render_mode="human"), "rgb_array"),
        (lambda: MetaWorldEnv("reach-v3", horizon=0), "horizon is 0"),
        (lambda: MetaWorldEnv("reach-v3").reset(options={"random_vector": [1.0]}), "(6,)"),
        (lambda: MetaWorldEnv("door-open-v3").reset(options={"random_vector": [9.0, 0, 0]}), "outside"),
        (lambda: META_WORLD.make_vec([]), "empty"),
        (lambda: META_WORLD.make_vec("quick", autoreset_mode="never"), "autoreset"),
    ],
)
def test_bad_arguments_are_named(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value)


@pytest.mark.parametrize("action", [np.zeros(3), np.zeros((1, 4)), np.array([0, 0, np.nan, 0]), np.full(4, np.inf)])
def test_bad_actions_are_named(action):
    env = MetaWorldEnv("reach-v3")
    env.reset(seed=0)
    with pytest.raises(UserError, match="action"):
        env.step(action)


def test_suite():
    assert len(META_WORLD.tasks) == 50 and META_WORLD.tasks == META_WORLD.splits["mt50"] == TASKS
    assert len(SPLITS["mt10"]) == 10 and len(SPLITS["quick"]) == 5
    sentences = [META_WORLD.task(name).instruction for name in TASKS]
    assert len(set(sentences)) == 50 and all(s[0].isupper() and s.endswith(".") for s in sentences)
    task = META_WORLD.task("reach-v3")
    assert (task.id, task.env_id, task.horizon) == ("reach-v3", "MetaWorld/reach-v3", 500)
    make = pickle.loads(pickle.dumps(META_WORLD.make_fn("reach-v3", task_set="quick", goals="held_out")))
    env = make()
    assert env.observation_space.shape == (44,) and env.unwrapped.goals == "held_out"


def test_spec_travels_as_json():
    """Minari stores the spec as JSON, which turns tuples into lists."""
    env = META_WORLD.make("reach-v3", task_set="quick", goals="train")
    env.reset(seed=0)
    other = gym.make(gym.envs.registration.EnvSpec.from_json(env.spec.to_json()))
    np.testing.assert_array_equal(env.reset(seed=4)[0], other.reset(seed=4)[0])


@pytest.mark.parametrize("asynchronous", [False, True])
def test_vector_env(asynchronous):
    tasks = ("reach-v3", "door-close-v3")
    envs = META_WORLD.make_vec(tasks, 3, asynchronous=asynchronous, horizon=2, goals="train")
    observations, infos = envs.reset(seed=0)
    assert observations.shape == (3, 41) and not infos["success"].any()
    np.testing.assert_array_equal(observations[:, 39:], np.eye(2)[[0, 1, 0]])
    alone, _ = META_WORLD.make(tasks[1], task_set=tasks, goals="train").reset(seed=1)
    np.testing.assert_array_equal(observations[1], alone)
    for _ in range(2):
        observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
    assert truncated.all() and not terminated.any() and rewards.shape == (3,)
    # The next episode has begun in that same step.
    assert "final_info" in infos and infos["final_info"]["success"].shape == (3,)
    assert envs.observation_space.contains(observations)
    envs.close()


def test_gymnasium_make_vec():
    envs = gym.make_vec("MetaWorld/MT10")
    observations, _ = envs.reset(seed=0)
    assert observations.shape == (10, 49)
    envs.step(envs.action_space.sample())
    envs.close()
    envs = gym.make_vec("MetaWorld/MT50", num_envs=2, one_hot=False)
    assert envs.reset(seed=0)[0].shape == (2, 39)
    envs.close()


@pytest.mark.parametrize("task", SPLITS["quick"])
def test_expert_solves(task):
    expert = pickle.loads(pickle.dumps(META_WORLD.expert(task)))
    env = META_WORLD.make(task, goals="held_out", task_set="quick")
    solved = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            observation, _ = env.reset(seed=seed)
            for _ in range(200):
                action, state = expert.predict(observation)
                assert action.dtype == np.float32 and state is None and np.abs(action).max() <= 1
                observation, *_, info = env.step(action)
                if info["success"]:
                    solved += 1
                    break
    assert solved == 3
    batch, _ = expert.predict(np.stack([observation, observation]))
    np.testing.assert_array_equal(batch, np.stack([expert.predict(observation)[0]] * 2))


@pytest.mark.slow
def test_experts_of_all_tasks():
    """Twenty demonstrations for each of the fifty tasks: how good, and how dear."""
    import time

    rates, begin = {}, time.process_time()
    for task in TASKS:
        expert, env, solved = META_WORLD.expert(task), META_WORLD.make(task, goals="train"), 0
        for seed in range(20):
            observation, _ = env.reset(seed=seed)
            for _ in range(500):
                observation, *_, info = env.step(expert.predict(observation)[0])
                if info["success"]:
                    solved += 1
                    break
        rates[task] = solved / 20
    seconds = time.process_time() - begin
    assert min(rates.values()) >= 0.85, rates
    assert np.mean(list(rates.values())) >= 0.97, rates
    assert seconds <= 100


def test_docs_page_is_current():
    from fleetgym.envs.docs import page

    path = Path(__file__).parents[2] / "docs" / "envs" / "meta_world.md"
    assert path.read_text(encoding="utf-8") == page("meta_world"), "run: python -m fleetgym.envs.docs"
