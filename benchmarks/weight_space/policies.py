"""How often a policy will succeed, read from its weights: cart-pole policies, recurrent ones, and of Meta-World."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from fleetgym.benchmarks.weight_space.reading import SIGNS, read, reader
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.benchmarks.zoos import ZOOS, make_zoo
from fleetgym.benchmarks.zoos.zoo import Zoo
from fleetgym.core.errors import UserError, unknown


@dataclass(frozen=True)
class Policy:
    """Success of feed-forward cart-pole policies, 4-16-16-1. The zoo is made anew for each seed.

    Attributes:
        policies: Networks of the zoo; two thirds train.
        steps: Gradient steps of every method but those that are named next.
        learning_rate: Largest step size, of every method.
        batch_size: Networks in a step.
        channels: Of equivariant layers.
        layers: How many of them.
        width: Of heads and perceptrons.
        probes: How many inputs ``probes`` learns.
        dropout: See the models.
        weight_decay: Of AdamW.
        signs: Of hidden units, which mean nothing behind tanh; see ``reading.SIGNS``.
    """

    name: ClassVar[str] = "policy"
    title: ClassVar[str] = "Success of cart-pole policies from their weights"
    metric: ClassVar[str] = "Kendall tau"
    higher: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {"quick": {"policies": 300, "steps": 60, "channels": 16}}
    zoo: ClassVar[str] = "cartpole"
    rows: ClassVar[tuple[str, ...]] = ("mlp", "statnn", "nfn_np", "nfn_hnp", "nft", "unf", "probes")
    policies: int = 3000
    steps: int = 2000
    learning_rate: float = 3e-3
    batch_size: int = 64
    channels: int = 24
    layers: int = 3
    width: int = 128
    probes: int = 64
    dropout: float = 0.0
    weight_decay: float = 0.01
    signs: str = "flip"

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "channels", "layers", "width", "probes")
        if self.signs not in SIGNS:
            raise unknown(f"setting of {self.name}.signs", self.signs, SIGNS)
        if self.policies < 30:
            raise UserError(f"{self.name}.policies={self.policies}: at least 30, for three splits")

    def methods(self) -> tuple[str, ...]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        return self.rows

    def prepare(self, seed: int, device: str) -> None:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        self._zoo(seed, device)

    def _zoo(self, seed: int, device: str) -> Zoo:
        return make_zoo(self.zoo, policies=self.policies, seed=seed, device=device)

    def run(self, job: Job) -> dict[str, Any]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        zoo = self._zoo(job.seed, "cpu")
        return read(
            job,
            lambda: reader(
                job.method,
                zoo,
                1,
                probe=self.probe(),
                channels=self.channels,
                layers=self.layers,
                width=self.width,
                dropout=self.dropout,
                probes=self.probes,
                options=self.probe_options(zoo) if job.method == "probes" else None,
            ),
            zoo,
            "success",
            "bce",
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            signs=self.signs,
        )

    def probe(self) -> tuple[int, ...]:
        """Shape of an input that ``probes`` learns."""
        return (4,)

    def probe_options(self, zoo: Zoo) -> dict[str, Any]:
        """Further arguments of ``probes``."""
        return {"squash": True}  # these policies push to the side of a sign


@dataclass(frozen=True)
class GRUPolicy(Policy):
    """Success of recurrent cart-pole policies that see position and angle only. NFN and its like cannot read them.

    See :class:`Policy`; ``nft`` reads them by the attention of their spec.
    """

    name: ClassVar[str] = "gru_policy"
    title: ClassVar[str] = "Success of recurrent cart-pole policies from their weights"
    zoo: ClassVar[str] = "cartpole_gru"
    rows: ClassVar[tuple[str, ...]] = ("mlp", "statnn", "nft", "unf", "probes")
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"policies": 200, "steps": 30, "channels": 8, "probes": 16, "horizon": 4}
    }
    policies: int = 2400
    steps: int = 600
    channels: int = 16
    horizon: int = 12

    def probe(self) -> tuple[int, ...]:
        """A sequence of observations."""
        return (self.horizon, 2)


@dataclass(frozen=True)
class MetaWorldPolicy(Policy):
    """Success of feed-forward policies of a Meta-World task on goals that they were not shown, 48-32-32-32-4.

    They are cloned from few demonstrations of a scripted expert; see
    :class:`fleetgym.benchmarks.zoos.meta_world.MetaWorld` and :class:`Policy`.

    Attributes:
        world: The Meta-World task.
        episodes: Evaluation episodes of each policy.
        max_steps: Steps of an evaluation episode.
    """

    name: ClassVar[str] = "meta_world_policy"
    title: ClassVar[str] = "Success of Meta-World policies from their weights"
    zoo: ClassVar[str] = "meta_world"
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"policies": 60, "steps": 30, "channels": 8, "probes": 16, "episodes": 4}
    }
    policies: int = 300
    steps: int = 300
    channels: int = 16
    world: str = "reach-v3"
    episodes: int = 10
    max_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        ZOOS.get(self.zoo)(**self._settings())  # says what it cannot make

    def _settings(self) -> dict[str, Any]:
        own = {"policies": self.policies, "episodes": self.episodes, "max_steps": self.max_steps}
        return {**own, "tasks": (self.world,), "cell": "mlp"}

    def _zoo(self, seed: int, device: str) -> Zoo:
        return make_zoo(self.zoo, **self._settings(), seed=seed, device=device)

    def probe(self) -> tuple[int, ...]:
        """An observation, as a sequence of one."""
        return (1, 39)

    def probe_options(self, zoo: Zoo) -> dict[str, Any]:
        """The units of observations: most of their 39 numbers vary by centimetres, and some not at all."""
        mean, std = (zoo.weights[f"normaliser.{name}"][0, :39] for name in ("mean", "std"))
        return {"units": (mean, std)}
