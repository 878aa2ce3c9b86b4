"""Reading the success of Meta-World policies; cart-pole's are read in test_command."""

import pytest
import torch

from fleetgym.agents.networks import META_WORLD_DIFFERENCES, RecurrentPolicy
from fleetgym.benchmarks.weight_space import policies
from fleetgym.benchmarks.weight_space.policies import MetaWorldPolicy
from fleetgym.benchmarks.weight_space.reading import reader
from fleetgym.benchmarks.weight_space.task import Job
from fleetgym.benchmarks.zoos.zoo import Zoo, split_groups
from fleetgym.core.errors import UserError
from fleetgym.merging.functionals import WeightBatch

OBSERVATION = torch.linspace(-1, 1, 39)
"""What the networks of :func:`zoo` are good or bad at; a metre is much, as in Meta-World."""


def zoo(count=96):
    """Policies whose success is what they do at one observation that is far from zero in the normaliser's units."""
    config = RecurrentPolicy(39, 4, "mlp", 6, differences=META_WORLD_DIFFERENCES).config
    nets = []
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(count):
            net = RecurrentPolicy(**config)
            net.normaliser.std.fill_(1e-3)
            net.normaliser.mean.copy_(net.features(OBSERVATION))
            nets.append(net)
        with torch.no_grad():
            for net in nets:
                net.encoder.weight.mul_(0.2)
                net.encoder.bias.mul_(4)
            answers = torch.stack([net(OBSERVATION[None, None])[0][0, 0, 0] for net in nets])
    groups = torch.arange(count)
    success = torch.sigmoid(4 * (answers - answers.mean()) / answers.std())
    weights = {key: torch.stack([net.state_dict()[key] for net in nets]) for key in nets[0].state_dict()}
    splits = split_groups(groups, (2 / 3, 2 / 15, 1 / 5), 0)
    return Zoo("made", "recurrent_policy", config, weights, {"success": success}, splits, groups)


@pytest.fixture
def asked(monkeypatch):
    """What was asked of ``make_zoo``, which gives :func:`zoo`."""
    calls = []

    def made(name, **settings):
        calls.append((name, settings))
        return zoo()

    monkeypatch.setattr(policies, "make_zoo", made)
    return calls


def test_every_method_reads_them(asked, tmp_path):
    small = {"steps": 1, "batch_size": 16, "channels": 4, "layers": 2, "width": 8, "probes": 4}
    task = MetaWorldPolicy(**small, policies=96, world="push-v3", episodes=3, max_steps=9)
    for method in task.methods():
        row = task.run(Job(task.name, method, 0, "cpu", tmp_path / method))
        assert -1 <= row["score"] <= 1 and row["networks"] == {"train": 64, "val": 13, "test": 19}
    task.prepare(5, "cpu")
    name, settings = asked[-1]
    assert name == "meta_world" and settings.pop("device") == "cpu"
    assert settings == {
        "policies": 96, "tasks": ("push-v3",), "cell": "mlp", "episodes": 3, "max_steps": 9, "seed": 5
    }  # fmt: skip


def test_probes_begin_where_observations_are():
    made = zoo()
    task = MetaWorldPolicy()
    x = WeightBatch.stack(made.spec, made.weights)
    model = reader("probes", made, 1, probe=task.probe(), probes=2, options=task.probe_options(made))
    with torch.no_grad():
        model.probes.zero_()
        wanted = torch.stack([made.module(n)(OBSERVATION[None, None])[0].flatten() for n in range(len(made))])
        assert torch.allclose(model.responses(x), wanted.repeat(1, 2), atol=1e-4)
        model.probes.fill_(1.0)
        moved = OBSERVATION + 1e-3  # one deviation
        wanted = torch.stack([made.module(n)(moved[None, None])[0].flatten() for n in range(len(made))])
        assert torch.allclose(model.responses(x), wanted.repeat(1, 2), atol=2e-3)


@pytest.mark.parametrize(
    ("change", "words"), [({"world": "reach-v9"}, "'reach-v9'; nearest"), ({"episodes": 0}, "episodes=0")]
)
def test_settings_are_checked_before_a_zoo_is_made(change, words):
    with pytest.raises(UserError, match=words):
        MetaWorldPolicy(**change)
