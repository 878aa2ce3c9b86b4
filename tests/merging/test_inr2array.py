import pytest
import torch
from torch import nn

from fleetgym.core import Checkpoint, UserError, WeightSpec
from fleetgym.core.run import Run
from fleetgym.merging.functionals import WeightBatch
from fleetgym.merging.functionals.training import fit
from fleetgym.merging.inr2array import (
    Inr2Array,
    LatentClassifier,
    PatchDecoder,
    encode,
    fit_inr2array,
    grid_coordinates,
    show,
)


class Inr(nn.Module):
    """A field with two hidden layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 6), nn.Linear(6, 6), nn.Linear(6, 1)])

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = torch.sin(3 * layer(x))
        return self.layers[-1](x)


def inrs(count, seed=0):
    """Fields that differ in height and level."""
    torch.manual_seed(seed)
    nets = [Inr() for _ in range(count)]
    for net in nets[1:]:
        net.load_state_dict(nets[0].state_dict())
        with torch.no_grad():
            net.layers[2].weight *= 2 * torch.randn(())
            net.layers[2].bias += 0.5 * torch.randn(())
    spec = WeightSpec.from_module(nets[0], torch.zeros(1, 2))
    spec = WeightSpec(spec.axes, spec.groups)
    return nets, spec, WeightBatch.stack(spec, [net.state_dict() for net in nets])


def small(spec):
    torch.manual_seed(0)
    sizes = {"size": 16, "width": 16, "hidden": (6,), "decoder_width": 32}
    return Inr2Array(spec, grid=2, blocks=1, heads=2, factor=2, frequencies=4, **sizes)


def test_coordinates_and_what_networks_show():
    coordinates = grid_coordinates(3, 4)
    assert coordinates.shape == (12, 2)
    assert coordinates[[0, 1, 4, 11]].tolist() == [[-1, -1], [-1, pytest.approx(-1 / 3)], [0, -1], [1, 1]]
    nets, _, x = inrs(3)
    with torch.no_grad():
        wanted = torch.stack([net(coordinates) for net in nets])
    assert torch.allclose(show(nets[0], x, coordinates, batch_size=2), wanted, atol=1e-6)


def test_each_coordinate_is_shown_by_its_patch():
    torch.manual_seed(0)
    decoder = PatchDecoder(5, 2, outputs=3, hidden=(4, 4), width=6).double()
    coordinates = grid_coordinates(5, 4).double()
    z = torch.randn(2, 4, 5, dtype=torch.float64)
    out = decoder(z, coordinates)
    assert out.shape == (2, 20, 3)
    for n, place in enumerate(coordinates):
        # rounds (grid - 1) (coordinate + 1) / 2 to an index along each axis
        patch = 2 * round((float(place[0]) + 1) / 2) + round((float(place[1]) + 1) / 2)
        x = place
        for i in range(3):
            weight, bias = (
                net(z[1, patch]).view(shape)
                for net, shape in zip(decoder.hypernetworks[2 * i : 2 * i + 2], decoder.shapes[2 * i : 2 * i + 2])
            )
            x = weight @ x + bias
            x = torch.sin(decoder.omega * x) if i < 2 else x
        assert torch.allclose(out[1, n], x, atol=1e-10)
    first, second = out[0], decoder(z + torch.tensor([0.0, 1, 0, 0])[:, None], coordinates)[0]
    changed = (first - second).abs().amax(1) > 1e-9
    members, slots = decoder.arrange(coordinates)
    assert changed.tolist() == [int(slot) // members.shape[1] == 1 for slot in slots]


def test_latents_are_invariant():
    _, spec, x = inrs(3)
    model = small(spec)
    model.normalise(x)
    model, x = model.double().eval(), x.to(torch.float64)
    z = model.encode(x)
    assert z.shape == (3, 4, 16)
    assert float((model.encode(x.apply(spec.random(1))) - z).detach().abs().max()) < 1e-10
    swapped = spec.free("in")
    element = swapped.identity()
    element.perms["in"] = torch.tensor([1, 0])
    moved = WeightBatch.stack(swapped, x.unstack()).apply(element)  # the field, transposed
    assert float((model.encode(moved) - z).detach().abs().max()) > 1e-6


def test_it_learns_resumes_and_is_kept(tmp_path):
    nets, spec, x = inrs(100)
    coordinates = grid_coordinates(4)
    fields = show(nets[0], x, coordinates)
    held = (x.replace(x.data[80:]), fields[80:])
    x, fields = x.replace(x.data[:80]), fields[:80]
    options = {"validation": held, "steps": 90, "batch_size": 40, "learning_rate": 5e-3, "warmup": 10}

    def trained(run=None, report=None):
        model = small(spec)
        rows = fit_inr2array(
            model, x, fields, coordinates, evaluate_every=30, run=run, report=report, **options
        ).history
        return model, rows

    model, rows = trained()
    assert rows[-1]["validation_loss"] < 0.7 * float(held[1].var(0).mean())

    class Stop(Exception):
        pass

    def stop(row):
        if row["step"] == 60:
            raise Stop

    with pytest.raises(Stop), Run.open(tmp_path / "run", {}, tensorboard=False) as run:
        trained(run, stop)
    with Run.open(tmp_path / "run", {}, resume=True, tensorboard=False) as run:
        again, rows_again = trained(run)
    assert rows == rows_again
    loaded = Checkpoint.load(tmp_path / "run" / "checkpoints" / "inr2array").module()
    assert torch.equal(encode(model, x), encode(again, x)) and torch.equal(encode(loaded, x), encode(model, x))


def test_latents_are_classified():
    torch.manual_seed(0)
    z = torch.randn(80, 4, 6)
    y = (z[:, 2, 1] > 0).long()  # not at the first latent, which the class is read at
    model = LatentClassifier(6, 4, 2, width=16, layers=1, heads=2, dropout=0.0)
    fitted = fit(
        model, z, y, loss="cross_entropy", validation=(z, y), steps=80, batch_size=40, learning_rate=5e-3, warmup=5
    )
    assert fitted.score > 0.9


def test_bad_input_is_refused():
    nets, spec, x = inrs(2)
    coordinates = grid_coordinates(2)
    for make, message in (
        (lambda: Inr2Array(spec, grid=0), "grid=0"),
        (lambda: Inr2Array(spec, width=10, heads=4), "heads=4 do not divide channels=10"),
        (lambda: Inr2Array(spec, size=10, heads=4), "heads=4 do not divide size=10"),
        (lambda: PatchDecoder(4, 2, outputs=0), "outputs=0"),
        (lambda: LatentClassifier(4, 2, 3, width=6, heads=4), "heads=4 do not divide width=6"),
        (lambda: LatentClassifier(4, 0, 3), "latents=0"),
        (
            lambda: fit_inr2array(small(spec), x, torch.zeros(2, 3, 1), coordinates),
            r"shape \(2, 3, 1\), exp.* \(2, 4, 1\)",
        ),
    ):
        with pytest.raises(UserError, match=message):
            make()
