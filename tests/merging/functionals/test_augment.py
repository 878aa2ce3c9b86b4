"""Sign flips of hidden units: the function stays, the weights do not."""

import numpy as np
import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.merging.functionals import WeightBatch
from fleetgym.merging.functionals.augment import SignFlips
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.models import run_networks


def _mlp(activation):
    return nn.Sequential(nn.Linear(3, 5), activation(), nn.Linear(5, 4), activation(), nn.Linear(4, 2))


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("kind", ["mlp", "gru"])
def test_the_function_stays(kind, free):
    torch.manual_seed(0)
    network = _mlp(nn.Tanh) if kind == "mlp" else RecurrentPolicy(3, 2, "gru", 6)
    example = torch.randn(7, 3) if kind == "mlp" else torch.randn(7, 5, 3)
    spec = WeightSpec.from_module(network, example)
    layout = Layout.of(spec.free("in", "out") if free else spec)
    state = network.state_dict()
    rest = {key: value for key, value in state.items() if key not in layout.shapes}
    x = WeightBatch.stack(layout, [{k: v + torch.randn_like(v) for k, v in state.items()} for _ in range(4)])
    y = SignFlips(layout)(x, np.random.default_rng(0))

    def outputs(batch):
        return run_networks(network, {key: t[..., 0] for key, t in batch.tensors().items()}, example, rest)

    assert torch.allclose(outputs(x), outputs(y), atol=1e-5)
    assert 0.2 < float((x.data != y.data).float().mean()) < 0.8
    assert torch.equal(x.data.abs(), y.data.abs())
    # Each network has signs of its own.
    assert len({tuple(row.tolist()) for row in (x.data == y.data).flatten(1)}) == 4


def test_no_odd_activation_is_an_error():
    spec = WeightSpec.from_module(_mlp(nn.ReLU), torch.zeros(1, 3))
    with pytest.raises(UserError, match="odd activation"):
        SignFlips(Layout.of(spec))
