"""Everything that measures. ``BENCHMARKS`` names the protocols that ``fleetgym bench`` runs."""

if __name__ == "benchmarks":
    raise ImportError("import 'fleetgym.benchmarks', not 'benchmarks'")

from typing import Any

from fleetgym.core.registry import Registry

BENCHMARKS: Registry[Any] = Registry("benchmark", group="fleetgym.benchmarks")
"""Name -> ``main(argv) -> int`` of the protocol."""

BENCHMARKS.register("fleet_merge", "fleetgym.benchmarks.fleet_merge:main")
BENCHMARKS.register("fleet_tools", "fleetgym.benchmarks.fleet_tools:main")
BENCHMARKS.register("experts", "fleetgym.benchmarks.experts:main")
BENCHMARKS.register("linear_fleet", "fleetgym.benchmarks.linear_fleet:main")
BENCHMARKS.register("matching", "fleetgym.benchmarks.matching:main")
BENCHMARKS.register("nfn", "fleetgym.benchmarks.weight_space.command:nfn")
BENCHMARKS.register("nft", "fleetgym.benchmarks.weight_space.command:nft")
BENCHMARKS.register("office_nav", "fleetgym.benchmarks.office_nav:main")
BENCHMARKS.register("one_shot", "fleetgym.benchmarks.one_shot:main")
BENCHMARKS.register("spartn", "fleetgym.benchmarks.spartn:main")
BENCHMARKS.register("speed", "fleetgym.benchmarks.speed:main")
BENCHMARKS.register("unf", "fleetgym.benchmarks.weight_space.command:unf")
