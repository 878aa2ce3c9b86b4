"""The fleet-tools benchmark: robots with a tool each, merged into one policy, and what it does with tools it never had.

The protocol is that of :mod:`fleetgym.benchmarks.fleet_merge`; here each robot of a task has one tool, so its data
differ from those of the others although the task is the same. Besides, every row is measured on tools and objects that
are held out, and on the cross tasks: the wrong tool for the right job.

Source: Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024. The paper's tables are not reproduced number
by number: its hyper-parameters are not public, and its tools are meshes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fleetgym.benchmarks import fleet_merge


@dataclass
class Args(fleet_merge.Args):
    """Robots with a tool each, merged into one policy: trains, evaluates and writes a leaderboard."""

    preset: str = "quick"
    """quick (2 tasks, 3 tools each) or cpu (4 tasks, 5 tools each)."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench fleet_tools``."""
    import tyro

    return fleet_merge.execute(
        tyro.cli(Args, args=list(argv), prog="fleetgym bench fleet_tools"), "fleet_tools", "tools_"
    )
