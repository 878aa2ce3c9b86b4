import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from fleetgym.core import WeightSpec
from fleetgym.merging.functionals import NFLinear, NFNorm, UNFLinear, WeightBatch, fast, products
from fleetgym.merging.functionals.linear import grouped
from fleetgym.merging.functionals.norm import NFBlock


def chain(*widths):
    layers = [part for i, o in zip(widths, widths[1:]) for part in (nn.Linear(i, o), nn.ReLU())]
    return WeightSpec.from_module(nn.Sequential(*layers[:-1]), torch.zeros(1, widths[0]))


def convolutions():
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    return WeightSpec.from_module(net, torch.zeros(1, 2, 8, 8))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(2, 3, batch_first=True)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.gru(x)[0])


def recurrent():
    return WeightSpec.from_module(Recurrent(), torch.zeros(1, 4, 2)).free("in", "out")


LAYERS = {
    "np": lambda: NFLinear(chain(2, 5, 4, 1), 3, 2),
    "np, no bias": lambda: NFLinear(chain(2, 5, 4, 1), 2, 3, bias=False),
    "hnp": lambda: NFLinear(chain(2, 5, 4, 1), 3, 2, "hnp"),
    "hnp, two layers": lambda: NFLinear(chain(2, 5, 3), 2, 2, "hnp"),
    "convolutions": lambda: NFLinear(convolutions(), 2, 2),
    "gru": lambda: UNFLinear(recurrent(), 2, 3),
    "gru, low rank": lambda: UNFLinear(recurrent(), 2, 2, max_rank=0),
    "gru, few terms": lambda: UNFLinear(recurrent(), 2, 2, max_terms=100),
}


def drawn(layer, batch=5, seed=0):
    """The layer in float64 with random parameters, and an input."""
    generator = torch.Generator().manual_seed(seed)
    layer = layer.double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(generator=generator)
    x = torch.randn(batch, layer.layout.size, layer.c_in, generator=generator, dtype=torch.float64)
    return layer, x.requires_grad_()


def compare(ours, theirs, inputs):
    a, b = ours(), theirs()
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    given = torch.randn(a.shape, generator=torch.Generator().manual_seed(1), dtype=a.dtype)
    for name, (x, y) in enumerate(zip(torch.autograd.grad(a, inputs, given), torch.autograd.grad(b, inputs, given))):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"input {name}: {text}")


@pytest.mark.parametrize("size", [1, 4096, 1 << 20], ids=["one by one", "pieces", "whole"])
@pytest.mark.parametrize("name", LAYERS)
def test_fast_path_is_the_plain_one(monkeypatch, name, size):
    monkeypatch.setattr(fast, "PIECE_BYTES", size)
    layer, x = drawn(LAYERS[name]())
    weights = list(layer.weights)
    compare(
        lambda: fast.linear(layer.plan, x, weights, layer.bias),
        lambda: grouped(layer.plan, x, weights, layer.bias),
        [x, *layer.parameters()],
    )


def compiled(monkeypatch, layer):
    """Has this layer's products compiled, whatever the processor; whether they are."""
    monkeypatch.setattr(products, "worthwhile", lambda: True)
    with fast._Worker(layer.weights[0], layer.c_in, layer.c_out) as worker:
        return worker.kernel is not None


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("size", [1, 1 << 17], ids=["one by one", "pieces"])
@pytest.mark.parametrize("name", ["np", "hnp", "hnp, two layers", "convolutions", "gru", "gru, low rank"])
def test_compiled_products_are_the_plain_path(monkeypatch, name, size, threads):
    kind, spec, options = {
        "np": (NFLinear, chain(2, 5, 7, 1), {}),
        "hnp": (NFLinear, chain(2, 5, 7, 1), {"symmetry": "hnp"}),
        "hnp, two layers": (NFLinear, chain(2, 5, 3), {"symmetry": "hnp"}),
        "convolutions": (NFLinear, convolutions(), {}),
        "gru": (UNFLinear, recurrent(), {}),
        "gru, low rank": (UNFLinear, recurrent(), {"max_rank": 0}),
    }[name]
    layer, x = drawn(kind(spec, 8, 16, **options))
    assert compiled(monkeypatch, layer)
    monkeypatch.setattr(fast, "PIECE_BYTES", size)
    monkeypatch.setattr(fast, "LEAST_SHARED", 1)
    weights, before = list(layer.weights), torch.get_num_threads()
    inputs = [x, *layer.parameters()]
    try:
        torch.set_num_threads(threads)
        ours = fast.linear(layer.plan, x, weights, layer.bias)
        given = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=ours.dtype)
        found = torch.autograd.grad(ours, inputs, given)
    finally:
        torch.set_num_threads(before)
    theirs = grouped(layer.plan, x, weights, layer.bias)
    for a, b in zip((ours, *found), (theirs, *torch.autograd.grad(theirs, inputs, given))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_compiled_products_by_finite_differences_and_in_single_precision(monkeypatch):
    layer, x = drawn(NFLinear(chain(1, 2, 1), 8, 8), batch=2)
    assert compiled(monkeypatch, layer)

    def function(x, bias, *weights):
        return fast.linear(layer.plan, x, weights, bias)

    inputs = x, layer.bias, *layer.weights
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    layer, x = drawn(NFLinear(chain(2, 5, 7, 1), 16, 32))
    exact = torch.autograd.grad(grouped(layer.plan, x, list(layer.weights), layer.bias).square().sum(), x)[0]
    single, y = layer.float(), x.detach().float().requires_grad_()
    assert compiled(monkeypatch, single)
    out = fast.linear(single.plan, y, list(single.weights), single.bias)
    torch.testing.assert_close(torch.autograd.grad(out.square().sum(), y)[0].double(), exact, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_products_of_all_shapes(kind):
    dtype, generator = getattr(torch, kind), torch.Generator().manual_seed(0)
    tolerance = {"float32": 1e-3, "float64": 1e-12}[kind]

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    for height in range(1, 14):
        for columns, depth in ((16, 1), (48, 7), (80, 0), (144, products.DEPTH + 5)):
            whole = draw(2, 3, height, columns + 3)  # not contiguous, and not aligned
            out, a, b = whole[..., 2:-1], draw(2, 3, depth, height).mT, draw(2, 1, depth, columns)
            first, second = draw(2, 3, 1, columns), draw(1, 1, height, columns)
            around = whole[..., :2].clone(), whole[..., -1:].clone()
            wanted = first + second + a @ b
            products.multiply(kind)(*(t.numpy() for t in (out, a, b, first, second)))
            torch.testing.assert_close(out, wanted, rtol=tolerance, atol=tolerance)
            products.multiply(kind)(*(t.numpy() for t in (out, a, b, out, second)))
            torch.testing.assert_close(out, wanted + second + a @ b, rtol=tolerance, atol=tolerance)
            assert torch.equal(whole[..., :2], around[0]) and torch.equal(whole[..., -1:], around[1])


def test_sums_along_both_axes():
    x = torch.randn(3, 5, 7, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows, columns = x.new_empty(3, 5, 1, 32), x.new_empty(3, 7, 1, 32)
    ones, zeros = x.new_ones(1, 1, 1, 7), x.new_zeros(1, 1, 1, 32)
    products.sums("float64")(*(t.numpy() for t in (rows, columns, x, ones, zeros)))
    torch.testing.assert_close(rows[:, :, 0], x.sum(2))
    torch.testing.assert_close(columns[:, :, 0], x.sum(1))


def test_other_widths_and_processors_take_torch(monkeypatch):
    data = torch.zeros(2, 3, 64)
    monkeypatch.setattr(products, "worthwhile", lambda: True)
    for channels, taken in (((64, 64), True), ((64, 24), False), ((3, 64), False)):
        with fast._Worker(data, *channels) as worker:
            assert (worker.kernel is not None) == taken
    monkeypatch.setattr(products, "worthwhile", lambda: False)
    with fast._Worker(data, 64, 64) as worker:
        assert worker.kernel is None


def test_pieces_cover_the_batch(monkeypatch):
    data = torch.zeros(7, 10, 4)
    for size in (1, 10 * 8 * 4 * 3, 1 << 30):
        monkeypatch.setattr(fast, "PIECE_BYTES", size)
        pieces = fast.piece_sizes(data, 8)
        assert sum(pieces) == 7 and min(pieces) > 0
    monkeypatch.setattr(fast, "PIECE_BYTES", 10 * 8 * 4 * 3)
    assert fast.piece_sizes(data, 8) == [3, 3, 1]
    assert fast.piece_sizes(data.to("meta"), 8) == [7]


def test_only_the_gradients_that_are_wanted(monkeypatch):
    monkeypatch.setattr(fast, "PIECE_BYTES", 4096)
    layer, x = drawn(LAYERS["np"]())
    weights = [weight.detach() for weight in layer.weights]
    ours = fast.linear(layer.plan, x, weights, None)
    theirs = grouped(layer.plan, x, weights, None)
    given = torch.randn_like(ours)
    torch.testing.assert_close(torch.autograd.grad(ours, x, given)[0], torch.autograd.grad(theirs, x, given)[0])
    fixed, parameters = x.detach(), list(layer.parameters())
    ours = fast.linear(layer.plan, fixed, list(layer.weights), layer.bias)
    theirs = grouped(layer.plan, fixed, list(layer.weights), layer.bias)
    for a, b in zip(torch.autograd.grad(ours, parameters, given), torch.autograd.grad(theirs, parameters, given)):
        torch.testing.assert_close(a, b)


def test_gradients_and_their_gradients_by_finite_differences(monkeypatch):
    monkeypatch.setattr(fast, "PIECE_BYTES", 1)
    layer, x = drawn(NFLinear(chain(1, 2, 1), 1, 2), batch=2)

    def function(x, bias, *weights):
        return fast.linear(layer.plan, x, weights, bias)

    inputs = x, layer.bias, *layer.weights
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


def test_input_that_is_not_contiguous(monkeypatch):
    monkeypatch.setattr(fast, "PIECE_BYTES", 4096)
    layer, x = drawn(LAYERS["np"]())
    crossed = x.detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert not crossed.is_contiguous()
    weights = list(layer.weights)
    out = fast.linear(layer.plan, crossed, weights, layer.bias)
    torch.testing.assert_close(out, grouped(layer.plan, x, weights, layer.bias))
    out.sum().backward()  # the incoming gradient is expanded, not contiguous
    x.grad = None
    grouped(layer.plan, x, weights, layer.bias).sum().backward()
    torch.testing.assert_close(crossed.grad, x.grad)


def test_transforms_take_the_plain_path(monkeypatch):
    monkeypatch.setattr(fast, "LEAST", 0)
    layer, x = drawn(LAYERS["np"]())
    weights, x = list(layer.weights), x.detach()
    own = [*weights, layer.bias]
    assert fast.worthwhile(layer.plan, x, layer.c_out, own)

    def function(x, *own):
        return fast.mapped(layer.plan, x, own[:-1], own[-1])

    batched = vmap(function, (0, *(None for _ in own)))(x[:, None], *own)
    torch.testing.assert_close(batched[:, 0], function(x, *own))
    slope = grad(lambda x: function(x, *own).square().sum())(x)
    y = x.clone().requires_grad_()
    function(y, *own).square().sum().backward()
    torch.testing.assert_close(slope, y.grad)
    direction = torch.randn_like(x)
    forward = torch.func.jvp(lambda x: function(x, *own), (x,), (direction,))[1]
    torch.testing.assert_close(forward, fast.mapped(layer.plan, direction, weights, None))


@pytest.mark.parametrize("change", ["half", "autocast", "small"])
def test_where_the_fast_path_is_not_taken(monkeypatch, change):
    layer, x = drawn(LAYERS["np"]())
    own = list(layer.parameters())
    if change == "small":
        assert not fast.worthwhile(layer.plan, x, layer.c_out, own)
    elif change == "half":
        assert fast.usable(x, own)
        assert not fast.usable(x.to(torch.bfloat16), own)
    else:
        with torch.autocast("cpu", torch.bfloat16):
            assert not fast.usable(x, own)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "silu", "tanh"])
@pytest.mark.parametrize("affine", [None, "part", "shared"])
def test_block_is_its_three_layers(monkeypatch, affine, activation):
    monkeypatch.setattr(fast, "LEAST_NORM", 0)
    monkeypatch.setattr(fast, "PIECE_BYTES", 4096)
    monkeypatch.setattr(fast, "LEAST", 0)
    layer, x = drawn(NFLinear(chain(2, 5, 4, 1), 3, 4))
    block = NFBlock(layer, NFNorm(layer.layout, 4, affine).double(), activation)
    with torch.no_grad():
        for parameter in block.norm.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    plain = {None: lambda x: x, "relu": torch.relu, "tanh": torch.tanh}
    plain |= {"gelu": nn.functional.gelu, "silu": nn.functional.silu}

    def separately():
        middle = grouped(layer.plan, x, list(layer.weights), layer.bias)
        middle = nn.functional.layer_norm(middle, (4,), eps=1e-5)
        if affine is not None:
            lengths = torch.tensor(block.norm.norm.lengths)
            middle = middle * block.norm.scale.repeat_interleave(lengths, 0)
            middle = middle + block.norm.shift.repeat_interleave(lengths, 0)
        return plain[activation](middle)

    compare(lambda: block(WeightBatch(layer.layout, x)).data, separately, [x, *block.parameters()])


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_several_threads_give_what_one_gives(monkeypatch, activation):
    monkeypatch.setattr(fast, "LEAST", 0)
    layer, x = drawn(NFLinear(chain(2, 5, 4, 1), 3, 4))
    block = NFBlock(layer, NFNorm(layer.layout, 4).double(), activation)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            out = block(WeightBatch(layer.layout, x)).data
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, *block.parameters()])])
    finally:
        torch.set_num_threads(threads)
    for one, several in zip(*found):
        torch.testing.assert_close(one, several, rtol=1e-12, atol=1e-12)


def test_block_under_transforms_and_twice_differentiated(monkeypatch):
    monkeypatch.setattr(fast, "PIECE_BYTES", 1)
    monkeypatch.setattr(fast, "LEAST", 0)
    layer, x = drawn(NFLinear(chain(1, 2, 1), 1, 2), batch=2)
    block = NFBlock(layer, NFNorm(layer.layout, 2, eps=0.1).double(), "tanh")
    names = dict(block.named_parameters())

    def function(x, *own):
        return functional_call(block, dict(zip(names, own)), WeightBatch(layer.layout, x)).data

    inputs = x, *names.values()
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    own = [torch.stack([value, 2 * value]).detach() for value in names.values()]
    both = vmap(function, (None, *(0 for _ in own)))(x.detach(), *own)
    torch.testing.assert_close(both[1], function(x, *(2 * value for value in names.values())))


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_fresh_tensors_are_like_new_ones(monkeypatch, platform):
    if platform == "linux" and fast._advise() is None:
        pytest.skip("the C library here has no madvise")
    monkeypatch.setattr(fast, "HUGE", 0)
    if platform != "linux":
        monkeypatch.setattr(fast, "_advise", lambda: None)
    for count in (1, 1000, 3 << 20):
        made = fast.fresh(torch.zeros(1, dtype=torch.float64), 2, count)
        assert made.shape == (2, count) and made.dtype == torch.float64
        assert made.fill_(1.0).sum().item() == 2 * count
