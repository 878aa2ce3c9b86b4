"""``fleetgym train SYSTEM``: trains a policy."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Trains with the system whose name comes first; the rest of the words are its own options."""
    from fleetgym.agents import SYSTEMS
    from fleetgym.cli.options import dispatch

    return dispatch("train", "SYSTEM", SYSTEMS, argv)
