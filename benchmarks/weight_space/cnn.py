"""How well a small CNN will do on images that it never saw, read from its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fleetgym.benchmarks.weight_space.reading import read, reader
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.core.errors import UserError, unknown


@dataclass(frozen=True)
class CNN:
    """Test accuracy of CNNs 1-16-16-10 on scikit-learn's digits. The zoo is made anew for each seed.

    Attributes:
        networks: Of the zoo; two thirds train.
        steps: Gradient steps of every method.
        learning_rate: Largest step size, of every method.
        batch_size: Networks in a step.
        channels: Of equivariant layers.
        layers: How many of them.
        width: Of heads and perceptrons.
        probes: How many images ``probes`` learns.
        dropout: See the models.
        weight_decay: Of AdamW.
    """

    name: ClassVar[str] = "cnn"
    title: ClassVar[str] = "Test accuracy of CNNs from their weights"
    metric: ClassVar[str] = "Kendall tau"
    higher: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"networks": 100, "steps": 30, "channels": 8, "probes": 8, "batch_size": 16}
    }
    networks: int = 1000
    steps: int = 600
    learning_rate: float = 3e-3
    batch_size: int = 32
    channels: int = 16
    layers: int = 2
    width: int = 128
    probes: int = 32
    dropout: float = 0.0
    weight_decay: float = 0.01

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "channels", "layers", "width", "probes")
        if self.networks < 30:
            raise UserError(f"{self.name}.networks={self.networks}: at least 30, for three splits")

    def methods(self) -> tuple[str, ...]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        return ("mlp", "statnn", "nfn_np", "nfn_hnp", "nft", "unf", "probes")

    def prepare(self, seed: int, device: str) -> None:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        make_zoo("digits_cnn", networks=self.networks, seed=seed, device=device)

    def run(self, job: Job) -> dict[str, Any]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        zoo = make_zoo("digits_cnn", networks=self.networks, seed=job.seed)
        return read(
            job,
            lambda: reader(
                job.method,
                zoo,
                1,
                probe=(1, 8, 8),
                channels=self.channels,
                layers=self.layers,
                width=self.width,
                dropout=self.dropout,
                probes=self.probes,
                options={"squash": True} if job.method == "probes" else None,  # the largest output decides
            ),
            zoo,
            "test_accuracy",
            "bce",
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
        )
