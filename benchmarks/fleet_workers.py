"""The jobs of the fleet-merging benchmark in worker processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fleetgym.benchmarks.fleet_jobs import Job, collect_task, recorded, run_job
from fleetgym.benchmarks.fleet_presets import JOBS, METHODS, Preset
from fleetgym.benchmarks.jobs import report
from fleetgym.benchmarks.jobs import workers as worker_processes


def _job_in_worker(job: Job) -> list[str]:
    return run_job(job, report)


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
    datasets = preset.world.datasets(preset)
    seeds = [seed for seed in seeds if any(job.seed == seed for job in jobs)]
    with worker_processes(workers) as processes:
        waiting = [
            processes.submit(collect_task, preset, str(folder), seed, data.name) for seed in seeds for data in datasets
        ]
        for done, future in enumerate(waiting, start=1):
            processes.progress("demonstrations", done, len(waiting), future.result())
        processes.drain([processes.submit(_job_in_worker, job) for job in jobs])
