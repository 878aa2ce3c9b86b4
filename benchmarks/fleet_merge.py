"""The fleet-merging benchmark: robots that never share their data, merged into one policy that does all their tasks.

Robot k has its own task (or several, or all), its own demonstrations and its own random initialisation. Every method
takes the same number of gradient steps on the same demonstrations, and is evaluated on goals that no demonstration
shows:

- ``alone_own``, ``alone_all``: each robot trains alone; evaluated on its own tasks, and on everybody's;
- ``fleet_merge_once``: the robots of ``alone`` merged once, at the end of training;
- ``average_rounds``: every few steps the server averages the robots' weights and sends the mean back (FedAvg,
  McMahan et al. 2017), from different initialisations;
- ``fleet_merge_rounds``: the same, with the robots' hidden units aligned before the average (Wang et al. 2024);
- ``joint``: one policy trained on everybody's data, which a fleet may not do.

Source: Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024. The paper's tables are not reproduced here
number by number: its hyper-parameters are not public. The protocol is ours and is stated in full by ``Preset``.

This module is the command. ``fleet_presets`` says what is measured, ``fleet_jobs`` does one training,
``fleet_workers`` all of them, ``fleet_pages`` makes film and pages, ``fleet_sweep`` goes through many settings.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fleetgym.benchmarks.fleet_jobs import Fleet, Job, collect_task, demonstrations_path, record_path, run_job, train
from fleetgym.benchmarks.fleet_pages import film, merged_policy, publish
from fleetgym.benchmarks.fleet_presets import (
    ALL_METHODS,
    EXTRA_METHODS,
    MERGES,
    METHODS,
    PRESETS,
    Preset,
    partition,
    preset_from,
)
from fleetgym.benchmarks.fleet_sweep import combinations, sweep
from fleetgym.benchmarks.fleet_workers import run
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.run import Run

__all__ = [
    "ALL_METHODS",
    "EXTRA_METHODS",
    "MERGES",
    "METHODS",
    "PRESETS",
    "Args",
    "Fleet",
    "Job",
    "Preset",
    "collect_task",
    "combinations",
    "demonstrations_path",
    "film",
    "main",
    "merged_policy",
    "partition",
    "preset_from",
    "publish",
    "record_path",
    "run",
    "run_job",
    "sweep",
    "train",
]


@dataclass
class Args:
    """Robots that never share data, merged into one policy: trains, evaluates and writes a leaderboard."""

    preset: str = "quick"
    """quick (5 tasks), quick_image (3 tasks, pictures), mt10 or mt50."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    out: Path | None = None
    """Folder of the results; by default runs/fleet_merge/PRESET, with -sweep behind it for a sweep."""
    resume: bool = False
    """Go on in a folder that exists."""
    workers: int = 0
    """Processes; 0 means one for each core, four at most."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    save_every: float = 20.0
    """Seconds between saved states: what a kill may cost."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows to fill. Besides the usual ones there are average_norms_rounds and align_rounds (fleet_merge taken apart),
    fedavg_rounds and fedprox_rounds."""
    film: bool = True
    """Film the merged policy (needs a GL library; `fleetgym doctor` says); a sweep makes no film."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as rounds=10 hidden=128; steps=N sets the rounds by the gradient steps."""
    sweep: tuple[str, ...] = ()
    """Fields with several values, such as local_steps=1,5,20 rounds=50,100: every combination is trained."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench fleet_merge``."""
    import tyro

    return execute(tyro.cli(Args, args=list(argv), prog="fleetgym bench fleet_merge"))


def execute(args: Args, command: str = "fleet_merge", prefix: str = "") -> int:
    """Runs the benchmark.

    Args:
        args: What was asked for.
        command: Name of the command; also of the folder below ``runs``.
        prefix: What the names of the command's presets begin with among :data:`PRESETS`.

    Returns:
        0.

    Raises:
        UserError: Bad arguments; see also :func:`run`.
    """
    short, name = args.preset, prefix + args.preset
    if name not in PRESETS:
        raise unknown("preset", short, [known.removeprefix(prefix) for known in PRESETS if known.startswith(prefix)])
    if args.sweep:
        combinations(name, args.override, args.sweep, args.methods)  # what is wrong is said before any work
    else:
        preset = preset_from(name, args.override)
        preset.check()
    if not args.seeds:
        raise UserError("--seeds is empty; give at least one, such as --seeds 0")
    if not args.methods:
        raise UserError("--methods is empty; give at least one, such as --methods fleet_merge_rounds")
    for method in args.methods:
        if method not in ALL_METHODS:
            raise unknown("method", method, ALL_METHODS)
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no such device here (`fleetgym doctor` lists what there is)")
    options = {
        "workers": args.workers or min(4, os.cpu_count() or 1),
        "device": args.device,
        "save_every": args.save_every,
        "methods": args.methods,
    }
    if args.sweep:
        folder = args.out or Path("runs") / command / f"{short}-sweep"
        sweep(name, args.override, args.sweep, folder, args.seeds, resume=args.resume, **options)
        print((folder / "sweep.md").read_text())
        print(f"page: {folder / 'sweep.html'}")
        return 0
    folder = args.out or Path("runs") / command / short
    config = {"benchmark": command, "name": short, "preset": dataclasses.asdict(preset)}
    with Run.open(folder, config, resume=args.resume, name=command, tensorboard=False):
        run(preset, folder, args.seeds, **options)
        publish(folder, preset, name, args.seeds, args.film)
    print((folder / "leaderboard.md").read_text())
    print(f"page: {folder / 'leaderboard.html'}")
    return 0
