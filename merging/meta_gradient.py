"""Learning an update rule by differentiating through pieces of training, in place of evolution strategies.

Persistent evolution strategies estimate the gradient of thousands of parameters from a handful of numbers, without
bias; with few runs the noise drowns it. Differentiating through K steps of training gives the gradient of these steps
exactly, and is blind to what lies beyond them (truncated backpropagation through time: Werbos, Proceedings of the IEEE
1990; for learned optimizers Andrychowicz et al., NeurIPS 2016, here with second derivatives; on what is missed, Wu et
al., "Understanding short-horizon bias in stochastic meta-optimization", ICLR 2018).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map

from fleetgym.core import Run, UserError
from fleetgym.core.errors import unknown
from fleetgym.core.seeding import torch_generator
from fleetgym.merging.learned_optimizer import InnerTask, MetaTrained, UpdateRule, check_fits, meta_train

OBJECTIVES = ("log", "mean")


class TruncatedGradient:
    """Gradients of a meta-objective by differentiating through K steps of N inner runs.

    The runs go on from piece to piece, and begin anew at the horizon or where they diverge; the first ones have
    different lengths, so that at any time the runs are at different places. The objective is taken after each step on
    a minibatch that the step has not seen.

    Args:
        rule: Its parameters are theta; it is not changed.
        task: The inner problem.
        runs: N.
        horizon: T, the length of an inner run in steps.
        truncation: K, the length of a piece; T is a multiple.
        objective: ``log``: the mean of the logarithms of the losses, to which the end of a run adds as much as its
            beginning. ``mean``: the mean of the losses.
        cap: A loss above ``cap`` times that of fresh weights counts as that, and its run begins anew.
        spread: Going backwards through the steps, the derivative by the state of a run is scaled down where its norm is
            above ``spread`` times the median of the runs, and left out where it is not finite: a run at the edge of
            diverging would drown the others. Infinity leaves
            all as they are.
        seed: Determines every draw.

    Attributes:
        theta: The rule's parameters, flat, [D]; change it between the pieces.
        tensors: What the next piece needs beside theta.

    Raises:
        UserError: A number out of range, an unknown objective, or a rule for another network.
    """

    def __init__(
        self,
        rule: UpdateRule,
        task: InnerTask,
        *,
        runs: int = 8,
        horizon: int = 200,
        truncation: int = 20,
        objective: str = "log",
        cap: float = 4.0,
        spread: float = math.inf,
        seed: int = 0,
    ) -> None:
        for name, value in (("runs", runs), ("horizon", horizon), ("truncation", truncation)):
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        if horizon % truncation:
            raise UserError(f"horizon={horizon} is no multiple of truncation={truncation}; choose one that is")
        if not cap > 1:
            raise UserError(f"cap={cap}: it must exceed 1, or every run would count as diverged")
        if not spread >= 1:
            raise UserError(f"spread={spread}: it must be at least 1, for the median run itself to stay")
        if objective not in OBJECTIVES:
            raise unknown("objective", objective, OBJECTIVES)
        check_fits(rule, task)
        self.rule, self.task, self.runs, self.what, self.seed = rule, task, runs, "inner runs", seed
        self.horizon, self.truncation, self.objective = horizon, truncation, objective
        self.cap, self.spread = cap, spread
        self._shapes = {name: p.shape for name, p in rule.named_parameters()}
        self.theta = torch.cat([p.detach().reshape(-1) for p in rule.parameters()])
        like, pieces = self.theta, horizon // truncation
        self.tensors = {
            "weights": like.new_zeros(runs, rule.layout.size),
            "moments": rule.fresh(runs),
            "first": like.new_zeros(runs),
            "done": torch.zeros(runs, dtype=torch.int64),
            "ends": torch.tensor([math.ceil(pieces * (n + 1) / runs) for n in range(runs)]) * truncation,
        }

    def parameters(self, theta: Tensor) -> dict[str, Tensor]:
        """Flat parameters [D] as the rule's tensors."""
        pieces = theta.split([shape.numel() for shape in self._shapes.values()])
        return {name: piece.view(shape) for (name, shape), piece in zip(self._shapes.items(), pieces)}

    def estimate(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """Runs a piece of every inner run and differentiates through it.

        Args:
            step: The number of the piece; it seeds the draws.

        Returns:
            The gradient at ``theta``, [D] (zero where it is not finite), and numbers: ``loss`` (mean over the piece and
            the runs), ``final`` (after the last step of the runs that have ended, NaN if none has) and ``resets`` (runs
            that diverged).
        """
        s, n, layout = self.tensors, self.runs, self.rule.layout
        value = vmap(lambda w, b: self.task.value(layout, w, b))
        slope = vmap(grad_and_value(lambda w, b: self.task.value(layout, w, b)))
        draws = torch_generator("meta_gradient", self.task.name, self.seed, step)
        fresh = s["done"] == 0
        weights, moments, first = s["weights"].clone(), s["moments"].clone(), s["first"].clone()
        for run in fresh.nonzero()[:, 0].tolist():
            start = self.task.initial(layout, "meta_gradient", self.seed, step, run)
            weights[run], moments[run] = start.to(self.theta), 0.0
        theta = self.theta.clone().requires_grad_()
        own = self.parameters(theta)
        total, seen = theta.new_zeros(()), []
        for i in range(self.truncation):
            batch, other = (tree_map(lambda x: x.to(theta.device), self.task.batches(draws, n)) for _ in range(2))
            gradients, before = slope(weights, batch)
            if i == 0:
                first = torch.where(fresh.to(first.device), before.detach(), first)
            t = (s["done"] + i).to(theta)
            weights, moments = functional_call(self.rule, own, (weights, gradients, moments, t))
            if math.isfinite(self.spread):
                for state in (weights, moments):
                    state.register_hook(self._tamed)
            after = value(weights, other)
            seen.append(after.detach())
            # A loss beyond the bound, or none at all, has no gradient.
            counted = torch.where(after <= self.cap * first, after, (self.cap * first).detach())
            total = total + (counted.clamp_min(1e-8).log() if self.objective == "log" else counted).mean()
        (gradient,) = torch.autograd.grad(total / self.truncation, theta)
        if not bool(torch.isfinite(gradient).all()):
            gradient = torch.zeros_like(gradient)
        losses = torch.stack(seen)
        broken = (~(losses <= self.cap * first)).any(0).cpu()
        done = s["done"] + self.truncation
        ended = done >= s["ends"]
        finals = losses[-1].cpu()[ended & ~broken]
        over = ended | broken
        self.tensors = {
            "weights": torch.where(broken[:, None].to(first.device), 0.0, weights.detach()),
            "moments": torch.where(broken[:, None, None].to(first.device), 0.0, moments.detach()),
            "first": first,
            "done": torch.where(over, 0, done),
            "ends": torch.where(over, self.horizon, s["ends"]),
        }
        return gradient, {
            "loss": float(losses.nan_to_num(posinf=0.0).mean()),
            "final": float(finals.mean()) if finals.numel() else math.nan,
            "resets": int(broken.sum()),
        }

    def _tamed(self, gradient: Tensor) -> Tensor:
        """A derivative by the states of the runs, [N, ...], without what is far above the median."""
        norms = gradient.flatten(1).norm(dim=1)
        some = torch.isfinite(norms) & (norms > 0)
        bound = self.spread * norms.where(some, math.nan).nanmedian()
        scale = torch.where(norms > bound, bound / norms, 1.0)
        shape = (-1, *[1] * (gradient.ndim - 1))
        return torch.where(some.view(shape), gradient * scale.view(shape), 0.0)


def gradient_train(
    rule: UpdateRule,
    task: InnerTask,
    steps: int,
    *,
    runs: int = 8,
    horizon: int = 200,
    truncation: int = 20,
    lr: float = 0.001,
    decay: bool = True,
    clip: float = 1.0,
    objective: str = "log",
    cap: float = 4.0,
    spread: float = math.inf,
    seed: int = 0,
    run: Run | None = None,
    save_every: int = 50,
    log_every: int = 10,
    report: Callable[[dict[str, float]], None] | None = None,
    judge: Callable[[UpdateRule], float] | None = None,
    judge_every: int = 20,
) -> MetaTrained:
    """Learns a rule's parameters by Adam along gradients through pieces of training (:class:`TruncatedGradient`).

    Equal arguments give equal rules, on one machine bit by bit, however often a run was stopped and resumed.

    Args:
        rule: Where to begin; it is not changed. A rule that trains already (momentum SGD with tuned numbers) saves the
            search for a step size, which pieces of training show poorly.
        task: The family of inner problems; its loss must have second derivatives.
        steps: Meta-steps, of ``truncation`` inner steps each.
        runs: See :class:`TruncatedGradient`, as the next two.
        horizon: See there.
        truncation: See there.
        lr: Step size of Adam on the parameters.
        decay: Whether ``lr`` goes to zero along half a cosine.
        clip: Largest norm of a gradient; longer ones are scaled down.
        objective: See :class:`TruncatedGradient`.
        cap: See there.
        spread: See there.
        seed: Determines every draw.
        run: See :func:`fleetgym.merging.learned_optimizer.pes_train`, as the last three.
        save_every: See there.
        log_every: See there.
        report: See there.
        judge: See :func:`fleetgym.merging.learned_optimizer.meta_train`, as the last.
        judge_every: See there.

    Returns:
        The learned rule and its history.

    Raises:
        UserError: A number out of range, a rule for another network or one that cannot be saved; or all runs diverge in
            20 meta-steps on end.
    """
    options: dict[str, Any] = {"runs": runs, "horizon": horizon, "truncation": truncation, "objective": objective}
    estimator = TruncatedGradient(rule, task, **options, cap=cap, spread=spread, seed=seed)
    facts = {**options, "spread": spread, "estimator": "gradient"}
    return meta_train(
        estimator, steps, facts, lr=lr, decay=decay, clip=clip, run=run, save_every=save_every, log_every=log_every,
        report=report, judge=judge, judge_every=judge_every,
    )  # fmt: skip
