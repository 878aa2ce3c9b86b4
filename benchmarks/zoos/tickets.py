"""A zoo of untrained networks and their winning tickets: which weights are worth training.

A ticket is a mask over the weights found by iterative magnitude pruning with rewinding (Frankle and Carbin, "The
Lottery Ticket Hypothesis", ICLR 2019): train, drop the smallest of the weights that are left, set the others back to
where they began, and so on. Zhou et al. (NeurIPS 2023, arXiv 2302.14040) predict such masks from the first weights;
they prune networks of MNIST and CIFAR-10, here it is a perceptron on scikit-learn's handwritten digits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fleetgym.benchmarks.zoos.images import digits
from fleetgym.benchmarks.zoos.networks import ACTIVATIONS, MLP
from fleetgym.benchmarks.zoos.stacked import fan_in_uniform, linear, train
from fleetgym.benchmarks.zoos.zoo import Part, chunk
from fleetgym.core.errors import UserError
from fleetgym.core.optional import require
from fleetgym.core.seeding import generator, torch_generator

_AT_ONCE = 100
#: Images that networks train on, are compared by, and are measured by; 597 are left for the last.
_TRAINING, _VALIDATION = 900, 300


@dataclass(frozen=True)
class DigitsTickets:
    """Perceptrons 64-H-10 with rectifiers: their first weights, and the mask that pruning leaves.

    The weights of the zoo are untrained. Targets are ``ticket`` (the mask over the two weight matrices, raveled and
    joined, float [N, 74 H]; biases are not pruned), and the accuracies on 300 validation images of the network trained
    whole, ``dense``, and trained under its ticket, ``sparse``.

    Attributes:
        networks: N.
        hidden: H.
        sparsity: Share of the weights that a ticket drops, of both matrices together.
        rounds: Prunings; each drops the same share of what is left.
        steps: Gradient steps of a training.
        learning_rate: Adam's at the beginning of a training; it falls along half a cosine.
        batch: Images in a step.
        seed: Of everything.
        shares: Of train, val and test.

    Raises:
        UserError: The extra ``zoos`` is not installed, a number below one, or a sparsity that leaves nothing or all.
    """

    name: ClassVar[str] = "digits_tickets"
    version: ClassVar[int] = 1
    networks: int = 500
    hidden: int = 32
    sparsity: float = 0.95
    rounds: int = 6
    steps: int = 200
    learning_rate: float = 1e-2
    batch: int = 64
    seed: int = 0
    shares: tuple[float, float, float] = (0.8, 0.1, 0.1)

    def __post_init__(self) -> None:
        require("zoos")
        for name in ("networks", "hidden", "rounds", "steps", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate}: it must be positive")
        if not 0 < self.sparsity < 1 or self.kept < 1:
            raise UserError(f"sparsity={self.sparsity}: between 0 and 1, so that at least one weight is left")

    @property
    def sizes(self) -> tuple[int, int]:
        """How many weights the two matrices have."""
        return 64 * self.hidden, 10 * self.hidden

    @property
    def kept(self) -> int:
        """How many weights a ticket keeps."""
        return round((1 - self.sparsity) * sum(self.sizes))

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return "mlp", MLP([64, self.hidden, 10], "relu").config

    def parts(self) -> int:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return -(-self.networks // _AT_ONCE)

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        count = len(chunk(self.networks, _AT_ONCE, number))
        shapes = {key: tuple(value.shape) for key, value in MLP(**self.network()[1]).named_parameters()}
        first = fan_in_uniform(shapes, count, torch_generator("zoo", self.name, self.seed, number))
        first = {key: value.to(device) for key, value in first.items()}
        mask = torch.ones(count, sum(self.sizes), device=device)
        trained = self.trained(first, mask)
        dense = self.accuracy(trained, mask, "val")
        for done in range(1, self.rounds + 1):
            left = round(sum(self.sizes) * (self.kept / sum(self.sizes)) ** (done / self.rounds))
            sizes = torch.cat([trained[f"layers.{i}.weight"].flatten(1) for i in range(2)], 1).abs()
            mask = largest(torch.where(mask > 0, sizes, -1.0), left)
            trained = self.trained(first, mask)
        return Part(first, {"ticket": mask, "dense": dense, "sparse": self.accuracy(trained, mask, "val")})

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """Images [M, 64] and labels [M] that networks train on (``train``), are compared by (``val``) or tested by.

        The three are the same for every zoo.
        """
        images, labels = digits()
        order = torch.from_numpy(generator("zoo", self.name, "images").permutation(len(images)))
        bounds = {
            "train": slice(0, _TRAINING),
            "val": slice(_TRAINING, _TRAINING + _VALIDATION),
            "test": slice(_TRAINING + _VALIDATION, None),
        }
        rows = order[bounds[split]]
        return images[rows].flatten(1), labels[rows]

    def forward(self, weights: Mapping[str, Tensor], mask: Tensor, images: Tensor) -> Tensor:
        """N networks under their masks on the same images: [N, ...], [N, 74 H], [M, 64] to logits [N, M, 10]."""
        x = images.expand(len(mask), -1, -1)
        for i, part in enumerate(mask.split(self.sizes, 1)):
            weight = weights[f"layers.{i}.weight"]
            x = linear(x, weight * part.view_as(weight), weights[f"layers.{i}.bias"])
            x = ACTIVATIONS["relu"](x) if i == 0 else x
        return x

    def trained(self, first: Mapping[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
        """Networks after a training from their first weights, in which only the weights of their masks take part.

        All networks see the same batches in the same order.

        Args:
            first: Tensors [N, ...].
            mask: [N, 74 H].

        Returns:
            Their weights; those outside the mask are as they were and count for nothing.
        """
        weights = {key: value.clone() for key, value in first.items()}
        images, labels = (tensor.to(mask.device) for tensor in self.images("train"))
        count = len(mask)
        order = torch.stack([
            torch.from_numpy(generator("zoo", self.name, self.seed, "batch", step).permutation(len(images)))
            for step in range(-(-self.steps * self.batch // len(images)))
        ]).flatten()  # fmt: skip

        def loss(weights: Mapping[str, Tensor], active: int, step: int) -> Tensor:
            rows = order[step * self.batch : (step + 1) * self.batch].to(mask.device)
            logits = self.forward(weights, mask, images[rows])
            target = labels[rows].expand(count, -1).flatten()
            return F.cross_entropy(logits.flatten(0, 1), target, reduction="none").view(count, -1).mean(1)

        same = torch.ones(count, device=mask.device)
        train(weights, loss, steps=self.steps * same, learning_rate=self.learning_rate * same)
        return weights

    @torch.no_grad()
    def accuracy(self, weights: Mapping[str, Tensor], mask: Tensor, split: str) -> Tensor:
        """Share of a split's images that each network tells right, [N]."""
        images, labels = (tensor.to(mask.device) for tensor in self.images(split))
        return (self.forward(weights, mask, images).argmax(-1) == labels).float().mean(1)


def largest(scores: Tensor, number: int) -> Tensor:
    """A mask, 1.0 at the ``number`` largest scores of each row: [N, W] -> [N, W]."""
    return torch.zeros_like(scores).scatter_(1, scores.topk(number, 1).indices, 1.0)
