"""The weights of many networks of one architecture, with channels, as one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from fleetgym.core import Element, UserError, WeightSpec
from fleetgym.core.errors import unknown
from fleetgym.merging.functionals.layout import Layout, Part


class WeightBatch:
    """Weights of B networks, or features of them: C channels for each scalar.

    It is a pytree of one tensor, so that ``torch.func.vmap``, ``grad`` and ``jvp`` see through it. It compares by
    identity and is not checked when it is made; layers check what they take (:meth:`expect`).

    Args:
        layout: The order of the scalars, or the spec that it follows from.
        data: [B, P, C].

    Attributes:
        layout: See above.
        data: See above.
    """

    __slots__ = ("data", "layout")

    def __init__(self, layout: Layout | WeightSpec, data: Tensor) -> None:
        self.layout = Layout.of(layout)
        self.data = data

    @classmethod
    def stack(
        cls,
        spec: WeightSpec | Layout,
        states: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor],
        *,
        channels: bool = False,
        check: bool = True,
    ) -> WeightBatch:
        """Stacks state dicts. Gradients flow back to them.

        Args:
            spec: The symmetry, or a layout.
            states: State dicts with tensors ``[...]``, or one mapping with tensors ``[B, ...]``. Buffers that the
                layout leaves out may be there or not.
            channels: Whether each tensor has one more axis at its end, C; without it C is 1. The inverse of
                :meth:`tensors` has it.
            check: Whether to look for NaN and infinities. It costs a pass over the data; inside ``torch.func.vmap``,
                where a value cannot decide, it must be off.

        Returns:
            The batch, [B, P, C].

        Raises:
            UserError: No state dicts; a tensor is missing, foreign, of another shape, not floating-point, on another
                device or of another type than the rest, or holds a value that is not finite. The message names the
                state dict, the tensor and the axis.
        """
        layout = Layout.of(spec)
        batched = isinstance(states, Mapping)
        items: list[Mapping[str, Tensor]] = [states] if isinstance(states, Mapping) else list(states)
        if not items:
            raise UserError("no state dicts to stack; give at least one")
        _check_tensors(layout, items, batched, channels)
        width = items[0][layout.keys[0]].shape[-1] if channels else 1
        count = len(items[0][layout.keys[0]]) if batched else 1
        rows = [
            torch.cat([s[key].reshape(count, prod(shape), width) for key, shape in layout.shapes.items()], dim=1)
            for s in items
        ]
        flat = torch.cat(rows)
        batch = cls(layout, layout.gather(flat))
        if check and flat.device.type != "meta" and not bool(torch.isfinite(flat).all()):
            _name_the_value(layout, flat)
        return batch

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def batch(self) -> int:
        """B, how many networks."""
        return self.data.shape[0]

    @property
    def channels(self) -> int:
        """C, how many channels each scalar has."""
        return self.data.shape[-1]

    def __len__(self) -> int:
        return self.batch

    def view(self, part: Part | str) -> Tensor:
        """A part's data, [B, *sizes, fold * C]; no copy where the data is contiguous."""
        if isinstance(part, str):
            part = self.layout[part]
        piece = self.data.narrow(1, part.offset, part.length)
        return piece.reshape(self.batch, *part.sizes, part.fold * self.channels)

    def __iter__(self) -> Iterator[tuple[Part, Tensor]]:
        for part in self.layout.parts:
            yield part, self.view(part)

    def tensors(self) -> dict[str, Tensor]:
        """Tensors in the shape of the network's, with the batch before and the channels behind: [B, ..., C]."""
        flat = self.layout.scatter(self.data)
        pieces = flat.split([prod(shape) for shape in self.layout.shapes.values()], dim=1)
        return {
            key: piece.reshape(self.batch, *shape, self.channels)
            for (key, shape), piece in zip(self.layout.shapes.items(), pieces)
        }

    def unstack(
        self, channel: int | None = None, others: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None
    ) -> list[dict[str, Tensor]]:
        """One state dict a network.

        Args:
            channel: Which channel; it may be left out where there is one.
            others: Where to take the buffers from that the layout leaves out (fixed statistics, counters): one state
                dict a network, or one for all. They are not copied. Without it such buffers are not in the result.

        Returns:
            B state dicts, in the order of the spec's keys.

        Raises:
            UserError: There are several channels and none is chosen, there is no such channel, or the number of
                ``others`` is not B.
        """
        if channel is None and self.channels != 1:
            raise UserError(f"the batch has {self.channels} channels; choose one, as in unstack(0)")
        channel = channel or 0
        if not -self.channels <= channel < self.channels:
            raise UserError(f"channel {channel}: the batch has {self.channels}")
        tensors = {key: tensor[..., channel] for key, tensor in self.tensors().items()}
        if others is None or isinstance(others, Mapping):
            others = [others or {}] * self.batch
        if len(others) != self.batch:
            raise UserError(f"others: {len(others)} state dicts for a batch of {self.batch} networks")
        return [
            {
                key: tensors[key][n] if key in tensors else other[key]
                for key in self.layout.spec.axes
                if key in tensors or key in other
            }
            for n, other in enumerate(others)
        ]

    # ---- making others ----------------------------------------------------------------------------------------------

    def replace(self, data: Tensor) -> WeightBatch:
        """The same layout with other data, [B, P, C']."""
        return WeightBatch(self.layout, data)

    def to(self, *args: Any, **kwargs: Any) -> WeightBatch:
        """``Tensor.to`` of the data: another device or type."""
        return self.replace(self.data.to(*args, **kwargs))

    def detach(self) -> WeightBatch:
        """The same data without its history."""
        return self.replace(self.data.detach())

    @staticmethod
    def join(batches: Sequence[WeightBatch]) -> WeightBatch:
        """Joins the channels of several batches of the same networks: weights, gradients and momenta, say.

        Raises:
            UserError: No batches, or batches of different layouts or sizes.
        """
        if not batches:
            raise UserError("no batches to join; give at least one")
        first = batches[0]
        for n, other in enumerate(batches):
            if other.layout != first.layout:
                raise UserError(f"batch {n} has another layout than batch 0; stack both with one spec")
            if other.batch != first.batch:
                raise UserError(f"batch {n} holds {other.batch} networks along axis 0, batch 0 holds {first.batch}")
        return first.replace(torch.cat([batch.data for batch in batches], dim=-1))

    def apply(self, element: Element) -> WeightBatch:
        """Acts on every network and channel as :meth:`fleetgym.core.WeightSpec.apply` does, signs included.

        Raises:
            UserError: The element does not belong to the layout's spec.
        """
        spec, layout = self.layout.spec, self.layout
        # The spec moves numbered places; which number arrives where, and with which sign, is the action on anything.
        numbers = iter(torch.arange(1, layout.size + 1, dtype=torch.float64).split([
            prod(shape) for shape in layout.shapes.values()
        ]))  # fmt: skip
        places = {
            key: next(numbers).reshape(shape) if key in layout.shapes else torch.zeros(shape)
            for key, shape in spec.shapes.items()
        }
        moved = spec.apply(places, element)
        order = torch.cat([moved[key].flatten() for key in layout.keys])
        index, sign = (order.abs() - 1).long(), order.sign()
        flat = layout.scatter(self.data)
        flat = flat.index_select(1, index.to(flat.device)) * sign.to(flat)[:, None]
        return self.replace(layout.gather(flat))

    # ---- checks -----------------------------------------------------------------------------------------------------

    def expect(self, layout: Layout, channels: int | None, layer: str) -> WeightBatch:
        """For layers: this batch, if it is what the layer takes.

        Args:
            layout: What the layer was made for.
            channels: How many channels it takes; None for any.
            layer: What to call it in the message.

        Raises:
            UserError: Another layout, no [B, P, C], or another number of channels.
        """
        if not isinstance(self, WeightBatch):
            raise UserError(f"{layer} takes a WeightBatch, got {type(self).__name__}; see WeightBatch.stack")
        if self.layout is not layout and self.layout != layout:
            theirs, ours = set(self.layout.parts), set(layout.parts)
            odd = next(iter(sorted(map(str, theirs ^ ours))), "the blocks of a group")
            raise UserError(f"{layer} was made for another layout; they differ in: {odd}")
        if self.data.dim() != 3 or self.data.shape[1] != layout.size:
            raise UserError(
                f"{layer}: data has shape {tuple(self.data.shape)}, expected [B, {layout.size}, C]: axis 1 holds the "
                f"scalars of {layout.parts[0].name!r} to {layout.parts[-1].name!r}"
            )
        if channels is not None and self.channels != channels:
            raise UserError(f"{layer} takes {channels} channels, the batch has {self.channels} (axis 2)")
        return self

    def __repr__(self) -> str:
        return f"WeightBatch({self.layout!r}, data {tuple(self.data.shape)})"


def _check_tensors(layout: Layout, items: list[Mapping[str, Tensor]], batched: bool, channels: bool) -> None:
    first_key = layout.keys[0]
    first: Tensor | None = None
    count = width = None
    for n, state in enumerate(items):
        name = "weights" if batched else f"state dict {n}"
        for key in state:
            if key not in layout.spec.axes:
                raise UserError(f"{name}: {unknown('tensor', key, layout.spec.axes)}; it belongs to another spec")
        for key, shape in layout.shapes.items():
            along = [f"{layout.axis_name(key, dim)} {size}" for dim, size in enumerate(shape)]
            if key not in state:
                raise UserError(f"{name} lacks {key!r} with axes [{', '.join(along)}]; it belongs to another spec")
            tensor = state[key]
            if not isinstance(tensor, Tensor):
                raise UserError(f"{name}: {key!r} is a {type(tensor).__name__}, not a tensor")
            wanted = ("B",) * batched + shape + ("C",) * channels
            if tensor.dim() != len(wanted):
                raise UserError(
                    f"{name}: {key!r} has shape {tuple(tensor.shape)} with {tensor.dim()} axes, expected "
                    f"[{', '.join(map(str, wanted))}]"
                )
            for dim, size in enumerate(shape):
                got = tensor.shape[dim + batched]
                if got != size:
                    raise UserError(
                        f"{name}: {key!r} has {got} entries along axis {dim + batched} "
                        f"({layout.axis_name(key, dim)}), expected {size}"
                    )
            if not tensor.is_floating_point():
                raise UserError(f"{name}: {key!r} is {tensor.dtype}; weights must be floating-point")
            if first is None:
                first, count, width = tensor, tensor.shape[0] if batched else None, tensor.shape[-1]
            if batched and tensor.shape[0] != count:
                raise UserError(
                    f"{name}: {key!r} has {tensor.shape[0]} networks along axis 0, {first_key!r} has {count}"
                )
            if channels and tensor.shape[-1] != width:
                raise UserError(
                    f"{name}: {key!r} has {tensor.shape[-1]} channels along its last axis, {first_key!r} has {width}"
                )
            if channels and width == 0:
                raise UserError(f"{name}: {key!r} has no channels (last axis)")
            for what in ("device", "dtype"):
                if getattr(tensor, what) != getattr(first, what):
                    raise UserError(
                        f"{name}: {key!r} has {what} {getattr(tensor, what)}, {first_key!r} of the first has "
                        f"{getattr(first, what)}; bring all to one"
                    )


def _name_the_value(layout: Layout, flat: Tensor) -> None:
    """Raises for the first value that is not finite; ``flat`` is in the order of the raveled tensors."""
    n, place, _ = (int(i) for i in (~torch.isfinite(flat)).nonzero()[0])
    for key, shape in layout.shapes.items():  # noqa: B007 the pair at which it stops is the one
        if place < prod(shape):
            break
        place -= prod(shape)
    where = []
    for dim in reversed(range(len(shape))):
        where.append(f"{place % shape[dim]} along axis {dim} ({layout.axis_name(key, dim)})")
        place //= shape[dim]
    value = flat[~torch.isfinite(flat)][0].item()
    raise UserError(f"state dict {n}: {key!r} holds {value} at {', '.join(reversed(where)) or 'its only place'}")


_pytree.register_pytree_node(
    WeightBatch,
    lambda batch: ([batch.data], batch.layout),
    lambda children, layout: WeightBatch(layout, children[0]),
)
