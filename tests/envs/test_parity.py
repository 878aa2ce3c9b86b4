"""Our simulations against upstream's own classes: the same random vector and actions give the same numbers."""

import warnings

import numpy as np
import pytest

from fleetgym.envs.meta_world.env import MetaWorldEnv
from fleetgym.envs.meta_world.tasks import TASKS

TOLERANCE = 1e-9


def upstream(task, vector):
    from metaworld.env_dict import ALL_V3_ENVIRONMENTS

    env = ALL_V3_ENVIRONMENTS[task]()
    env._partially_observable = False
    del env.__dict__["sawyer_observation_space"]  # upstream keeps the bounds of the hidden goal
    env._freeze_rand_vec, env._set_task_called = True, True
    env._last_rand_vec = vector
    return env


def compare(task, seed, steps):
    ours = MetaWorldEnv(task)
    ours.reset(seed=100)  # another episode first: what it leaves behind must not show
    ours.step(np.ones(4))
    observation, _ = ours.reset(seed=seed)
    theirs = upstream(task, ours.random_vector)
    low, high = ours.observation_space.low, ours.observation_space.high
    expected, _ = theirs.reset()
    np.testing.assert_allclose(observation, np.clip(expected, low, high), rtol=0, atol=TOLERANCE)
    rng = np.random.default_rng(seed)
    for step in range(steps):
        # Towards the object, closing: contacts and grasps are where the numbers could part.
        towards = 10.0 * (expected[4:7] - expected[:3]) + rng.normal(0.0, 0.2, 3)
        action = np.clip([*towards, -1.0 if step < 0.6 * steps else 1.0], -1, 1).astype(np.float32)
        observation, reward, _, _, info = ours.step(action)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected, expected_reward, _, _, expected_info = theirs.step(action)
        np.testing.assert_allclose(observation, np.clip(expected, low, high), rtol=0, atol=TOLERANCE)
        assert abs(reward - expected_reward) <= TOLERANCE
        assert expected_info.keys() <= info.keys()
        for key, value in expected_info.items():
            assert abs(float(info[key]) - float(value)) <= TOLERANCE, key


@pytest.mark.parametrize(
    "task",
    [
        "assembly-v3",
        "basketball-v3",
        "dial-turn-v3",
        "disassemble-v3",
        "door-lock-v3",
        "handle-press-v3",
        "peg-unplug-side-v3",
        "pick-place-v3",
        "push-back-v3",
        "stick-pull-v3",
        "window-close-v3",
    ],
)
def test_parity(task):
    compare(task, 0, 50)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("task", TASKS)
def test_parity_of_all_tasks(task, seed):
    compare(task, seed, 120)
