"""A zoo of small CNNs trained on handwritten digits; what is measured is their accuracy on digits they never saw.

After Unterthiner et al., "Predicting Neural Network Accuracy from Weights", 2020: learning rate, weight decay, scale of
the initial weights, dropout, share of the training images, wrong labels and number of steps are each network's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fleetgym.benchmarks.zoos.images import digits
from fleetgym.benchmarks.zoos.networks import ACTIVATIONS, SmallCNN
from fleetgym.benchmarks.zoos.stacked import fan_in_uniform, linear, log_uniform, train
from fleetgym.benchmarks.zoos.zoo import Part, chunk
from fleetgym.core.errors import UserError
from fleetgym.core.optional import require
from fleetgym.core.seeding import generator, torch_generator

_AT_ONCE = 50
_TRAINING = 1000  # images; the other 797 measure


@dataclass(frozen=True)
class DigitsCNN:
    """CNNs 1-16-16-10 with 3 x 3 kernels, stride 2 and the mean over places.

    Targets are ``test_accuracy`` (797 images), ``train_accuracy`` (on the 1000 training images with their true labels)
    and the settings of each network.

    Attributes:
        networks: N.
        channels: Of the convolutions.
        activation: Of all networks.
        learning_rate: Bounds; log-uniform.
        weight_decay: Bounds, decoupled from the gradient; log-uniform.
        init_scale: Bounds of a factor on torch's initial weights; log-uniform.
        dropout: Bounds of the share of channels that are dropped after each convolution; uniform.
        fraction: Bounds of the share of the training images that a network sees; log-uniform.
        label_noise: Bounds of the share of these that have a random label; uniform.
        steps: Bounds of the number of gradient steps; log-uniform.
        batch: Images in a gradient step.
        seed: Of everything.
        shares: Of train, val and test.

    Raises:
        UserError: The extra ``zoos`` is not installed, a number below one, or bounds that are no bounds.
    """

    name: ClassVar[str] = "digits_cnn"
    version: ClassVar[int] = 1
    networks: int = 1000
    channels: tuple[int, ...] = (16, 16)
    activation: str = "relu"
    learning_rate: tuple[float, float] = (2e-3, 5e-2)
    weight_decay: tuple[float, float] = (1e-4, 0.3)
    init_scale: tuple[float, float] = (0.5, 3.0)
    dropout: tuple[float, float] = (0.0, 0.2)
    fraction: tuple[float, float] = (0.05, 1.0)
    label_noise: tuple[float, float] = (0.0, 0.3)
    steps: tuple[int, int] = (30, 500)
    batch: int = 32
    seed: int = 0
    shares: tuple[float, float, float] = (2 / 3, 2 / 15, 1 / 5)

    def __post_init__(self) -> None:
        require("zoos")
        self.network()
        for name in ("networks", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        for name in ("learning_rate", "weight_decay", "init_scale", "fraction", "steps"):
            low, high = getattr(self, name)
            if not 0 < low <= high or name == "fraction" and high > 1:
                raise UserError(f"{name}={(low, high)}: give the lower and the upper bound, positive")
        for name in ("dropout", "label_noise"):
            low, high = getattr(self, name)
            if not 0 <= low <= high < 1:
                raise UserError(f"{name}={(low, high)}: give the lower and the upper bound, from 0 to less than 1")

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return "small_cnn", SmallCNN(1, self.channels, activation=self.activation).config

    def parts(self) -> int:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return -(-self.networks // _AT_ONCE)

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        images, labels = (tensor.to(device) for tensor in digits())
        # Which images train is the same for every zoo, whatever its seed.
        order = torch.from_numpy(generator("zoo", self.name, "images").permutation(len(images))).to(device)
        seen, unseen = order[:_TRAINING], order[_TRAINING:]
        rng = torch_generator("zoo", self.name, self.seed, number)
        count = len(chunk(self.networks, _AT_ONCE, number))
        settings = self._settings(count, rng)
        shapes = {name: tuple(value.shape) for name, value in SmallCNN(**self.network()[1]).named_parameters()}
        weights = fan_in_uniform(shapes, count, rng)
        weights = {
            name: (value * settings["init_scale"].view(-1, *[1] * (value.dim() - 1))).to(device)
            for name, value in weights.items()
        }
        # Each network's own images, in an order of its own, and its own wrong labels.
        own = torch.rand(count, _TRAINING, generator=rng).argsort(1).to(device)
        wrong = (torch.rand(count, _TRAINING, generator=rng) < settings["label_noise"][:, None]).to(device)
        drawn = torch.randint(10, (count, _TRAINING), generator=rng).to(device)
        own_labels = torch.where(wrong, drawn, labels[seen][own])
        settings = {name: value.to(device) for name, value in settings.items()}
        some = (settings["fraction"] * _TRAINING).round().clamp(min=1)
        rows = torch.arange(count, device=device)[:, None]
        widths = sum(self.channels)

        def loss(weights: Mapping[str, Tensor], active: int, step: int) -> Tensor:
            uniform = torch.rand(active, self.batch, generator=rng).to(device)
            index = (uniform * some[:active, None]).long()
            keep = 1 - settings["dropout"][:active]
            mask = (torch.rand(self.batch, active, widths, generator=rng).to(device) < keep[:, None]) / keep[:, None]
            logits = self.forward(weights, images[seen[own[rows[:active], index]]], mask)
            target = own_labels[rows[:active], index]
            return F.cross_entropy(logits.flatten(0, 1), target.flatten(), reduction="none").view(active, -1).mean(1)

        options = {name: settings[name] for name in ("steps", "learning_rate", "weight_decay")}
        train(weights, loss, **options)
        with torch.no_grad():
            accuracy = {}
            for name, which in (("test_accuracy", unseen), ("train_accuracy", seen)):
                logits = self.forward(weights, images[which].expand(count, -1, -1, -1))
                accuracy[name] = (logits.argmax(-1) == labels[which]).float().mean(1)
        return Part(weights, {**accuracy, **settings})

    def _settings(self, number: int, rng: torch.Generator) -> dict[str, Tensor]:
        """Each network's own settings, [N] each, the longest training first."""

        def uniform(bounds: tuple[float, float]) -> Tensor:
            return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(number, generator=rng)

        logarithmic = ("learning_rate", "weight_decay", "init_scale", "fraction")
        return {
            "steps": log_uniform(*self.steps, number, rng=rng).round().sort(descending=True).values,
            **{name: log_uniform(*getattr(self, name), number, rng=rng) for name in logarithmic},
            "dropout": uniform(self.dropout),
            "label_noise": uniform(self.label_noise),
        }

    def forward(self, weights: Mapping[str, Tensor], images: Tensor, mask: Tensor | None = None) -> Tensor:
        """N networks on images of their own, as one grouped convolution.

        Args:
            weights: Stacked state dict of :class:`SmallCNN`.
            images: [N, B, h, w].
            mask: What each channel of the convolutions is multiplied with, [B, N, sum of channels], or None.

        Returns:
            Logits [N, B, 10].
        """
        activation, count = ACTIVATIONS[self.activation], len(images)
        config = self.network()[1]
        x = images.transpose(0, 1)  # [B, N C, h, w], the channels of a network side by side
        masks = mask.split(self.channels, -1) if mask is not None else [None] * len(self.channels)
        options = {"stride": config["stride"], "padding": config["padding"], "groups": count}
        for i, own in enumerate(masks):
            weight, bias = weights[f"convs.{i}.weight"], weights[f"convs.{i}.bias"]
            x = x.contiguous(memory_format=torch.channels_last)
            x = activation(F.conv2d(x, weight.flatten(0, 1), bias.flatten(), **options))
            if own is not None:
                x = x * own.flatten(1)[..., None, None]
        x = x.mean((2, 3)).unflatten(1, (count, -1)).transpose(0, 1)
        return linear(x, weights["head.weight"], weights["head.bias"])
