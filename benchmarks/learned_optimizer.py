"""Families of small training problems that optimizers are learned, tuned and measured on.

The families are those of Zhou et al., "Universal Neural Functionals" (arXiv 2402.05232, section 4.2) at the size of a
CPU, with data that come with packages: images of digits, the English of scikit-learn's descriptions, and a pendulum's
expert.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.benchmarks.zoos.images import digits
from fleetgym.core import UserError
from fleetgym.core.optional import install_line
from fleetgym.core.seeding import generator
from fleetgym.merging.learned_optimizer import (
    KINDS,
    Adam,
    InnerTask,
    Momentum,
    UpdateRule,
    unroll,
)

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
def digit_sets() -> dict[str, tuple[Tensor, Tensor]]:
    """The digits of scikit-learn: pixels [N, 64] in 0..1 and classes, 360 of the 1,797 for tests."""
    images, classes = digits()
    order = torch.from_numpy(generator("learned_optimizer", "digits").permutation(len(classes)))
    pixels, classes = images.flatten(1)[order], classes[order]
    return {"train": (pixels[360:], classes[360:]), "test": (pixels[:360], classes[:360])}


def mlp_task(width: int = 32, batch: int = 128) -> InnerTask:
    """A perceptron 64-width-10 on 8x8 digits, as in the paper."""
    sets = digit_sets()
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
    sets = {name: (x.view(-1, 1, 8, 8), y) for name, (x, y) in digit_sets().items()}

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


def rnn_task(width: int = 32, batch: int = 32, length: int = 16) -> InnerTask:
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


def transformer_task(width: int = 16, batch: int = 8, length: int = 8, blocks: int = 2) -> InnerTask:
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
        kinds: Which last layers fit. On a chain of matrices, as in ``mlp``, nfn is the same function as unf, with the
            same parameters.
    """

    make: Callable[[int], InnerTask]
    width: int
    other: int
    symmetry: str = "np"
    kinds: tuple[str, ...] = KINDS


FAMILIES: dict[str, Family] = {
    "mlp": Family(mlp_task, 32, 64),
    "cnn": Family(cnn_task, 16, 24, "full"),
    "rnn": Family(rnn_task, 32, 48, "full", ("unf", "deepset")),
    "transformer": Family(transformer_task, 16, 24, "full", ("unf", "deepset")),
    "policy": Family(policy_task, 32, 64),
}
"""Families by the name that ``--tasks`` takes."""


# ---- tuned optimizers ------------------------------------------------------------------------------------------------


def best_of(
    rule: UpdateRule, task: InnerTask, steps: int, seeds: Sequence[int], grid: Mapping[str, Tensor]
) -> tuple[dict[str, float], float]:
    """The setting with the least mean training loss after some steps.

    Args:
        rule: Gives the parameters that the grid leaves out.
        task: What to train.
        steps: Inner steps.
        seeds: Of the networks that are trained with each setting.
        grid: Values of each parameter; all combinations are tried.

    Returns:
        The setting and its loss.

    Raises:
        UserError: Every setting diverges on some seed.
    """
    names = list(grid)
    points = torch.cartesian_prod(*grid.values()).reshape(-1, len(names))
    found = unroll(rule, task, steps, seeds, settings={name: points[:, i] for i, name in enumerate(names)})
    losses = found.measured["train"][..., -1].mean(1)
    losses = torch.where(losses.isfinite(), losses, torch.inf)
    best = int(losses.argmin())
    if not bool(losses[best].isfinite()):
        raise UserError(f"every setting of {type(rule).__name__} diverges on {task.name}; try smaller steps")
    return {name: float(points[best, i]) for i, name in enumerate(names)}, float(losses[best])


def _near(value: float, factor: float, count: int) -> Tensor:
    """Values about one, evenly in the logarithm, from ``value / factor`` to ``value * factor``."""
    return value * torch.logspace(-1, 1, count, base=factor)


def _search(
    rule: UpdateRule, task: InnerTask, steps: int, seeds: Sequence[int], coarse: Mapping[str, Tensor], fine: Any
) -> dict[str, Any]:
    """Searches a grid, then a finer one about its best; see :func:`tuned_momentum`."""
    setting, loss = best_of(rule, task, steps, seeds, coarse)
    nearer, nearer_loss = best_of(rule, task, steps, seeds, fine(setting))
    return {"setting": nearer, "loss": nearer_loss} if nearer_loss < loss else {"setting": setting, "loss": loss}


def tuned_momentum(task: InnerTask, steps: int, seeds: Sequence[int]) -> tuple[Momentum, dict[str, Any]]:
    """Momentum SGD with the best step size and rate of a grid (13 x 6) and of a finer one about its best (7 x 5).

    Args:
        task: What to train.
        steps: Inner steps.
        seeds: Of the networks that are trained with each setting.

    Returns:
        The rule, and its ``setting`` and mean training ``loss`` on these networks.
    """
    coarse = {"alpha": torch.logspace(-3, 0.6, 13), "gamma": torch.tensor([0.0, 0.5, 0.8, 0.9, 0.95, 0.99])}

    def fine(best: Mapping[str, float]) -> dict[str, Tensor]:
        # A step size of 2 in place of 1 is far off; a rate of 0.8 in place of 0.9 is as far.
        return {"alpha": _near(best["alpha"], 2, 7), "gamma": (1 - _near(1 - best["gamma"], 2, 5)).clamp_min(0.0)}

    found = _search(Momentum(task.spec), task, steps, seeds, coarse, fine)
    return Momentum(task.spec, **found["setting"]), found


def tuned_adam(task: InnerTask, steps: int, seeds: Sequence[int]) -> tuple[Adam, dict[str, Any]]:
    """Adam with the best numbers of a grid (11 x 3 x 2) and of a finer one about its best (5 x 3 x 3).

    The arguments and results are those of :func:`tuned_momentum`.
    """
    coarse = {
        "alpha": torch.logspace(-3.5, -0.5, 11),
        "beta1": torch.tensor([0.5, 0.9, 0.97]),
        "beta2": torch.tensor([0.95, 0.999]),
    }

    def fine(best: Mapping[str, float]) -> dict[str, Tensor]:
        rates = {name: 1 - _near(1 - best[name], 1.6, 3) for name in ("beta1", "beta2")}
        return {"alpha": _near(best["alpha"], 1.7, 5), **rates}

    found = _search(Adam(task.spec), task, steps, seeds, coarse, fine)
    return Adam(task.spec, **found["setting"]), found


def measure(rule: UpdateRule, task: InnerTask, steps: int, seeds: Sequence[int], every: int = 0) -> dict[str, Any]:
    """How a rule trains networks of a task.

    Args:
        rule: The rule.
        task: What to train, at any width that the rule can be put on.
        steps: Inner steps.
        seeds: Of the networks.
        every: Steps between points of the curve; 0: the start and the end.

    Returns:
        ``score`` and ``test`` (mean training and test loss over the networks at the end), ``deviation`` (standard
        deviation of the training loss among networks), and ``curve`` and ``test_curve`` ([[step, mean loss], ...]).
        What diverged is NaN or infinite.
    """
    found = unroll(rule.on(task.spec), task, steps, seeds, every=every)
    train, test = found.measured["train"][0], found.measured["test"][0]

    def curve(losses: Tensor) -> list[list[float]]:
        return [[place, float(f"{loss:.6g}")] for place, loss in zip(found.places, losses.mean(0).tolist())]

    return {
        "score": float(train[:, -1].mean()),
        "deviation": float(train[:, -1].std(correction=0)),
        "test": float(test[:, -1].mean()),
        "curve": curve(train),
        "test_curve": curve(test),
    }
