"""Equivariant linear maps and blocks at the speed of their matrix products.

The sums, products and broadcasts of a :class:`~fleetgym.merging.functionals.partitions.Plan` are done for a few
networks at a time, so that what one step writes the next one reads from the processor's cache, and each large tensor is
read and written once. Means are sums with weights scaled once; everything constant along an axis is added before it is
broadcast, into the memory where the largest product then accumulates. The transposed map has the same form with the
ends exchanged, and is the gradient: gradients of all means are one broadcast addition. Nothing of the size of the batch
is made but the result.

On other devices than a CPU the batch is one piece and the mathematics is the same. Under ``torch.func`` transforms,
``torch.compile``, autocast and forward-mode differentiation, and for a gradient of the gradient, the plain path of
:func:`fleetgym.merging.functionals.linear.grouped` is taken.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

from fleetgym.merging.functionals.kernels import norms
from fleetgym.merging.functionals.partitions import Plan

# What a piece of the batch may take on a CPU, input and output together. It should stay in the last cache, of which a
# core had 32 MB; a piece costs some dozens of calls, and 4 MB took 10 % longer than 12, 40 MB as long.
PIECE_BYTES = 12 << 20
# Scalars of input and output together under which the plain path is as fast: each piece costs some dozens of calls.
LEAST = 1 << 21
# Scalars from which the compiled normalisation is worth the time in which it is loaded.
LEAST_NORM = 1 << 17
# Multiplications from which a product is shared among threads: handing it to one takes as long as a million.
LEAST_SHARED = 1 << 22
# Bytes from which a tensor is worth huge pages, several of them at 2 MB each.
HUGE = 4 << 20


def usable(data: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether the fast path may be taken: plain dense tensors of one precise type, and no transform that traces."""
    tensors = (data, *parameters)
    return (
        data.dtype in (torch.float32, torch.float64)
        and data.device.type in ("cpu", "cuda")
        and all(t.dtype == data.dtype and t.device == data.device for t in tensors)
        and all(type(t) in (Tensor, torch.nn.Parameter) for t in tensors)
        and data.numel() > 0
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled(data.device.type)
    )


def worthwhile(plan: Plan, data: Tensor, c_out: int, parameters: Sequence[Tensor]) -> bool:
    """Whether the fast path may be taken, and the batch is large enough for it to pay.

    Args:
        plan: Terms and products.
        data: [B, P, c_in].
        c_out: Channels of the output.
        parameters: Weights, and the bias if there is one.
    """
    return data.shape[0] * data.shape[1] * (data.shape[-1] + c_out) >= LEAST and usable(data, parameters)


def mapped(plan: Plan, data: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The map of a plan, by the fast path where it pays and by the plain one elsewhere.

    Args:
        plan: Terms and products.
        data: [B, P, c_in].
        weights: For each product [sum of fold * c_in, sum of fold * c_out].
        bias: [sum of fold * c_out] or None.

    Returns:
        [B, P, c_out].
    """
    from fleetgym.merging.functionals.linear import grouped

    c_out = weights[0].shape[-1] // _Program.of(plan).outputs.widths[0]
    parameters = weights if bias is None else (*weights, bias)
    path = linear if worthwhile(plan, data, c_out, parameters) else grouped
    return path(plan, data, weights, bias)


def linear(plan: Plan, data: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The map of a plan, as :func:`fleetgym.merging.functionals.linear.grouped` computes it.

    Call it where :func:`usable` says so.

    Args:
        plan: Terms and products.
        data: [B, P, c_in].
        weights: For each product [sum of fold * c_in, sum of fold * c_out].
        bias: [sum of fold * c_out] or None.

    Returns:
        [B, P, c_out].
    """
    return _Linear.apply(plan, data, bias, *weights)


@dataclass(frozen=True)
class Norm:
    """Layer normalisation over channels with a scale and a shift for each part, and a function after it.

    Attributes:
        lengths: How many scalars follow one another with one row of the scale and of the shift.
        eps: Added to the variance.
        activation: A key of :data:`ACTIVATIONS`, or None.
    """

    lengths: tuple[int, ...]
    eps: float
    activation: str | None = None

    def spread(self, rows: Tensor) -> Tensor:
        """[rows, C] -> [P, C], or [1, C] where there is one row."""
        if len(self.lengths) == 1:
            return rows
        return torch.cat([row.expand(length, -1) for row, length in zip(rows.unbind(0), self.lengths)])


@dataclass(frozen=True)
class Activation:
    """A function of each number.

    Attributes:
        apply: The function.
        inplace: The same, where it may overwrite its argument.
        gradient: The gradient with respect to the argument from that of the result, and the argument or the result.
        by_result: Which of the two the gradient takes.
    """

    apply: Callable[[Tensor], Tensor]
    inplace: Callable[[Tensor], Tensor]
    gradient: Callable[[Tensor, Tensor], Tensor]
    by_result: bool


ACTIVATIONS = {
    "gelu": Activation(functional.gelu, functional.gelu, torch.ops.aten.gelu_backward, False),
    "relu": Activation(torch.relu, torch.relu_, lambda g, y: torch.ops.aten.threshold_backward(g, y, 0), True),
    "silu": Activation(functional.silu, functional.silu, torch.ops.aten.silu_backward, False),
    "tanh": Activation(torch.tanh, torch.tanh_, torch.ops.aten.tanh_backward, True),
}


def normalise(norm: Norm, data: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Layer normalisation, scale, shift and activation, a few networks at a time.

    Call it on a CPU where :func:`usable` says so.

    Args:
        norm: What to do.
        data: [B, P, C].
        scale: [rows, C], one for each of ``norm.lengths``, or None.
        shift: As ``scale``; None where it is None.

    Returns:
        [B, P, C].
    """
    return _Normalise.apply(norm, data, scale, shift)


def block(
    plan: Plan,
    data: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None,
    norm: Norm,
    scale: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """:func:`linear`, then :func:`normalise`: the normalisation finds the linear map's result in the cache.

    Call it where :func:`usable` says so.

    Args:
        plan: Terms and products.
        data: [B, P, c_in].
        weights: For each product [sum of fold * c_in, sum of fold * c_out].
        bias: [sum of fold * c_out] or None.
        norm: What to do after the map.
        scale: [rows, c_out] or None.
        shift: As ``scale``.

    Returns:
        [B, P, c_out].
    """
    if data.device.type != "cpu":
        return plain_norm(norm, linear(plan, data, weights, bias), scale, shift)
    if bias is not None and _Program.of(plan).bias_at is None:
        return normalise(norm, linear(plan, data, weights, bias), scale, shift)
    return _Block.apply(plan, norm, data, scale, shift, bias, *weights)


def normalised(norm: Norm, data: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """Layer normalisation, by the fast path where it pays; arguments and result are those of :func:`normalise`."""
    own = [tensor for tensor in (scale, shift) if tensor is not None]
    # On a GPU the kernel of torch is the fast path.
    if data.device.type == "cpu" and data.numel() >= LEAST_NORM and usable(data, own):
        return normalise(norm, data, scale, shift)
    return plain_norm(norm, data, scale, shift)


def plain_norm(norm: Norm, data: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    """:func:`normalise` by torch's own functions: for any transform and any device."""
    data = functional.layer_norm(data, data.shape[-1:], eps=norm.eps)
    if scale is not None:
        data = torch.addcmul(norm.spread(shift), data, norm.spread(scale))
    return data if norm.activation is None else ACTIVATIONS[norm.activation].apply(data)


# ---- what a plan comes to --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """A stretch of the channels of a product's operand or result, and the part that it belongs to.

    Attributes:
        part: Position of the part.
        pattern: For each index of the part the number of its block; indices of one block are a diagonal.
        kept: The blocks along the operand's axes, in their order; others are summed over, or broadcast along.
        start: Where the stretch begins, in folds.
        fold: How long it is, in folds.
    """

    part: int
    pattern: tuple[int, ...]
    kept: tuple[int, ...]
    start: int
    fold: int

    @property
    def blocks(self) -> int:
        return max(self.pattern, default=-1) + 1

    @property
    def direct(self) -> bool:
        """Whether it is the part as it lies in memory."""
        return self.kept == tuple(range(len(self.pattern)))


@dataclass(frozen=True)
class _Step:
    """Fills the slot (product, place) by a sum of ``source``, a slot filled before, or by one of its part (None)."""

    product: int
    place: int
    source: tuple[int, int] | None


class _End:
    """One end of a plan's products: how operands are gathered from parts, and how results are added to parts.

    Products along two axes and more are wide: their operands are as large as parts, so each slot is multiplied where it
    lies. The slots of other products are gathered side by side.
    """

    def __init__(self, plan: Plan, slots: list[list[tuple[int, tuple[int, ...], tuple[int, ...]]]]) -> None:
        parts = plan.layout.parts
        self.lengths = [part.length for part in parts]
        self.sizes = [tuple(atom.size for atom in atoms) for atoms in plan.atoms]
        self.folds = [part.fold for part in parts]
        self.slots: list[list[_Slot]] = []
        for product in slots:
            self.slots.append([])
            start = 0
            for part, pattern, kept in product:
                self.slots[-1].append(_Slot(part, pattern, kept, start, parts[part].fold))
                start += parts[part].fold
        self.widths = [sum(slot.fold for slot in product) for product in self.slots]
        self.wide = [len(product.labels) > 1 for product in plan.products]
        narrow = [
            (p, i, slot) for p, product in enumerate(self.slots) if not self.wide[p] for i, slot in enumerate(product)
        ]
        self.steps: list[_Step] = []
        filled: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, _Slot]]] = {}
        for p, i, slot in sorted(narrow, key=lambda found: -len(found[2].kept)):
            before = filled.setdefault((slot.part, slot.pattern), [])
            above = [found for found in before if set(slot.kept) <= set(found[2].kept)]
            size = self.block_sizes(slot)
            source = min(above, key=lambda found: prod(size[b] for b in found[2].kept), default=None)
            self.steps.append(_Step(p, i, None if source is None else source[:2]))
            before.append((p, i, slot))
        # Of parts with two axes where both are wanted, what the sums along the second and along the first fill.
        self.pairs: dict[int, tuple[tuple[int, int], tuple[int, int]]] = {}
        for part in range(len(parts)):
            before = {slot.kept: (p, i) for p, i, slot in filled.get((part, (0, 1)), ())}
            if (0,) in before and (1,) in before:
                self.pairs[part] = before[0,], before[1,]
        # What is added to what before a part is written, small to large; and what then remains.
        self.additions: list[tuple[tuple[int, int], tuple[int, int]]] = []
        self.rest: list[dict[tuple[int, ...], list[tuple[int, int]]]] = [{} for _ in parts]
        for p, i, slot in sorted(narrow, key=lambda found: len(found[2].kept)):
            hosts = [
                (q, j)
                for q, j, other in narrow
                if (other.part, other.pattern) == (slot.part, slot.pattern) and set(slot.kept) < set(other.kept)
            ]
            if hosts:
                host = min(hosts, key=lambda at: prod(self.block_sizes(slot)[b] for b in self.slots[at[0]][at[1]].kept))
                self.additions.append((host, (p, i)))
            else:
                self.rest[slot.part].setdefault(slot.pattern, []).append((p, i))

    def block_sizes(self, slot: _Slot) -> list[int]:
        """The size of each block of a slot's pattern."""
        sizes = self.sizes[slot.part]
        return [sizes[slot.pattern.index(block)] for block in range(slot.blocks)]

    def count(self, slot: _Slot) -> int:
        """How many entries are summed."""
        return prod(size for block, size in enumerate(self.block_sizes(slot)) if block not in slot.kept)

    def views(self, data: Tensor) -> list[Tensor]:
        """Each part's view, [B, *sizes of its indices, fold * C]."""
        channels = data.shape[-1]
        return [
            piece.view(len(data), *sizes, fold * channels)
            for piece, sizes, fold in zip(data.split(self.lengths, dim=1), self.sizes, self.folds)
        ]

    @staticmethod
    def blocks_of(view: Tensor, slot: _Slot) -> Tensor:
        """A part's view with an axis for each block of the slot's pattern, [B, *sizes of blocks, fold * C]."""
        pattern = list(slot.pattern)
        place = 0
        while place < len(pattern):
            first = pattern.index(pattern[place])
            if first == place:
                place += 1
                continue
            view = view.diagonal(0, 1 + first, 1 + place).movedim(-1, 1 + first)
            del pattern[place]
        return view

    @staticmethod
    def arranged(view: Tensor, axes: Sequence[int], slot: _Slot) -> tuple[Tensor, list[int]]:
        """The axes that the slot keeps first and in its order; and which axes are to be summed over.

        Args:
            view: [B, *, fold * C].
            axes: The block along each axis but the first and the last.
            slot: The slot.
        """
        order = [*slot.kept, *(block for block in axes if block not in slot.kept)]
        view = view.permute(0, *(1 + list(axes).index(block) for block in order), -1)
        return view, list(range(1 + len(slot.kept), 1 + len(order)))

    @staticmethod
    def aligned(tensor: Tensor, slot: _Slot) -> Tensor:
        """A slot [B, *kept, fold * C] with its axes in the order of blocks, size 1 where it is constant."""
        tensor = tensor.permute(0, *(1 + slot.kept.index(block) for block in sorted(slot.kept)), -1)
        for block in range(slot.blocks):
            if block not in slot.kept:
                tensor = tensor.unsqueeze(1 + block)
        return tensor


class _Program:
    """A plan's two ends, and the scales that make means of sums."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sizes = [product.sizes for product in plan.products]
        self.inputs = _End(plan, [[(i.part, i.pattern, i.kept) for i in product.inputs] for product in plan.products])
        self.outputs = _End(
            plan, [[(o.part, o.pattern, o.carried) for o in product.outputs] for product in plan.products]
        )
        self.counts = [[self.inputs.count(slot) for slot in product] for product in self.inputs.slots]
        everything = [(part, (*range(len(atoms)),)) for part, atoms in enumerate(plan.atoms)]
        # The product of the global terms, if its results are all parts in their order: it adds the bias at no cost.
        self.bias_at = next(
            (
                p
                for p, product in enumerate(self.outputs.slots)
                if not plan.products[p].labels and [(slot.part, slot.pattern) for slot in product] == everything
            ),
            None,
        )

    @classmethod
    def of(cls, plan: Plan) -> _Program:
        """The program of a plan, made once."""
        if "_program" not in plan.__dict__:
            plan.__dict__["_program"] = cls(plan)
        return plan.__dict__["_program"]

    def scaled(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Weights of sums in place of means; it is also what makes their gradients those of means."""
        made = []
        for weight, slots, counts in zip(weights, self.inputs.slots, self.counts):
            if all(count == 1 for count in counts):
                made.append(weight)
                continue
            channels = weight.shape[0] // sum(slot.fold for slot in slots)
            weight = weight.clone()
            for slot, count in zip(slots, counts):
                if count > 1:
                    weight.narrow(0, slot.start * channels, slot.fold * channels).mul_(1.0 / count)
            made.append(weight)
        return made


# ---- memory ----------------------------------------------------------------------------------------------------------


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    """The C library's ``madvise``, where it knows of huge pages."""
    if sys.platform != "linux":
        return None
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    advise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return advise


def fresh(like: Tensor, *shape: int) -> Tensor:
    """``like.new_empty(shape)`` in huge pages where the system gives them.

    A new tensor of some dozens of megabytes is given back to the system when it dies, and the first touch of each of
    the next one's pages of 4 kB costs more than writing it: 19 MB took 10 ms and takes 2. This only advises; where
    there are no huge pages nothing changes.
    """
    made = like.new_empty(shape)
    size = made.numel() * made.element_size()
    if made.device.type == "cpu" and size >= HUGE and (advise := _advise()) is not None:
        page = mmap.PAGESIZE
        begin = -(-made.data_ptr() // page) * page
        length = (made.data_ptr() + size - begin) // page * page
        if length > 0:
            advise(begin, length, mmap.MADV_HUGEPAGE)
    return made


# ---- running it ------------------------------------------------------------------------------------------------------


def piece_sizes(data: Tensor, width: int) -> list[int]:
    """How many networks each piece of the batch has.

    Args:
        data: [B, P, C].
        width: Channels of input and output together.
    """
    batch = len(data)
    if data.device.type != "cpu":
        return [batch]
    each = data.shape[1] * width * data.element_size()
    size = max(1, min(batch, PIECE_BYTES * torch.get_num_threads() // each))
    size = -(-batch // -(-batch // size))  # as many pieces, but of one size
    return [size] * (batch // size) + [batch % size] * (batch % size > 0)


def _cut(tensor: Tensor, sizes: Sequence[int], step: int = 1) -> list[Tensor]:
    """A tensor's pieces along the batch; a scratch tensor, as long as one piece, is the same one for all."""
    if tensor.shape[0] >= sum(sizes) * step:
        return list(torch.split_with_sizes(tensor, [size * step for size in sizes]))
    whole = tensor.narrow(0, 0, sizes[0] * step)
    return [whole if size == sizes[0] else tensor.narrow(0, 0, size * step) for size in sizes]


class _Worker:
    """What multiplies: torch, or compiled functions on a CPU. Close it, or use it in a ``with``.

    Args:
        like: A tensor of the type and on the device that all others have.
        channels: What all widths of matrices are multiples of.
    """

    def __init__(self, like: Tensor, *channels: int) -> None:
        self.kernel, self._zeros = None, {}
        if like.device.type == "cpu":
            from fleetgym.merging.functionals import products

            if products.worthwhile() and not any(c * like.element_size() % products.VECTOR_BYTES for c in channels):
                kind = str(like.dtype).removeprefix("torch.")
                self.kernel, self._sums = products.multiply(kind), products.sums(kind)
        self.threads = torch.get_num_threads() if like.device.type == "cpu" else 1
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.pool is not None:
            self.pool.shutdown()

    def run(self, work: Callable[..., None], shares: Iterable[Sequence[Any]]) -> None:
        """Calls ``work`` with each of the shares, in threads where there are several."""
        if self.pool is None:
            for share in shares:
                work(*share)
            return
        for job in [self.pool.submit(work, *share) for share in shares]:
            job.result()

    def multiply(
        self, out: Tensor, a: Tensor, b: Tensor, first: Tensor | None = None, second: Tensor | None = None
    ) -> None:
        """``out = first + second + a @ b``.

        Args:
            out: [N, I, J, Q].
            a: [N, I, J, K].
            b: [N or 1, 1, K, Q].
            first: Broadcast to the shape of ``out``, or ``out`` itself.
            second: As ``first``; only with it.
        """
        if self.kernel is None:
            _plain_product(out, a, b, first, second)
            return
        added = [self.zeros(out) if tensor is None else tensor.numpy() for tensor in (first, second)]
        arrays = [out.numpy(), a.numpy(), b.numpy(), *added]
        if self.pool is None or a.numel() * out.shape[-1] < LEAST_SHARED:
            self.kernel(*arrays)
            return
        axis = 0 if len(out) > 1 else 2  # b has no rows of the result
        cut = [
            np.array_split(array, self.threads, axis)
            if array.shape[axis] > 1 and not (axis == 2 and place == 2)
            else [array] * self.threads
            for place, array in enumerate(arrays)
        ]
        self.run(self.kernel, zip(*cut))

    def sums(self, rows: Tensor, columns: Tensor, x: Tensor) -> None:
        """Sums along either axis, by the compiled functions.

        Args:
            rows: Where to write those over J, [N, I, 1, C].
            columns: Where to write those over I, [N, J, 1, C].
            x: [N, I, J, C].
        """
        arrays = [tensor.numpy() for tensor in (rows, columns, x)]
        fixed = np.ones((1, 1, 1, max(x.shape[1:3])), arrays[0].dtype), self.zeros(x)
        if self.pool is None:
            self._sums(*arrays, *fixed)
            return
        self.run(self._sums, [(*cut, *fixed) for cut in zip(*(np.array_split(a, self.threads) for a in arrays))])

    def zeros(self, like: Tensor) -> Any:
        """[1, 1, 1, Q] of Q columns."""
        width = like.shape[-1]
        if width not in self._zeros:
            self._zeros[width] = like.new_zeros(1, 1, 1, width).numpy()
        return self._zeros[width]


def _plain_product(out: Tensor, a: Tensor, b: Tensor, first: Tensor | None, second: Tensor | None) -> None:
    """:meth:`_Worker.multiply` by torch."""
    if second is not None:
        first = torch.add(first.expand_as(out), second, out=out)
    if len(out) == out.shape[1] == 1:
        if first is None:
            torch.mm(a[0, 0], b[0, 0], out=out[0, 0])
        else:
            torch.addmm(first[0, 0], a[0, 0], b[0, 0], out=out[0, 0])
        return
    if first is None:
        out.zero_()
    elif first is not out:
        out.copy_(first)
    a, b, out = a.flatten(1, 2), b[:, 0], out.view(len(out), -1, out.shape[-1])
    if len(out) == 1:
        out[0].addmm_(a[0], b[0])
    else:
        out.baddbmm_(a, b.expand(len(out), *b.shape[1:]))


class _Wide:
    """Operands of the wide products: call it with product, place and piece.

    Args:
        end: The end that they belong to.
        views: The parts' views.
        pieces: The number of networks of each piece.
    """

    def __init__(self, end: _End, views: Sequence[Tensor], pieces: Sequence[int]) -> None:
        self.found: dict[tuple[int, int], tuple[list[Tensor], list[int], bool]] = {}
        for p, product in enumerate(end.slots):
            for i, slot in enumerate(product if end.wide[p] else ()):
                view, gone = end.arranged(end.blocks_of(views[slot.part], slot), range(slot.blocks), slot)
                self.found[p, i] = _cut(view.flatten(1, -2) if slot.direct else view, pieces), gone, slot.direct

    def __call__(self, at: tuple[int, int], n: int) -> Tensor:
        """[N, rows, fold * C]; a view where it lies so in memory."""
        views, gone, direct = self.found[at]
        view = views[n]
        if direct:
            return view
        return (view.sum(gone) if gone else view).reshape(len(view), -1, view.shape[-1])


class _Pass:
    """The map, or its transpose, on a batch in pieces: call :meth:`piece` for each.

    Args:
        source: The end where operands are gathered.
        target: The end where results are added.
        sizes: For each product, the sizes of its axes.
        data: [B, P, C], or scratch for one piece that the caller fills before each.
        out: [B, P, C'], or scratch; None if only the operands are wanted.
        weights: For each product [C * width, C' * width].
        bias: [C' * sum of folds] or None.
        bias_at: The product that adds the bias; without one it is added to the output.
        pieces: The number of networks of each piece.
        worker: What multiplies.
        keep: Whether the operands of all pieces are kept.
    """

    def __init__(
        self,
        source: _End,
        target: _End,
        sizes: Sequence[tuple[int, ...]],
        data: Tensor,
        out: Tensor | None,
        weights: Sequence[Tensor],
        bias: Tensor | None,
        bias_at: int | None,
        pieces: list[int],
        worker: _Worker,
        keep: bool,
    ) -> None:
        self.source, self.target, self.worker = source, target, worker
        channels, most = data.shape[-1], pieces[0]
        kept = sum(pieces) if keep else most
        products = range(len(sizes))
        narrow = [p for p in products if not source.wide[p]]
        # Operands of narrow products make the gradients of the weights.
        self.operands: list[Tensor | None] = [
            None if source.wide[p] else data.new_empty(kept, *sizes[p], source.widths[p] * channels) for p in products
        ]
        rows = [prod(size) for size in sizes]
        self.rows = [
            None if operand is None else [piece[None, None] for piece in _cut(operand.flatten(0, -2), pieces, count)]
            for operand, count in zip(self.operands, rows)
        ]
        views = source.views(data)
        self.gather: list[tuple[list[Tensor], list[Tensor], list[int]]] = []
        slots = {
            (p, i): self.operands[p].narrow(-1, slot.start * channels, slot.fold * channels)
            for p in narrow
            for i, slot in enumerate(source.slots[p])
        }
        # Of parts whose sums along either axis are wanted: where the two go, and the part.
        self.pairs: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
        paired: set[tuple[int, int]] = set()
        for part, pair in source.pairs.items() if worker.kernel is not None else ():
            self.pairs.append((*(_cut(slots[at].unsqueeze(2), pieces) for at in pair), _cut(views[part], pieces)))
            paired.update(pair)
        for step in source.steps:
            if (step.product, step.place) in paired:
                continue
            slot = source.slots[step.product][step.place]
            if step.source is None:
                view, axes = source.blocks_of(views[slot.part], slot), tuple(range(slot.blocks))
            else:
                view, axes = slots[step.source], source.slots[step.source[0]][step.source[1]].kept
            view, gone = source.arranged(view, axes, slot)
            self.gather.append((_cut(slots[step.product, step.place], pieces), _cut(view, pieces), gone))
        self.wide = _Wide(source, views, pieces)
        if out is None:
            return
        width = out.shape[-1]
        self.results = {p: data.new_empty(most, *sizes[p], target.widths[p] * width) for p in narrow}
        self.products = [
            (
                [piece[None, None] for piece in _cut(self.results[p].flatten(0, -2), pieces, rows[p])],
                self.rows[p],
                weights[p][None, None],
                bias.view(1, 1, 1, -1) if bias is not None and p == bias_at else None,
            )
            for p in narrow
        ]
        ends = {
            (p, i): target.aligned(self.results[p].narrow(-1, slot.start * width, slot.fold * width), slot)
            for p in narrow
            for i, slot in enumerate(target.slots[p])
        }
        self.additions = [(_cut(ends[host], pieces), _cut(ends[small], pieces)) for host, small in target.additions]
        into = target.views(out)
        self.large: list[tuple[tuple[int, int], _Slot, Tensor, list[Tensor], list[list[Tensor]] | None]] = []
        begun: set[int] = set()
        # What varies along some axes of a part, two of them at a time, is where its largest product starts from.
        plain = [tuple(range(len(indices))) for indices in target.sizes]
        starts = [
            [_cut(ends[at], pieces) for at in found.get(pattern, ())] for found, pattern in zip(target.rest, plain)
        ]
        for p in products:
            if source.wide[p]:
                for i, slot in enumerate(source.slots[p]):
                    above = weights[p].narrow(0, slot.start * channels, slot.fold * channels)
                    for end in target.slots[p]:
                        weight = above.narrow(1, end.start * width, end.fold * width)
                        view = into[end.part]
                        if not end.direct:
                            view = target.blocks_of(view, end)
                        elif view.dim() != 4:
                            view = view.flatten(1, -2)[:, None]
                        start = None
                        if end.direct and end.blocks == 2 and end.part not in begun:
                            begun.add(end.part)
                            start = starts[end.part][:2]
                        self.large.append(((p, i), end, weight, _cut(view, pieces), start))
        # Parts that start with a product are written first.
        self.large.sort(key=lambda entry: entry[4] is None)
        self.first = [(_cut(view, pieces), starts[part][:2]) for part, view in enumerate(into) if part not in begun]
        self.last: list[tuple[list[Tensor], list[Tensor]]] = []
        for part, (view, found) in enumerate(zip(into, target.rest)):
            self.last.extend((_cut(view, pieces), more) for more in starts[part][2:])
            if bias is not None and bias_at is None:
                shift = bias.split([fold * width for fold in target.folds])[part]
                self.last.append((_cut(view, pieces), [shift] * len(pieces)))
            for pattern, places in found.items():
                for p, i in places if pattern != plain[part] else ():
                    slot = target.slots[p][i]
                    self.last.append((_cut(target.blocks_of(view, slot), pieces), _cut(ends[p, i], pieces)))

    def collect(self, n: int) -> None:
        """Gathers the operands of piece n."""
        for rows, columns, view in self.pairs:
            self.worker.sums(rows[n], columns[n], view[n])
        for slot, view, gone in self.gather:
            if gone:
                torch.sum(view[n], gone, out=slot[n])
            else:
                slot[n].copy_(view[n])

    def piece(self, n: int) -> dict[tuple[int, int], Tensor]:
        """Computes piece n of the output, and gives the operands of wide products."""
        multiply = self.worker.multiply
        self.collect(n)
        for result, operand, weight, bias in self.products:
            multiply(result[n], operand[n], weight, bias)
        for host, small in self.additions:
            host[n].add_(small[n])
        for view, start in self.first:
            if len(start) == 2:
                torch.add(start[0][n].expand_as(view[n]), start[1][n], out=view[n])
            elif start:
                view[n].copy_(start[0][n])
            else:
                view[n].zero_()
        made: dict[tuple[int, int], Tensor] = {}
        for at, end, weight, views, start in self.large:
            if at not in made:
                made[at] = self.wide(at, n)
            view = views[n]
            if end.direct:
                first = [view] if start is None else [found[n] for found in start]
                multiply(view, made[at].view(*view.shape[:-1], -1), weight[None, None], *first)
            else:
                result = (made[at] @ weight).view(len(made[at]), *self._sizes(end), -1)
                view.add_(self.target.aligned(result, end))
        for view, result in self.last:
            view[n].add_(result[n])
        return made

    def _sizes(self, end: _Slot) -> list[int]:
        sizes = self.target.block_sizes(end)
        return [sizes[block] for block in end.kept]


class _Gradient:
    """The transposed map in pieces, and the gradients of the weights.

    Args:
        program: The plan's.
        data: [B, P, c_in], what the map was applied to.
        operands: What the forward pass gathered.
        weights: For each product, scaled for sums.
        gradient: [B, P, c_out], or scratch that the caller fills before each piece.
        to_data: Whether the gradient with respect to the data is wanted.
        to_weights: Whether those with respect to weights and bias are.
        pieces: The number of networks of each piece.
        worker: What multiplies.
    """

    def __init__(
        self,
        program: _Program,
        data: Tensor,
        operands: Sequence[Tensor | None],
        weights: Sequence[Tensor],
        gradient: Tensor,
        to_data: bool,
        to_weights: bool,
        pieces: list[int],
        worker: _Worker,
    ) -> None:
        self.program, self.weights, self.to_weights, self.worker = program, weights, to_weights, worker
        self.out = fresh(data, *data.shape) if to_data else None
        inputs, outputs = program.inputs, program.outputs
        turned = [weight.t().contiguous() if worker.kernel is not None else weight.t() for weight in weights]
        self.back = _Pass(outputs, inputs, program.sizes, gradient, self.out, turned, None, None, pieces, worker, False)
        self.channels = data.shape[-1], gradient.shape[-1]
        if not to_weights:
            return
        self.wide = _Wide(inputs, inputs.views(data), pieces)
        # For each narrow product, its operands' pieces and the gradient of its weight.
        self.narrow = {
            p: (
                [rows.t()[None, None] for rows in _cut(operand.flatten(0, -2), pieces, prod(program.sizes[p]))],
                weights[p].new_empty(1, 1, *weights[p].shape),
            )
            for p, operand in enumerate(operands)
            if operand is not None
        }
        # The same of wide products, for each network of a piece.
        self.sums: dict[tuple[tuple[int, int], tuple[int, int]], Tensor] = {}
        for p, product in enumerate(inputs.slots):
            for i, slot in enumerate(product if inputs.wide[p] else ()):
                for j, end in enumerate(outputs.slots[p]):
                    shape = slot.fold * self.channels[0], end.fold * self.channels[1]
                    self.sums[(p, i), (p, j)] = data.new_empty(pieces[0], 1, *shape)
        at = program.bias_at
        self.bias = None if at is None else data.new_zeros(weights[at].shape[1])

    def piece(self, n: int) -> None:
        """Does piece n."""
        made: dict[tuple[int, int], Tensor] = {}
        if self.out is not None:
            made = self.back.piece(n)
        elif self.to_weights:
            self.back.collect(n)
        if not self.to_weights:
            return
        again: dict[tuple[int, int], Tensor] = {}
        for (row, column), total in self.sums.items():
            if row not in again:
                again[row] = self.wide(row, n).transpose(1, 2)[:, None]
            if column not in made:
                made[column] = self.back.wide(column, n)
            total = total[: len(again[row])]
            self.worker.multiply(total, again[row], made[column][:, None], total if n else None)
        for p, (operand, total) in self.narrow.items():
            self.worker.multiply(total, operand[n], self.back.rows[p][n], total if n else None)
        if self.bias is not None:
            self.bias += self.back.rows[self.program.bias_at][n].sum((0, 1, 2))

    def finish(self) -> tuple[list[Tensor], Tensor | None]:
        """Gradients of the weights, and of the bias, [sum of fold * c_out]."""
        inputs, outputs = self.program.inputs, self.program.outputs
        made = []
        for p, slots in enumerate(inputs.slots):
            if not inputs.wide[p]:
                made.append(self.narrow[p][1][0, 0])
                continue
            total = torch.empty_like(self.weights[p], memory_format=torch.contiguous_format)
            for i, slot in enumerate(slots):
                above = total.narrow(0, slot.start * self.channels[0], slot.fold * self.channels[0])
                for j, end in enumerate(outputs.slots[p]):
                    place = above.narrow(1, end.start * self.channels[1], end.fold * self.channels[1])
                    torch.sum(self.sums[(p, i), (p, j)], (0, 1), out=place)
            made.append(total)
        return self.program.scaled(made), self.bias


def _bias_gradient(program: _Program, gradient: Tensor) -> Tensor:
    """[sum of fold * c_out] of [B, P, c_out], where no product has it."""
    ends = program.outputs
    return torch.cat([view.flatten(0, -2).sum(0) for view in ends.views(gradient)])


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, data: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        program = _Program.of(plan)
        source = data.contiguous()
        scaled = program.scaled(weights)
        c_out = weights[0].shape[1] // program.outputs.widths[0]
        pieces = piece_sizes(data, data.shape[-1] + c_out)
        out = fresh(data, len(data), data.shape[1], c_out)
        ends = program.inputs, program.outputs, program.sizes
        with _Worker(data, data.shape[-1], c_out) as worker:
            run = _Pass(*ends, source, out, scaled, bias, program.bias_at, pieces, worker, True)
            for n in range(len(pieces)):
                run.piece(n)
        ctx.plan, ctx.operands, ctx.pieces = plan, run.operands, pieces
        ctx.save_for_backward(data, bias, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        data, bias, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            from fleetgym.merging.functionals.linear import grouped

            return None, *_again(lambda x, b, *w: grouped(ctx.plan, x, w, b), (data, bias, *weights), needed, gradient)
        program = _Program.of(ctx.plan)
        gradient = gradient.contiguous()
        to_weights = any(needed[1:])
        with _Worker(data, data.shape[-1], gradient.shape[-1]) as worker:
            work = _Gradient(
                program,
                data.contiguous(),
                ctx.operands,
                program.scaled(weights),
                gradient,
                needed[0],
                to_weights,
                ctx.pieces,
                worker,
            )
            for n in range(len(ctx.pieces)):
                work.piece(n)
        if not to_weights:
            return None, work.out, None, *(None for _ in weights)
        found, of_bias = work.finish()
        if needed[1] and of_bias is None:
            of_bias = _bias_gradient(program, gradient)
        return None, work.out, of_bias if needed[1] else None, *found


class _Normal:
    """Normalisation in pieces, forward or backward.

    Attributes:
        by_result: Whether the gradient takes the result.
    """

    def __init__(self, norm: Norm, like: Tensor, scale: Tensor | None, shift: Tensor | None, worker: _Worker) -> None:
        self.activation = None if norm.activation is None else ACTIVATIONS[norm.activation]
        self.affine, self.relu = scale is not None, norm.activation == "relu"
        self.by_result = self.activation is not None and self.activation.by_result and not self.relu
        rows = len(norm.lengths), like.shape[-1]
        given = (like.new_ones(rows), like.new_zeros(rows)) if scale is None else (scale.detach(), shift.detach())
        self.scale, self.shift = (row.contiguous().numpy() for row in given)
        self.ends = np.cumsum(norm.lengths)
        self.eps = self.scale.dtype.type(norm.eps)
        self.worker = worker
        self.sums = like.new_zeros(worker.threads, 2, *rows)

    def _share(self, work: Callable[..., None], tensors: Sequence[Tensor]) -> None:
        """Calls ``work(thread, *pieces)`` with each thread's networks."""
        pieces = (np.array_split(tensor.detach().numpy(), self.worker.threads) for tensor in tensors)
        self.worker.run(work, zip(range(self.worker.threads), *pieces))

    def forward(self, x: Tensor, out: Tensor, mean: Tensor, rstd: Tensor) -> None:
        """[N, P, C] -> ``out``; writes the mean and the inverse standard deviation, [N, P]."""
        self._normalise(x, out, mean, rstd, self.relu)
        if self.activation is not None and not self.relu:
            result = self.activation.inplace(out)
            if result is not out:
                out.copy_(result)

    def _least(self, relu: bool) -> np.floating:
        return self.eps.dtype.type(0 if relu else np.nan)

    def _normalise(self, x: Tensor, out: Tensor, mean: Tensor, rstd: Tensor, relu: bool) -> None:
        kernel = norms()[0]
        fixed = self.scale, self.shift, self.ends, self.eps, self._least(relu)
        self._share(lambda thread, *pieces: kernel(*pieces, *fixed), (x, out, mean, rstd))

    def backward(
        self, gradient: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, result: Tensor | None, out: Tensor
    ) -> None:
        """Writes the gradient with respect to x, [N, P, C], to ``out``; those of scale and shift add up.

        Args:
            gradient: [N, P, C].
            x: [N, P, C].
            mean: [N, P].
            rstd: [N, P].
            result: What :meth:`forward` wrote; needed if :attr:`by_result`.
            out: [N, P, C].
        """
        if self.activation is not None and not self.relu:
            if not self.by_result:
                result = torch.empty_like(x)
                self._normalise(x, result, torch.empty_like(mean), torch.empty_like(rstd), False)
            gradient = self.activation.gradient(gradient, result)
        kernel, sums, least = norms()[1], self.sums.numpy(), self._least(self.relu)

        def work(thread: int, g: Any, x: Any, mean: Any, rstd: Any, out: Any) -> None:
            kernel(g, x, mean, rstd, self.scale, self.shift, self.ends, out, sums[thread], least)

        self._share(work, (gradient, x, mean, rstd, out))

    def finish(self) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of scale and shift, [rows, C]."""
        return tuple(self.sums.sum(0)) if self.affine else (None, None)


def _pieces(tensor: Tensor | None, pieces: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(pieces) if tensor is None else tensor.split(pieces)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: Norm, data: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
        source, out = data.contiguous(), fresh(data, *data.shape)
        mean, rstd = data.new_empty(2, *data.shape[:2])
        pieces = piece_sizes(data, 2 * data.shape[-1])
        with _Worker(data) as worker:
            work = _Normal(norm, data, scale, shift, worker)
            for piece in zip(*(tensor.split(pieces) for tensor in (source, out, mean, rstd))):
                work.forward(*piece)
        ctx.norm, ctx.moments, ctx.pieces = norm, (mean, rstd), pieces
        ctx.save_for_backward(data, scale, shift, out if work.by_result else None)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        data, scale, shift, result = ctx.saved_tensors
        if torch.is_grad_enabled():
            needed = ctx.needs_input_grad[1:]
            return None, *_again(functools.partial(plain_norm, ctx.norm), (data, scale, shift), needed, gradient)
        out = fresh(data, *data.shape)
        tensors = gradient.contiguous(), data.contiguous(), *ctx.moments, result, out
        with _Worker(data) as worker:
            work = _Normal(ctx.norm, data, scale, shift, worker)
            for piece in zip(*(_pieces(tensor, ctx.pieces) for tensor in tensors)):
                work.backward(*piece)
        return None, out, *work.finish()


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        plan: Plan,
        norm: Norm,
        data: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        bias: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        program = _Program.of(plan)
        c_out = weights[0].shape[1] // program.outputs.widths[0]
        pieces = piece_sizes(data, data.shape[-1] + 2 * c_out)
        middle = fresh(data, *data.shape[:2], c_out)
        out = fresh(middle, *middle.shape)
        mean, rstd = data.new_empty(2, *data.shape[:2])
        ends = program.inputs, program.outputs, program.sizes
        with _Worker(data, data.shape[-1], c_out) as worker:
            numbers = program.scaled(weights), bias, program.bias_at
            run = _Pass(*ends, data.contiguous(), middle, *numbers, pieces, worker, True)
            work = _Normal(norm, middle, scale, shift, worker)
            for n, piece in enumerate(zip(*(tensor.split(pieces) for tensor in (middle, out, mean, rstd)))):
                run.piece(n)
                work.forward(*piece)
        ctx.plan, ctx.norm, ctx.pieces = plan, norm, pieces
        ctx.kept = run.operands, middle, mean, rstd
        ctx.save_for_backward(data, scale, shift, out if work.by_result else None, bias, *weights)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        data, scale, shift, result, bias, *weights = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled():
            from fleetgym.merging.functionals.linear import grouped

            def plain(x: Tensor, scale: Any, shift: Any, bias: Any, *weights: Tensor) -> Tensor:
                return plain_norm(ctx.norm, grouped(ctx.plan, x, weights, bias), scale, shift)

            inputs = data, scale, shift, bias, *weights
            return None, None, *_again(plain, inputs, needed, gradient)
        operands, middle, mean, rstd = ctx.kept
        program = _Program.of(ctx.plan)
        scratch = fresh(middle, ctx.pieces[0], *middle.shape[1:])
        to_weights = any(needed[3:])
        tensors = gradient.contiguous(), middle, mean, rstd, result
        with _Worker(data, data.shape[-1], middle.shape[-1]) as worker:
            work = _Gradient(
                program,
                data.contiguous(),
                operands,
                program.scaled(weights),
                scratch,
                needed[0],
                to_weights,
                ctx.pieces,
                worker,
            )
            normal = _Normal(ctx.norm, middle, scale, shift, worker)
            for n, piece in enumerate(zip(*(_pieces(tensor, ctx.pieces) for tensor in tensors))):
                normal.backward(*piece, scratch[: ctx.pieces[n]])
                work.piece(n)
        found, of_bias = work.finish() if to_weights else ([None] * len(weights), None)
        return None, None, work.out, *normal.finish(), of_bias if needed[3] else None, *found


def _again(
    function: Callable[..., Tensor], inputs: Sequence[Tensor | None], needed: Sequence[bool], gradient: Tensor
) -> list[Tensor | None]:
    """Gradients that can be differentiated: those of the plain path."""
    wanted = [tensor for tensor, need in zip(inputs, needed) if need]
    with torch.enable_grad():
        found = iter(torch.autograd.grad(function(*inputs), wanted, gradient, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needed]
