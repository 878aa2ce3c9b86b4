"""Sweeps of the fleet-merging benchmark: every combination of some settings, one table and one plot of all.

Each combination has a folder of its own, with a leaderboard as of any run. Rows without rounds (robots alone, one
merge at the end, joint training) depend on the number of gradient steps alone, not on how they are cut into rounds:
they are trained once for all combinations that differ in nothing else.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fleetgym.benchmarks.fleet_pages import publish
from fleetgym.benchmarks.fleet_presets import MERGES, METHODS, Preset, preset_from
from fleetgym.benchmarks.fleet_workers import run
from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_write, write_json
from fleetgym.core.run import Run

_SCHEDULE = ("local_steps", "rounds", "steps")
"""Fields that say how gradient steps are cut into rounds; the other swept ones make lines of their own."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One combination."""

    values: dict[str, str]
    preset: Preset
    methods: tuple[str, ...]
    """Rows to fill here; without those that another combination has."""

    @property
    def folder(self) -> str:
        """The name of its folder."""
        return ",".join(f"{key}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', value)}" for key, value in self.values.items())


def combinations(name: str, overrides: Sequence[str], axes: Sequence[str], methods: Sequence[str]) -> list[Point]:
    """The points of a sweep: the product of the values of each axis.

    Args:
        name: Preset.
        overrides: Changes that hold for all.
        axes: Texts ``field=value,value,...``.
        methods: Rows wanted.

    Returns:
        The points that have something to train, the last axis running fastest.

    Raises:
        UserError: A text that is none, a field or a value that is given twice, or a combination that is no preset.
    """
    values: dict[str, list[str]] = {}
    fixed = {text.partition("=")[0] for text in overrides}
    for text in axes:
        key, equals, words = text.partition("=")
        found = words.split(",")
        if not equals or "" in found:
            raise UserError(f"--sweep {text}: FIELD=VALUE,VALUE is wanted, such as local_steps=1,5,20")
        if key in values or key in fixed:
            raise UserError(f"--sweep {text}: {key} is given twice; leave one out")
        if len(set(found)) < len(found):
            raise UserError(f"--sweep {text}: a value is given twice; leave one out")
        values[key] = found
    points, seen = [], set()
    for choice in itertools.product(*values.values()):
        own = dict(zip(values, choice))
        preset = preset_from(name, [*overrides, *(f"{key}={value}" for key, value in own.items())])
        preset.check()
        wanted = tuple(methods)
        key = dataclasses.replace(preset, optimizer="robot", local_steps=1, rounds=preset.steps - preset.warmup)
        if key in seen:
            wanted = tuple(method for method in methods if method in MERGES)
        seen.add(key)
        if wanted:
            points.append(Point(own, preset, wanted))
    return points


def sweep(
    name: str,
    overrides: Sequence[str],
    axes: Sequence[str],
    folder: Path,
    seeds: Sequence[int],
    *,
    resume: bool = False,
    methods: Sequence[str] = tuple(METHODS),
    **options: Any,
) -> list[dict[str, Any]]:
    """Runs every combination, one after the other, and writes ``sweep.json``, ``sweep.md`` and ``sweep.html``.

    Args:
        name: Preset.
        overrides: Changes that hold for all combinations.
        axes: See :func:`combinations`.
        folder: Where everything goes, a folder below it for each combination.
        seeds: Training seeds.
        resume: Go on in a folder that exists; what was finished is kept.
        methods: Rows to fill.
        options: As for ``fleet_workers.run``.

    Returns:
        The rows of ``sweep.json``.

    Raises:
        UserError: See :func:`combinations`; the folder is another sweep's; what a run raises.
    """
    points = combinations(name, overrides, axes, methods)
    config = {
        "benchmark": "fleet_merge",
        "name": name,
        "overrides": list(overrides),
        "sweep": list(axes),
        "presets": {point.folder: dataclasses.asdict(point.preset) for point in points},
    }
    with Run.open(folder, config, resume=resume, name="fleet_merge sweep", tensorboard=False):
        for number, point in enumerate(points, start=1):
            place = folder / point.folder
            print(f"{point.folder} ({number} of {len(points)})", flush=True)
            part = {"benchmark": "fleet_merge", "name": name, "preset": dataclasses.asdict(point.preset)}
            with Run.open(place, part, resume=True, name="fleet_merge", tensorboard=False):
                for seed in seeds:
                    share_demonstrations(folder, place, point.preset, seed)
                run(point.preset, place, seeds, methods=point.methods, **options)
                publish(place, point.preset, name, seeds, make_film=False)
        found = rows(folder, points)
        words = f"--preset {name} --seeds {' '.join(map(str, seeds))}"
        if tuple(methods) != tuple(METHODS):
            words += f" --methods {' '.join(methods)}"
        if overrides:
            words += f" --override {' '.join(overrides)}"
        words += f" --sweep {' '.join(axes)}"
        write(folder, found, list(points[0].values), name, f"fleetgym bench fleet_merge {words}")
    return found


def share_demonstrations(folder: Path, place: Path, preset: Preset, seed: int) -> None:
    """Lets combinations with the same demonstrations collect them once: theirs is a link to a common folder."""
    count = preset.robots_per_task * preset.demonstrations
    seen = f"-{preset.image_size}px" if preset.sees else ""
    common = folder / "demonstrations" / f"noise{preset.noise:g}-{count}{seen}" / f"seed{seed}"
    link = place / "training" / f"seed{seed}" / "demonstrations"
    common.mkdir(parents=True, exist_ok=True)
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        # Relative, so that the whole folder can be moved.
        link.symlink_to(os.path.relpath(common, link.parent), target_is_directory=True)


def rows(folder: Path, points: Sequence[Point]) -> list[dict[str, Any]]:
    """A row for each combination and method: what the leaderboard of its folder says, and the swept ``values``."""
    from fleetgym.benchmarks import leaderboard

    kept = ("method", "label", "kind", "slot", "success", "low", "high", "worst_task", "worst_task_name")
    kept += ("bytes_sent", "cpu_seconds", "gradient_steps", "seeds", "episodes")
    return [
        {"values": point.values, "folder": point.folder, **{key: row[key] for key in kept}}
        for point in points
        for row in leaderboard.build(folder / point.folder)
        if row["method"] in point.methods
    ]


def table(found: Sequence[dict[str, Any]], names: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table of the rows, in order of method, gradient steps and bytes."""
    from fleetgym.benchmarks.leaderboard import human_seconds, runs
    from fleetgym.benchmarks.plots import human_bytes

    heads = ["Method", *names, "Gradient steps", "Success [95% interval]", "Worst task", "Sent by each robot"]
    lines = []
    order = {method: i for i, method in enumerate(dict.fromkeys(row["method"] for row in found))}
    for row in sorted(found, key=lambda row: (order[row["method"]], row["gradient_steps"], row["bytes_sent"] or 0)):
        # Without rounds the schedule means nothing; its steps have a column.
        own = [row["values"][name] if row["method"] in MERGES or name not in _SCHEDULE else "–" for name in names]
        lines.append(
            [
                row["label"],
                *own,
                f"{row['gradient_steps']:,.0f}",
                f"{row['success']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
                f"{row['worst_task']:.2f} ({row['worst_task_name']})",
                human_bytes(row["bytes_sent"]),
                human_seconds(row["cpu_seconds"]),
                runs(row),
            ]
        )
    return [*heads, "CPU time", "Seeds"], lines


def plot(found: Sequence[dict[str, Any]]) -> str | None:
    """Success against bytes: a line joins the points of one method that took as many gradient steps.

    Rows without rounds are horizontal lines. With further fields swept, each of their values has lines of its own.
    """
    from fleetgym.benchmarks import plots

    many = len({row["gradient_steps"] for row in found}) > 1

    def kind(row: dict[str, Any]) -> str:
        words = [f"{key}={value}" for key, value in row["values"].items() if key not in _SCHEDULE]
        return ", ".join([*words, *([f"{row['gradient_steps']:g} steps"] if many else [])])

    styles = {name: i for i, name in enumerate(dict.fromkeys(kind(row) for row in found))}
    groups: dict[tuple[str, str], dict[str, Any]] = {}
    lines = []
    for row in found:
        name = kind(row)
        # What sets lines apart comes first: long labels are cut at their end.
        label = f"{name}: {row['label']}" if name else row["label"]
        if row["method"] not in MERGES:
            lines.append({"label": label, "slot": row["slot"], "success": row["success"]})
            continue
        empty = {"label": label, "slot": row["slot"], "style": styles[name], "points": []}
        text = " ".join(f"{value}" for key, value in row["values"].items() if key in _SCHEDULE)
        point = {key: row[key] for key in ("bytes_sent", "success", "low", "high")}
        groups.setdefault((row["method"], name), empty)["points"].append({**point, "text": text})
    return plots.swept(list(groups.values()), lines)


def write(folder: Path, found: Sequence[dict[str, Any]], names: Sequence[str], name: str, command: str) -> None:
    """Writes the rows, the table and the page."""
    from fleetgym.benchmarks import page

    title = f"Fleet merging on {preset_from(name).world.title}, preset {name}: {', '.join(names)} swept"
    heads, lines = table(found, names)
    text = "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *lines))
    write_json(folder / "sweep.json", {"command": command, "rows": list(found)})
    with atomic_write(folder / "sweep.md") as temporary:
        temporary.write_text(f"# {title}\n\n{text}\n```\n{command}\n```\n", encoding="utf-8")
    written = ", ".join(key for key in names if key in _SCHEDULE)
    words = (
        "A line joins runs of one method with as many gradient steps. Bars: 95% intervals of the episodes. Dotted: "
        f"methods without rounds.{f' Beside a point: {written}.' if written else ''} The scale of bytes is logarithmic."
    )
    parts = [
        page.header(title),
        page.plot_section("Success for what was sent", words, plot(found)),
        page.table_section("All combinations", heads, lines),
        page.command_section(command),
    ]
    with atomic_write(folder / "sweep.html") as temporary:
        temporary.write_text(page.document(title, parts), encoding="utf-8", newline="\n")
