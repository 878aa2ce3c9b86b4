"""``fleetgym list``: what there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from fleetgym.cli.options import parse, print_json
from fleetgym.core.errors import unknown


@dataclass
class Options:
    """List what there is."""

    what: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="KIND")] = ""
    """envs, suites, agents, mergers or benchmarks; all of them by default."""

    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str]) -> int:
    """Prints the names, one a line."""
    from fleetgym.cli.catalogue import KINDS

    options = parse(Options, argv, "list")
    if options.what and options.what not in KINDS:
        raise unknown("kind", options.what, KINDS)
    found = {kind: names() for kind, names in KINDS.items() if options.what in ("", kind)}
    if options.json:
        print_json(found)
    elif options.what:
        print("\n".join(found[options.what]))
    else:
        for kind, names in found.items():
            print(f"{kind} ({len(names)})")
            print("".join(f"  {name}\n" for name in names))
    return 0
