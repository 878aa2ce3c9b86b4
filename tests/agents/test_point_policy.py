"""Policies that see points: the points' order means nothing, they stack exactly, their symmetry is derived."""

import dataclasses

import numpy as np
import pytest
import torch

from fleetgym.agents.imitation import FleetLearner, ImitationConfig, SightBatch, inputs
from fleetgym.agents.networks import PointPolicy, PolicyStack
from fleetgym.core import Checkpoint, UserError, WeightSpec

POINTS = 12


def made(seed, **options):
    torch.manual_seed(seed)
    return PointPolicy(5, 2, points=POINTS, hidden=8, **options)


def batch(seed, episodes=4, time=6):
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, time + 1, (episodes, 1), generator=rng)
    sights = 0.1 * torch.randn(episodes, time, 4, POINTS, generator=rng)
    observations = torch.randn(episodes, time, 5, generator=rng)
    # What is to be learned is where the cloud's highest point is.
    actions = torch.stack([10 * sights[:, :, 2].amax(-1), observations[..., 0]], -1).clamp(-1, 1)
    return SightBatch(observations, actions, torch.arange(time) < lengths, sights)


def test_the_order_of_points_means_nothing():
    policy, data = made(0), batch(0)
    order = torch.randperm(POINTS, generator=torch.Generator().manual_seed(1))
    shuffled = dataclasses.replace(data, sights=data.sights[..., order])
    torch.testing.assert_close(policy(*inputs(data))[0], policy(*inputs(shuffled))[0])
    moved = dataclasses.replace(data, sights=data.sights + 0.05)
    assert (policy(*inputs(data))[0] - policy(*inputs(moved))[0]).abs().max() > 1e-3


@pytest.mark.parametrize("cell", ["gru", "mlp"])
def test_a_stack_computes_what_its_policies_do(cell):
    policies, data = [made(seed, cell=cell) for seed in range(3)], [batch(seed) for seed in range(3)]
    stacked = PolicyStack(policies)(*(torch.stack(parts) for parts in zip(*map(inputs, data))))
    for policy, one, found in zip(policies, data, stacked):
        torch.testing.assert_close(policy(*inputs(one))[0], found, atol=1e-6, rtol=1e-5)


def test_the_symmetry_is_derived_and_exact():
    policy, data = made(0).double(), batch(0)
    spec = WeightSpec.from_module(policy, policy.example())
    state = spec.apply(policy.state_dict(), spec.random(0))
    other = made(1).double()
    other.load_state_dict(state)
    assert any((state[key] != value).any() for key, value in policy.state_dict().items() if key.startswith("eye"))
    parts = [part.double() for part in inputs(data)]
    torch.testing.assert_close(policy(*parts)[0], other(*parts)[0], atol=1e-12, rtol=0)


def test_it_learns_from_what_it_sees_and_predicts_row_by_row(tmp_path):
    data = batch(0, episodes=32)
    learner = FleetLearner([made(0)], [data], ImitationConfig(steps=150, batch_size=8, learning_rate=1e-2))
    first = float(learner.train(1)[0])
    assert float(learner.train(149)[0]) < 0.35 * first
    policy = learner.stack.policies()[0]
    Checkpoint.save(tmp_path / "p", policy)
    loaded = Checkpoint.load(tmp_path / "p").module()
    want = policy(*inputs(data))[0][:, 0].detach().clamp(-1, 1)
    observation = {"state": data.observations[:, 0].numpy(), "points": data.sights[:, 0].numpy()}
    got, _ = loaded.predict(observation)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_bad_input():
    with pytest.raises(UserError, match="points=0"):
        PointPolicy(5, 2, points=0)
    with pytest.raises(UserError, match=r"\(4, 11\).*\(4, 12\)|points.*11"):
        data = batch(0)
        FleetLearner([made(0)], [dataclasses.replace(data, sights=data.sights[..., 1:])], ImitationConfig())
    with pytest.raises(UserError, match="points"):
        made(0).predict(np.zeros(5))
    with pytest.raises(UserError, match="points"):
        made(0).predict({"state": np.zeros(5), "points": np.zeros((4, 3))})
