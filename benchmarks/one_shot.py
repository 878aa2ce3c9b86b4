"""``fleetgym bench one_shot``: robots trained apart on different tasks, merged once; what else must be sent?

Takes the robots that ``fleetgym bench fleet_merge`` trained alone (its row ``alone_own``) and merges them once, by
every merger, with what the robots would send beside their weights computed from their own demonstrations. Rows:

- weights alone: ``average``, ``fleet_merge``, ``universe``;
- statistics in place of data: ``fisher``, ``regmean`` (aligned or not), ``refit_last``: the trunk merged by ``regmean``
  goes back to the robots, each returns the moments of its last layer on it, and the last layer is solved for all; the
  same with the trunk of the first robot, of the average, of ``fleet_merge``;
- sketches: ``distill`` with linear-Gaussian models of the robots' episodes, of one or four segments;
- ``mixture``: every policy kept, and chosen by the task's one-hot. No merge at all, N times the size: the bound.

Nothing was chosen on the episodes of this evaluation.
"""

from __future__ import annotations

import statistics as numbers
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.benchmarks.fleet_jobs import Fleet
from fleetgym.benchmarks.fleet_presets import preset_from
from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, read_json, write_json
from fleetgym.core.records import provenance
from fleetgym.core.run import track
from fleetgym.merging import merge, sent_bytes
from fleetgym.merging.statistics import refit_last, statistics

_SEED = 3_000_000  # of the first evaluation episode; apart from those that anything was chosen on


class Mixture:
    """All policies, one chosen by the task's one-hot (several of one task are averaged): not a merge, but its bound.

    Args:
        policies: The robots' policies.
        robots: For each the number of its task in the one-hot.
        tasks: Length of the one-hot, the last entries of the observation.
    """

    def __init__(self, policies: Sequence[RecurrentPolicy], robots: Sequence[int], tasks: int) -> None:
        self.policies, self.robots, self.tasks = policies, robots, tasks

    def predict(
        self, observation: np.ndarray, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[np.ndarray, Any]:
        """Stable-Baselines3's ``predict``; all observations of a call must be of one task."""
        task = int(np.atleast_2d(observation)[0, -self.tasks :].argmax())
        mine = [policy for policy, robot in zip(self.policies, self.robots) if robot == task]
        parts = len(state) // len(mine) if state is not None else 0
        actions, states = [], []
        for i, policy in enumerate(mine):
            own = state[i * parts : (i + 1) * parts] if state is not None else None
            action, new = policy.predict(observation, own, episode_start, deterministic)
            actions.append(action)
            states += new or ()
        return np.mean(actions, axis=0), tuple(states) or None


def merges(fleet: Fleet, policies: Sequence[RecurrentPolicy], robots: Sequence[int]) -> dict[str, Callable[[], Any]]:
    """For each row what makes its policy: a function that gives (policy, bytes sent beside the weights, what it is)."""

    def sends(kind: str, **options: Any) -> list[dict[str, torch.Tensor]]:
        return [statistics(policy, fleet.data[r], (kind,), **options) for policy, r in zip(policies, robots)]

    def plain(method: str, **options: Any) -> tuple[Any, int, str]:
        return merge(method, policies, **options).module(), 0, "nothing"

    def weighted(method: str, kind: str, what: str, **options: Any) -> tuple[Any, int, str]:
        own = sends(kind)
        return merge(method, policies, statistics=own, **options).module(), sent_bytes(own[0]), what

    def refit(trunk: str) -> tuple[Any, int, str]:
        extra, before = 0, "nothing"
        if trunk == "regmean":
            policy, extra, before = weighted("regmean", "gram", grams)
        else:
            policy = policies[0] if trunk == "first" else merge(trunk, policies).module()
        moments = [statistics(policy, fleet.data[r], ("last",)) for r in robots]
        example = fleet.data[0].observations[:1, :1]
        policy = refit_last(policy, moments, example_input=example)
        return policy, extra + sent_bytes(moments[0]), f"{before}; then moments of the merged trunk's last layer"

    def distilled(segments: int, **options: Any) -> tuple[Any, int, str]:
        own = sends("sketch", segments=segments)
        what = f"a linear-Gaussian model of its episodes, {segments} segment{'s' if segments > 1 else ''}"
        return merge("distill", policies, statistics=own, **options).module(), sent_bytes(own[0]), what

    task_numbers = [fleet.tasks.index(fleet.robots[r][0]) for r in robots]
    grams, information = "Gram matrices of layer inputs", "diagonal Fisher information"
    return {
        "average": lambda: plain("average"),
        "fleet_merge": lambda: plain("fleet_merge"),
        "universe": lambda: plain("universe"),
        "fisher": lambda: weighted("fisher", "fisher", information),
        "regmean_unaligned": lambda: weighted("regmean", "gram", grams, align=False),
        "regmean": lambda: weighted("regmean", "gram", grams),
        "refit_last_first": lambda: refit("first"),
        "refit_last_average": lambda: refit("average"),
        "refit_last_fleet_merge": lambda: refit("fleet_merge"),
        "refit_last": lambda: refit("regmean"),
        "distill_1": lambda: distilled(1),
        "distill_4": lambda: distilled(4),
        "distill_4_teachers": lambda: distilled(4, refreshes=0),
        "mixture": lambda: (Mixture(policies, task_numbers, len(fleet.tasks)), 0, "nothing; N policies are kept"),
    }


@dataclass
class Args:
    """Merge robots that were trained apart once, by every merger, and say what each robot had to send."""

    runs: Path
    """The folder of a finished `fleetgym bench fleet_merge` (rows alone_own and so on)."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds in that folder."""
    methods: tuple[str, ...] = ()
    """Rows; all by default."""
    robots_per_task: int = 0
    """So many robots of each task take part; all by default."""
    episodes: int = 10
    """Evaluation episodes of each task."""
    out: Path | None = None
    """Folder to write results.json and table.md to; rows that are there already are kept."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench one_shot``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench one_shot")
    if args.episodes < 1:
        raise UserError(f"--episodes {args.episodes}: it must be at least 1")
    config = read_json(args.runs / "config.json")
    found = config.get("config", config)
    if found.get("benchmark") != "fleet_merge":
        raise UserError(f"{args.runs} is not a folder of `fleetgym bench fleet_merge`")
    preset = preset_from("quick", [f"{key}={value}" for key, value in found["preset"].items()])
    if preset.tasks_per_robot != 1:
        raise UserError(
            f"{args.runs} has tasks_per_robot={preset.tasks_per_robot}; one_shot takes robots with one task each"
        )
    every = args.robots_per_task or preset.robots_per_task
    if not 1 <= every <= preset.robots_per_task:
        raise UserError(f"--robots-per-task {every}: there are {preset.robots_per_task} in {args.runs}")
    torch.set_num_threads(1)
    rows: dict[str, dict[str, Any]] = {}
    if args.out is not None and (args.out / "results.json").exists():
        rows = {f"{row['method']}/{row['seed']}": row for row in read_json(args.out / "results.json")["rows"]}
    for seed in args.seeds:
        fleet = Fleet(preset, args.runs, seed)
        robots = [r for r in range(len(fleet.robots)) if r % preset.robots_per_task < every]
        folder = args.runs / "training" / f"seed{seed}" / "alone" / "checkpoints"
        for row in rows.values():
            kept, wanted = (row["robots"], row["episodes"]), (len(robots), args.episodes * len(fleet.tasks))
            if kept != wanted:
                raise UserError(
                    f"{args.out / 'results.json'} has rows of {kept[0]} robots and {kept[1]} episodes, these would be "
                    f"of {wanted[0]} and {wanted[1]}; choose another --out"
                )
        policies = [Checkpoint.load(folder / fleet.checkpoint_name(r)).module() for r in robots]
        makers = merges(fleet, policies, robots)
        for method in args.methods:
            if method not in makers:
                raise unknown("method", method, makers)
        weights = sum(p.numel() * p.element_size() for p in policies[0].parameters())
        for method in track(args.methods or list(makers), f"one_shot, seed {seed}"):
            if f"{method}/{seed}" in rows:
                continue
            began = time.process_time()
            policy, extra, what = makers[method]()
            seconds = time.process_time() - began
            record = fleet.evaluate(policy, fleet.tasks, args.episodes, _SEED)
            by_task = np.asarray(record.successes).reshape(len(fleet.tasks), -1).mean(1)
            rows[f"{method}/{seed}"] = {
                "method": method,
                "seed": seed,
                "robots": len(robots),
                "success": record.success,
                "episodes": len(record.seeds),
                "success_by_task": dict(zip(fleet.tasks, by_task.tolist())),
                "bytes_of_weights": weights,
                "bytes_beside": extra,
                "sent_beside": what,
                "server_cpu_seconds": round(seconds, 1),
            }
            if args.out is not None:
                write_json(args.out / "results.json", {"rows": list(rows.values()), "provenance": provenance()})
    text = table(list(rows.values()))
    if args.out is not None:
        with atomic_write(args.out / "table.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(text)
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, one line a method over all seeds."""
    lines = [
        "| method | success | by seed | sent beside the weights | bytes a robot | server CPU-seconds |",
        "|---|---|---|---|---|---|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["seed"])
        seeds = ", ".join(f"{row['success']:.2f}" for row in mine)
        cost = numbers.median(row["server_cpu_seconds"] for row in mine)
        lines.append(
            f"| `{method}` | {numbers.mean(row['success'] for row in mine):.3f} | {seeds} | {mine[0]['sent_beside']} | "
            f"{mine[0]['bytes_beside']:,} | {cost:.1f} |"
        )
    first = rows[0]
    tail = (
        f"{first['robots']} robots, {first['episodes']} episodes a seed, {first['bytes_of_weights']:,} bytes of weights"
    )
    return "\n".join([*lines, "", f"{tail}.", ""])
