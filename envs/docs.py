"""Pages about environments, made of their docstrings: ``python -m fleetgym.envs.docs docs/envs``.

Films stand beside the pages and are made by the command in their caption.
"""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from fleetgym.core.files import atomic_write
from fleetgym.envs.fleet_tools.names import TASKS, env_id
from fleetgym.envs.suite import EnvSuite, suite

#: Suite -> the class whose docstring is its page.
PAGES = {
    "fleet_tools": "fleetgym.envs.fleet_tools.env:FleetToolsEnv",
    "grasping": "fleetgym.envs.grasping.env:GraspingEnv",
    "meta_world": "fleetgym.envs.meta_world.env:MetaWorldEnv",
    "office_nav": "fleetgym.envs.office_nav.env:OfficeNavEnv",
}
#: Suite -> more classes whose docstrings follow as sections.
MORE = {
    "grasping": ("fleetgym.envs.grasping.nerf:NerfGraspingEnv",),
    "office_nav": ("fleetgym.envs.office_nav.env3d:OfficeNav3DEnv",),
}
#: Suite -> a function that returns further lines, what can be computed.
FURTHER = {
    "fleet_tools": "fleetgym.envs.fleet_tools.page:lines",
    "grasping": "fleetgym.envs.grasping.page:lines",
    "office_nav": "fleetgym.envs.office_nav.page:lines",
}
#: Suite -> films at the top of its page: the id, and the options of the command that made it.
FILMS = {
    "fleet_tools": tuple((env_id(task), "--seed 0 --steps 60 --fps 8") for task in TASKS),
    "office_nav": (
        ("OfficeNav-v0", "--seed 3 --fps 5"),
        ("OfficeNav-Map-v0", "--seed 5 --fps 5"),
        ("OfficeNav3D-v0", "--seed 1 --every 2 --fps 3 --shrink 2"),
    ),
}
#: Suite -> what its films show.
CAPTIONS = {
    "fleet_tools": "One episode each, played by the scripted expert:",
    "office_nav": "One trial each, played by the oracle reader:",
}
#: The section of a docstring before which all else is put.
_LAST = "## Version history"


def film(env_id: str) -> str:
    """The name of an environment's film."""
    return f"{env_id.replace('/', '-')}.gif"


def page(name: str) -> str:
    """The Markdown page of a suite: films, the docstring of its environment, what is computed, tasks and splits.

    Args:
        name: A suite's name.
    """
    attribute = PAGES[name].partition(":")[2]
    lines = [f"<!-- Made by `python -m fleetgym.envs.docs`; edit the docstring of `{attribute}` instead. -->", ""]
    lines += [f"# {name}", ""]
    title, _, body = _docstring(PAGES[name]).partition("\n")
    body, last, history = body.strip().partition(_LAST)
    lines += [title, ""]
    if name in FILMS:
        lines += [*_films(name), "", *_spaces(suite(name).entries[0].env_id), ""]
    lines += [body.strip(), ""]
    if name in FURTHER:
        lines += [*_load(FURTHER[name])(), ""]
    if last:
        lines += [last + history, ""]
    for path in MORE.get(name, ()):
        title, _, body = _docstring(path).partition("\n")
        lines += [f"## {path.partition(':')[2]}", "", title, "", body.strip().replace("## ", "### "), ""]
    return "\n".join([*lines, *_tasks(suite(name))]) + "\n"


def _films(name: str) -> list[str]:
    films = [(env_id, f"fleetgym demo {env_id} {options} --out {film(env_id)}") for env_id, options in FILMS[name]]
    lines = [f"![{env_id}]({film(env_id)})\n" for env_id, _ in films]
    lines[-1] = lines[-1].rstrip()
    return [*lines, "", CAPTIONS[name], "", "```", *(line for _, line in films), "```"]


def _spaces(env_id: str) -> list[str]:
    import gymnasium as gym

    from fleetgym.envs import register_envs

    register_envs()
    env = gym.make(env_id)
    try:
        spaces = env.observation_space, env.action_space
    finally:
        env.close()
    return [
        "| | |",
        "|---|---|",
        f"| Action space | `{spaces[1]}` |",
        f"| Observation space | `{spaces[0]}` |",
        f'| Creation | `gymnasium.make("{env_id}")`, after `import fleetgym` |',
    ]


def _load(path: str) -> Any:
    from importlib import import_module

    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _docstring(path: str) -> str:
    return inspect.getdoc(_load(path)) or ""


def _tasks(entries: EnvSuite) -> list[str]:
    lines = ["## Tasks", "", "| id | instruction | splits |", "|---|---|---|"]
    for entry in entries.entries:
        splits = ", ".join(f"`{split}`" for split, names in entries.splits.items() if entry.id in names)
        lines.append(f"| `{entry.env_id}` | {entry.instruction} | {splits} |")
    return [*lines, "", f"Source: {entries.paper}."]


def main(folder: str = "docs/envs") -> None:
    """Writes all pages into a folder."""
    for name in PAGES:
        with atomic_write(Path(folder) / f"{name}.md") as temporary:
            temporary.write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
