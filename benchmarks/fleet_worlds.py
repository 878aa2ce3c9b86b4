"""Where a fleet lives: what the fleet benchmarks must know of a suite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np

from fleetgym.agents.networks import FLEET_TOOLS_DIFFERENCES, META_WORLD_DIFFERENCES
from fleetgym.core.errors import UserError, unknown
from fleetgym.envs import suite
from fleetgym.envs.suite import EnvSuite

if TYPE_CHECKING:
    from fleetgym.benchmarks.fleet_presets import Preset

CAMERA = "table"
"""What a policy that sees looks through in Meta-World: one fixed view of the whole table, the same in all tasks."""
PROPRIOCEPTION = 4
"""So many of Meta-World's numbers a policy that sees still has: position of the hand [3], opening of the gripper."""


@dataclass(frozen=True)
class Place:
    """Something that a policy is evaluated in.

    Attributes:
        name: What the record calls it; places of one name share the episodes.
        task: The task that the policy is told it is on.
        made: The task that is made; mostly the same.
        options: More arguments of the environment.
    """

    name: str
    task: str
    made: str
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class DataSet:
    """Demonstrations to collect.

    Attributes:
        name: Of the folder.
        task: Its task.
        number: How many are wanted.
        first_seed: Of the first episode, within those of a training seed.
        options: More arguments of the environment.
    """

    name: str
    task: str
    number: int
    first_seed: int = 0
    options: tuple[tuple[str, Any], ...] = ()


class Sight(gym.ObservationWrapper):
    """Leaves of Meta-World's numbers only the first :data:`PROPRIOCEPTION`, and the one-hot behind them.

    Args:
        env: An environment of :func:`World.make` with pictures.
        tasks: Length of the one-hot.
    """

    def __init__(self, env: gym.Env, tasks: int) -> None:
        super().__init__(env)
        whole = env.observation_space["state"]
        size = whole.shape[0]
        self.kept = np.r_[:PROPRIOCEPTION, size - tasks : size]
        state = gym.spaces.Box(whole.low[self.kept], whole.high[self.kept], dtype=whole.dtype)
        self.observation_space = gym.spaces.Dict({**env.observation_space.spaces, "state": state})

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Cuts ``state``."""
        return {**observation, "state": observation["state"][self.kept]}


class Thinned(gym.ObservationWrapper):
    """Keeps so many points of a cloud, evenly chosen.

    Args:
        env: An environment whose observations map ``points`` to [4, P].
        points: How many to keep.

    Raises:
        UserError: More than there are.
    """

    def __init__(self, env: gym.Env, points: int) -> None:
        super().__init__(env)
        whole = env.observation_space["points"]
        if points > whole.shape[1]:
            raise UserError(f"points={points}: the cloud has {whole.shape[1]}; use so many at most")
        self.kept = np.linspace(0, whole.shape[1] - 1, points).round().astype(int)
        thin = gym.spaces.Box(whole.low[:, self.kept], whole.high[:, self.kept], dtype=whole.dtype)
        self.observation_space = gym.spaces.Dict({**env.observation_space.spaces, "points": thin})

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Thins ``points``."""
        return {**observation, "points": observation["points"][:, self.kept]}


class Pictured(gym.ObservationWrapper):
    """Calls the colours of one camera ``pixels`` and leaves its depth out.

    Args:
        env: An environment whose observations have ``state`` and that camera.
        camera: Its name.
    """

    def __init__(self, env: gym.Env, camera: str) -> None:
        super().__init__(env)
        self.camera = camera
        whole = env.observation_space
        self.observation_space = gym.spaces.Dict({"state": whole["state"], "pixels": whole[camera]})

    def observation(self, observation: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Picks."""
        return {"state": observation["state"], "pixels": observation[self.camera]}


class Told(gym.ObservationWrapper):
    """Appends a one-hot of what the policy is told: here it may be another task than the one that is played.

    Args:
        env: An environment with vectors as observations, or with mappings, whose ``state`` is meant.
        place: Of the one.
        tasks: Length of the one-hot.
        kept: Numbers kept of the vector.
    """

    def __init__(self, env: gym.Env, place: int, tasks: int, kept: int | None = None) -> None:
        super().__init__(env)
        self.one_hot = np.zeros(tasks)
        self.one_hot[place] = 1.0
        self.kept = slice(kept)
        space = env.observation_space
        self.mapped = isinstance(space, gym.spaces.Dict)
        box = space["state"] if self.mapped else space
        low = np.concatenate([box.low[self.kept], np.zeros(tasks)])
        told = gym.spaces.Box(low, np.concatenate([box.high[self.kept], np.ones(tasks)]), dtype=box.dtype)
        self.observation_space = gym.spaces.Dict({**space.spaces, "state": told}) if self.mapped else told

    def observation(self, observation: Any) -> Any:
        """Appends the one-hot."""
        if self.mapped:
            return {**observation, "state": np.concatenate([observation["state"][self.kept], self.one_hot])}
        return np.concatenate([observation[self.kept], self.one_hot])


class World:
    """What the suites share.

    Attributes:
        title: For pages.
        one: What a robot's demonstrations are of, for pages.
        kinds: Kinds of observations that policies may have here.
        differences: Of the observation's numbers; see ``RecurrentPolicy``.
        proprioception: So many of the numbers a policy that sees still has.
        camera: What a policy that sees pictures looks through.
        numbers: What these numbers are, for pages.
    """

    name = "meta_world"
    title = "Meta-World"
    one = "one task"
    kinds: tuple[str, ...] = ("state", "image")
    differences: tuple[tuple[int, int, int], ...] = META_WORLD_DIFFERENCES
    proprioception = PROPRIOCEPTION
    camera = CAMERA
    numbers = f"{PROPRIOCEPTION} numbers: the position of the hand and the opening of the gripper"

    @property
    def suite(self) -> EnvSuite:
        """The suite."""
        return suite(self.name)

    def check(self, preset: Preset) -> None:
        """Says before any work what cannot be here.

        Raises:
            UserError: A kind of observation that this suite's policies do not have.
        """
        if preset.observation not in self.kinds:
            raise unknown(f"observation in {self.title}", preset.observation, self.kinds)

    def make(self, preset: Preset, task: str, **options: Any) -> gym.Env:
        """The environment of a task as a preset observes it.

        Args:
            preset: Where its policies see, observations are mappings of ``state``, the numbers of the suite, and
                ``pixels``, [S, S, 3] uint8.
            task: The task.
            **options: Of ``EnvSuite.make``.

        Raises:
            UserError: See ``EnvSuite.make``; or pictures where nothing can draw them.
        """
        if not preset.sees:
            return self.suite.make(task, **options)
        size = (preset.image_size, preset.image_size)
        made = self.suite.make(task, "rgb_array", camera_name=CAMERA, render_size=size, **options)
        return gym.wrappers.AddRenderObservation(made, render_only=False)

    def evaluation(self, preset: Preset, place: Place) -> gym.Env:
        """The environment of a place on held-out goals, as a preset's policies observe it.

        Raises:
            UserError: See :meth:`make`.
        """
        made = self.make(preset, place.made, goals="held_out", task_set=preset.task_names, **dict(place.options))
        return Sight(made, len(preset.task_names)) if preset.sees else made

    def filmed(self, preset: Preset, place: Place) -> gym.Env:
        """The environment of a place with pictures to film: those that the policy sees, if it does."""
        if preset.sees:
            return self.evaluation(preset, place)
        options = {"goals": "held_out", "width": 192, "height": 192, **dict(place.options)}
        return self.suite.make(place.made, "rgb_array", task_set=preset.task_names, **options)

    def datasets(self, preset: Preset) -> list[DataSet]:
        """What to collect: for each task the demonstrations of all its robots."""
        return [DataSet(task, task, preset.robots_per_task * preset.demonstrations) for task in preset.task_names]

    def share(self, preset: Preset, task: str, holder: int) -> tuple[str, slice]:
        """Which demonstrations the ``holder``-th robot of a task has: the data set's name, and a slice of it."""
        return task, slice(holder * preset.demonstrations, (holder + 1) * preset.demonstrations)

    def places(self, preset: Preset, tasks: Sequence[str], holder: int | None = None) -> list[Place]:
        """Where policies are evaluated on tasks: as the ``holder``-th robot of each meets them, or as any of them."""
        return [Place(task, task, task) for task in tasks]

    def further(self, preset: Preset) -> list[Place]:
        """Where policies are evaluated besides: what no robot has met."""
        return []


class FleetTools(World):
    """fleet-tools: each robot has a tool of its own."""

    name = "fleet_tools"
    title = "fleet-tools"
    one = "one task with a tool of its own"
    kinds = ("state", "image", "points")
    differences = FLEET_TOOLS_DIFFERENCES
    proprioception = 15
    camera = "overhead"
    numbers = "15 numbers of hand and arm"

    def make(self, preset: Preset, task: str, **options: Any) -> gym.Env:
        """See :class:`World`; clouds are thinned to the preset's number of points, pictures are by ``overhead``."""
        if preset.observation == "state":
            return self.suite.make(task, **options)
        if preset.observation == "image":
            seen = {"observation": ("state", "overhead"), "image_size": preset.image_size}
            return Pictured(self.suite.make(task, **seen, **options), "overhead")
        return Thinned(self.suite.make(task, observation=("state", "points"), **options), preset.points)

    def check(self, preset: Preset) -> None:
        """See :class:`World`; a fleet has one robot a tool and task.

        Raises:
            UserError: Another kind of observation than ``state``, or more robots of a task than tools to train with.
        """
        from fleetgym.envs.fleet_tools.instances import TRAIN

        super().check(preset)
        if preset.robots_per_task > len(TRAIN):
            raise UserError(
                f"robots_per_task={preset.robots_per_task}: each robot of a task has a tool of its own, and "
                f"{len(TRAIN)} are for training; use {len(TRAIN)} at most"
            )

    def evaluation(self, preset: Preset, place: Place) -> gym.Env:
        """See :class:`World`."""
        return self._told(preset, place, self.make(preset, place.made, goals="held_out", **dict(place.options)))

    def filmed(self, preset: Preset, place: Place) -> gym.Env:
        """See :class:`World`."""
        options = {"goals": "held_out", "width": 192, "height": 192, "render_mode": "rgb_array", **dict(place.options)}
        return self._told(preset, place, self.make(preset, place.made, **options))

    def _told(self, preset: Preset, place: Place, env: gym.Env) -> gym.Env:
        kept = self.proprioception if preset.sees else None
        return Told(env, preset.task_names.index(place.task), len(preset.task_names), kept)

    def datasets(self, preset: Preset) -> list[DataSet]:
        """One a task and tool, each with poses of its own."""
        return [
            DataSet(f"{task}-tool{tool}", task, preset.demonstrations, 1000 * tool, (("tool", tool),))
            for task in preset.task_names
            for tool in range(preset.robots_per_task)
        ]

    def share(self, preset: Preset, task: str, holder: int) -> tuple[str, slice]:
        """See :class:`World`."""
        return f"{task}-tool{holder}", slice(0, preset.demonstrations)

    def places(self, preset: Preset, tasks: Sequence[str], holder: int | None = None) -> list[Place]:
        """Each task with each of the fleet's tools, or with the holder's."""
        tools = range(preset.robots_per_task) if holder is None else (holder,)
        return [Place(task, task, task, (("tool", tool),)) for task in tasks for tool in tools]

    def further(self, preset: Preset) -> list[Place]:
        """Tools and objects that are held out, and the wrong tool for the right job."""
        from fleetgym.envs.fleet_tools.mechanisms import ROLES, USE

        held_out = (("tools", "held_out"), ("objects", "held_out"))
        places = [Place(f"{task}, new tools", task, task, held_out) for task in preset.task_names]
        own = {task: ROLES[task] for task in preset.task_names}
        for made, (tool, thing) in ROLES.items():
            # A cross task is told as the one with the same object and the tool that is meant for it.
            meant = next((task for task, role in own.items() if role == (USE[thing], thing)), None)
            if made not in own and meant is not None and tool != USE[thing]:
                places.append(Place(made, meant, made))
        return places


WORLDS: dict[str, World] = {"meta_world": World(), "fleet_tools": FleetTools()}
