"""Policies that see: predict, symmetry and merging, the stack that trains a fleet, episodes with pictures."""

import dataclasses

import numpy as np
import pytest
import torch

from fleetgym.agents.imitation import FleetLearner, ImitationConfig, SightBatch, inputs
from fleetgym.agents.networks import ImagePolicy, PolicyStack, RecurrentPolicy, convolved, masked_mse
from fleetgym.core import Checkpoint, Demonstrations, SequenceBatch, UserError
from fleetgym.core.rollout import Episode
from fleetgym.core.weights import WeightSpec
from fleetgym.merging import merge

SIZE = 22


def make(seed=0, cell="gru", **kwargs):
    torch.manual_seed(seed)
    policy = ImagePolicy(5, 2, image_size=SIZE, cell=cell, hidden=8, **kwargs)
    policy.normaliser.mean.normal_()
    policy.normaliser.std.uniform_(0.5, 2)
    return policy


def batch(seed=0, episodes=6, time=7):
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (episodes, time, SIZE, SIZE, 3), generator=rng, dtype=torch.uint8)
    lengths = torch.randint(time // 2, time + 1, (episodes,), generator=rng)
    observations, actions = (torch.randn(episodes, time, n, generator=rng) for n in (5, 2))
    return SightBatch(observations, actions, torch.arange(time) < lengths[:, None], images)


@pytest.mark.parametrize("cell", ["gru", "lstm", "mlp"])
def test_predict_step_by_step_is_forward_over_the_sequence(cell):
    policy, seen = make(cell=cell), batch(episodes=3)
    whole, _ = policy(*inputs(seen))
    state, start = None, np.ones(3, bool)
    for t in range(seen.mask.shape[1]):
        observation = {"state": seen.observations[:, t].numpy(), "pixels": seen.sights[:, t].numpy()}
        action, state = policy.predict(observation, state, start)
        np.testing.assert_allclose(action, whole[:, t].detach().clamp(-1, 1).numpy(), atol=1e-5)
        start = np.zeros(3, bool)
    single, _ = policy.predict({key: value[0] for key, value in observation.items()})
    alone, _ = policy.predict({key: value[:1] for key, value in observation.items()})
    assert single.shape == (2,)
    np.testing.assert_array_equal(single, alone[0])


def test_symmetry_is_derived_proved_and_exact():
    policy = make(layers=2).double()
    spec = WeightSpec.from_module(policy, policy.example())
    # Channels of both convolutions, encoder, two layers of the core, the head's hidden layer.
    assert sorted(spec.groups.values()) == [8, 8, 8, 8, 16, 32]
    assert sorted(spec.groups[group] for group, signed in spec.signed.items() if signed) == [8] * 4
    moved = make(1, layers=2).double()
    element = spec.random(np.random.default_rng(1))
    moved.load_state_dict(spec.apply(policy.state_dict(), element))
    assert all((moved.eye[i].weight - policy.eye[i].weight).abs().max() > 0.01 for i in (0, 2))
    seen = batch(3)
    seen = (seen.observations.double(), seen.sights)
    torch.testing.assert_close(moved(*seen)[0], policy(*seen)[0], atol=1e-12, rtol=0)


def test_fleet_merge_finds_the_permutation_of_the_encoder_too():
    policy = make()
    spec = WeightSpec.from_module(policy, policy.example())
    moved = make(1)
    moved.load_state_dict(spec.apply(policy.state_dict(), spec.random(np.random.default_rng(1))))
    seen = inputs(batch(2))
    found = merge("fleet_merge", [policy, moved], example_input=policy.example())
    assert found.distance_before > 1 and found.distance_after < 1e-9
    torch.testing.assert_close(found.module()(*seen)[0], policy(*seen)[0], atol=1e-5, rtol=0)
    naive = merge("average", [policy, moved], example_input=policy.example()).module()
    assert (naive(*seen)[0] - policy(*seen)[0]).abs().max() > 0.01


@pytest.mark.parametrize("cell", ["gru", "mlp"])
def test_stack_has_every_policys_outputs_and_gradients(cell):
    policies = [make(seed, cell).double() for seed in range(3)]
    stack = PolicyStack(policies)
    data = [batch(seed) for seed in range(3)]
    mask = torch.stack([one.mask for one in data])
    target = torch.stack([one.actions for one in data]).double()
    seen = [torch.stack(parts) for parts in zip(*map(inputs, data))]
    seen[0] = seen[0].double()
    together = stack(*seen)
    masked_mse(together, target, mask).sum().backward()
    for n, policy in enumerate(policies):
        output = policy(*(tensor[n] for tensor in seen))[0]
        torch.testing.assert_close(together[n], output, atol=1e-12, rtol=0)
        masked_mse(output, target[n], mask[n]).backward()
        for name, parameter in policy.named_parameters():
            torch.testing.assert_close(stack[name].grad[n], parameter.grad, atol=1e-12, rtol=1e-9)


CONFIG = ImitationConfig(steps=40, batch_size=3, learning_rate=1e-2)


def test_a_fleet_trains_as_its_robots_would_alone_and_resumes():
    policies, data = [make(0), make(1)], [batch(0), batch(1, 4, 5)]
    fleet, half = (FleetLearner(policies, data, CONFIG, seed=3) for _ in range(2))
    drawn = [fleet._draw()]
    loss = fleet._backward(*drawn[0])
    for n, policy in enumerate(policies):
        seen, actions, mask = ([t[n : n + 1] for t in drawn[0][0]], *(t[n : n + 1] for t in drawn[0][1:]))
        alone = FleetLearner([policy], [data[n]], CONFIG, seed=3)
        torch.testing.assert_close(alone._backward(seen, actions, mask)[0], loss[n])
        for name, parameter in alone.stack.named_parameters():
            wanted = fleet.stack.get_parameter(name).grad[n]
            torch.testing.assert_close(parameter.grad[0], wanted, rtol=1e-4, atol=1e-6)
    first = float(fleet.train(1).mean())
    assert float(fleet.train(19).mean()) < first
    half.train(8)
    rest = FleetLearner(policies, data, CONFIG, seed=3)
    rest.load_state(*half.state())
    rest.train(12)
    for name, value in fleet.stack.state_dict().items():
        assert torch.equal(value, rest.stack.state_dict()[name])


def test_a_shared_policy_follows_the_mean_of_the_robots_gradients():
    data = [batch(0), batch(1, 4, 5)]
    apart = FleetLearner([make(0)] * 2, data, CONFIG, seed=3)
    together = FleetLearner([make(1), make(2)], data, CONFIG, seed=3)
    together.share(make(0))
    draw = apart._draw()
    torch.testing.assert_close(apart._backward(*draw), together._backward(*draw))
    for name, value in apart.stack.named_parameters():
        found = together.stack.get_parameter(name).grad
        torch.testing.assert_close(found, value.grad.mean(0, keepdim=True), rtol=1e-4, atol=1e-6)


def test_what_is_seen_can_be_learned():
    """The action is how bright the left half of the picture is: the numbers say nothing of it."""
    data = batch(0, 24, 3)
    data.sights[:] = torch.randint(
        0, 256, (24, 3, 1, 1, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(9)
    )
    data.sights[..., SIZE // 2 :, :] = 0
    actions = (data.sights[..., :1, 0, 0] / 128.0 - 1).expand(-1, -1, 2).contiguous()
    data = dataclasses.replace(data, actions=actions)
    learner = FleetLearner([make()], [data], ImitationConfig(steps=120, batch_size=12, learning_rate=1e-2))
    learner.train(120)
    policy = learner.stack.policies()[0]
    with torch.no_grad():
        seen = float(masked_mse(policy(*inputs(data))[0], actions, data.mask))
        dark = float(masked_mse(policy(data.observations, torch.zeros_like(data.sights))[0], actions, data.mask))
    assert seen < 0.05 < 0.2 < dark


def episode(rng, length):
    return Episode(
        seed=0,
        observations={
            "state": rng.normal(size=(length + 1, 5)),
            "pixels": rng.integers(0, 256, (length + 1, SIZE, SIZE, 3), dtype=np.uint8),
        },
        actions=rng.normal(size=(length, 2)).astype(np.float32),
        rewards=np.zeros(length),
        terminations=np.zeros(length, bool),
        truncations=np.arange(length) == length - 1,
        success=True,
    )


def test_demonstrations_keep_their_pictures_to_the_byte(tmp_path):
    rng = np.random.default_rng(0)
    episodes = [episode(rng, 4), episode(rng, 6)]
    Demonstrations(episodes).save(tmp_path / "seen")
    loaded = SightBatch.of(Demonstrations.load(tmp_path / "seen"))
    assert loaded.sights.shape == (2, 6, SIZE, SIZE, 3) and loaded.sights.dtype == torch.uint8
    for n, one in enumerate(episodes):
        np.testing.assert_array_equal(loaded.sights[n, : one.length], one.observations["pixels"][:-1])
        np.testing.assert_array_equal(
            loaded.observations[n, : one.length], one.observations["state"][:-1].astype(np.float32)
        )
    assert not loaded.sights[0, 4:].any() and loaded.mask.sum() == 10
    joined = SightBatch.concatenate([loaded, batch(0, 3, 7)])
    assert joined.sights.shape == (5, 7, SIZE, SIZE, 3)
    assert torch.equal(joined.sights[:2, :6], loaded.sights) and torch.equal(joined.sights[2:], batch(0, 3, 7).sights)


def test_checkpoint_round_trip(tmp_path):
    policy, seen = make(), inputs(batch())
    Checkpoint.save(tmp_path / "policy", policy)
    back = Checkpoint.load(tmp_path / "policy").module()
    assert isinstance(back, ImagePolicy)
    assert torch.equal(back(*seen)[0], policy(*seen)[0])


def test_bad_input(tmp_path):
    with pytest.raises(UserError, match="image_size=19: the convolutions need pictures of at least 20 pixels"):
        ImagePolicy(5, 2, image_size=19)
    assert [convolved(size) for size in (20, 48, 64)] == [1, 4, 6]
    policy = make()
    with pytest.raises(UserError, match=r"observation of \(5,\); this policy takes a mapping of 'state'"):
        policy.predict(np.zeros(5))
    with pytest.raises(UserError, match=r"observation of \['state'\]"):
        policy.predict({"state": np.zeros(5)})
    with pytest.raises(UserError, match=r"'pixels' of shape \(8, 8, 3\) and type uint8"):
        policy.predict({"state": np.zeros(5), "pixels": np.zeros((8, 8, 3), np.uint8)})
    with pytest.raises(UserError, match="type float64"):
        policy.predict({"state": np.zeros(5), "pixels": np.zeros((SIZE, SIZE, 3))})
    data = batch()
    blind = SequenceBatch(data.observations, data.actions, data.mask)
    with pytest.raises(
        UserError, match=r"demonstrations have pictures .* of shape None, its policy takes \(22, 22, 3\)"
    ):
        FleetLearner([policy], [blind], CONFIG)
    with pytest.raises(UserError, match=r"of shape \(22, 22, 3\), its policy takes None"):
        FleetLearner([RecurrentPolicy(5, 2)], [data], CONFIG)
    with pytest.raises(UserError, match="different pictures"):
        SightBatch.concatenate([data, dataclasses.replace(data, sights=data.sights[:, :, 1:, 1:])])
    rng = np.random.default_rng(0)
    plain = dataclasses.replace(episode(rng, 4), observations=rng.normal(size=(5, 5)))
    with pytest.raises(UserError, match="a mapping of 'state' and 'pixels'"):
        SightBatch.of(Demonstrations([plain]))
