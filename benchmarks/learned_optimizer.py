"""Learned optimizers against tuned ones, on families of small training problems.

The families are those of Zhou et al., "Universal Neural Functionals" (arXiv 2402.05232, section 4.2) at the size of a
CPU, with data that come with packages: images of digits, the English of scikit-learn's descriptions, and a pendulum's
expert. A rule is meta-trained on one family by persistent evolution strategies and compared there, and on another
width, with momentum SGD and Adam whose numbers are tuned on the same family.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.core import Run, UserError
from fleetgym.core.errors import unknown
from fleetgym.core.files import atomic_write, write_json
from fleetgym.core.optional import install_line
from fleetgym.core.records import provenance
from fleetgym.core.seeding import generator
from fleetgym.merging.learned_optimizer import (
    KINDS,
    Adam,
    InnerTask,
    LearnedOptimizer,
    Momentum,
    UpdateRule,
    load_rule,
    pes_train,
    unroll,
)

TUNING_SEEDS = tuple(range(1000, 1008))
"""Inner seeds that numbers are tuned on; those of a comparison are others."""


# ---- families of problems -------------------------------------------------------------------------------------------


def _drawn(train: Any, size: int) -> Callable[[torch.Generator, int], Any]:
    """Minibatches of ``size`` rows of a tuple of tensors, with replacement."""

    def batches(draws: torch.Generator, n: int) -> Any:
        rows = torch.randint(len(train[0]), (n, size), generator=draws)
        return tuple(tensor[rows] for tensor in train)

    return batches


def _classify(network: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


@functools.cache
def digits() -> dict[str, tuple[Tensor, Tensor]]:
    """scikit-learn's 1,797 images of handwritten digits: pixels [N, 64] in 0..1 and classes, 360 of them for tests."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UserError(f"the digits come with scikit-learn; {install_line('zoos')}") from error

    data = load_digits()
    order = generator("learned_optimizer", "digits").permutation(len(data.target))
    pixels = torch.from_numpy(data.data[order] / 16).float()
    classes = torch.from_numpy(data.target[order]).long()
    return {"train": (pixels[360:], classes[360:]), "test": (pixels[:360], classes[:360])}


def mlp_task(width: int = 32, batch: int = 128) -> InnerTask:
    """A perceptron 64-width-10 on 8x8 digits, as in the paper."""
    sets = digits()
    return InnerTask(
        f"mlp-{width}",
        lambda: nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10)),
        _drawn(sets["train"], batch),
        _classify,
        sets,
        torch.zeros(2, 64),
    )


def cnn_task(width: int = 16, batch: int = 64) -> InnerTask:
    """Two convolutions, of width / 2 and width channels, global average pooling and a linear layer, on 8x8 digits."""
    sets = {name: (x.view(-1, 1, 8, 8), y) for name, (x, y) in digits().items()}

    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(1, width // 2, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width // 2, width, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(width, 10),
        )

    return InnerTask(f"cnn-{width}", make, _drawn(sets["train"], batch), _classify, sets, torch.zeros(2, 1, 8, 8))


@functools.cache
def text() -> tuple[Tensor, int]:
    """The descriptions of scikit-learn's data sets: characters as numbers, [L] int64, and how many different ones."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise UserError(f"the text comes with scikit-learn; {install_line('zoos')}") from error

    names = ("load_breast_cancer", "load_diabetes", "load_digits", "load_iris", "load_linnerud", "load_wine")
    words = " ".join(" ".join(getattr(datasets, name)().DESCR for name in names).lower().split())
    letters = sorted(set(words))
    return torch.tensor([letters.index(letter) for letter in words]), len(letters)


def _passages(length: int, batch: int) -> tuple[Callable[[torch.Generator, int], Tensor], dict[str, Tensor]]:
    """Minibatches of passages of ``length + 1`` characters, and fixed ones to measure on; the last tenth for tests."""
    letters, _ = text()
    split = len(letters) * 9 // 10

    def cut(begin: Tensor) -> Tensor:
        return letters[begin[..., None] + torch.arange(length + 1)]

    def batches(draws: torch.Generator, n: int) -> Tensor:
        return cut(torch.randint(split - length - 1, (n, batch), generator=draws))

    train = cut(torch.arange(0, split - length - 1, (split - length - 1) // 250))
    return batches, {"train": train, "test": cut(torch.arange(split, len(letters) - length - 1, length))}


def _next_letter(network: Callable[..., Tensor], passages: Tensor) -> Tensor:
    return F.cross_entropy(network(passages[..., :-1]).flatten(0, 1), passages[..., 1:].flatten())


class LetterRNN(nn.Module):
    """Predicts the next letter: embedding, one tanh recurrence, linear output."""

    def __init__(self, letters: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, embedding)
        self.enter = nn.Linear(embedding, hidden)
        self.again = nn.Linear(hidden, hidden, bias=False)
        self.head = nn.Linear(hidden, letters)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, letters]
        """Logits of the letter after each."""
        entering = self.enter(self.embed(tokens))
        state, states = torch.tanh(entering[:, 0]), []
        states.append(state)
        for i in range(1, tokens.shape[1]):
            state = torch.tanh(entering[:, i] + self.again(state))
            states.append(state)
        return self.head(torch.stack(states, 1))


def rnn_task(width: int = 64, batch: int = 64, length: int = 16) -> InnerTask:
    """A character RNN with ``width`` hidden units and 32 channels of embedding, on passages of 16 letters."""
    batches, sets = _passages(length, batch)
    letters = text()[1]
    example = torch.zeros(2, length, dtype=torch.long)
    return InnerTask(f"rnn-{width}", lambda: LetterRNN(letters, 32, width), batches, _next_letter, sets, example)


class _Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out, self.up, self.down = nn.Linear(width, width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # [B, T, C] -> [B, T, C]
        batch, time, width = x.shape
        y = self.norm1(x)
        q, k, v = (
            layer(y).view(batch, time, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(-2, -1) / (width // self.heads) ** 0.5
        later = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
        mixed = scores.masked_fill(later, float("-inf")).softmax(-1) @ v
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return x + self.down(torch.relu(self.up(self.norm2(x))))


class LetterTransformer(nn.Module):
    """Predicts the next letter: embedding with learned places, pre-norm blocks, linear output."""

    def __init__(self, letters: int, width: int, heads: int, blocks: int, length: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(letters, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, letters)

    def forward(self, tokens: Tensor) -> Tensor:  # [B, T] -> [B, T, letters]
        """Logits of the letter after each."""
        x = self.embed(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def transformer_task(width: int = 32, batch: int = 8, length: int = 8, blocks: int = 2) -> InnerTask:
    """A transformer of two blocks with 4 heads, on passages of 8 letters."""
    if width % 4:
        raise UserError(f"width {width}: a multiple of 4 is wanted, for 4 heads")
    batches, sets = _passages(length, batch)
    letters = text()[1]

    def make() -> nn.Module:
        return LetterTransformer(letters, width, 4, blocks, length)

    example = torch.zeros(2, length, dtype=torch.long)
    return InnerTask(f"transformer-{width}", make, batches, _next_letter, sets, example)


def swing_up(observation: np.ndarray) -> np.ndarray:
    """An expert for Gymnasium's Pendulum-v1: pumps energy until the pendulum is near the top, then holds it there.

    Energy shaping after Astrom and Furuta (Automatica 2000), and a linear controller within 0.4 rad of the top.

    Args:
        observation: cos and sin of the angle from the top, and angular velocity in rad/s, [3].

    Returns:
        The torque in N m, [1], within 2.
    """
    cosine, sine, speed = map(float, observation)
    angle = np.arctan2(sine, cosine)
    # Uniform rod of 1 kg and 1 m with g = 10 m/s^2, as in Pendulum-v1; the energy at rest at the top is 5 J.
    energy = speed**2 / 6 + 5 * cosine
    torque = -(16 * angle + 4 * speed) if abs(angle) < 0.4 else 2 * (5 - energy) * (1 if speed >= 0 else -1)
    return np.clip([torque], -2.0, 2.0).astype(np.float32)


@functools.cache
def pendulum() -> dict[str, tuple[Tensor, Tensor]]:
    """60 episodes of :func:`swing_up`: observations [N, 1, 3] and torques [N, 1, 1] in units of 2 N m; 12 are tests."""
    import gymnasium

    env = gymnasium.make("Pendulum-v1", max_episode_steps=120)
    rows: list[list[tuple[np.ndarray, np.ndarray]]] = []
    for seed in range(60):
        observation, _ = env.reset(seed=seed)
        rows.append([])
        done = False
        while not done:
            torque = swing_up(observation)
            rows[-1].append((observation / np.array([1, 1, 8], np.float32), torque / 2))
            observation, _, terminated, truncated, _ = env.step(torque)
            done = terminated or truncated
    env.close()

    def stacked(episodes: list[list[tuple[np.ndarray, np.ndarray]]]) -> tuple[Tensor, Tensor]:
        x, y = (np.stack([step[i] for episode in episodes for step in episode]) for i in range(2))
        return torch.from_numpy(x).float()[:, None], torch.from_numpy(y).float()[:, None]

    return {"train": stacked(rows[12:]), "test": stacked(rows[:12])}


def policy_task(width: int = 32, batch: int = 128) -> InnerTask:
    """Behaviour cloning of the pendulum's expert by a feed-forward policy; the loss is the mean squared error."""
    sets = pendulum()
    return InnerTask(
        f"policy-{width}",
        lambda: RecurrentPolicy(3, 1, cell="mlp", hidden=width),
        _drawn(sets["train"], batch),
        lambda network, data: (network(data[0])[0] - data[1]).square().mean(),
        sets,
        torch.zeros(2, 1, 3),
    )


@dataclass(frozen=True)
class Family:
    """A family of inner problems.

    Attributes:
        make: Gives it at a width.
        width: The width that rules are meta-trained on.
        other: A width that they have not seen.
        symmetry: That of the rules; ``nfn``, which takes matrices only, has ``np``.
        kinds: Which last layers fit.
    """

    make: Callable[[int], InnerTask]
    width: int
    other: int
    symmetry: str = "np"
    kinds: tuple[str, ...] = KINDS


FAMILIES: dict[str, Family] = {
    "mlp": Family(mlp_task, 32, 64),
    "cnn": Family(cnn_task, 16, 24, "full"),
    "rnn": Family(rnn_task, 64, 96, "full", ("unf", "deepset")),
    "transformer": Family(transformer_task, 32, 48, "full", ("unf", "deepset")),
    "policy": Family(policy_task, 32, 64),
}
"""Families by the name that ``--tasks`` takes."""


# ---- comparison -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How rules are learned and compared.

    Attributes:
        steps: Meta-steps.
        horizon: T, inner steps of a run, in meta-training and in the comparison.
        truncation: K, inner steps between meta-steps.
        pairs: Antithetic pairs of inner runs.
        sigma: Standard deviation of the perturbations.
        lr: Step size of the meta-parameters.
        objective: Of meta-training, ``mean`` or ``final``.
        scale: What f sees, see ``LearnedOptimizer``.
        alpha: Step size that learned rules begin with.
        gamma: Rate of the momentum that they begin with.
        seeds: Of meta-training; one rule each.
        inner_seeds: How many networks each rule trains in the comparison.
        every: Inner steps between points of a curve.
    """

    steps: int = 600
    horizon: int = 200
    truncation: int = 20
    pairs: int = 8
    sigma: float = 0.01
    lr: float = 0.003
    objective: str = "mean"
    scale: str = "tensor"
    alpha: float = 0.3
    gamma: float = 0.9
    seeds: tuple[int, ...] = (0, 1, 2)
    inner_seeds: int = 10
    every: int = 10


def family(name: str) -> Family:
    """The family of a name.

    Raises:
        UserError: There is none.
    """
    if name not in FAMILIES:
        raise unknown("task family", name, FAMILIES)
    return FAMILIES[name]


def meta_train(name: str, kind: str, settings: Settings, seed: int, folder: Path) -> LearnedOptimizer:
    """Learns a rule on a family, or reads the one that is finished; what was stopped goes on.

    Args:
        name: The family.
        kind: The last layer.
        settings: How.
        seed: Of the rule's first weights and of all draws.
        folder: The run's folder.

    Raises:
        UserError: Unknown family, a kind that does not fit it, or a folder of other settings.
    """
    found = family(name)
    if kind not in found.kinds:
        raise UserError(f"kind {kind!r} does not fit the family {name!r}; choose among {', '.join(found.kinds)}")
    task = found.make(found.width)
    facts = {k: v for k, v in asdict(settings).items() if k not in ("seeds", "inner_seeds", "every")}
    start = LearnedOptimizer(
        task.spec,
        kind,
        symmetry="np" if kind == "nfn" else found.symmetry,
        scale=settings.scale,
        alpha=settings.alpha,
        gamma=settings.gamma,
        seed=seed,
    )
    with Run.open(folder, {"task": name, "kind": kind, "seed": seed, **facts}, resume=True, tensorboard=False) as run:
        if run.resumed_step == settings.steps and (folder / "checkpoints" / "last").is_dir():
            return load_rule(folder)
        trained = pes_train(start, task, settings.steps, **_meta(settings), lr=settings.lr, seed=seed, run=run)
    assert isinstance(trained.rule, LearnedOptimizer)
    return trained.rule


def _meta(settings: Settings) -> dict[str, Any]:
    names = ("horizon", "truncation", "pairs", "sigma", "objective")
    return {name: getattr(settings, name) for name in names}


def best_of(
    rule: UpdateRule, task: InnerTask, steps: int, grid: Mapping[str, Tensor]
) -> tuple[dict[str, float], float]:
    """The setting with the least mean training loss after ``steps``, over the seeds that are kept for tuning.

    Args:
        rule: Its parameters are replaced.
        task: What to train.
        steps: Inner steps.
        grid: Values of each parameter; all combinations are tried.

    Returns:
        The setting and its loss.

    Raises:
        UserError: Every setting diverges on some seed.
    """
    names = list(grid)
    points = torch.cartesian_prod(*grid.values()).reshape(-1, len(names))
    found = unroll(rule, task, steps, TUNING_SEEDS, settings={name: points[:, i] for i, name in enumerate(names)})
    losses = found.measured["train"][..., -1].mean(1)
    losses = torch.where(losses.isfinite(), losses, torch.inf)
    best = int(losses.argmin())
    if not bool(losses[best].isfinite()):
        raise UserError(f"every setting of {type(rule).__name__} diverges on {task.name}; try smaller steps")
    return {name: float(points[best, i]) for i, name in enumerate(names)}, float(losses[best])


def _near(value: float, factor: float, count: int) -> Tensor:
    """Values about one, evenly in the logarithm."""
    return value * torch.logspace(-1, 1, count, base=factor)


def tuned_momentum(task: InnerTask, settings: Settings, *, pes: bool = True) -> tuple[Momentum, dict[str, Any]]:
    """Momentum SGD with the best step size and rate that a search finds for a family.

    A grid of 16 step sizes and 9 rates, a finer grid of 9 and 7 about its best, and meta-training of the two numbers
    by the same evolution strategies as the learned rules from there. Whichever has the least loss on the tuning seeds
    is taken.

    Returns:
        The rule, and what was found on the way.
    """
    coarse = {
        "alpha": torch.logspace(-2.5, 0.5, 16),
        "gamma": torch.tensor([0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]),
    }
    first, first_loss = best_of(Momentum(task.spec), task, settings.horizon, coarse)
    fine = {
        "alpha": _near(first["alpha"], 1.5, 9),
        "gamma": (1 - _near(1 - first["gamma"], 1.6, 7)).clamp_min(0.0),
    }
    best, loss = best_of(Momentum(task.spec), task, settings.horizon, fine)
    if first_loss < loss:
        best, loss = first, first_loss
    facts: dict[str, Any] = {"grid": first, "grid_loss": first_loss, "fine": best, "fine_loss": loss, "by": "grid"}
    if pes:
        start = Momentum(task.spec, **best)
        # Perturbations of 0.01 would be most of a small step size: a fraction of it, then.
        options = {**_meta(settings), "sigma": min(settings.sigma, 0.1 * best["alpha"])}
        learned = pes_train(start, task, settings.steps, **options, lr=0.001).rule
        assert isinstance(learned, Momentum)
        point = {"alpha": learned.alpha.detach()[None], "gamma": learned.gamma.detach()[None]}
        found, value = best_of(start, task, settings.horizon, point)
        facts |= {"pes": found, "pes_loss": value}
        if value < loss:
            best, loss, facts["by"] = found, value, "pes"
    return Momentum(task.spec, **best), {**facts, "best": best, "loss": loss}


def tuned_adam(task: InnerTask, settings: Settings) -> tuple[Adam, dict[str, Any]]:
    """Adam with the best step size and rates of a grid (13 x 4 x 3) and a finer one about its best (9 x 3 x 3)."""
    coarse = {
        "alpha": torch.logspace(-3.5, -0.5, 13),
        "beta1": torch.tensor([0.7, 0.9, 0.95, 0.98]),
        "beta2": torch.tensor([0.95, 0.99, 0.999]),
    }
    first, first_loss = best_of(Adam(task.spec), task, settings.horizon, coarse)
    fine = {
        "alpha": _near(first["alpha"], 1.6, 9),
        **{name: 1 - _near(1 - first[name], 1.5, 3) for name in ("beta1", "beta2")},
    }
    best, loss = best_of(Adam(task.spec), task, settings.horizon, fine)
    if first_loss < loss:
        best, loss = first, first_loss
    facts = {"grid": first, "grid_loss": first_loss, "best": best, "loss": loss}
    return Adam(task.spec, **best), facts


def measure(rule: UpdateRule, task: InnerTask, settings: Settings, /, **facts: Any) -> dict[str, Any]:
    """A row of results: how a rule trains networks of a task.

    Args:
        rule: The rule.
        task: What to train, at any width that the rule can be put on.
        settings: How many networks, and for how long.
        **facts: What else belongs into the row.

    Returns:
        ``places`` and ``curve`` (mean training loss over the networks there), ``final`` and ``final_test`` (the loss
        at the end, of each network; None where it diverged) and the facts.
    """
    found = unroll(rule.on(task.spec), task, settings.horizon, range(settings.inner_seeds), every=settings.every)

    def rounded(values: Tensor) -> list[float | None]:
        return [float(f"{v:.6g}") if np.isfinite(v) else None for v in values.tolist()]

    row = {**facts, "task": task.name, "places": found.places, "curve": rounded(found.measured["train"][0].mean(0))}
    row["final"] = rounded(found.measured["train"][0, :, -1])
    row["final_test"] = rounded(found.measured["test"][0, :, -1])
    return row


def compare(
    name: str, settings: Settings, out: Path, kinds: Sequence[str] | None = None, *, pes: bool = True
) -> list[dict[str, Any]]:
    """Meta-trains rules on a family and compares them with tuned ones there and at another width.

    Rows of the other width: the rules as they are; momentum SGD and Adam as tuned on the first width, and tuned again
    (``"tuned_on": "other"``), which no learned rule is. Writes ``out/<name>.json`` and keeps the runs below
    ``out/<name>``, from which a comparison that was stopped goes on.

    Args:
        name: The family.
        settings: How.
        out: The folder.
        kinds: Last layers to learn; all that fit the family by default.
        pes: Whether momentum SGD is meta-trained too, see :func:`tuned_momentum`.

    Returns:
        The rows, see :func:`measure`.
    """
    found = family(name)
    tasks = {"trained": found.make(found.width), "other": found.make(found.other)}
    rules: list[tuple[dict[str, Any], UpdateRule]] = []
    tuning: dict[str, Any] = {}
    for kind in kinds or found.kinds:
        for seed in settings.seeds:
            rule = meta_train(name, kind, settings, seed, out / name / f"{kind}-{seed}")
            rules.append(({"rule": kind, "seed": seed, "tuned_on": "trained"}, rule))
    for where, task in tasks.items():
        momentum, momentum_facts = tuned_momentum(task, settings, pes=pes and where == "trained")
        adam, adam_facts = tuned_adam(task, settings)
        tuning[where] = {"sgdm": momentum_facts, "adam": adam_facts}
        rules.append(({"rule": "sgdm", "seed": None, "tuned_on": where}, momentum))
        rules.append(({"rule": "adam", "seed": None, "tuned_on": where}, adam))
    rows = [
        measure(rule, task, settings, family=name, width=where, **facts)
        for where, task in tasks.items()
        for facts, rule in rules
        if where == "other" or facts["tuned_on"] == "trained"
    ]
    document = {"family": name, "settings": asdict(settings), "rows": rows, "tuning": tuning}
    write_json(out / f"{name}.json", {**document, "provenance": provenance()})
    return rows


def _mean(values: Sequence[float | None]) -> float | None:
    return None if None in values else float(np.mean([v for v in values if v is not None]))


def _cell(value: float | None) -> str:
    return "diverged" if value is None else f"{value:.4f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: mean final training loss at both widths; of learned rules one number for each meta-seed."""
    lines = ["| family | width | rule | final training loss | each meta-seed | test loss |", "|---" * 6 + "|"]
    keys = dict.fromkeys((row["family"], row["width"], row["rule"], row["tuned_on"]) for row in rows)
    for key in keys:
        mine = [row for row in rows if (row["family"], row["width"], row["rule"], row["tuned_on"]) == key]
        finals, tests = ([_mean(row[what]) for row in mine] for what in ("final", "final_test"))
        each = ", ".join(map(_cell, finals)) if mine[0]["seed"] is not None else "-"
        name = key[2] + (", tuned again" if key[3] == "other" else "")
        lines.append(f"| {key[0]} | {key[1]} | {name} | {_cell(_mean(finals))} | {each} | {_cell(_mean(tests))} |")
    return "\n".join(lines) + "\n"


_STYLES = {
    "unf": ("#3366cc", "-"),
    "nfn": ("#22aacc", "--"),
    "deepset": ("#338844", "-."),
    "sgdm": ("#dd3333", "-"),
    "adam": ("#dd8833", "-"),
}


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draws training loss against inner steps, a row of panels for each family: the trained width and the other one.

    Args:
        rows: As :func:`compare` gives them, of any number of families.
        path: A .png or .svg file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["family"] for row in rows))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc: the same results give the same plot everywhere
        matplotlib.rcParams.update({"svg.hashsalt": "learned_optimizer", "font.size": 9})
        figure = Figure(figsize=(8.5, 0.5 + 2.7 * len(names)), layout="constrained")
        grid = figure.subplots(len(names), 2, squeeze=False)
        for axes_row, name in zip(grid, names):
            for axes, width in zip(axes_row, ("trained", "other")):
                here = [row for row in rows if (row["family"], row["width"]) == (name, width)]
                seen: set[str] = set()
                for row in here:
                    colour, line = _STYLES[row["rule"]]
                    again = row["tuned_on"] == "other"
                    label = row["rule"] + (", tuned again" if again else "")
                    y = [np.nan if value is None else value for value in row["curve"]]
                    axes.plot(
                        row["places"],
                        y,
                        ":" if again else line,
                        color=colour,
                        linewidth=1.2,
                        label=None if label in seen else label,
                    )
                    seen.add(label)
                axes.set_yscale("log")
                task = here[0]["task"] if here else name
                axes.set_title(f"{task}{', a width not seen' if width == 'other' else ''}")
                axes.set_xlabel("steps")
                axes.spines[["top", "right"]].set_visible(False)
            axes_row[0].set_ylabel("training loss")
        grid[0][1].legend(frameon=False, fontsize=8)
        with atomic_write(path) as temporary:
            kind = path.suffix[1:]
            figure.savefig(temporary, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return path
