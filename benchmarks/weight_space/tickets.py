"""Task ``tickets``: which weights of an untrained network are worth training, read from the weights themselves.

After Zhou et al., "Permutation equivariant neural functionals" (NeurIPS 2023, arXiv 2302.14040), the section on winning
tickets: a conditional variational autoencoder of equivariant layers learns from 400 pairs of first weights and masks
that iterative magnitude pruning found, and draws masks for networks that were never trained. What counts is how well
such a network does when it is trained under its mask. The pairs are those of the zoo ``digits_tickets``.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetgym.benchmarks.weight_space.reading import count, seeded
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.benchmarks.zoos import make_zoo
from fleetgym.benchmarks.zoos.tickets import DigitsTickets, largest
from fleetgym.benchmarks.zoos.zoo import Zoo
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.run import Run
from fleetgym.core.seeding import torch_generator
from fleetgym.core.weights import WeightSpec, evaluating
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.linear import NFLinear
from fleetgym.merging.functionals.models import NFN
from fleetgym.merging.functionals.training import select, train


class WeightMap(nn.Module):
    """Equivariant layers from channels of each weight to others: [B, P, c_in] to [B, P, c_out].

    The body is that of an :class:`~fleetgym.merging.functionals.models.NFN` whose inputs and outputs are encoded.

    Args:
        spec: The symmetry as it is derived.
        c_in: Channels of the input.
        c_out: Channels of the output.
        hidden: Channels of the layers between.
    """

    def __init__(self, spec: WeightSpec, c_in: int, c_out: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.net = NFN(spec, channels=c_in, hidden=hidden, head="editor")
        # An editor's head adds to its input; this one gives what it says.
        self.net.head = NFLinear(self.net.layout, hidden[-1], c_out, symmetry=None)
        self.layout = self.net.layout

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, P, c_in] to [B, P, c_out]."""
        return self.net.head(self.net.features(x)).data


class TicketVAE(nn.Module):
    """p(mask | weights, z) with a code z of some channels for each weight (arXiv 2302.14040).

    The encoder sees weights and mask and gives a normal distribution of z; the decoder sees weights and z and gives a
    logit for each weight. The prior of z is the standard normal one, which every permutation leaves as it is. Without
    channels of z it is a plain predictor.

    Args:
        spec: The symmetry.
        hidden: Channels of the layers of both.
        code: Channels of z; 0 for none.
    """

    def __init__(self, spec: WeightSpec, hidden: Sequence[int], code: int) -> None:
        super().__init__()
        self.code = code
        self.decoder = WeightMap(spec, 1 + code, 1, hidden)
        self.encoder = WeightMap(spec, 2, 2 * code, hidden) if code else None
        self.layout = self.decoder.layout

    def normalise(self, weights: WeightBatch, masks: WeightBatch) -> None:
        """Takes statistics of a training set, both [B, P, 1], and begins at the masks' share of ones."""
        codes = [weights.replace(torch.zeros_like(weights.data)) for _ in range(self.code)]
        self.decoder.net.normalise(WeightBatch.join([weights, *codes]))
        if self.encoder is not None:
            self.encoder.net.normalise(WeightBatch.join([weights, masks]))
        with torch.no_grad():
            self.decoder.net.head.bias.fill_(float(torch.logit(masks.data.mean())))

    def logits(self, weights: WeightBatch, z: Tensor | None = None) -> Tensor:
        """Of each weight being in the mask, [B, P]; z is [B, P, code]."""
        data = weights.data if z is None else torch.cat([weights.data, z], -1)
        return self.decoder(weights.replace(data))[..., 0]

    def loss(self, weights: WeightBatch, masks: WeightBatch, where: Tensor) -> Tensor:
        """Minus the evidence lower bound, divided by the number of weights that can be in a mask.

        Args:
            weights: [B, P, 1].
            masks: [B, P, 1].
            where: Bool [P]: the weights that can be.
        """
        z, divergence = None, weights.data.new_zeros(())
        if self.encoder is not None:
            mean, log = self.encoder(WeightBatch.join([weights, masks])).chunk(2, -1)
            log = log.clamp(-8, 4)
            z = mean + (0.5 * log).exp() * torch.randn_like(mean)
            divergence = 0.5 * (mean.square() + log.exp() - 1 - log).sum((1, 2)).mean() / where.sum()
        logits = self.logits(weights, z)[:, where]
        return F.binary_cross_entropy_with_logits(logits, masks.data[:, where, 0]) + divergence


@dataclass(frozen=True)
class Tickets:
    """Masks of 5 % of the weights for perceptrons 64-32-10 on handwritten digits.

    All masks but the true ones have as many weights of each matrix as the training tickets have on average.

    ``random`` draws them; ``magnitude`` takes the largest first weights; ``marginal`` draws with the frequencies that
    training tickets have at a weight's input or output, whatever the weights are; ``logistic`` takes the best by a
    regression on the weight's size and the logarithm of that frequency. ``nfn_deterministic`` predicts each weight of
    the mask by cross-entropy, ``nfn`` is :class:`TicketVAE`; both take the largest predictions. ``imp`` is the true
    ticket, for which the network was trained seven times.

    Attributes:
        networks: Pairs; 80 % train, 10 % select, 10 % test.
        hidden: Width of the perceptrons.
        sparsity: Share of the weights that a mask drops.
        rounds: Of pruning.
        inner_steps: Gradient steps of a perceptron.
        steps: Gradient steps of each predictor.
        batch_size: Pairs in one.
        learning_rate: Largest step size of predictors.
        channels: Of their equivariant layers.
        layers: How many of them.
        code: Channels of z.
        draws: Of z for a mask; the logits are averaged.
    """

    name: ClassVar[str] = "tickets"
    title: ClassVar[str] = "Winning tickets from first weights"
    metric: ClassVar[str] = "accuracy"
    higher: ClassVar[bool] = True
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {"networks": 60, "rounds": 3, "inner_steps": 60, "steps": 20, "channels": 8, "layers": 2, "draws": 2}
    }
    networks: int = 500
    hidden: int = 32
    sparsity: float = 0.95
    rounds: int = 6
    inner_steps: int = 200
    steps: int = 500
    batch_size: int = 16
    learning_rate: float = 3e-3
    channels: int = 16
    layers: int = 3
    code: int = 5
    draws: int = 8

    def __post_init__(self) -> None:
        check_positive(self, "steps", "batch_size", "channels", "layers", "code", "draws")
        if self.networks < 30:
            raise UserError(f"{self.name}.networks={self.networks}: at least 30, for three splits")

    def methods(self) -> tuple[str, ...]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`; the reference is last."""
        return ("random", "magnitude", "marginal", "logistic", "nfn_deterministic", "nfn", "imp")

    def maker(self, seed: int) -> DigitsTickets:
        """How the pairs of a seed are made."""
        return DigitsTickets(**self._pairs(seed))

    def _pairs(self, seed: int) -> dict[str, Any]:
        same = {key: getattr(self, key) for key in ("networks", "hidden", "sparsity", "rounds")}
        return {**same, "steps": self.inner_steps, "seed": seed}

    def prepare(self, seed: int, device: str) -> None:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        make_zoo("digits_tickets", **self._pairs(seed), device=device)

    def run(self, job: Job) -> dict[str, Any]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`.

        Returns:
            ``score``: mean accuracy of the test networks on test images after a training under their masks;
            ``validation``: that of validation networks on validation images; ``overlap``: share of the true ticket in
            the masks; ``dense``: mean accuracy of the same test networks with all their weights.
        """
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        zoo = make_zoo("digits_tickets", **self._pairs(job.seed), progress=False)
        maker, tickets = self.maker(job.seed), zoo.targets["ticket"]
        sizes = torch.cat([zoo.weights[f"layers.{i}.weight"].flatten(1) for i in range(2)], 1).abs()
        draws = torch_generator("tickets", job.method, job.seed)
        known = zoo.splits["train"]
        each = self._each(tickets[known])
        began = time.process_time()
        extra: dict[str, Any] = {"parameters": 0, "curve": []}
        if job.method == "imp":
            masks = tickets
        elif job.method == "random":
            masks = self._by_layer(torch.rand(sizes.shape, generator=draws), each)
        elif job.method == "magnitude":
            masks = self._by_layer(sizes, each)
        elif job.method == "marginal":
            # The largest of log p + Gumbel noise are a draw without replacement by p.
            noise = -torch.log(-torch.log(torch.rand(sizes.shape, generator=draws).clamp(1e-9, 1 - 1e-7)))
            masks = self._by_layer(self._frequencies(tickets[known]).log() + noise, each)
        elif job.method == "logistic":
            scores, extra["parameters"] = self._logistic(sizes, tickets, known)
            masks = self._by_layer(scores, each)
        else:
            masks = torch.zeros_like(tickets)
            held = torch.cat([zoo.splits["val"], zoo.splits["test"]])
            scores, found = self._predicted(job, zoo, held)
            masks[held] = self._by_layer(scores, each)
            extra |= found
        extra["cpu_seconds"] = round(time.process_time() - began, 1)
        return {**extra, **self._measured(maker, zoo, masks)}

    def _measured(self, maker: DigitsTickets, zoo: Zoo, masks: Tensor) -> dict[str, Any]:
        found = {}
        for split, name in (("val", "validation"), ("test", "score")):
            rows = zoo.splits[split]
            first = {key: value[rows] for key, value in zoo.weights.items()}
            mask = masks[rows]
            found[name] = float(maker.accuracy(maker.trained(first, mask), mask, split).mean())
            if split == "test":
                whole = torch.ones_like(mask)
                found["dense"] = float(maker.accuracy(maker.trained(first, whole), whole, split).mean())
                found["overlap"] = float((mask * zoo.targets["ticket"][rows]).sum() / mask.sum())
        return found

    def _each(self, tickets: Tensor) -> tuple[int, int]:
        """How many weights of each matrix tickets keep on average."""
        first = round(float(tickets[:, : 64 * self.hidden].sum(1).mean()))
        return first, int(tickets[0].sum()) - first

    def _by_layer(self, scores: Tensor, each: tuple[int, int]) -> Tensor:
        parts = scores.split((64 * self.hidden, 10 * self.hidden), 1)
        return torch.cat([largest(part, number) for part, number in zip(parts, each)], 1)

    def _frequencies(self, tickets: Tensor) -> Tensor:
        """How often a ticket has a weight of this input or this output, over networks and hidden units: [W].

        A weight that never was in one counts as half of one.
        """
        first, second = tickets.split((64 * self.hidden, 10 * self.hidden), 1)
        seen = len(tickets) * self.hidden
        by_input = (first.view(-1, self.hidden, 64).sum((0, 1)).clamp(min=0.5) / seen).expand(self.hidden, -1)
        by_output = (second.view(-1, 10, self.hidden).sum((0, 2)).clamp(min=0.5) / seen)[:, None]
        return torch.cat([by_input.flatten(), by_output.expand(-1, self.hidden).flatten()])

    def _logistic(self, sizes: Tensor, tickets: Tensor, known: Tensor) -> tuple[Tensor, int]:
        """Logits of a regression on size and log frequency for each matrix, [N, W], and how many numbers it learns."""
        split = 64 * self.hidden
        second = torch.zeros(sizes.shape[1])
        second[split:] = 1
        frequency = self._frequencies(tickets[known]).log()
        scale = sizes[known].mean()
        columns = [sizes / scale, frequency.expand_as(sizes), torch.ones_like(sizes)]
        features = torch.stack([c * side for side in (1 - second, second) for c in columns], -1)  # [N, W, 6]
        weights = torch.zeros(6, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=50, line_search_fn="strong_wolfe")
        inputs, goals = features[known], tickets[known]

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(inputs @ weights, goals)
            loss.backward()
            return loss

        optimizer.step(closure)
        return (features @ weights).detach(), 6

    def _predicted(self, job: Job, zoo: Zoo, held: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Scores of the weights of some networks by a trained predictor, [n, W], and what the row keeps of it."""
        with seeded(job):
            model = TicketVAE(zoo.spec, (self.channels,) * self.layers, self.code if job.method == "nfn" else 0)
        weights = WeightBatch.stack(model.layout, zoo.weights)
        masks = WeightBatch.stack(model.layout, self._as_weights(zoo.targets["ticket"], zoo.weights))
        prunable = {key: torch.full_like(value[:1], float("weight" in key)) for key, value in zoo.weights.items()}
        where = WeightBatch.stack(model.layout, prunable).data[0, :, 0] > 0
        known = zoo.splits["train"]
        model.normalise(select(weights, known), select(masks, known))
        where = where.to(job.device)
        inputs, goals = (select(batch, known).to(job.device) for batch in (weights, masks))
        val_inputs, val_goals = (select(batch, zoo.splits["val"]).to(job.device) for batch in (weights, masks))

        def step_loss(index: Tensor, rng: np.random.Generator) -> Tensor:
            return model.loss(select(inputs, index), select(goals, index), where)

        @torch.no_grad()
        def judge() -> dict[str, float]:
            with evaluating(model), torch.random.fork_rng():
                torch.manual_seed(0)  # the same noise at every evaluation
                pieces = torch.arange(len(val_inputs)).split(self.batch_size)
                total = sum(len(i) * model.loss(select(val_inputs, i), select(val_goals, i), where) for i in pieces)
            return {"score": -float(total) / len(val_inputs)}

        with Run.open(job.folder, {"job": job.name}, resume=True, tensorboard=False) as run:
            fitted = train(
                model,
                step_loss,
                len(inputs),
                steps=self.steps,
                batch_size=min(self.batch_size, len(inputs)),
                learning_rate=self.learning_rate,
                evaluate_every=max(1, self.steps // 10),
                judge=judge,
                seed=job.seed,
                device=job.device,
                run=run,
                report=job.reporter(self.steps),
            )
        model.to(job.device).eval()
        scores = self._drawn(model, select(weights, held).to(job.device), job.seed).cpu()
        tensors = weights.replace(scores[..., None]).tensors()
        flat = torch.cat([tensors[f"layers.{i}.weight"][..., 0].flatten(1) for i in range(2)], 1)
        curve = [[row["step"], -row["validation_score"]] for row in fitted.history]
        return flat, {"parameters": count(model), "curve": curve, "best_step": fitted.step}

    @torch.no_grad()
    def _drawn(self, model: TicketVAE, weights: WeightBatch, seed: int) -> Tensor:
        """Logits of a predictor, averaged over draws of z: [B, P]."""
        rng = torch_generator("tickets", "z", seed)
        out = []
        for index in torch.arange(len(weights)).split(self.batch_size):
            some = select(weights, index)
            if not model.code:
                out.append(model.logits(some))
                continue
            shape = (self.draws, *some.data.shape[:2], model.code)
            codes = torch.randn(shape, generator=rng).to(some.data)
            out.append(torch.stack([model.logits(some, z) for z in codes]).mean(0))
        return torch.cat(out)

    @staticmethod
    def _as_weights(mask: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A mask in the shapes of a network's weights, zero at biases."""
        first, second = weights["layers.0.weight"], weights["layers.1.weight"]
        a, b = mask.split((first[0].numel(), second[0].numel()), 1)
        found = {key: torch.zeros_like(value) for key, value in weights.items()}
        return {**found, "layers.0.weight": a.view_as(first), "layers.1.weight": b.view_as(second)}
