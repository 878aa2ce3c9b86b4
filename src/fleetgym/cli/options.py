"""Options of a verb: a dataclass, parsed by tyro."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def parse(kind: type[T], argv: Sequence[str], verb: str) -> T:
    """Fills a dataclass from the words of the command line.

    Args:
        kind: A dataclass; its docstring becomes the help, and ``tyro.conf.Positional`` marks positional words.
        argv: The words after the verb.
        verb: For the usage line.

    Returns:
        The filled dataclass.

    Raises:
        SystemExit: With code 2 if the words do not fit, with code 0 after ``--help``.
    """
    import tyro

    return tyro.cli(kind, args=list(argv), prog=f"fleetgym {verb}", config=(tyro.conf.OmitArgPrefixes,))


def print_json(value: Any) -> None:
    """Prints a value as indented JSON."""
    from fleetgym.core.files import jsonable

    sys.stdout.write(json.dumps(jsonable(value), indent=2) + "\n")


def print_pairs(pairs: Sequence[tuple[str, Any]]) -> None:
    """Prints two aligned columns."""
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}".rstrip())
