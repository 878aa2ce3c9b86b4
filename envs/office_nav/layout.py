"""The three floor plans of OfficeNav: where walls, doors, offices and the sign are.

Source: E. Z. Liu et al., "Simple Embodied Language Learning as a Byproduct of Meta-Reinforcement Learning", ICML 2023,
and its released environment (``MapMazeEnv``, ``TallMapMazeEnv``, ``TallSkinnyMapMazeEnv``).

Coordinates are (x, y) with x to the right and y downwards, in cells; arrays over cells are indexed [y, x]. Directions
are those of MiniGrid: 0 east, 1 south, 2 west, 3 north. Office ``k`` is in row ``k // columns`` (0 at the top) and
column ``k % columns`` (0 at the left), and door ``k`` is its door.
"""

from __future__ import annotations

import functools
from collections import deque
from dataclasses import dataclass

import numpy as np

from fleetgym.core.errors import unknown

#: Colours of offices; a building holds indices into this tuple.
COLOURS = ("blue", "green", "grey", "purple", "red", "yellow")
#: The colour to be found.
GOAL = 0
#: Steps along x and y of the directions east, south, west, north.
DIRECTIONS = np.array([(1, 0), (0, 1), (-1, 0), (0, -1)])
#: An episode's steps in the paper.
HORIZON = 30


@dataclass(frozen=True, eq=False)
class Layout:
    """One floor plan.

    Attributes:
        name: Its name in ``LAYOUTS``.
        width: Cells along x, outer walls included.
        height: Cells along y.
        walls: Where walls are, bool [height, width]; doors and offices are no walls.
        office_xy: The cell of each office, int64 [n, 2].
        door_xy: The cell of each office's door, int64 [n, 2].
        sign_xy: The cell on which the sign is seen.
        start: Where every episode begins: x, y and direction.
        rows: Rows of offices.
        columns: Columns of offices.
    """

    name: str
    width: int
    height: int
    walls: np.ndarray
    office_xy: np.ndarray
    door_xy: np.ndarray
    sign_xy: tuple[int, int]
    start: tuple[int, int, int]
    rows: int
    columns: int

    @property
    def offices(self) -> int:
        """How many offices there are."""
        return self.rows * self.columns

    @functools.cached_property
    def distances(self) -> np.ndarray:
        """Actions from the start into each office by a shortest path, its door opened on the way; int64 [n]."""
        found = np.array([self._search(tuple(office), k) for k, office in enumerate(self.office_xy)])
        found.flags.writeable = False
        return found

    @functools.cached_property
    def sign_distance(self) -> int:
        """Actions from the start onto the sign's cell by a shortest path."""
        return self._search(self.sign_xy, -1)

    def _search(self, target: tuple[int, int], door: int) -> int:
        # Breadth first over (x, y, direction, whether the one door that matters is open).
        doors = {tuple(xy): k for k, xy in enumerate(self.door_xy.tolist())}
        first = (*self.start, False)
        queue, seen = deque([(first, 0)]), {first}
        while queue:
            (x, y, direction, opened), steps = queue.popleft()
            if (x, y) == tuple(target):
                return steps
            ahead = (x + int(DIRECTIONS[direction, 0]), y + int(DIRECTIONS[direction, 1]))
            following = [(x, y, (direction - 1) % 4, opened), (x, y, (direction + 1) % 4, opened)]
            which = doors.get(ahead)
            if which is not None and which == door:
                following.append((x, y, direction, not opened))
            if not self.walls[ahead[1], ahead[0]] and (which is None or (which == door and opened)):
                following.append((*ahead, direction, opened))
            for state in following:
                if state not in seen:
                    seen.add(state)
                    queue.append((state, steps + 1))
        raise RuntimeError(f"layout {self.name!r}: no way from the start to {target}")


def _layout(name: str, height: int, columns: int, row_y: tuple[int, ...], corridor: int) -> Layout:
    # Two columns of offices share a hallway: office, door, hallway, door, office, and a wall before the next pair.
    width = 3 * columns + 1
    walls = np.ones((height, width), bool)
    office_x = [6 * (c // 2) + (1 if c % 2 == 0 else 5) for c in range(columns)]
    door_x = [6 * (c // 2) + (2 if c % 2 == 0 else 4) for c in range(columns)]
    walls[corridor, 1 : width - 1] = False
    for pair in range(columns // 2):
        walls[1:corridor, 6 * pair + 3] = False
    sign = (6, corridor + 2)
    walls[corridor : sign[1] + 1, sign[0]] = False
    office_xy = np.array([(x, y) for y in row_y for x in office_x])
    door_xy = np.array([(x, y) for y in row_y for x in door_x])
    for x, y in (*office_xy, *door_xy):
        walls[y, x] = False
    for array in (walls, office_xy, door_xy):
        array.flags.writeable = False
    return Layout(
        name, width, height, walls, office_xy, door_xy, sign, (1, corridor, 0), rows=len(row_y), columns=columns
    )


#: Every floor plan by name; ``standard`` is the paper's.
LAYOUTS: dict[str, Layout] = {
    "standard": _layout("standard", 11, 4, (1, 3, 5), 7),
    "tall": _layout("tall", 14, 6, (1, 4, 7), 10),
    "tall_skinny": _layout("tall_skinny", 14, 4, (1, 4, 7), 10),
}


def layout(name: str) -> Layout:
    """The floor plan of that name.

    Raises:
        UserError: Unknown name; the message holds those that exist.
    """
    if name not in LAYOUTS:
        raise unknown("layout", name, LAYOUTS)
    return LAYOUTS[name]
