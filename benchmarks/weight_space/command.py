"""The commands ``fleetgym bench nfn``, ``nft`` and ``unf``: jobs, rows, tables, pictures, a page."""

from __future__ import annotations

import os
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fleetgym.benchmarks.jobs import workers as worker_processes
from fleetgym.benchmarks.weight_space import ABOUT, BENCHES, TASKS
from fleetgym.benchmarks.weight_space.task import Job, Task, settings
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, jsonable, read_json, write_json
from fleetgym.core.records import provenance
from fleetgym.core.run import Run


@dataclass
class Args:
    """Networks that read networks: trains every method of every task, and writes tables and pictures."""

    preset: str = "quick"
    """quick (minutes) or cpu (the figures of the documentation; hours)."""
    tasks: tuple[str, ...] = ()
    """Tasks; by default those of the command, and any task may be named."""
    methods: tuple[str, ...] = ()
    """Rows to fill; by default all that a task has."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of training."""
    out: Path | None = None
    """Folder of the results; by default runs/COMMAND/PRESET."""
    resume: bool = False
    """Go on in a folder that exists. Rows that are there stay; tasks, methods and seeds may be added."""
    workers: int = 0
    """Processes; 0 means one for each core, four at most."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    override: tuple[str, ...] = ()
    """Changes to the settings of tasks, such as policy.steps=1000."""


def nfn(argv: Sequence[str]) -> int:
    """``fleetgym bench nfn``."""
    return _main("nfn", argv)


def nft(argv: Sequence[str]) -> int:
    """``fleetgym bench nft``."""
    return _main("nft", argv)


def unf(argv: Sequence[str]) -> int:
    """``fleetgym bench unf``."""
    return _main("unf", argv)


def _main(bench: str, argv: Sequence[str]) -> int:
    import torch
    import tyro

    args = tyro.cli(
        Args, args=list(argv), prog=f"fleetgym bench {bench}", description=f"{ABOUT[bench]}. {Args.__doc__}"
    )
    names = args.tasks or BENCHES[bench]
    for text in args.override:
        if text.partition(".")[0] not in names:
            raise unknown(f"task in --override {text}", text.partition(".")[0], names)
    tasks = {name: settings(TASKS.get(name), args.preset, args.override) for name in names}
    for method in args.methods:
        if not any(method in task.methods() for task in tasks.values()):
            raise unknown("method", method, dict.fromkeys(m for task in tasks.values() for m in task.methods()))
    if not args.seeds:
        raise UserError("--seeds is empty; give at least one, such as --seeds 0")
    if args.workers < 0:
        raise UserError(f"--workers {args.workers}: 0 (one for each core) or more are wanted")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no such device here (`fleetgym doctor` lists what there is)")
    folder = args.out or Path("runs") / bench / args.preset
    config = {"benchmark": bench, "preset": args.preset}
    with Run.open(folder, config, resume=args.resume, name=bench, tensorboard=False):
        run(
            tasks,
            folder,
            args.seeds,
            methods=args.methods,
            workers=args.workers or min(4, os.cpu_count() or 1),
            device=args.device,
        )
        publish(bench, folder, args.preset)
    print((folder / "table.md").read_text(encoding="utf-8"))
    print(f"page: {folder / 'index.html'}")
    return 0


def _row_path(folder: Path, name: str) -> Path:
    return folder / "rows" / f"{name}.json"


def run(
    tasks: Mapping[str, Task],
    folder: Path,
    seeds: Sequence[int],
    *,
    methods: Sequence[str] = (),
    workers: int = 2,
    device: str = "cpu",
) -> None:
    """Trains and measures what has no row yet; a job that was killed goes on from its saved state.

    Args:
        tasks: By name.
        folder: Rows go to ``rows/`` in it.
        seeds: Of training.
        methods: Rows to fill; none for all of each task.
        workers: Processes; each has one job at a time.
        device: Where to train.

    Raises:
        UserError: A row is there with other settings.
        KeyboardInterrupt: Ctrl-C; call again to go on.
    """
    jobs = []
    for name, task in tasks.items():
        for seed in seeds:
            for method in task.methods():
                if methods and method not in methods:
                    continue
                job = Job(name, method, seed, device, folder / "jobs" / f"{name}-{method}-{seed}")
                path = _row_path(folder, job.name)
                if not path.exists():
                    jobs.append(job)
                elif different := _differences(read_json(path)["settings"], jsonable(task)):
                    raise UserError(f"{path} was measured with other settings: {different}; choose another --out")
    for name, seed in dict.fromkeys((job.task, job.seed) for job in jobs):
        tasks[name].prepare(seed, device)
    if not jobs:
        return
    with worker_processes(min(workers, len(jobs))) as processes:
        processes.drain([processes.submit(_work, tasks[job.task], job, folder) for job in jobs])


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in {**saved, **now} if saved.get(key) != now.get(key)]
    return "; ".join(f"{key} {saved.get(key)} there and {now.get(key)} now" for key in keys)


def _work(task: Task, job: Job, folder: Path) -> None:
    """A job in a worker: its row appears when it is complete."""
    found = task.run(job)
    about = {"task": job.task, "method": job.method, "seed": job.seed, "settings": jsonable(task)}
    write_json(_row_path(folder, job.name), {**about, **jsonable(found), "provenance": provenance()})
    shutil.rmtree(job.folder, ignore_errors=True)
    job.report(1, 1, f"{task.metric} {found['score']:.4g}")


def load(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder; tasks, methods and seeds in the order of the tables.

    Raises:
        UserError: There is none.
    """
    rows = [read_json(path) for path in sorted((folder / "rows").glob("*.json"))]
    if not rows:
        raise UserError(f"{folder} holds no rows/*.json; name the folder that a benchmark wrote")
    order = {name: i for i, name in enumerate(dict.fromkeys(t for tasks in BENCHES.values() for t in tasks))}

    def place(row: Mapping[str, Any]) -> tuple[Any, ...]:
        methods = TASKS.get(row["task"])().methods()
        method = methods.index(row["method"]) if row["method"] in methods else len(methods)
        return (order.get(row["task"], len(order)), row["task"], method, row["seed"])

    return sorted(rows, key=place)


def _groups(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[Mapping[str, Any]]]]:
    """Task -> method -> rows."""
    found: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["task"], {}).setdefault(row["method"], []).append(row)
    return found


_HEADS = ("method", "mean", "by seed", "validation", "parameters", "CPU-seconds")


def _cells(method: str, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    def mean(key: str, form: str) -> str:
        values = [row[key] for row in rows if row.get(key) is not None]
        return format(statistics.fmean(values), form) if values else ""

    scores = [row["score"] for row in rows]
    form = ".3f" if max((abs(score) for score in scores if score is not None), default=1) >= 0.1 else ".3g"
    each = ", ".join("diverged" if score is None else format(score, form) for score in scores)
    parts = ["" if None in scores else mean("score", form), each, mean("validation", form)]
    return [method, *parts, mean("parameters", ",.0f"), mean("cpu_seconds", ".0f")]


def _measured(kind: type[Task]) -> str:
    return f"{kind.metric} {getattr(kind, 'measured', 'on test data')}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown, a table for each task."""
    lines: list[str] = []
    for name, methods in _groups(rows).items():
        kind = TASKS.get(name)
        better = "higher" if kind.higher else "lower"
        lines += [f"### `{name}`: {kind.title}", "", f"{_measured(kind)}; {better} is better.", ""]
        lines += [f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
        lines += [
            f"| {' | '.join([f'`{cells[0]}`', *cells[1:]])} |" for cells in map(_cells, methods, methods.values())
        ]
        lines.append("")
    return "\n".join(lines)


def publish(bench: str, folder: Path, preset: str) -> None:
    """Writes ``table.md``, ``results.json``, a picture for each task and ``index.html`` from the rows of a folder."""
    from fleetgym.benchmarks import page, plots

    rows = load(folder)
    parts = [page.header(ABOUT[bench])]
    for name, methods in _groups(rows).items():
        kind = TASKS.get(name)
        mine = [row for values in methods.values() for row in values]
        lines = [_cells(method, values) for method, values in methods.items()]
        parts.append(page.table_section(f"{kind.title} ({kind.metric})", _HEADS, lines))
        scores = {method: [row["score"] for row in values] for method, values in methods.items()}
        words = f"{_measured(kind)}, a dot for each seed; {'higher' if kind.higher else 'lower'} is better."
        parts.append(page.plot_section(kind.title, words, plots.dots(scores, kind.metric, name)))
        if hasattr(kind, "plot"):
            path = kind.plot(mine, folder / f"{name}.png")
            if path is not None:
                parts.append(page.picture_section(kind.title, path))
    parts.append(page.command_section(_command(bench, preset, rows)))
    with atomic_write(folder / "index.html") as temporary:
        temporary.write_text(page.document(ABOUT[bench], parts), encoding="utf-8")
    with atomic_write(folder / "table.md") as temporary:
        temporary.write_text(table(rows), encoding="utf-8")
    write_json(folder / "results.json", {"benchmark": bench, "rows": rows})


def _command(bench: str, preset: str, rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = " ".join(map(str, sorted({row["seed"] for row in rows})))
    tasks = " ".join(dict.fromkeys(row["task"] for row in rows))
    return f"fleetgym bench {bench} --preset {preset} --tasks {tasks} --seeds {seeds}"
