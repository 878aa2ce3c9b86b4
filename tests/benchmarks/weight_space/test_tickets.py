"""Predicting winning tickets: the predictors, the masks, what is measured."""

import dataclasses

import pytest
import torch

from fleetgym.benchmarks.weight_space.task import Job
from fleetgym.benchmarks.weight_space.tickets import Tickets, TicketVAE
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.core import Element
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator, torch_generator
from fleetgym.merging.functionals.batch import WeightBatch

pytest.importorskip("sklearn")
SMALL = Tickets(networks=40, hidden=8, sparsity=0.9, rounds=3, inner_steps=60, steps=60, channels=8, layers=2, draws=2)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def zoo():
    return make_zoo("digits_tickets", **SMALL._pairs(0), progress=False)


def three(zoo):
    return {key: value[:3] for key, value in zoo.weights.items()}


def job(method, folder, seed=0):
    return Job("tickets", method, seed, "cpu", folder / f"tickets-{method}-{seed}")


@pytest.mark.parametrize("code", [0, 3])
def test_a_prediction_moves_with_the_hidden_units(zoo, code):
    torch.manual_seed(0)
    model = TicketVAE(zoo.spec, (8, 8), code).eval()
    weights = WeightBatch.stack(model.layout, three(zoo))
    masks = WeightBatch.stack(model.layout, SMALL._as_weights(zoo.targets["ticket"][:3], three(zoo)))
    model.normalise(weights, masks)
    drawn = model.layout.spec.random(generator("test_tickets"))
    # Hidden units alone: which input and output is which is encoded.
    perms = {
        group: perm if group.startswith("layers") else torch.arange(len(perm)) for group, perm in drawn.perms.items()
    }
    element = Element(perms, {group: torch.ones_like(sign) for group, sign in drawn.signs.items()})
    moved = weights.apply(element)
    assert not torch.equal(moved.data, weights.data)
    z = weights.replace(torch.randn(3, model.layout.size, code)) if code else None
    with torch.no_grad():
        before = model.logits(weights, z and z.data)
        after = model.logits(moved, z and z.apply(element).data)
    wanted = weights.replace(before[..., None]).apply(element).data[..., 0]
    assert before.std() > 0.01 and torch.allclose(after, wanted, atol=1e-4)
    # It begins at the share of ones in the masks, and biases are in none.
    assert (model.decoder.net.head.bias == torch.logit(masks.data.mean())).all()
    assert masks.data.sum(1).flatten().tolist() == [59.0, 59.0, 59.0]


def test_the_bound_of_a_vae_is_below_its_likelihood(zoo):
    """The exact log-likelihood by many draws of the prior lies above the mean of the bound, for a small model."""
    torch.manual_seed(1)
    model = TicketVAE(zoo.spec, (4,), 1).eval()
    weights = WeightBatch.stack(model.layout, three(zoo))
    masks = WeightBatch.stack(model.layout, SMALL._as_weights(zoo.targets["ticket"][:3], three(zoo)))
    model.normalise(weights, masks)
    where = torch.ones(model.layout.size, dtype=torch.bool)
    with torch.no_grad():
        torch.nn.init.zeros_(model.encoder.net.head.bias)
        for weight in model.encoder.net.head.weights:
            torch.nn.init.zeros_(weight)  # the code's distribution is the prior's: the divergence is zero
        bound = torch.stack([-model.loss(weights, masks, where) for _ in range(50)]) * len(where)
        draws = []
        for _ in range(50):
            logits = model.logits(weights, torch.randn(3, len(where), 1))
            each = torch.nn.functional.binary_cross_entropy_with_logits(logits, masks.data[..., 0], reduction="none")
            draws.append(-each.sum(1))
        likelihood = torch.stack(draws).logsumexp(0) - torch.log(torch.tensor(50.0))
        assert float(bound.mean()) <= float(likelihood.mean()) + 1e-3
        assert float(bound.mean()) == pytest.approx(float(torch.stack(draws).mean()), rel=0.01)
        # A code with another mean costs half its square.
        model.encoder.net.head.bias.view(-1, 2)[:, 0] = 0.5
        shifted = torch.stack([-model.loss(weights, masks, where) for _ in range(50)]) * len(where)
        cost = float(bound.mean() - shifted.mean())
        assert cost == pytest.approx(0.125 * len(where), rel=0.2)


def test_baseline_masks(zoo):
    tickets = zoo.targets["ticket"]
    first, second = SMALL._each(tickets)
    assert first + second == 59 == int(tickets[0].sum())
    assert first == round(float(tickets[:, :512].sum(1).mean()))
    scores = torch.rand(tickets.shape, generator=torch_generator("test_tickets"))
    mask = SMALL._by_layer(scores, (first, second))
    assert (mask[:, :512].sum(1) == first).all() and (mask[:, 512:].sum(1) == second).all()
    frequency = SMALL._frequencies(tickets)
    by_input = tickets[:, :512].view(-1, 8, 64).mean((0, 1)).clamp(min=0.5 / (len(tickets) * 8))
    assert torch.allclose(frequency[:512].view(8, 64)[3], by_input)
    assert torch.allclose(frequency[512:].view(10, 8)[:, 5], tickets[:, 512:].view(-1, 10, 8).mean((0, 2)))
    # Large weights and frequent inputs are in a ticket more often, which the regression finds.
    sizes = torch.cat([zoo.weights[f"layers.{i}.weight"].flatten(1) for i in range(2)], 1).abs()
    scores, learned = SMALL._logistic(sizes, tickets, zoo.splits["train"])
    assert learned == 6
    kept, left = scores[tickets > 0].mean(), scores[tickets == 0].mean()
    assert kept > left + 0.3
    assert float(scores.sigmoid().mean()) == pytest.approx(float(tickets.mean()), rel=0.1)


def test_rows(tmp_path):
    rows = {method: SMALL.run(job(method, tmp_path)) for method in SMALL.methods()}
    assert rows["imp"]["overlap"] == 1.0
    assert rows["imp"]["score"] > max(rows[name]["score"] for name in ("random", "magnitude", "marginal")) + 0.05
    assert all(row["dense"] == rows["imp"]["dense"] > rows["imp"]["score"] for row in rows.values())
    assert all(0 <= row["validation"] <= 1 and row["cpu_seconds"] >= 0 for row in rows.values())
    for method in ("nfn_deterministic", "nfn"):
        curve = [value for _, value in rows[method]["curve"]]
        assert min(curve) < 0.9 * curve[0] and rows[method]["parameters"] > 1000
    assert rows["nfn_deterministic"]["overlap"] > rows["random"]["overlap"] + 0.02
    again = SMALL.run(job("nfn", tmp_path / "again"))
    assert again["score"] == rows["nfn"]["score"] and again["curve"] == rows["nfn"]["curve"]


@pytest.mark.parametrize(("settings", "message"), [({"networks": 3}, "networks=3"), ({"code": 0}, "code=0")])
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **settings)


def test_an_unknown_method(tmp_path):
    with pytest.raises(UserError, match="magnitudes"):
        SMALL.run(job("magnitudes", tmp_path))
