"""Task ``rnn``: how many sums a GRU gets right, read from its weights.

After the experiment on the Tiny RNN Zoo in Zhou et al., "Universal neural functionals" (NeurIPS 2024, arXiv
2402.05232), on the networks of :class:`fleetgym.benchmarks.zoos.addition.AdditionGRU`, which are fewer and smaller and
have an easier form of the same work. Their figures (Kendall tau .831 for deep sets, .884 for StatNN, .897 for UNF, from
8000 networks) are not to be compared with those of this task.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fleetgym.benchmarks.weight_space.reading import SIGNS, read, reader
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.zoo import Zoo
from fleetgym.core.errors import UserError, unknown
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.models import UNF, Reader


@dataclass(frozen=True)
class RNN:
    """Success of GRUs at addition. The zoo is made anew for each seed.

    ``unf`` has every term of the symmetry. ``deepset`` is the same model with those terms alone that map a weight to
    itself: each tensor is a set, whose elements meet in the pooling. Both take inputs and outputs as free, and encode
    which digit each is. ``mlp`` and ``statnn`` are without a symmetry and with more than there is; ``probes`` runs the
    networks.

    Attributes:
        networks: Of the zoo; two thirds train.
        hidden: Units of a network.
        digits: Of the numbers.
        steps: Gradient steps of every method.
        learning_rate: Largest step size of ``mlp``, ``statnn`` and ``probes``.
        equivariant_rate: That of ``unf`` and ``deepset``.
        batch_size: Networks in a step.
        channels: Of ``unf`` and ``deepset``.
        layers: Of these.
        width: Of heads and perceptrons.
        probes: How many sequences ``probes`` learns.
        dropout: See the models.
        weight_decay: Of AdamW.
        signs: What becomes of the signs of hidden units, which mean nothing behind tanh; see
            :data:`~fleetgym.benchmarks.weight_space.reading.SIGNS`.
    """

    name: ClassVar[str] = "rnn"
    title: ClassVar[str] = "Success of GRUs at addition from their weights"
    metric: ClassVar[str] = "Kendall tau"
    higher: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"networks": 125, "hidden": 8, "digits": 2, "steps": 30, "channels": 8, "layers": 2, "probes": 16}
    }
    networks: int = 1000
    hidden: int = 16
    digits: int = 3
    steps: int = 600
    learning_rate: float = 3e-3
    equivariant_rate: float = 1e-3
    batch_size: int = 32
    channels: int = 16
    layers: int = 3
    width: int = 128
    probes: int = 32
    dropout: float = 0.0
    weight_decay: float = 0.01
    signs: str = "canonical"

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "channels", "layers", "width", "probes")
        if self.signs not in SIGNS:
            raise unknown(f"setting of {self.name}.signs", self.signs, SIGNS)
        if self.networks < 30:
            raise UserError(f"{self.name}.networks={self.networks}: at least 30, for three splits")

    def methods(self) -> tuple[str, ...]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        return ("mlp", "statnn", "deepset", "unf", "probes")

    def prepare(self, seed: int, device: str) -> None:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        self._zoo(seed, device)

    def _zoo(self, seed: int, device: str) -> Zoo:
        size = {"networks": self.networks, "hidden": self.hidden, "digits": self.digits}
        return make_zoo("addition_gru", **size, seed=seed, device=device)

    def model(self, method: str, zoo: Zoo) -> Reader:
        """A reader with first weights from torch's global generator."""
        if method in ("unf", "deepset"):
            spec = zoo.spec.free("in", "out")
            own = sum(part.fold**2 for part in Layout.of(spec).parts)
            return UNF(
                spec,
                1,
                hidden=(self.channels,) * self.layers,
                head_hidden=self.width,
                dropout=self.dropout,
                max_terms=own if method == "deepset" else None,
            )
        return reader(
            method,
            zoo,
            1,
            probe=(self.digits + 1, 20),
            width=self.width,
            dropout=self.dropout,
            probes=self.probes,
        )

    def run(self, job: Job) -> dict[str, Any]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        zoo = self._zoo(job.seed, "cpu")
        return read(
            job,
            lambda: self.model(job.method, zoo),
            zoo,
            "success",
            "bce",
            steps=self.steps,
            learning_rate=self.equivariant_rate if job.method in ("unf", "deepset") else self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            signs=self.signs,
        )
