"""The whole building from above, as pixels and as characters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fleetgym.envs.office_nav import kernels, tiles
from fleetgym.envs.office_nav.variants import MAX_OFFICES

if TYPE_CHECKING:
    from fleetgym.envs.office_nav.vector import Rows

#: Pixels of a cell.
SIZE = 24


def _cells(rows: Rows, row: int) -> tuple[np.ndarray, np.ndarray]:
    s = rows.state[:, row]
    codes = kernels.cell_codes(rows.tables.layouts[s[kernels.LAYOUT]])
    kinds = np.empty(kernels.CODES, np.int64)
    kinds[[kernels.CODE_WALL, kernels.CODE_EMPTY, kernels.CODE_SIGN]] = tiles.WALL, tiles.EMPTY, tiles.SIGN
    doors = s[kernels.DOORS] >> np.arange(MAX_OFFICES) & 1
    kinds[kernels.CODE_DOOR : kernels.CODE_OFFICE] = np.where(doors, tiles.OPEN, tiles.CLOSED)
    kinds[kernels.CODE_OFFICE :] = tiles.FLOOR + rows.tables.colours[s[kernels.LAYOUT], s[kernels.TASK]]
    return kinds[codes], s


def frame(rows: Rows, row: int) -> np.ndarray:
    """The building with the agent, and beside it what the sign shows to one who stands on its cell.

    Args:
        rows: The environments.
        row: Which one.

    Returns:
        uint8 [SIZE * height, SIZE * width + 192, 3].
    """
    kinds, s = _cells(rows, row)
    height, width = kinds.shape
    picture = np.empty((height * SIZE, width * SIZE + 192, 3), np.uint8)
    picture[:] = tiles.tile(tiles.WALL, SIZE)[SIZE // 2, SIZE // 2]
    for y in range(height):
        for x in range(width):
            kind = int(kinds[y, x])
            here = (x, y) == (s[kernels.X], s[kernels.Y])
            drawn = tiles.tile(kind + tiles.AGENT * here, SIZE, int(s[kernels.DIR]) if here else 3)
            picture[y * SIZE : (y + 1) * SIZE, x * SIZE : (x + 1) * SIZE] = drawn
    on_sign = kinds[s[kernels.Y], s[kernels.X]] == tiles.SIGN
    sign = rows.sign(row) if on_sign else np.zeros((84, 84, 3), np.uint8)
    top, left = (picture.shape[0] - 168) // 2, width * SIZE + 12
    picture[top : top + 168, left : left + 168] = sign.repeat(2, 0).repeat(2, 1)
    return picture


def text(rows: Rows, row: int) -> str:
    """The building in characters, and below it where the trial stands.

    ``#`` wall, ``D`` closed and ``/`` open door, ``S`` the sign, ``> v < ^`` the agent, and offices by the first letter
    of their colour (``a`` for grey).
    """
    kinds, s = _cells(rows, row)
    characters = np.array(tiles.ANSI)[kinds]
    characters[s[kernels.Y], s[kernels.X]] = tiles.ANSI_AGENT[s[kernels.DIR]]
    lines = ["".join(line) for line in characters]
    lines.append(
        f"trial {s[kernels.TRIAL]}, episode {s[kernels.EPISODE]} of {rows.variant.episodes}, "
        f"step {s[kernels.STEP]} of {rows.variant.horizon}, task {s[kernels.TASK]}"
    )
    if kinds[s[kernels.Y], s[kernels.X]] == tiles.SIGN:
        lines.append(f"sign: {rows.phrase(row)}")
    return "\n".join(lines)
