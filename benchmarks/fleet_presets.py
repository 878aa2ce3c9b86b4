"""What the fleet-merging benchmark trains and measures: presets, the partition of tasks over robots, methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fleetgym.agents.networks import CELLS, convolved
from fleetgym.benchmarks.fleet_worlds import WORLDS, World
from fleetgym.benchmarks.overrides import changes
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.render import NO_GL_HELP, choose_gl
from fleetgym.core.seeding import generator
from fleetgym.merging import MATCHERS

OPTIMIZERS = ("robot", "server")
INITIALS = ("different", "same")
OBSERVATIONS = ("state", "image", "points")
ALL = "all"


@dataclass(frozen=True)
class Preset:
    """What is trained and measured. The defaults are those of ``quick``."""

    suite: str = "meta_world"
    """Suite of the tasks: meta_world, or fleet_tools, where each robot of a task has a tool of its own."""
    tasks: str = "quick"
    """Task set of the suite, or task names with commas between; each task has its own robots."""
    robots_per_task: int = 4
    """Robots that have a task (but neither demonstrations nor initial weights of it in common)."""
    tasks_per_robot: int | str = 1
    """Tasks that a robot has: 1, several, which are dealt at random by the seed, or ``all``. There are as many robots
    as it takes for each task to be on ``robots_per_task`` of them; so every partition has the same demonstrations."""
    demonstrations: int = 20
    """Successful demonstrations that a robot has of each of its tasks."""
    noise: float = 0.1
    """Standard deviation of the noise on the expert's executed actions."""
    observation: str = "state"
    """What a policy sees besides the task's one-hot: ``state``, the suite's numbers and three offsets made of them,
    ``image``, a picture by one camera and a few numbers of hand and arm, or ``points`` (fleet-tools), a cloud of points
    of tool and object in the hand's frame and the same few numbers."""
    image_size: int = 48
    """Pixels a side of the picture."""
    points: int = 128
    """Points of the cloud, half of them of the tool."""
    cell: str = "gru"
    """Core of the policy: gru, lstm, rnn or mlp."""
    hidden: int = 64
    """Width of every hidden layer."""
    layers: int = 1
    """Layers of the core."""
    batch_size: int = 2
    """Episodes a robot draws for a gradient step, times the number of its tasks; joint training draws as many as the
    whole fleet."""
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
    proximal: float = 0.01
    """FedProx's mu, of the row ``fedprox_rounds``."""
    matcher: str = "frank_wolfe"
    """How fleet_merge aligns: frank_wolfe, lap or sinkhorn."""
    episodes: int = 20
    """Evaluation episodes of each task."""
    max_steps: int = 500
    """Steps of an evaluation episode, at most; Meta-World counts success within 500, fleet-tools within 120."""
    curve_points: int = 6
    """How often the merged policy is evaluated during training."""
    curve_episodes: int = 5
    """Episodes of each task at a point of the curve."""
    line_points: int = 5
    """Places on the line between two robots' weights where success is measured, the ends included; at most 11."""

    def __post_init__(self) -> None:
        known = {
            "suite": WORLDS,
            "optimizer": OPTIMIZERS,
            "initial": INITIALS,
            "cell": CELLS,
            "observation": OBSERVATIONS,
        }
        for name, options in known.items():
            if getattr(self, name) not in options:
                raise unknown(name, getattr(self, name), options)
        convolved(self.image_size)
        least = dict.fromkeys(("warmup", "rounds", "noise", "proximal"), 0)
        least |= dict.fromkeys(
            ("robots_per_task", "demonstrations", "hidden", "layers", "batch_size", "local_steps"), 1
        )
        least |= {"points": 2} | dict.fromkeys(("episodes", "max_steps", "curve_points", "curve_episodes"), 1)
        for name, smallest in least.items():
            if not getattr(self, name) >= smallest:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least {smallest}")
        if not self.learning_rate > 0:
            raise UserError(f"learning_rate={self.learning_rate}: it must be positive")
        if not 2 <= self.line_points <= 11:
            raise UserError(f"line_points={self.line_points}: from 2, the ends alone, to 11 are possible")
        if self.tasks_per_robot != ALL and (isinstance(self.tasks_per_robot, str) or self.tasks_per_robot < 1):
            raise UserError(
                f"tasks_per_robot={self.tasks_per_robot}: a number of tasks, at least 1, or {ALL} is wanted"
            )
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
        return self.world.suite.task_set(names if len(names) > 1 else names[0])

    @property
    def world(self) -> World:
        """What the benchmark must know of the suite."""
        return WORLDS[self.suite]

    @property
    def tasks_each(self) -> int:
        """How many tasks a robot has, as a number."""
        return len(self.task_names) if self.tasks_per_robot == ALL else int(self.tasks_per_robot)

    @property
    def robots(self) -> int:
        """How many robots there are.

        Raises:
            UserError: Unknown tasks, or a partition that cannot be: more tasks a robot than there are, places that do
                not divide among the robots, or fewer than two robots.
        """
        tasks, each = len(self.task_names), self.tasks_each
        given = f"tasks_per_robot={self.tasks_per_robot}"
        if each > tasks:
            raise UserError(f"{given}: there are {tasks} tasks in {self.tasks!r}; use {tasks} at most, or {ALL}")
        places = tasks * self.robots_per_task
        if places % each:
            fine = [n for n in range(1, tasks + 1) if places % n == 0]
            raise UserError(
                f"{given} robots_per_task={self.robots_per_task}: {tasks} tasks on {self.robots_per_task} robots each "
                f"are {places} places, which do not divide by {each}; tasks_per_robot may be "
                f"{', '.join(map(str, fine))}, or choose another robots_per_task"
            )
        if places // each < 2:
            raise UserError(
                f"{given} robots_per_task={self.robots_per_task}: that is one robot, and a fleet has at least two; "
                f"use robots_per_task={max(2, self.robots_per_task + 1)}"
            )
        return places // each

    @property
    def steps(self) -> int:
        """Gradient steps of every method."""
        return self.warmup + self.rounds * self.local_steps

    @property
    def sees(self) -> bool:
        """Whether the policies see pictures or points."""
        return self.observation != "state"

    def check(self) -> None:
        """Says before any work what only other parts know to be wrong.

        Raises:
            UserError: Unknown tasks or matcher, a partition that cannot be, or pictures where nothing can draw them.
        """
        self.robots  # noqa: B018
        self.world.check(self)
        if self.matcher not in MATCHERS:
            raise unknown("matcher", self.matcher, MATCHERS.names())
        if self.observation == "image" and choose_gl() == "disable":
            raise UserError(f"observation=image: cannot draw pictures: {NO_GL_HELP}; or use observation=state")


def partition(preset: Preset, seed: int) -> list[tuple[int, ...]]:
    """Which tasks each robot has.

    Every task is on ``robots_per_task`` robots, and no robot has one twice. One task a robot, or all, leaves nothing
    to chance; several are dealt from shuffled packs of all tasks, one pack after the other.

    Args:
        preset: Says how many.
        seed: Seed of the dealing.

    Returns:
        For each robot the places of its tasks in ``preset.task_names``, ascending; robots in ascending order.

    Raises:
        UserError: A partition that cannot be; see ``Preset.robots``.
    """
    robots, each = preset.robots, preset.tasks_each
    rng = generator("fleet_partition", seed)
    hands: list[tuple[int, ...]] = []
    hand: list[int] = []
    for _ in range(preset.robots_per_task):
        pack = rng.permutation(len(preset.task_names)).tolist()
        if hand:  # begun with the last pack: it is filled with tasks that it lacks
            rest = [task for task in pack if task not in hand][: each - len(hand)]
            pack = [*rest, *(task for task in pack if task not in rest)]
        for task in pack:
            hand.append(task)
            if len(hand) == each:
                hands.append(tuple(sorted(hand)))
                hand = []
    assert len(hands) == robots and not hand
    return sorted(hands)


PRESETS = {
    "quick": Preset(),
    "quick_image": Preset(
        observation="image",
        tasks="button-press-topdown-v3,drawer-open-v3,window-close-v3",
        robots_per_task=2,
        demonstrations=10,
        rounds=40,
        max_steps=150,
        curve_points=2,
        curve_episodes=2,
    ),
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
    "tools_quick": Preset(
        suite="fleet_tools",
        tasks="Hammer,Knife",
        robots_per_task=3,
        demonstrations=10,
        noise=0.04,
        rounds=30,
        max_steps=120,
        curve_points=2,
        curve_episodes=3,
    ),
    "tools_cpu": Preset(
        suite="fleet_tools",
        tasks="tools",
        robots_per_task=5,
        demonstrations=20,
        noise=0.04,
        rounds=150,
        episodes=50,
        max_steps=120,
        curve_episodes=10,
    ),
}
"""Those that begin with ``tools_`` are of ``fleetgym bench fleet_tools``, where they are named without it."""

METHODS = {
    "alone_own": "Each robot alone, own task",
    "alone_all": "Each robot alone, all tasks",
    "average_rounds": "Naive averaging in rounds",
    "fleet_merge_once": "fleet_merge, one shot",
    "fleet_merge_rounds": "fleet_merge in rounds",
    "joint": "Joint training on everybody's data",
}
EXTRA_METHODS = {
    "average_norms_rounds": "Averaging with norms restored, no alignment",
    "align_rounds": "Alignment, norms not restored",
    "fedavg_rounds": "Naive averaging, an optimiser a robot",
    "fedprox_rounds": "FedProx, an optimiser a robot",
}
"""fleet_merge taken apart, averaging as it usually is, and FedProx; filled when asked for by name."""
ALL_METHODS = {**METHODS, **EXTRA_METHODS}
MERGES: dict[str, tuple[str, dict[str, Any]]] = {
    "average_rounds": ("average", {}),
    "fleet_merge_rounds": ("fleet_merge", {}),
    "average_norms_rounds": ("average", {"norms": "auto"}),
    "align_rounds": ("fleet_merge", {"norms": False}),
    "fedavg_rounds": ("average", {}),
    "fedprox_rounds": ("average", {}),
}
"""The merger and its options of each method that merges in rounds."""
OWN_OPTIMIZER = ("fedavg_rounds", "fedprox_rounds")
"""Methods in which every robot has its own Adam, whatever the preset says."""
JOBS = {
    "alone": ("alone_own", "alone_all", "fleet_merge_once"),
    "average_rounds": ("average_rounds",),
    "fleet_merge_rounds": ("fleet_merge_rounds",),
    "joint": ("joint",),
    **{method: (method,) for method in EXTRA_METHODS},
}
"""The rows of each training; one training serves three."""


def label(method: str, preset: Preset) -> str:
    """The readable name of a row."""
    text = ALL_METHODS[method]
    return text.replace("own task", "own tasks") if preset.tasks_per_robot != 1 else text


def preset_from(name: str, overrides: Sequence[str] = ()) -> Preset:
    """A preset with changes.

    Args:
        name: One of ``PRESETS``.
        overrides: Texts ``field=value``. Besides the fields there is ``steps``, gradient steps of every method, which
            sets ``rounds``.

    Raises:
        UserError: Unknown preset, field or value; ``steps`` that warm-up and local steps do not add up to.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    preset = PRESETS[name]
    defaults = {field.name: getattr(preset, field.name) for field in dataclasses.fields(Preset)}
    defaults["steps"] = preset.warmup + preset.rounds * preset.local_steps
    changed = changes(overrides, defaults, words={"tasks_per_robot": (ALL,)})
    steps = changed.pop("steps", None)
    if steps is not None and "rounds" in changed:
        raise UserError(f"steps={steps} rounds={changed['rounds']}: steps set the rounds; leave one out")
    preset = dataclasses.replace(preset, **changed)
    if steps is None:
        return preset
    rounds, rest = divmod(steps - preset.warmup, preset.local_steps)
    if rest or rounds < 0:
        raise UserError(
            f"steps={steps}: {preset.warmup} steps of warm-up and rounds of {preset.local_steps} do not add up to it; "
            f"use {preset.warmup + max(0, rounds) * preset.local_steps}"
        )
    return dataclasses.replace(preset, rounds=rounds)
