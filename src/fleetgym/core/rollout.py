"""Running a policy in an environment: one loop for collecting demonstrations and for evaluating.

Episode ``i`` always begins with ``env.reset(seed=seeds[i])``, whatever the number of environments or workers, so that
a result belongs to its seeds and not to the machine. (A network's float32 sums may still differ in the last bit between
batch sizes; use ``num_envs=1`` on both sides where even that matters.)
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.policy import Policy
from fleetgym.core.workers import check_picklable

if TYPE_CHECKING:
    from fleetgym.core.demonstrations import Demonstrations
    from fleetgym.core.records import EvalRecord

#: ``noise(action, step, rng) -> executed action``, for noise that is not plain Gaussian.
ActionNoise = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]

#: Buffers begin at this many steps where neither max_steps nor the environment says how long an episode may be.
_UNKNOWN_HORIZON = 256
#: The longest buffer allocated at once; longer episodes double it when they get there.
_LONGEST_RESERVE = 1024
#: Seeds are shared out in chunks: at least so many a worker, so that all end together, and at most so many episodes for
#: each of its environments, so that an interruption costs little; a chunk pays for making its environments.
_CHUNKS_PER_WORKER = 2
_LARGEST_CHUNK = 16


@dataclass
class Episode:
    """One episode, T steps long.

    Attributes:
        seed: What the environment was reset with.
        observations: [T+1, ...], the last one after the last step; a dict of such arrays for a Dict space; None when
            not recorded.
        actions: [T, ...], what the policy chose, clipped to the action space, without the exploration noise; None when
            not recorded.
        rewards: [T] float64.
        terminations: [T] bool.
        truncations: [T] bool; also true where ``max_steps`` or ``stop_on_success`` ended the episode.
        success: Whether the task was solved at any step.
        infos: Arrays [T, ...] by name: ``success`` at each step where the environment reports it, and what was asked
            for.
        frames: RGB pictures, uint8 [height, width, 3], where they were asked for.
    """

    seed: int | None
    observations: Any
    actions: Any
    rewards: np.ndarray
    terminations: np.ndarray
    truncations: np.ndarray
    success: bool = False
    infos: dict[str, np.ndarray] = field(default_factory=dict)
    frames: list[np.ndarray] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Number of steps T."""
        return len(self.rewards)

    def __len__(self) -> int:
        return len(self.rewards)

    @property
    def ret(self) -> float:
        """The return: the undiscounted sum of rewards."""
        return float(self.rewards.sum())


def rollout(
    policy: Policy,
    env: str | Callable[[], gym.Env],
    seeds: Sequence[int],
    *,
    num_envs: int = 1,
    max_steps: int | None = None,
    stop_on_success: bool = False,
    action_noise: float | Sequence[float] | ActionNoise = 0.0,
    deterministic: bool = True,
    record: bool = True,
    render: bool | int = False,
    success: Callable[[Episode], bool] | None = None,
    infos: Sequence[str] = (),
    executor: Executor | None = None,
    on_episode: Callable[[int, Episode], None] | None = None,
) -> list[Episode]:
    """Runs one episode a seed.

    Args:
        policy: Anything with SB3's ``predict``. One that has ``attach(env)``, as experts do that know more than what is
            observed, is given the environment before its first episode.
        env: An environment id, or a function without arguments that makes a new environment.
        seeds: Episode ``i`` is reset with ``seeds[i]``.
        num_envs: Environments stepped side by side in this process, with one ``predict`` a step for all of them.
        max_steps: Cuts an episode after so many steps; None leaves it to the environment's own limit.
        stop_on_success: Cuts an episode at its first success.
        action_noise: Standard deviation of Gaussian noise on the executed action (a number, or one per dimension), or
            a function ``noise(action, step, rng)`` that gives the executed action. The recorded action stays the
            policy's own. The noise of an episode comes from ``np.random.default_rng([seed, 1])``.
        deterministic: Passed to ``predict``.
        record: Whether observations and actions are kept; off for a mere evaluation.
        render: Keeps every ``render``-th frame in ``Episode.frames`` (True: each one). The environment must have
            ``render_mode="rgb_array"``, which an id is given by itself.
        success: Decides an episode's success from its record, in place of what the environment reports in
            ``info["success"]`` or ``info["is_success"]``. Without both, no episode counts as solved.
        infos: Names of more entries of the steps' infos to keep: numbers or arrays of one shape.
        executor: Shares the seeds out over the workers of a ``concurrent.futures`` executor, in contiguous chunks; the
            results are the same and in the same order. Policy and environment must be picklable for processes.
        on_episode: Called with (index into ``seeds``, episode) when an episode has ended, in order of ending.

    Returns:
        The episodes in the order of ``seeds``.

    Raises:
        UserError: Unknown environment, actions of a wrong size or not finite, noise on a discrete action space, or an
            info that the environment does not give.
    """
    seeds = [int(seed) for seed in seeds]
    if any(seed < 0 for seed in seeds):
        raise UserError(f"seed {min(seeds)}: seeds must not be negative")
    if num_envs < 1:
        raise UserError(f"num_envs={num_envs}: it must be at least 1")
    if max_steps is not None and max_steps < 1:
        raise UserError(f"max_steps={max_steps}: it must be at least 1")
    if not callable(getattr(policy, "predict", None)):
        raise UserError(f"a {type(policy).__name__} is no policy: it lacks predict(observation, state, ...)")
    if not callable(action_noise) and not np.all(np.asarray(action_noise) >= 0):
        raise UserError(f"action_noise={action_noise}: a standard deviation must not be negative")
    source = _resolve(env)
    options = {
        "num_envs": num_envs,
        "max_steps": max_steps,
        "stop_on_success": stop_on_success,
        "action_noise": action_noise,
        "deterministic": deterministic,
        "record": record,
        "render": int(render),
        "success": success,
        "infos": tuple(infos),
    }
    if not seeds:
        return []
    if executor is None:
        return _run(policy, source, seeds, on_episode, **options)
    return _share_out(executor, policy, source, seeds, on_episode, options)


def evaluate(
    policy: Policy,
    env: str | Callable[[], gym.Env],
    seeds: Sequence[int],
    *,
    system: str = "",
    task: str = "",
    **options: Any,
) -> EvalRecord:
    """Evaluates a policy on fixed seeds.

    Args:
        policy: See :func:`rollout`.
        env: See :func:`rollout`.
        seeds: See :func:`rollout`.
        system: What is evaluated, for the record.
        task: On what; by default the environment's id.
        **options: Of :func:`rollout`.

    Returns:
        A record of every episode's outcome with its provenance, the wall-clock and the processor seconds of this
        process among it.

    Raises:
        UserError: See :func:`rollout`; or no seeds.
    """
    from fleetgym.core.records import EvalRecord, provenance

    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise UserError("no seeds: an evaluation needs at least one episode")
    wall, cpu = time.perf_counter(), time.process_time()
    episodes = rollout(policy, env, seeds, **{"record": False, **options})
    return EvalRecord(
        system=system,
        task=task or _name(env),
        seeds=seeds,
        successes=[bool(episode.success) for episode in episodes],
        returns=[episode.ret for episode in episodes],
        lengths=[episode.length for episode in episodes],
        metrics={},
        provenance=provenance(
            num_envs=options.get("num_envs", 1),
            wall_seconds=round(time.perf_counter() - wall, 3),
            cpu_seconds=round(time.process_time() - cpu, 3),
        ),
    )


def collect(
    policy: Policy,
    env: str | Callable[[], gym.Env],
    seeds: Sequence[int],
    *,
    dataset: str | os.PathLike,
    keep: str = "success",
    overwrite: bool = False,
    task: str = "",
    instruction: str = "",
    expert: str = "",
    on_episode: Callable[[int, Episode], None] | None = None,
    **options: Any,
) -> Demonstrations:
    """Rolls a policy out and writes its episodes as a dataset that Minari reads.

    When it is interrupted (Ctrl-C, or an error of the environment), the episodes finished so far are written under the
    same name, with ``"interrupted": true`` in the dataset's information, and the interruption goes on to the caller.

    Args:
        policy: See :func:`rollout`.
        env: See :func:`rollout`.
        seeds: See :func:`rollout`.
        dataset: Where to write: a folder, or ``minari:<dataset id>`` for Minari's own folder.
        keep: ``success`` keeps solved episodes only, ``all`` keeps every one.
        overwrite: Whether an existing dataset may be replaced.
        task: Name of the task, for the dataset's information; by default the environment's id.
        instruction: The task in words, for the dataset's information.
        expert: Name of the policy, for the dataset's information; by default its type.
        on_episode: See :func:`rollout`; sees the failed episodes, too.
        **options: Of :func:`rollout`.

    Returns:
        The dataset. Its ``info`` holds ``attempted`` and ``succeeded``, the numbers of episodes.

    Raises:
        UserError: See :func:`rollout`; an existing dataset, an unknown ``keep``, or no episode worth keeping.
    """
    from fleetgym.core.demonstrations import Demonstrations

    if keep not in ("success", "all"):
        raise unknown("keep", keep, ["success", "all"])
    seeds = [int(seed) for seed in seeds]
    if not seeds:
        raise UserError("no seeds: collecting needs at least one episode")
    options = {"record": True, **options}
    if not options["record"]:
        raise UserError("record=False: a dataset needs the observations and actions")
    target = Demonstrations.target(dataset, overwrite=overwrite)
    probe = _make(_resolve(env), 0)
    try:
        observation_space, action_space, spec = probe.observation_space, probe.action_space, probe.spec
    finally:
        probe.close()
    noise = options.get("action_noise", 0.0)
    noise_name = getattr(noise, "__name__", "function") if callable(noise) else np.asarray(noise).tolist()
    finished: dict[int, Episode] = {}

    def note(index: int, episode: Episode) -> None:
        finished[index] = episode
        if on_episode is not None:
            on_episode(index, episode)

    def write(interrupted: bool) -> Demonstrations:
        kept = [finished[i] for i in sorted(finished) if keep == "all" or finished[i].success]
        return Demonstrations.create(
            target,
            kept,
            observation_space=observation_space,
            action_space=action_space,
            env_spec=spec,
            overwrite=overwrite,
            info={
                "env_id": spec.id if spec is not None else _name(env),
                "task": task or _name(env),
                "instruction": instruction,
                "expert": expert or getattr(policy, "name", "") or type(policy).__name__,
                "keep": keep,
                "attempted": len(finished),
                "succeeded": sum(episode.success for episode in finished.values()),
                "interrupted": interrupted,
                "action_noise": noise_name,
            },
        )

    try:
        rollout(policy, env, seeds, on_episode=note, **options)
    except BaseException:
        if any(keep == "all" or episode.success for episode in finished.values()):
            write(interrupted=True)
        raise
    if keep == "success" and not any(episode.success for episode in finished.values()):
        raise UserError(
            f"none of the {len(seeds)} episodes on {_name(env)} succeeded, so there is nothing to keep; "
            "pass keep='all' to keep them, or check the policy"
        )
    return write(interrupted=False)


def _name(env: Any) -> str:
    """What to call an environment in messages and records."""
    if isinstance(env, str):
        return env
    if isinstance(env, gym.envs.registration.EnvSpec):
        return env.id
    inner = getattr(env, "func", env)  # functools.partial
    return str(getattr(inner, "__name__", type(inner).__name__))


def _resolve(env: Any) -> Any:
    """Turns an id into its spec (which worker processes can make without the registration); checks the rest."""
    if isinstance(env, str):
        try:
            return gym.spec(env)
        except gym.error.Error as error:
            raise UserError(f"{unknown('environment', env, list(gym.registry))} ({error})") from error
        except ImportError as error:
            raise UserError(f"environment {env!r}: its module does not import ({error})") from error
    if isinstance(env, gym.Env) or not callable(env):
        raise UserError(f"env={env!r}: pass an environment id or a function that makes an environment, not an instance")
    return env


def _make(source: Any, render: int) -> gym.Env:
    if isinstance(source, gym.envs.registration.EnvSpec):
        # Gymnasium's passive checker looks at every step; environments are checked by their tests instead.
        mode = {"render_mode": "rgb_array"} if render else {}
        return gym.make(source, disable_env_checker=True, **mode)
    env = source()
    if render and env.render_mode != "rgb_array":
        raise UserError(
            f"render: {_name(source)} makes an environment with render_mode={env.render_mode!r}; "
            "let it pass render_mode='rgb_array'"
        )
    return env


def _buffer(space: spaces.Space, size: int) -> Any:
    """Room for ``size`` observations or actions of a space."""
    if isinstance(space, spaces.Dict):
        return {key: _buffer(inner, size) for key, inner in space.spaces.items()}
    if isinstance(space, spaces.Text):
        return np.full(size, "", dtype=object)
    if space.shape is None or space.dtype is None:
        raise UserError(
            f"space {space}: only arrays, texts and dicts of them are supported; wrap it in FlattenObservation"
        )
    return np.zeros((size, *space.shape), dtype=space.dtype)


def _put(buffer: Any, index: int, value: Any) -> None:
    if isinstance(buffer, dict):
        for key, inner in buffer.items():
            _put(inner, index, value[key])
    else:
        buffer[index] = value


def _cut(buffer: Any, size: int) -> Any:
    """A copy of the first ``size`` entries."""
    if isinstance(buffer, dict):
        return {key: _cut(inner, size) for key, inner in buffer.items()}
    return buffer[:size].copy()


def _double(buffer: Any) -> Any:
    if isinstance(buffer, dict):
        return {key: _double(inner) for key, inner in buffer.items()}
    return np.concatenate([buffer, np.zeros_like(buffer)])


class _Slot:
    """One environment and the buffers of the episode that it is in; the buffers are reused from episode to episode."""

    def __init__(self, env: gym.Env, options: dict[str, Any]) -> None:
        self.env = env
        self.record = options["record"]
        self.render = options["render"]
        self.stop_on_success = options["stop_on_success"]
        self.judge = options["success"]
        self.kept_infos = options["infos"]
        noise = options["action_noise"]
        self.noise = noise if callable(noise) or np.any(np.asarray(noise) != 0) else None
        limit = env.spec.max_episode_steps if env.spec is not None else None
        self.max_steps = options["max_steps"] or sys.maxsize
        if self.record:
            horizon = min(self.max_steps, limit or _UNKNOWN_HORIZON, _LONGEST_RESERVE)
            self.capacity = horizon
            self.observations = _buffer(env.observation_space, horizon + 1)
            self.actions = _buffer(env.action_space, horizon)

    def begin(self, index: int, seed: int) -> Any:
        self.index, self.seed, self.t = index, seed, 0
        self.rewards: list[float] = []
        self.successes: list[bool] = []
        self.infos: dict[str, list[Any]] = {name: [] for name in self.kept_infos}
        self.reported = False
        self.frames: list[np.ndarray] = []
        self.rng = np.random.default_rng([seed, 1]) if self.noise is not None else None
        observation, _ = self.env.reset(seed=seed)
        if self.record:
            _put(self.observations, 0, observation)
        if self.render:
            self.frames.append(self.env.render())
        return observation

    def disturb(self, action: np.ndarray) -> np.ndarray:
        if callable(self.noise):
            return self.noise(action.copy(), self.t, self.rng)
        return action + self.rng.standard_normal(action.shape) * self.noise

    def step(self, label: Any, executed: Any) -> tuple[Any, Episode | None]:
        """Steps the environment; gives the observation, and the episode when this was its last step."""
        t = self.t
        if self.record:
            if t == self.capacity:
                self.capacity *= 2
                self.observations, self.actions = _double(self.observations), _double(self.actions)
            self.actions[t] = label  # before the step: nothing stops an environment from writing into its action
        observation, reward, terminated, truncated, info = self.env.step(executed)
        if self.record:
            _put(self.observations, t + 1, observation)
        self.rewards.append(reward)
        won = info.get("success")
        if won is None:
            won = info.get("is_success")
        if won is None:
            won = False
        else:
            self.reported = True
            won = bool(won)
        self.successes.append(won)
        for name, values in self.infos.items():
            if name not in info:
                raise unknown("info of a step", name, info)
            values.append(info[name])
        self.t = t = t + 1
        if self.render and t % self.render == 0:
            self.frames.append(self.env.render())
        if terminated or truncated or t >= self.max_steps or (won and self.stop_on_success):
            return observation, self._finish(bool(terminated), bool(truncated))
        return observation, None

    def _finish(self, terminated: bool, truncated: bool) -> Episode:
        steps = self.t
        terminations, truncations = np.zeros(steps, bool), np.zeros(steps, bool)
        terminations[-1] = terminated
        truncations[-1] = truncated or not terminated
        episode = Episode(
            seed=self.seed,
            observations=_cut(self.observations, steps + 1) if self.record else None,
            actions=_cut(self.actions, steps) if self.record else None,
            rewards=np.asarray(self.rewards, dtype=np.float64),
            terminations=terminations,
            truncations=truncations,
            success=any(self.successes),
            infos={
                **({"success": np.asarray(self.successes, dtype=bool)} if self.reported else {}),
                **{name: np.asarray(values) for name, values in self.infos.items()},
            },
            frames=self.frames,
        )
        if self.judge is not None:
            episode.success = bool(self.judge(episode))
        return episode


def _run(
    policy: Policy,
    source: Any,
    seeds: Sequence[int],
    on_episode: Callable[[int, Episode], None] | None,
    **options: Any,
) -> list[Episode]:
    """The loop. Rows whose seeds have run out go on being fed their last observation, and their actions are ignored.

    A policy's state is opaque, so rows cannot be dropped from it: the batch stays as large as it began.
    """
    rows = min(options["num_envs"], len(seeds))
    deterministic = options["deterministic"]
    slots: list[_Slot] = []
    try:
        for _ in range(rows):
            slots.append(_Slot(_make(source, options["render"]), options))
        if callable(getattr(policy, "attach", None)):
            if rows > 1:
                raise UserError(
                    f"num_envs={rows}: a {type(policy).__name__} plays in one environment at a time; take 1"
                )
            policy.attach(slots[0].env)
        space = slots[0].env.action_space
        box = isinstance(space, spaces.Box)
        noisy = slots[0].noise is not None
        if noisy and not box:
            raise UserError(f"action_noise: the action space {space} is not a Box; leave the noise out")
        if box:
            low, high, dtype = space.low, space.high, space.dtype
        elif space.shape is None:
            raise UserError(f"action space {space}: only spaces of arrays are supported")
        batch = _buffer(slots[0].env.observation_space, rows)
        flat = not isinstance(batch, dict)
        episodes: list[Episode | None] = [None] * len(seeds)
        waiting = iter(enumerate(seeds))
        for row, slot in enumerate(slots):
            _put(batch, row, slot.begin(*next(waiting)))
        active = list(range(rows))
        starts, nobody = np.ones(rows, dtype=bool), np.zeros(rows, dtype=bool)
        state = None
        checked = False
        while active:
            # Policies may keep what they are given (a history, say), so each call gets arrays of its own.
            observation = batch.copy() if flat else {key: value.copy() for key, value in batch.items()}
            actions, state = policy.predict(observation, state, starts, deterministic)
            if not checked:
                _check_actions(actions, rows, space, policy)
                checked = True
            if box:
                actions = np.minimum(np.maximum(actions, low), high)
                # One number tells of any NaN (infinite ones are clipped), which physics would only turn into nonsense.
                if actions.dtype != dtype:
                    actions = actions.astype(dtype)
                total = actions.sum()
                if total != total:
                    bad = next((row for row in active if np.isnan(actions[row]).any()), None)
                    if bad is not None:
                        raise UserError(
                            f"the policy gave the action {actions[bad]} at step {slots[bad].t} of seed "
                            f"{slots[bad].seed}: its weights or its input hold NaN"
                        )
            starts = nobody.copy()
            ended = False
            for row in active:
                slot = slots[row]
                label = executed = actions[row]
                if noisy:
                    executed = np.minimum(np.maximum(slot.disturb(label), low), high).astype(dtype, copy=False)
                observation, episode = slot.step(label, executed)
                if episode is not None:
                    episodes[slot.index] = episode
                    if on_episode is not None:
                        on_episode(slot.index, episode)
                    following = next(waiting, None)
                    if following is None:
                        slot.index, ended = -1, True
                    else:
                        observation = slot.begin(*following)
                        starts[row] = True
                if flat:
                    batch[row] = observation
                else:
                    _put(batch, row, observation)
            if ended:
                active = [row for row in active if slots[row].index >= 0]
        return episodes  # type: ignore[return-value]
    finally:
        for slot in slots:
            slot.env.close()


def _check_actions(actions: Any, rows: int, space: spaces.Space, policy: Any) -> None:
    shape = np.shape(actions)
    if shape != (rows, *space.shape):
        raise UserError(
            f"{type(policy).__name__} gave actions of shape {shape} for a batch of {rows}; the environment's action "
            f"space {space} takes {(rows, *space.shape)}: use a policy made for this environment"
        )


def _work(policy: Policy, source: Any, seeds: list[int], options: dict[str, Any]) -> list[Episode]:
    """What a worker does with its chunk."""
    import multiprocessing

    if multiprocessing.parent_process() is not None and "torch" in sys.modules:
        import torch

        torch.set_num_threads(1)  # the workers are the parallelism; threads on top only make them wait for each other
    return _run(policy, source, seeds, None, **options)


def _share_out(
    executor: Executor,
    policy: Policy,
    source: Any,
    seeds: list[int],
    on_episode: Callable[[int, Episode], None] | None,
    options: dict[str, Any],
) -> list[Episode]:
    from concurrent.futures import ProcessPoolExecutor

    if isinstance(executor, ProcessPoolExecutor):
        check_picklable((policy, source, options), "policy, environment and options", "leave the executor out")
    workers = getattr(executor, "_max_workers", None) or os.cpu_count() or 1
    size = max(1, -(-len(seeds) // (workers * _CHUNKS_PER_WORKER)))
    size = min(len(seeds), _LARGEST_CHUNK * options["num_envs"], max(size, options["num_envs"]))
    episodes: list[Episode | None] = [None] * len(seeds)
    starts = {
        executor.submit(_work, policy, source, seeds[start : start + size], options): start
        for start in range(0, len(seeds), size)
    }
    try:
        for future in as_completed(starts):
            for offset, episode in enumerate(future.result()):
                index = starts[future] + offset
                episodes[index] = episode
                if on_episode is not None:
                    on_episode(index, episode)
    except BaseException:
        for future in starts:
            future.cancel()
        raise
    return episodes  # type: ignore[return-value]
