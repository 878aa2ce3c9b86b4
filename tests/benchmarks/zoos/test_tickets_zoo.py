"""Winning tickets: what pruning keeps, and how networks train under a mask."""

import pytest
import torch

from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.networks import MLP
from fleetgym.benchmarks.zoos.tickets import DigitsTickets, largest
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator

pytest.importorskip("sklearn")


def test_largest():
    mask = largest(torch.tensor([[0.1, -3.0, 2.0, 0.5], [-1.0, -2.0, -3.0, -4.0]]), 2)
    assert mask.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]


def test_the_images_of_the_splits_are_different_ones():
    maker = DigitsTickets()
    parts = {split: maker.images(split) for split in ("train", "val", "test")}
    assert [len(images) for images, _ in parts.values()] == [900, 300, 597]
    everything = torch.cat([images for images, _ in parts.values()])
    assert len(everything.unique(dim=0)) == 1797
    assert all(set(labels.tolist()) == set(range(10)) for _, labels in parts.values())


def test_networks_under_a_mask():
    maker = DigitsTickets(networks=3, hidden=8, steps=60, learning_rate=0.03)
    rng = torch_generator("test_tickets")
    module = MLP([64, 8, 10], "relu")
    first = {key: 0.2 * torch.randn(3, *value.shape, generator=rng) for key, value in module.state_dict().items()}
    mask = (torch.rand(3, 592, generator=rng) < 0.5).float()
    images, labels = maker.images("val")
    logits = maker.forward(first, mask, images)
    for n in range(3):
        state = {key: value[n].clone() for key, value in first.items()}
        state["layers.0.weight"] *= mask[n, :512].view(8, 64)
        state["layers.1.weight"] *= mask[n, 512:].view(10, 8)
        module.load_state_dict(state)
        assert torch.allclose(logits[n], module(images), atol=1e-4)
    trained = maker.trained(first, mask)
    for i, part in enumerate(mask.split((512, 80), 1)):
        moved = (trained[f"layers.{i}.weight"] - first[f"layers.{i}.weight"]).flatten(1) != 0
        assert not moved[part == 0].any() and moved[part == 1].float().mean() > 0.5
    assert (maker.accuracy(trained, mask, "val") > maker.accuracy(first, mask, "val") + 0.2).all()
    # What lies outside the mask counts for nothing.
    trained["layers.0.weight"] += 100 * (1 - mask[:, :512].view(3, 8, 64))
    found = (maker.forward(trained, mask, images).argmax(-1) == labels).float().mean(1)
    assert torch.equal(found, maker.accuracy(trained, mask, "val"))


def test_a_ticket_is_better_than_chance(tmp_path):
    settings = {"networks": 8, "rounds": 4, "steps": 100, "sparsity": 0.9}
    zoo = make_zoo("digits_tickets", folder=tmp_path, progress=False, **settings)
    maker = DigitsTickets(**settings)
    tickets = zoo.targets["ticket"]
    assert maker.kept == 237 and (tickets.sum(1) == 237).all() and set(tickets.unique().tolist()) == {0.0, 1.0}
    again = maker.accuracy(maker.trained(zoo.weights, tickets), tickets, "val")
    assert torch.allclose(again, zoo.targets["sparse"], atol=0.01)
    chance = largest(torch.rand(tickets.shape, generator=torch_generator("test_tickets")), 237)
    other = maker.accuracy(maker.trained(zoo.weights, chance), chance, "val")
    assert again.mean() > other.mean() + 0.1
    assert zoo.targets["dense"].mean() > again.mean()
    # The zoo's weights are the untrained ones.
    assert zoo.weights["layers.0.weight"].abs().max() <= 1 / 8


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"rounds": 0}, "rounds=0"), ({"sparsity": 1.0}, "sparsity=1.0"), ({"learning_rate": 0.0}, "learning_rate=0")],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        DigitsTickets(**settings)
