import numpy as np
import pytest
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import Axis, Element, UserError, WeightSpec
from fleetgym.merging.functionals import Layout, NFLinear, UNFLinear, WeightBatch
from fleetgym.merging.functionals.linear import grouped
from fleetgym.merging.functionals.partitions import Plan
from fleetgym.merging.functionals.reference import TermByTerm


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        return self.head(x + self.attention(x, x, x, need_weights=False)[0])


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.inner = nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 3)
        self.last, self.head = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.first(x)
        return self.head(x + self.last(torch.relu(self.inner(self.norm(x)))))


class Cell(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.core, self.head = cell(2, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.core(x)[0])


def mlp(*sizes):
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return WeightSpec.from_module(nn.Sequential(*layers[:-1]))


def conv(*, bias=True):
    layers = nn.Conv2d(1, 3, 2, bias=bias), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return WeightSpec.from_module(nn.Sequential(*layers, nn.Linear(2, 2)), torch.zeros(1, 1, 4, 4))


def unsigned(spec):
    return WeightSpec(spec.axes, spec.groups, buffers=spec.buffers, nested=spec.nested)


MAKERS = {
    "np": lambda: mlp(2, 3, 3, 2).free("in", "out"),
    "hnp": lambda: mlp(2, 3, 3, 2),
    "one output": lambda: mlp(2, 3, 1).free("in", "out"),
    "rnn": lambda: WeightSpec.from_module(Cell(nn.RNN)).free("in", "out"),
    "gru": lambda: WeightSpec.from_module(Cell(nn.GRU)).free("in", "out"),
    "conv": lambda: conv().free("in", "out"),
    "conv hnp": conv,
    "layer norm": lambda: WeightSpec.from_module(Residual()).free("in", "out"),
    "attention": lambda: WeightSpec.from_module(Attention(), torch.zeros(1, 3, 2)).free("in", "out"),
    "cube": lambda: WeightSpec({"w": (Axis("h"), Axis("h"), Axis("h")), "v": (Axis("h"),)}, {"h": 4}),
}
# What the paper's formula, the enumeration here and the orbits counted below agree on.
COUNTS = {"np": 62, "hnp": 114}


def spec_of(name):
    torch.manual_seed(0)
    return unsigned(MAKERS[name]())


def random_batch(layout, channels=2, n=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return WeightBatch(layout, torch.randn(n, layout.size, channels, generator=generator, dtype=torch.float64))


def layer_of(spec, c_in=2, c_out=3, kind=UNFLinear, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    layer = kind(spec, c_in, c_out, generator=generator, **options).double()
    if layer.bias is not None:
        nn.init.normal_(layer.bias, generator=generator)
    return layer


def equivariance_error(layer, spec):
    x = random_batch(layer.layout, layer.c_in)
    element = spec.random(1)
    there, back = layer(x.apply(element)).data, layer(x).apply(element).data
    return float((there - back).detach().abs().max())


@pytest.mark.parametrize("name", MAKERS)
def test_equivariance(name):
    spec = spec_of(name)
    layer = layer_of(spec)
    assert equivariance_error(layer, spec) < 1e-10
    # Negative control: exchanging two scalars that the symmetry does not exchange alone is noticed.
    x = random_batch(layer.layout)
    order = torch.arange(layer.layout.size)
    order[:2] = order[:2].flip(0)
    there, back = layer(x.replace(x.data[:, order])).data, layer(x).data[:, order]
    assert float((there - back).detach().abs().max()) > 1e-3


@pytest.mark.parametrize("options", [{"max_rank": 0}, {"max_rank": 1}, {"max_terms": 90}])
@pytest.mark.parametrize("name", ["rnn", "attention"])
def test_equivariance_under_caps(name, options):
    spec = spec_of(name)
    layer = layer_of(spec, **options)
    assert equivariance_error(layer, spec) < 1e-10 and layer.terms < UNFLinear(spec, 1, 1).terms


def generators(spec):
    """A transposition and a cycle of every group, and of the units in one block of a nested one."""
    for group, size in spec.groups.items():
        if size < 2:
            continue
        parent = spec.nested.get(group)
        width = size // spec.groups[parent] if parent else size
        for inside in ([1, 0, *range(2, width)], [*range(1, width), 0]):
            if parent:
                perms = dict(spec.identity().perms)
                perms[group] = torch.tensor([*inside, *range(width, size)])
                yield Element(perms, spec.identity().signs)
                continue
            perms = {**spec.identity().perms, group: torch.tensor(inside)}
            for child in (c for c, above in spec.nested.items() if above == group):
                units = torch.arange(spec.groups[child]).view(size, -1)
                perms[child] = units[perms[group]].flatten()
            yield Element(perms, spec.identity().signs)


def orbits(spec):
    """The orbit of each pair (output scalar, input scalar) under the group, [P, P], by brute force."""
    layout = Layout.of(spec)
    size = layout.size
    edges = []
    for element in generators(spec):
        spec.check_element(element)
        numbers = torch.arange(size, dtype=torch.float64)
        shapes = layout.shapes
        pieces = numbers.split([int(np.prod(shape)) for shape in shapes.values()])
        state = {key: piece.view(shape) for (key, shape), piece in zip(shapes.items(), pieces)}
        state |= {key: torch.zeros(shape) for key, shape in spec.shapes.items() if key not in state}
        moved = spec.apply(state, element)
        where = torch.cat([moved[key].flatten() for key in shapes]).long()[layout.index]
        order = torch.argsort(layout.index)[where].numpy()
        edges.append((order[:, None] * size + order[None, :]).ravel())
    nodes = np.tile(np.arange(size * size), len(edges))
    graph = coo_matrix((np.ones(len(nodes), np.int8), (nodes, np.concatenate(edges))), shape=(size * size,) * 2)
    count, label = connected_components(graph, directed=False)
    return count, label.reshape(size, size)


def matrices(layer):
    """The map of each single weight at one channel, [terms, P out, P in], by vmap over parameters."""
    size, shapes = layer.layout.size, [weight.shape for weight in layer.weights]
    total = sum(weight.numel() for weight in layer.weights)
    eye = torch.eye(size, dtype=torch.float64)[..., None]

    def image(flat):
        pieces = flat.split([shape.numel() for shape in shapes])
        weights = [piece.view(shape) for piece, shape in zip(pieces, shapes)]
        return grouped(layer.plan, eye, weights, None)[..., 0].T

    return torch.func.vmap(image, chunk_size=64)(torch.eye(total, dtype=torch.float64))


def rank_and_orbits(spec, kind=UNFLinear, **options):
    layer = kind(spec, 1, 1, bias=False, **options).double()
    maps = matrices(layer).flatten(1)
    count, label = orbits(layer.layout.spec)
    label = torch.from_numpy(label).long().flatten()
    first = torch.zeros(count, dtype=torch.long).scatter_(0, label, torch.arange(len(label)))
    values = maps[:, first]
    assert float((maps - values[:, label]).abs().max()) < 1e-12  # each map is constant on orbits
    return layer, int(torch.linalg.matrix_rank(values)), count


@pytest.mark.parametrize("name", [name for name in MAKERS if name != "cube"])
def test_the_rank_is_the_number_of_orbits(name):
    layer, rank, count = rank_and_orbits(spec_of(name))
    assert rank == count == layer.terms == COUNTS.get(name, count)


def test_the_rank_is_the_number_of_orbits_for_three_indices_of_one_group():
    spec = WeightSpec({"w": (Axis("h"),) * 3, "v": (Axis("h"),)}, {"h": 3})  # fewer units than indices
    layer, rank, count = rank_and_orbits(spec)
    assert rank == count == layer.terms < UNFLinear(spec_of("cube"), 1, 1).terms == 187 + 2 * 15 + 2


@pytest.mark.parametrize(("symmetry", "count"), [("np", 62), ("hnp", 114)])
def test_the_layer_for_chains_is_complete(symmetry, count):
    layer, rank, found = rank_and_orbits(unsigned(mlp(2, 3, 3, 2)), NFLinear, symmetry=symmetry)
    assert rank == found == layer.terms == count
    for spec in (conv(), conv(bias=False), mlp(2, 4, 1)):
        _, rank, found = rank_and_orbits(unsigned(spec), NFLinear, symmetry=symmetry)
        assert rank == found == UNFLinear(spec.free("in", "out") if symmetry == "np" else spec, 1, 1).terms


@pytest.mark.parametrize("name", MAKERS)
def test_grouped_is_term_by_term(name):
    spec = spec_of(name)
    layer, x = layer_of(spec), random_batch(Layout.of(spec))
    expected = layer(x).data
    for folded in (True, False):
        assert float((TermByTerm(layer, folded)(x).data - expected).detach().abs().max()) < 1e-12


@pytest.mark.parametrize("options", [{"max_rank": 0}, {"max_rank": 1}, {"max_terms": 90}, {"bias": False}])
def test_grouped_is_term_by_term_under_caps(options):
    spec = spec_of("rnn")
    layer, x = layer_of(spec, **options), random_batch(Layout.of(spec))
    assert float((TermByTerm(layer)(x).data - layer(x).data).detach().abs().max()) < 1e-12


def test_a_piece_of_a_product_is_not_written_into():
    """Two tensors share the product of their own terms, and nothing but diagonals is added to it."""
    spec = WeightSpec({"a": (Axis("h"), Axis("h")), "b": (Axis("h"), Axis("h"))}, {"h": 4})
    plan = Plan(Layout.of(spec))
    kept = [t for t in plan.terms if t.carried == 2 or (t.carried == 1 and t.partition[0] == t.partition[1])]
    plan.terms = tuple(kept)
    plan._group()
    x = random_batch(plan.layout)
    weights = [
        torch.randn(2 * len(product.inputs), 3 * len(product.outputs), dtype=torch.float64, requires_grad=True)
        for product in plan.products
    ]
    out = grouped(plan, x.data, weights, None)
    assert [len(product.outputs) for product in plan.products] == [2, 2]
    assert (
        float((out - torch.func.vmap(lambda d: grouped(plan, d, weights, None))(x.data[None])[0]).abs().max()) < 1e-12
    )
    out.sum().backward()
    assert all(bool(weight.grad.any()) for weight in weights)


@pytest.mark.parametrize("name", ["gru", "attention", "cube"])
def test_gradients(name):
    spec = spec_of(name)
    layer, x = layer_of(spec, 1, 2), random_batch(Layout.of(spec), 1)
    slow = TermByTerm(layer)
    cost = torch.randn(2, layer.layout.size, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    data = [x.data.clone().requires_grad_() for _ in range(2)]
    for module, leaf in zip((layer, slow), data):
        (module(x.replace(leaf)).data * cost).sum().backward()
    assert float((data[0].grad - data[1].grad).abs().max()) < 1e-12
    for n, weight in enumerate(slow.weights):
        p, row, column = layer.plan.places[n]
        block = layer.coefficient(n)
        offset = block.storage_offset()
        whole = layer.weights[p].grad.flatten()
        got = torch.as_strided(whole, block.shape, block.stride(), offset)
        assert float((got - weight.grad).abs().max()) < 1e-11
    assert float((layer.bias.grad - slow.bias.grad).abs().max()) < 1e-11
    small = layer_of(spec_of("np"), 1, 1)
    leaf = random_batch(small.layout, 1, 1).data.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda d: small(WeightBatch(small.layout, d.square())).data, leaf)


@pytest.mark.parametrize("name", ["hnp", "gru", "attention", "cube"])
def test_vmap_over_parameters_and_input(name):
    spec = spec_of(name)
    layers = [layer_of(spec, seed=seed) for seed in range(3)]
    x = [random_batch(Layout.of(spec), seed=seed) for seed in range(3)]
    stacked, _ = torch.func.stack_module_state(layers)
    many = WeightBatch(x[0].layout, torch.stack([batch.data for batch in x]))

    def call(params, batch):
        return torch.func.functional_call(layers[0], params, (batch,))

    def loss(params, batch):
        return call(params, batch).data.square().sum()

    out = torch.func.vmap(call)(stacked, many)
    shared = torch.func.vmap(call, in_dims=(0, None))(stacked, x[0])
    one = {key: value.detach() for key, value in layers[0].named_parameters()}
    inputs = torch.func.vmap(call, in_dims=(None, 0))(one, many)
    grads = torch.func.vmap(torch.func.grad(loss))(stacked, many)
    for n, layer in enumerate(layers):
        expected = layer(x[n]).data
        assert float((out.data[n] - expected).detach().abs().max()) < 1e-12
        assert float((shared.data[n] - layer(x[0]).data).detach().abs().max()) < 1e-12
        assert float((inputs.data[n] - layers[0](x[n]).data).detach().abs().max()) < 1e-12
        found = torch.autograd.grad(expected.square().sum(), list(layer.parameters()))
        for (key, _), grad in zip(layer.named_parameters(), found):
            assert float((grads[key][n] - grad).detach().abs().max()) < 1e-10 * float(grad.abs().max())
    # One parameter alone may be batched too.
    for key in one:
        alone = torch.func.vmap(lambda value, key=key: call({**one, key: value}, x[0]).data)(stacked[key])
        assert float((alone[0] - layers[0](x[0]).data).detach().abs().max()) < 1e-12


def test_policies_of_a_fleet_go_through():
    torch.manual_seed(0)
    policies = [RecurrentPolicy(5, 2, hidden=6) for _ in range(3)]
    spec = WeightSpec.from_module(policies[0])
    batch = WeightBatch.stack(spec, [policy.state_dict() for policy in policies])
    layer = UNFLinear(spec, 1, 1)
    nn.init.zeros_(layer.bias)
    out = layer(batch)
    states = out.unstack(others=[policy.state_dict() for policy in policies])
    policies[0].load_state_dict(states[0])
    element = unsigned(spec).random(0)
    moved = layer(batch.apply(element)).data
    assert float((moved - out.apply(element).data).detach().abs().max()) < 1e-5


def test_initial_weights():
    spec = spec_of("gru")
    a, b, c = (UNFLinear(spec, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.weights[0], c.weights[0]) and not a.bias.any()
    parts = a.layout.parts
    for o, part in enumerate(parts):
        found = [n for n, term in enumerate(a.plan.terms) if term.output == o]
        reach = sum(parts[a.plan.terms[n].input].fold for n in found)
        drawn = torch.cat([a.coefficient(n).flatten() for n in found])
        assert len(drawn) == 8 * 8 * reach * part.fold
        assert float(drawn.var().detach() * 8 * reach) == pytest.approx(1.0, abs=0.15)


def nfn_layer(kind, sizes, c_in, c_out):
    nfn = pytest.importorskip("nfn.layers")
    from nfn.common import WeightSpaceFeatures, network_spec_from_wsfeat

    weights = [torch.zeros(1, c_in, b, a, dtype=torch.float64) for a, b in zip(sizes, sizes[1:])]
    biases = [torch.zeros(1, c_in, b, dtype=torch.float64) for b in sizes[1:]]
    spec = network_spec_from_wsfeat(WeightSpaceFeatures(weights, biases), set_all_dims=True)
    layer = getattr(nfn, kind)(spec, c_in, c_out).double()

    def call(batch):
        tensors = list(batch.tensors().values())
        tensors = [tensor.movedim(-1, 1) for tensor in tensors]
        out = layer(WeightSpaceFeatures(tensors[::2], tensors[1::2]))
        found = [tensor.movedim(1, -1) for pair in out for tensor in pair]
        return WeightBatch.stack(batch.layout, dict(zip(batch.layout.keys, found)), channels=True).data

    return layer, call


@pytest.mark.parametrize("kind", ["NPLinear", "HNPLinear"])
def test_the_maps_of_nfn_are_among_ours(kind):
    """Weights that make our layer equal to theirs, found by least squares, and the maps that theirs lacks."""
    torch.manual_seed(0)
    sizes = (2, 3, 3, 2)
    symmetry = "np" if kind == "NPLinear" else "hnp"
    theirs, call = nfn_layer(kind, sizes, 2, 3)
    ours = NFLinear(unsigned(mlp(*sizes)), 2, 3, symmetry=symmetry).double()
    layout, params = ours.layout, dict(ours.named_parameters())
    flat, shapes = torch.cat([p.detach().flatten() for p in params.values()]), [p.shape for p in params.values()]

    def run(vector, batch):
        pieces = vector.split([shape.numel() for shape in shapes])
        given = {key: piece.view(shape) for key, piece, shape in zip(params, pieces, shapes)}
        return torch.func.functional_call(ours, given, (batch,)).data

    train, test = random_batch(layout, 2, 40, seed=1), random_batch(layout, 2, 5, seed=2)
    with torch.no_grad():
        design = torch.func.jacfwd(run)(torch.zeros_like(flat), train).flatten(0, -2)
        found = torch.linalg.lstsq(design, call(train).flatten()[:, None]).solution[:, 0]
        assert float((run(found, test) - call(test)).abs().max()) < 1e-5

    # The span of their maps at one channel.
    theirs, call = nfn_layer(kind, sizes, 1, 1)
    names = [name for name, _ in theirs.named_parameters() if not name.endswith("bias")]
    eye = WeightBatch(layout, torch.eye(layout.size, dtype=torch.float64)[..., None])
    maps = []
    with torch.no_grad():
        for p in theirs.parameters():
            p.zero_()
        for name in names:
            p = theirs.get_parameter(name).view(-1)
            for n in range(len(p)):
                p[n] = 1.0
                maps.append(call(eye)[..., 0].flatten())
                p[n] = 0.0
    theirs_rank = int(torch.linalg.matrix_rank(torch.stack(maps)))
    mine = matrices(NFLinear(layout, 1, 1, symmetry=None, bias=False).double()).transpose(1, 2).flatten(1)
    together = int(torch.linalg.matrix_rank(torch.cat([torch.stack(maps), mine])))
    # NP is complete in nfn 0.1.2; HNP lacks the two maps from the last hidden bias to the last weight.
    expected = {"NPLinear": (62, 62), "HNPLinear": (112, 114)}[kind]
    assert (theirs_rank, together) == expected


def test_bad_input():
    spec = spec_of("gru")
    layer, x = layer_of(spec), random_batch(Layout.of(spec))
    with pytest.raises(UserError, match="UNFLinear: c_in=0 channels"):
        UNFLinear(spec, 0, 3)
    with pytest.raises(UserError, match="NFLinear: c_out=0 channels"):
        NFLinear(mlp(2, 3, 2), 1, 0)
    with pytest.raises(UserError, match="UNFLinear takes 2 channels, the batch has 4"):
        layer(WeightBatch.join([x, x]))
    with pytest.raises(UserError, match="UNFLinear was made for another layout; they differ in"):
        layer(random_batch(Layout.of(spec.fix("in"))))
    with pytest.raises(UserError, match="UNFLinear takes a WeightBatch, got Tensor"):
        layer(x.data)
    with pytest.raises(UserError, match="unknown symmetry 'npp'"):
        NFLinear(mlp(2, 3, 2), 1, 1, symmetry="npp")
    with pytest.raises(UserError, match="'core.weight_hh_l0' has 'core.0' along both axes; use UNFLinear"):
        NFLinear(spec, 1, 1)
    with pytest.raises(UserError, match="'last.weight' has the groups of 'inner.weight'; use UNFLinear"):
        NFLinear(WeightSpec.from_module(Residual()), 1, 1, symmetry="hnp")
    with pytest.raises(UserError, match="nested group; use UNFLinear"):
        NFLinear(spec_of("attention"), 1, 1)
    with pytest.raises(UserError, match="WeightSpec is needed, got NoneType"):
        UNFLinear(None, 1, 1)
    with pytest.raises(UserError, match="term 999"):
        UNFLinear(mlp(2, 3, 2), 1, 1).coefficient(999)


def test_layers_run_without_memory_on_meta():
    spec = spec_of("attention")
    layer = UNFLinear(spec, 2, 3).to("meta")
    out = layer(WeightBatch(layer.layout, torch.empty(4, layer.layout.size, 2, device="meta")))
    assert out.data.shape == (4, layer.layout.size, 3) and out.data.device.type == "meta"
