"""Changes to the weights of networks that leave alone what they compute, to train models that read them with."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fleetgym.core import UserError
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout


class Signs:
    """Negates hidden units of each network: behind an odd activation such as tanh or a sine nothing else changes.

    Equivariant layers know that the order of units means nothing, but not that their signs mean nothing. Either the
    signs are drawn anew for each batch (:meth:`flip`), or all networks are given the signs that make their biases
    positive (:meth:`canonical`), which leaves fewer networks to learn from and jumps where a bias is near zero.

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
        # Of each unit the first scalar of a vector that is negated with it and nothing else: its bias.
        vectors = torch.cat(
            [torch.full((part.length,), len(self.layout.shapes[part.key]) == 1) for part in self.layout]
        )
        alone = (index != units).sum(0) == 1
        owner = torch.where(alone & vectors, index.min(0).values, units).numpy()
        found, first = np.unique(owner, return_index=True)
        first = first[found < units]
        self._biases = torch.from_numpy(first) if len(first) == units else None

    def flip(self, x: WeightBatch, rng: np.random.Generator) -> WeightBatch:
        """Random signs, those of each network its own: [B, P, C] to [B, P, C]."""
        signs = torch.ones(len(x), self.units + 1)
        signs[:, : self.units] -= 2 * torch.from_numpy(rng.integers(2, size=(len(x), self.units)))
        return self._multiplied(x, signs)

    def canonical(self, x: WeightBatch) -> WeightBatch:
        """The signs with which no bias is negative: [B, P, 1] to [B, P, 1].

        Raises:
            UserError: A unit has no bias, or the batch has several channels.
        """
        WeightBatch.expect(x, self.layout, 1, "Signs")
        if self._biases is None:
            raise UserError("some units that may be negated have no bias, which would settle their signs; use flip()")
        signs = torch.ones(len(x), self.units + 1, device=x.data.device)
        signs[:, : self.units] -= 2 * (x.data[:, self._biases, 0] < 0).to(signs)
        return self._multiplied(x, signs)

    def _multiplied(self, x: WeightBatch, signs: Tensor) -> WeightBatch:
        WeightBatch.expect(x, self.layout, None, "Signs")
        factors: Tensor | None = None
        for row in self.index:
            found = signs[:, row.to(signs.device)]
            factors = found if factors is None else factors * found
        return x.replace(x.data * factors[..., None].to(x.data))
