"""Matching and merging of convolutional networks and transformers."""

from itertools import permutations, product

import pytest
import torch
from torch import nn

from fleetgym.core import WeightSpec
from fleetgym.core.errors import UserError
from fleetgym.merging import correlations, match, match_many, merge
from fleetgym.merging.matching import Problem


class Residual(nn.Module):
    def __init__(self, before, width, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.skip = nn.Sequential(nn.Conv2d(before, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return torch.relu(self.skip(x) + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class SmallResNet(nn.Module):
    """Ends in a flattened feature map, whose pixels stay while its channels move."""

    def __init__(self, widths=(16, 24, 32)):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.body = nn.Sequential(*[Residual(*io, 2) for io in zip(widths, widths[1:])])
        self.head = nn.Linear(widths[-1] * 4, 5)

    def forward(self, x):
        return self.head(self.body(self.stem(x)).flatten(1))


class SmallViT(nn.Module):
    def __init__(self, width=32, heads=4, layers=2):
        super().__init__()
        self.patch, self.cls = nn.Conv2d(3, width, 4, 4), nn.Parameter(torch.randn(1, 1, width))
        self.pos = nn.Parameter(0.1 * torch.randn(1, 17, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, 48, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], dim=1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


NETS = {"resnet": SmallResNet, "vit": SmallViT}
WIDE = {
    "wide": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(768, 256), nn.Tanh(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 5)
    )
}
TINY = {"tiny-resnet": lambda: SmallResNet((8, 8, 12)), "tiny-vit": lambda: SmallViT(16, 2, 1)}


def example():
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))


def make(name, seed):
    """A network whose norms, statistics and biases have been trained a little, so to say, and its spec."""
    torch.manual_seed(seed)
    net = {**NETS, **WIDE, **TINY}[name]()
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            if tensor.dim() == 1:
                tensor += 0.1 * torch.rand(tensor.shape) if "var" in key else 0.1 * torch.randn(tensor.shape)
    return net.eval(), WeightSpec.from_module(net, example())


def planted(name, seed, noise):
    """Weights, a noisy copy moved by a random element, the element that moves it back, and the noise's distance."""
    net, spec = make(name, seed)
    weights = net.state_dict()
    generator = torch.Generator().manual_seed(seed + 1000)
    noisy = {
        key: v + noise * v.std() * torch.randn(v.shape, generator=generator) if v.numel() > 1 else v
        for key, v in weights.items()
    }
    element = spec.random(seed + 100)
    return net, spec, spec.apply(noisy, element), element.inverse(), spec.distance(weights, noisy)


@pytest.mark.parametrize("method", ["lap", "frank_wolfe"])
@pytest.mark.parametrize("name", [*NETS, "wide"])
def test_a_planted_element_is_fully_recovered(name, method):
    for seed, noise in ((0, 0.05), (1, 1.0)):
        net, spec, moved, truth, distance = planted(name, seed, noise)
        result = match(spec, net.state_dict(), moved, method)
        assert result.element == truth  # every channel, head and sign
        assert result.distance_after == pytest.approx(distance, rel=1e-5) and result.distance_after > 0
    if name in ("vit", "wide"):
        assert not any(len(set(truth.signs[g].tolist())) == 1 for g in spec.groups if spec.signed[g])


@pytest.mark.parametrize("name", TINY)
def test_sinkhorn_recovers_it_too(name):
    net, spec, moved, truth, _ = planted(name, 0, 0.05)
    assert match(spec, net.state_dict(), moved, "sinkhorn", steps=60).element == truth


@pytest.mark.parametrize("name", NETS)
def test_the_objective_is_the_distance(name):
    # F counts every tensor with every axis of its: ||ref - g theta||^2 = const - 2 F(g) for any element.
    net, spec = make(name, 0)
    other, _ = make(name, 1)
    a, b = ({k: v.double() for k, v in n.state_dict().items()} for n in (net, other))
    problem = Problem.build(spec, a, b)
    moving = [k for k in spec.cost_keys if not all(axis.fixed for axis in spec.axes[k])]
    values = []
    for seed in range(3):
        element = spec.random(seed)
        vertex = {g: (element.perms[g][None], element.signs[g][None].double()) for g in spec.groups}
        moved = spec.apply(b, element)
        # Stretches in which nothing moves count in the distance only, the same for every element.
        values.append(sum(float((a[k] * moved[k]).sum()) for k in moving) - float(problem.value_at(vertex)))
        dense = problem.dense(vertex)
        gradient, exact = problem.gradient(dense), problem.gradient_at(vertex)
        assert all(torch.allclose(gradient[g], exact[g]) for g in gradient)
    assert max(values) - min(values) < 1e-9 * max(1.0, abs(values[0]))


def test_blocks_are_assigned_with_what_is_in_them():
    # Three heads of two channels: the best whole is found where the best of the heads alone would be another.
    problem = Problem(
        {"heads": 3, "c": 6},
        {"heads": False, "c": True},
        {"heads": torch.zeros(1, 1, 3, 3).double(), "c": torch.zeros(1, 2, 6, 6).double()},
        nested={"c": "heads"},
    )
    generator = torch.Generator().manual_seed(0)
    gradient = {
        "heads": torch.randn(4, 1, 3, 3, generator=generator).double(),
        "c": torch.randn(4, 2, 6, 6, generator=generator).double(),
    }
    vertex = problem.assign(gradient)
    found = problem.inner_at(gradient, vertex)
    best = torch.full((4,), -torch.inf).double()
    for order in permutations(range(3)):
        for inside in product(permutations(range(2)), repeat=3):
            perm = torch.tensor([2 * h + i for h, two in zip(order, inside) for i in two]).expand(4, 6)
            turn = gradient["c"][:, 1].gather(2, perm[..., None]).squeeze(-1).sign()
            trial = {"heads": (torch.tensor(order).expand(4, 3), torch.ones(4, 3).double()), "c": (perm, turn)}
            best = torch.maximum(best, problem.inner_at(gradient, trial))
    assert torch.allclose(found, best)
    blocks = vertex["c"][0].view(4, 3, 2) // 2
    assert torch.equal(blocks, vertex["heads"][0][..., None].expand(4, 3, 2))


@pytest.mark.parametrize("name", NETS)
def test_moved_copies_merge_into_the_network_itself(name):
    net, spec = make(name, 0)
    weights = net.state_dict()
    copies = [spec.apply(weights, spec.random(seed)) for seed in range(3)]
    result = merge("fleet_merge", (spec, [weights, *copies]))
    assert result.distance_after < 1e-8 * result.distance_before
    x = torch.randn(4, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.functional_call(net, result.weights, (x,)), net(x))
        naive = torch.func.functional_call(net, merge("average", (spec, [weights, *copies])).weights, (x,))
    assert float((naive - net(x)).abs().max()) > 0.1


@pytest.mark.parametrize("name", TINY)
def test_modules_are_merged_with_an_example(name):
    (net, spec), (other, _) = make(name, 0), make(name, 1)
    result = merge("fleet_merge", [net, other], example_input=example())
    assert result.spec == spec
    expected = merge("fleet_merge", (spec, [net.state_dict(), other.state_dict()])).weights
    assert all(torch.equal(value, expected[key]) for key, value in result.module().state_dict().items())
    with pytest.raises(UserError, match="pass example_input"):
        merge("fleet_merge", [net, other])
    with pytest.raises(UserError, match="leave one out"):
        merge("average", (spec, [net.state_dict(), other.state_dict()]), example_input=example())


@pytest.mark.parametrize("name", TINY)
def test_every_matcher_moves_blocks_and_pixels(name):
    net, spec, moved, truth, distance = planted(name, 0, 0.05)
    assert match(spec, net.state_dict(), moved, "git_rebasin").distance_after <= 1.5 * distance
    (pair, other) = match_many(spec, [net.state_dict(), moved], [moved, net.state_dict()])
    assert pair.element == truth and other.element == truth.inverse()
    assert merge("universe", (spec, [net.state_dict(), moved])).distance_after == pytest.approx(distance, rel=1e-4)
    unrelated = (spec, [make(name, seed)[0].state_dict() for seed in range(3)])
    joint, sequential = (merge(method, unrelated) for method in ("universe", "fleet_merge"))
    assert joint.distance_after <= sequential.distance_after < sequential.distance_before


def test_units_with_pixels_are_matched_by_what_they_do():
    net, spec, moved, truth, _ = planted("tiny-resnet", 0, 0.0)
    seen = correlations(spec, net, net.state_dict(), moved, example())
    assert match(spec, net.state_dict(), moved, "activations", correlations=seen).element == truth


def test_batch_statistics_are_aligned_and_averaged():
    net, spec = make("resnet", 0)
    weights = {k: v.clone() for k, v in net.state_dict().items()}
    other = {k: v.clone() for k, v in weights.items()}
    other["stem.1.running_var"] += 1.0
    other["stem.1.running_mean"] -= 1.0
    other["stem.1.num_batches_tracked"] += 7
    result = merge("fleet_merge", (spec, [weights, spec.apply(other, spec.random(0))]))
    torch.testing.assert_close(result.weights["stem.1.running_var"], weights["stem.1.running_var"] + 0.5)
    torch.testing.assert_close(result.weights["stem.1.running_mean"], weights["stem.1.running_mean"] - 0.5)
    assert int(result.weights["stem.1.num_batches_tracked"]) == 0
    # Norms are restored to the weights only: stretched by as much, a variance would be wrong.
    unrelated = make("resnet", 1)[0].state_dict()
    result = merge("fleet_merge", (spec, [weights, unrelated]))
    assert result.history[-1]["norm_factor"] > 1.05
    for key in ("stem.1.running_mean", "body.1.bn2.running_var"):
        torch.testing.assert_close(result.weights[key], sum(state[key] for state in result.aligned) / 2)
