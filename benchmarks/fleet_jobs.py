"""One training of the fleet-merging benchmark: the robots, their demonstrations, the loop, what is recorded of it."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from fleetgym.agents.imitation import FleetLearner, ImitationConfig, SightBatch, inputs
from fleetgym.agents.networks import ImagePolicy, PointPolicy, RecurrentPolicy, features, masked_mse
from fleetgym.benchmarks.fleet_presets import JOBS, MERGES, OWN_OPTIMIZER, Preset, label, partition
from fleetgym.benchmarks.fleet_worlds import Place
from fleetgym.core.demonstrations import Demonstrations, SequenceBatch, Statistics
from fleetgym.core.errors import UserError
from fleetgym.core.files import write_json
from fleetgym.core.policy import Policy
from fleetgym.core.records import EvalRecord
from fleetgym.core.rollout import collect, evaluate
from fleetgym.core.run import Run
from fleetgym.core.seeding import seed_everything
from fleetgym.core.weights import WeightSpec
from fleetgym.merging import MERGERS, interpolate, merge

# Seeds of demonstrations, of the final evaluation and of the learning curve never meet; besides, the environment draws
# the goals of the last two from the held-out half of its goal space.
EVALUATION_SEED, CURVE_SEED = 1_000_000, 2_000_000
FURTHER = "further"
"""Folder of the records on what no robot has met, within the benchmark's."""


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


class _Reader:
    """An expert in a world with pictures: it reads the numbers beside them."""

    def __init__(self, expert: Policy) -> None:
        self.expert = expert

    def predict(self, observation: dict[str, np.ndarray], *rest: Any, **options: Any) -> tuple[np.ndarray, Any]:
        """The expert's action."""
        return self.expert.predict(observation["state"], *rest, **options)


class Fleet:
    """The robots of one seed: tasks, demonstrations, initial policies.

    Args:
        preset: What is trained; see ``partition`` for who has which tasks.
        folder: The benchmark's folder, with the demonstrations of :func:`collect_task`.
        seed: Training seed.

    Raises:
        UserError: A partition that cannot be, or demonstrations that are missing.
    """

    def __init__(self, preset: Preset, folder: Path, seed: int) -> None:
        self.preset, self.seed = preset, seed
        self.tasks = list(preset.task_names)
        self.world = preset.world
        hands = partition(preset, seed)
        self.robots = [tuple(self.tasks[k] for k in hand) for hand in hands]
        """The tasks of each robot."""
        self._worlds: dict[Place, gym.Env] = {}
        self.data: list[SequenceBatch] = []
        episodes = {
            data.name: Demonstrations.load(demonstrations_path(folder, seed, data.name))
            for data in self.world.datasets(preset)
        }
        self.holders: list[dict[str, int]] = []
        """For each robot and task of its, how many robots before it have that task."""
        given = dict.fromkeys(self.tasks, 0)
        for hand in hands:
            parts, holder = [], {}
            for k in hand:
                task = self.tasks[k]
                holder[task] = given[task]
                given[task] += 1
                name, part = self.world.share(preset, task, holder[task])
                # Demonstrations show the plain numbers; the policy also sees which task it is on.
                parts.append(self._with_task(self._seen(episodes[name][part]), k))
            self.data.append(self.together(parts))
            self.holders.append(holder)
        self.differences = () if preset.sees else self.world.differences
        self.statistics = Statistics.pool(
            [
                Statistics.of(features(batch.observations[batch.mask].double(), self.differences).numpy(), floor=1e-3)
                for batch in self.data
            ]
        )

    def _seen(self, demonstrations: Demonstrations) -> SequenceBatch:
        """Episodes as the policies see them, without the one-hot."""
        if not self.preset.sees:
            return demonstrations.padded()
        batch = SightBatch.of(demonstrations)
        return dataclasses.replace(batch, observations=batch.observations[..., : self.world.proprioception])

    def together(self, batches: Sequence[SequenceBatch]) -> SequenceBatch:
        """All sequences of several robots' (or tasks') batches."""
        return (SightBatch if self.preset.sees else SequenceBatch).concatenate(batches)

    def _with_task(self, batch: SequenceBatch, k: int) -> SequenceBatch:
        one_hot = torch.zeros(*batch.mask.shape, len(self.tasks))
        one_hot[..., k] = batch.mask.float()
        return dataclasses.replace(batch, observations=torch.cat([batch.observations, one_hot], -1))

    def _made(self, place: Place) -> gym.Env:
        """The evaluation environment of a place, made once: making one costs more than an episode in it."""
        if place not in self._worlds:
            self._worlds[place] = _Lasting(self.world.evaluation(self.preset, place))
        return self._worlds[place]

    def own(self, robot: int) -> list[Place]:
        """Where a robot's demonstrations are from."""
        holders = self.holders[robot].items()
        return [place for task, holder in holders for place in self.world.places(self.preset, [task], holder)]

    @property
    def data_bytes(self) -> int:
        """Bytes of one robot's demonstrations: numbers, points and actions as float32, pictures as bytes."""
        steps = sum(int(batch.mask.sum()) for batch in self.data) / len(self.data)
        size = self.data[0].observations.shape[-1] - len(self.tasks) + self.data[0].actions.shape[-1]
        sight = {"image": 3 * self.preset.image_size**2, "points": 4 * 4 * self.preset.points}
        return round(steps * (4 * size + sight.get(self.preset.observation, 0)))

    def checkpoint_name(self, robot: int) -> str:
        """What the checkpoint of a robot trained alone is called: its number, and its task if it has one only."""
        tasks = self.robots[robot]
        return f"robot{robot}-{tasks[0]}" if len(tasks) == 1 else f"robot{robot}"

    def pair(self) -> tuple[int, int]:
        """Two robots to look between: the first, and the next that has other tasks (or simply the next)."""
        return 0, next((k for k, tasks in enumerate(self.robots) if tasks != self.robots[0]), 1)

    def policy(self, robot: int) -> RecurrentPolicy:
        """Robot ``robot``'s policy before training: random weights (its own or common ones), the fleet's statistics."""
        torch.manual_seed(self.seed * 100_003 + (robot if self.preset.initial == "different" else 0))
        options = {"cell": self.preset.cell, "hidden": self.preset.hidden, "layers": self.preset.layers}
        sizes = self.data[0].observations.shape[-1], self.data[0].actions.shape[-1]
        if self.preset.observation == "image":
            policy: RecurrentPolicy = ImagePolicy(*sizes, image_size=self.preset.image_size, **options)
        elif self.preset.observation == "points":
            policy = PointPolicy(*sizes, points=self.preset.points, **options)
        else:
            policy = RecurrentPolicy(*sizes, differences=self.differences, **options)
        policy.normaliser.mean.copy_(torch.as_tensor(self.statistics.mean))
        policy.normaliser.std.copy_(torch.as_tensor(self.statistics.std))
        return policy

    def evaluate(
        self,
        policy: RecurrentPolicy,
        tasks: Sequence[str] | Sequence[Place],
        episodes: int,
        first_seed: int,
    ) -> EvalRecord:
        """Success on held-out goals, latched, within ``max_steps``.

        Args:
            policy: The policy.
            tasks: Names of tasks, which stand for all their places; or places.
            episodes: Of each name, at least so many, in equal parts over its places.
            first_seed: Each place has seeds of its own from here on.
        """
        places = [
            place
            for task in tasks
            for place in ([task] if isinstance(task, Place) else self.world.places(self.preset, [task]))
        ]
        names = [place.name for place in places]
        records, begun = [], dict.fromkeys(names, first_seed)
        for place in places:
            number = -(-episodes // names.count(place.name))
            seeds = range(begun[place.name], begun[place.name] + number)
            begun[place.name] += number
            records.append(
                evaluate(
                    policy,
                    functools.partial(self._made, place),
                    seeds,
                    task=place.name,
                    max_steps=self.preset.max_steps,
                    stop_on_success=True,
                )
            )
        return EvalRecord.concatenate(records, task=f"{self.preset.suite}/{self.preset.tasks}")


def demonstrations_path(folder: Path, seed: int, task: str) -> Path:
    """Where the demonstrations of a task lie."""
    return folder / "training" / f"seed{seed}" / "demonstrations" / task


def collect_task(preset: Preset, folder: str, seed: int, name: str) -> str:
    """Collects one data set: successful episodes on goals of the training half.

    Args:
        preset: What is collected; see ``World.datasets``.
        folder: The benchmark's folder.
        seed: Training seed.
        name: The data set's; in Meta-World that is its task.

    Returns:
        The name.

    Raises:
        UserError: An expert that does not solve enough episodes.
    """
    data = next(data for data in preset.world.datasets(preset) if data.name == name)
    task, wanted = data.task, data.number
    path = demonstrations_path(Path(folder), seed, name)
    if path.exists():
        try:
            if not Demonstrations.load(path).info["interrupted"]:
                return name
        except UserError:
            pass  # half a dataset of an interrupted run: collect it again
    expert = preset.world.suite.expert(task)
    first = seed * 10_000 + data.first_seed
    # A quarter more than needed makes up for the expert's failures on most tasks.
    for number in (wanted + -(-wanted // 4), 2 * wanted, 4 * wanted):
        found = collect(
            _Reader(expert) if preset.observation == "image" and preset.suite == "meta_world" else expert,
            functools.partial(preset.world.make, preset, task, goals="train", **dict(data.options)),
            range(first, first + number),
            dataset=path,
            overwrite=True,
            task=task,
            instruction=preset.world.suite.task(task).instruction,
            action_noise=preset.noise,
            stop_on_success=True,
        )
        if len(found) >= wanted:
            return name
    raise UserError(f"{name}: the expert solved {len(found)} of {number} episodes, {wanted} are wanted; lower noise")


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
    methods = JOBS[job.kind]
    if recorded(job):
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
            record = fleet.evaluate(policy, fleet.tasks, preset.episodes, EVALUATION_SEED)
            _record(job, job.kind, record, trained)
            _record_further(job, job.kind, fleet, [policy], trained)
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
    batch = preset.batch_size * preset.tasks_each
    policies = [fleet.policy(k) for k in range(robots)]
    spec = WeightSpec.from_module(policies[0], policies[0].example())
    config = ImitationConfig(
        steps=preset.steps,
        batch_size=batch,
        learning_rate=preset.learning_rate,
        final_learning_rate=preset.learning_rate / 100,
        proximal=preset.proximal if job.kind == "fedprox_rounds" else 0.0,
    )
    if job.kind == "joint":
        # As many episodes a step as the whole fleet draws, but into one policy.
        config = dataclasses.replace(config, batch_size=batch * robots)
        everything = fleet.together(fleet.data)
        learner = FleetLearner(policies[:1], [everything], config, seed=job.seed, device=job.device)
    else:
        learner = FleetLearner(policies, fleet.data, config, seed=job.seed, device=job.device)
    # After the first merge the robots hold equal weights; with the optimiser at the server they stay equal.
    shared = preset.optimizer == "server" and job.kind in MERGES and job.kind not in OWN_OPTIMIZER
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
            record = fleet.evaluate(learner.stack.policies()[0], fleet.tasks, preset.curve_episodes, CURVE_SEED)
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


def recorded(job: Job) -> bool:
    """Whether all rows of a job have their records."""
    return all(record_path(Path(job.folder), method, job.seed).exists() for method in JOBS[job.kind])


def record_path(folder: Path, method: str, seed: int) -> Path:
    """Where the record of a method and seed lies."""
    return folder / "records" / f"{method}-seed{seed}.json"


_NOTES = {
    "joint": "sends its demonstrations, which is what a fleet wants to avoid",
    "alone_own": "sends only the mean and deviation of its observations, so that all normalise alike",
}


def _record(
    job: Job, method: str, evaluated: EvalRecord, trained: Trained, folder: Path | None = None, **metrics: Any
) -> None:
    """Writes the record of one row and seed, into the benchmark's folder or another one."""
    if method in _NOTES:
        metrics["note"] = _NOTES[method]
    record = dataclasses.replace(
        evaluated,
        system=method,
        metrics={
            "label": label(method, job.preset),
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
    record.save(record_path(folder or Path(job.folder), method, job.seed))


def _record_further(job: Job, method: str, fleet: Fleet, policies: Sequence[RecurrentPolicy], trained: Trained) -> None:
    """Writes the record of one row and seed on what no robot has met, where the suite has such."""
    places = fleet.world.further(job.preset)
    if not places:
        return
    share = -(-job.preset.episodes // len(policies))
    records = [fleet.evaluate(policy, places, share, EVALUATION_SEED) for policy in policies]
    whole = EvalRecord.concatenate(records, task=f"{records[0].task}, further")
    _record(job, method, whole, dataclasses.replace(trained, curve=[]), Path(job.folder) / FURTHER)


def _record_alone(job: Job, fleet: Fleet, run: Run, trained: Trained) -> None:
    """The three rows that come of robots trained alone, and the path between two of them."""
    preset = job.preset
    own = [
        fleet.evaluate(policy, fleet.own(robot), -(-preset.episodes // preset.robots_per_task), EVALUATION_SEED)
        for robot, policy in enumerate(trained.policies)
    ]
    _record(job, "alone_own", EvalRecord.concatenate(own, task=own[0].task), trained)
    # Every robot on every task; together as many episodes of each task as in the other rows.
    if preset.tasks_each == len(fleet.tasks) and not fleet.world.further(preset):
        every = own  # the same policies in the same episodes
    else:
        share = -(-preset.episodes // len(fleet.robots))
        every = [fleet.evaluate(policy, fleet.tasks, share, EVALUATION_SEED) for policy in trained.policies]
    _record(job, "alone_all", EvalRecord.concatenate(every, task=every[0].task), trained)
    _record_further(job, "alone_all", fleet, trained.policies, trained)

    began = time.process_time()
    example = trained.policies[0].example()
    merged = merge("fleet_merge", trained.policies, example_input=example, matcher=preset.matcher)
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
        fleet.evaluate(policy, fleet.tasks, preset.episodes, EVALUATION_SEED),
        once,
        distance_before=merged.distance_before,
        distance_after=merged.distance_after,
    )
    _record_further(job, "fleet_merge_once", fleet, [policy], once)
    for robot, specialist in enumerate(trained.policies):
        run.save_checkpoint(fleet.checkpoint_name(robot), specialist, info={"task_set": fleet.tasks})
    write_json(run.path / "interpolation.json", interpolation(job, fleet, trained.policies))


@torch.no_grad()
def interpolation(job: Job, fleet: Fleet, policies: Sequence[RecurrentPolicy]) -> dict[str, Any]:
    """Loss and success on the straight line between two robots' weights, before and after alignment.

    Args:
        job: Whose preset says at how many places of the line success is measured.
        fleet: The robots; ``Fleet.pair`` says which two. Their loss is on the demonstrations of both, success on two
            tasks at most, one of each robot where they have different ones.
        policies: The robots' policies.

    Returns:
        ``lambda`` (11 places in 0..1), ``robots`` (names of the ends), ``tasks``, and ``series``, each with ``name``,
        ``loss``, ``success`` (None where it is not measured) and the ``loss_barrier`` and ``success_barrier`` of
        :func:`barrier`.
    """
    indices = fleet.pair()
    pair = [policies[i] for i in indices]
    aligned = merge("fleet_merge", pair, example_input=pair[0].example(), matcher=job.preset.matcher).aligned
    ends = [policy.state_dict() for policy in pair]
    both = fleet.together([fleet.data[i] for i in indices])
    first, second = (fleet.robots[i] for i in indices)
    other = next((task for task in second if task not in first), None)
    tasks = [first[0], other] if other else list(first[:2])
    lambdas = np.linspace(0, 1, 11)
    # Closed-loop success is dear: failures take all the steps of an episode.
    measured = set(np.linspace(0, len(lambdas) - 1, job.preset.line_points).round().astype(int).tolist())
    series = []
    for name, (a, b) in (("before alignment", ends), ("after alignment", aligned)):
        loss, success = [], []
        for number, lam in enumerate(lambdas):
            policy = fleet.policy(0)
            policy.load_state_dict(interpolate(a, b, float(lam)))
            loss.append(float(masked_mse(policy(*inputs(both))[0], both.actions, both.mask)))
            wanted = number in measured
            success.append(fleet.evaluate(policy, tasks, 5, CURVE_SEED).success if wanted else None)
        barriers = {"loss_barrier": barrier(lambdas, loss, 1), "success_barrier": barrier(lambdas, success, -1)}
        series.append({"name": name, "loss": loss, "success": success, **barriers})
    alone = len(first) == len(second) == 1 and first != second
    names = tasks if alone else [f"robot {i}" for i in indices]
    return {"lambda": lambdas.tolist(), "series": series, "robots": names, "tasks": tasks}


def barrier(places: Sequence[float], values: Sequence[float | None], sign: int) -> float:
    """How far a quantity gets worse between two ends than the straight line between its values there.

    Args:
        places: Positions, from 0 to 1.
        values: The quantity there; None where it is not known. Both ends are.
        sign: 1 for a quantity that is better the smaller it is, -1 for the other kind.

    Returns:
        The largest excess over that line, at least 0: the barrier of Frankle et al., "Linear Mode Connectivity and the
        Lottery Ticket Hypothesis", ICML 2020, with the line in place of the mean of the ends.
    """
    first, last = values[0], values[-1]
    return max(
        sign * (value - ((1 - lam) * first + lam * last)) for lam, value in zip(places, values) if value is not None
    )
