"""The record, its splits, its cache."""

import dataclasses
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from fleetgym.benchmarks.zoos import ZOOS, make_zoo
from fleetgym.benchmarks.zoos.networks import MLP, SmallCNN
from fleetgym.benchmarks.zoos.stacked import fan_in_uniform, linear, train
from fleetgym.benchmarks.zoos.zoo import Part, Zoo, cache_folder, make, split_groups, zoo_path
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator

SHAPES = {"layers.0.weight": (3, 2), "layers.0.bias": (3,), "layers.1.weight": (1, 3), "layers.1.bias": (1,)}


@dataclasses.dataclass(frozen=True)
class Random:
    """Untrained networks, three a part, in pairs of one group; it notes what it makes."""

    name: ClassVar[str] = "random"
    version: ClassVar[int] = 1
    made: ClassVar[list] = []
    stop_at: ClassVar[int] = 99
    seed: int = 0
    shares: tuple = (0.5, 0.25, 0.25)

    def network(self):
        return "mlp", {"sizes": [2, 3, 1], "activation": "tanh"}

    def parts(self):
        return 4

    def part(self, number, device):
        if number >= self.stop_at:
            raise KeyboardInterrupt
        self.made.append(number)
        weights = fan_in_uniform(SHAPES, 3, torch_generator("random", self.seed, number))
        index = torch.arange(3 * number, 3 * number + 3)
        return Part(weights, {"number": index}, groups=index // 2)


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(Random, "made", [])


def same(a, b):
    assert a.config == b.config and a.network == b.network and len(a) == len(b)
    for kind in ("weights", "targets", "splits"):
        one, other = getattr(a, kind), getattr(b, kind)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) and one[key].dtype == other[key].dtype for key in one)
    return True


def test_a_zoo_is_made_once(tmp_path):
    first = make(Random(), folder=tmp_path, progress=False)
    assert Random.made == [0, 1, 2, 3] and len(first) == 12
    again = make(Random(), folder=tmp_path, progress=False)
    assert Random.made == [0, 1, 2, 3] and same(first, Zoo.load(zoo_path(Random(), tmp_path)))
    assert torch.equal(again.targets["number"], torch.arange(12))
    assert [path.name for path in tmp_path.iterdir()] == [zoo_path(Random(), tmp_path).name]  # no parts are left
    make(Random(seed=1), folder=tmp_path, progress=False)
    assert len(Random.made) == 8


def test_what_decides_where_it_lies(tmp_path, monkeypatch):
    places = {
        zoo_path(Random(), tmp_path),
        zoo_path(Random(seed=1), tmp_path),
        zoo_path(Random(shares=(0.8, 0.1, 0.1))),
    }
    monkeypatch.setattr(Random, "version", 2)
    places.add(zoo_path(Random(), tmp_path))
    assert len(places) == 4
    monkeypatch.setenv("FLEETGYM_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine" / "zoos"


def test_an_interrupted_zoo_goes_on(tmp_path, monkeypatch):
    whole = make(Random(), folder=tmp_path / "whole", progress=False)
    Random.made.clear()
    monkeypatch.setattr(Random, "stop_at", 2)
    with pytest.raises(KeyboardInterrupt):
        make(Random(), folder=tmp_path, progress=False)
    assert Random.made == [0, 1] and not zoo_path(Random(), tmp_path).exists()
    monkeypatch.setattr(Random, "stop_at", 99)
    (damaged,) = tmp_path.glob("*.parts/part-0001.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:50])
    assert same(make(Random(), folder=tmp_path, progress=False), whole)
    assert Random.made == [0, 1, 1, 2, 3]


def test_a_killed_process_leaves_what_it_had_finished(tmp_path):
    settings = "policies=300, hidden=2, steps=(2, 2), length=3, episodes=2, horizon=4, demonstrations=(2, 2)"
    code = f"""
import os
from fleetgym.benchmarks.zoos import cartpole, zoo
made = cartpole.CartPole.part
def part(self, number, device):
    if number == 1:
        os._exit(9)
    return made(self, number, device)
cartpole.CartPole.part = part
zoo.make(cartpole.CartPole({settings}), folder={str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 9, done.stderr
    (part,) = tmp_path.rglob("*.safetensors")
    before = part.stat().st_mtime_ns, part.read_bytes()
    options = {"policies": 300, "hidden": 2, "steps": (2, 2), "length": 3, "episodes": 2, "horizon": 4}
    seen = []
    from fleetgym.benchmarks.zoos import cartpole

    made = cartpole.CartPole.part
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cartpole.CartPole, "part", lambda self, k, device: seen.append(k) or made(self, k, device))
        zoo = make_zoo("cartpole", folder=tmp_path, progress=False, demonstrations=(2, 2), **options)
    whole = make_zoo("cartpole", folder=tmp_path / "whole", progress=False, demonstrations=(2, 2), **options)
    assert seen == [1] and before[1] and same(zoo, whole)


def test_splits_part_groups_and_cover_all():
    groups = torch.tensor([7, 7, 3, 3, 3, 1, 0, 0, 9, 9, 5, 5, 2, 8, 4, 6]).repeat(3)
    splits = split_groups(groups, (0.6, 0.2, 0.2), seed=0)
    assert torch.equal(torch.cat(list(splits.values())).sort().values, torch.arange(48))
    homes = [set(groups[rows].tolist()) for rows in splits.values()]
    assert [len(home) for home in homes] == [6, 2, 2] and len(set.union(*homes)) == 10
    assert not all(torch.equal(splits[k], split_groups(groups, (0.6, 0.2, 0.2), seed=1)[k]) for k in splits)
    assert all(len(rows) for rows in split_groups(torch.arange(3), (0.98, 0.01, 0.01), seed=0).values())
    with pytest.raises(UserError, match="2 groups"):
        split_groups(torch.tensor([0, 0, 1, 1]), (0.6, 0.2, 0.2), seed=0)
    with pytest.raises(UserError, match=r"\(0.5, 0.5, 0.5\)"):
        split_groups(torch.arange(9), (0.5, 0.5, 0.5), seed=0)


def test_networks_of_a_zoo(tmp_path):
    zoo = make(Random(), folder=tmp_path, progress=False)
    x = torch.randn(5, 2)
    module = zoo.module(7)
    weights = zoo.state_dict(7)
    expected = torch.tanh(x @ weights["layers.0.weight"].T + weights["layers.0.bias"])
    assert torch.allclose(module(x), expected @ weights["layers.1.weight"].T + weights["layers.1.bias"], atol=1e-6)
    assert list(zoo.spec.groups.values()) == [3] and all(zoo.spec.signed.values())
    weights, targets = zoo.part("test")
    assert torch.equal(targets["number"], zoo.splits["test"])
    assert torch.equal(weights["layers.0.bias"], zoo.weights["layers.0.bias"][zoo.splits["test"]])
    with pytest.raises(UserError, match="'tests'.*'test'"):
        zoo.part("tests")
    moved = zoo.spec.apply(zoo.weights, zoo.spec.random(0), batched=True)
    assert torch.allclose(dataclasses.replace(zoo, weights=moved).module(7)(x), module(x), atol=1e-6)


def test_bad_records(tmp_path):
    zoo = make(Random(), folder=tmp_path, progress=False)
    nan = {**zoo.weights, "layers.0.bias": zoo.weights["layers.0.bias"].clone()}
    nan["layers.0.bias"][4, 1] = torch.nan
    cases = [
        ({"weights": nan}, r"'layers\.0\.bias' of network 4"),
        ({"weights": {k: v for k, v in zoo.weights.items() if "1.bias" not in k}}, r"layers\.1\.bias"),
        ({"targets": {"success": torch.zeros(11)}}, r"'success'.*\[11\]"),
        ({"splits": {"train": torch.tensor([0, 1]), "test": torch.tensor([1])}}, "'test'.*already"),
        ({"splits": {"train": torch.tensor([0]), "test": torch.tensor([1])}}, "one group"),  # 0 and 1 are a pair
        ({"splits": {"train": torch.tensor([12])}}, "outside 0..11"),
        ({"splits": {"valid": torch.tensor([0])}}, "'valid'"),
        ({"architecture": "mpl"}, "'mpl'"),
    ]
    for change, words in cases:
        with pytest.raises(UserError, match=words):
            dataclasses.replace(zoo, **change)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="not a zoo"):
        zoo.save(tmp_path / "full")
    with pytest.raises(UserError, match="does not exist"):
        Zoo.load(tmp_path / "nowhere")
    file = zoo_path(Random(), tmp_path) / "zoo.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="remove .*random-.* to have it made again"):
        make(Random(), folder=tmp_path, progress=False)


def test_names_and_settings():
    assert set(ZOOS.names()) >= {
        "cartpole",
        "cartpole_gru",
        "digits_cnn",
        "digits_sirens",
        "meta_world",
        "mnist_sirens",
    }
    with pytest.raises(UserError, match="'cart_pole'.*'cartpole'"):
        make_zoo("cart_pole")
    with pytest.raises(UserError, match="'polices'.*'policies'"):
        make_zoo("cartpole", polices=3)


def test_stacked_training_is_that_of_each_network_alone():
    number, steps = 3, torch.tensor([9.0, 6.0, 2.0])
    rate, decay = torch.tensor([0.05, 0.02, 0.1]), torch.tensor([0.1, 0.0, 0.3])
    rng = torch_generator("test_stacked")
    x, y = torch.randn(number, 8, 2, generator=rng), torch.randn(number, 8, 1, generator=rng)
    weights = fan_in_uniform(SHAPES, number, rng)
    begun = {name: value.clone() for name, value in weights.items()}

    def loss(w, count, step):
        hidden = torch.tanh(linear(x[:count], w["layers.0.weight"], w["layers.0.bias"]))
        return (linear(hidden, w["layers.1.weight"], w["layers.1.bias"]) - y[:count]).square().mean((1, 2))

    train(weights, loss, steps=steps, learning_rate=rate, weight_decay=decay)
    for n in range(number):
        module = MLP((2, 3, 1))
        module.load_state_dict({name: value[n] for name, value in begun.items()})
        optimizer = torch.optim.AdamW(module.parameters(), lr=float(rate[n]), weight_decay=float(decay[n]))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps[n]))
        for _ in range(int(steps[n])):
            optimizer.zero_grad()
            (module(x[n]) - y[n]).square().mean().backward()
            optimizer.step()
            schedule.step()
        for name, value in module.state_dict().items():
            assert torch.allclose(weights[name][n], value, atol=2e-6), (n, name)
            assert not torch.allclose(weights[name][n], begun[name][n], atol=1e-2)


@pytest.mark.parametrize(
    ("make_one", "words"),
    [
        (lambda: MLP((2,)), r"\[2\]"),
        (lambda: MLP((2, 0, 1)), r"\[2, 0, 1\]"),
        (lambda: MLP((2, 1), activation="sine"), "'sine'"),
        (lambda: SmallCNN(channels=()), "at least 1"),
        (lambda: SmallCNN(size=(4, 4), channels=(2, 2), padding=0), "too small"),
        (lambda: SmallCNN(activation="gelu"), "'gelu'"),
    ],
)
def test_bad_networks(make_one, words):
    with pytest.raises(UserError, match=words):
        make_one()


def test_the_symmetry_of_a_small_cnn():
    from fleetgym.core.weights import WeightSpec

    module = SmallCNN(channels=(5, 6), activation="tanh")
    spec = WeightSpec.from_module(module, module.example_input())
    assert sorted(spec.groups.values()) == [5, 6]
    assert sum(p.numel() for p in SmallCNN(1, (16, 16, 16), size=(28, 28), padding=0).parameters()) == 4970
