"""What the page of fleet-tools says beside the docstring: tables and pictures of all tools and objects.

``python -m fleetgym.envs.fleet_tools.page docs/envs`` draws the pictures; the tables are made with the page.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from fleetgym.core.files import atomic_write
from fleetgym.core.render import grid
from fleetgym.envs.fleet_tools import instances
from fleetgym.envs.fleet_tools.instances import INSTANCES, MEANING, OBJECTS, TOOLS, TRAIN, Instance
from fleetgym.envs.fleet_tools.mechanisms import MECHANISMS, ROLES
from fleetgym.envs.fleet_tools.scene import DOWN, TIMESTEP
from fleetgym.envs.fleet_tools.simulation import Simulation
from fleetgym.envs.rendering import Camera

#: What stands on a sheet -> its file.
SHEETS = {"tools": "fleet_tools_tools.png", "objects": "fleet_tools_objects.png"}
#: Height and width of a cell, pixels; it is drawn so many times larger, and made smaller then, for smooth edges.
CELL, _SMOOTH = (104, 128), 3
_TABLE = (0.87, 0.88, 0.9, 1.0)


def lines() -> list[str]:
    """Sections on the instances of tools and objects, in Markdown."""
    return [
        *_section("Tools", TOOLS, instances.tool, "a robot of a fleet is one of them"),
        "",
        *_section("Objects", OBJECTS, instances.thing, "what the tasks are done to"),
        "",
        "Pictures: `python -m fleetgym.envs.fleet_tools.page docs/envs`; numbers of held-out instances are blue there.",
    ]


def _section(title: str, kinds: Mapping[str, object], make: object, words: str) -> list[str]:
    held_out = f"{len(TRAIN)} to {INSTANCES - 1}"
    rows = [
        f"## All {title.lower()}",
        "",
        f"The {INSTANCES} instances of each class: {words}. Numbers 0 to {len(TRAIN) - 1} are for training, {held_out} "
        "are held out.",
        "",
        f"![{title}]({SHEETS[title.lower()]})",
    ]
    for kind in kinds:
        tasks = ", ".join(f"`{task}`" for task, roles in ROLES.items() if kind in roles)
        made = [make(kind, index) for index in range(INSTANCES)]
        rows += ["", f"**{kind}** ({tasks})", "", f"| | what | {' | '.join(str(one.index) for one in made)} |"]
        rows += [f"|---|---|{'---|' * INSTANCES}"]
        for name in made[0].numbers:
            values = " | ".join(f"{one.numbers[name]:.4g}" for one in made)
            rows.append(f"| `{name}` | {MEANING[name]} | {values} |")
    return rows


def _portrait(made: Instance, is_tool: bool) -> np.ndarray:
    """A picture [height, width, 3] of a tool or object alone, uint8."""
    task = next(task for task, roles in ROLES.items() if roles[0 if is_tool else 1] == made.kind)
    tool = made if is_tool else instances.tool(ROLES[task][0], 0)
    thing = instances.thing(ROLES[task][1], 0) if is_tool else made
    sim = Simulation(task, tool, thing, "hand", TIMESTEP)
    mechanism = MECHANISMS[thing.kind]
    middle = (np.array(mechanism.low) + np.array(mechanism.high)) / 2
    # The hand is out of the picture of an object.
    sim.begin(middle, np.zeros(4), None, (np.array([0.3 if is_tool else -1.0, 0.0, 0.5]), DOWN))
    model, data = sim.model, sim.data
    table, bodies = model.geom("table").id, model.geom_bodyid
    if is_tool:
        shown = bodies == sim.tool
        model.geom_rgba[~shown, 3] = 0
        looks = {"azimuth": 125.0, "elevation": -32.0, "distance": 0.36}
    else:
        shown = (bodies != 0) & (model.body_rootid[bodies] != model.body_rootid[sim.hand])
        looks = {"azimuth": 50.0, "elevation": -32.0, "distance": 0.24}
    model.geom_matid[table] = -1
    model.geom_rgba[table] = _TABLE
    places, sizes = data.geom_xpos[shown], model.geom_rbound[shown, None]
    looks["lookat"] = ((places - sizes).min(axis=0) + (places + sizes).max(axis=0)) / 2
    height, width = (_SMOOTH * size for size in CELL)
    camera = Camera(model, height, width, looks)
    try:
        picture = camera.render(data)
    finally:
        camera.close()
    return picture.reshape(CELL[0], _SMOOTH, CELL[1], _SMOOTH, 3).mean((1, 3)).round().astype(np.uint8)


def _cells(sheet: str) -> Iterator[np.ndarray]:
    from PIL import Image, ImageDraw

    make, kinds = (instances.tool, TOOLS) if sheet == "tools" else (instances.thing, OBJECTS)
    for kind in kinds:
        for index in range(INSTANCES):
            image = Image.fromarray(_portrait(make(kind, index), sheet == "tools"))
            colour = (40, 40, 40) if index in TRAIN else (20, 70, 200)
            ImageDraw.Draw(image).text((4, 2), f"{kind} {index}", fill=colour)
            yield np.asarray(image)


def draw(folder: str | Path, sheet: str) -> Path:
    """Draws the sheet of all ``"tools"`` or ``"objects"``: two rows a class, training above, held out below.

    Args:
        folder: Where the file is put.
        sheet: See :data:`SHEETS`.

    Returns:
        The PNG file.

    Raises:
        UserError: OpenGL does not work here.
    """
    from PIL import Image

    picture = grid(list(_cells(sheet)), columns=len(TRAIN), margin=2, fill=255)
    path = Path(folder) / SHEETS[sheet]
    with atomic_write(path) as temporary:
        Image.fromarray(picture).save(temporary, format="PNG", optimize=True)
    return path


def main(folder: str = "docs/envs") -> None:
    """Draws all sheets into a folder."""
    for sheet in SHEETS:
        draw(folder, sheet)


if __name__ == "__main__":
    main(*sys.argv[1:])
