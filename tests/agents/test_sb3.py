import gymnasium as gym
import numpy as np
import pytest
import torch
from sb3_contrib import RecurrentPPO
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import DummyVecEnv

from fleetgym.agents.sb3 import actor
from fleetgym.core import WeightSpec
from fleetgym.core.errors import UserError
from fleetgym.core.policy import FunctionPolicy, Policy
from fleetgym.core.rollout import evaluate, rollout

torch.set_num_threads(1)
SEEDS = list(range(8))


def small(**options):  # Stable-Baselines3 writes into the dict that it is given
    return {"net_arch": [16, 16], **options}


class SeededResets(gym.Wrapper):
    """Resets with the next of its own seeds, as SB3's evaluation passes none; logs seed -> return."""

    def __init__(self, env, seeds, log):
        super().__init__(env)
        self.seeds, self.log, self.seed = list(seeds), log, None

    def reset(self, **kwargs):
        self.seed = self.seeds.pop(0) if self.seeds else None
        self.total = 0.0
        return self.env.reset(seed=self.seed)

    def step(self, action):
        observation, reward, terminated, truncated, info = self.env.step(action)
        self.total += float(reward)
        if (terminated or truncated) and self.seed is not None:
            self.log[self.seed] = self.total
        return observation, reward, terminated, truncated, info


def sb3_returns(policy, env_id, num_envs):
    """Returns in the order of SEEDS, as ``evaluate_policy`` of Stable-Baselines3 measures them."""
    log, share = {}, len(SEEDS) // num_envs
    parts = [SEEDS[i * share : (i + 1) * share] for i in range(num_envs)]
    env = DummyVecEnv([lambda part=part: SeededResets(gym.make(env_id), part, log) for part in parts])
    rewards, _ = evaluate_policy(policy, env, len(SEEDS), deterministic=True, return_episode_rewards=True, warn=False)
    np.testing.assert_allclose(sorted(rewards), sorted(log.values()), rtol=1e-4)
    return [log[seed] for seed in SEEDS]


class Recurrent(torch.nn.Module):
    """A small GRU with SB3's predict; its state is laid out [layers, B, H], as sb3-contrib's is."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.rnn = torch.nn.GRU(3, 8, num_layers=2)
        self.head = torch.nn.Linear(8, 1)

    @torch.no_grad()
    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        x = torch.as_tensor(observation, dtype=torch.float32)
        hidden = torch.zeros(2, len(x), 8) if state is None else torch.as_tensor(state[0])
        if episode_start is not None:
            hidden = hidden * (1.0 - torch.as_tensor(episode_start, dtype=torch.float32))[None, :, None]
        out, hidden = self.rnn(x[None], hidden)
        return 2 * torch.tanh(self.head(out[0])).numpy(), (hidden.numpy(),)


def make(kind):
    """Untrained models do: a random network is as deterministic as a trained one."""
    if kind == "function":
        return FunctionPolicy(lambda o: np.array([-3.0 * o[1] - o[2]]), gym.make("Pendulum-v1").action_space)
    if kind == "recurrent":
        return Recurrent()
    if kind == "recurrent_ppo":
        # Two layers and a first state that is not forgotten at once, so that a mixed-up row would be seen.
        return RecurrentPPO(
            "MlpLstmPolicy", "Pendulum-v1", seed=0, policy_kwargs=small(lstm_hidden_size=8, n_lstm_layers=2)
        )
    algorithm = {"ppo": PPO, "sac": SAC, "cartpole": PPO}[kind]
    env = "CartPole-v1" if kind == "cartpole" else "Pendulum-v1"
    return algorithm("MlpPolicy", env, seed=0, policy_kwargs=small())


@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("kind", ["function", "recurrent", "ppo", "sac", "cartpole", "recurrent_ppo"])
def test_sb3_and_we_evaluate_alike(kind, num_envs):
    """Ours in SB3's evaluation, theirs in our rollout: the same return for the same seed."""
    policy, env_id = make(kind), "CartPole-v1" if kind == "cartpole" else "Pendulum-v1"
    assert isinstance(policy, Policy)
    ours = rollout(policy, env_id, SEEDS, num_envs=num_envs)
    # Batches of another size round float32 sums otherwise, and a pendulum amplifies that.
    np.testing.assert_allclose([e.ret for e in ours], sb3_returns(policy, env_id, num_envs), rtol=2e-3)


def test_a_recurrent_model_forgets_between_episodes():
    for kind in ("recurrent", "recurrent_ppo"):
        a, b = rollout(make(kind), "Pendulum-v1", [5, 5], max_steps=50)
        np.testing.assert_array_equal(a.actions, b.actions)


def test_an_sb3_model_fills_a_record():
    record = evaluate(make("ppo"), "Pendulum-v1", [1, 2, 3], num_envs=2, max_steps=20, system="ppo")
    assert list(record.lengths) == [20] * 3 and not any(record.successes)


@pytest.mark.parametrize("algorithm", [PPO, A2C, SAC, TD3])
def test_actor_acts_as_its_model(algorithm):
    model = algorithm("MlpPolicy", "Pendulum-v1", seed=1, policy_kwargs=small())
    network = actor(model)
    observations = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
    with torch.no_grad():
        actions = network(torch.as_tensor(observations)).numpy()
    expected, _ = model.predict(observations, deterministic=True)
    assert np.ptp(expected) > 0
    np.testing.assert_allclose(np.clip(actions, -2, 2), expected, atol=1e-6)


def test_actor_of_gsde_and_of_discrete_actions():
    observations = np.random.default_rng(0).uniform(-1, 1, (64, 3)).astype(np.float32)
    for options in ({"use_sde": True}, {"use_sde": True, "policy_kwargs": {"squash_output": True}}):
        model = PPO("MlpPolicy", "Pendulum-v1", seed=1, **options)
        with torch.no_grad():
            actions = actor(model)(torch.as_tensor(observations)).numpy()
        np.testing.assert_allclose(
            np.clip(actions, -2, 2), model.predict(observations, deterministic=True)[0], atol=1e-6
        )
    model, observations = make("cartpole"), np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)
    with torch.no_grad():
        logits = actor(model)(torch.as_tensor(observations))
    assert logits.argmax(1).tolist() == model.predict(observations, deterministic=True)[0].tolist()


@pytest.mark.parametrize("algorithm", [PPO, SAC, TD3])
def test_weights_go_out_and_come_back(algorithm):
    a, b = (algorithm("MlpPolicy", "Pendulum-v1", seed=seed, policy_kwargs=small()) for seed in (0, 1))
    spec = WeightSpec.from_module(actor(a), torch.zeros(1, 3))
    assert list(spec.groups.values())[:2] == [16, 16]
    moved = spec.apply(actor(a).state_dict(), spec.random(0))
    observations = np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32)
    actor(b).load_state_dict(moved)
    ours, theirs = (model.predict(observations, deterministic=True)[0] for model in (a, b))
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_other_models_are_refused():
    with pytest.raises(UserError, match="DQN has no actor"):
        actor(DQN("MlpPolicy", "CartPole-v1", policy_kwargs=small(), buffer_size=10))
    with pytest.raises(UserError, match="recurrent"):
        actor(make("recurrent_ppo"))
    with pytest.raises(UserError, match="Linear is no model"):
        actor(torch.nn.Linear(2, 2))
