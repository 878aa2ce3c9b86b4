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


def dispatch(verb: str, what: str, registry: Any, argv: Sequence[str]) -> int:
    """Runs the entry of a registry that the first word names, with the rest of the words.

    Args:
        verb: The verb, for the usage text.
        what: What the first word is, such as ``SYSTEM``.
        registry: Name -> ``main(argv) -> int``.
        argv: The words after the verb.

    Returns:
        The exit code of what was run.

    Raises:
        UserError: An unknown name, or an option where the name should be.
    """
    from fleetgym.core.errors import UserError

    names = ", ".join(registry.names())
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: fleetgym {verb} {what} [options]\n\n{what} is one of: {names}")
        print(f"fleetgym {verb} {what} --help   its options")
        return 0 if argv else 2
    if argv[0].startswith("-"):
        raise UserError(f"fleetgym {verb} {what}: the name comes before {argv[0]!r}; it is one of: {names}")
    return registry.get(argv[0])(list(argv[1:]))
