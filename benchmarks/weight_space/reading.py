"""Tasks that read a number or a class from the weights of each network of a zoo."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fleetgym.benchmarks.weight_space.task import Job
from fleetgym.benchmarks.zoos.zoo import Zoo
from fleetgym.core.run import Run
from fleetgym.core.seeding import torch_generator
from fleetgym.merging.functionals.augment import Signs
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.models import NFN, NFT, UNF, FlatMLP, ProbeEncoder, Reader, StatNN
from fleetgym.merging.functionals.training import evaluate, fit


def reader(
    method: str,
    zoo: Zoo,
    outputs: int,
    *,
    probe: Sequence[int] | None = None,
    channels: int = 32,
    layers: int = 3,
    width: int = 128,
    blocks: int = 2,
    heads: int = 4,
    dropout: float = 0.0,
    probes: int = 64,
    options: Mapping[str, Any] | None = None,
) -> Reader:
    """A model by the name of its row, with first weights from torch's global generator.

    Args:
        method: ``mlp`` (weights as one vector), ``statnn``, ``nfn_np``, ``nfn_hnp``, ``nft``, ``unf``, or ``probes``.
        zoo: Gives the symmetry.
        outputs: How many numbers come out.
        probe: Shape of one input of the networks, for ``probes``.
        channels: Of equivariant layers.
        layers: How many of them.
        width: Of the heads.
        blocks: Of the transformer.
        heads: Of its attention.
        dropout: See the models.
        probes: How many inputs ``probes`` learns.
        options: Other arguments of the model.
    """
    head = {"dropout": dropout, **(options or {})}
    if method == "mlp":
        return FlatMLP(zoo.spec, outputs, hidden=width, **head)
    if method == "statnn":
        return StatNN(zoo.spec, outputs, hidden=width, **head)
    if method == "probes":
        # With the first network's buffers: those that are not among the weights, a normaliser's, are common to all.
        return ProbeEncoder(zoo.spec, zoo.module(0), probe, outputs, probes=probes, hidden=width, **head)
    head["head_hidden"] = width
    if method in ("nfn_np", "nfn_hnp"):
        return NFN(zoo.spec, outputs, hidden=(channels,) * layers, symmetry=method[4:], **head)
    if method == "nft":
        return NFT(zoo.spec, outputs, width=channels, blocks=blocks, heads=heads, **head)
    if method == "unf":
        return UNF(zoo.spec, outputs, hidden=(channels,) * layers, **head)
    raise AssertionError(method)


SIGNS = ("none", "flip", "canonical")
"""Units are left as they are, negated at random in training, or all negated to positive biases beforehand."""


def parts(zoo: Zoo, target: str, like: Reader, signs: str = "none") -> dict[str, tuple[WeightBatch, Tensor]]:
    """Networks and targets of each split, in a model's layout; with canonical signs where these are asked for."""
    found = {}
    for split in zoo.splits:
        weights, targets = zoo.part(split)
        batch = WeightBatch.stack(like.layout, weights)
        found[split] = (Signs(like.layout).canonical(batch) if signs == "canonical" else batch, targets[target])
    return found


def read(
    job: Job,
    make: Callable[[], Reader],
    zoo: Zoo,
    target: str,
    loss: str,
    *,
    steps: int,
    learning_rate: float,
    batch_size: int = 64,
    weight_decay: float = 0.01,
    normalise: str = "part",
    signs: str = "none",
    evaluate_every: int | None = None,
) -> dict[str, Any]:
    """Trains a model on a zoo's training split, keeps the step that is best on its validation split, and tests it.

    Args:
        job: What is measured; its folder keeps the state of training.
        make: Makes the model.
        zoo: The networks.
        target: Name of the target.
        loss: See :func:`fleetgym.merging.functionals.training.fit`, as the other numbers.
        steps: See there.
        learning_rate: See there.
        batch_size: See there.
        weight_decay: See there.
        normalise: See :meth:`Reader.normalise`.
        signs: What becomes of the signs of hidden units that mean nothing, see :data:`SIGNS`.
        evaluate_every: See there; a tenth of the steps by default.

    Returns:
        The row: ``score`` on the test split with the other metrics there, ``validation``, ``parameters``,
        ``cpu_seconds`` of training, ``best_step`` and ``curve`` (validation score).
    """
    began = time.process_time()
    with seeded(job):
        model = make()
    data = parts(zoo, target, model, signs)
    model.normalise(data["train"][0], normalise)
    with Run.open(job.folder, {"job": job.name}, resume=True, tensorboard=False) as run:
        fitted = fit(
            model,
            *data["train"],
            loss=loss,
            validation=data["val"],
            steps=steps,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            evaluate_every=evaluate_every or max(1, steps // 10),
            augment=Signs(model.layout).flip if signs == "flip" else None,
            seed=job.seed,
            device=job.device,
            run=run,
            report=job.reporter(steps),
        )
    spent = time.process_time() - began
    tested = evaluate(model.to(job.device), *data["test"], loss, device=job.device)
    return {
        **tested,
        "validation": fitted.score,
        "parameters": count(model),
        "cpu_seconds": round(spent, 1),
        "best_step": fitted.step,
        "networks": {split: len(targets) for split, (_, targets) in data.items()},
        "curve": [[row["step"], row["validation_score"]] for row in fitted.history],
    }


def count(model: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(p.numel() for p in model.parameters())


class seeded:
    """Inside, torch's global generator follows from a job's seed; outside it is as before."""

    def __init__(self, job: Job) -> None:
        self.job = job

    def __enter__(self) -> None:
        self._saved = torch.get_rng_state()
        draws = torch_generator("weight_space", self.job.task, self.job.method, self.job.seed)
        torch.manual_seed(int(torch.randint(2**62, (), generator=draws)))

    def __exit__(self, *_: Any) -> None:
        torch.set_rng_state(self._saved)
