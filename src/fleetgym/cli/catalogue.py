"""Everything that has a name, for ``fleetgym list`` and ``fleetgym info``; nothing heavy is imported."""

from __future__ import annotations

from collections.abc import Callable


def envs() -> list[str]:
    """Ids of the environments that fleetgym and its plug-ins registered with Gymnasium."""
    from gymnasium.envs.registration import registry

    from fleetgym.envs import register_envs

    register_envs()
    ours = []
    for name, spec in registry.items():
        entries = (spec.entry_point, spec.vector_entry_point)
        if any(isinstance(entry, str) and entry.startswith("fleetgym.") for entry in entries):
            ours.append(name)
    return sorted(ours)


def suites() -> list[str]:
    """Names of the suites."""
    from fleetgym.envs import SUITES

    return SUITES.names()


def agents() -> list[str]:
    """Names of the architectures that checkpoints can hold."""
    from fleetgym.core.checkpoint import MODULES

    return MODULES.names()


def mergers() -> list[str]:
    """Names of the merging methods."""
    from fleetgym.merging import MERGERS

    return MERGERS.names()


def benchmarks() -> list[str]:
    """Names of the benchmarks."""
    from fleetgym.benchmarks import BENCHMARKS

    return BENCHMARKS.names()


KINDS: dict[str, Callable[[], list[str]]] = {
    "envs": envs,
    "suites": suites,
    "agents": agents,
    "mergers": mergers,
    "benchmarks": benchmarks,
}
