"""What the words of ``collect``, ``eval`` and ``demo`` stand for: a suite's task, or any Gymnasium environment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetgym.core.errors import UserError, unknown

if TYPE_CHECKING:
    from fleetgym.core.policy import Policy


@dataclass(frozen=True)
class Target:
    """Where to act.

    Attributes:
        name: The task's name in its suite, or the environment's id.
        suite: The suite, or None for an environment without one.
    """

    name: str
    suite: Any | None = None

    @property
    def instruction(self) -> str:
        """The task in words; empty where nobody has said it."""
        return "" if self.suite is None else self.suite.task(self.name).instruction

    @property
    def episodes(self) -> int:
        """Episodes of a trial; 1 where there are no trials."""
        return 1 if self.suite is None else self.suite.task(self.name).episodes

    @property
    def opengl(self) -> bool:
        """Whether its pictures are known to need OpenGL."""
        return self.suite is not None and self.suite.opengl

    def goals(self, wanted: str) -> str | None:
        """``wanted`` where the suite has such a choice of goals, else None."""
        return wanted if self.suite is not None and wanted in self.suite.goals else None

    def make_fn(self, **options: Any) -> str | Callable[[], Any]:
        """What ``rollout`` takes: a picklable function that makes the environment, or its id.

        Args:
            **options: Of the suite's ``make``, such as ``goals``; those that are None are left out.

        Raises:
            UserError: Options for an environment that has no suite to take them.
        """
        options = {key: value for key, value in options.items() if value is not None}
        if self.suite is not None:
            return self.suite.make_fn(self.name, **options)
        options.pop("render_mode", None)  # rollout asks an id for it by itself
        if options:
            raise UserError(f"{self.name} belongs to no suite, so it takes no {', '.join(options)}")
        return self.name

    def expert(self, **options: Any) -> Policy:
        """The scripted expert.

        Args:
            **options: Of the suite's experts.

        Raises:
            UserError: There is none.
        """
        if self.suite is None:
            raise UserError(f"{self.name} belongs to no suite and has no expert; pass --policy CHECKPOINT")
        return self.suite.expert(self.name, **options)


def all_suites() -> dict[str, Any]:
    """Every suite by name."""
    from fleetgym.envs import SUITES, suite

    return {name: suite(name) for name in SUITES.names()}


def find(name: str) -> Target:
    """The task or environment called ``name``.

    Raises:
        UserError: Nothing is; the message has the three nearest names.
    """
    import gymnasium as gym

    suites = all_suites()
    for suite in suites.values():
        for task in suite.tasks:
            if name in (task, suite.task(task).env_id):
                return Target(task, suite)
    with contextlib.suppress(gym.error.Error, ImportError):
        return Target(gym.spec(name).id)
    raise unknown("task or environment", name, [*(t for suite in suites.values() for t in suite.tasks), *gym.registry])


def find_all(suite: str, names: Sequence[str]) -> list[Target]:
    """Tasks of one suite, by their names or the names of its splits; all of them where none is named.

    Raises:
        UserError: Unknown suite, task or split; the message has the three nearest names.
    """
    suites = all_suites()
    if suite not in suites:
        raise unknown("suite", suite, suites)
    found = suites[suite]
    tasks: list[str] = []
    for name in names or found.tasks:
        if name in found.splits:
            tasks.extend(found.splits[name])
        elif name in found.tasks:
            tasks.append(name)
        else:
            raise unknown("task or split", name, [*found.tasks, *found.splits])
    return [Target(task, found) for task in dict.fromkeys(tasks)]


def load_policy(path: str | os.PathLike) -> tuple[Policy, dict[str, Any]]:
    """The policy of a checkpoint, or of a run's last checkpoint, and what is noted about it.

    Raises:
        UserError: There is no checkpoint, its weights are not finite, or it is no policy.
    """
    from fleetgym.core.checkpoint import Checkpoint
    from fleetgym.core.run import find_checkpoint

    checkpoint = Checkpoint.load(find_checkpoint(path))
    checkpoint.check_finite()
    module = checkpoint.module()
    if not callable(getattr(module, "predict", None)):
        raise UserError(f"{path} holds a {checkpoint.architecture}, which is no policy: it has no predict()")
    return module, {**checkpoint.info, "weights_sha256": checkpoint.weights_sha256}


@contextlib.contextmanager
def worker_pool(workers: int) -> Iterator[Executor | None]:
    """Worker processes, or None for a single one; an interruption waits for what they are at, some seconds at most.

    Raises:
        UserError: ``workers`` is below one.
    """
    if workers < 1:
        raise UserError(f"--workers {workers}: it must be at least 1")
    if workers == 1:
        yield None
        return
    from fleetgym.core.workers import worker_pool as start

    with start(workers) as pool:
        yield pool


def cpu_seconds() -> float:
    """Processor seconds of this process and of the children that have ended."""
    return sum(os.times()[:4])


@contextlib.contextmanager
def episode_bar(total: int, description: str) -> Iterator[Callable[..., None]]:
    """A progress bar that moves at each call of what it yields, which is fit for ``rollout(on_episode=...)``."""
    from fleetgym.core.run import track

    bar = track(total, description)
    next(bar, None)

    def advance(*_: Any) -> None:
        next(bar, None)

    try:
        yield advance
    finally:
        bar.close()


def rate(successes: int, episodes: int) -> str:
    """A success rate with its Wilson interval, for people."""
    from fleetgym.core.records import wilson_interval

    low, high = wilson_interval(successes, episodes)
    return f"{successes}/{episodes} = {successes / episodes:.2f} (95% interval {low:.2f} to {high:.2f})"


def check_out(path: Path, overwrite: bool, suffix: str) -> None:
    """Checks a file to be written before the work for it begins.

    Raises:
        UserError: Another suffix, or the file exists.
    """
    if path.suffix != suffix:
        raise UserError(f"--out {path}: end the name in {suffix}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise UserError(f"{path} exists already; choose another --out, or replace it with --overwrite")
