"""Behaviour cloning: it learns, it keeps robots apart, it is deterministic, it resumes."""

import numpy as np
import pytest
import torch

from fleetgym.agents.imitation import FleetLearner, ImitationConfig
from fleetgym.agents.networks import RecurrentPolicy, masked_mse
from fleetgym.core import SequenceBatch, UserError


def policy(seed=0, cell="gru"):
    torch.manual_seed(seed)
    return RecurrentPolicy(3, 1, cell=cell, hidden=16)


def memory_task(seed, episodes=40, time=12):
    """The action is the running mean of the first input: only a policy that remembers can give it."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(episodes, time, 3, generator=rng)
    y = x[..., :1].cumsum(1) / torch.arange(1, time + 1)[:, None]
    lengths = torch.randint(time // 2, time + 1, (episodes,), generator=rng)
    return SequenceBatch(x, y, torch.arange(time) < lengths[:, None])


CONFIG = ImitationConfig(steps=400, batch_size=16, learning_rate=1e-2)


@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn"])
def test_a_recurrent_policy_learns_what_an_mlp_cannot(cell):
    test = memory_task(99)
    errors = {}
    for kind in (cell, "mlp"):
        learner = FleetLearner([policy(cell=kind)], [memory_task(0)], CONFIG)
        learner.train(400)
        trained = learner.stack.policies()[0]
        with torch.no_grad():
            errors[kind] = float(masked_mse(trained(test.observations)[0], test.actions, test.mask))
    assert errors[cell] < 0.25 * errors["mlp"]


def test_robots_do_not_touch_each_other():
    together = FleetLearner([policy(0), policy(1)], [memory_task(0), memory_task(1, 30, 9)], CONFIG, seed=5)
    other = FleetLearner([policy(0), policy(2)], [memory_task(0), memory_task(7, 30, 9)], CONFIG, seed=5)
    together.train(5)
    other.train(5)
    for name, value in together.stack.state_dict().items():
        assert torch.equal(value[0], other.stack.state_dict()[name][0])
    assert not torch.equal(together.stack["encoder.weight"][1], other.stack["encoder.weight"][1])


def test_same_seed_same_weights_and_resume_is_the_same():
    def learner():
        return FleetLearner([policy(0), policy(1)], [memory_task(0), memory_task(1)], CONFIG, seed=3)

    whole, again, first = learner(), learner(), learner()
    whole.train(20)
    again.train(20)
    first.train(8)
    tensors, meta = first.state()
    resumed = learner()
    resumed.load_state({name: value.clone() for name, value in tensors.items()}, meta)
    resumed.train(12)
    for name, value in whole.stack.state_dict().items():
        assert torch.equal(value, again.stack.state_dict()[name])
        assert torch.equal(value, resumed.stack.state_dict()[name])


def test_bad_input():
    with pytest.raises(UserError, match="2 policies for 1 sets"):
        FleetLearner([policy(), policy()], [memory_task(0)], CONFIG)
    short = memory_task(0)
    with pytest.raises(UserError, match=r"robot 0: .*\(2, 1\), its policy has \(3, 1\)"):
        FleetLearner([policy()], [SequenceBatch(short.observations[..., :2], short.actions, short.mask)], CONFIG)
    broken = policy()
    with torch.no_grad():
        broken.encoder.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="robot 1: weights 'encoder.weight' are not finite"):
        FleetLearner([policy(), broken], [short, short], CONFIG)
    poisoned = memory_task(0)
    poisoned.observations[0, 0, 0] = np.inf
    with pytest.raises(UserError, match="not finite"):
        FleetLearner([policy()], [poisoned], CONFIG)
    with pytest.raises(UserError, match="learning_rate=0"):
        ImitationConfig(learning_rate=0.0)


def test_a_shared_policy_follows_the_mean_of_the_robots_gradients():
    data = [memory_task(0), memory_task(1, 30, 9), memory_task(2, 20, 30)]
    config = ImitationConfig(steps=400, batch_size=16, learning_rate=1e-2, gradient_clip=1e9)
    apart = FleetLearner([policy(0)] * 3, data, config, seed=3)
    together = FleetLearner([policy(1), policy(2), policy(3)], data, config, seed=3)
    together.share(policy(0))
    draw = apart._draw()
    losses = [learner._backward(*draw) for learner in (apart, together)]
    torch.testing.assert_close(*losses)
    wanted = {name: value.grad.mean(0, keepdim=True) for name, value in apart.stack.named_parameters()}
    found = {name: value.grad for name, value in together.stack.named_parameters()}
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_sharing_learns_and_resumes_to_the_same():
    def learner():
        learner = FleetLearner([policy(k) for k in range(3)], [memory_task(k) for k in range(3)], CONFIG, seed=3)
        learner.share(policy(0))
        return learner

    whole, first, second = learner(), learner(), learner()
    before = float(whole.train(1).mean())
    assert float(whole.train(149).mean()) < 0.3 * before
    first.train(60)
    second.load_state(*first.state())
    second.train(90)
    for name, value in whole.stack.state_dict().items():
        assert len(value) == 1 and torch.equal(value, second.stack.state_dict()[name])
    with pytest.raises(UserError, match="configuration"):
        whole.share(policy(cell="lstm"))


def test_a_fleet_too_large_for_the_cache_runs_in_parts(monkeypatch):
    def trained():
        learner = FleetLearner([policy(k) for k in range(3)], [memory_task(k, time=9 + k) for k in range(3)], CONFIG)
        return learner.train(5), learner.stack.state_dict()

    loss, weights = trained()
    size = sum(p.numel() for p in policy().parameters())
    monkeypatch.setattr("fleetgym.agents.imitation._WEIGHTS", 2 * size)  # robots 0 and 1, then robot 2
    parts = trained()
    torch.testing.assert_close(parts[0], loss)
    torch.testing.assert_close(dict(parts[1]), dict(weights), rtol=1e-4, atol=1e-5)
