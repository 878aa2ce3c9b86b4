"""The fifty tasks: names, instructions, splits. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from fleetgym.core.errors import unknown
from fleetgym.envs.suite import resolve_task_set as resolve

#: Steps after which an episode is truncated.
HORIZON = 500

#: What each task asks for, in one sentence.
INSTRUCTIONS: dict[str, str] = {
    "assembly-v3": "Put the nut over the peg.",
    "basketball-v3": "Dunk the ball into the hoop.",
    "bin-picking-v3": "Move the cube from one bin to the other.",
    "box-close-v3": "Put the lid on the box.",
    "button-press-topdown-v3": "Press the button down from above.",
    "button-press-topdown-wall-v3": "Press the button behind the wall down from above.",
    "button-press-v3": "Push the button in from the front.",
    "button-press-wall-v3": "Reach over the wall and push the button in.",
    "coffee-button-v3": "Press the button of the coffee machine.",
    "coffee-pull-v3": "Pull the mug away from the coffee machine.",
    "coffee-push-v3": "Push the mug under the coffee machine.",
    "dial-turn-v3": "Turn the dial.",
    "disassemble-v3": "Lift the nut off the peg.",
    "door-close-v3": "Close the door.",
    "door-lock-v3": "Turn the knob to lock the door.",
    "door-open-v3": "Open the door.",
    "door-unlock-v3": "Turn the knob to unlock the door.",
    "drawer-close-v3": "Close the drawer.",
    "drawer-open-v3": "Open the drawer.",
    "faucet-close-v3": "Turn the faucet off.",
    "faucet-open-v3": "Turn the faucet on.",
    "hammer-v3": "Drive the nail in with the hammer.",
    "hand-insert-v3": "Put the gripper into the hole.",
    "handle-press-side-v3": "Press the handle down from the side.",
    "handle-press-v3": "Press the handle down.",
    "handle-pull-side-v3": "Pull the handle up from the side.",
    "handle-pull-v3": "Pull the handle up.",
    "lever-pull-v3": "Pull the lever up.",
    "peg-insert-side-v3": "Slide the peg into the hole from the side.",
    "peg-unplug-side-v3": "Pull the peg out of its socket sideways.",
    "pick-out-of-hole-v3": "Pick the puck up out of the hole.",
    "pick-place-v3": "Pick the puck up and bring it to the goal.",
    "pick-place-wall-v3": "Carry the puck over the wall to the goal.",
    "plate-slide-back-side-v3": "Slide the plate out of the cabinet sideways.",
    "plate-slide-back-v3": "Slide the plate back out of the cabinet.",
    "plate-slide-side-v3": "Slide the plate into the cabinet from the side.",
    "plate-slide-v3": "Slide the plate into the cabinet.",
    "push-back-v3": "Pull the puck back to the goal.",
    "push-v3": "Push the puck to the goal.",
    "push-wall-v3": "Push the puck around the wall to the goal.",
    "reach-v3": "Move the gripper to the goal.",
    "reach-wall-v3": "Move the gripper over the wall to the goal.",
    "shelf-place-v3": "Put the puck on the shelf.",
    "soccer-v3": "Push the ball into the soccer goal.",
    "stick-pull-v3": "Hook the thermos with the stick and pull it.",
    "stick-push-v3": "Take the stick and push the thermos with it.",
    "sweep-into-v3": "Sweep the puck into the hole.",
    "sweep-v3": "Sweep the puck off the table.",
    "window-close-v3": "Slide the window shut.",
    "window-open-v3": "Slide the window open.",
}

#: All task names, in alphabetical order: index i of the one-hot of "mt50" is the i-th of them.
TASKS: tuple[str, ...] = tuple(INSTRUCTIONS)

SPLITS: dict[str, tuple[str, ...]] = {
    "quick": ("reach-v3", "drawer-open-v3", "window-open-v3", "door-close-v3", "button-press-topdown-v3"),
    "mt10": (
        "reach-v3",
        "push-v3",
        "pick-place-v3",
        "door-open-v3",
        "drawer-open-v3",
        "drawer-close-v3",
        "button-press-topdown-v3",
        "peg-insert-side-v3",
        "window-open-v3",
        "window-close-v3",
    ),
    "mt50": TASKS,
}


def check_task(task: str) -> str:
    """Returns ``task`` if there is such a task.

    Raises:
        UserError: There is none; the message holds the three nearest names.
    """
    if task not in INSTRUCTIONS:
        raise unknown("Meta-World task", task, TASKS)
    return task


def resolve_task_set(task_set: str | Sequence[str]) -> tuple[str, ...]:
    """See :func:`fleetgym.envs.suite.resolve_task_set`."""
    return resolve("Meta-World", task_set, SPLITS, check_task)
