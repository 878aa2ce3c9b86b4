import functools
import signal
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError
from fleetgym.core.policy import FunctionPolicy
from fleetgym.core.rollout import collect, evaluate, rollout


def swing(observation):
    return np.array([-3.0 * observation[1] - observation[2]])


def balance(observation):
    return int(observation[2] + 0.5 * observation[3] > 0)


PENDULUM = FunctionPolicy(swing, spaces.Box(-2.0, 2.0, (1,), np.float32))
CARTPOLE = FunctionPolicy(balance)
SEEDS = [7, 3, 11, 3, 0, 5, 2]


class Walk(gym.Env):
    """x += action; solved while x is within [1, 2]. Ends at ``limit`` steps. Says what happened to it."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012

    def __init__(self, key="success", limit=10, start=0.0, render_mode=None, crash_at=None):
        self.key, self.limit, self.start, self.render_mode, self.crash_at = key, limit, start, render_mode, crash_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.x, self.t = seed, self.start, 0
        if self.crash_at is not None and seed == self.crash_at[0]:
            raise self.crash_at[1]
        return np.array([self.x, self.np_random.random()]), {}

    def step(self, action):
        self.x, self.t = self.x + float(action[0]), self.t + 1
        info = {self.key: float(1 <= self.x <= 2)} if self.key else {}
        return np.array([self.x, self.np_random.random()]), self.x, False, self.t >= self.limit, info

    def render(self):
        return np.full((4, 6, 3), self.t, np.uint8)


FORWARD = FunctionPolicy(lambda o: np.array([0.5]))


def same(a, b):
    assert [e.seed for e in a] == [e.seed for e in b]
    for x, y in zip(a, b):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
        assert x.success == y.success and x.infos.keys() == y.infos.keys()


@pytest.mark.parametrize("policy,env", [(PENDULUM, "Pendulum-v1"), (CARTPOLE, "CartPole-v1")])
def test_an_episode_belongs_to_its_seed_whatever_the_number_of_environments(policy, env):
    one = rollout(policy, env, SEEDS)
    assert [e.seed for e in one] == SEEDS
    for num_envs in (2, 4, 16):
        same(one, rollout(policy, env, SEEDS, num_envs=num_envs))
    same(one[1:2], one[3:4])  # equal seeds, equal episodes
    same(one[4:5], rollout(policy, env, [0]))  # and the seeds beside it do not matter


def test_meta_world_episodes_belong_to_their_seeds():
    from fleetgym.envs import suite

    meta_world = suite("meta_world")
    make, expert = meta_world.make_fn("reach-v3", goals="train"), meta_world.expert("reach-v3")
    one = rollout(expert, make, SEEDS[:5], stop_on_success=True, action_noise=0.2)
    assert all(episode.success for episode in one) and len({episode.length for episode in one}) > 1
    same(one, rollout(expert, make, SEEDS[:5], stop_on_success=True, action_noise=0.2, num_envs=3))
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        same(one, rollout(expert, make, SEEDS[:5], stop_on_success=True, action_noise=0.2, executor=pool))
    (by_id,) = rollout(expert, "MetaWorld/reach-v3", SEEDS[:1], max_steps=20)
    (by_make,) = rollout(expert, lambda: gym.make("MetaWorld/reach-v3"), SEEDS[:1], max_steps=20)
    same([by_id], [by_make])


def test_episodes_equal_a_plain_loop():
    env = gym.make("CartPole-v1")
    for episode in rollout(CARTPOLE, "CartPole-v1", [4, 9], num_envs=2):
        observation, _ = env.reset(seed=episode.seed)
        for t in range(episode.length):
            np.testing.assert_array_equal(episode.observations[t], observation)
            assert episode.actions[t] == balance(observation)
            observation, reward, terminated, truncated, _ = env.step(episode.actions[t])
            assert (reward, terminated, truncated) == (
                episode.rewards[t],
                episode.terminations[t],
                episode.truncations[t],
            )
        assert terminated or truncated
        np.testing.assert_array_equal(episode.observations[-1], observation)
        assert episode.observations.shape == (episode.length + 1, 4) and episode.ret == episode.rewards.sum()


def test_workers_give_the_same_results_in_the_same_order():
    # Test modules are imported by path, so workers cannot find their functions; numpy's they can.
    policy = FunctionPolicy(functools.partial(np.matmul, np.array([[0.0, -3.0, -1.0]])), PENDULUM.action_space)
    one, seen = rollout(policy, "Pendulum-v1", SEEDS, max_steps=30), []
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        many = rollout(
            policy, "Pendulum-v1", SEEDS, max_steps=30, executor=pool, on_episode=lambda i, e: seen.append(i)
        )
        with pytest.raises(UserError, match="picklable"):
            rollout(policy, lambda: Walk(), SEEDS, executor=pool)
    same(one, many)
    assert sorted(seen) == list(range(len(SEEDS)))
    with ThreadPoolExecutor(2) as pool:
        same(one, rollout(policy, "Pendulum-v1", SEEDS, max_steps=30, executor=pool, num_envs=2))


def test_success_is_latched():
    (episode,) = rollout(FORWARD, Walk, [0])
    assert episode.length == 10 and episode.success  # it left the place again
    assert episode.infos["success"].tolist() == [False, True, True, True] + [False] * 6
    (early,) = rollout(FORWARD, Walk, [0], stop_on_success=True)
    assert early.length == 2 and early.success and early.truncations.tolist() == [False, True]
    (other,) = rollout(FORWARD, lambda: Walk(key="is_success"), [0])
    assert other.success
    (none,) = rollout(FORWARD, lambda: Walk(key=None), [0])
    assert not none.success and none.infos == {}
    (judged,) = rollout(FORWARD, lambda: Walk(key=None), [0], success=lambda e: e.observations[-1, 0] == 5.0)
    assert judged.success


def test_max_steps_cuts_and_says_so():
    for episode in rollout(FORWARD, Walk, [0, 1, 2], max_steps=3, num_envs=2):
        assert episode.length == 3 and episode.truncations.tolist() == [False, False, True]
        assert not episode.terminations.any() and episode.observations.shape == (4, 2)


def test_long_episodes_outgrow_the_first_buffer():
    (episode,) = rollout(FORWARD, lambda: Walk(limit=700), [0])
    np.testing.assert_array_equal(episode.observations[:, 0], np.arange(701) * 0.5)
    assert episode.actions.shape == (700, 1)


def test_noise_moves_the_robot_and_not_the_label():
    noisy = rollout(FORWARD, Walk, [1, 2], action_noise=0.3)
    for episode in noisy:
        assert (episode.actions == 0.5).all()
        draws = np.random.default_rng([episode.seed, 1]).standard_normal((10, 1)) * 0.3
        executed = np.clip(0.5 + draws[:, 0], -1, 1).astype(np.float32)
        np.testing.assert_allclose(np.diff(episode.observations[:, 0]), executed, atol=1e-12)
    same(noisy, rollout(FORWARD, Walk, [1, 2], action_noise=[0.3], num_envs=2))
    (own,) = rollout(FORWARD, Walk, [0], action_noise=lambda action, step, rng: -action if step == 0 else action)
    assert own.observations[1, 0] == -0.5 and own.observations[2, 0] == 0.0 and (own.actions == 0.5).all()


def test_actions_are_clipped_before_the_step():
    (episode,) = rollout(FunctionPolicy(lambda o: np.array([7.0])), Walk, [0], max_steps=2)
    assert episode.observations[:, 0].tolist() == [0.0, 1.0, 2.0] and episode.actions.dtype == np.float32


def test_record_off_keeps_outcomes_only():
    (episode,) = rollout(FORWARD, Walk, [0], record=False)
    assert episode.observations is None and episode.actions is None
    assert episode.length == 10 and episode.success and episode.ret == sum(np.arange(1, 11) * 0.5)


def test_frames():
    (episode,) = rollout(FORWARD, lambda: Walk(render_mode="rgb_array"), [0], render=True)
    assert [frame[0, 0, 0] for frame in episode.frames] == list(range(11))
    (sparse,) = rollout(FORWARD, lambda: Walk(render_mode="rgb_array"), [0], render=4)
    assert [frame[0, 0, 0] for frame in sparse.frames] == [0, 4, 8]
    with pytest.raises(UserError, match="rgb_array"):
        rollout(FORWARD, Walk, [0], render=True)


class Dicts(gym.ObservationWrapper):
    def __init__(self):
        super().__init__(Walk(limit=4))
        self.observation_space = spaces.Dict({"x": Walk.observation_space, "word": spaces.Text(10)})

    def observation(self, observation):
        return {"x": observation, "word": f"at {observation[0]}"}


def test_dict_observations():
    class P:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            assert observation["x"].shape == (2, 2) and observation["word"].shape == (2,)
            return np.full((2, 1), 0.5), None

    a, b = rollout(P(), Dicts, [0, 1], num_envs=2)
    assert a.observations["x"].shape == (5, 2) and a.observations["word"].tolist()[-1] == "at 2.0"


def test_state_rows_stay_in_place_while_others_finish():
    """Episodes of different length; the policy counts steps since its row's last start."""

    class Counter:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            count = np.zeros(len(observation)) if state is None else state[0]
            assert len(count) == len(observation) == len(episode_start)
            count = np.where(episode_start, 0, count) + 1
            return np.full((len(observation), 1), count[:, None] / 100), (count,)

    lengths = iter([3, 7, 5])
    episodes = rollout(Counter(), lambda: Walk(limit=next(lengths)), range(8), num_envs=3)
    for episode in episodes:
        np.testing.assert_allclose(episode.actions[:, 0], np.arange(1, episode.length + 1) / 100, rtol=1e-6)
    assert {episode.length for episode in episodes} == {3, 5, 7}


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: rollout(PENDULUM, "Pendulun-v1", [0]), "Pendulun-v1.*Pendulum-v1"),
        (lambda: rollout(PENDULUM, gym.make("CartPole-v1"), [0]), "not an instance"),
        (lambda: rollout(object(), "CartPole-v1", [0]), "predict"),
        (lambda: rollout(PENDULUM, "CartPole-v1", [0]), r"shape \(1, 1\).*\(1,\)"),
        (lambda: rollout(FunctionPolicy(lambda o: np.zeros(4)), "Pendulum-v1", [0]), r"\(1, 4\).*\(1, 1\)"),
        (lambda: rollout(CARTPOLE, "CartPole-v1", [0], action_noise=0.1), "not a Box"),
        (lambda: rollout(PENDULUM, "Pendulum-v1", [-1]), "negative"),
        (lambda: rollout(PENDULUM, "Pendulum-v1", [0], num_envs=0), "num_envs=0"),
        (lambda: rollout(PENDULUM, "Pendulum-v1", [0], max_steps=0), "max_steps=0"),
        (lambda: rollout(PENDULUM, "Pendulum-v1", [0], action_noise=-1.0), "negative"),
        (lambda: rollout(FunctionPolicy(lambda o: o[:1] * np.nan), "Pendulum-v1", [3]), "step 0 of seed 3.*NaN"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_no_seeds_no_episodes():
    assert rollout(PENDULUM, "Pendulum-v1", []) == []


def test_evaluate_makes_a_record():
    record = evaluate(FORWARD, lambda: Walk(start=1.5), [3, 1, 2], system="forward", task="walk", num_envs=2)
    assert list(record.seeds) == [3, 1, 2] and all(record.successes) and list(record.lengths) == [10] * 3
    assert record.success == 1.0 and record.returns[0] == pytest.approx(sum(1.5 + 0.5 * k for k in range(1, 11)))
    assert record.provenance["num_envs"] == 2
    assert evaluate(PENDULUM, "Pendulum-v1", [0], max_steps=3).task == "Pendulum-v1"
    with pytest.raises(UserError, match="no seeds"):
        evaluate(FORWARD, Walk, [])


def test_collect_keeps_the_solved(tmp_path):
    def some(observation):
        return np.array([0.5 if observation[1] > 0.5 or observation[0] > 0 else -0.5])

    policy = FunctionPolicy(some)
    every = rollout(policy, Walk, range(12))
    solved = [e.seed for e in every if e.success]
    assert 0 < len(solved) < 12
    made = collect(policy, Walk, range(12), dataset=tmp_path / "walk", task="walk", instruction="walk", num_envs=3)
    assert [e.seed for e in made] == solved
    assert made.info["attempted"] == 12 and made.info["succeeded"] == len(solved) and not made.info["interrupted"]
    again = Demonstrations.load(tmp_path / "walk")
    assert [e.seed for e in again] == solved and again.info == made.info
    with pytest.raises(UserError, match="exists already"):
        collect(policy, Walk, range(3), dataset=tmp_path / "walk")
    full = collect(policy, Walk, range(3), dataset=tmp_path / "walk", keep="all", overwrite=True)
    assert len(full) == 3 and len(Demonstrations.load(tmp_path / "walk")) == 3


def test_collect_with_nothing_to_keep_writes_nothing(tmp_path):
    with pytest.raises(UserError, match="none of the 2 episodes"):
        collect(FunctionPolicy(lambda o: np.array([-1.0])), Walk, [0, 1], dataset=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="'succes'.*'success'"):
        collect(FORWARD, Walk, [0], dataset=tmp_path / "none", keep="succes")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("simulator")])
def test_interrupted_collecting_keeps_what_is_finished(tmp_path, error):
    with pytest.raises(type(error)):
        collect(FORWARD, lambda: Walk(crash_at=(5, error)), [1, 2, 5, 3], dataset=tmp_path / "part")
    kept = Demonstrations.load(tmp_path / "part")
    assert [e.seed for e in kept] == [1, 2] and kept.info["interrupted"] and kept.info["attempted"] == 2


def test_ctrl_c_is_seen_at_once(tmp_path):
    done = []

    def on_episode(index, episode):
        done.append(index)
        if len(done) == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        collect(FORWARD, Walk, range(50), dataset=tmp_path / "part", on_episode=on_episode)
    assert len(Demonstrations.load(tmp_path / "part")) == 2
