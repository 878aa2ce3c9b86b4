"""Records -> a table of methods, as JSON, Markdown and one self-contained HTML page with plots and a film.

A leaderboard's folder holds ``records/*.json`` (each an ``EvalRecord``: ``system`` is the method) and optionally
``extras.json`` (title, description, command, an interpolation between two policies) and ``film.mp4`` or ``film.gif``.
What is written depends on those files alone: the same records give the same bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fleetgym.benchmarks.plots import SLOTS, human_bytes
from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_write, read_json, write_json
from fleetgym.core.records import EvalRecord, wilson_interval

LABELS = {
    "alone_all": "Each robot alone, all tasks",
    "alone_own": "Each robot alone, own task",
    "average_rounds": "Averaging in rounds",
    "fleet_merge_once": "Fleet merge, once",
    "fleet_merge_rounds": "Fleet merge in rounds",
    "joint": "Joint training",
}
"""Readable names of the methods that every fleet benchmark has, in the order of the table."""

REFERENCES = ("alone_all", "alone_own", "joint")
"""Methods that merge nothing: what merging is held against."""

END = "<!-- /leaderboard -->"


def _marker(name: str) -> str:
    return f"<!-- leaderboard:{name} -->"


def load(folder: str | os.PathLike) -> list[EvalRecord]:
    """Reads all records of a folder, in the order of their file names.

    Raises:
        UserError: There is none, one is not a record, two are of the same method, seed and task, or they belong to
            different benchmarks; the message names the folder or the file.
    """
    folder = Path(folder)
    paths = sorted((folder / "records").glob("*.json"))
    if not paths:
        raise UserError(
            f"{folder} holds no records/*.json, so there is nothing to rank; "
            "name the folder that a benchmark wrote, such as runs/fleet_merge/quick"
        )
    records, seen, wholes = [], {}, {}
    for path in paths:
        record = EvalRecord.load(path)
        for name in ("bytes_sent", "cpu_seconds", "seed"):
            _number(record.metrics.get(name), f"{path}: metrics.{name}")
        key = (record.system, record.metrics.get("seed"), record.task)
        if key in seen:
            raise UserError(
                f"{seen[key]} and {path.name} in {path.parent} are both of {key[0]!r}, seed {key[1]}, on {key[2]!r}: "
                "their episodes would count twice; remove one, or give each training its own metrics.seed"
            )
        seen[key] = path.name
        # Without names of their own the episodes are of the record's task: then one benchmark has many.
        if record.tasks:
            wholes.setdefault(record.task, path.name)
        records.append(record)
    if len(wholes) > 1:
        parts = ", ".join(f"{name} is of {task!r}" for task, name in sorted(wholes.items()))
        raise UserError(f"{folder / 'records'} mixes benchmarks: {parts}; give each its own folder")
    return records


def _number(value: Any, where: str) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0):
        raise UserError(f"{where} must be a number, at least 0, got {value!r}")


def _seed_name(record: EvalRecord) -> str:
    seed = record.metrics.get("seed")
    return "?" if seed is None else f"{seed:g}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _mean_over_seeds(records: Sequence[EvalRecord], metric: str) -> float | None:
    """Mean over training seeds; within a seed, over its records (such as one for each task)."""
    seeds: dict[str, list[Any]] = {}
    for record in records:
        seeds.setdefault(_seed_name(record), []).append(record.metrics.get(metric))
    return _mean([_mean(values) for values in seeds.values()])


def _curve(records: Sequence[EvalRecord]) -> list[dict[str, Any]]:
    """Mean, least and most success over training seeds at each round that all seeds have (else at any)."""
    curves = [record.metrics["curve"] for record in records if record.metrics.get("curve")]
    for curve in curves:
        if not all(isinstance(p, Mapping) and isinstance(p.get("success"), (int, float)) for p in curve):
            raise UserError(
                f"records of {records[0].system!r}: each point of metrics.curve must be an object with a number "
                "'success' and a 'round' or 'gradient_steps'"
            )
    axis = next((key for key in ("round", "gradient_steps") if curves and all(key in p for c in curves for p in c)), "")
    if not axis:
        return []
    by_place = [{point[axis]: point for point in curve} for curve in curves]
    places = set.intersection(*map(set, by_place)) or set.union(*map(set, by_place))
    result = []
    for place in sorted(places):
        points = [curve[place] for curve in by_place if place in curve]
        success = [float(point["success"]) for point in points]
        entry: dict[str, Any] = {axis: place}
        for key in ("gradient_steps", "bytes_sent"):
            if key != axis and (mean := _mean([point.get(key) for point in points])) is not None:
                entry[key] = mean
        result.append({**entry, "success": _mean(success), "low": min(success), "high": max(success)})
    return result


def _row(method: str, records: Sequence[EvalRecord], slot: int, task_order: Mapping[str, int]) -> dict[str, Any]:
    totals: dict[str, tuple[int, int]] = {}
    by_seed: dict[str, tuple[int, int]] = {}
    for record in records:
        for task, (k, n) in record.per_task().items():
            done = totals.get(task, (0, 0))
            totals[task] = done[0] + k, done[1] + n
        done = by_seed.get(_seed_name(record), (0, 0))
        by_seed[_seed_name(record)] = done[0] + sum(record.successes), done[1] + len(record.successes)
    totals = {task: totals[task] for task in sorted(totals, key=task_order.__getitem__)}
    k, n = (sum(values) for values in zip(*totals.values()))
    low, high = wilson_interval(k, n)
    worst = min(totals, key=lambda task: totals[task][0] / totals[task][1])
    metrics = [record.metrics for record in records]
    sent = _mean_over_seeds(records, "bytes_sent")
    return {
        "method": method,
        "label": next((str(m["label"]) for m in metrics if m.get("label")), LABELS.get(method, method)),
        "kind": "reference" if method in REFERENCES else "merged",
        "success": k / n,
        "low": low,
        "high": high,
        "worst_task": totals[worst][0] / totals[worst][1],
        "worst_task_name": worst,
        "bytes_sent": None if sent is None else round(sent),
        "cpu_seconds": _mean_over_seeds(records, "cpu_seconds"),
        "gradient_steps": _mean_over_seeds(records, "gradient_steps"),
        "seeds": len(by_seed),
        "episodes": n,
        "success_by_seed": {seed: by_seed[seed][0] / by_seed[seed][1] for seed in sorted(by_seed, key=_natural)},
        "per_task": {
            task: {"success": good / trials, "successes": good, "episodes": trials}
            for task, (good, trials) in totals.items()
        },
        "curve": _curve(records),
        "note": next((str(m["note"]) for m in metrics if m.get("note")), ""),
        "slot": slot,
    }


def _natural(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return math.inf, name


def build(folder: str | os.PathLike, order: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Makes the rows of a leaderboard.

    A method's episodes are pooled over tasks and training seeds; ``low`` and ``high`` are Wilson's 95% interval of
    the pooled rate. It speaks of the episodes drawn, not of the seeds trained: ``success_by_seed`` shows those.

    Args:
        folder: See the module.
        order: Methods in the order wanted; others follow, first those of ``LABELS``, then by name.

    Returns:
        A row for each method, of JSON types: ``method``, ``label``, ``kind`` ("merged" or "reference"), ``success``,
        ``low``, ``high``, ``worst_task`` (its success), ``worst_task_name``, ``bytes_sent`` (by each robot, mean over
        seeds, None if unknown), ``cpu_seconds`` and ``gradient_steps`` (likewise), ``seeds`` (how many were trained),
        ``episodes``, ``success_by_seed``, ``per_task``, ``curve`` (mean, ``low`` least and ``high`` most over seeds),
        ``note``, ``slot`` (its colour), ``share_of_joint`` (None without joint training) and ``best_merged``.

    Raises:
        UserError: No records, or records that cannot be ranked together; see ``load``.
    """
    return _rows(load(folder), order)


def _rows(records: Sequence[EvalRecord], order: Sequence[str] | None = None) -> list[dict[str, Any]]:
    methods: dict[str, list[EvalRecord]] = {}
    for record in records:
        methods.setdefault(record.system, []).append(record)
    standard = [*LABELS, *sorted(methods.keys() - LABELS.keys())]
    # The standard methods have the same colour on every page; others take the remaining colours in turn.
    rest = SLOTS - len(LABELS)
    slots = {name: i if i < len(LABELS) else len(LABELS) + (i - len(LABELS)) % rest for i, name in enumerate(standard)}
    # The order of the benchmark itself, which a row that holds every task has.
    longest = max(records, key=lambda record: len(record.per_task()))
    names = dict.fromkeys([*longest.per_task(), *(task for record in records for task in record.per_task())])
    task_order = {task: i for i, task in enumerate(names)}
    wanted = [name for name in dict.fromkeys([*(order or ()), *standard]) if name in methods]
    rows = [_row(name, methods[name], slots[name], task_order) for name in wanted]
    joint = next((row["success"] for row in rows if row["method"] == "joint"), None)
    merged = [row for row in rows if row["kind"] == "merged"]
    # Of equal ones the one that sent less.
    best = max(merged, key=lambda row: (row["success"], -(row["bytes_sent"] or 0)), default=None)
    for row in rows:
        row["share_of_joint"] = row["success"] / joint if joint else None
        row["best_merged"] = row is best
    return rows


def human_seconds(seconds: float | None) -> str:
    """Formats a duration, such as ``38 s``, ``12 min`` or ``1.4 h``; None gives a dash."""
    if seconds is None:
        return "–"
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 9.95 * size else 0}f} {unit}"
    return f"{seconds:.{1 if seconds < 9.95 else 0}f} s"


def runs(row: Mapping[str, Any]) -> str:
    """How often a method was trained; a single training is called that, for it may have been a lucky one."""
    return "1 run" if row["seeds"] == 1 else str(row["seeds"])


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table, without a heading; the best merged row is bold."""
    lines = [
        "| Method | Success [95% interval] | Worst task | Of joint | Sent by each robot | CPU time | Seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        label = row["label"].replace("\\", "\\\\").replace("|", "\\|").replace("\n", " ")
        share = "–" if row["share_of_joint"] is None else f"{row['share_of_joint']:.0%}"
        cells = [
            label,
            f"{row['success']:.2f} [{row['low']:.2f}, {row['high']:.2f}]",
            f"{row['worst_task']:.2f} ({row['worst_task_name']})",
            share,
            human_bytes(row["bytes_sent"]),
            human_seconds(row["cpu_seconds"]),
            runs(row),
        ]
        if row["best_merged"]:
            cells[:2] = [f"**{cell}**" for cell in cells[:2]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line on what was counted."""
    tasks = {task for row in rows for task in row["per_task"]}
    episodes = sum(row["episodes"] for row in rows)
    seeds = sorted({row["seeds"] for row in rows})
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"{len(tasks)} task{'s' * (len(tasks) != 1)}, {episodes:,} episodes, "
        f"{many} training seed{'s' * (seeds[-1] != 1)} a method."
    )


def read_extras(folder: str | os.PathLike) -> dict[str, Any]:
    """Reads ``extras.json``; a folder without it gives an empty dict.

    Raises:
        UserError: It is not what the page can show; the message names the file and the field.
    """
    path = Path(folder) / "extras.json"
    if not path.exists():
        return {}
    extras = read_json(path)
    if not isinstance(extras, Mapping):
        raise UserError(f"{path} must hold an object, got a {type(extras).__name__}")
    for line in extras.get("reference_lines") or ():
        if not isinstance(line, Mapping) or not isinstance(line.get("success"), (int, float)) or "label" not in line:
            raise UserError(f"{path}: each of reference_lines must have a 'label' and a number 'success', got {line!r}")
    data = extras.get("interpolation")
    if data:
        try:
            size = len(data["lambda"])
            wrong = [
                f"{one['name']!r} has {len(one[key])} values of {key}"
                for one in data["series"]
                for key in ("loss", "success")
                if one.get(key) and len(one[key]) != size
            ]
        except (KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path}: interpolation must have 'lambda' and 'series', each series a 'name' and lists 'loss' and/or "
                f"'success' ({type(error).__name__}: {error})"
            ) from error
        if wrong:
            raise UserError(f"{path}: interpolation has {size} values of lambda, but {'; '.join(wrong)}")
    return dict(extras)


def write(folder: str | os.PathLike) -> Path:
    """Writes ``leaderboard.json``, ``leaderboard.md`` and ``leaderboard.html`` beside the records.

    Args:
        folder: See the module.

    Returns:
        The path of the page.

    Raises:
        UserError: See ``build`` and ``read_extras``; nothing is written then.
    """
    from fleetgym.benchmarks.page import page, title_of

    folder = Path(folder)
    records, extras = load(folder), read_extras(folder)
    rows = _rows(records)
    html = page(rows, records, extras, folder)
    parts = [f"# {title_of(extras, records)}", extras.get("description"), table(rows).rstrip(), summary(rows)]
    if extras.get("command"):
        parts.append(f"```\n{extras['command']}\n```")
    write_json(folder / "leaderboard.json", rows)
    _write_text(folder / "leaderboard.md", "\n\n".join(str(part).strip() for part in parts if part) + "\n")
    _write_text(folder / "leaderboard.html", html)
    return folder / "leaderboard.html"


def _write_text(path: Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def default_marker(folder: str | os.PathLike) -> str:
    """The name that a folder's table has in a README: its last two parts, such as ``fleet_merge/quick``."""
    return "/".join(Path(folder).resolve().parts[-2:])


def update_readme(readme: str | os.PathLike, folder: str | os.PathLike, marker: str | None = None) -> Path:
    """Puts the table of a folder between two HTML comments of a Markdown file.

    Args:
        readme: A file that has a line ``<!-- leaderboard:MARKER -->`` and, below it, ``<!-- /leaderboard -->``.
        folder: See the module.
        marker: By default the last two parts of ``folder``.

    Returns:
        The path of the file.

    Raises:
        UserError: The file or its markers are missing; see also ``build``.
    """
    readme = Path(readme)
    begin = _marker(default_marker(folder) if marker is None else marker)
    if not readme.is_file():
        raise UserError(f"{readme} does not exist; name a Markdown file with the lines {begin} and {END}")
    with open(readme, encoding="utf-8", newline="") as file:
        text = file.read()
    start = text.find(begin)
    stop = text.find(END, start)
    # A begin whose end is missing must not swallow the next table.
    if start < 0 or stop < 0 or "<!-- leaderboard:" in text[start + len(begin) : stop]:
        raise UserError(f"{readme} lacks the lines {begin} and {END}; put both where the table is to stand")
    rows = build(folder)
    newline = "\r\n" if "\r\n" in text else "\n"
    block = f"{begin}\n\n{table(rows)}\n{summary(rows)}\n\n".replace("\n", newline)
    _write_text(readme, text[:start] + block + text[stop:])
    return readme
