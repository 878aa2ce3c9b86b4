"""``fleetgym leaderboard``: the table, the page and the plots of a benchmark, from its records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError


@dataclass
class Options:
    """Make leaderboard.json, leaderboard.md and leaderboard.html from the records of a benchmark."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """A folder with records/*.json, such as runs/fleet_merge/quick."""

    readme: Path | None = None
    """A Markdown file to put the table into, between <!-- leaderboard:MARKER --> and <!-- /leaderboard -->."""

    marker: str | None = None
    """The name of the table in that file; by default the last two parts of FOLDER, such as fleet_merge/quick."""


def main(argv: Sequence[str]) -> int:
    """Writes the files, and prints where the page is and the table."""
    options = parse(Options, argv, "leaderboard")
    if options.marker is not None and options.readme is None:
        raise UserError(f"--marker {options.marker} names a table in a file; name the file with --readme")

    from fleetgym.benchmarks import leaderboard

    page = leaderboard.write(options.folder)
    if options.readme is not None:
        leaderboard.update_readme(options.readme, options.folder, options.marker)
    print(f"page: {page}\n")
    print(leaderboard.table(leaderboard.build(options.folder)), end="")
    return 0
