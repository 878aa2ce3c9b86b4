"""Optimizers that are learned for a family of small networks, against tuned ones: curves at two widths.

A rule is meta-trained on networks of one width and then trains networks that it has not met, of that width and, as it
is, of another. The protocol is that of Zhou et al., "Universal Neural Functionals" (NeurIPS 2024, arXiv 2402.05232,
section 4.2) at the size of a CPU.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from fleetgym.benchmarks.learned_optimizer import FAMILIES, Family, measure, tuned_adam, tuned_momentum
from fleetgym.benchmarks.weight_space.reading import count
from fleetgym.benchmarks.weight_space.task import Job, check_positive
from fleetgym.core import Run, UserError
from fleetgym.core.errors import unknown
from fleetgym.core.files import atomic_write
from fleetgym.merging.learned_optimizer import InnerTask, LearnedOptimizer, UpdateRule, pes_train, unroll
from fleetgym.merging.meta_gradient import gradient_train

TUNED = {"sgdm": tuned_momentum, "adam": tuned_adam}


@dataclass(frozen=True)
class OptimizerMLP:
    """Training perceptrons 64-32-10 on digits, and 64-64-10.

    A learned rule begins near momentum SGD, with ``gamma``, and ``alpha`` about two thirds of the step size that a
    search finds for the family, where the meta-loss is smooth: so the meta-steps, which are few, need not find a step
    size. What f adds grows with the gradients (``scale="both"``), so that it can shorten the steps over time and does
    not shake a network that is nearly trained. The objective is the mean logarithm of the loss, because the mean loss
    is nearly all of the first steps. Of the rules on the way the one is kept that trains the tuning networks best.

    The paper learns its rules by evolution strategies (``estimator="pes"``) in 50,000 meta-steps. With the few that a
    CPU affords these stay where they begin; derivatives through 20 steps of training (``gradient``) do not.

    Attributes:
        steps: Meta-steps.
        horizon: T, inner steps of a run, in meta-training and when measuring.
        truncation: K, inner steps of a meta-step.
        estimator: ``gradient`` (:func:`fleetgym.merging.meta_gradient.gradient_train`) or ``pes``
            (:func:`fleetgym.merging.learned_optimizer.pes_train`).
        runs: Inner runs side by side; antithetic pairs of them for ``pes``.
        sigma: Standard deviation of the perturbations of ``pes``.
        learning_rate: Largest step size of the meta-parameters.
        spread: Bound on what one run adds to the derivatives, see
            :class:`fleetgym.merging.meta_gradient.TruncatedGradient`; ``pes`` has none.
        objective: ``log`` or ``mean``; ``pes`` has ``final`` too.
        scale: What the correction sees and how large it is, see
            :class:`fleetgym.merging.learned_optimizer.LearnedOptimizer`.
        alpha: Step size that learned rules begin with.
        gamma: Rate of the momentum that they begin with.
        beta: Weight of the correction that they begin with.
        last: Multiplies the first weights of the correction's last layer.
        hidden: Channels of the correction.
        tuning: Networks that tuned rules are tuned on; also those of ``validation``.
        networks: Networks that every rule is measured on.
        every: Inner steps between points of a curve.
    """

    name: ClassVar[str] = "optimizer_mlp"
    title: ClassVar[str] = "Learned optimizers on perceptrons"
    metric: ClassVar[str] = "training loss at the end"
    measured: ClassVar[str] = "of networks that nothing was learned or tuned on"
    higher: ClassVar[bool] = False
    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "quick": {
            "steps": 4,
            "horizon": 20,
            "truncation": 10,
            "runs": 2,
            "hidden": 8,
            "tuning": 1,
            "networks": 2,
            "every": 5,
        }
    }
    family: ClassVar[str] = "mlp"
    steps: int = 200
    horizon: int = 200
    truncation: int = 20
    estimator: str = "gradient"
    runs: int = 8
    sigma: float = 0.01
    learning_rate: float = 0.003
    spread: float = 2.0
    objective: str = "log"
    scale: str = "both"
    alpha: float = 0.4
    gamma: float = 0.86
    beta: float = 1.0
    last: float = 0.1
    hidden: int = 32
    tuning: int = 16
    networks: int = 32
    every: int = 10

    def __post_init__(self) -> None:
        check_positive(self, "steps", "horizon", "truncation", "runs", "hidden", "tuning", "networks", "every")
        if self.estimator not in ("gradient", "pes"):
            raise unknown(f"setting of {self.name}.estimator", self.estimator, ("gradient", "pes"))
        if self.horizon % self.truncation:
            raise UserError(
                f"{self.name}.horizon={self.horizon} is no multiple of {self.name}.truncation={self.truncation}; "
                "choose one that is"
            )
        if not self.spread >= 1:
            raise UserError(f"{self.name}.spread={self.spread}: it must be at least 1; inf sets no bound")
        if self.tuning > 500 or self.networks > 500:
            raise UserError(f"{self.name}: tuning={self.tuning} and networks={self.networks} may be 500 at most")

    @property
    def found(self) -> Family:
        """The family of problems."""
        return FAMILIES[self.family]

    def methods(self) -> tuple[str, ...]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`."""
        return (*TUNED, *(kind for kind in ("deepset", "nfn", "unf") if kind in self.found.kinds))

    def prepare(self, seed: int, device: str) -> None:
        """Nothing: families are made from data that packages bring along."""

    def run(self, job: Job) -> dict[str, Any]:
        """See :class:`~fleetgym.benchmarks.weight_space.task.Task`.

        ``score`` is the mean training loss of ``networks`` networks after ``horizon`` steps; ``other_width`` holds the
        same at a width that neither tuning nor meta-training has seen, and for tuned rules ``tuned_again`` what
        they reach there with numbers that are tuned there. The networks are the same for all methods of a seed, and
        others than those of tuning.
        """
        if job.method not in self.methods():
            raise unknown("method", job.method, self.methods())
        if job.device != "cpu":
            raise UserError(f"--device {job.device}: {self.name} runs on the processor; its networks are small")
        here, there = self.found.make(self.found.width), self.found.make(self.found.other)
        tuning = self.tuned_on(job)
        fresh = range(1000 * job.seed, 1000 * job.seed + self.networks)
        began = time.process_time()
        again = None
        if job.method in TUNED:
            rule, facts = TUNED[job.method](here, self.horizon, tuning)
            row: dict[str, Any] = {"validation": facts["loss"], "found": facts["setting"]}
            spent = time.process_time() - began
            again, _ = TUNED[job.method](there, self.horizon, tuning)
        else:
            rule = self.learn(here, job)
            spent = time.process_time() - began
            ends = unroll(rule, here, self.horizon, tuning).measured["train"][0, :, -1]
            numbers = {name: getattr(rule, name).item() for name in ("alpha", "gamma", "beta")}
            row = {"validation": float(ends.mean()), "found": numbers}

        def measured(rule: UpdateRule, task: InnerTask) -> dict[str, Any]:
            return measure(rule, task, self.horizon, fresh, self.every)

        row |= measured(rule, here)
        row["other_width"] = measured(rule, there)
        if again is not None:
            row["tuned_again"] = measured(again, there)
        widths = {"width": self.found.width, "other": self.found.other}
        return {**row, **widths, "parameters": count(rule), "cpu_seconds": round(spent, 1)}

    def tuned_on(self, job: Job) -> range:
        """Seeds of networks that numbers are tuned on, and the best of a rule's meta-steps is chosen on.

        Each seed of a job has a thousand, the second half of them for this.
        """
        return range(1000 * job.seed + 500, 1000 * job.seed + 500 + self.tuning)

    def learn(self, task: InnerTask, job: Job) -> LearnedOptimizer:
        """Meta-trains a rule; what was stopped goes on from the state in the job's folder."""
        start = LearnedOptimizer(
            task.spec,
            job.method,
            symmetry="np" if job.method == "nfn" else self.found.symmetry,
            hidden=self.hidden,
            scale=self.scale,
            alpha=self.alpha,
            gamma=self.gamma,
            beta=self.beta,
            seed=job.seed,
        )
        with torch.no_grad():
            for parameter in start.last.parameters():
                parameter.mul_(self.last)
        with Run.open(job.folder, {"job": job.name}, resume=True, tensorboard=False) as run:
            options = {
                "horizon": self.horizon,
                "truncation": self.truncation,
                "lr": self.learning_rate,
                "objective": self.objective,
                "seed": job.seed,
                "run": run,
                "report": job.reporter(self.steps),
            }
            if self.estimator == "gradient":

                def judge(rule: UpdateRule) -> float:
                    return float(
                        unroll(rule, task, self.horizon, self.tuned_on(job)).measured["train"][0, :, -1].mean()
                    )

                trained = gradient_train(
                    start, task, self.steps, runs=self.runs, spread=self.spread, judge=judge, **options
                )
            else:
                # A perturbation is a hundredth of these numbers, not the same for a step size of 0.01 and one of 1.
                units = {"alpha": self.alpha, "gamma": 1 - self.gamma, "beta": self.beta}
                trained = pes_train(start, task, self.steps, pairs=self.runs, sigma=self.sigma, units=units, **options)
        assert isinstance(trained.rule, LearnedOptimizer)
        return trained.rule

    @classmethod
    def plot(cls, rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
        """Draws the training loss against inner steps at both widths; a thin line for each seed."""
        return plot(rows, path, cls.title)


@dataclass(frozen=True)
class OptimizerCNN(OptimizerMLP):
    """Training small CNNs on digits; see :class:`OptimizerMLP`."""

    name: ClassVar[str] = "optimizer_cnn"
    title: ClassVar[str] = "Learned optimizers on CNNs"
    family: ClassVar[str] = "cnn"
    steps: int = 150
    alpha: float = 0.2
    gamma: float = 0.95
    tuning: int = 4
    networks: int = 16


@dataclass(frozen=True)
class OptimizerRNN(OptimizerMLP):
    """Training recurrent networks to predict letters; see :class:`OptimizerMLP`."""

    name: ClassVar[str] = "optimizer_rnn"
    title: ClassVar[str] = "Learned optimizers on recurrent networks"
    family: ClassVar[str] = "rnn"
    steps: int = 100
    alpha: float = 0.3
    gamma: float = 0.9
    hidden: int = 16
    tuning: int = 4
    networks: int = 16


@dataclass(frozen=True)
class OptimizerTransformer(OptimizerMLP):
    """Training transformers to predict letters; see :class:`OptimizerMLP`."""

    name: ClassVar[str] = "optimizer_transformer"
    title: ClassVar[str] = "Learned optimizers on transformers"
    family: ClassVar[str] = "transformer"
    steps: int = 100
    alpha: float = 0.15
    gamma: float = 0.8
    hidden: int = 16
    tuning: int = 4
    networks: int = 16


@dataclass(frozen=True)
class OptimizerPolicy(OptimizerMLP):
    """Cloning the behaviour of a pendulum's expert by feed-forward policies; see :class:`OptimizerMLP`.

    Meta-steps are smaller: with those of the others every rule on the way diverges before the horizon.
    """

    name: ClassVar[str] = "optimizer_policy"
    title: ClassVar[str] = "Learned optimizers on policies"
    family: ClassVar[str] = "policy"
    learning_rate: float = 0.001
    spread: float = math.inf
    alpha: float = 0.06
    gamma: float = 0.96


_STYLES = {
    "sgdm": ("#dd3333", "-"),
    "adam": ("#dd8833", "-"),
    "deepset": ("#338844", "-."),
    "nfn": ("#22aacc", "--"),
    "unf": ("#3366cc", "-"),
}


def plot(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> Path:
    """Draws curves of training loss at the width that rules were made for and at another; see :class:`OptimizerMLP`.

    Args:
        rows: Of one task.
        path: A .png or .svg file.
        title: Above the panels.
    """
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc: the same results give the same plot everywhere
        matplotlib.rcParams.update({"svg.hashsalt": "optimizers", "font.size": 9})
        figure = Figure(figsize=(8.5, 3.4), layout="constrained")
        figure.suptitle(title)
        left, right = figure.subplots(1, 2, sharey=True)
        seen: set[str] = set()

        def draw(axes: Any, row: Mapping[str, Any], part: Mapping[str, Any], again: bool = False) -> None:
            colour, line = _STYLES[row["method"]]
            label = row["method"] + (", tuned again" if again else "")
            steps, losses = zip(*part["curve"])
            # What diverged has no loss from there on; matplotlib leaves NaN out.
            losses = [float("nan") if loss is None else loss for loss in losses]
            style = {"color": colour, "linewidth": 1.0, "linestyle": ":" if again else line}
            axes.plot(steps, losses, **style, label=None if label in seen else label)
            seen.add(label)

        for row in rows:
            draw(left, row, row)
            draw(right, row, row["other_width"])
            if "tuned_again" in row:
                draw(right, row, row["tuned_again"], again=True)
        for axes, name in ((left, f"width {rows[0]['width']}"), (right, f"width {rows[0]['other']}, not seen before")):
            axes.set_title(name)
            axes.set_yscale("log")
            axes.set_xlabel("steps")
            axes.spines[["top", "right"]].set_visible(False)
        left.set_ylabel("training loss")
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        with atomic_write(path) as temporary:
            kind = path.suffix[1:]
            figure.savefig(temporary, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return path
