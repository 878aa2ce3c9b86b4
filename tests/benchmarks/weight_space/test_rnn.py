"""Reading GRUs that add: the models and the rows."""

import dataclasses

import pytest
import torch

from fleetgym.benchmarks.weight_space.rnn import RNN
from fleetgym.benchmarks.weight_space.task import Job
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.core import Element
from fleetgym.core.errors import UserError
from fleetgym.core.seeding import generator
from fleetgym.merging.functionals.batch import WeightBatch

SMALL = RNN(networks=40, hidden=6, digits=1, steps=12, channels=4, layers=2, width=16, probes=4)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLEETGYM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def zoo():
    size = {"networks": SMALL.networks, "hidden": SMALL.hidden, "digits": SMALL.digits}
    return make_zoo("addition_gru", **size, seed=0, progress=False)


@pytest.mark.parametrize("method", ["statnn", "deepset", "unf", "probes", "mlp"])
def test_invariance(zoo, method):
    torch.manual_seed(0)
    model = SMALL.model(method, zoo).eval()
    weights = {key: value[:3] for key, value in zoo.weights.items()}
    drawn = zoo.spec.random(generator("test_rnn"))
    element = Element(drawn.perms, {group: torch.ones_like(sign) for group, sign in drawn.signs.items()})
    batch = WeightBatch.stack(zoo.spec, weights)
    with torch.no_grad():
        before, after = (model(model.fitted(x)) for x in (batch, batch.apply(element)))
    assert torch.allclose(before, after, atol=1e-5) == (method != "mlp")


def test_the_deep_set_sees_each_weight_alone_until_it_pools(zoo):
    torch.manual_seed(0)
    weights = {key: value[:2].clone() for key, value in zoo.weights.items()}
    other = {key: value.clone() for key, value in weights.items()}
    other["core.weight_hh_l0"][:, 0, 0] += 1.0
    for method, alone in (("deepset", True), ("unf", False)):
        model = SMALL.model(method, zoo).eval()
        features = [
            model.features(model.fitted(WeightBatch.stack(model.layout, w))).tensors() for w in (weights, other)
        ]
        moved = {key: (features[0][key] - features[1][key]).abs().amax((0, -1)) > 1e-7 for key in weights}
        # The gates of a unit are one place: three weights of the tensor change, and no other.
        assert (moved["core.weight_hh_l0"].sum() == 3 and not moved["head.weight"].any()) == alone


def test_rows(tmp_path, zoo):
    rows = {}
    for method in SMALL.methods():
        rows[method] = SMALL.run(Job("rnn", method, 0, "cpu", tmp_path / method))
        assert -1 <= rows[method]["score"] <= 1 and rows[method]["parameters"] > 100
    assert rows["unf"]["parameters"] > rows["deepset"]["parameters"]
    again = SMALL.run(Job("rnn", "unf", 0, "cpu", tmp_path / "again"))
    assert again["score"] == rows["unf"]["score"] and again["curve"] == rows["unf"]["curve"]
    assert rows["unf"]["networks"] == {split: len(index) for split, index in zoo.splits.items()}


def test_what_cannot_be(tmp_path):
    with pytest.raises(UserError, match="networks=3"):
        dataclasses.replace(SMALL, networks=3)
    with pytest.raises(UserError, match="deepsets"):
        SMALL.run(Job("rnn", "deepsets", 0, "cpu", tmp_path))
