"""Policies: SB3's predict, memory, and the stack that trains a fleet as one batch."""

import numpy as np
import pytest
import torch

from fleetgym.agents.networks import CELLS, PolicyStack, RecurrentPolicy, masked_mse
from fleetgym.core import Policy, UserError
from fleetgym.core.weights import WeightSpec


def make(cell="gru", seed=0, **kwargs):
    torch.manual_seed(seed)
    policy = RecurrentPolicy(9, 2, cell=cell, hidden=8, differences=[(0, 3, 3)], **kwargs)
    policy.normaliser.mean.normal_()
    policy.normaliser.std.uniform_(0.5, 2)
    return policy


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_predict_step_by_step_is_forward_over_the_sequence(cell, layers):
    policy = make(cell, layers=layers)
    observations = torch.randn(3, 6, 9)
    whole, _ = policy(observations)
    state, start = None, np.ones(3, bool)
    for t in range(6):
        action, state = policy.predict(observations[:, t].numpy(), state, start, deterministic=True)
        np.testing.assert_allclose(action, whole[:, t].detach().clamp(-1, 1).numpy(), atol=1e-6)
        start = np.zeros(3, bool)
    assert isinstance(policy, Policy)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_episode_start_forgets_only_its_row(cell):
    policy = make(cell)
    first, second = np.random.default_rng(0).normal(size=(2, 2, 9)).astype(np.float32)
    _, state = policy.predict(first)
    fresh, _ = policy.predict(second)
    kept, _ = policy.predict(second, state)
    mixed, _ = policy.predict(second, state, np.array([True, False]))
    np.testing.assert_allclose(mixed[0], fresh[0], atol=1e-6)
    np.testing.assert_allclose(mixed[1], kept[1], atol=1e-6)
    assert np.abs(fresh - kept).max() > 1e-4


def test_single_observation_gives_a_single_action():
    policy = make()
    observation = np.ones(9, np.float32)
    single, state = policy.predict(observation)
    batch, _ = policy.predict(observation[None])
    assert single.shape == (2,) and batch.shape == (1, 2)
    np.testing.assert_array_equal(single, batch[0])
    again, _ = policy.predict(observation, state)
    assert again.shape == (2,)


def test_renormalise_keeps_the_function():
    policy = make().double()
    observations = torch.randn(2, 5, 9, dtype=torch.float64)
    before = policy(observations)[0]
    policy.renormalise(torch.randn(12, dtype=torch.float64), torch.rand(12, dtype=torch.float64) + 0.5)
    torch.testing.assert_close(policy(observations)[0], before, atol=1e-12, rtol=0)


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("layers", [1, 2])
def test_stack_has_every_policys_outputs_and_gradients(cell, layers):
    policies = [make(cell, seed, layers=layers).double() for seed in range(3)]
    stack = PolicyStack(policies)
    observations = torch.randn(3, 4, 7, 9, dtype=torch.float64)
    target = torch.randn(3, 4, 7, 2, dtype=torch.float64)
    mask = torch.rand(3, 4, 7) > 0.3
    masked_mse(stack(observations), target, mask).sum().backward()
    for n, policy in enumerate(policies):
        output = policy(observations[n])[0]
        torch.testing.assert_close(stack(observations)[n], output, atol=1e-12, rtol=0)
        masked_mse(output, target[n], mask[n]).backward()
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(stack[name].grad[n], parameter.grad, atol=1e-12, rtol=1e-9)


def test_stack_round_trip():
    policies = [make(seed=seed) for seed in range(3)]
    stack = PolicyStack(policies)
    for policy, back in zip(policies, stack.policies()):
        for name, value in policy.state_dict().items():
            torch.testing.assert_close(back.state_dict()[name], value)
    stack.load([policies[1].state_dict()])
    assert torch.equal(stack["encoder.weight"][0], policies[1].encoder.weight)
    assert torch.equal(stack["encoder.weight"][2], policies[1].encoder.weight)


@pytest.mark.parametrize("cell", CELLS)
def test_symmetry_is_derived_and_exact(cell):
    policy = make(cell, layers=2)
    spec = WeightSpec.from_module(policy)
    assert set(spec.groups.values()) == {8}
    assert len(spec.groups) == 4  # encoder, two layers of the core, the head's hidden layer
    moved = make(cell, layers=2)
    moved.load_state_dict(spec.apply(policy.state_dict(), spec.random(np.random.default_rng(1))))
    observations = torch.randn(2, 5, 9)
    assert (moved.encoder.weight - policy.encoder.weight).abs().max() > 0.1
    torch.testing.assert_close(moved(observations)[0], policy(observations)[0], atol=1e-5, rtol=0)


def test_bad_input():
    with pytest.raises(UserError, match="unknown cell 'gruu'; nearest: 'gru'"):
        make("gruu")
    with pytest.raises(UserError, match="hidden=0"):
        RecurrentPolicy(9, 2, hidden=0)
    with pytest.raises(UserError, match="reaches outside an observation of size 9"):
        RecurrentPolicy(9, 2, differences=[(0, 8, 3)])
    with pytest.raises(UserError, match=r"\(1, 10\)"):
        make().predict(np.zeros((1, 10)))
    with pytest.raises(UserError, match="at least one policy"):
        PolicyStack([])
    with pytest.raises(UserError, match="policy 1 has configuration"):
        PolicyStack([make(), make("rnn")])
