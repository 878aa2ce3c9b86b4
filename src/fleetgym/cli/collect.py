"""``fleetgym collect``: demonstrations of an expert, or of a trained policy, as a Minari dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError


@dataclass
class Options:
    """Record demonstrations of a task's expert, or of a policy, in a folder that Minari reads."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TASK|ENV_ID")]
    """A task that `fleetgym list` prints, such as reach-v3, or the id of any Gymnasium environment (with --policy)."""

    out: str
    """The folder to write, or minari:NAMESPACE/NAME-v0 for Minari's own folder."""

    episodes: int = 20
    """How many episodes to try."""

    seed: int = 0
    """Episode i is reset with seed + i."""

    noise: float = 0.0
    """Standard deviation of Gaussian noise on the executed actions; the recorded ones are the expert's own."""

    goals: Literal["all", "train", "held_out"] | None = None
    """Which goals to draw, in a suite's task: train by default, so that evaluations can use the others."""

    keep: Literal["success", "all"] = "success"
    """Keep solved episodes only, or all of them."""

    stop_on_success: bool = True
    """End an episode when the task is solved."""

    max_steps: int | None = None
    """End an episode after so many steps; the environment's own limit by default."""

    policy: Path | None = None
    """A checkpoint or run to record, instead of the expert."""

    num_envs: int = 1
    """Environments stepped side by side in each process."""

    workers: int = 1
    """Processes."""

    overwrite: bool = False
    """Replace a dataset at --out."""


def main(argv: Sequence[str]) -> int:
    """Collects, and says how it went."""
    options = parse(Options, argv, "collect")
    if options.episodes < 1:
        raise UserError(f"--episodes {options.episodes}: it must be at least 1")

    from fleetgym.cli.targets import cpu_seconds, episode_bar, find, load_policy, rate, worker_pool
    from fleetgym.core.demonstrations import Demonstrations
    from fleetgym.core.rollout import collect

    Demonstrations.target(options.out, overwrite=options.overwrite)  # said before anything heavy is imported
    target = find(options.target)
    policy = load_policy(options.policy)[0] if options.policy is not None else target.expert()
    goals = options.goals or target.goals("train")
    begin = cpu_seconds()
    with worker_pool(options.workers) as pool, episode_bar(options.episodes, f"collect {target.name}") as advance:
        made = collect(
            policy,
            target.make_fn(goals=goals),
            range(options.seed, options.seed + options.episodes),
            dataset=options.out,
            keep=options.keep,
            overwrite=options.overwrite,
            task=target.name,
            instruction=target.instruction,
            expert=options.policy.name if options.policy is not None else f"expert of {target.name}",
            on_episode=advance,
            executor=pool,
            num_envs=options.num_envs,
            action_noise=options.noise,
            stop_on_success=options.stop_on_success,
            max_steps=options.max_steps,
        )
    print(f"{target.name}: solved {rate(made.info['succeeded'], made.info['attempted'])}")
    print(f"{len(made)} episodes, {made.steps} steps, {cpu_seconds() - begin:.1f} CPU-seconds")
    print(f"written to {made.path}")
    return 0
