"""Pages about environments, made of their docstrings: ``python -m fleetgym.envs.docs docs/envs``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

from fleetgym.core.files import atomic_write
from fleetgym.envs.suite import EnvSuite, suite

#: Suite -> the class whose docstring is its page.
PAGES = {
    "meta_world": "fleetgym.envs.meta_world.env:MetaWorldEnv",
    "office_nav": "fleetgym.envs.office_nav.env:OfficeNavEnv",
}
#: Suite -> more classes whose docstrings follow as sections.
MORE = {"office_nav": ("fleetgym.envs.office_nav.env3d:OfficeNav3DEnv",)}
#: Suite -> a function that returns further lines, what can be computed.
FURTHER = {"office_nav": "fleetgym.envs.office_nav.reference:scores_page"}


def page(name: str) -> str:
    """The Markdown page of a suite: the docstring of its environment, then its tasks and splits.

    Args:
        name: A suite's name.
    """
    attribute = PAGES[name].partition(":")[2]
    lines = [f"<!-- Made by `python -m fleetgym.envs.docs`; edit the docstring of `{attribute}` instead. -->", ""]
    lines += [f"# {name}", "", *_docstring(PAGES[name])]
    for path in MORE.get(name, ()):
        title, *rest = _docstring(path)
        lines += [f"## {path.partition(':')[2]}", "", title, *(text.replace("## ", "### ") for text in rest)]
    lines += _tasks(suite(name))
    if name in FURTHER:
        lines += ["", *_load(FURTHER[name])()]
    return "\n".join(lines) + "\n"


def _load(path: str) -> Any:
    from importlib import import_module

    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def _docstring(path: str) -> list[str]:
    title, _, body = inspect.getdoc(_load(path)).partition("\n")
    return [title, "", body.strip(), ""]


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
