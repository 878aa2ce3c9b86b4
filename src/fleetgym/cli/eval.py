"""``fleetgym eval``: how often a checkpoint solves its tasks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetgym.cli.options import parse, print_json
from fleetgym.core.errors import UserError


@dataclass
class Options:
    """Evaluate a checkpoint on fixed seeds, and say its success with a 95% interval."""

    checkpoint: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CHECKPOINT")]
    """The folder of a checkpoint, or of a run (its last checkpoint is taken)."""

    env: str | None = None
    """One environment: a task's name or any Gymnasium id. Instead of --suite."""

    suite: str | None = None
    """A suite that `fleetgym list suites` prints, such as meta_world. Instead of --env."""

    tasks: tuple[str, ...] = ()
    """Tasks or splits of the suite, such as reach-v3 or mt10; all of its tasks by default."""

    task_set: str | None = None
    """The split whose one-hot the policy was trained with; by default what the checkpoint notes, if it does."""

    goals: Literal["all", "train", "held_out"] | None = None
    """Which goals to draw, in a suite's task: held_out by default, which demonstrations do not have."""

    episodes: int = 10
    """Episodes a task."""

    seed: int = 0
    """Episode i of each task is reset with seed + i."""

    stop_on_success: bool = True
    """End an episode when the task is solved (the return then counts up to there)."""

    max_steps: int | None = None
    """End an episode after so many steps; the environment's own limit by default."""

    num_envs: int = 1
    """Environments stepped side by side in each process."""

    workers: int = 1
    """Processes."""

    out: Path | None = None
    """Write the record to this .json file."""

    overwrite: bool = False
    """Replace a file at --out."""

    json: bool = False
    """Print the record as JSON instead of the table."""


def main(argv: Sequence[str]) -> int:
    """Evaluates, prints the table and writes the record."""
    options = parse(Options, argv, "eval")
    if (options.env is None) == (options.suite is None):
        raise UserError("eval takes either --env ENV_ID or --suite NAME (with --tasks, if not all of them)")
    if options.env is not None and options.tasks:
        raise UserError("--tasks goes with --suite; --env is one environment")
    if options.episodes < 1:
        raise UserError(f"--episodes {options.episodes}: it must be at least 1")

    from fleetgym.cli.targets import check_out, episode_bar, find, find_all, load_policy, rate, worker_pool
    from fleetgym.core.records import EvalRecord
    from fleetgym.core.rollout import evaluate

    if options.out is not None:
        check_out(options.out, options.overwrite, ".json")
    targets = [find(options.env)] if options.env is not None else find_all(str(options.suite), options.tasks)
    policy, info = load_policy(options.checkpoint)
    task_set = options.task_set or info.get("task_set")
    if isinstance(task_set, list):
        task_set = tuple(task_set)
    seeds = range(options.seed, options.seed + options.episodes)
    name = options.checkpoint.name or options.checkpoint.resolve().name
    whole = targets[0].name if len(targets) == 1 else f"{options.suite}/{','.join(options.tasks) or 'all'}"
    records: list[EvalRecord] = []
    try:
        with (
            worker_pool(options.workers) as pool,
            episode_bar(len(targets) * len(seeds), f"eval {name}") as advance,
        ):
            for target in targets:
                suited = target.suite is not None
                env = target.make_fn(
                    goals=options.goals or target.goals("held_out"),
                    task_set=task_set if suited else options.task_set,
                )
                records.append(
                    evaluate(
                        policy,
                        env,
                        seeds,
                        system=name,
                        task=target.name,
                        on_episode=advance,
                        executor=pool,
                        num_envs=options.num_envs,
                        stop_on_success=options.stop_on_success,
                        max_steps=options.max_steps,
                    )
                )
    except KeyboardInterrupt:
        if records and options.out is not None:  # what is finished is kept, under a name that says it is not all
            part = options.out.with_name(f"{options.out.stem}.partial.json")
            EvalRecord.concatenate(records, task=whole, interrupted=True).save(part)
            print(f"{len(records)} of {len(targets)} tasks were finished: {part}", file=sys.stderr)
        raise
    facts = {"checkpoint": name, "weights_sha256": info["weights_sha256"]}
    for record in records:
        record.provenance.update(facts)
    record = records[0] if len(records) == 1 else EvalRecord.concatenate(records, task=whole)
    if options.json:
        print_json(record.to_dict())
    else:
        width = max(len(target.name) for target in targets)
        for target, one in zip(targets, records):
            mean = sum(one.returns) / len(one.returns)
            print(f"{target.name:<{width}}  {rate(sum(one.successes), len(one.seeds))}  mean return {mean:.4g}")
        if len(records) > 1:
            print(f"{'all':<{width}}  {rate(sum(record.successes), len(record.seeds))}")
    if options.out is not None:
        record.save(options.out)
        print(f"written to {options.out}", file=sys.stderr if options.json else sys.stdout)
    return 0
