"""``fleetgym bench experts``: how often each scripted expert solves its task, and what demonstrations cost.

Each expert plays ``episodes`` seeds of its task to its first success, as ``fleetgym collect`` does. Written are a
record with every episode and a table.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_write
from fleetgym.core.records import EvalRecord, wilson_interval
from fleetgym.core.rollout import evaluate
from fleetgym.core.run import track
from fleetgym.envs import suite


def measure(
    tasks: Sequence[str], episodes: int, *, goals: str = "train", seed: int = 0, suite_name: str = "meta_world"
) -> EvalRecord:
    """Plays every expert.

    Args:
        tasks: Task names.
        episodes: Seeds of each, from ``seed`` on.
        goals: Which part of the goals.
        seed: First seed.
        suite_name: Whose tasks.

    Returns:
        One record of all episodes; ``metrics`` has ``cpu_seconds`` (environments made, stepped and recorded),
        ``mean_success`` and ``worst_success`` over tasks.
    """
    worlds = suite(suite_name)
    began, records = time.process_time(), []
    for task in track(list(tasks), "experts"):
        records.append(
            evaluate(
                worlds.expert(task),
                worlds.make_fn(task, goals=goals),
                range(seed, seed + episodes),
                system="expert",
                task=task,
                stop_on_success=True,
                record=True,
            )
        )
    rates = [record.success for record in records]
    return EvalRecord.concatenate(
        records,
        task=f"{suite_name}/{len(tasks)} tasks",
        cpu_seconds=round(time.process_time() - began, 1),
        mean_success=sum(rates) / len(rates),
        worst_success=min(rates),
        goals=goals,
    )


def table(record: EvalRecord) -> str:
    """The record as a Markdown table."""
    lines = ["| task | success | 95% interval |", "|---|---|---|"]
    for task, (solved, number) in record.per_task().items():
        low, high = wilson_interval(solved, number)
        lines.append(f"| {task} | {solved / number:.2f} | {low:.2f} to {high:.2f} |")
    facts = record.metrics
    lines += [
        "",
        f"{len(record.per_task())} tasks, {len(record.seeds)} episodes, {sum(record.lengths)} steps: mean success "
        f"{facts['mean_success']:.3f}, worst {facts['worst_success']:.2f}, {facts['cpu_seconds']} CPU-seconds.",
        "",
    ]
    return "\n".join(lines)


@dataclass
class Args:
    """Measure the scripted experts: success of each, and the processor time of all."""

    tasks: tuple[str, ...] = ("mt50",)
    """Tasks, or the name of a task set."""
    episodes: int = 20
    """Episodes of each task."""
    goals: Literal["all", "train", "held_out"] = "train"
    """Which part of the goals."""
    seed: int = 0
    """First seed."""
    out: Path | None = None
    """Folder to write record.json and table.md to."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench experts``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench experts")
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: it must be at least 1")
    if not args.tasks:
        raise UserError("--tasks is empty; name tasks or a task set, such as mt50")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    tasks = suite("meta_world").task_set(args.tasks if len(args.tasks) > 1 else args.tasks[0])
    record = measure(tasks, args.episodes, goals=args.goals, seed=args.seed)
    text = table(record)
    if args.out is not None:
        record.save(args.out / "record.json")
        with atomic_write(args.out / "table.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(text)
    return 0
