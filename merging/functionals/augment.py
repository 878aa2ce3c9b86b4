"""Changes to the weights of networks that leave alone what they compute, to train models that read them with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fleetgym.core import UserError
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout


class SignFlips:
    """Negates random hidden units of each network: behind an odd activation such as tanh nothing else changes.

    Equivariant layers know the order of units for what it is, but not their signs; a perceptron on statistics knows
    neither. What a model reads should not depend on them. It is the sign part of ``WeightSpec.random``, drawn for a
    whole batch at once.

    Args:
        spec: The symmetry with its signs, or a layout.

    Raises:
        UserError: No group of the spec may be negated.
    """

    def __init__(self, spec: Layout) -> None:
        self.layout = Layout.of(spec)
        spec = self.layout.spec
        signed = [group for group in self.layout.groups if spec.signed.get(group)]
        if not signed:
            raise UserError("the spec has no group whose units may be negated (they need an odd activation, as tanh)")
        # For each place and each of its axes which entry of all units' signs it takes; the last entry is always 1.
        begins, units = {}, 0
        for group in signed:
            begins[group], units = units, units + self.layout.groups[group]
        self.units = units
        most = max(len(spec.axes[key]) for key in self.layout.keys)
        columns = []
        for key in self.layout.keys:
            shape = self.layout.shapes[key]
            rows = torch.full((most, *shape), units)
            for dim, axis in enumerate(spec.axes[key]):
                entries = [
                    torch.arange(segment.size).repeat_interleave(segment.inner) + begins[segment.group]
                    if segment.group in begins and segment.signed
                    else torch.full((segment.length,), units)
                    for segment in axis.segments(self.layout.groups)
                ]
                rows[dim] = torch.cat(entries).view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)
            columns.append(rows.flatten(1))
        index = torch.cat(columns, 1)[:, self.layout.index]
        self.index = index[(index != units).any(1)]

    def __call__(self, x: WeightBatch, rng: np.random.Generator) -> WeightBatch:
        """[B, P, C] to [B, P, C]."""
        WeightBatch.expect(x, self.layout, None, "SignFlips")
        signs = torch.ones(len(x), self.units + 1)
        signs[:, : self.units] -= 2 * torch.from_numpy(rng.integers(2, size=(len(x), self.units)))
        factors: Tensor | None = None
        for row in self.index:
            found = signs[:, row]
            factors = found if factors is None else factors * found
        return x.replace(x.data * factors[..., None].to(x.data))
