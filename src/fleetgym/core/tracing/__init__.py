"""Derives a :class:`~fleetgym.core.weights.WeightSpec` by tracing a module and following what lies along its axes.

With an example input the module is run on it and every torch function it calls is followed along all dimensions
(:mod:`.run`; rules in :mod:`.rules` and :mod:`.layers`). Without one, ``torch.fx`` traces it symbolically and only the
last dimension of each value is followed (:mod:`.symbolic`): enough for policies made of linear layers and recurrent
cells, and the sizes of their inputs are found on the way. Both speak of *wires* (:mod:`.wires`), and
:mod:`.build` reads the spec off them.

To teach it a function, see :func:`operation`; a module without an example, :func:`rule`.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from fleetgym.core.tracing import layers, rules  # noqa: F401  (they enter their rules)
from fleetgym.core.tracing.run import derive_by_running, operation
from fleetgym.core.tracing.symbolic import derive_symbolically, rule
from fleetgym.core.weights import WeightSpec

__all__ = ["derive", "operation", "rule"]


def derive(module: nn.Module, example_input: Any = None, *, strict: bool = True) -> WeightSpec:
    """See :meth:`fleetgym.core.WeightSpec.from_module`."""
    if example_input is None:
        return derive_symbolically(module, strict=strict)
    return derive_by_running(module, example_input, strict=strict)
