"""How the weights of a network lie in one flat tensor, so that each piece with its own symmetry is a view of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.errors import unknown


@dataclass(frozen=True)
class Part:
    """A tensor of the state dict, or a piece of one, that is indexed by groups of units only.

    Everything else along its dimensions (fixed axes, the positions of a filter, the gates of a recurrent cell) is
    folded into channels: the symmetry does not mix it.

    Attributes:
        key: Key of the tensor in the state dict.
        name: ``key``, followed by the groups in brackets where a tensor has several parts.
        dims: The group behind each dimension, in the order of the tensor's dimensions; a group may come twice.
        sizes: The length of each dimension.
        fold: How many scalars a place holds.
        offset: Where the part begins in the flat tensor.
    """

    key: str
    name: str
    dims: tuple[str, ...]
    sizes: tuple[int, ...]
    fold: int
    offset: int

    @property
    def count(self) -> int:
        """How many places it has, 1 without dimensions."""
        return prod(self.sizes)

    @property
    def length(self) -> int:
        """How many scalars it holds."""
        return self.count * self.fold

    def __str__(self) -> str:
        axes = ", ".join(f"{group} {size}" for group, size in zip(self.dims, self.sizes))
        return f"{self.name} [{axes}{', ' if axes else ''}{self.fold} folded]"


class Layout:
    """The order of all scalars of a network's weights in one flat tensor.

    The flat tensor has P places. Parts follow one another in the order of the state dict; inside a part the scalars
    are ordered ``[*dims, fold]``, so that data ``[B, P, C]`` gives the part's view ``[B, *sizes, fold * C]`` without
    a copy. Parameters are in it, and buffers that a group lies along (running means); other buffers are not.

    Layouts are equal when they order equal tensors in the same way under the same groups.

    Args:
        spec: The symmetry, signs of which are not used.

    Attributes:
        spec: The symmetry.
        parts: The pieces in order, tuple of :class:`Part`.
        keys: Keys of the tensors that are in it.
        shapes: For each of these keys the shape.
        groups: For each group its size.
        size: P, the number of scalars.
        index: [P] int64; where each scalar lies in the raveled tensors, concatenated in the order of ``keys``.

    Raises:
        UserError: There is nothing to lay out, or a tensor is empty.
    """

    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec
        self.groups = dict(spec.groups)
        kept = [
            key for key, axes in spec.axes.items() if key not in spec.buffers or not all(axis.fixed for axis in axes)
        ]
        shapes = spec.shapes
        self.keys = tuple(kept)
        self.shapes = {key: shapes[key] for key in kept}
        for key, shape in self.shapes.items():
            if 0 in shape:
                raise UserError(f"{key!r} has shape {shape}: axis {shape.index(0)} is empty")
        if not kept:
            raise UserError("the spec has no parameters: there are no weights to lay out")
        parts: list[Part] = []
        index: list[np.ndarray] = []
        offset = start = 0
        for key in kept:
            pieces = list(self._pieces(key))
            for dims, positions in pieces:
                sizes = tuple(self.groups[group] for group in dims)
                fold = positions.size // prod(sizes)
                name = key if len(pieces) == 1 else f"{key}[{', '.join(dims)}]"
                parts.append(Part(key, name, dims, sizes, fold, offset))
                index.append(positions.ravel() + start)
                offset += positions.size
            start += prod(self.shapes[key])
        self.parts = tuple(parts)
        self.size = offset
        self.index = torch.from_numpy(np.concatenate(index))
        self._by_name = {part.name: part for part in parts}
        self._trivial = bool((self.index == torch.arange(self.size)).all())
        self._inverse = torch.argsort(self.index)
        self._elsewhere: dict[tuple[bool, torch.device], Tensor] = {}
        nested = tuple(sorted(spec.nested.items()))
        self._identity = (self.parts, tuple(self.shapes.items()), nested)

    @classmethod
    def of(cls, spec: WeightSpec | Layout) -> Layout:
        """The layout of a spec, made once for each spec object; a layout is returned as it is.

        Raises:
            UserError: Neither a spec nor a layout, or a spec without weights.
        """
        if isinstance(spec, Layout):
            return spec
        if not isinstance(spec, WeightSpec):
            raise UserError(f"a WeightSpec is needed, got {type(spec).__name__}; see WeightSpec.from_module")
        # Kept in the spec itself, as cached_property does: it lives as long as the spec and no longer.
        if "_layout" not in spec.__dict__:
            spec.__dict__["_layout"] = cls(spec)
        return spec.__dict__["_layout"]

    def _pieces(self, key: str) -> Iterator[tuple[tuple[str, ...], np.ndarray]]:
        """Groups along the dimensions, and the positions [*sizes, fold] in the raveled tensor, for each part."""
        shape = self.shapes[key]
        pieces: list[tuple[tuple[str, ...], np.ndarray]] = [((), np.zeros((1, 1), np.int64))]
        for dim, axis in enumerate(self.spec.axes[key]):
            along: dict[str | None, list[np.ndarray]] = {}
            begin = 0
            for segment in axis.segments(self.groups):
                here = np.arange(begin, begin + segment.length)
                along.setdefault(segment.group, []).append(
                    here[None] if segment.group is None else here.reshape(segment.size, segment.inner)
                )
                begin += segment.length
            stride = prod(shape[dim + 1 :])
            joined = {group: np.concatenate(found, axis=1) * stride for group, found in along.items()}
            pieces = [
                (
                    dims if group is None else (*dims, group),
                    # [places, fold] and [n, f] -> [places * n, fold * f]
                    (before[:, None, :, None] + new[None, :, None, :]).reshape(
                        before.shape[0] * new.shape[0], before.shape[1] * new.shape[1]
                    ),
                )
                for dims, before in pieces
                for group, new in joined.items()
            ]
        yield from pieces

    def __getitem__(self, name: str) -> Part:
        """The part of a name.

        Raises:
            UserError: There is none.
        """
        if name not in self._by_name:
            raise unknown("part", name, self._by_name)
        return self._by_name[name]

    def __iter__(self) -> Iterator[Part]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Layout) and self._identity == other._identity)

    def __hash__(self) -> int:
        return hash(self._identity)

    def __str__(self) -> str:
        return "\n".join(map(str, self.parts))

    def __repr__(self) -> str:
        return f"Layout({len(self.parts)} parts, {self.size} scalars)"

    def gather(self, raveled: Tensor) -> Tensor:
        """Raveled tensors, concatenated in the order of ``keys``, into this order: [B, P, ...] -> [B, P, ...]."""
        return raveled if self._trivial else raveled.index_select(1, self._order(False, raveled.device))

    def scatter(self, data: Tensor) -> Tensor:
        """The inverse of :meth:`gather`."""
        return data if self._trivial else data.index_select(1, self._order(True, data.device))

    def _order(self, inverse: bool, device: torch.device) -> Tensor:
        order = self._inverse if inverse else self.index
        if device.type == "cpu":
            return order
        if (inverse, device) not in self._elsewhere:
            moved = order.to(device)
            # Inside torch.func.grad the copy is a wrapper that dies with the transform.
            if torch._C._functorch.is_functorch_wrapped_tensor(moved):
                return moved
            self._elsewhere[inverse, device] = moved
        return self._elsewhere[inverse, device]

    def axis_name(self, key: str, dim: int) -> str:
        """What lies along a dimension of a tensor, for messages: the groups, or the name of a fixed axis."""
        return "+".join(leaf.group or leaf.name or "fixed" for leaf in self.spec.axes[key][dim].leaves)
