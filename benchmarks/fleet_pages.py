"""What the fleet-merging benchmark shows of a folder: the film, the merged policy, the leaderboard's pages."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fleetgym.benchmarks.fleet_jobs import EVALUATION_SEED, FURTHER, record_path
from fleetgym.benchmarks.fleet_presets import ALL, ALL_METHODS, METHODS, PRESETS, Preset
from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.errors import UserError
from fleetgym.core.files import read_json, write_json
from fleetgym.core.rollout import rollout


def merged_policy(folder: Path, seed: int) -> Path:
    """Where the checkpoint of the policy merged in rounds lies."""
    return folder / "training" / f"seed{seed}" / "fleet_merge_rounds" / "checkpoints" / "last"


def film(folder: Path, preset: Preset, seed: int, max_steps: int = 120, tasks: int = 6) -> str | None:
    """Films the merged policy on several tasks, side by side.

    Args:
        folder: The benchmark's folder.
        preset: What was trained.
        seed: Whose policy.
        max_steps: Steps of an episode shown.
        tasks: How many tasks at most.

    Returns:
        The film's file name, or None where nothing can be rendered here.
    """
    from fleetgym.core.render import NO_GL_HELP, choose_gl, grid_video, write_video

    if choose_gl() == "disable":
        print(f"no film: {NO_GL_HELP}")
        return None
    policy = Checkpoint.load(merged_policy(folder, seed)).module()
    names = preset.task_names[:tasks]
    films = []
    for name in names:
        episode = rollout(
            policy,
            functools.partial(preset.world.filmed, preset, preset.world.places(preset, [name])[0]),
            [EVALUATION_SEED],
            max_steps=max_steps,
            stop_on_success=True,
            render=2,
            record=False,
        )[0]
        larger = max(1, 192 // len(episode.frames[0]))  # what a policy sees is shown pixel by pixel
        films.append([frame.repeat(larger, 0).repeat(larger, 1) for frame in episode.frames])
    # The last frame stays for a moment before the film begins again.
    frames = list(grid_video([[*frames, *frames[-1:] * 10] for frames in films]))
    write_video(folder / "film.mp4", frames, fps=20)
    write_video(folder / "film.gif", frames, fps=20)  # for pages that show no video, such as a README
    return "film.mp4"


def command_options(preset: Preset, name: str) -> str:
    """The options that make a preset of the one of that name, with a space before; empty if it is that."""
    usual = dataclasses.asdict(PRESETS[name])
    changed = [f"{key}={value}" for key, value in dataclasses.asdict(preset).items() if value != usual[key]]
    return f" --override {' '.join(changed)}" if changed else ""


def describe(preset: Preset) -> str:
    """Who has what, and what is sent, in two sentences; a third where policies see."""
    tasks, each = len(preset.task_names), preset.tasks_each
    what = f"{preset.demonstrations} demonstrations of {preset.world.one}"
    if preset.tasks_per_robot == ALL:
        what = f"{preset.demonstrations} demonstrations of its own of every task"
    elif each > 1:
        what = f"{preset.demonstrations} demonstrations of each of {each} tasks dealt at random"
    whose = "of its own" if preset.initial == "different" else "common to all"
    spell = "gradient step" if preset.local_steps == 1 else f"{preset.local_steps} gradient steps"
    sent = f"every {spell} they send weights"
    if preset.optimizer == "server":
        sent = f"they send weights after {preset.warmup} gradient steps, and at each later step a gradient"
    seen = ""
    if preset.observation == "points":
        seen = f" They see {preset.points} points of tool and object in the hand's frame, and {preset.world.numbers}."
    if preset.observation == "image":
        side = preset.image_size
        seen = (
            f" They see a picture of {side} x {side} pixels by the camera {preset.world.camera}, and "
            f"{preset.world.numbers}."
        )
    return (
        f"{preset.robots} robots on {tasks} task{'s' * (tasks != 1)}, each with {what} and random initial weights "
        f"{whose}, never share data: {sent}, which are merged into one policy for all tasks.{seen}"
    )


def publish(folder: Path, preset: Preset, name: str, seeds: Sequence[int], make_film: bool = True) -> None:
    """Writes ``extras.json``, the film, the merged policy and the leaderboard pages from what lies in the folder."""
    from fleetgym.benchmarks import leaderboard

    interpolated = folder / "training" / f"seed{seeds[0]}" / "alone" / "interpolation.json"
    rows = command_options(preset, name)
    command = "fleet_tools" if name.startswith("tools_") else "fleet_merge"
    short = name.removeprefix("tools_")
    found = [method for method in ALL_METHODS if record_path(folder, method, seeds[0]).exists()]
    if found != list(METHODS):
        rows = f" --methods {' '.join(found)}{rows}"
    changed = ", changed" if " --override " in rows else ""
    extras: dict[str, Any] = {
        "title": f"Fleet merging on {preset.world.title}, preset {short}{changed}",
        "description": (
            f"{describe(preset)} Success is on goals that no demonstration showed; intervals are Wilson's, 95%."
        ),
        "command": f"fleetgym bench {command} --preset {short} --seeds {' '.join(map(str, seeds))}{rows}",
    }
    if interpolated.exists():
        extras["interpolation"] = read_json(interpolated)
    if make_film:
        try:
            extras["film"] = film(folder, preset, seeds[0]) if merged_policy(folder, seeds[0]).exists() else None
        except UserError as error:
            print(f"no film: {error}")
    if (folder / "film.mp4").exists():
        extras["film"] = "film.mp4"
    trained = merged_policy(folder, seeds[0])
    if trained.exists():
        merged = Checkpoint.load(trained)
        Checkpoint.save(folder / "policy", merged.module(), info=merged.info)
    write_json(folder / "extras.json", {key: value for key, value in extras.items() if value is not None})
    leaderboard.write(folder)
    further = folder / FURTHER
    if (further / "records").exists():
        own = {
            "title": f"{extras['title']}: what no robot has met",
            "description": f"The same policies, on {_listed(place.name for place in preset.world.further(preset))}.",
            "command": extras["command"],
        }
        write_json(further / "extras.json", own)
        leaderboard.write(further)


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{'; '.join(first)}; and {last}" if first else last
