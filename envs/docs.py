"""Pages about environments, made of their docstrings: ``python -m fleetgym.envs.docs docs/envs``."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path

from fleetgym.core.files import atomic_write
from fleetgym.envs.suite import EnvSuite, suite

#: Suite -> the class whose docstring is its page.
PAGES = {"meta_world": "fleetgym.envs.meta_world.env:MetaWorldEnv"}


def page(name: str) -> str:
    """The Markdown page of a suite: the docstring of its environment, then its tasks and splits.

    Args:
        name: A suite's name.
    """
    from importlib import import_module

    module, _, attribute = PAGES[name].partition(":")
    text = inspect.getdoc(getattr(import_module(module), attribute))
    title, _, body = text.partition("\n")
    lines = [f"<!-- Made by `python -m fleetgym.envs.docs`; edit the docstring of `{attribute}` instead. -->", ""]
    lines += [f"# {name}", "", title, "", body.strip(), "", *_tasks(suite(name))]
    return "\n".join(lines) + "\n"


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
