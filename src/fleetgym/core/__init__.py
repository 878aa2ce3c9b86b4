"""The objects that everything else passes around. Each name is imported when it is first used."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Axis": "weights",
    "Checkpoint": "checkpoint",
    "Demonstrations": "demonstrations",
    "Element": "weights",
    "Episode": "rollout",
    "EvalRecord": "records",
    "FunctionPolicy": "policy",
    "Policy": "policy",
    "Registry": "registry",
    "Run": "run",
    "SequenceBatch": "demonstrations",
    "Statistics": "demonstrations",
    "UserError": "errors",
    "WeightSpec": "weights",
    "collect": "rollout",
    "evaluate": "rollout",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"fleetgym.core.{_HOME[name]}"), name)
    raise AttributeError(f"module 'fleetgym.core' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(_HOME)
