"""How any world is listed, made, split and solved: ``Task`` and ``EnvSuite``. Imports nothing heavy."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.registry import Registry

if TYPE_CHECKING:
    import gymnasium as gym

    from fleetgym.core.policy import Policy

#: All suites by name; third parties add theirs by the entry-point group ``fleetgym.suites``.
SUITES: Registry[EnvSuite] = Registry("suite", group="fleetgym.suites")


@dataclass(frozen=True)
class Task:
    """One task of a suite.

    Attributes:
        id: Its name within the suite, such as ``"reach-v3"``.
        env_id: Its Gymnasium id, such as ``"MetaWorld/reach-v3"``.
        instruction: What is to be done, one English sentence.
        horizon: Steps after which an episode is truncated.
        kwargs: What ``gym.make`` is given besides the id.
        episodes: Episodes of a trial: ``reset()`` without a seed goes on with the next one. 1 without trials.
    """

    id: str
    env_id: str
    instruction: str
    horizon: int
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    episodes: int = 1


@dataclass(frozen=True)
class EnvSuite:
    """A family of tasks that share observation and action layout.

    Attributes:
        name: The suite's name.
        entries: Its tasks.
        splits: Named subsets of task names.
        paper: Where the tasks come from.
        expert_function: ``"module:function"``; the function takes a task name and the options of ``expert`` and returns
            a ``Policy``.
        vector_function: ``"module:function"``; the function takes ``tasks`` (a tuple of names) and the arguments of
            ``make_vec`` and returns a vector environment.
        goals: The choices that ``goals`` has here.
        opengl: Whether pictures need OpenGL; False for suites that draw by themselves.
    """

    name: str
    entries: tuple[Task, ...]
    splits: Mapping[str, tuple[str, ...]]
    paper: str = ""
    expert_function: str | None = None
    vector_function: str | None = None
    goals: tuple[str, ...] = ("all", "train", "held_out")
    opengl: bool = True

    @functools.cached_property
    def _by_id(self) -> dict[str, Task]:
        return {entry.id: entry for entry in self.entries}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of all tasks."""
        return tuple(self._by_id)

    def task(self, name: str) -> Task:
        """The task of that name.

        Raises:
            UserError: Unknown task; the message holds the three nearest names.
        """
        if name not in self._by_id:
            raise unknown(f"task of {self.name}", name, self._by_id)
        return self._by_id[name]

    def task_set(self, task_set: str | Sequence[str]) -> tuple[str, ...]:
        """Task names of a split's name, of one task's name, or of a sequence of task names.

        Raises:
            UserError: Unknown split or task, or no tasks at all.
        """
        if isinstance(task_set, str):
            if task_set in self.splits:
                return tuple(self.splits[task_set])
            if task_set in self._by_id:
                return (task_set,)
            raise unknown(f"task set of {self.name}", task_set, (*self.splits, *self._by_id))
        names = tuple(self.task(name).id for name in task_set)
        if not names:
            raise UserError(f"the task set is empty; name tasks of {self.name}, or one of {', '.join(self.splits)}")
        return names

    def _arguments(self, task: str, goals: str, task_set: str | Sequence[str] | None, kwargs: dict) -> dict[str, Any]:
        arguments = {**self.task(task).kwargs, **kwargs}
        if goals not in self.goals:
            raise unknown("choice of goals", goals, self.goals)
        if goals != "all":
            arguments["goals"] = goals
        if task_set is not None:
            arguments["task_set"] = self.task_set(task_set)
            if task not in arguments["task_set"]:
                raise UserError(f"task {task!r} is not in the task set {arguments['task_set']}; choose another set")
        return arguments

    def make(
        self,
        task: str,
        render_mode: str | None = None,
        *,
        goals: str = "all",
        task_set: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> gym.Env:
        """Makes the environment of a task.

        Args:
            task: A task name.
            render_mode: None or ``"rgb_array"``.
            goals: ``"all"``, ``"train"`` or ``"held_out"``; the last two are disjoint whatever the seeds.
            task_set: A split's name or task names; appends the one-hot of the task's place in it to the observation.
            **kwargs: More arguments of the environment, or of ``gymnasium.make``.

        Raises:
            UserError: Unknown task, split or choice of goals; or the task is not in the task set.
        """
        import gymnasium as gym

        arguments = self._arguments(task, goals, task_set, kwargs)
        # The checker looks at the first steps only but stays in the way of all others; the tests run it on every id.
        arguments.setdefault("disable_env_checker", True)
        return gym.make(self.task(task).env_id, render_mode=render_mode, **arguments)

    def make_fn(
        self,
        task: str,
        render_mode: str | None = None,
        *,
        goals: str = "all",
        task_set: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> Callable[[], gym.Env]:
        """A picklable function without arguments that makes the environment; arguments as in ``make``.

        The arguments are checked now. In another process the suite is looked up by its name.
        """
        self._arguments(task, goals, task_set, kwargs)
        if task_set is not None:
            task_set = self.task_set(task_set)
        return functools.partial(
            make_task, self.name, task, render_mode=render_mode, goals=goals, task_set=task_set, **kwargs
        )

    def make_vec(
        self, task_set: str | Sequence[str], num_envs: int | None = None, **kwargs: Any
    ) -> gym.vector.VectorEnv:
        """Makes a vector environment in which environment ``i`` plays task ``i % len(task_set)``.

        Args:
            task_set: A split's name, a task's name, or task names.
            num_envs: How many; None makes one a task.
            **kwargs: Arguments of the suite's vector environment.

        Raises:
            UserError: Unknown task set, or a suite without vector environments.
        """
        if self.vector_function is None:
            raise UserError(f"suite {self.name!r} has no vector environments; make its tasks one by one")
        return _load(self.vector_function)(self.task_set(task_set), num_envs=num_envs, **kwargs)

    def expert(self, task: str, **options: Any) -> Policy:
        """The scripted expert of a task.

        Args:
            task: A task name.
            **options: Of the suite's experts, such as ``episodes`` where there are trials.

        Raises:
            UserError: Unknown task, or a suite without experts.
        """
        self.task(task)
        if self.expert_function is None:
            raise UserError(f"suite {self.name!r} has no experts")
        return _load(self.expert_function)(task, **options)


def _load(path: str) -> Any:
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolve_task_set(
    world: str, task_set: str | Sequence[str], splits: Mapping[str, tuple[str, ...]], check: Callable[[str], str]
) -> tuple[str, ...]:
    """The tasks of a split's name, or of a sequence of task names, each of which has one place in a one-hot.

    Args:
        world: What messages call it.
        task_set: A split's name or task names.
        splits: By name.
        check: Gives a task's name back, or raises.

    Raises:
        UserError: Unknown split or task, no tasks, or a task named twice.
    """
    if isinstance(task_set, str):
        if task_set not in splits:
            raise unknown(f"{world} task set", task_set, splits)
        return splits[task_set]
    tasks = tuple(check(task) for task in task_set)
    if not tasks:
        raise UserError(f"the task set is empty; name tasks, or one of {', '.join(splits)}")
    if len(set(tasks)) < len(tasks):
        raise UserError(f"the task set {tasks} names a task twice; each has one place in the one-hot")
    return tasks


def suite(name: str) -> EnvSuite:
    """The suite of that name.

    Raises:
        UserError: Unknown suite; the message holds the nearest names.
    """
    return SUITES.get(name)


def make_task(suite_name: str, task: str, **kwargs: Any) -> gym.Env:
    """``suite(suite_name).make(task, **kwargs)`` as a function that pickles by name."""
    return suite(suite_name).make(task, **kwargs)


SUITES.register("meta_world", "fleetgym.envs.meta_world.suite:META_WORLD")
