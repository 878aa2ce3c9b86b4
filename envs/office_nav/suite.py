"""The suite of the OfficeNav variants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav.layout import HORIZON
from fleetgym.envs.suite import EnvSuite, Task

if TYPE_CHECKING:
    import gymnasium as gym

    from fleetgym.core.policy import Policy

_TEXT = "Find a blue office; the sign says in words where one is."
#: What is to be done in the variants of the 2D office, by id.
INSTRUCTIONS = {
    "OfficeNav-v0": _TEXT,
    "OfficeNav-Symbolic-v0": _TEXT,
    "OfficeNav-SingleGoal-v0": "Find the one blue office; the sign says in words where it is.",
    "OfficeNav-Tall-v0": _TEXT,
    "OfficeNav-TallSkinny-v0": _TEXT,
    "OfficeNav-Map-v0": "Find a blue office; the sign is a drawn floor plan.",
    "OfficeNav-Released-v0": _TEXT,
}
#: The id of the 3D office.
ID_3D = "OfficeNav3D-v0"
#: Episodes in a trial.
EPISODES = 2


def expert(task: str, episodes: int = 1, split: str = "train") -> Policy:
    """The oracle reader of a task: walks to the sign, reads it in the pixels, walks to the office that it names.

    Args:
        task: An id of the suite.
        episodes: Episodes of a trial that it plays one after the other, ``episode_start`` set at each: what it read in
            the first it remembers in the others. With 1 it reads the sign in every episode.
        split: Where the trials come from; the split ``layout`` has another floor plan.

    Returns:
        The policy. That of the 3D office plans its ways from where it is, so it has ``attach(env)`` to be called first.

    Raises:
        UserError: The task has no such split.
    """
    if task == ID_3D:
        from fleetgym.envs.office_nav.reference3d import OracleReader3D

        return OracleReader3D(episodes=episodes)
    from fleetgym.envs.office_nav.reference import OracleReader
    from fleetgym.envs.office_nav.variants import resolve_variant, tables

    worlds = tables(resolve_variant(task))
    plan = worlds.layouts[int(worlds.layout_of[worlds.split(split)])]
    return OracleReader(plan, episodes, worlds.variant.released)


def make_vec(tasks: Sequence[str], num_envs: int | None = None, **kwargs: Any) -> gym.vector.VectorEnv:
    """``EnvSuite.make_vec`` of the suite: environments of one task.

    Raises:
        UserError: More than one task.
    """
    if len(tasks) != 1:
        raise UserError(f"office_nav has vector environments of one task, not of {len(tasks)}: {', '.join(tasks)}")
    import gymnasium as gym

    return gym.make_vec(OFFICE_NAV.task(tasks[0]).env_id, num_envs=1 if num_envs is None else num_envs, **kwargs)


_SENTENCES = {**INSTRUCTIONS, ID_3D: "Find the blue box in one of four rooms; the sign next door says in which."}

OFFICE_NAV = EnvSuite(
    name="office_nav",
    entries=tuple(Task(name, name, sentence, HORIZON, episodes=EPISODES) for name, sentence in _SENTENCES.items()),
    splits={"all": tuple(_SENTENCES), "2d": tuple(INSTRUCTIONS), "3d": (ID_3D,), "quick": ("OfficeNav-Symbolic-v0",)},
    paper="Liu et al., Simple Embodied Language Learning as a Byproduct of Meta-Reinforcement Learning, ICML 2023",
    expert_function="fleetgym.envs.office_nav.suite:expert",
    vector_function="fleetgym.envs.office_nav.suite:make_vec",
    goals=("all",),
    opengl=False,
)
