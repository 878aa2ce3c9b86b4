"""What a cell is, how it is encoded in symbols, and how it is drawn: a tile atlas of our own.

Tile kinds count what the agent may see in a cell; ``AGENT + kind`` is the agent standing on that kind.
"""

from __future__ import annotations

import functools

import numpy as np

from fleetgym.envs.office_nav.layout import COLOURS

UNSEEN, EMPTY, WALL, CLOSED, OPEN, FLOOR, SIGN = 0, 1, 2, 3, 4, 5, 11
#: Kinds without an agent: ``FLOOR + colour`` for the six colours lies between ``OPEN`` and ``SIGN``.
KINDS = 12
AGENT = KINDS
#: Pixels of a tile in the observation.
TILE = 8

#: Numbers of our colours in MiniGrid's encoding.
MINIGRID_COLOUR = (2, 1, 5, 3, 0, 4)
#: What ``image`` holds for each kind: MiniGrid's object, colour and state, uint8 [2 * KINDS, 3]. As there, the cell of
#: the agent looks empty, a door is red, and the sign is a blue ball.
SYMBOLS = np.zeros((2 * KINDS, 3), np.uint8)
SYMBOLS[EMPTY] = SYMBOLS[AGENT:] = (1, 0, 0)
SYMBOLS[WALL] = (2, 5, 0)
SYMBOLS[CLOSED] = (4, 0, 1)
SYMBOLS[OPEN] = (4, 0, 0)
for _index, _colour in enumerate(MINIGRID_COLOUR):
    SYMBOLS[FLOOR + _index] = (3, _colour, 0)
SYMBOLS[SIGN] = (6, 2, 0)
SYMBOLS.flags.writeable = False

#: The colours as drawn, uint8 [6, 3], in the order of ``COLOURS``.
RGB = np.array(
    [(45, 100, 235), (40, 175, 80), (140, 146, 156), (160, 70, 200), (215, 50, 55), (240, 205, 50)], np.uint8
)
_GROUND, _GRID, _WALL, _MORTAR = (236, 232, 222), (216, 211, 198), (72, 76, 88), (92, 97, 111)
_WOOD, _FRAME, _KNOB, _PAPER, _INK, _AGENT = (
    (178, 60, 48),
    (110, 34, 28),
    (250, 220, 120),
    (255, 255, 255),
    (30, 60, 160),
    (20, 20, 24),
)


def _blocks(size: int) -> tuple[np.ndarray, np.ndarray]:
    """The centres of the pixels in units of an eighth of the tile, x and y."""
    centres = (np.arange(size) + 0.5) * TILE / size
    return np.meshgrid(centres, centres)


@functools.cache
def tile(kind: int, size: int = TILE, direction: int = 3) -> np.ndarray:
    """Draws one tile.

    Args:
        kind: A tile kind, with or without the agent.
        size: Pixels along a side.
        direction: Where the agent looks, 0 to 3 clockwise from right. (In its own view, it looks up.)

    Returns:
        uint8 [size, size, 3], read-only.
    """
    x, y = _blocks(size)
    picture = np.zeros((size, size, 3), np.uint8)
    ground = kind % KINDS
    if ground in (EMPTY, SIGN) or ground == OPEN:
        picture[:] = _GROUND
        picture[(x < 8 / size) | (y < 8 / size)] = _GRID
    if ground == WALL:
        picture[:] = _WALL
        picture[(y % 4 < 1) | ((x + np.where(y < 4, 0, 4)) % 8 < 1)] = _MORTAR
    elif ground == CLOSED:
        picture[:] = _FRAME
        picture[(x > 1) & (x < 7) & (y > 1) & (y < 7)] = _WOOD
        picture[(x > 5) & (x < 6) & (y > 3) & (y < 5)] = _KNOB
    elif ground == OPEN:
        picture[(x < 1) | (x > 7) | (y < 1) | (y > 7)] = _FRAME
    elif FLOOR <= ground < SIGN:
        picture[:] = RGB[ground - FLOOR]
        picture[(x < 1) | (y < 1)] = RGB[ground - FLOOR] // 4 * 3
    elif ground == SIGN:
        picture[(x > 1) & (x < 7) & (y > 1) & (y < 7)] = _INK
        picture[(x > 2) & (x < 6) & (y > 2) & (y < 6)] = _PAPER
    if kind >= AGENT:
        # A triangle that points up, with its base at the bottom; turned with the direction.
        body = (y > 1) & (y < 7) & (abs(x - 4) < (y - 0.75) * 0.55)
        picture[np.rot90(body, (3 - direction) % 4)] = _AGENT
    picture.flags.writeable = False
    return picture


@functools.cache
def atlas() -> np.ndarray:
    """All tiles as the observation shows them, uint8 [2 * KINDS, 8, 8, 3], read-only."""
    pictures = np.stack([tile(kind) for kind in range(2 * KINDS)])
    pictures.flags.writeable = False
    return pictures


#: How the cells are written in ``ansi``; the agent is one of ``ANSI_AGENT``.
ANSI = ("?", " ", "#", "D", "/", *(colour[0] if colour != "grey" else "a" for colour in COLOURS), "S")
ANSI_AGENT = (">", "v", "<", "^")
