"""What a task of the weight-space benchmarks is, and how its settings are changed from the command line."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fleetgym.benchmarks.jobs import report
from fleetgym.benchmarks.overrides import changes
from fleetgym.core.errors import UserError, unknown

PRESETS = ("quick", "cpu")


@dataclass(frozen=True)
class Job:
    """One method of a task with one seed.

    Attributes:
        task: The task's name.
        method: A name of ``Task.methods()``.
        seed: Draws networks' first weights, batches, and the data where they are made for each seed.
        device: Where to compute.
        folder: The job's own, for a saved state; it is removed when the row is written.
    """

    task: str
    method: str
    seed: int
    device: str
    folder: Path

    @property
    def name(self) -> str:
        """What the job is called in files and on the screen."""
        return f"{self.task}-{self.method}-{self.seed}"

    def report(self, done: int, total: int, words: str = "") -> None:
        """Says how far the job is."""
        report(self.name, done, total, words)

    def reporter(self, total: int) -> Callable[[dict[str, float]], None]:
        """A ``report`` for ``functionals.training.fit``: step, loss and validation score."""

        def say(row: dict[str, float]) -> None:
            words = f"loss {row['loss']:.4g}"
            if "validation_score" in row:
                words += f", validation {row['validation_score']:.3f}"
            self.report(int(row["step"]), total, words)

        return say


class Task(Protocol):
    """A frozen dataclass whose fields are the settings that define the result."""

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    """What ``score`` is; a task may say in ``measured`` where, if not "on test data"."""
    higher: ClassVar[bool]
    """Whether a higher score is better."""
    presets: ClassVar[dict[str, dict[str, Any]]]
    """Fields that differ from the defaults, for each of :data:`PRESETS`."""

    def methods(self) -> tuple[str, ...]:
        """The rows in the order of the table, baselines first."""
        ...

    def prepare(self, seed: int, device: str) -> None:
        """Makes what all methods of a seed share (a cached zoo), before their jobs start."""
        ...

    def run(self, job: Job) -> dict[str, Any]:
        """Trains and measures one method.

        Returns:
            ``score`` on test data that nothing was selected by, and where there are any ``validation``,
            ``parameters``, ``cpu_seconds``, ``curve`` ([[step, value], ...]) and more.
        """
        ...


def settings(kind: type, preset: str, overrides: Sequence[str] = ()) -> Any:
    """A task with the settings of a preset and changes to them.

    Args:
        kind: The task's dataclass.
        preset: One of :data:`PRESETS`.
        overrides: Texts ``TASK.FIELD=VALUE``; those of other tasks are passed over.

    Raises:
        UserError: An unknown preset or field, or a value of another type.
    """
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    prefix = f"{kind.name}."
    mine = [text.removeprefix(prefix) for text in overrides if text.partition(".")[0] == kind.name]
    found = changes(mine, defaults, what=f"setting of the task {kind.name!r}", prefix=prefix)
    return kind(**{**kind.presets.get(preset, {}), **found})


def check_positive(task: Any, *names: str) -> None:
    """Says which setting is below one.

    Raises:
        UserError: One is.
    """
    for name in names:
        if getattr(task, name) < 1:
            raise UserError(f"{task.name}.{name}={getattr(task, name)}: it must be at least 1")
