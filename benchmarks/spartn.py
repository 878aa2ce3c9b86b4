"""``fleetgym bench spartn``: grasping by an eye in the hand from a few demonstrations, and what corrective views give.

Every method trains the same policy (:class:`fleetgym.agents.visual.VisualPolicy`) for the same number of steps from the
same demonstrations; they differ in what they learn from besides:

- ``bc``: nothing; ``bc_rgbd``: nothing, but the policy sees depth, too;
- ``homography``: the demonstrated pictures turned about the camera, with the action that corrects the turn;
- ``spartn``: views of a radiance field of each demonstration from erring poses (:mod:`fleetgym.agents.spartn`);
- ``oracle``: the same poses, drawn by the simulator: what SPARTN would be with perfect fields;
- ``dart``: as many more demonstrations, in which the expert recovers from knocks (online: it needs the expert again);
- ``dagger``: as many more episodes, played by the policy and labelled by the expert (online).

Measured on objects that were trained with and on held-out ones, clean, and disturbed by two knocks on the way. SPARTN's
views are compared with the simulator's from the same poses (:mod:`fleetgym.benchmarks.spartn_views`), and ``--ablate``
measures other values of the preset's fields (:mod:`fleetgym.benchmarks.spartn_ablations`).

Source: A. Zhou et al., "NeRF in the Palm of Your Hand", CVPR 2023. Objects, fields and sizes are ours, so its numbers
are not to be compared with those of this benchmark.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from fleetgym.agents.spartn import (
    AboutTheEye,
    EyeInHand,
    Noise,
    Report,
    approach,
    collides,
    field_renderer,
    homography_renderer,
    spartn,
)
from fleetgym.agents.visual import Steps, VisualConfig, VisualPolicy, train_visual
from fleetgym.benchmarks import spartn_ablations as ablations
from fleetgym.benchmarks.jobs import Workers, report
from fleetgym.benchmarks.jobs import workers as worker_processes
from fleetgym.benchmarks.overrides import changes
from fleetgym.benchmarks.spartn_film import film, load_policy, make
from fleetgym.benchmarks.spartn_views import Judged, mean, sheet
from fleetgym.core import optional, se3
from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, read_json, write_json
from fleetgym.core.records import provenance, wilson_interval
from fleetgym.core.render import write_video
from fleetgym.core.rollout import Episode, collect, rollout
from fleetgym.core.run import Run
from fleetgym.core.seeding import generator, seed_everything
from fleetgym.envs import suite
from fleetgym.envs.grasping.names import OBJECTS

METHODS = ("bc", "bc_rgbd", "homography", "dart", "dagger", "spartn", "oracle")
WITH_VIEWS = ("homography", "spartn", "oracle")
"""Methods that learn from corrective views."""
PROTOCOLS = {"clean": "none", "disturbed": "knocks"}
"""Name -> the environment's ``disturbance``."""
SPLITS = ("train", "held_out", "ycb")
"""Objects to measure on; ``ycb`` are the nine objects that GA-DDPG and SPARTN were measured on."""
FIELD_KINDS = ("voxel", "hash", "nerfstudio")
COARSE = 24
"""Pixels a side of the simulator's pictures that tell where surfaces are."""
EVALUATION_SEED = 1_000_000
_MORE_SEED = 500_000  # of what online methods collect besides


@dataclass(frozen=True)
class Preset:
    """What is trained and measured."""

    task: str = "Procedural"
    """Task of the grasping suite."""
    demonstrations: int = 12
    """Successful demonstrations."""
    image_size: int = 64
    """Pixels a side."""
    number: int = 6
    """Corrective pictures beside each step."""
    translation: float = 0.03
    """Largest error along each axis, metres."""
    rotation: float = 0.2
    """Largest error of each component of the rotation vector, radians."""
    field: str = "voxel"
    """Kind of field: voxel, hash or nerfstudio."""
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
    mixing: float = 0.0
    """How far each picture's colours are mixed at random in training; see ``VisualConfig``."""
    rounds: int = 2
    """Of DAgger."""
    episodes: int = 50
    """Evaluation episodes of each protocol and split."""
    measured: str = "all"
    """What is measured: all, or PROTOCOL:SPLIT once or more with spaces, such as disturbed:held_out."""

    def __post_init__(self) -> None:
        if self.field not in FIELD_KINDS:
            raise unknown("field", self.field, FIELD_KINDS)
        for text in self.measured.split() if self.measured != "all" else ():
            protocol, _, split = text.partition(":")
            for kind, name, names in (("protocol", protocol, PROTOCOLS), ("split", split, SPLITS)):
                if name not in names:
                    raise unknown(f"{kind} in measured={self.measured!r}", name, names)
        if not self.measured.split():
            raise UserError("measured='': nothing would be measured; use all, or such as disturbed:held_out")
        least = dict.fromkeys(
            ("demonstrations", "number", "iterations", "steps", "batch_size", "rounds", "episodes"), 1
        )
        least |= {"image_size": 16, "translation": 0, "rotation": 0, "mixing": 0, "left_out": 0, "width": 1}
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least {smallest}")


PRESETS = {
    "quick": Preset(
        demonstrations=12, image_size=48, steps=1000, episodes=30, measured="disturbed:train disturbed:held_out"
    ),
    "cpu": Preset(demonstrations=24),
    # Objects of the household's classes, which differ more than the procedural ones and need longer training.
    "household": Preset(task="Household", demonstrations=14, steps=4000, mixing=0.3),
    # Pictures as large as in GA-DDPG; not run yet, so the rest is a guess at what an accelerator does in an hour.
    "gpu": Preset(
        demonstrations=200,
        image_size=112,
        number=12,
        iterations=200,
        steps=20_000,
        batch_size=256,
        width=48,
        episodes=100,
    ),
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
    data: str = ""
    """The folder whose demonstrations it learns from; by default its own."""
    columns: tuple[tuple[str, str], ...] = ()
    """Protocols and splits that are measured; by default all."""

    @property
    def name(self) -> str:
        """Of the row's file."""
        return f"{self.method}-{self.seed}"

    @property
    def path(self) -> Path:
        """The row's file."""
        return Path(self.folder) / "rows" / f"{self.name}.json"


def columns(preset: Preset) -> tuple[tuple[str, str], ...]:
    """Protocols and splits that a preset measures, without those that :func:`measured_on` cannot have.

    Raises:
        UserError: Nothing is left.
    """
    if preset.measured == "all":
        wanted = [(protocol, split) for protocol in PROTOCOLS for split in SPLITS]
    else:
        wanted = [(text.partition(":")[0], text.partition(":")[2]) for text in preset.measured.split()]
    found = tuple(column for column in wanted if measured_on(preset.task, column[1]) is not None)
    if not found:
        raise UserError(
            f"measured={preset.measured!r}: {preset.task} has no such objects here (of ycb: "
            f"{optional.install_line('grasping')}); use all"
        )
    return found


def measured_on(task: str, split: str) -> tuple[str, str] | None:
    """The task and the share of its objects that a split stands for.

    None where a task has no such share (named objects are all for training, as in GA-DDPG), or where the YCB
    objects need the extra that is not installed.
    """
    if split in OBJECTS[task]:
        return task, split
    return ("YCB", "held_out") if split == "ycb" and optional.installed("grasping") else None


def world(preset: Preset, split: str = "train", protocol: str = "clean", **options: Any) -> gym.Env:
    """The environment of a preset."""
    task, objects = measured_on(preset.task, split) or (preset.task, split)
    options = {"observation": ("rgb", "depth"), "disturbance": PROTOCOLS[protocol], **options}
    return suite("grasping").make(task, objects=objects, image_size=preset.image_size, **options)


def eye(preset: Preset) -> EyeInHand:
    """The environment's camera."""
    from fleetgym.envs.grasping.grasps import SOLID
    from fleetgym.envs.grasping.poses import HAND_EYE, ROTATION, TRANSLATION

    env = world(preset)
    try:
        env.reset(seed=0)
        gripper = np.array(env.unwrapped.gripper_mask, bool)
    finally:
        env.close()
    return EyeInHand(np.array(HAND_EYE), gripper, TRANSLATION, ROTATION, SOLID)


def _demonstrations(preset: Preset, folder: Path, seed: int, name: str = "demonstrations") -> Path:
    return folder / "training" / f"seed{seed}" / name


def collect_demonstrations(
    preset: Preset, folder: str, seed: int, *, protocol: str = "clean", processes: Workers | None = None
) -> Demonstrations:
    """The demonstrations of a seed, collected if they are not there; ``disturbed`` ones are those of DART.

    Those of a preset that asks for more begin with those of one that asks for fewer.
    """
    name, first = ("demonstrations", 0) if protocol == "clean" else ("demonstrations-knocked", _MORE_SEED)
    path = _demonstrations(preset, Path(folder), seed, name)
    if path.exists():
        try:
            found = Demonstrations.load(path)
            if not found.info["interrupted"] and len(found) >= preset.demonstrations:
                return found[: preset.demonstrations]
        except UserError:
            pass  # half a dataset of an interrupted run: collect it again
    expert = suite("grasping").expert(preset.task)
    say = processes.progress if processes is not None else report
    for number in (preset.demonstrations * 5 // 4 + 2, 2 * preset.demonstrations, 4 * preset.demonstrations):
        begin, done = 10_000 * seed + first, itertools.count(1)
        found = collect(
            expert,
            functools.partial(world, preset, "train", protocol),
            range(begin, begin + number),
            dataset=path,
            overwrite=True,
            task=preset.task,
            infos=("grasping",),
            executor=processes,
            on_episode=lambda index, episode, n=number, done=done: say(f"{name}, seed {seed}", next(done), n),
        )
        if len(found) >= preset.demonstrations:
            return found[: preset.demonstrations]
    raise UserError(f"the expert solved {len(found)} of {number} episodes of {preset.task}; so many are not enough")


@functools.lru_cache(maxsize=2)
def _kept_world(preset: Preset) -> gym.Env:
    """The world of a preset, made once in a process."""
    return world(preset)


@dataclass(frozen=True)
class Oracle:
    """The simulator as a renderer: it draws an episode's scene without the gripper.

    Attributes:
        preset: Tells the world.
        eye: The camera, to tell at which poses the hand would hit something; None tells nothing.
    """

    preset: Preset
    eye: EyeInHand | None = None

    def views(self, seed: int, poses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the camera sees from poses [M, 4, 4] in the episode of a seed.

        Returns:
            Pictures [M, S, S, 3] uint8, and where the object is [M, S, S] bool.
        """
        env = _kept_world(self.preset)
        env.reset(seed=seed)
        drawn = [env.unwrapped.sim.scene(pose, self.preset.image_size) for pose in poses]
        return np.stack([rgb for rgb, _, _ in drawn]), np.stack([labels == 1 for _, _, labels in drawn])

    def __call__(self, episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        """See :data:`fleetgym.agents.spartn.Renderer`."""
        from fleetgym.envs.fields.captures import Intrinsics, rays, surfaces
        from fleetgym.envs.grasping.poses import FOV

        pictures, _ = self.views(episode.seed, poses)
        if self.eye is None:
            return pictures, {}
        own = np.asarray(episode.observations["pose"][: approach(episode)], np.float64) @ self.eye.hand_eye
        lens = Intrinsics.from_fov(FOV, COARSE, COARSE)
        scene = _kept_world(self.preset).unwrapped.sim.scene
        # The simulator's depth is along the view; a distance is along the ray.
        depths = np.stack([scene(pose, COARSE)[1] for pose in own])
        points = surfaces(depths / -rays(np.eye(4)[None], lens, np.float64)[..., 5], own, lens)
        hands = poses @ se3.inverse(self.eye.hand_eye)
        return pictures, {"collides": collides(hands, self.eye.solid, points)}


def _capture(lens: Any, images: np.ndarray, poses: np.ndarray, masks: np.ndarray) -> Any:
    from fleetgym.envs.fields.captures import Capture

    return Capture(images, poses, lens, masks)


def corrective(
    job: Job, own: Demonstrations, processes: Workers | None = None
) -> tuple[Demonstrations, Report, EyeInHand]:
    """The corrective demonstrations of a method that has some: ``homography``, ``spartn`` or ``oracle``.

    What is finished lies in the job's folder and is not made again.

    Args:
        job: What for.
        own: The demonstrations.
        processes: Workers to share the demonstrations out to.

    Returns:
        The corrective demonstrations, what became of each demonstration, and the camera.
    """
    from fleetgym.envs.fields import fit
    from fleetgym.envs.fields.captures import Intrinsics
    from fleetgym.envs.grasping.poses import FOV

    preset, camera = job.preset, eye(job.preset)
    lens = Intrinsics.from_fov(FOV, preset.image_size, preset.image_size)
    noise = Noise(preset.translation, preset.rotation)
    if job.method == "homography":
        noise = AboutTheEye(0.0, preset.rotation, hand_eye=camera.hand_eye)
        render = homography_renderer(camera, lens.fx)
    elif job.method == "oracle":
        render = Oracle(preset, camera)
    else:
        fitting = functools.partial(fit, preset.field, iterations=preset.iterations, device=job.device)
        capture = functools.partial(_capture, lens)
        fields = field_renderer(fitting, capture, camera, left_out=preset.left_out)
        render = Judged(fields, Oracle(preset).views, camera.gripper)
    say = processes.progress if processes is not None else report
    words = f"{job.method}, seed {job.seed}: views"
    executor: Executor | None = processes  # it has what of an executor is used
    found, rows = spartn(
        own, camera, render, number=preset.number, noise=noise, seed=job.seed, executor=executor,
        folder=Path(job.folder) / "training" / f"seed{job.seed}" / f"{job.method}-views",
        report=lambda done, total, text: say(words, done, total, text),
    )  # fmt: skip
    return found, rows, camera


def dagger(job: Job, own: Demonstrations, policy: VisualPolicy, seeds: Sequence[int]) -> Steps:
    """Episodes that the policy begins and the expert ends; each step is labelled with what the expert would do there.

    The expert takes over after six to eleven steps, as in GA-DDPG's training. Left to itself the policy lags behind,
    and an expert that wants to arrive in time then asks for the largest steps there are, which the policy learns.

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
            handed_over = int(generator("dagger", job.seed, seed).integers(6, 12))
            while True:
                batch = {key: np.asarray(value)[None] for key, value in observation.items()}
                label, _ = expert.predict(batch, None, np.array([start]))
                seen.append(observation)
                actions.append(np.clip(label[0], -1, 1))
                action = policy.predict(observation)[0] if len(actions) <= handed_over else actions[-1]
                observation, _, terminated, truncated, info = env.step(np.clip(action, -1, 1).astype(np.float32))
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
    if job.path.exists():
        return
    seed_everything(job.seed)
    began = time.process_time()
    own = collect_demonstrations(preset, job.data or job.folder, job.seed)
    depth = job.method == "bc_rgbd"
    steps, more, found = Steps.of(own, depth), None, None
    if job.method in WITH_VIEWS:
        aside = time.process_time()
        corrections, found, camera = corrective(job, own)
        more = Steps.of(corrections)
        write_json(folder / "reports" / f"{job.name}.json", found.rows)
        if job.method == "spartn":
            _write_sheet(folder / "views" / f"{job.name}.png", own, corrections, camera, Oracle(preset))
        # Views may be made by other processes, or by an earlier run: the report says what they cost.
        began += time.process_time() - aside - sum(row["cpu_seconds"] for row in found.rows)
    elif job.method == "dart":
        steps = Steps.concatenate(
            [steps, Steps.of(collect_demonstrations(preset, job.data or job.folder, job.seed, protocol="disturbed"))]
        )
    config = VisualConfig(steps=preset.steps, batch_size=preset.batch_size, mixing=preset.mixing)
    made = time.process_time() - began

    def trained(steps: Steps, config: VisualConfig, part: str) -> VisualPolicy:
        torch.manual_seed(job.seed)
        policy = VisualPolicy(preset.image_size, depth=depth, width=preset.width)
        settings = {"job": job.name, "part": part, "preset": dataclasses.asdict(preset)}
        with Run.open(folder / "training" / f"seed{job.seed}" / part, settings, resume=True, tensorboard=False) as run:
            said = functools.partial(_say, f"{job.method}, seed {job.seed}", config.steps)
            aside = time.process_time()
            history = train_visual(policy, steps, more, config, seed=job.seed, device=job.device, run=run, report=said)
            run.save_checkpoint("last", policy.cpu())
        # An interrupted training has cost what it cost before, too.
        nonlocal began
        began += time.process_time() - aside - history[-1]["cpu_seconds"]
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
    for protocol, split in job.columns or columns(preset):
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
        **{name: None if found is None else mean(found.rows, name) for name in VIEW_NOTES},
        "provenance": provenance(),
    }
    write_json(job.path, row)


VIEW_NOTES = ("views_psnr", "views_psnr_object", "fit_seconds", "render_ms")
"""Means over the demonstrations that a row has of views: dB outside of the gripper and on the object, processor seconds
of a fit, and milliseconds of a picture."""


def _write_sheet(
    path: Path, own: Demonstrations, corrections: Demonstrations, camera: EyeInHand, oracle: Oracle
) -> None:
    from PIL import Image

    picture = Image.fromarray(sheet(own, corrections, camera, oracle.views))
    with atomic_write(path) as temporary:
        # A palette is a third of the size, and what is to be compared here is not a shade.
        picture.quantize(256, dither=Image.Dither.NONE).save(temporary)


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
        for protocol, split in _columns(mine):
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


def _columns(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """What rows measured, that which matters most first: disturbed, held out."""
    found = {(result["protocol"], result["split"]) for row in rows for result in row["results"]}
    return sorted(found, key=_rank)


def _rank(column: tuple[str, str]) -> tuple[int, int]:
    """The order of columns; the first one is plotted, and is the one that ablations measure."""
    return ("disturbed", "clean").index(column[0]), ("held_out", "ycb", "train").index(column[1])


def heads(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Heads of the table."""
    rates = [f"{protocol}, {split.replace('_', ' ')}" for protocol, split in _columns(rows)]
    return ["method", *rates, "views (object), dB", "pictures", "CPU-s", "ms a frame"]


def lines(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Cells of the table, a line for each method."""
    entries = {(entry["method"], entry["protocol"], entry["split"]): entry for entry in board(rows)}
    out = []
    for method in dict.fromkeys(row["method"] for row in rows):
        mine = [row for row in rows if row["method"] == method]
        cells = [method]
        for column in _columns(rows):
            entry = entries[(method, *column)]
            cells.append(f"{entry['success']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]")
        views, object_ = mean(mine, "views_psnr"), mean(mine, "views_psnr_object")
        cells.append("" if views is None else f"{views:.1f}" + ("" if object_ is None else f" ({object_:.1f})"))
        cells.append(f"{np.mean([row['pictures'] for row in mine]):,.0f}")
        cells.append(f"{np.mean([row['cpu_seconds']['all'] for row in mine]):.0f}")
        out.append([*cells, f"{np.mean([row['frame_ms'] for row in mine]):.1f}"])
    return out


def publish(folder: Path, name: str, seeds: Sequence[int], points: Sequence[ablations.Point] = ()) -> None:
    """Writes ``leaderboard.json``, ``leaderboard.md`` and ``index.html`` from the rows of a folder.

    Args:
        folder: The benchmark's.
        name: Of the preset.
        seeds: Training seeds.
        points: Of the ablations; their table goes to ``ablations/ablations.json``, too.
    """
    from fleetgym.benchmarks import page, plots

    rows = load(folder)
    title = "Grasping by an eye in the hand: corrective views"
    preset = rows[0]["preset"]
    words = (
        f"{preset['demonstrations']} demonstrations of {preset['task']}, {preset['image_size']} pixels, {len(seeds)} "
        "training seeds; success [Wilson's 95% interval]. Disturbed: two knocks of up to 4 cm and 0.2 rad on the way."
    )
    methods = " ".join(dict.fromkeys(row["method"] for row in rows))
    command = f"fleetgym bench spartn --preset {name} --seeds {' '.join(map(str, seeds))} --methods {methods}"
    if all(split == "train" for _, split in _columns(rows)):
        words += " Objects that are not trained with were not measured."
    entries = board(rows)
    write_json(folder / "leaderboard.json", entries)
    text = [f"# {title}", "", words, "", *_markdown(heads(rows), lines(rows)), ""]
    column = _columns(rows)[0]
    rate = f"{column[0].capitalize()}, {column[1].replace('_', '-')} objects"
    scores = {
        row["method"]: list(row["success_by_seed"].values())
        for row in entries
        if (row["protocol"], row["split"]) == column
    }
    parts = [page.header(title), page.table_section(words, heads(rows), lines(rows))]
    parts.append(page.plot_section(rate, "A dot for each seed.", plots.dots(scores, "success", "spartn")))
    parts.append(page.film_section("Pushed on its way", _FILMED, folder))
    for path in sorted((folder / "views").glob("*.png"))[:1]:
        parts.append(page.picture_section("Corrective views", path))
    if points:
        found = ablations.table(folder, points, seeds, column)
        write_json(folder / "ablations" / "ablations.json", found)
        said = f"{rate}: the preset with another value of one field."
        text += ["## Ablations", "", said, "", *_markdown(ablations.HEADS, ablations.lines(found)), ""]
        parts.append(page.table_section(said, ablations.HEADS, ablations.lines(found)))
        for field in dict.fromkeys(entry["field"] for entry in found):
            mine = [entry for entry in found if entry["field"] == field]
            if not all(isinstance(entry["value"], (int, float)) for entry in mine):
                continue
            groups = [
                {"label": method, "slot": METHODS.index(method), "points": [e for e in mine if e["method"] == method]}
                for method in dict.fromkeys(entry["method"] for entry in mine)
            ]
            parts.append(page.plot_section(field, said, plots.against(groups, field, field, rate)))
        axes = dict.fromkeys(entry["field"] for entry in found)
        values = {field: dict.fromkeys(f"{e['value']}" for e in found if e["field"] == field) for field in axes}
        command += " --ablate " + " ".join(f"{field}={','.join(values[field])}" for field in axes)
    parts.append(page.command_section(command))
    with atomic_write(folder / "leaderboard.md") as temporary:
        temporary.write_text("\n".join([*text, f"```\n{command}\n```", ""]), encoding="utf-8")
    with atomic_write(folder / "index.html") as temporary:
        temporary.write_text(page.document(title, parts), encoding="utf-8")


def _markdown(heads: Sequence[str], cells: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *cells)]


@dataclass
class Args:
    """Corrective views for grasping: collects, fits fields, trains, evaluates and writes a leaderboard."""

    preset: str = "quick"
    """quick (12 demonstrations), cpu (24), household (14, other objects), or gpu (200; give --device cuda)."""
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
    ablate: tuple[str, ...] = ()
    """Fields that take other values besides, one at a time: demonstrations=6,12,24 iterations=10,30,100."""
    film: str = ""
    """Film this policy instead of training: expert, or a run's or checkpoint's folder; writes film.gif into --out."""
    film_seed: int = EVALUATION_SEED
    """Episode of the film."""


def preset_from(name: str, overrides: Sequence[str] = ()) -> Preset:
    """A preset with changes.

    Raises:
        UserError: Unknown preset, field or value.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return dataclasses.replace(PRESETS[name], **changes(overrides, dataclasses.asdict(PRESETS[name])))


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench spartn``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench spartn")
    preset = preset_from(args.preset, args.override)
    suite("grasping").task(preset.task)
    if "train" not in OBJECTS[preset.task]:
        raise UserError(f"task={preset.task}: all its objects are held out; train with Procedural or Named")
    columns(preset)  # says at once if there is nothing to measure
    methods = args.methods or (QUICK_METHODS if args.preset == "quick" else METHODS)
    for method in methods:
        if method not in METHODS:
            raise unknown("method", method, METHODS)
    if not args.seeds:
        raise UserError("--seeds is empty; give at least one, such as --seeds 0")
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no such device here (`fleetgym doctor` lists what there is)")
    folder = args.out or Path("runs") / "spartn" / args.preset
    if args.film:
        return _write_film(args, preset, folder)
    config = {"benchmark": "spartn", "name": args.preset, "preset": dataclasses.asdict(preset)}
    points = ablations.points(
        preset, lambda text: preset_from(args.preset, [*args.override, text]), args.ablate, methods,
        [text.partition("=")[0] for text in args.override],
    )  # fmt: skip
    with Run.open(folder, config, resume=args.resume, name="spartn", tensorboard=False):
        jobs = [Job(method, seed, preset, str(folder), args.device) for seed in args.seeds for method in methods]
        column = tuple(sorted(columns(preset), key=_rank)[:1])
        for point in points:
            if point.place != ".":
                # Worlds of another kind need demonstrations of their own.
                shared = (point.preset.task, point.preset.image_size) == (preset.task, preset.image_size)
                place = str(folder / point.place)
                data = str(folder) if shared else place
                jobs += [Job(point.method, s, point.preset, place, args.device, data, column) for s in args.seeds]
        jobs = [job for job in jobs if not job.path.exists()]
        if jobs:
            with worker_processes(args.workers or min(4, os.cpu_count() or 1)) as processes:
                run_jobs(jobs, processes)
        publish(folder, args.preset, args.seeds, points)
    print((folder / "leaderboard.md").read_text(encoding="utf-8"))
    print(f"page: {folder / 'index.html'}")
    return 0


_FILMED = (
    "The hand is pushed twice (red rim). Left the scene, above on the right what the palm sees, below the field of the "
    "scene from the same poses."
)


def _write_film(args: Args, preset: Preset, folder: Path) -> int:
    """``--film``: films a policy with the objects that are held out, or with all where none are."""
    policy, options = load_policy(args.film, preset.task)
    objects = "held_out" if "held_out" in OBJECTS[preset.task] else "all"
    options = {"image_size": max(preset.image_size, 64), **options}
    frames, lifted = film(policy, make(preset.task, objects, **options), args.film_seed)
    path = write_video(folder / "film.gif", frames, 5)
    print(f"{path}: {len(frames)} frames, the object was {'lifted' if lifted else 'not lifted'}")
    if rows := sorted((folder / "rows").glob("*.json")):
        publish(folder, args.preset, sorted({read_json(row)["seed"] for row in rows}))
        print(f"page: {folder / 'index.html'}")
    return 0


def run_jobs(jobs: Sequence[Job], processes: Workers) -> None:
    """Trains and measures; demonstrations and corrective views come first, shared out to all workers.

    So all of them have work where there are few jobs, too.
    """
    most: dict[tuple[str, int, str], Preset] = {}
    for job in jobs:
        for protocol in ("clean", "disturbed") if job.method == "dart" else ("clean",):
            key = (job.data or job.folder, job.seed, protocol)
            if key not in most or most[key].demonstrations < job.preset.demonstrations:
                most[key] = job.preset
    for (data, seed, protocol), preset in most.items():
        collect_demonstrations(preset, data, seed, protocol=protocol, processes=processes)
    for job in jobs:
        if job.method in WITH_VIEWS:
            corrective(job, collect_demonstrations(job.preset, job.data or job.folder, job.seed), processes)
    processes.drain([processes.submit(run_job, job) for job in jobs])
