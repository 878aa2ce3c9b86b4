"""The tasks' names, what they ask for, and how they are split. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from fleetgym.core.errors import unknown
from fleetgym.envs.suite import resolve_task_set as resolve

#: Control steps after which an episode is truncated, and seconds of a control step.
HORIZON = 120
CONTROL_STEP = 0.08

#: Task -> what it asks for.
INSTRUCTIONS: dict[str, str] = {
    "Hammer": "Drive the pin into its block with the hammer.",
    "Wrench": "Turn the nut clockwise with the wrench.",
    "Spatula": "Lift the patty off the table with the spatula.",
    "Knife": "Push the two pieces apart with the knife.",
    "WrenchForHammer": "Drive the pin into its block with the wrench.",
    "SpatulaForHammer": "Drive the pin into its block with the spatula.",
    "Scoop": "Take the ball out of the tray with the scoop.",
    "Whisk": "Stir the ball once around the bowl with the whisk.",
}
TASKS: tuple[str, ...] = tuple(INSTRUCTIONS)
#: Arms: the whole Panda, or its hand alone.
ARMS = ("panda", "hand")

SPLITS: dict[str, tuple[str, ...]] = {
    "tools": ("Hammer", "Wrench", "Spatula", "Knife"),
    "cross": ("WrenchForHammer", "SpatulaForHammer"),
    "kitchen": ("Scoop", "Whisk"),
    "all": TASKS,
}


def check_task(task: str) -> str:
    """Returns ``task`` if there is such a task.

    Raises:
        UserError: There is none; the message holds the three nearest names.
    """
    if task not in INSTRUCTIONS:
        raise unknown("fleet-tools task", task, TASKS)
    return task


def env_id(task: str, arm: str = "panda") -> str:
    """The Gymnasium id of a task, such as ``FleetTools/Hammer-v0``, or ``FleetTools/Hammer-Hand-v0``."""
    return f"FleetTools/{task}-v0" if arm == "panda" else f"FleetTools/{task}-Hand-v0"


def resolve_task_set(task_set: str | Sequence[str]) -> tuple[str, ...]:
    """See :func:`fleetgym.envs.suite.resolve_task_set`."""
    return resolve("fleet-tools", task_set, SPLITS, check_task)
