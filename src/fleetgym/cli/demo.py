"""``fleetgym demo``: a film of an expert or of a trained policy."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError


@dataclass
class Options:
    """Film the expert of a task, or a trained policy in any environment."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID|TASK")]
    """A task that `fleetgym list` prints, such as reach-v3, or the id of any Gymnasium environment (with --policy)."""

    out: Path = Path("demo.gif")
    """The film: a .gif or .mp4 file."""

    steps: int = 150
    """At most so many steps."""

    every: int = 2
    """Film one step in so many."""

    fps: float | None = None
    """Frames a second; by default those of the environment, at its own speed."""

    seed: int = 0
    """Seed of the episode."""

    policy: Path | None = None
    """A checkpoint or run to film, instead of the expert."""

    task_set: str | None = None
    """The split whose one-hot the policy was trained with; by default what the checkpoint notes, if it does."""


def main(argv: Sequence[str]) -> int:
    """Films one episode; 1 where nothing here can render."""
    options = parse(Options, argv, "demo")
    for name in ("steps", "every"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: it must be at least 1")
    if options.out.suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"--out {options.out}: end the name in .gif or .mp4")

    from fleetgym.core.render import NO_GL_HELP, choose_gl, write_video

    backend = choose_gl()  # before anything imports MuJoCo

    import gymnasium as gym

    from fleetgym.cli.targets import find, load_policy
    from fleetgym.core.rollout import rollout

    target = find(options.target)
    if backend == "disable" and target.suite is not None:
        print(NO_GL_HELP, file=sys.stderr)
        return 1
    info: dict = {}
    if options.policy is not None:
        policy, info = load_policy(options.policy)
    else:
        policy = target.expert()
    task_set = options.task_set or info.get("task_set")
    source = target.make_fn(
        render_mode="rgb_array",
        task_set=(tuple(task_set) if isinstance(task_set, list) else task_set) if target.suite is not None else None,
    )
    fps = [options.fps]

    def make() -> gym.Env:
        env = (
            gym.make(source, render_mode="rgb_array", disable_env_checker=True) if isinstance(source, str) else source()
        )
        fps[0] = options.fps or float(env.metadata.get("render_fps") or 30) / options.every
        return env

    (episode,) = rollout(
        policy, make, [options.seed], max_steps=options.steps, render=options.every, record=False, stop_on_success=False
    )
    write_video(options.out, episode.frames, fps[0])
    solved = "solved" if episode.success else "not solved"
    print(f"{target.name}, seed {options.seed}: {episode.length} steps, {solved}, return {episode.ret:.4g}")
    print(f"{len(episode.frames)} frames at {fps[0]:g} a second written to {options.out}")
    return 0
