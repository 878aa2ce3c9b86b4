"""``fleetgym bench spartn``: grasping by an eye in the hand from a few demonstrations, and what corrective views give.

Every method trains the same policy (:class:`fleetgym.agents.visual.VisualPolicy`) for the same number of steps from the
same demonstrations; they differ in what they learn from besides:

- ``bc``: nothing; ``bc_rgbd``: nothing, but the policy sees depth, too;
- ``homography``: the demonstrated pictures turned about the camera, with the action that corrects the turn;
- ``spartn``: views of a radiance field of each demonstration from erring poses (:mod:`fleetgym.agents.spartn`);
- ``oracle``: the same poses, drawn by the simulator: what SPARTN would be with perfect fields;
- ``dart``: as many more demonstrations, in which the expert recovers from knocks (online: it needs the expert again);
- ``dagger``: as many more episodes, played by the policy and labelled by the expert (online).

Measured on objects that were trained with and on held-out ones, clean, and disturbed by two knocks on the way.

Source: A. Zhou et al., "NeRF in the Palm of Your Hand", CVPR 2023. Objects, fields and sizes are ours, so its numbers
are not to be compared with those of this benchmark.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from fleetgym.agents.spartn import AboutTheEye, EyeInHand, Noise, Report, field_renderer, homography_renderer, spartn
from fleetgym.agents.visual import Steps, VisualConfig, VisualPolicy, train_visual
from fleetgym.benchmarks.jobs import report
from fleetgym.benchmarks.jobs import workers as worker_processes
from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, read_json, write_json
from fleetgym.core.records import provenance, wilson_interval
from fleetgym.core.rollout import Episode, collect, rollout
from fleetgym.core.run import Run
from fleetgym.core.seeding import seed_everything
from fleetgym.envs import suite

METHODS = ("bc", "bc_rgbd", "homography", "dart", "dagger", "spartn", "oracle")
PROTOCOLS = {"clean": "none", "disturbed": "knocks"}
"""Name -> the environment's ``disturbance``."""
SPLITS = ("train", "held_out")
EVALUATION_SEED = 1_000_000
_MORE_SEED = 500_000  # of what online methods collect besides


@dataclass(frozen=True)
class Preset:
    """What is trained and measured."""

    task: str = "Procedural"
    """Task of the grasping suite."""
    demonstrations: int = 48
    """Successful demonstrations."""
    image_size: int = 64
    """Pixels a side."""
    number: int = 6
    """Corrective pictures beside each step."""
    translation: float = 0.03
    """Largest error along each axis, metres."""
    rotation: float = 0.2
    """Largest error of each component of the rotation vector, radians."""
    iterations: int = 100
    """Of fitting a field."""
    left_out: int = 0
    """Views left out of a second fit, to measure the field on; it doubles the cost."""
    steps: int = 2000
    """Gradient steps of every policy."""
    batch_size: int = 64
    """Pictures a step."""
    width: int = 32
    """Channels of the policy's first convolution."""
    rounds: int = 2
    """Of DAgger."""
    episodes: int = 60
    """Evaluation episodes of each protocol and split."""

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("demonstrations", "number", "iterations", "steps", "batch_size", "rounds", "episodes"), 1
        )
        least |= {"image_size": 16, "translation": 0, "rotation": 0, "left_out": 0, "width": 1}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least {smallest}")


PRESETS = {
    "quick": Preset(task="Named", demonstrations=12, image_size=48, steps=800, episodes=24),
    "cpu": Preset(),
}
QUICK_METHODS = ("bc", "spartn")


@dataclass(frozen=True)
class Job:
    """One method of one seed."""

    method: str
    seed: int
    preset: Preset
    folder: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        """Of the row's file."""
        return f"{self.method}-{self.seed}"


def world(preset: Preset, objects: str = "train", protocol: str = "clean", **options: Any) -> gym.Env:
    """The environment of a preset."""
    keys = ("rgb", "depth")
    options = {"observation": keys, "disturbance": PROTOCOLS[protocol], **options}
    return suite("grasping").make(preset.task, objects=objects, image_size=preset.image_size, **options)


def eye(preset: Preset) -> EyeInHand:
    """The environment's camera."""
    from fleetgym.envs.grasping.poses import HAND_EYE, ROTATION, TRANSLATION

    env = world(preset)
    try:
        env.reset(seed=0)
        gripper = np.array(env.unwrapped.gripper_mask, bool)
    finally:
        env.close()
    return EyeInHand(np.array(HAND_EYE), gripper, TRANSLATION, ROTATION)


def _demonstrations(preset: Preset, folder: Path, seed: int, name: str = "demonstrations") -> Path:
    return folder / "training" / f"seed{seed}" / name


def collect_demonstrations(preset: Preset, folder: str, seed: int, *, protocol: str = "clean") -> Demonstrations:
    """The demonstrations of a seed, collected if they are not there; ``disturbed`` ones are those of DART."""
    name, first = ("demonstrations", 0) if protocol == "clean" else ("dart", _MORE_SEED)
    path = _demonstrations(preset, Path(folder), seed, name)
    if path.exists():
        try:
            found = Demonstrations.load(path)
            if not found.info["interrupted"] and len(found) >= preset.demonstrations:
                return found[: preset.demonstrations]
        except UserError:
            pass  # half a dataset of an interrupted run: collect it again
    expert = suite("grasping").expert(preset.task)
    for number in (preset.demonstrations * 5 // 4 + 2, 2 * preset.demonstrations, 4 * preset.demonstrations):
        begin = 10_000 * seed + first
        found = collect(
            expert,
            functools.partial(world, preset, "train", protocol),
            range(begin, begin + number),
            dataset=path,
            overwrite=True,
            task=preset.task,
            infos=("grasping",),
            on_episode=lambda index, episode, n=number: report(f"{name}, seed {seed}", index + 1, n),
        )
        if len(found) >= preset.demonstrations:
            return found[: preset.demonstrations]
    raise UserError(f"the expert solved {len(found)} of {number} episodes of {preset.task}; so many are not enough")


def oracle_renderer(preset: Preset) -> Callable[[Episode, np.ndarray], tuple[np.ndarray, Mapping[str, Any]]]:
    """Draws an episode's scene by the simulator, without the gripper."""
    env = world(preset)

    def render(episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        env.reset(seed=episode.seed)
        return np.stack([env.unwrapped.render_at(pose) for pose in poses]), {}

    return render


def corrective(job: Job, own: Demonstrations) -> tuple[Demonstrations, Report]:
    """The corrective demonstrations of a method that has some: ``homography``, ``spartn`` or ``oracle``."""
    from fleetgym.envs.fields import fit
    from fleetgym.envs.fields.captures import Capture, Intrinsics
    from fleetgym.envs.grasping.poses import FOV

    preset, camera = job.preset, eye(job.preset)
    lens = Intrinsics.from_fov(FOV, preset.image_size, preset.image_size)
    noise = Noise(preset.translation, preset.rotation)
    if job.method == "homography":
        noise = AboutTheEye(0.0, preset.rotation, hand_eye=camera.hand_eye)
        render = homography_renderer(camera, lens.fx)
    elif job.method == "oracle":
        render = oracle_renderer(preset)
    else:

        def capture(images: np.ndarray, poses: np.ndarray, masks: np.ndarray) -> Capture:
            return Capture(images, poses, lens, masks)

        fitting = functools.partial(fit, "voxel", iterations=preset.iterations, device=job.device)
        render = field_renderer(fitting, capture, camera, left_out=preset.left_out)
    words = f"{job.method}, seed {job.seed}: views"
    return spartn(
        own, camera, render, number=preset.number, noise=noise, seed=job.seed,
        report=lambda done, total, text: report(words, done, total, text),
    )  # fmt: skip


def dagger(job: Job, own: Demonstrations, policy: VisualPolicy, seeds: Sequence[int]) -> Steps:
    """Episodes played by the policy, each step labelled with what the expert would do there.

    Source: S. Ross, G. Gordon, D. Bagnell, "A Reduction of Imitation Learning and Structured Prediction to No-Regret
    Online Learning", AISTATS 2011.
    """
    labelled: list[Episode] = []
    env = world(job.preset)
    expert = suite("grasping").expert(job.preset.task)
    try:
        expert.attach(env)
        for seed in seeds:
            observation, _ = env.reset(seed=seed)
            start, seen, actions = True, [], []
            while True:
                batch = {key: np.asarray(value)[None] for key, value in observation.items()}
                label, _ = expert.predict(batch, None, np.array([start]))
                seen.append(observation)
                actions.append(np.clip(label[0], -1, 1))
                action, _ = policy.predict(observation)
                observation, _, terminated, truncated, info = env.step(np.clip(action, -1, 1))
                start = False
                if terminated or truncated:
                    break
            length = len(actions)
            parts = {key: np.stack([one[key] for one in [*seen, observation]]) for key in observation}
            ends = np.zeros(length, bool)
            labelled.append(
                Episode(
                    seed, parts, np.stack(actions).astype(np.float32), np.zeros(length), ends, ends, info["success"]
                )
            )
    finally:
        env.close()
    spaces = {"observation_space": own.observation_space, "action_space": own.action_space}
    return Steps.of(Demonstrations(labelled, **spaces))


def run_job(job: Job) -> None:
    """Trains and measures one method of one seed; its row appears when it is complete."""
    preset, folder = job.preset, Path(job.folder)
    path = folder / "rows" / f"{job.name}.json"
    if path.exists():
        return
    seed_everything(job.seed)
    began = time.process_time()
    own = collect_demonstrations(preset, job.folder, job.seed)
    depth = job.method == "bc_rgbd"
    steps, more, found = Steps.of(own, depth), None, None
    if job.method in ("homography", "spartn", "oracle"):
        corrections, found = corrective(job, own)
        more = Steps.of(corrections)
        write_json(folder / "reports" / f"{job.name}.json", found.rows)
    elif job.method == "dart":
        steps = Steps.concatenate(
            [steps, Steps.of(collect_demonstrations(preset, job.folder, job.seed, protocol="disturbed"))]
        )
    config = VisualConfig(steps=preset.steps, batch_size=preset.batch_size)
    made = time.process_time() - began

    def trained(steps: Steps, config: VisualConfig, part: str) -> VisualPolicy:
        torch.manual_seed(job.seed)
        policy = VisualPolicy(preset.image_size, depth=depth, width=preset.width)
        settings = {"job": job.name, "part": part, "preset": dataclasses.asdict(preset)}
        with Run.open(folder / "training" / f"seed{job.seed}" / part, settings, resume=True, tensorboard=False) as run:
            said = functools.partial(_say, f"{job.method}, seed {job.seed}", config.steps)
            train_visual(policy, steps, more, config, seed=job.seed, device=job.device, run=run, report=said)
            run.save_checkpoint("last", policy.cpu())
        return policy

    if job.method == "dagger":
        each = -(-preset.demonstrations // preset.rounds)
        for number in range(preset.rounds):
            first = 10_000 * job.seed + _MORE_SEED + number * each
            policy = trained(steps, config, f"dagger{number}")
            steps = Steps.concatenate([steps, dagger(job, own, policy, range(first, first + each))])
    policy = trained(steps, config, job.method)
    spent = time.process_time() - began
    results = []
    for protocol in PROTOCOLS:
        for split in SPLITS:
            episodes = rollout(
                policy,
                functools.partial(world, preset, split, protocol, horizon=40),
                range(EVALUATION_SEED, EVALUATION_SEED + preset.episodes),
                record=False,
                on_episode=functools.partial(_counted, f"{job.name}: {protocol}, {split}", preset.episodes),
            )
            results.append({"protocol": protocol, "split": split, "successes": [e.success for e in episodes]})
    frame = {"rgb": np.zeros((preset.image_size, preset.image_size, 3), np.uint8), "remaining": np.ones(1, np.float32)}
    if depth:
        frame["depth"] = np.zeros((preset.image_size, preset.image_size), np.float32)
    clock = time.process_time()
    for _ in range(50):
        policy.predict(frame)
    row = {
        "method": job.method,
        "seed": job.seed,
        "preset": dataclasses.asdict(preset),
        "results": results,
        "pictures": len(steps) + (len(more) if more is not None else 0),
        "cpu_seconds": {"data": round(made, 1), "all": round(spent, 1)},
        "frame_ms": round(20 * (time.process_time() - clock), 2),
        "views": None if found is None else str(found),
        "provenance": provenance(),
    }
    write_json(path, row)


def _counted(name: str, total: int, index: int, episode: Episode) -> None:
    report(name, index + 1, total)


def _say(name: str, total: int, done: int, words: str) -> None:
    report(name, done, total, words)


def load(folder: Path) -> list[dict[str, Any]]:
    """All rows of a folder.

    Raises:
        UserError: There is none.
    """
    rows = [read_json(path) for path in sorted((folder / "rows").glob("*.json"))]
    if not rows:
        raise UserError(f"{folder} holds no rows/*.json; name the folder that the benchmark wrote")
    return sorted(rows, key=lambda row: (METHODS.index(row["method"]), row["seed"]))


def board(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each method, protocol and split: success with Wilson's interval, and by training seed."""
    found = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        for protocol in PROTOCOLS:
            for split in SPLITS:
                parts = [
                    (row["seed"], result["successes"])
                    for row in mine
                    for result in row["results"]
                    if (result["protocol"], result["split"]) == (protocol, split)
                ]
                done, all_ = sum(sum(s) for _, s in parts), sum(len(s) for _, s in parts)
                low, high = wilson_interval(done, all_)
                entry = {"method": method, "protocol": protocol, "split": split, "success": done / all_}
                by_seed = {str(seed): sum(s) / len(s) for seed, s in parts}
                found.append({**entry, "low": low, "high": high, "episodes": all_, "success_by_seed": by_seed})
    return found


_COLUMNS = tuple((protocol, split) for protocol in ("disturbed", "clean") for split in ("held_out", "train"))
_RATES = tuple(f"{protocol}, {split.replace('_', ' ')}" for protocol, split in _COLUMNS)
_HEADS = ("method", *_RATES, "pictures", "CPU-s", "ms a frame")


def lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table, a line for each method."""
    entries = {(entry["method"], entry["protocol"], entry["split"]): entry for entry in board(rows)}
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [method]
        for column in _COLUMNS:
            entry = entries[(method, *column)]
            cells.append(f"{entry['success']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]")
        cells.append(f"{np.mean([row['pictures'] for row in mine]):,.0f}")
        cells.append(f"{np.mean([row['cpu_seconds']['all'] for row in mine]):.0f}")
        out.append([*cells, f"{np.mean([row['frame_ms'] for row in mine]):.1f}"])
    return out


def publish(folder: Path, name: str, seeds: Sequence[int]) -> None:
    """Writes ``leaderboard.json``, ``leaderboard.md`` and ``index.html`` from the rows of a folder."""
    from fleetgym.benchmarks import page, plots

    rows = load(folder)
    title = "Grasping by an eye in the hand: corrective views"
    preset = rows[0]["preset"]
    words = (
        f"{preset['demonstrations']} demonstrations of {preset['task']}, {preset['image_size']} pixels, {len(seeds)} "
        "training seeds; success [Wilson's 95% interval]. Disturbed: two knocks of up to 4 cm and 0.2 rad on the way."
    )
    table = [f"| {' | '.join(_HEADS)} |", "|---" * len(_HEADS) + "|"]
    table += [f"| {' | '.join(cells)} |" for cells in lines(rows)]
    methods = " ".join(dict.fromkeys(row["method"] for row in rows))
    command = f"fleetgym bench spartn --preset {name} --seeds {' '.join(map(str, seeds))} --methods {methods}"
    entries = board(rows)
    write_json(folder / "leaderboard.json", entries)
    with atomic_write(folder / "leaderboard.md") as temporary:
        temporary.write_text("\n".join([f"# {title}", "", words, "", *table, "", f"```\n{command}\n```", ""]))
    scores = {
        row["method"]: list(row["success_by_seed"].values())
        for row in entries
        if (row["protocol"], row["split"]) == ("disturbed", "held_out")
    }
    parts = [page.header(title), page.table_section(words, _HEADS, lines(rows))]
    parts.append(
        page.plot_section(
            "Disturbed, held-out objects", "A dot for each seed.", plots.dots(scores, "success", "spartn")
        )
    )
    parts.append(page.command_section(command))
    with atomic_write(folder / "index.html") as temporary:
        temporary.write_text(page.document(title, parts), encoding="utf-8")


@dataclass
class Args:
    """Corrective views for grasping: collects, fits fields, trains, evaluates and writes a leaderboard."""

    preset: str = "quick"
    """quick (12 demonstrations) or cpu."""
    methods: tuple[str, ...] = ()
    """Rows to fill; by default bc and spartn for quick, all for the others."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    out: Path | None = None
    """Folder of the results; by default runs/spartn/PRESET."""
    resume: bool = False
    """Go on in a folder that exists."""
    workers: int = 0
    """Processes; 0 means one for each core, four at most."""
    device: str = "cpu"
    """Where to fit and train: cpu or cuda."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as demonstrations=24."""


def preset_from(name: str, overrides: Sequence[str] = ()) -> Preset:
    """A preset with changes.

    Raises:
        UserError: Unknown preset, field or value.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    kinds = {field.name: type(getattr(PRESETS[name], field.name)) for field in dataclasses.fields(Preset)}
    changes = {}
    for text in overrides:
        key, _, value = text.partition("=")
        if key not in kinds:
            raise unknown("preset field", key, kinds)
        try:
            changes[key] = kinds[key](value)
        except ValueError as error:
            raise UserError(f"--override {text}: {key} takes a {kinds[key].__name__}") from error
    return dataclasses.replace(PRESETS[name], **changes)


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench spartn``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench spartn")
    preset = preset_from(args.preset, args.override)
    suite("grasping").task(preset.task)
    methods = args.methods or (QUICK_METHODS if args.preset == "quick" else METHODS)
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if not args.seeds:
        raise UserError("--seeds is empty; give at least one, such as --seeds 0")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no such device here (`fleetgym doctor` lists what there is)")
    folder = args.out or Path("runs") / "spartn" / args.preset
    config = {"benchmark": "spartn", "name": args.preset, "preset": dataclasses.asdict(preset)}
    with Run.open(folder, config, resume=args.resume, name="spartn", tensorboard=False):
        jobs = [Job(method, seed, preset, str(folder), args.device) for seed in args.seeds for method in methods]
        jobs = [job for job in jobs if not (folder / "rows" / f"{job.name}.json").exists()]
        if jobs:
            with worker_processes(min(args.workers or min(4, os.cpu_count() or 1), len(jobs))) as processes:
                seeds = dict.fromkeys(job.seed for job in jobs)
                first = [processes.submit(_collected, preset, str(folder), seed) for seed in seeds]
                processes.drain(first)
                processes.drain([processes.submit(run_job, job) for job in jobs])
        publish(folder, args.preset, args.seeds)
    print((folder / "leaderboard.md").read_text())
    print(f"page: {folder / 'index.html'}")
    return 0


def _collected(preset: Preset, folder: str, seed: int) -> None:
    collect_demonstrations(preset, folder, seed)
