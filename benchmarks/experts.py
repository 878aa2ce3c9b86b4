"""``fleetgym bench experts``: how often each scripted expert solves its task, and what demonstrations cost.

Each expert plays ``episodes`` seeds of its task to its first success, as ``fleetgym collect`` does. Written are a
record with every episode and a table. With ``--suite fleet_tools`` the table also says how deep shapes overlap and how
hard the tool is pressed in episodes that are solved, of all time steps.
"""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym

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


def measure_tools(
    tasks: Sequence[str],
    episodes: int,
    *,
    arms: Sequence[str] = ("panda",),
    splits: Sequence[str] = ("train", "held_out"),
    goals: str = "train",
    seed: int = 0,
) -> EvalRecord:
    """Plays the experts of fleet-tools, and measures in every time step how things touch.

    Args:
        tasks: Task names.
        episodes: Seeds of each row, from ``seed`` on.
        arms: With which of ``"panda"`` and ``"hand"``.
        splits: Of tools and objects: some of ``"train"``, ``"held_out"`` and ``"all"``.
        goals: Which part of the poses.
        seed: First seed.

    Returns:
        One record of all episodes, whose tasks are called such as ``Hammer-Hand, held_out``. Its ``metrics`` have those
        of :func:`measure`, and in ``touch``, by that name, ``depth`` and ``force``: lists of the deepest overlap,
        metres, and the largest sum of the normal forces on the tool, newtons, of each episode.

    Raises:
        UserError: Unknown task, arm, split or choice of goals.
    """
    from fleetgym.envs.fleet_tools.touch import Touch

    worlds = suite("fleet_tools")
    rows = [(task, arm, split) for task in tasks for arm in arms for split in splits]
    began, records, touch = time.process_time(), [], {}
    for task, arm, split in track(rows, "experts"):
        name = f"{task if arm == 'panda' else f'{task}-Hand'}, {split}"
        env = Touch(worlds.make(task, goals=goals, arm=arm, tools=split, objects=split))
        options: dict[str, Any] = {"system": "expert", "task": name, "stop_on_success": True}
        seeds = range(seed, seed + episodes)
        records.append(evaluate(worlds.expert(task), functools.partial(_same, env), seeds, **options))
        touch[name] = {
            "depth": [round(worst.depth, 6) for worst in env.episodes],
            "force": [round(worst.force, 1) for worst in env.episodes],
        }
    rates = [record.success for record in records]
    return EvalRecord.concatenate(
        records,
        task=f"fleet_tools/{len(rows)} rows",
        cpu_seconds=round(time.process_time() - began, 1),
        mean_success=sum(rates) / len(rates),
        worst_success=min(rates),
        goals=goals,
        touch=touch,
    )


def _same(env: gym.Env) -> gym.Env:
    return env


def table(record: EvalRecord) -> str:
    """The record as a Markdown table; depths and forces are those of the episodes that were solved."""
    touch = record.metrics.get("touch")
    more = (" deepest, mm | force, median, N | largest, N |", "---|---|---|") if touch else ("", "")
    lines = [f"| task | success | 95% interval |{more[0]}", f"|---|---|---|{more[1]}"]
    for task, (solved, number) in record.per_task().items():
        low, high = wilson_interval(solved, number)
        line = f"| {task} | {solved / number:.2f} | {low:.2f} to {high:.2f} |"
        if touch:
            won = [success for name, success in zip(record.tasks, record.successes) if name == task]
            depths, forces = ([x for x, good in zip(touch[task][key], won) if good] for key in ("depth", "force"))
            if solved:
                line += f" {1000 * max(depths):.2f} | {statistics.median(forces):.0f} | {max(forces):.0f} |"
            else:
                line += " | | |"
        lines.append(line)
    facts = record.metrics
    lines += [
        "",
        f"{len(record.per_task())} {'rows' if touch else 'tasks'}, {len(record.seeds)} episodes, {sum(record.lengths)} "
        f"steps: mean success {facts['mean_success']:.3f}, worst {facts['worst_success']:.2f}, "
        f"{facts['cpu_seconds']} CPU-seconds.",
        "",
    ]
    return "\n".join(lines)


@dataclass
class Args:
    """Measure the scripted experts: success of each, and the processor time of all."""

    suite: Literal["meta_world", "fleet_tools"] = "meta_world"
    """Whose tasks."""
    tasks: tuple[str, ...] | None = None
    """Tasks, or the name of a task set; mt50 of Meta-World, or all of fleet-tools, if not given."""
    episodes: int = 20
    """Episodes of each task; with fleet-tools of each task, arm and split."""
    goals: Literal["all", "train", "held_out"] = "train"
    """Which part of the goals."""
    arms: tuple[Literal["panda", "hand"], ...] = ("panda",)
    """With fleet-tools: with which arms."""
    splits: tuple[Literal["train", "held_out", "all"], ...] = ("train", "held_out")
    """With fleet-tools: with which tools and objects."""
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
    for name in ("tasks", "arms", "splits"):
        if getattr(args, name) == ():
            raise UserError(f"--{name} is empty; name at least one, or leave the word out")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    wanted = args.tasks or ("mt50" if args.suite == "meta_world" else "all",)
    tasks = suite(args.suite).task_set(wanted if len(wanted) > 1 else wanted[0])
    if args.suite == "fleet_tools":
        record = measure_tools(
            tasks, args.episodes, arms=args.arms, splits=args.splits, goals=args.goals, seed=args.seed
        )
    else:
        record = measure(tasks, args.episodes, goals=args.goals, seed=args.seed)
    text = table(record)
    if args.out is not None:
        record.save(args.out / "record.json")
        with atomic_write(args.out / "table.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(text)
    return 0
