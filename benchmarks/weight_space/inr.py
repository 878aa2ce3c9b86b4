"""Which digit a SIREN shows, read from its weights, under three protocols that are not to be compared."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, ClassVar

from fleetgym.benchmarks.weight_space.reading import count, parts, read, reader, seeded
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.zoo import Zoo
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.run import Run
from fleetgym.envs.fields.siren import places
from fleetgym.merging.functionals.training import evaluate, fit
from fleetgym.merging.inr2array import Inr2Array, LatentClassifier, encode, fit_inr2array, show

_SIDES = {"digits_sirens": 8, "mnist_sirens": 28}
_QUICK = {"images": 200, "steps": 40, "channels": 16, "array_steps": 40, "latent_steps": 40}


@dataclass(frozen=True)
class Copies:
    """Several networks an image, each from initial weights of its own; all copies of an image are in one split.

    A sine is odd, so a hidden unit may be negated: all methods see units with the signs that make their biases positive
    (:class:`~fleetgym.merging.functionals.augment.Signs`).

    ``inr2array`` learns latents without labels, and a transformer reads the class from them.

    Attributes:
        zoo: ``digits_sirens`` (8x8) or ``mnist_sirens`` (28x28).
        images: How many; 0 for all.
        copies: Networks an image.
        hidden: Widths of the networks.
        omega: Their frequency. The usual 30 suits large images; 64 pixels are fitted with it by weights that hardly
            leave their random beginning, and tell a reader nothing.
        fit_steps: Gradient steps of a network.
        fit_rate: First step size of a network.
        steps: Gradient steps of every method that reads weights.
        learning_rate: Largest step size of these.
        batch_size: Networks in a step.
        channels: Of equivariant layers and of transformers.
        layers: How many equivariant layers.
        blocks: Blocks of a transformer.
        width: Of heads and perceptrons.
        dropout: See the models.
        weight_decay: Of AdamW.
        grid: Latents of Inr2Array along each axis.
        array_steps: Gradient steps of Inr2Array.
        array_rate: Largest step size of Inr2Array.
        array_omega: Frequency of the SIRENs that its latents are decoded to.
        latent_steps: Gradient steps of the classifier of its latents.
    """

    name: ClassVar[str] = "inr_copies"
    title: ClassVar[str] = "Digits from the weights of SIRENs, several networks an image"
    metric: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True
    init: ClassVar[str] = "independent"
    normalise: ClassVar[str] = "part"
    signs: ClassVar[str] = "canonical"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"quick": {**_QUICK, "copies": 2}}
    zoo: str = "digits_sirens"
    images: int = 0
    copies: int = 10
    hidden: tuple[int, ...] = (8, 8)
    omega: float = 2.0
    fit_steps: int = 400
    fit_rate: float = 0.02
    steps: int = 2000
    learning_rate: float = 2e-3
    batch_size: int = 64
    channels: int = 32
    layers: int = 3
    blocks: int = 2
    width: int = 128
    dropout: float = 0.1
    weight_decay: float = 0.01
    grid: int = 4
    array_steps: int = 3000
    array_rate: float = 4e-3
    array_omega: float = 10.0
    latent_steps: int = 600

    def __post_init__(self) -> None:
        if self.zoo not in _SIDES:
            raise unknown("zoo of SIRENs", self.zoo, _SIDES)
        names = ("copies", "fit_steps", "steps", "batch_size", "channels", "layers", "blocks", "width", "grid")
        check_positive(self, *names, "array_steps", "latent_steps")
        if self.images < 0 or 0 < self.images < 30:
            raise UserError(f"{self.name}.images={self.images}: 0 for all, or at least 30, for three splits")

    def methods(self) -> tuple[str, ...]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        return ("mlp", "nfn_np", "nfn_hnp", "nft", "inr2array", "probes")

    def prepare(self, seed: int, device: str) -> None:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        self._zoo(seed, device)

    def _zoo(self, seed: int, device: str) -> Zoo:
        return make_zoo(
            self.zoo,
            images=self.images or None,
            copies=self.copies,
            init=self.init,
            hidden=self.hidden,
            steps=self.fit_steps,
            learning_rate=self.fit_rate,
            omega=self.omega,
            seed=seed,
            device=device,
        )

    def run(self, job: Job) -> dict[str, Any]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        zoo = self._zoo(job.seed, "cpu")
        if job.method == "inr2array":
            return {**self._inr2array(job, zoo), "zoo_psnr": float(zoo.targets["psnr"].mean())}
        row = read(
            job,
            lambda: reader(
                job.method,
                zoo,
                10,
                probe=(2,),
                channels=self.channels,
                layers=self.layers,
                width=self.width,
                blocks=self.blocks,
                dropout=self.dropout,
            ),
            zoo,
            "label",
            "cross_entropy",
            steps=self.steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            weight_decay=self.weight_decay,
            normalise=self.normalise,
            signs=self.signs,
        )
        return {**row, "zoo_psnr": float(zoo.targets["psnr"].mean())}

    def _inr2array(self, job: Job, zoo: Zoo) -> dict[str, Any]:
        began = time.process_time()
        side, total = _SIDES[self.zoo], self.array_steps + self.latent_steps
        coordinates = places((side, side))
        with seeded(job):
            model = Inr2Array(
                zoo.spec,
                grid=self.grid,
                width=self.channels,
                blocks=self.blocks,
                size=self.channels,
                hidden=(16, 16),
                decoder_width=64,
                omega=self.array_omega,
            )
            classifier = LatentClassifier(self.channels, self.grid**2, 10, width=64, layers=2)
        data = parts(zoo, "label", model, self.signs)
        fields = {split: show(zoo.module(), weights, coordinates) for split, (weights, _) in data.items()}
        with Run.open(job.folder / "array", {"job": job.name}, resume=True, tensorboard=False) as run:
            array = fit_inr2array(
                model,
                data["train"][0],
                fields["train"],
                coordinates,
                validation=(data["val"][0], fields["val"]),
                steps=self.array_steps,
                batch_size=self.batch_size,
                learning_rate=self.array_rate,
                evaluate_every=max(1, self.array_steps // 10),
                seed=job.seed,
                device=job.device,
                run=run,
                report=lambda row: job.report(int(row["step"]), total, f"loss {row['loss']:.4g}"),
            )
        latents = {split: (encode(model, weights, device=job.device), y) for split, (weights, y) in data.items()}
        with Run.open(job.folder / "latents", {"job": job.name}, resume=True, tensorboard=False) as run:
            fitted = fit(
                classifier,
                *latents["train"],
                loss="cross_entropy",
                validation=latents["val"],
                steps=self.latent_steps,
                batch_size=self.batch_size,
                weight_decay=0.1,
                evaluate_every=max(1, self.latent_steps // 10),
                seed=job.seed,
                device=job.device,
                run=run,
                report=lambda row: job.report(self.array_steps + int(row["step"]), total, f"loss {row['loss']:.4g}"),
            )
        spent = time.process_time() - began
        return {
            **evaluate(classifier.to(job.device), *latents["test"], "cross_entropy", device=job.device),
            "validation": fitted.score,
            "parameters": count(model) + count(classifier),
            "cpu_seconds": round(spent, 1),
            "best_step": fitted.step,
            "array_psnr": array.score,
            "networks": {split: len(targets) for split, (_, targets) in data.items()},
            "curve": [[row["step"], row["validation_score"]] for row in fitted.history],
        }


@dataclass(frozen=True)
class Independent(Copies):
    """Every image one network, from initial weights of its own. See :class:`Copies`."""

    name: ClassVar[str] = "inr_independent"
    title: ClassVar[str] = "Digits from the weights of SIRENs, one network an image"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"quick": _QUICK}
    copies: int = 1
    steps: int = 1000
    array_steps: int = 1500
    latent_steps: int = 600


@dataclass(frozen=True)
class Shared(Copies):
    """Every image one network, all from the same initial weights: units correspond, and no symmetry is needed.

    Weights are normalised each by its own statistics, and signs are as they came out. See :class:`Copies`.
    """

    name: ClassVar[str] = "inr_shared"
    title: ClassVar[str] = "Digits from the weights of SIRENs that began alike"
    presets: ClassVar[dict[str, dict[str, Any]]] = {"quick": _QUICK}
    init: ClassVar[str] = "shared"
    normalise: ClassVar[str] = "weight"
    signs: ClassVar[str] = "none"
    copies: int = 1
    steps: int = 1000
    array_steps: int = 1500
    latent_steps: int = 600
