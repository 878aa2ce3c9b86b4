"""Specs of networks of every common kind, derived by running them on an example."""

import copy
import importlib.util
import json
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fleetgym.core import Axis, Element, UserError, WeightSpec
from fleetgym.core.tracing import operation
from fleetgym.core.tracing.run import OPERATIONS


class Basic(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.downsample = nn.ReLU(inplace=True), None
        if stride != 1 or before != width:
            self.downsample = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += skip
        return self.relu(out)


class ResNet(nn.Module):
    """The architecture of ResNet-18 for widths (64, 128, 256, 512) and two blocks a stage."""

    def __init__(self, widths=(64, 128, 256, 512), blocks=2):
        super().__init__()
        width = widths[0]
        self.conv1, self.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.stages = nn.ModuleList()
        for stage, wide in enumerate(widths):
            strides = [2 if stage else 1, *[1] * (blocks - 1)]
            self.stages.append(
                nn.Sequential(*[Basic(wide if i else width, wide, stride) for i, stride in enumerate(strides)])
            )
            width = wide
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d((1, 1)), nn.Linear(width, 10)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = stage(x)
        return self.fc(torch.flatten(self.avgpool(x), 1))


class Packed(nn.Module):
    """Attention with one projection for queries, keys and values, as image transformers write it."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, t, c = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        return self.proj((scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, t, c))


class Block(nn.Module):
    def __init__(self, width, heads, packed):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Packed(width, heads) if packed else nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        y = self.norm1(x)
        x = x + (self.attn(y) if isinstance(self.attn, Packed) else self.attn(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    def __init__(self, width=16, heads=4, depth=2, packed=False):
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.cls, self.pos = nn.Parameter(torch.zeros(1, 1, width)), nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList([Block(width, heads, packed) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 3)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class GruPolicy(nn.Module):
    """Images to actions through a CNN encoder and a GRU."""

    def __init__(self):
        super().__init__()
        self.cnn = nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 6, 3, 2), nn.ReLU(), nn.Flatten(),
                                 nn.Linear(6 * 9, 10), nn.Tanh())  # fmt: skip
        self.core, self.head = nn.GRU(10, 12, num_layers=2, batch_first=True), nn.Linear(12, 4)

    def forward(self, images, state=None):
        b, t = images.shape[:2]
        x, state = self.core(self.cnn(images.flatten(0, 1)).view(b, t, -1), state)
        return self.head(x), state


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.mid, self.last = (self.stage(*io) for io in ((3, 8), (8, 12), (16, 8)))
        self.up, self.smooth = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.out = nn.Conv2d(8, 2, 1)

    @staticmethod
    def stage(before, width):
        return nn.Sequential(nn.Conv2d(before, width, 3, padding=1), nn.GroupNorm(2, width), nn.SiLU())

    def forward(self, x):
        a = self.down(x)
        b = self.mid(F.avg_pool2d(a, 2))
        b = torch.tanh(self.up(b)) + F.interpolate(self.smooth(a), scale_factor=1.0)
        return self.out(self.last(torch.cat([a, b], dim=1)))


class DenseBlock(nn.Module):
    def __init__(self, growth=6):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(8 + growth * i), nn.ReLU(), nn.Conv2d(8 + growth * i, growth, 3, padding=1))
            for i in range(3)
        )
        self.fc = nn.Linear(8 + 3 * growth, 4)

    def forward(self, x):
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return self.fc(torch.cat(features, dim=1).mean(dim=(2, 3)))


class Separable(nn.Module):
    """Depthwise, depthwise with two filters a channel, and grouped convolutions."""

    def __init__(self):
        super().__init__()
        self.a, self.deep, self.norm = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8)
        self.b, self.twice = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 24, 3, groups=12)
        self.c, self.grouped, self.fc = nn.Conv2d(24, 8, 1), nn.Conv2d(8, 12, 1, groups=4), nn.Linear(12 * 16, 3)

    def forward(self, x):
        x = F.relu6(self.norm(self.deep(torch.tanh(self.a(x)))))
        x = F.relu(self.c(F.relu(self.twice(F.relu(self.b(x))))))
        return self.fc(F.relu(self.grouped(x)).flatten(1))


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.W, self.b, self.c = (nn.Parameter(torch.randn(*shape)) for shape in ((7, 5), (7,), (5,)))

    def forward(self, x):
        return F.linear(torch.tanh(F.linear(x, self.W, self.b)), self.W.t(), self.c)


class LanguageModel(nn.Module):
    """An LSTM between an embedding and an output layer that share their matrix."""

    def __init__(self):
        super().__init__()
        self.embed, self.core, self.out = nn.Embedding(11, 8), nn.LSTM(8, 6, batch_first=True), nn.Linear(8, 11)
        self.back = nn.Linear(6, 8)
        self.out.weight = self.embed.weight

    def forward(self, tokens):
        return self.out(self.back(self.core(self.embed(tokens))[0]))


class CellLoop(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.encoder, self.cell, self.head = nn.Linear(5, 6), cell(6, 7), nn.Linear(7, 2)

    def forward(self, x):
        h = torch.zeros(len(x), 7, dtype=x.dtype)
        state, out = (h, torch.zeros_like(h)) if isinstance(self.cell, nn.LSTMCell) else h, []
        for t in range(x.shape[1]):
            state = self.cell(torch.tanh(self.encoder(x[:, t])), state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(out, dim=1))


class HandGru(nn.Module):
    """The equations of a GRU, written out."""

    def __init__(self):
        super().__init__()
        self.input, self.hidden, self.head = nn.Linear(5, 21), nn.Linear(7, 21), nn.Linear(7, 2)

    def forward(self, x):
        h = x.new_zeros(len(x), 7)
        for t in range(x.shape[1]):
            (a, b, c), (d, e, f) = self.input(x[:, t]).chunk(3, -1), self.hidden(h).chunk(3, -1)
            r, z = torch.sigmoid(a + d), torch.sigmoid(b + e)
            h = (1 - z) * torch.tanh(c + r * f) + z * h
        return self.head(h)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.gate, self.b = nn.Linear(5, 16), nn.RMSNorm(8), nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.b(self.norm(F.glu(self.a(x), dim=-1)) * F.silu(self.gate(x)))


class EinsumAttention(nn.Module):
    """Grouped queries, a temperature for each head, a causal mask, and everything by einsum."""

    def __init__(self, width=12, heads=4, shared=2):
        super().__init__()
        self.heads, self.shared, self.embed = heads, shared, nn.Linear(5, width)
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, 6), nn.Linear(width, 6)
        self.out, self.temperature = nn.Linear(width, 3), nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x):
        x = self.embed(x)
        b, t, c = x.shape
        q = self.q(x).view(b, t, self.heads, -1)
        k, v = (y.view(b, t, self.shared, -1).repeat_interleave(2, dim=2) for y in (self.k(x), self.v(x)))
        scores = torch.einsum("bthd,bshd->bhts", q, k) * self.temperature
        scores = scores.masked_fill(torch.ones(t, t, dtype=torch.bool).triu(1), -torch.inf).softmax(-1)
        return self.out(torch.einsum("bhts,bshd->bthd", scores, v).reshape(b, t, c))


class Signals(nn.Module):
    """Convolutions and norms over one and three dimensions, a pad, a shuffle of pixels, a normal over [C, L]."""

    def __init__(self):
        super().__init__()
        self.a, self.norm1, self.b = nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8, affine=True), nn.Conv1d(8, 4, 1)
        self.norm2, self.act, self.fc = nn.LayerNorm([4, 8]), nn.PReLU(4), nn.Linear(32, 6)
        self.c, self.norm3, self.d = nn.ConvTranspose3d(6, 8, 1), nn.BatchNorm3d(8), nn.Conv3d(8, 8, 1)
        self.e = nn.Conv2d(2, 3, 1)

    def forward(self, x):
        x = self.act(self.norm2(self.b(torch.tanh(self.norm1(self.a(F.pad(x, (1, 1))))))))
        x = torch.tanh(self.fc(x.flatten(1)))[:, :, None, None, None]
        x = F.adaptive_avg_pool3d(self.d(torch.tanh(self.norm3(self.c(x)))), 1).squeeze(-1)
        return self.e(F.pixel_shuffle(F.relu(x), 2))


def encoder_layer():
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    return nn.Sequential(nn.Linear(5, 16), layer, nn.Linear(16, 2))


def image(n=2, size=8):
    return torch.randn(n, 3, size, size)


def steps():
    return torch.randn(2, 4, 5)


HEADS = [4, 16, 16]  # heads, channels of queries and keys, channels of values
# Network, example, the sizes of its groups, how many of them are signed.
CASES = {
    "resnet18": (ResNet, lambda: image(1, 32), [64] * 3 + [128] * 3 + [256] * 3 + [512] * 3, 0),
    "vit": (ViT, image, [16] + 2 * [32, *HEADS], 4),
    "vit-packed": (lambda: ViT(packed=True), image, [16] + 2 * [32, *HEADS], 4),
    "transformer-layer": (encoder_layer, steps, [16, 32, *HEADS], 2),
    "gru-cnn": (GruPolicy, lambda: torch.randn(2, 3, 3, 16, 16), [8, 6, 10, 12, 12], 3),
    "unet": (UNet, image, [2, 8] * 2 + [2, 12] + [8], 1),
    "dense-block": (DenseBlock, image, [8, 6, 6, 6], 1),
    "separable": (Separable, lambda: image(2, 6), [8, 12, 24, 4, 12], 0),
    "tied-autoencoder": (TiedAutoencoder, lambda: torch.randn(4, 5), [7], 1),
    "lstm-embedding": (LanguageModel, lambda: torch.randint(0, 11, (2, 6)), [8, 6], 2),
    "gru-cell": (lambda: CellLoop(nn.GRUCell), steps, [6, 7], 2),
    "lstm-cell": (lambda: CellLoop(nn.LSTMCell), steps, [6, 7], 2),
    "rnn-cell": (lambda: CellLoop(nn.RNNCell), steps, [6, 7], 2),
    "hand-gru": (HandGru, steps, [7], 1),
    "gated": (Gated, steps, [8], 1),
    "einsum-attention": (EinsumAttention, steps, [12, 2], 1),
    "signals": (Signals, lambda: torch.randn(2, 3, 8), [8, 4, 6, 8, 2], 3),
}


def derived(name):
    torch.manual_seed(0)
    make, example, *_ = CASES[name]
    module, x = make(), example()
    return module, x, WeightSpec.from_module(module, x)


@pytest.mark.parametrize("name", CASES)
def test_a_random_element_leaves_the_function_alone(name):
    module, x, spec = derived(name)
    sizes, signed = CASES[name][2:]
    if sizes is not None:
        assert sorted(spec.groups.values()) == sorted(sizes), spec
    if signed is not None:
        assert sum(spec.signed.values()) == signed, spec.signed
    assert spec.verify(module, x) < 1e-5
    module.double()
    x = x.double() if x.is_floating_point() else x
    assert spec.verify(module, x, 1) < 1e-12
    weights = module.state_dict()
    element = spec.random(0)
    moved = spec.apply(weights, element)
    assert any(not torch.equal(moved[key], weights[key]) for key in weights)
    for group in spec.groups if name != "resnet18" else ():  # each group (and what is nested with it) moves something
        if group not in spec.nested.values():
            parent = spec.nested.get(group, group)
            fixed = spec.fix(*[g for g in spec.groups if parent not in (g, spec.nested.get(g))])
            others = [fixed.apply(weights, fixed.random(seed)) for seed in range(4)]
            assert any(not torch.equal(one[key], weights[key]) for one in others for key in weights)
    assert WeightSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_the_two_ways_of_tracing_agree():
    # The symbolic trace needs no example and knows fewer operations; what both know they must see alike.
    place = Path(__file__).with_name("test_weights.py")
    found = importlib.util.spec_from_file_location("weights_of_policies", place)
    other = importlib.util.module_from_spec(found)
    found.loader.exec_module(other)
    for name, make in other.CASES.items():
        module = make()
        assert WeightSpec.from_module(module, torch.randn(3, 7, 5)) == WeightSpec.from_module(module), name


def test_axes_of_a_resnet():
    torch.manual_seed(0)
    spec = WeightSpec.from_module(ResNet((4, 6, 8, 10)), image())
    stream, inner = Axis("stages.1.0.conv2"), Axis("stages.1.1.conv1")
    fixed = Axis(name="fixed", size=3)
    assert spec.axes["stages.1.1.conv1.weight"] == (inner, stream, fixed, fixed)
    assert spec.axes["stages.1.0.downsample.0.weight"][:2] == (stream, Axis("conv1"))
    for statistic in ("weight", "bias", "running_mean", "running_var"):
        assert spec.axes[f"stages.1.1.bn2.{statistic}"] == (stream,)
    assert spec.axes["stages.1.1.bn2.num_batches_tracked"] == ()
    assert spec.axes["fc.weight"] == (Axis(name="out", size=10), Axis("stages.3.0.conv2"))
    assert spec.axes["conv1.weight"][1] == Axis(name="in", size=3)


def test_a_flattened_feature_map_has_its_pixels_inside_its_channels():
    module, x, spec = derived("gru-cnn")
    assert spec.axes["cnn.5.weight"] == (Axis("cnn.5", signs=(True,)), Axis("cnn.2", inner=9))
    assert spec.memory == (1,)
    element = spec.random(0)
    index = (element.perms["cnn.2"][:, None] * 9 + torch.arange(9)).flatten()
    moved = spec.apply(module.state_dict(), element)
    rows, signs = element.perms["cnn.5"], element.signs["cnn.5"][:, None]
    assert torch.equal(moved["cnn.5.weight"], module.cnn[5].weight[rows][:, index] * signs)


def test_axes_of_attention():
    module, x, spec = derived("vit")
    heads, qk, v = (f"blocks.0.attn.{name}" for name in ("heads", "qk", "v"))
    assert spec.nested[qk] == spec.nested[v] == heads
    assert [spec.groups[g] for g in (heads, qk, v)] == HEADS
    signed = (True,)
    parts = (Axis(qk, 2, signed * 2), Axis(v, 1, signed))
    assert spec.axes["blocks.0.attn.in_proj_weight"] == (Axis(parts=parts), Axis("patch"))
    assert spec.axes["blocks.0.attn.out_proj.weight"] == (Axis("patch"), Axis(v, 1, signed))
    assert spec.axes["cls"][-1] == spec.axes["pos"][-1] == Axis("patch")
    element = spec.random(3)
    place = element.perms[qk].view(4, 4)
    assert torch.equal(place // 4, element.perms[heads][:, None].expand(4, 4))
    assert len({tuple(row) for row in (place % 4).tolist()}) > 1  # heads order their channels each in its own way
    # A permutation of heads alone takes their channels along, and is a symmetry, too.
    moved = spec.permute(module.state_dict(), {heads: torch.tensor([2, 0, 3, 1])})
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(module, moved, (x,)), module(x))
    bad = {**element.perms, qk: torch.roll(element.perms[qk], 1)}
    with pytest.raises(UserError, match="does not move whole blocks as 'blocks.0.attn.heads'"):
        spec.apply(module.state_dict(), Element(bad, element.signs))


def test_groups_of_a_group_normalisation_and_of_grouped_convolutions():
    _, _, spec = derived("unet")
    assert spec.nested["down.0"] == "down.1.groups" and spec.groups["down.1.groups"] == 2
    assert spec.axes["down.1.weight"] == (Axis("down.0"),)
    _, _, spec = derived("separable")
    assert spec.axes["deep.weight"][:2] == (Axis("a"), Axis(name="fixed", size=1))
    assert spec.nested == {"twice": "b", "grouped": "grouped.groups"}
    assert spec.axes["c.weight"][0] == Axis("grouped.groups", inner=2)  # inputs of a grouped one: whole groups only
    assert spec.axes["fc.weight"][1] == Axis("grouped", inner=16)


def test_group_laws_hold_for_nested_groups():
    _, _, spec = derived("vit")
    weights = {key: torch.randn(shape) for key, shape in spec.shapes.items()}
    for seed in range(3):
        rng = np.random.default_rng(seed)
        g, h = spec.random(rng), spec.random(rng)
        assert g @ g.inverse() == spec.identity() == g.inverse() @ g
        spec.check_element(g @ h)
        spec.check_element(g.inverse())
        two, one = spec.apply(spec.apply(weights, h), g), spec.apply(weights, g @ h)
        assert all(torch.equal(two[key], one[key]) for key in weights)


def test_fixed_groups_stay():
    module, x, spec = derived("vit")
    less = spec.fix("patch", "blocks.0.attn.v")
    assert set(spec.groups) - set(less.groups) == {"patch", *(f"blocks.0.attn.{n}" for n in ("heads", "qk", "v"))}
    assert less.shapes == spec.shapes and less.verify(module, x) < 1e-5
    moved = less.apply(module.state_dict(), less.random(0))
    assert torch.equal(moved["blocks.0.attn.in_proj_weight"], module.blocks[0].attn.in_proj_weight)
    assert not torch.equal(moved["blocks.1.attn.in_proj_weight"], module.blocks[1].attn.in_proj_weight)
    with pytest.raises(UserError, match="unknown group 'patches'; nearest: .*'patch'"):
        spec.fix("patches")


class Middle(nn.Module):
    """Two layers with a function of the hidden units between them."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.function = nn.Linear(4, 6), nn.Linear(6, 2), function

    def forward(self, x):
        return self.b(self.function(self.a(x)))


@pytest.mark.parametrize(
    ("function", "signed"),
    [
        (torch.tanh, True),
        (lambda h: h, True),
        (lambda h: 2 * h - h / 3 + 0, True),
        (lambda h: h.sin() + h**3, True),
        (lambda h: F.hardtanh(h), True),
        (lambda h: h * h.abs() + h * h.square().mean(-1, keepdim=True), True),
        (lambda h: F.normalize(h, dim=-1), True),
        (lambda h: h.clamp(-0.1, 2), False),
        (torch.relu, False),
        (F.gelu, False),
        (lambda h: h + 1, False),
        (lambda h: h - h.mean(-1, keepdim=True), False),
        (lambda h: h.softmax(-1) * h.amax(-1, keepdim=True), False),
        (lambda h: torch.where(h > 0, h, 0 * h), False),
        (lambda h: torch.max(h, other=2 * h), False),
        (lambda h: h * torch.sigmoid(h), False),
        (lambda h: F.layer_norm(h, (6,)), False),
    ],
)
def test_signs_hold_for_odd_functions_only(function, signed):
    torch.manual_seed(0)
    module, x = Middle(function).double(), torch.randn(5, 4).double()
    spec = WeightSpec.from_module(module, x)
    assert spec.groups == {"a": 6} and spec.signed == {"a": signed}
    if not signed:  # the flip that was refused is none
        more = WeightSpec(spec.axes, spec.groups, {"a": True}, inputs=spec.inputs)
        flips = {k: tuple(Axis("a", signs=(True,)) if a.group else a for a in v) for k, v in spec.axes.items()}
        with pytest.raises(UserError, match="moves the output"):
            WeightSpec(flips, more.groups, more.signed).verify(module, x)


def test_rounding_down_is_not_odd():
    module, x = Middle(lambda h: torch.div(h, 0.1, rounding_mode="floor")).double(), torch.randn(5, 4).double()
    for example in (None, x):
        spec = WeightSpec.from_module(module, example)
        assert spec.groups == {"a": 6} and spec.signed == {"a": False} and spec.verify(module, x) < 1e-12


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("cumsum", lambda h: torch.cumsum(h, -1)),
        ("roll", lambda h: h.roll(1, dims=-1)),
        ("flip", lambda h: h.flip(-1)),
        ("flip", lambda h: h.flip(1, 0)),
        ("roll", lambda h: h.roll(0)),
        ("diff", lambda h: F.pad(h.diff(1), (1, 0))),
        ("fft_fft", lambda h: torch.fft.fft(h).real),
        ("tril", torch.tril),
        ("unfold", lambda h: h.unfold(1, 2, 2).sum(-1).repeat(1, 2)),
        ("matrix_exp", lambda h: h * torch.matrix_exp(h[:4, :4]).sum()),
        ("cdist", lambda h: torch.cdist(h, torch.randn(6, 6))),
        ("item", lambda h: h * h.mean().item()),
        ("bool", lambda h: h if h.sum() > 0 else -h),
        ("pad", lambda h: F.pad(h[:, None], (1, 1), mode="circular")[:, 0, 1:-1]),
    ],
)
def test_what_breaks_the_symmetry_is_refused_by_name(name, function):
    outer = nn.Sequential(nn.Linear(4, 4), Middle(function))
    with pytest.raises(UserError, match=rf"'{name}' \(?in 1\)?.*by hand"):
        WeightSpec.from_module(outer, torch.randn(5, 4))


@pytest.mark.parametrize(
    "function",
    [
        lambda h: h * torch.arange(6.0),
        lambda h: h.sort(-1)[0],
        lambda h: torch.cat([h[:, ::2], h[:, 1::2]], dim=1),
        lambda h: h[:, [1, 0, 3, 2, 5, 4]],
        lambda h: h.gather(1, torch.arange(6).expand(5, 6)),
    ],
)
def test_what_tells_units_apart_fixes_them(function):
    module, x = Middle(function), torch.randn(5, 4)
    assert WeightSpec.from_module(module, x).groups == {}


def test_groups_of_a_convolution_that_cut_through_its_inputs_fix_them():
    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(2, 3, 1), nn.Conv2d(2, 5, 1)
            self.grouped, self.head = nn.Conv2d(8, 8, 3, groups=2), nn.Linear(8, 2)

        def forward(self, x):
            both = torch.tanh(torch.cat([self.a(x), self.b(x)], 1))
            return self.head(self.grouped(both).mean((2, 3)))

    assert WeightSpec.from_module(Cut(), torch.randn(2, 2, 5, 5)).groups == {"grouped[0:4]": 4, "grouped[4:8]": 4}


def test_a_tensor_with_two_names_has_one_set_of_axes():
    module, x = nn.Sequential(*[nn.Linear(8, 8), nn.Tanh()] * 2, nn.Linear(8, 2)), torch.randn(5, 8)
    module = copy.deepcopy(module)
    module[2] = nn.Linear(8, 8)
    apart = WeightSpec.from_module(module)
    assert apart.groups == {"0": 8, "2": 8} and apart.verify(module) < 1e-5
    module[2].weight = module[0].weight
    for example in (None, x):
        spec = WeightSpec.from_module(module, example)
        assert spec.groups == {} and spec.verify(module) == 0
    with pytest.raises(UserError, match="'0.weight' and '2.weight' are one tensor; give them the same axes"):
        apart.verify(module)


def test_a_slice_splits_a_group():
    module, x = Middle(lambda h: torch.cat([torch.tanh(h[:, :2]), F.relu(h[:, 2:])], dim=1)), torch.randn(5, 4)
    spec = WeightSpec.from_module(module, x)
    assert spec.groups == {"a[0:2]": 2, "a[2:6]": 4} and spec.signed == {"a[0:2]": True, "a[2:6]": False}


def test_without_strictness_less_is_found_and_it_is_right():
    module, x = Middle(torch.tril), torch.randn(5, 4)
    spec = WeightSpec.from_module(nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 4), module), x, strict=False)
    assert spec.groups == {"0": 7, "2": 4}


def test_an_operation_can_be_taught():
    @operation("cdist")
    def _cdist(run, out, a, b, *_, **__):
        for value in (run.value(a), run.value(b)):
            value.pin()

    try:
        module = Middle(lambda h: torch.cdist(h, torch.ones(6, 6)))
        assert WeightSpec.from_module(module, torch.randn(5, 4)).groups == {}
    finally:
        OPERATIONS.pop("cdist")


def test_a_wrong_rule_is_found_out_by_the_module_itself():
    OPERATIONS["tril"] = OPERATIONS["tanh"]
    try:
        with pytest.raises(UserError, match="moves the output"):
            WeightSpec.from_module(Middle(torch.tril), torch.randn(5, 4))
    finally:
        OPERATIONS.pop("tril")


@pytest.mark.parametrize("statistic", ["weight", "bias", "running_mean", "running_var"])
def test_fresh_batch_statistics_hide_no_wrong_axis(statistic):
    # In a new network all entries of these are equal; the proof disturbs them first.
    torch.manual_seed(0)
    module, x = ResNet((4, 6), 1), image(2, 16)
    spec = WeightSpec.from_module(module, x)
    wrong = WeightSpec({**spec.axes, f"bn1.{statistic}": (Axis(name="fixed", size=4),)}, spec.groups, spec.signed)
    assert wrong.check(module, x) < 1e-5 < wrong.check(module, x, stir=True)
    with pytest.raises(UserError, match="moves the output"):
        wrong.verify(module, x)
    assert spec.verify(module, x) < 1e-5


def test_a_spec_written_by_hand():
    class Strange(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x):
            h = torch.tanh(self.a(x))
            return self.b(h) if float(x.sum()) > 0 else -self.b(h)

    module, x = Strange(), torch.randn(5, 4)
    with pytest.raises(UserError, match="reads values of tensors.*WeightSpec"):
        WeightSpec.from_module(module, x)
    unit, fixed = Axis("hidden", signs=(True,)), Axis(name="fixed", size=2)
    axes = {"a.weight": (unit, Axis(name="in", size=4)), "a.bias": (unit,), "b.weight": (fixed, unit),
            "b.bias": (fixed,)}  # fmt: skip
    assert WeightSpec(axes, {"hidden": 6}, {"hidden": True}).verify(module, x) < 1e-5
    with pytest.raises(UserError, match="moves the output"):
        WeightSpec({**axes, "a.bias": (Axis(name="fixed", size=6),)}, {"hidden": 6}, {"hidden": True}).verify(module, x)
    with pytest.raises(UserError, match=r"expected \(5, 4\)"):
        WeightSpec(axes, {"hidden": 5}).verify(module, x)
    with pytest.raises(UserError, match="no axis carries group 'more'"):
        WeightSpec(axes, {"hidden": 6, "more": 3}).verify(module, x)
    with pytest.raises(UserError, match="unknown group of an axis 'hidden'"):
        WeightSpec(axes, {"hiden": 6}).verify(module, x)


def test_memory_in_the_example_must_be_zero():
    module = GruPolicy()
    images = torch.randn(2, 3, 3, 16, 16)
    spec = WeightSpec.from_module(module, (images, torch.zeros(2, 2, 12)))
    assert spec.memory == (1,) and spec.signed["core.1"]
    with pytest.raises(UserError, match="give zeros"):
        WeightSpec.from_module(module, (images, torch.randn(2, 2, 12)))


def test_a_cell_that_is_given_its_memory_returns_it_moved():
    class Step(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.head = nn.GRUCell(5, 6), nn.Linear(6, 2)

        def forward(self, x, h):
            h = self.cell(x, h)
            return self.head(h), h

    spec = WeightSpec.from_module(Step(), (torch.randn(3, 5), torch.zeros(3, 6)))
    assert spec.groups == {"cell": 6} and spec.memory == (1,)


def test_running_leaves_the_module_and_the_generator_as_they_were():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.ReLU(), nn.Flatten(),
                           nn.Linear(64, 2))  # fmt: skip
    module[1].eval()
    kept, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    WeightSpec.from_module(module, torch.ones(2, 3, 6, 6))
    assert module.training and not module[1].training and module[2].training
    assert all(torch.equal(value, kept[key]) for key, value in module.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    with pytest.raises(UserError, match="cannot run Sequential on the example .in 0.: RuntimeError"):
        WeightSpec.from_module(module, torch.ones(2, 1, 6, 6))
    assert module.training and not module[1].training


@pytest.mark.parametrize("kind", ["mlp", "discrete", "images"])
def test_policies_of_stable_baselines3(kind):
    policies = pytest.importorskip("stable_baselines3.common.policies")
    torch.manual_seed(0)
    action = gym.spaces.Discrete(3) if kind == "discrete" else gym.spaces.Box(-1, 1, (2,))
    if kind == "images":
        space, x = gym.spaces.Box(0, 255, (3, 36, 36), np.uint8), torch.randint(0, 255, (2, 3, 36, 36))
        policy = policies.ActorCriticCnnPolicy(space, action, lambda _: 1e-3)
    else:
        space, x = gym.spaces.Box(-1, 1, (5,)), torch.randn(4, 5)
        policy = policies.ActorCriticPolicy(space, action, lambda _: 1e-3)
    spec = WeightSpec.from_module(policy, x)  # actions (drawn), values, log-probabilities
    if kind == "images":
        cnn = "features_extractor.cnn"
        assert spec.groups == {f"{cnn}.0": 32, f"{cnn}.2": 64, f"{cnn}.4": 64, "features_extractor.linear.0": 512}
        assert not any(spec.signed.values())
    else:
        nets = ("policy_net", "value_net")
        assert spec.groups == {f"mlp_extractor.{net}.{i}": 64 for net in nets for i in (0, 2)}
        assert all(spec.signed.values())
