"""Cart-pole policies: the physics, the stacked policies, what is learned and measured."""

import gymnasium as gym
import numpy as np
import pytest
import torch

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.cartpole import EXPERT, SCALE, CartPole, CartPoleGRU, cart_pole_step, failed, starts
from fleetgym.benchmarks.zoos.zoo import make
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator


def test_the_physics_is_gymnasiums():
    world = gym.make("CartPole-v1").unwrapped
    rng = torch_generator("test_cartpole")
    ended = 0
    for _ in range(20):
        world.reset(seed=0)
        state = starts(rng, 1).double()
        world.state = tuple(state[0].tolist())
        for _ in range(60):
            right = torch.rand(1, generator=rng) < 0.5
            state = cart_pole_step(state, right)
            _, _, terminated, _, _ = world.step(int(right))
            assert np.abs(np.array(world.state) - state[0].numpy()).max() < 1e-12
            assert bool(failed(state)) == terminated
            if terminated:
                ended += 1
                break
    assert ended > 5


def test_the_expert_keeps_the_pole_up_and_its_opposite_does_not():
    maker = CartPole(hidden=4, episodes=20, horizon=200)
    gains = torch.tensor(EXPERT) * torch.tensor(SCALE)  # policies see scaled states
    weights = {
        "layers.0.weight": torch.zeros(2, 4, 4),
        "layers.0.bias": torch.zeros(2, 4),
        "layers.1.weight": torch.eye(4).repeat(2, 1, 1),
        "layers.1.bias": torch.zeros(2, 4),
        "layers.2.weight": torch.zeros(2, 1, 4),
        "layers.2.bias": torch.zeros(2, 1),
    }
    weights["layers.0.weight"][:, 0] = 0.01 * gains  # in the linear range of tanh
    weights["layers.2.weight"][:, 0, 0] = torch.tensor([1.0, -1.0])
    alive, lasted = maker.evaluate(weights)
    assert alive[0].all() and not alive[1].any()
    assert (lasted[0] == 200).all() and (lasted[1] < 100).all() and (lasted[1] > 0).all()


def test_feed_forward_policies(tmp_path):
    good = {"demonstrations": (24, 24), "noise": (0.0, 0.1), "gain": (1.0, 1.0), "steps": (200, 200)}
    zoo = make_zoo("cartpole", folder=tmp_path, progress=False, policies=8, **good)
    poor = make_zoo("cartpole", folder=tmp_path, progress=False, policies=8, **{**good, "steps": (1, 1)})
    assert zoo.targets["success"].mean() > 0.5 > poor.targets["success"].mean() + 0.2
    assert zoo.network == {"sizes": [4, 16, 16, 1], "activation": "tanh"}
    # A network of the zoo, by its own module in Gymnasium's world, lasts as long from the first start.
    best = int(zoo.targets["success"].argmax())
    module = zoo.module(best)
    maker = CartPole(policies=8, **good)
    start = maker.spread * starts(torch_generator("zoo", "cartpole", "evaluation", 0), maker.episodes)
    alive, lasted = maker.evaluate({name: value[best : best + 1] for name, value in zoo.weights.items()})
    assert alive.float().mean() == zoo.targets["success"][best]
    world = gym.make("CartPole-v1").unwrapped
    world.reset(seed=0)
    world.state = tuple(start[0].double().tolist())
    steps = 0
    while steps < maker.horizon:
        right = module((torch.tensor(np.array(world.state)) / torch.tensor(SCALE).double()).float()) > 0
        if world.step(int(right))[2]:
            break
        steps += 1
    assert abs(steps - float(lasted[0, 0])) < 25  # float64 there, float32 here


def test_recurrent_policies(tmp_path):
    good = {"demonstrations": (32, 32), "gain": (1.0, 1.0), "hidden": 8, "policies": 4, "noise": (0.1, 0.15)}
    zoo = make_zoo("cartpole_gru", folder=tmp_path, progress=False, steps=(100, 100), **good)
    poor = make_zoo("cartpole_gru", folder=tmp_path, progress=False, steps=(1, 1), **good)
    assert zoo.targets["survival"].mean() > poor.targets["survival"].mean() + 0.2
    # The stacked step is the policy's own.
    maker = CartPoleGRU(**good)
    weights = {name.replace(".", "/"): value for name, value in zoo.weights.items()}
    states = torch.randn(6, 4, 3, 4, generator=torch_generator("test_cartpole_gru"))
    memory = None
    memories = [None] * 4
    policies = [zoo.module(n) for n in range(4)]
    assert isinstance(policies[0], RecurrentPolicy)
    policies = [RecurrentPolicy(**{**zoo.network, "action_low": None, "action_high": None}) for _ in range(4)]
    for n, policy in enumerate(policies):
        policy.load_state_dict(zoo.state_dict(n))
    for state in states:
        output, memory = maker._act(weights, state, memory)
        for n, policy in enumerate(policies):
            action, memories[n] = policy.predict(state[n][:, [0, 2]].numpy(), memories[n])
            assert np.abs(action[:, 0] - output[n].numpy()).max() < 1e-5
    spec = zoo.spec
    assert sorted(spec.groups.values()) == [8, 8, 8]


def test_equal_seeds_give_equal_zoos(tmp_path):
    small = {"policies": 3, "steps": (5, 9), "horizon": 20, "progress": False}
    for name in ("cartpole", "cartpole_gru"):
        zoos = [make_zoo(name, folder=tmp_path / str(i), seed=seed, **small) for i, seed in enumerate((0, 0, 1))]
        key = list(zoos[0].weights)[-2]  # the output layer
        assert torch.equal(zoos[0].weights[key], zoos[1].weights[key])
        assert torch.equal(zoos[0].targets["survival"], zoos[1].targets["survival"])
        assert not torch.equal(zoos[0].weights[key], zoos[2].weights[key])
        assert (zoos[0].targets["steps"] >= 5).all() and (zoos[0].targets["steps"] <= 9).all()


def test_demonstrations_are_those_of_the_settings():
    maker = CartPole(policies=200, length=40)
    rng = torch_generator("test_demonstrations")
    settings = maker._settings(200, rng)
    assert settings["demonstrations"].unique().tolist() == list(range(1, 25)) or settings["demonstrations"].max() <= 24
    assert 0.05 <= settings["gain"].min() and settings["gain"].max() <= 4.0
    observations, actions, mask = maker._demonstrations(settings, rng)
    gains = torch.tensor(EXPERT).repeat(200, 1)
    gains[:, :2] *= settings["gain"][:, None]
    wanted = torch.einsum("ndtk,nk->ndt", observations * torch.tensor(SCALE), gains) > 0
    wrong = (wanted != actions.bool()).float().mean((1, 2))
    assert (wrong - settings["noise"]).abs().max() < 0.1 and wrong.mean() == pytest.approx(0.15, abs=0.03)
    assert mask[:, :, 0].all() and not mask.all() and (mask.diff(dim=2) <= 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": 0}, "policies=0"),
        ({"noise": (0.0, 0.7)}, "noise=.*0.5"),
        ({"gain": (2.0, 1.0)}, "gain=.*2.0, 1.0"),
        ({"learning_rate": (0.0, 0.1)}, "learning_rate"),
        ({"spread": 0.0}, "spread=0.0"),
    ],
)
def test_bad_settings(change, words, tmp_path):
    with pytest.raises(UserError, match=words):
        make(CartPole(**change), folder=tmp_path)
    assert not any(tmp_path.iterdir())
