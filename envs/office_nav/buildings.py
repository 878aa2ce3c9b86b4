"""Which colour each office of a building has, and which buildings there are.

A building is made from its task id alone: ``building(task_id, layout)`` is the same everywhere. The recipe is that of
the released environment, so that our first 200 buildings of the standard layout are the released ones.
"""

from __future__ import annotations

import functools

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav.layout import COLOURS, GOAL, Layout
from fleetgym.envs.office_nav.layout import layout as layout_named


def building(task_id: int, layout: Layout | str = "standard", single_goal: bool = False) -> np.ndarray:
    """The colours of a building's offices, drawn from its task id.

    Every colour is on one office at least, the others are drawn uniformly, and all are shuffled. With ``single_goal``
    exactly one office is blue, and the others are drawn from the remaining colours in the same way.

    Args:
        task_id: From 0 to 2**32 - 1.
        layout: The floor plan or its name.
        single_goal: Whether exactly one office is blue.

    Returns:
        Indices into ``COLOURS``, int8 [n], office by office (row by row).

    Raises:
        UserError: An impossible task id or an unknown layout.
    """
    layout = layout_named(layout) if isinstance(layout, str) else layout
    if isinstance(task_id, bool) or not isinstance(task_id, (int, np.integer)) or not 0 <= task_id < 1 << 32:
        raise UserError(f"task id {task_id!r}: it is an integer from 0 to {(1 << 32) - 1}")
    return _draw(np.random.RandomState(int(task_id)), layout, single_goal)


def _draw(random: np.random.RandomState, layout: Layout, single_goal: bool) -> np.ndarray:
    others = layout.offices - len(COLOURS)
    # One draw after the other and a shuffled list: this consumes the generator as the released code does.
    if single_goal:
        drawn = [1 + int(random.randint(len(COLOURS) - 1)) for _ in range(others)]
    else:
        drawn = [int(random.choice(len(COLOURS))) for _ in range(others)]
    offices = [*range(len(COLOURS)), *drawn]
    random.shuffle(offices)
    # The released code counts offices column by column.
    return np.array(offices, np.int8).reshape(layout.columns, layout.rows).T.ravel().copy()


@functools.cache
def buildings(number: int, layout: str = "standard", single_goal: bool = False, distinct: bool = True) -> np.ndarray:
    """The buildings with the task ids 0 to ``number - 1``.

    Args:
        number: How many.
        layout: The floor plan's name.
        single_goal: Whether exactly one office is blue.
        distinct: Draw a building again that equals one of a smaller id, so that splits by id are disjoint as buildings.
            (This happens to none of the ids in use; the released table does without.)

    Returns:
        int8 [number, n], read-only.
    """
    plan = layout_named(layout)
    table, seen = np.empty((number, plan.offices), np.int8), set()
    for task_id in range(number):
        random = np.random.RandomState(task_id)
        colours = _draw(random, plan, single_goal)
        while distinct and colours.tobytes() in seen:
            colours = _draw(random, plan, single_goal)
        seen.add(colours.tobytes())
        table[task_id] = colours
    table.flags.writeable = False
    return table


def sign_goals(colours: np.ndarray, layout: Layout) -> np.ndarray:
    """The office that the sign names: the nearest blue one by its shortest path, on a tie the first.

    Args:
        colours: int8 [..., n].
        layout: The floor plan.

    Returns:
        int64 [...].
    """
    far = layout.distances.max() + 1
    return np.where(np.asarray(colours) == GOAL, layout.distances, far).argmin(-1)
