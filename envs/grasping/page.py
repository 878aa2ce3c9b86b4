"""What the page of grasping says beside the docstring: a picture of objects of each family.

``python -m fleetgym.envs.grasping.page docs/envs`` draws it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from fleetgym.core import optional
from fleetgym.core.files import atomic_write
from fleetgym.core.render import grid
from fleetgym.envs.grasping.env import GraspingEnv
from fleetgym.envs.grasping.names import HOUSEHOLD, HOUSEHOLD_CLASSES, NAMED, OBJECTS, PROCEDURAL, YCB

SHEET = "grasping_objects.png"
#: Pixels a side of a cell; it is drawn so many times larger, and made smaller then, for smooth edges.
CELL, _SMOOTH = 96, 2
#: Cells in a row, and rows of procedural objects.
COLUMNS, ROWS = 10, 2
#: Where the camera stands about an object: distance, metres, and angle above the table, radians.
_DISTANCE, _ABOVE = 0.34, 0.6


def lines() -> list[str]:
    """A section on the objects, in Markdown."""
    return [
        "## Objects",
        "",
        f"![Objects of each family]({SHEET})",
        "",
        f"The first objects of each family, and of `Household` of each class ({', '.join(HOUSEHOLD_CLASSES)}; an "
        "object's number modulo five tells which). `python -m fleetgym.envs.grasping.page docs/envs` draws the "
        "picture; numbers of held-out objects are blue there.",
    ]


def shown() -> dict[str, tuple[str, ...]]:
    """The objects of the sheet, by family; those of the YCB set only where they are installed."""
    classes = len(HOUSEHOLD_CLASSES)
    chosen = {
        "Procedural": PROCEDURAL[: COLUMNS * ROWS - 4] + PROCEDURAL[-4:],
        "Named": NAMED,
        "Household": sum((HOUSEHOLD[kind : 8 * classes : classes] + HOUSEHOLD[kind - 2 * classes :: classes]
                          for kind in range(classes)), ()),
    }  # fmt: skip
    return chosen | ({"YCB": YCB} if optional.installed("grasping") else {})


def _look(target: np.ndarray) -> np.ndarray:
    """The pose [4, 4] of a camera that looks at a place [3], OpenGL's axes."""
    back = np.array([-np.cos(_ABOVE) * 0.8, -np.cos(_ABOVE) * 0.6, np.sin(_ABOVE)])
    right = np.cross([0.0, 0.0, 1.0], back)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(back, right), back], axis=1)
    pose[:3, 3] = target + _DISTANCE * back
    return pose


def _cells(family: str, names: tuple[str, ...]) -> Iterator[np.ndarray]:
    from PIL import Image, ImageDraw

    train = OBJECTS[family].get("train", ())
    env = GraspingEnv(family, observation="state", objects="all")
    try:
        for name in names:
            observation, _ = env.reset(seed=0, options={"object": name})
            # The object's place is in the state; a wide lens shows it small, so the middle is cut out.
            size = 2 * _SMOOTH * CELL
            picture, _, _ = env.sim.scene(_look(observation["state"][16:19]), size)
            picture = picture[size // 4 : -size // 4, size // 4 : -size // 4]
            small = picture.reshape(CELL, _SMOOTH, CELL, _SMOOTH, 3).mean((1, 3)).round().astype(np.uint8)
            image = Image.fromarray(small)
            colour = (40, 40, 40) if name in train else (20, 70, 200)
            ImageDraw.Draw(image).text((4, 2), name, fill=colour)
            yield np.asarray(image)
    finally:
        env.close()


def draw(folder: str | Path) -> Path:
    """Draws the sheet: some rows for each family.

    Args:
        folder: Where the file is put.

    Returns:
        The PNG file.
    """
    from PIL import Image

    cells: list[np.ndarray] = []
    for family, names in shown().items():
        cells += _cells(family, names)
        cells += [np.full((CELL, CELL, 3), 255, np.uint8)] * (-len(cells) % COLUMNS)
    path = Path(folder) / SHEET
    with atomic_write(path) as temporary:
        Image.fromarray(grid(cells, columns=COLUMNS, margin=2, fill=255)).quantize(
            256, Image.Quantize.MAXCOVERAGE
        ).save(temporary, format="PNG", optimize=True)
    return path


if __name__ == "__main__":
    draw(*sys.argv[1:] or ("docs/envs",))
