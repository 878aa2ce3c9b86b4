"""The worker processes of the fleet-merging benchmark, and how far they are."""

from __future__ import annotations

import queue
import time
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from fleetgym.benchmarks.fleet_jobs import Job, collect_task, recorded, run_job
from fleetgym.benchmarks.fleet_presets import JOBS, METHODS, Preset
from fleetgym.core.workers import CONTEXT, worker_pool

_reports: Any = None  # in a worker: where it says how far it is


def _begin_worker(reports: Any) -> None:
    global _reports
    _reports = reports
    torch.set_num_threads(1)


def _report(*what: Any) -> None:
    if _reports is not None:
        _reports.put(what)


def _job_in_worker(job: Job) -> list[str]:
    return run_job(job, _report)


class _Progress:
    """A bar for each job on a terminal; elsewhere a line now and then."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.ids: dict[str, Any] = {}
        self.printed: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int, words: str) -> None:
        if name not in self.ids:
            self.ids[name] = self.bars.add_task(name, total=total, words=words)
        self.bars.update(self.ids[name], completed=done, words=words)
        now = time.monotonic()
        if self.bars.disable and (done >= total or now - self.printed.get(name, now - 60) > 30):
            self.printed[name] = now
            self.console.print(f"{name}: {done}/{total} {words}", highlight=False)


def run(
    preset: Preset,
    folder: Path,
    seeds: Sequence[int],
    *,
    workers: int = 2,
    device: str = "cpu",
    save_every: float = 20.0,
    methods: Sequence[str] = tuple(METHODS),
) -> None:
    """Collects, trains, evaluates; whatever was finished by an earlier call is kept.

    Args:
        preset: What to measure.
        folder: Where everything goes: ``records/``, and the training's own files under ``training/``.
        seeds: Training seeds: initial weights, demonstrations and draws differ from seed to seed.
        workers: Processes; each trains one method of one seed at a time.
        device: Where to train.
        save_every: Seconds of work that a kill may cost.
        methods: Rows to fill.

    Raises:
        UserError: An expert that does not give enough demonstrations, a folder of another preset, diverged training.
        KeyboardInterrupt: Ctrl-C; call again to go on.
    """
    kinds = [kind for kind, rows in JOBS.items() if set(rows) & set(methods)]
    jobs = [Job(kind, seed, preset, str(folder), device, save_every) for seed in seeds for kind in kinds]
    jobs = [job for job in jobs if not recorded(job)]
    if not jobs:
        return
    tasks = preset.task_names
    seeds = [seed for seed in seeds if any(job.seed == seed for job in jobs)]
    reports, progress = CONTEXT.Queue(), _Progress()
    # Jobs save their state now and then: on Ctrl-C, waiting for them to end would only keep the user waiting.
    with worker_pool(workers, initializer=_begin_worker, arguments=(reports,), wait=False) as pool, progress.bars:
        waiting = [pool.submit(collect_task, preset, str(folder), seed, task) for seed in seeds for task in tasks]
        for done, future in enumerate(waiting, start=1):
            progress("demonstrations", done, len(waiting), future.result())
        _drain([pool.submit(_job_in_worker, job) for job in jobs], reports, progress)


def _drain(futures: Sequence[Future], reports: Any, progress: _Progress) -> None:
    """Shows reports until every future has ended; an error of one ends the waiting at once."""
    pending = set(futures)
    while pending:
        try:
            progress(*reports.get(timeout=0.5))
        except queue.Empty:
            pass
        for future in [future for future in pending if future.done()]:
            pending.remove(future)
            future.result()
    while not reports.empty():
        progress(*reports.get())
