"""``fleetgym demo``: a film of an expert or of a trained policy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError

if TYPE_CHECKING:
    import gymnasium as gym
    import numpy as np

    from fleetgym.core.policy import Policy

#: Frames for which the film of a trial lingers where an episode ends, and where a sign comes into sight.
PAUSE = 6


@dataclass
class Options:
    """Film the expert of a task, or a trained policy in any environment."""

    target: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ENV_ID|TASK")]
    """A task that `fleetgym list` prints, such as reach-v3, or the id of any Gymnasium environment (with --policy)."""

    out: Path = Path("demo.gif")
    """The film: a .gif or .mp4 file."""

    steps: int = 150
    """At most so many steps an episode."""

    every: int | None = None
    """Film one step in so many; by default each one of tasks that have trials, else every second."""

    shrink: int = 1
    """Make the film so many times smaller, along each side."""

    fps: float | None = None
    """Frames a second; by default those of the environment, at its own speed."""

    seed: int = 0
    """Seed of the episode."""

    policy: Path | None = None
    """A checkpoint or run to film, instead of the expert."""

    split: str | None = None
    """Where the trial comes from, in tasks that have trials: train, test, ..."""

    task_set: str | None = None
    """The split whose one-hot the policy was trained with; by default what the checkpoint notes, if it does."""


def main(argv: Sequence[str]) -> int:
    """Films one episode, or one trial; 1 where nothing here can render."""
    options = parse(Options, argv, "demo")
    for name in ("steps", "every", "shrink"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1")
    if options.out.suffix.lower() not in (".gif", ".mp4"):
        raise UserError(f"--out {options.out}: end the name in .gif or .mp4")

    from fleetgym.core.render import NO_GL_HELP, choose_gl, write_video

    backend = choose_gl()  # before anything imports MuJoCo

    import gymnasium as gym

    from fleetgym.cli.targets import find, load_policy
    from fleetgym.core.rollout import rollout

    target = find(options.target)
    if backend == "disable" and target.opengl:
        print(NO_GL_HELP, file=sys.stderr)
        return 1
    trial = target.episodes > 1
    if options.split is not None and not trial:
        raise UserError(f"--split {options.split}: {target.name} has no trials, and so no splits of them")
    every = options.every or (1 if trial else 2)
    info: dict = {}
    if options.policy is not None:
        policy, info = load_policy(options.policy)
    else:
        policy = target.expert(episodes=target.episodes, split=options.split or "train") if trial else target.expert()
    task_set = options.task_set or info.get("task_set")
    source = target.make_fn(
        render_mode="rgb_array",
        task_set=(tuple(task_set) if isinstance(task_set, list) else task_set) if target.suite is not None else None,
        split=options.split,
    )
    fps = [options.fps]

    def make() -> gym.Env:
        env = (
            gym.make(source, render_mode="rgb_array", disable_env_checker=True) if isinstance(source, str) else source()
        )
        fps[0] = options.fps or float(env.metadata.get("render_fps") or 30) / every
        return env

    if trial:
        frames, lines = film_trial(policy, make, options.seed, target.episodes, options.steps, every)
        print(f"{target.name}, seed {options.seed}:")
        print("\n".join(f"  episode {number}: {line}" for number, line in enumerate(lines, 1)))
    else:
        (episode,) = rollout(
            policy, make, [options.seed], max_steps=options.steps, render=every, record=False, stop_on_success=False
        )
        frames = episode.frames
        print(f"{target.name}, seed {options.seed}: {_outcome(episode.length, episode.success, episode.ret)}")
    write_video(options.out, [_shrunk(frame, options.shrink) for frame in frames], fps[0])
    print(f"{len(frames)} frames at {fps[0]:g} a second written to {options.out}")
    return 0


def _shrunk(frame: np.ndarray, times: int) -> np.ndarray:
    """The means of blocks of ``times`` x ``times`` pixels; what is left over at the right and below is cut off."""
    height, width = (max(size // times, 1) for size in frame.shape[:2])
    times = min(times, *frame.shape[:2])
    blocks = frame[: height * times, : width * times].reshape(height, times, width, times, 3)
    return blocks.mean((1, 3)).round().astype(frame.dtype)


def _outcome(steps: int, success: bool, total: float) -> str:
    return f"{steps} steps, {'solved' if success else 'not solved'}, return {total:.4g}"


def film_trial(
    policy: Policy, make: Callable[[], gym.Env], seed: int, episodes: int, max_steps: int, every: int = 1
) -> tuple[list[np.ndarray], list[str]]:
    """Films all episodes of a trial; the policy's memory lasts from one to the next.

    Args:
        policy: Gets ``episode_start`` at each episode's first step. If it has ``attach(env)``, that is called first.
        make: Makes the environment, with ``render_mode="rgb_array"``.
        seed: Of the trial.
        episodes: How many it has.
        max_steps: Cuts an episode after so many steps; the next one begins where ``reset()`` goes on.
        every: Keeps one frame in so many steps. An episode's last frame is kept ``PAUSE`` times, and so is the first
            one of a visit to a sign (``observation["on_sign"]``).

    Returns:
        The frames, and a line about each episode.
    """
    import numpy as np

    env = make()
    frames: list[np.ndarray] = []
    lines: list[str] = []
    try:
        if hasattr(policy, "attach"):
            policy.attach(env)
        state: Any = None
        for number in range(episodes):
            observation, info = env.reset(seed=seed if number == 0 else None)
            frames.append(env.render())
            total, steps, over, before = 0.0, 0, False, False
            while not over and steps < max_steps:
                start = np.array([steps == 0])
                action, state = policy.predict(_batched(observation), state, start, True)
                observation, reward, terminated, truncated, info = env.step(action[0])
                total, steps, over = total + float(reward), steps + 1, bool(terminated or truncated)
                visited = isinstance(observation, dict) and bool(observation.get("on_sign"))
                linger = over or (visited and not before)
                before = visited
                if linger or steps % every == 0:
                    frames += [env.render()] * (PAUSE if linger else 1)
            lines.append(_outcome(steps, bool(info.get("success")), total))
    finally:
        env.close()
    return frames, lines


def _batched(observation: Any) -> Any:
    import numpy as np

    if isinstance(observation, dict):
        return {key: np.asarray(value)[None] for key, value in observation.items()}
    return np.asarray(observation)[None]
