"""The fleet-merging benchmark: robots that never share their data, merged into one policy that does all their tasks.

Robot k has its own task, its own demonstrations and its own random initialisation. Every method takes the same number
of gradient steps on the same demonstrations, and is evaluated on goals that no demonstration shows:

- ``alone_own``, ``alone_all``: each robot trains alone; evaluated on its own task, and on everybody's;
- ``fleet_merge_once``: the robots of ``alone`` merged once, at the end of training;
- ``average_rounds``: every few steps the server averages the robots' weights and sends the mean back (FedAvg,
  McMahan et al. 2017), from different initialisations;
- ``fleet_merge_rounds``: the same, with the robots' hidden units aligned before the average (Wang et al. 2024);
- ``joint``: one policy trained on everybody's data, which a fleet may not do.

Source: Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024. The paper's tables are not reproduced here
number by number: its hyper-parameters are not public. The protocol is ours and is stated in full by ``Preset``.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from fleetgym.agents.imitation import FleetLearner, ImitationConfig
from fleetgym.agents.networks import META_WORLD_DIFFERENCES, RecurrentPolicy, features, masked_mse
from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.demonstrations import Demonstrations, SequenceBatch, Statistics
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import write_json
from fleetgym.core.records import EvalRecord
from fleetgym.core.rollout import collect, evaluate, rollout
from fleetgym.core.run import Run
from fleetgym.core.seeding import seed_everything
from fleetgym.core.weights import WeightSpec
from fleetgym.core.workers import CONTEXT, worker_pool
from fleetgym.envs import suite
from fleetgym.merging import MERGERS, interpolate, merge

# Seeds of demonstrations, of the final evaluation and of the learning curve never meet; besides, the environment draws
# the goals of the last two from the held-out half of its goal space.
_EVALUATION_SEED, _CURVE_SEED = 1_000_000, 2_000_000


OPTIMIZERS = ("robot", "server")
INITIALS = ("different", "same")


@dataclass(frozen=True)
class Preset:
    """What is trained and measured. The defaults are those of ``quick``."""

    tasks: str = "quick"
    """Task set of the Meta-World suite, or task names with commas between; each task has its own robots."""
    robots_per_task: int = 4
    """Robots that share a task (but neither demonstrations nor initial weights)."""
    demonstrations: int = 20
    """Successful demonstrations of each robot."""
    noise: float = 0.1
    """Standard deviation of the noise on the expert's executed actions in every second demonstration."""
    cell: str = "gru"
    """Core of the policy: gru, lstm, rnn or mlp."""
    hidden: int = 64
    """Width of every hidden layer."""
    layers: int = 1
    """Layers of the core."""
    batch_size: int = 2
    """Episodes a robot draws for a gradient step; joint training draws as many of every robot's."""
    learning_rate: float = 2e-3
    """Adam's step size at the beginning; it falls to 1% along half a cosine."""
    warmup: int = 20
    """Gradient steps of each robot alone before the first merge."""
    local_steps: int = 20
    """Gradient steps between merges."""
    rounds: int = 100
    """Merges after the first."""
    initial: str = "different"
    """The robots' first weights: ``different``, each its own, or ``same``."""
    optimizer: str = "robot"
    """Who steps after the first merge: ``robot``, each its own Adam between merges, or ``server``, one Adam along the
    mean of the robots' gradients, which are then what a round sends (FedSGD; Reddi et al., ICLR 2021)."""
    matcher: str = "frank_wolfe"
    """How fleet_merge aligns: frank_wolfe, lap or sinkhorn."""
    episodes: int = 20
    """Evaluation episodes of each task."""
    max_steps: int = 500
    """Steps of an evaluation episode; Meta-World counts success within 500."""
    curve_points: int = 6
    """How often the merged policy is evaluated during training."""
    curve_episodes: int = 5
    """Episodes of each task at a point of the curve."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown("optimizer", self.optimizer, OPTIMIZERS)
        if self.initial not in INITIALS:
            raise unknown("initial", self.initial, INITIALS)
        if self.optimizer == "server" and self.local_steps != 1:
            raise UserError(
                f"optimizer=server local_steps={self.local_steps}: the server steps once a round; use local_steps=1"
            )

    @property
    def task_names(self) -> tuple[str, ...]:
        """The tasks, in the order of their one-hot.

        Raises:
            UserError: Unknown task or task set; the message holds the three nearest names.
        """
        names = self.tasks.split(",")
        return suite("meta_world").task_set(names if len(names) > 1 else names[0])

    @property
    def steps(self) -> int:
        """Gradient steps of every method."""
        return self.warmup + self.rounds * self.local_steps


PRESETS = {
    "quick": Preset(),
    "mt10": Preset(tasks="mt10", robots_per_task=2, rounds=150),
    "mt50": Preset(
        tasks="mt50",
        robots_per_task=1,
        demonstrations=40,
        hidden=128,
        local_steps=1,
        rounds=2980,
        optimizer="server",
        episodes=10,
        curve_episodes=2,
    ),
}

METHODS = {
    "alone_own": "Each robot alone, own task",
    "alone_all": "Each robot alone, all tasks",
    "average_rounds": "Naive averaging in rounds",
    "fleet_merge_once": "fleet_merge, one shot",
    "fleet_merge_rounds": "fleet_merge in rounds",
    "joint": "Joint training on everybody's data",
}
ABLATIONS = {
    "average_norms_rounds": "Averaging with norms restored, no alignment",
    "align_rounds": "Alignment, norms not restored",
    "fedavg_rounds": "Naive averaging, an optimiser a robot",
}
"""fleet_merge taken apart, and averaging as it usually is; filled when asked for by name."""
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "average_rounds": ("average", {}),
    "fleet_merge_rounds": ("fleet_merge", {}),
    "average_norms_rounds": ("average", {"norms": "auto"}),
    "align_rounds": ("fleet_merge", {"norms": False}),
    "fedavg_rounds": ("average", {}),
}
"""The merger and its options of each method that merges in rounds."""
# One training serves three rows.
_JOBS = {
    "alone": ("alone_own", "alone_all", "fleet_merge_once"),
    "average_rounds": ("average_rounds",),
    "fleet_merge_rounds": ("fleet_merge_rounds",),
    "joint": ("joint",),
    **{method: (method,) for method in ABLATIONS},
}


@dataclass(frozen=True)
class Job:
    """One training of one seed, with everything that a worker process needs."""

    kind: str
    seed: int
    preset: Preset
    folder: str
    device: str = "cpu"
    save_every: float = 20.0
    """Seconds of work that a kill may cost."""


class _Lasting(gym.Wrapper):
    """An environment that stays open when an evaluation closes it; it goes with its process."""

    def close(self) -> None:
        """Does nothing."""


class Fleet:
    """The robots of one seed: tasks, demonstrations, initial policies."""

    def __init__(self, preset: Preset, folder: Path, seed: int) -> None:
        self.preset, self.seed = preset, seed
        self.suite = suite("meta_world")
        self.tasks = list(preset.task_names)
        self.robots = [task for task in self.tasks for _ in range(preset.robots_per_task)]
        """The task of each robot."""
        self._worlds: dict[str, gym.Env] = {}
        self.data: list[SequenceBatch] = []
        for k, task in enumerate(self.tasks):
            episodes = Demonstrations.load(demonstrations_path(folder, seed, task))
            for robot in range(preset.robots_per_task):
                own = episodes[robot * preset.demonstrations : (robot + 1) * preset.demonstrations]
                # Demonstrations show the plain 39 numbers; the policy also sees which task it is on.
                self.data.append(self._with_task(own.padded(), k))
        self.differences = META_WORLD_DIFFERENCES
        self.statistics = Statistics.pool(
            [
                Statistics.of(features(batch.observations[batch.mask].double(), self.differences).numpy(), floor=1e-3)
                for batch in self.data
            ]
        )

    def _with_task(self, batch: SequenceBatch, k: int) -> SequenceBatch:
        one_hot = torch.zeros(*batch.mask.shape, len(self.tasks))
        one_hot[..., k] = batch.mask.float()
        return dataclasses.replace(batch, observations=torch.cat([batch.observations, one_hot], -1))

    def _world(self, task: str) -> gym.Env:
        """The evaluation environment of a task, made once: making one costs more than an episode in it."""
        if task not in self._worlds:
            made = self.suite.make(task, goals="held_out", task_set=self.tasks)
            self._worlds[task] = _Lasting(made)
        return self._worlds[task]

    @property
    def data_bytes(self) -> int:
        """Bytes of one robot's demonstrations as float32: the 39 observed numbers and the action of each step."""
        steps = sum(int(batch.mask.sum()) for batch in self.data) / len(self.data)
        size = self.data[0].observations.shape[-1] - len(self.tasks) + self.data[0].actions.shape[-1]
        return round(4 * steps * size)

    def policy(self, robot: int) -> RecurrentPolicy:
        """Robot ``robot``'s policy before training: random weights (its own or common ones), the fleet's statistics."""
        torch.manual_seed(self.seed * 100_003 + (robot if self.preset.initial == "different" else 0))
        policy = RecurrentPolicy(
            self.data[0].observations.shape[-1],
            self.data[0].actions.shape[-1],
            cell=self.preset.cell,
            hidden=self.preset.hidden,
            layers=self.preset.layers,
            differences=self.differences,
        )
        policy.normaliser.mean.copy_(torch.as_tensor(self.statistics.mean))
        policy.normaliser.std.copy_(torch.as_tensor(self.statistics.std))
        return policy

    def evaluate(self, policy: RecurrentPolicy, tasks: Sequence[str], episodes: int, first_seed: int) -> EvalRecord:
        """Success on held-out goals: ``episodes`` of each task, latched, within ``max_steps``."""
        records = [
            evaluate(
                policy,
                functools.partial(self._world, task),
                range(first_seed, first_seed + episodes),
                task=task,
                max_steps=self.preset.max_steps,
                stop_on_success=True,
            )
            for task in tasks
        ]
        return EvalRecord.concatenate(records, task=f"meta_world/{self.preset.tasks}")


def demonstrations_path(folder: Path, seed: int, task: str) -> Path:
    """Where the demonstrations of a task lie."""
    return folder / "training" / f"seed{seed}" / "demonstrations" / task


def collect_task(preset: Preset, folder: str, seed: int, task: str) -> str:
    """Collects the demonstrations of one task: successful episodes on goals of the training half."""
    path = demonstrations_path(Path(folder), seed, task)
    worlds = suite("meta_world")
    if path.exists():
        try:
            if not Demonstrations.load(path).info["interrupted"]:
                return task
        except UserError:
            pass  # half a dataset of an interrupted run: collect it again
    wanted = preset.robots_per_task * preset.demonstrations
    # A quarter more than needed makes up for the expert's failures on most tasks.
    for number in (wanted + -(-wanted // 4), 2 * wanted, 4 * wanted):
        found = collect(
            worlds.expert(task),
            worlds.make_fn(task, goals="train"),
            range(seed * 10_000, seed * 10_000 + number),
            dataset=path,
            overwrite=True,
            task=task,
            instruction=worlds.task(task).instruction,
            action_noise=preset.noise,
            stop_on_success=True,
        )
        if len(found) >= wanted:
            return task
    raise UserError(f"{task}: the expert solved {len(found)} of {number} episodes, {wanted} are wanted; lower noise")


def run_job(job: Job, report: Callable[[str, int, int, str], None]) -> list[str]:
    """Trains one method of one seed and writes its records. Goes on where an earlier process was stopped.

    Args:
        job: What to train.
        report: Called with (job name, steps done, steps in all, a few words).

    Returns:
        The methods recorded.
    """
    seed_everything(job.seed)
    preset, folder = job.preset, Path(job.folder)
    name = f"{job.kind}, seed {job.seed}"
    methods = _JOBS[job.kind]
    if all(record_path(folder, method, job.seed).exists() for method in methods):
        report(name, preset.steps, preset.steps, "recorded before")
        return list(methods)
    fleet = Fleet(preset, folder, job.seed)
    config = {"job": job.kind, "seed": job.seed, "preset": dataclasses.asdict(preset)}
    with Run.open(folder / "training" / f"seed{job.seed}" / job.kind, config, resume=True) as run:
        trained = train(job, fleet, run, lambda done, words: report(name, done, preset.steps, words))
        report(name, preset.steps, preset.steps, "evaluating")
        if job.kind == "alone":
            _record_alone(job, fleet, run, trained)
        else:
            policy = trained.policies[0]
            record = fleet.evaluate(policy, fleet.tasks, preset.episodes, _EVALUATION_SEED)
            _record(job, job.kind, record, trained)
            info = {"metrics": {"success": record.success}, "task_set": fleet.tasks}
            run.save_checkpoint("last", policy, info=info)
    report(name, preset.steps, preset.steps, "done")
    return list(methods)


@dataclass
class Trained:
    """What a training leaves: the robots' policies (one where they share it), its cost and its curve."""

    policies: list[RecurrentPolicy]
    bytes_sent: int
    cpu_seconds: float
    curve: list[dict[str, float]]
    history: list[dict[str, float]]


def train(job: Job, fleet: Fleet, run: Run, report: Callable[[int, str], None]) -> Trained:
    """The training loop of every method; they differ in what happens between two spells of local steps."""
    preset = job.preset
    robots = len(fleet.robots)
    policies = [fleet.policy(k) for k in range(robots)]
    spec = WeightSpec.from_module(policies[0])
    config = ImitationConfig(
        steps=preset.steps,
        batch_size=preset.batch_size,
        learning_rate=preset.learning_rate,
        final_learning_rate=preset.learning_rate / 100,
    )
    if job.kind == "joint":
        # As many episodes a step as the whole fleet draws, but into one policy.
        config = dataclasses.replace(config, batch_size=preset.batch_size * robots)
        everything = SequenceBatch.concatenate(fleet.data)
        learner = FleetLearner(policies[:1], [everything], config, seed=job.seed, device=job.device)
    else:
        learner = FleetLearner(policies, fleet.data, config, seed=job.seed, device=job.device)
    # After the first merge the robots hold equal weights; with the optimiser at the server they stay equal.
    shared = preset.optimizer == "server" and job.kind in MERGES and job.kind != "fedavg_rounds"
    merging = job.kind in MERGES
    sizes = [value.numel() * value.element_size() for key, value in policies[0].named_parameters()]
    # Once, before training: count, mean and variance of each feature, in double precision.
    sent = 8 * (2 * len(fleet.statistics.mean) + 1)
    cpu, curve, history, first = 0.0, [], [], 0
    saved = run.load_state()
    if saved is not None:
        first, tensors, meta = saved
        if shared:
            learner.share(policies[0])
        learner.load_state(tensors, meta["learner"])
        cpu, curve, history, sent = meta["cpu_seconds"], meta["curve"], meta["history"], meta["bytes_sent"]
        first += 1
    points = {int(r) for r in np.linspace(0, preset.rounds, preset.curve_points + 1).round()}
    last_save = time.monotonic()
    for number in range(first, preset.rounds + 1):
        began = time.process_time()
        loss = learner.train(preset.warmup if number == 0 else preset.local_steps)
        if merging and (number == 0 or not shared):
            merger, options = MERGES[job.kind]
            if merger == "fleet_merge":
                options = {"matcher": preset.matcher, **options}
            weights, _, notes = MERGERS.get(merger)(spec, learner.stack.state_dicts(), **options)
            if notes:
                facts = {"distance_before": notes[0].get("distance"), "distance_after": notes[-1].get("distance")}
                history.append({"round": number, **facts, "norm_factor": notes[-1].get("norm_factor", 1.0)})
            learner.receive([weights])
            if number == 0:
                learner.forget_moments()
                if shared:
                    learner.share(learner.stack.policies()[0])
        if merging:
            sent += sum(sizes)  # weights, or as many numbers of a gradient
        cpu += time.process_time() - began
        run.log(learner.step_count, loss=float(loss.mean()), round=number)
        if number in points and job.kind != "alone":
            record = fleet.evaluate(learner.stack.policies()[0], fleet.tasks, preset.curve_episodes, _CURVE_SEED)
            curve.append(
                {
                    "round": number,
                    "gradient_steps": learner.step_count,
                    "bytes_sent": sent if merging else fleet.data_bytes,
                    "success": record.success,
                    "episodes": len(record.seeds),
                }
            )
            run.log(learner.step_count, success=record.success)
        words = f"loss {float(loss.mean()):.4f}" + (f", success {curve[-1]['success']:.2f}" if curve else "")
        report(learner.step_count, words)
        if number == preset.rounds or number in points or time.monotonic() - last_save > job.save_every:
            tensors, meta = learner.state()
            meta = {"learner": meta, "cpu_seconds": cpu, "curve": curve, "history": history, "bytes_sent": sent}
            run.save_state(number, tensors, meta)
            last_save = time.monotonic()
    if job.kind == "joint":
        sent = fleet.data_bytes
    return Trained(learner.stack.policies(), sent, cpu, curve, history)


def record_path(folder: Path, method: str, seed: int) -> Path:
    """Where the record of a method and seed lies."""
    return folder / "records" / f"{method}-seed{seed}.json"


_NOTES = {
    "joint": "sends its demonstrations, which is what a fleet wants to avoid",
    "alone_own": "sends only the mean and deviation of its observations, so that all normalise alike",
}


def _record(job: Job, method: str, evaluated: EvalRecord, trained: Trained, **metrics: Any) -> None:
    """Writes the record of one row and seed."""
    if method in _NOTES:
        metrics["note"] = _NOTES[method]
    record = dataclasses.replace(
        evaluated,
        system=method,
        metrics={
            "label": {**METHODS, **ABLATIONS}[method],
            "seed": job.seed,
            "bytes_sent": trained.bytes_sent,
            "cpu_seconds": round(trained.cpu_seconds, 1),
            "gradient_steps": job.preset.steps,
            "curve": trained.curve,
            "merges": trained.history,
            "preset": dataclasses.asdict(job.preset),
            **metrics,
        },
    )
    record.save(record_path(Path(job.folder), method, job.seed))


def _record_alone(job: Job, fleet: Fleet, run: Run, trained: Trained) -> None:
    """The three rows that come of robots trained alone, and the path between two of them."""
    preset = job.preset
    own = [
        fleet.evaluate(policy, [task], -(-preset.episodes // preset.robots_per_task), _EVALUATION_SEED)
        for policy, task in zip(trained.policies, fleet.robots)
    ]
    _record(job, "alone_own", EvalRecord.concatenate(own, task=own[0].task), trained)
    # Every robot on every task; together as many episodes of each task as in the other rows.
    share = -(-preset.episodes // len(fleet.robots))
    every = [fleet.evaluate(policy, fleet.tasks, share, _EVALUATION_SEED) for policy in trained.policies]
    _record(job, "alone_all", EvalRecord.concatenate(every, task=every[0].task), trained)

    began = time.process_time()
    merged = merge("fleet_merge", trained.policies, matcher=preset.matcher)
    cost = time.process_time() - began
    policy = merged.module()
    once = dataclasses.replace(
        trained,
        bytes_sent=trained.bytes_sent + sum(p.numel() * p.element_size() for p in policy.parameters()),
        cpu_seconds=trained.cpu_seconds + cost,
    )
    _record(
        job,
        "fleet_merge_once",
        fleet.evaluate(policy, fleet.tasks, preset.episodes, _EVALUATION_SEED),
        once,
        distance_before=merged.distance_before,
        distance_after=merged.distance_after,
    )
    for robot, (task, specialist) in enumerate(zip(fleet.robots, trained.policies)):
        run.save_checkpoint(f"robot{robot}-{task}", specialist, info={"task_set": fleet.tasks})
    write_json(run.path / "interpolation.json", interpolation(job, fleet, trained.policies))


@torch.no_grad()
def interpolation(job: Job, fleet: Fleet, policies: Sequence[RecurrentPolicy]) -> dict[str, Any]:
    """Loss and success on the straight line between robots of the first two tasks, before and after alignment."""
    indices = [0, job.preset.robots_per_task]
    pair = [policies[i] for i in indices]
    aligned = merge("fleet_merge", pair, matcher=job.preset.matcher).aligned
    ends = [policy.state_dict() for policy in pair]
    both = SequenceBatch.concatenate([fleet.data[i] for i in indices])
    lambdas = np.linspace(0, 1, 11)
    series = []
    for name, (a, b) in (("before alignment", ends), ("after alignment", aligned)):
        loss, success = [], []
        for number, lam in enumerate(lambdas):
            policy = fleet.policy(0)
            policy.load_state_dict(interpolate(a, b, float(lam)))
            loss.append(float(masked_mse(policy(both.observations)[0], both.actions, both.mask)))
            # Closed-loop success is dear (failures take all 500 steps): at the ends and in the middle.
            wanted = number in (0, len(lambdas) // 2, len(lambdas) - 1)
            success.append(fleet.evaluate(policy, fleet.tasks[:2], 5, _CURVE_SEED).success if wanted else None)
        series.append({"name": name, "loss": loss, "success": success})
    return {"lambda": lambdas.tolist(), "series": series, "robots": fleet.tasks[:2]}


# -- processes ---------------------------------------------------------------------------------------------------------

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
    reports = CONTEXT.Queue()
    kinds = [kind for kind, rows in _JOBS.items() if set(rows) & set(methods)]
    jobs = [Job(kind, seed, preset, str(folder), device, save_every) for seed in seeds for kind in kinds]
    tasks = preset.task_names
    progress = _Progress()
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


# -- pictures ----------------------------------------------------------------------------------------------------------


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
    worlds = suite("meta_world")
    names = preset.task_names[:tasks]
    films = []
    for name in names:
        make = worlds.make_fn(
            name, goals="held_out", task_set=preset.task_names, render_mode="rgb_array", width=192, height=192
        )
        episode = rollout(
            policy, make, [_EVALUATION_SEED], max_steps=max_steps, stop_on_success=True, render=2, record=False
        )[0]
        films.append(episode.frames)
    # The last frame stays for a moment before the film begins again.
    frames = list(grid_video([[*frames, *frames[-1:] * 10] for frames in films]))
    write_video(folder / "film.mp4", frames, fps=20)
    write_video(folder / "film.gif", frames, fps=20)  # for pages that show no video, such as a README
    return "film.mp4"


def publish(folder: Path, preset: Preset, name: str, seeds: Sequence[int], make_film: bool = True) -> None:
    """Writes ``extras.json``, the film, the merged policy and the leaderboard pages from what lies in the folder."""
    from fleetgym.benchmarks import leaderboard

    tasks = len(preset.task_names)
    robots = tasks * preset.robots_per_task
    interpolated = folder / "training" / f"seed{seeds[0]}" / "alone" / "interpolation.json"
    extra = [method for method in ABLATIONS if record_path(folder, method, seeds[0]).exists()]
    rows = f" --methods {' '.join([*METHODS, *extra])}" if extra else ""
    usual = dataclasses.asdict(PRESETS[name])
    changed = [f"{key}={value}" for key, value in dataclasses.asdict(preset).items() if value != usual[key]]
    if changed:
        rows += f" --override {' '.join(changed)}"
    whose = "of its own" if preset.initial == "different" else "common to all"
    sent = f"every {preset.local_steps} gradient steps they send weights"
    if preset.optimizer == "server":
        sent = f"they send weights after {preset.warmup} gradient steps, and at each later step a gradient"
    extras: dict[str, Any] = {
        "title": f"Fleet merging on Meta-World, preset {name}{', changed' if changed else ''}",
        "description": (
            f"{robots} robots on {tasks} tasks, each with {preset.demonstrations} demonstrations "
            f"of one task and random initial weights {whose}, "
            f"never share data: {sent}, which are merged into one policy for all tasks. "
            "Success is on goals that no demonstration showed; intervals are Wilson's, 95%."
        ),
        "command": f"fleetgym bench fleet_merge --preset {name} --seeds {' '.join(map(str, seeds))}{rows}",
    }
    if interpolated.exists():
        from fleetgym.core.files import read_json

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


@dataclass
class Args:
    """Robots that never share data, merged into one policy: trains, evaluates and writes a leaderboard."""

    preset: str = "quick"
    """quick (5 tasks), mt10 or mt50."""
    seeds: tuple[int, ...] = (0,)
    """Training seeds."""
    out: Path | None = None
    """Folder of the results; by default runs/fleet_merge/PRESET."""
    resume: bool = False
    """Go on in a folder that exists."""
    workers: int = 0
    """Processes; 0 means one for each core, four at most."""
    device: str = "cpu"
    """Where to train: cpu or cuda."""
    save_every: float = 20.0
    """Seconds between saved states: what a kill may cost."""
    methods: tuple[str, ...] = tuple(METHODS)
    """Rows to fill. Besides the usual ones there are average_norms_rounds and align_rounds: fleet_merge taken apart."""
    film: bool = True
    """Film the merged policy (needs a GL library; `fleetgym doctor` says)."""
    override: tuple[str, ...] = ()
    """Changes to the preset, such as rounds=10 hidden=128."""


def _preset(name: str, overrides: Sequence[str]) -> Preset:
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    preset = PRESETS[name]
    kinds = {field.name: type(getattr(preset, field.name)) for field in dataclasses.fields(Preset)}
    changes = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if key not in kinds:
            raise unknown("preset field", key, kinds)
        try:
            changes[key] = kinds[key](value)
        except ValueError as error:
            raise UserError(f"--override {text}: {key} takes a {kinds[key].__name__}") from error
    return dataclasses.replace(preset, **changes)


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench fleet_merge``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench fleet_merge")
    preset = _preset(args.preset, args.override)
    preset.task_names  # an unknown task is said before any work  # noqa: B018
    if not args.seeds:
        raise UserError("--seeds is empty; give at least one, such as --seeds 0")
    for method in args.methods:
        if method not in {**METHODS, **ABLATIONS}:
            raise unknown("method", method, {**METHODS, **ABLATIONS})
    if args.device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {args.device}: no such device here (`fleetgym doctor` lists what there is)")
    folder = args.out or Path("runs") / "fleet_merge" / args.preset
    config = {"benchmark": "fleet_merge", "name": args.preset, "preset": dataclasses.asdict(preset)}
    with Run.open(folder, config, resume=args.resume, name="fleet_merge", tensorboard=False):
        workers = args.workers or min(4, os.cpu_count() or 1)
        run(
            preset,
            folder,
            args.seeds,
            workers=workers,
            device=args.device,
            save_every=args.save_every,
            methods=args.methods,
        )
        publish(folder, preset, args.preset, args.seeds, args.film)
    print((folder / "leaderboard.md").read_text())
    print(f"page: {folder / 'leaderboard.html'}")
    return 0
