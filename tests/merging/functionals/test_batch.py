import copy

import pytest
import torch
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import UserError, WeightSpec
from fleetgym.merging.functionals import Layout, WeightBatch


class SmallViT(nn.Module):
    def __init__(self, width=8, heads=2):
        super().__init__()
        self.embed = nn.Linear(3, width)
        self.places = nn.Parameter(torch.randn(5, width))
        self.block = nn.TransformerEncoderLayer(width, heads, 12, batch_first=True, dropout=0.0)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.block(self.embed(x) + self.places).mean(1))


def cnn():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    )


def policy():
    return RecurrentPolicy(6, 2, hidden=8)


MAKERS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 2)), None),
    "gru": (policy, None),
    "cnn": (cnn, torch.zeros(2, 1, 8, 8)),
    "vit": (lambda: SmallViT().eval(), torch.zeros(2, 5, 3)),
}


def made(name, n=3):
    make, example = MAKERS[name]
    torch.manual_seed(0)
    nets = [make() for _ in range(n)]
    return WeightSpec.from_module(nets[0], example), [net.state_dict() for net in nets]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("name", MAKERS)
def test_stacking_and_unstacking_is_the_identity(name, free):
    spec, states = made(name)
    spec = spec.free("in", "out") if free else spec
    batch = WeightBatch.stack(spec, states)
    assert batch.data.shape == (3, batch.layout.size, 1) and len(batch) == batch.batch == 3
    assert sorted(batch.layout.index.tolist()) == list(range(batch.layout.size))
    for back, state in zip(batch.unstack(others=states), states):
        assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    again = WeightBatch.stack(spec, {key: torch.stack([s[key] for s in states]) for key in batch.layout.keys})
    assert torch.equal(again.data, batch.data)
    wide = WeightBatch.join([batch, batch.replace(2 * batch.data)])
    again = WeightBatch.stack(spec, wide.tensors(), channels=True)
    assert torch.equal(again.data, wide.data)
    assert torch.equal(wide.unstack(1)[2][batch.layout.keys[0]], 2 * states[2][batch.layout.keys[0]])


@pytest.mark.parametrize("name", MAKERS)
def test_views_move_as_their_groups_do(name):
    spec, states = made(name)
    spec = spec.free("in", "out")
    spec = WeightSpec(spec.axes, spec.groups, buffers=spec.buffers, nested=spec.nested)  # without signs
    batch = WeightBatch.stack(spec, states)
    wide = batch.replace(torch.randn(3, batch.layout.size, 2))
    element = spec.random(1)
    moved, offset = wide.apply(element), 0
    for part, view in wide:
        assert view.shape == (3, *part.sizes, 2 * part.fold) and part.offset == offset
        assert view.data_ptr() == wide.data[:, offset:].data_ptr()
        offset += part.length
        for dim, group in enumerate(part.dims):
            view = view.index_select(dim + 1, element.perms[group])
        assert torch.equal(view, moved.view(part))
    assert offset == batch.layout.size
    assert torch.equal(moved.apply(element.inverse()).data, wide.data)


@pytest.mark.parametrize("name", MAKERS)
def test_acting_on_a_batch_is_acting_on_its_state_dicts(name):
    spec, states = made(name)
    element = spec.random(2)
    batch = WeightBatch.stack(spec, states).apply(element)
    expected = WeightBatch.stack(spec, [spec.apply(state, element) for state in states])
    assert torch.equal(batch.data, expected.data) and not torch.equal(batch.data, WeightBatch.stack(spec, states).data)


def test_the_parts_of_a_gru_policy():
    spec, _ = made("gru")
    layout = Layout.of(spec)
    assert Layout.of(spec) is layout and Layout.of(made("gru")[0]) == layout != Layout.of(spec.free("in"))
    parts = {part.name: (part.dims, part.fold) for part in layout}
    assert "normaliser.mean" not in parts  # a buffer that nothing moves
    assert parts["core.weight_hh_l0"] == (("core.0", "core.0"), 3)  # gates are channels
    assert parts["core.bias_ih_l0"] == (("core.0",), 3)
    assert parts["encoder.weight"] == (("encoder",), 6) and parts["head.2.bias"] == ((), 2)
    free = Layout.of(spec.free("in", "out"))
    assert {part.name for part in free} >= {"normaliser.mean", "normaliser.std"}
    assert (free["encoder.weight"].dims, free["encoder.weight"].fold) == (("encoder", "in"), 1)


def test_joined_axes_make_parts_and_pixels_are_channels():
    layout = Layout.of(made("vit")[0])
    packed = [part for part in layout if part.key == "block.self_attn.in_proj_weight"]
    assert [(part.dims, part.fold) for part in packed] == [
        (("block.self_attn.qk", "embed"), 2),
        (("block.self_attn.v", "embed"), 1),
    ]
    assert packed[0].name == "block.self_attn.in_proj_weight[block.self_attn.qk, embed]"
    layout = Layout.of(made("cnn")[0])
    assert (layout["3.weight"].dims, layout["3.weight"].fold) == (("3", "0"), 9)
    assert (layout["6.weight"].dims, layout["6.weight"].fold) == (("3",), 48)
    assert layout["1.running_var"].dims == ("0",) and "1.num_batches_tracked" not in layout.keys


def test_a_batch_is_a_pytree():
    spec, states = made("mlp")
    batch = WeightBatch.stack(spec, states)
    doubled = torch.func.vmap(lambda x, s: x.replace(x.data * s), in_dims=(None, 0))(batch, torch.tensor([1.0, 2.0]))
    assert isinstance(doubled, WeightBatch) and torch.equal(doubled.data[1], 2 * batch.data)
    grad = torch.func.grad(lambda x: x.data.square().sum())(batch)
    assert torch.equal(grad.data, 2 * batch.data)
    leaf = {key: value.clone().requires_grad_() for key, value in states[0].items()}
    WeightBatch.stack(spec, [leaf]).view("0.weight").sum().backward()
    assert torch.equal(leaf["0.weight"].grad, torch.ones(3, 2)) and not leaf["2.bias"].grad.any()


def broken(states, change):
    states = [dict(state) for state in copy.deepcopy(states)]
    change(states[1])
    return states


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(foreign=torch.zeros(2)), "state dict 1: unknown tensor 'foreign'"),
        (lambda s: s.pop("encoder.bias"), r"state dict 1 lacks 'encoder.bias' with axes \[encoder 8\]"),
        (
            lambda s: s.update({"encoder.weight": torch.zeros(8, 7)}),
            r"'encoder.weight' has 7 .* axis 1 \(in\), exp.* 6",
        ),
        (lambda s: s.update({"encoder.bias": torch.zeros(8, 1)}), r"'encoder.bias' has shape \(8, 1\) with 2 axes"),
        (lambda s: s["core.weight_hh_l0"][4, 2:].fill_(float("nan")), r"'core.weight_hh_l0' holds nan at 4 .*core.0"),
        (
            lambda s: s["head.2.bias"][1:].fill_(float("inf")),
            r"state dict 1: 'head.2.bias' holds inf at 1 along axis 0",
        ),
        (lambda s: s.update({"head.2.bias": torch.zeros(2, device="meta")}), "'head.2.bias' has device meta"),
        (lambda s: s.update({"head.2.bias": torch.zeros(2).double()}), "'head.2.bias' has dtype torch.float64"),
        (lambda s: s.update({"head.2.bias": torch.zeros(2).int()}), "'head.2.bias' is torch.int32"),
        (lambda s: s.update({"head.2.bias": 3.0}), "'head.2.bias' is a float"),
    ],
)
def test_state_dicts_that_do_not_fit_are_named(change, message):
    spec, states = made("gru")
    with pytest.raises(UserError, match=message):
        WeightBatch.stack(spec, broken(states, change))


def test_other_bad_input():
    spec, states = made("mlp")
    batch = WeightBatch.stack(spec, states)
    with pytest.raises(UserError, match="no state dicts"):
        WeightBatch.stack(spec, [])
    with pytest.raises(UserError, match="WeightSpec is needed, got dict"):
        WeightBatch.stack({}, states)
    with pytest.raises(UserError, match="2 channels; choose one"):
        WeightBatch.join([batch, batch]).unstack()
    with pytest.raises(UserError, match="channel 1: the batch has 1"):
        batch.unstack(1)
    with pytest.raises(UserError, match="2 state dicts for a batch of 3"):
        batch.unstack(others=states[:2])
    with pytest.raises(UserError, match="batch 1 holds 2 networks along axis 0"):
        WeightBatch.join([batch, WeightBatch.stack(spec, states[:2])])
    with pytest.raises(UserError, match="'2.bias' has 2 networks along axis 0, '0.weight' has 3"):
        tensors = {key: torch.stack([s[key] for s in states]) for key in spec.axes}
        WeightBatch.stack(spec, {**tensors, "2.bias": tensors["2.bias"][:2]})
    with pytest.raises(UserError, match="'0.bias' has no channels|'0.weight' has no channels"):
        WeightBatch.stack(spec, batch.replace(batch.data[..., :0]).tensors(), channels=True)
    with pytest.raises(UserError, match="layer takes 4 channels, the batch has 1"):
        batch.expect(batch.layout, 4, "layer")
    with pytest.raises(UserError, match=r"data has shape \(3, 5, 1\), expected \[B, 17, C\]"):
        batch.replace(batch.data[:, :5]).expect(batch.layout, 1, "layer")
    with pytest.raises(UserError, match="another layout; they differ in: 0.weight"):
        batch.expect(Layout.of(spec.free("in")), 1, "layer")
    with pytest.raises(UserError, match="unknown part 'x'"):
        batch.view("x")
    with pytest.raises(UserError, match=r"'w' has shape \(0,\): axis 0 is empty"):
        from fleetgym.core import Axis

        Layout.of(WeightSpec({"w": (Axis(name="in", size=0),)}, {}))
