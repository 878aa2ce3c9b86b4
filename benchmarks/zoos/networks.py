"""The networks that zoos are made of, beside policies (``agents.networks``) and SIRENs (``envs.fields.siren``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetgym.core.errors import UserError, unknown

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
"""Name -> function of hidden layers."""


class MLP(nn.Module):
    """Linear layers with an activation between them.

    Args:
        sizes: Sizes of the input, the hidden layers and the output.
        activation: A name in :data:`ACTIVATIONS`.

    Raises:
        UserError: Fewer than two sizes, one below 1, or an unknown activation.
    """

    architecture = "mlp"

    def __init__(self, sizes: Sequence[int], activation: str = "tanh") -> None:
        super().__init__()
        if len(sizes) < 2 or min(sizes) < 1:
            raise UserError(f"sizes {list(sizes)}: at least an input and an output are needed, each at least 1")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.config: dict[str, Any] = {"sizes": list(sizes), "activation": activation}
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))

    def forward(self, x: Tensor) -> Tensor:  # [..., inputs] -> [..., outputs]
        """The output of the last layer, without an activation."""
        activation = ACTIVATIONS[self.config["activation"]]
        for layer in self.layers[:-1]:
            x = activation(layer(x))
        return self.layers[-1](x)


class SmallCNN(nn.Module):
    """Convolutions with 3 x 3 kernels, the mean over all places, and a linear layer.

    With three layers of 16 channels, stride 2 and no padding it is the network of the Small CNN Zoo (4970 parameters).

    Args:
        inputs: Channels of an image.
        channels: Channels of each convolution.
        outputs: Classes.
        size: (h, w) of an image.
        stride: Of every convolution.
        padding: Zeros around an image and between the layers.
        activation: A name in :data:`ACTIVATIONS`.

    Raises:
        UserError: A size below one, images that are too small for so many layers, or an unknown activation.
    """

    architecture = "small_cnn"

    def __init__(
        self,
        inputs: int = 1,
        channels: Sequence[int] = (16, 16),
        outputs: int = 10,
        size: Sequence[int] = (8, 8),
        stride: int = 2,
        padding: int = 1,
        activation: str = "relu",
    ) -> None:
        super().__init__()
        if not channels or min(inputs, *channels, outputs, *size, stride) < 1 or padding < 0:
            raise UserError(f"channels {[inputs, *channels, outputs]}, size {list(size)}, stride {stride}: at least 1")
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        left = list(size)
        for _ in channels:
            left = [(n + 2 * padding - 3) // stride + 1 for n in left]
        if min(left) < 1:
            raise UserError(f"images of {list(size)} are too small for {len(channels)} convolutions of stride {stride}")
        self.config: dict[str, Any] = {
            "inputs": inputs,
            "channels": list(channels),
            "outputs": outputs,
            "size": list(size),
            "stride": stride,
            "padding": padding,
            "activation": activation,
        }
        widths = [inputs, *channels]
        options = {"stride": stride, "padding": padding}
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, **options) for a, b in zip(widths, widths[1:]))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, images: Tensor) -> Tensor:  # [B, C, h, w] -> [B, outputs]
        """The logits of the classes."""
        activation = ACTIVATIONS[self.config["activation"]]
        for conv in self.convs:
            images = activation(conv(images))
        return self.head(images.mean((2, 3)))

    def example_input(self) -> Tensor:
        """An image that it takes, [1, C, h, w], for tracing."""
        return torch.zeros(1, self.config["inputs"], *self.config["size"])


class SequenceGRU(nn.Module):
    """A GRU that reads a sequence and answers at every step, with a linear layer on its memory.

    Args:
        inputs: Size of an input.
        hidden: Size of the memory.
        outputs: Size of an answer.

    Raises:
        UserError: A size below one.
    """

    architecture = "sequence_gru"

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.config: dict[str, Any] = {"inputs": inputs, "hidden": hidden, "outputs": outputs}
        for name, value in self.config.items():
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        self.core = nn.GRU(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, outputs)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, inputs] -> [B, T, outputs]
        """The answers, from a memory of zeros."""
        return self.head(self.core(x)[0])

    def example_input(self) -> Tensor:
        """A sequence that it takes, [1, 1, inputs], for tracing."""
        return torch.zeros(1, 1, self.config["inputs"])
