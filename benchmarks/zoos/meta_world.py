"""A zoo of recurrent Meta-World policies, cloned from scripted experts; what is measured is their success.

Fleets of policies train in one batch (``agents.imitation``). Learning rate, number of steps and noise on the expert's
actions are common to the policies of a part; how many demonstrations a policy has, and which, is its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from fleetgym.agents.imitation import FleetLearner, ImitationConfig
from fleetgym.agents.networks import CELLS, META_WORLD_DIFFERENCES, RecurrentPolicy, features
from fleetgym.benchmarks.fleet_jobs import _Lasting
from fleetgym.benchmarks.zoos.stacked import log_uniform
from fleetgym.benchmarks.zoos.zoo import Part, chunk
from fleetgym.core.demonstrations import SequenceBatch, Statistics
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.rollout import Episode, evaluate, rollout
from fleetgym.core.seeding import generator, torch_generator
from fleetgym.envs import suite

_AT_ONCE = 10
_EVALUATION_SEED = 1_000_000  # beyond those of demonstrations, whose goals are from the other half besides


@dataclass(frozen=True)
class MetaWorld:
    """Policies ``RecurrentPolicy(39, 4, cell, hidden)`` of one or several Meta-World tasks.

    Targets are ``success`` on held-out goals of the policy's own task, ``task`` (its place in :attr:`tasks`), and the
    settings it was trained with.

    Attributes:
        policies: N.
        tasks: Task names; part k of ten policies learns task k modulo their number.
        cell: Core of the policies: gru, lstm, rnn or mlp.
        hidden: Width of every hidden layer.
        demonstrations: Fewest and most demonstrations of a policy; log-uniform.
        noise: Bounds of the standard deviation of the noise on the expert's executed actions; uniform.
        learning_rate: Bounds; log-uniform.
        steps: Bounds of the number of gradient steps; log-uniform.
        episodes: Evaluation episodes a policy.
        max_steps: Steps of an evaluation episode.
        seed: Of everything.
        shares: Of train, val and test.

    Raises:
        UserError: An unknown task or cell, a number below one, or bounds that are not rising and positive.
    """

    name: ClassVar[str] = "meta_world"
    version: ClassVar[int] = 2
    policies: int = 200
    tasks: tuple[str, ...] = ("reach-v3",)
    cell: str = "gru"
    hidden: int = 32
    demonstrations: tuple[int, int] = (1, 10)
    noise: tuple[float, float] = (0.0, 0.3)
    learning_rate: tuple[float, float] = (1e-3, 1e-2)
    steps: tuple[int, int] = (20, 300)
    episodes: int = 10
    max_steps: int = 200
    seed: int = 0
    shares: tuple[float, float, float] = (2 / 3, 2 / 15, 1 / 5)

    def __post_init__(self) -> None:
        suite("meta_world").task_set(self.tasks)
        if self.cell not in CELLS:
            raise unknown("cell", self.cell, CELLS)
        for name in ("policies", "hidden", "episodes", "max_steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        for name in ("demonstrations", "learning_rate", "steps", "noise"):
            low, high = getattr(self, name)
            if not (0 <= low <= high if name == "noise" else 0 < low <= high):
                raise UserError(f"{name}={(low, high)}: give the lower and the upper bound, positive")

    def network(self) -> tuple[str, dict[str, Any]]:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        differences = META_WORLD_DIFFERENCES
        return "recurrent_policy", RecurrentPolicy(39, 4, self.cell, self.hidden, differences=differences).config

    def parts(self) -> int:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        return -(-self.policies // _AT_ONCE)

    def part(self, number: int, device: str) -> Part:
        """See :class:`~fleetgym.benchmarks.zoos.zoo.Maker`."""
        count = len(chunk(self.policies, _AT_ONCE, number))
        rng = torch_generator("zoo", self.name, self.seed, number)
        which = number % len(self.tasks)
        task = self.tasks[which]
        rate = float(log_uniform(*self.learning_rate, 1, rng=rng))
        steps = int(log_uniform(*self.steps, 1, rng=rng).round())
        noise = self.noise[0] + (self.noise[1] - self.noise[0]) * float(torch.rand(1, generator=rng))
        low, high = self.demonstrations
        shown = log_uniform(low, high + 0.999, count, rng=rng).floor().long()
        first = int(generator("zoo", self.name, "goals", self.seed, number).integers(900_000))
        pool = _shown(task, first, 2 * high, noise)
        if len(pool) < high:
            raise UserError(f"{task}: the expert solved {len(pool)} of {2 * high} episodes; lower noise={self.noise}")
        data = []
        for n in shown.tolist():
            mine = torch.randperm(len(pool), generator=rng)[:n].tolist()
            data.append(_padded([pool[i] for i in mine]))
        statistics = _statistics(self.tasks)
        policies = []
        for _ in range(count):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
                policy = RecurrentPolicy(**self.network()[1])
            policy.normaliser.mean.copy_(torch.as_tensor(statistics.mean))
            policy.normaliser.std.copy_(torch.as_tensor(statistics.std))
            policies.append(policy)
        config = ImitationConfig(steps=steps, learning_rate=rate, final_learning_rate=rate / 100)
        seed = int(torch.randint(2**31, (), generator=rng))
        learner = FleetLearner(policies, data, config, seed=seed, device=device)
        learner.train(steps)
        # All episodes of a policy run side by side, because a network answers ten observations as quickly as one.
        worlds = [_Lasting(suite("meta_world").make(task, goals="held_out")) for _ in range(self.episodes)]
        turns = itertools.cycle(worlds)
        seeds = range(_EVALUATION_SEED, _EVALUATION_SEED + self.episodes)
        options = {"max_steps": self.max_steps, "stop_on_success": True, "num_envs": self.episodes}
        trained = [policy.to("cpu") for policy in learner.stack.policies()]
        success = [evaluate(policy, lambda: next(turns), seeds, task=task, **options).success for policy in trained]
        for world in worlds:
            world.env.close()
        states = [policy.state_dict() for policy in trained]
        targets = {
            "success": torch.tensor(success),
            "task": torch.full((count,), which),
            "demonstrations": shown,
            "noise": torch.full((count,), noise),
            "learning_rate": torch.full((count,), rate),
            "steps": torch.full((count,), steps),
        }
        return Part({key: torch.stack([state[key] for state in states]) for key in states[0]}, targets)


def _shown(task: str, first: int, number: int, noise: float) -> list[Episode]:
    """The expert's solved episodes of ``number``, on goals of the training half."""
    worlds = suite("meta_world")
    seeds = range(first, first + number)
    options = {"action_noise": noise, "stop_on_success": True, "num_envs": 1}
    episodes = rollout(worlds.expert(task), worlds.make_fn(task, goals="train"), seeds, **options)
    return [episode for episode in episodes if episode.success]


def _padded(episodes: Sequence[Episode]) -> SequenceBatch:
    """Episodes as padded sequences."""
    longest = max(len(episode) for episode in episodes)
    mask = torch.zeros(len(episodes), longest, dtype=torch.bool)
    observations = torch.zeros(len(episodes), longest, episodes[0].observations.shape[-1])
    actions = torch.zeros(len(episodes), longest, episodes[0].actions.shape[-1])
    for i, episode in enumerate(episodes):
        mask[i, : len(episode)] = True
        observations[i, : len(episode)] = torch.as_tensor(episode.observations[:-1], dtype=torch.float32)
        actions[i, : len(episode)] = torch.as_tensor(episode.actions, dtype=torch.float32)
    return SequenceBatch(observations, actions, mask)


@functools.cache
def _statistics(tasks: tuple[str, ...]) -> Statistics:
    """What all policies of a zoo normalise with: statistics of five episodes of each task's expert."""
    parts = []
    for task in tasks:
        batch = _padded(_shown(task, 900_000, 5, 0.0))
        values = features(batch.observations[batch.mask].double(), META_WORLD_DIFFERENCES)
        parts.append(Statistics.of(values.numpy(), floor=1e-3))
    return Statistics.pool(parts)
