"""``fleetgym bench NAME``: runs a benchmark's protocol."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Runs the benchmark whose name comes first; the rest of the words are its own options."""
    from fleetgym.benchmarks import BENCHMARKS
    from fleetgym.cli.options import dispatch

    return dispatch("bench", "NAME", BENCHMARKS, argv)
