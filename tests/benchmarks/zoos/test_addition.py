"""GRUs that add: the sums, the stacked networks, what is learned and measured."""

import pytest
import torch
from torch.nn import functional as F

from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.addition import AdditionGRU, sums
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator


def test_sums_are_digits_with_units_first():
    digits, answers = sums(torch.tensor([[123, 989], [7, 5], [0, 0]]), 3)
    assert digits[0].tolist() == [[3, 9], [2, 8], [1, 9], [0, 0]]
    assert answers.tolist() == [[2, 1, 1, 1], [2, 1, 0, 0], [0, 0, 0, 0]]
    numbers = torch.randint(10**17, (50, 2), generator=torch_generator("test_addition"))
    digits, answers = sums(numbers, 17)
    powers = 10 ** torch.arange(18)
    assert torch.equal((digits * powers[:, None]).sum(-2), numbers)
    assert torch.equal((answers * powers).sum(-1), numbers.sum(-1))


def test_a_network_that_adds_by_construction_is_always_right():
    """Unit s is 1 where the digits and the carry make s or more, else -1; so unit 10 is the next step's carry."""
    maker = AdditionGRU(hidden=20, digits=2)
    totals, values = torch.arange(20.0), torch.arange(10.0)
    steep = 20.0
    w_ih, w_hh = torch.zeros(60, 20), torch.zeros(60, 20)
    b_ih, b_hh = torch.zeros(60), torch.zeros(60)
    w_ih[40:] = steep * torch.cat([values, values])  # the new memory: the sum of both digits
    w_hh[40:, 10] = steep / 2  # and of the carry, (unit 10 + 1) / 2. At the first step the memory of 0 is half a carry
    b_hh[40:] = steep / 2
    b_ih[40:] = steep * (0.4 - totals)
    b_ih[:20] = steep  # reset gate open: the memory counts
    b_ih[20:40] = -steep  # update gate shut: the memory is what is new
    head = torch.zeros(10, 20)
    for total in range(20):  # the last unit that is on says which digit
        head[total % 10, total] += 1
        if total < 19:
            head[total % 10, total + 1] -= 1
    weights = {
        "core.weight_ih_l0": w_ih,
        "core.weight_hh_l0": w_hh,
        "core.bias_ih_l0": b_ih,
        "core.bias_hh_l0": b_hh,
        "head.weight": head,
        "head.bias": torch.zeros(10),
    }
    right = maker.evaluate({name: value[None] for name, value in weights.items()})
    assert right.shape == (1, 512, 3) and right.all()
    w_hh[40:, 10] = 0  # without its memory it errs where there is a carry, or is none
    right = maker.evaluate({name: value[None] for name, value in weights.items()})
    assert right[..., 0].all() and 0.3 < right[..., 1].float().mean() < 0.7


def test_stacked_networks_are_the_networks(tmp_path):
    zoo = make_zoo("addition_gru", folder=tmp_path, progress=False, networks=5, hidden=6, digits=2, steps=(3, 9))
    maker = AdditionGRU(networks=5, hidden=6, digits=2, steps=(3, 9))
    numbers = torch.randint(100, (5, 7, 2), generator=torch_generator("test_addition"))
    digits, _ = sums(numbers, 2)
    found = maker.forward(zoo.weights, digits)
    for n in range(5):
        x = F.one_hot(digits[n], 10).flatten(2).float()
        assert torch.allclose(found[n], zoo.module(n)(x), atol=1e-5)
    assert zoo.spec.groups == {"core.0": 6}


def test_a_zoo_of_adders(tmp_path):
    settings = {"networks": 6, "digits": 1, "learning_rate": (0.03, 0.03), "progress": False, "folder": tmp_path}
    good = make_zoo("addition_gru", steps=(500, 500), examples=(1000, 1000), **settings)
    short = make_zoo("addition_gru", steps=(2, 2), examples=(1000, 1000), **settings)
    few = make_zoo("addition_gru", steps=(500, 500), examples=(5, 5), **settings)
    assert good.targets["success"].mean() > 0.8
    assert short.targets["success"].mean() < 0.2 and few.targets["success"].mean() < 0.4
    # What was measured is what the module does on the sums that all networks are measured by.
    numbers = torch.randint(10, (512, 2), generator=torch_generator("zoo", "addition_gru", "evaluation", 1))
    digits, answers = sums(numbers, 1)
    right = good.module(2)(F.one_hot(digits, 10).flatten(2).float()).argmax(-1) == answers
    assert float(right.all(-1).float().mean()) == pytest.approx(float(good.targets["success"][2]), abs=0.003)
    assert float(right.float().mean()) == pytest.approx(float(good.targets["digits_right"][2]), abs=0.003)
    again = make_zoo("addition_gru", steps=(2, 2), examples=(1000, 1000), **{**settings, "folder": tmp_path / "other"})
    assert all(torch.equal(again.weights[key], short.weights[key]) for key in short.weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"networks": 0}, "networks=0"), ({"digits": 18}, "at most 17"), ({"steps": (9, 3)}, "lower and the upper")],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        AdditionGRU(**settings)
