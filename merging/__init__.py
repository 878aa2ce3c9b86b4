"""Everything that takes weights as data: matching networks, merging them.

``merge("fleet_merge", [policy_a, policy_b])`` is the front door. Mergers and matchers are found by name in
:data:`MERGERS` and :data:`MATCHERS`; third parties add theirs through the entry-point groups ``fleetgym.mergers`` and
``fleetgym.matchers``, or ``MERGERS.register("mine", function)``.
"""

from __future__ import annotations

import importlib
from typing import Any

if __name__ == "merging":
    raise ImportError("import 'fleetgym.merging', not 'merging'")

from fleetgym.core.registry import Registry

MERGERS: Registry[Any] = Registry("merger", group="fleetgym.mergers")
MERGERS.register("average", "fleetgym.merging.mergers:plain_average")
MERGERS.register("dare", "fleetgym.merging.task_vectors:dare")
MERGERS.register("distill", "fleetgym.merging.distill:distill")
MERGERS.register("fisher", "fleetgym.merging.weighted:fisher_average")
MERGERS.register("fleet_merge", "fleetgym.merging.fleet_merge:fleet_merge")
MERGERS.register("regmean", "fleetgym.merging.weighted:regmean")
MERGERS.register("task_arithmetic", "fleetgym.merging.task_vectors:task_arithmetic")
MERGERS.register("ties", "fleetgym.merging.task_vectors:ties")
MERGERS.register("universe", "fleetgym.merging.universe:universe")

MATCHERS: Registry[Any] = Registry("matcher", group="fleetgym.matchers")
MATCHERS.register("activations", "fleetgym.merging.activations:activations")
MATCHERS.register("frank_wolfe", "fleetgym.merging.matching:frank_wolfe")
MATCHERS.register("git_rebasin", "fleetgym.merging.matching:git_rebasin")
MATCHERS.register("lap", "fleetgym.merging.matching:lap")
MATCHERS.register("sinkhorn", "fleetgym.merging.matching:sinkhorn")

_HOME = {
    "MatchResult": "matching",
    "MergeResult": "mergers",
    "average": "mergers",
    "correlations": "activations",
    "interpolate": "mergers",
    "load_statistics": "statistics",
    "match": "matching",
    "match_many": "matching",
    "mean_distance": "mergers",
    "merge": "mergers",
    "merge_files": "streaming",
    "save_statistics": "statistics",
    "sent_bytes": "statistics",
}
__all__ = ["MATCHERS", "MERGERS", *_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"fleetgym.merging.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fleetgym.merging' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
