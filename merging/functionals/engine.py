"""The map of a plan: reductions, matrix products, sums; and its derivative, written out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from fleetgym.merging.functionals.partitions import Plan, Product, Reduction, Target

Piece = tuple[Target, Tensor]


def grouped(plan: Plan, data: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The map of a plan: [B, P, c_in] -> [B, P, c_out].

    Outside of ``torch.func`` transforms the derivative is written out (:class:`_Fused`); inside them, and where a
    derivative of the derivative is asked for, plain operations are recorded (:func:`composed`).

    Args:
        plan: Terms and products.
        data: [B, P, c_in].
        weights: For each product [sum of fold * c_in, sum of fold * c_out].
        bias: [sum of fold * c_out] or None.
    """
    if torch._C._are_functorch_transforms_active():
        return composed(plan, data, weights, bias)
    return _Fused.apply(plan, data, bias, *weights)


def composed(plan: Plan, data: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """:func:`grouped`, of operations that every transform of torch knows."""
    parts, batch = plan.layout.parts, data.shape[0]
    c_out = _channels_out(plan, weights)
    # One split has one backward; narrowing for each part would fill a tensor of whole size with zeros for each.
    views = [
        piece.reshape(batch, *(atom.size for atom in atoms), -1)
        for atoms, piece in zip(plan.atoms, data.split([part.length for part in parts], dim=1))
    ]
    reduced = _Reductions(views, average=True)
    found: list[list[Piece]] = [[] for _ in parts]
    for product, weight in zip(plan.products, weights):
        result = _join([reduced(reduction) for reduction in product.inputs]) @ weight
        pieces = result.split([parts[target.part].fold * c_out for target in product.outputs], dim=-1)
        for target, piece in zip(product.outputs, pieces):
            found[target.part].append((target, piece))
    shifts = [None] * len(parts) if bias is None else bias.split([part.fold * c_out for part in parts])
    out = [
        _assemble([atom.size for atom in atoms], pieces, shift).reshape(batch, part.length, c_out)
        for part, atoms, pieces, shift in zip(parts, plan.atoms, found, shifts)
    ]
    return torch.cat(out, dim=1)


class _Fused(torch.autograd.Function):
    """The map with its derivative: no copies of whole size but the result.

    The adjoint of an average is a broadcast and the other way round, so that the derivative with respect to the data
    is a map of the same kind with inputs and outputs exchanged. Terms that take each place to itself are accumulated
    by the matrix product itself, into the place in the flat result where they belong.
    """

    @staticmethod
    def forward(ctx: Any, plan: Plan, data: Tensor, bias: Tensor | None, *weights: Tensor) -> Tensor:
        parts = plan.layout.parts
        c_out = _channels_out(plan, weights)
        views = _views(plan, data)
        reduced = _Reductions(views, average=True)
        out = data.new_empty(*data.shape[:2], c_out)
        slots = _views(plan, out)
        found: list[list[Piece]] = [[] for _ in parts]
        joined: list[Tensor] = []
        for product, weight in zip(plan.products, weights):
            if _whole(plan, product):
                continue
            joined.append(_join([reduced(reduction) for reduction in product.inputs]))
            pieces = (joined[-1] @ weight).split([parts[o.part].fold * c_out for o in product.outputs], dim=-1)
            for target, piece in zip(product.outputs, pieces):
                found[target.part].append((target, piece))
        shifts = [None] * len(parts) if bias is None else bias.split([part.fold * c_out for part in parts])
        for slot, pieces, shift in zip(slots, found, shifts):
            _write(slot, pieces, shift)
        for product, weight in zip(plan.products, weights):
            if _whole(plan, product):
                (target,) = product.outputs
                row = 0
                for reduction in product.inputs:
                    x = reduced(reduction)
                    _accumulate(slots[target.part], x, weight[row : row + x.shape[-1]])
                    row += x.shape[-1]
        ctx.plan, ctx.biased = plan, bias is not None
        ctx.save_for_backward(data, *([bias] if bias is not None else []), *weights, *joined)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        plan: Plan = ctx.plan
        saved = list(ctx.saved_tensors)
        data = saved.pop(0)
        bias = saved.pop(0) if ctx.biased else None
        weights, joined = saved[: len(plan.products)], iter(saved[len(plan.products) :])
        if torch.is_grad_enabled():  # a derivative of this derivative is wanted
            leaves = [data, *([bias] if ctx.biased else []), *weights]
            needed = [leaf for leaf in leaves if leaf.requires_grad]
            made = iter(torch.autograd.grad(composed(plan, data, weights, bias), needed, grad, create_graph=True))
            grads = [next(made) if leaf.requires_grad else None for leaf in leaves]
            return None, grads[0], grads[1] if ctx.biased else None, *grads[1 + ctx.biased :]
        parts, atoms = plan.layout.parts, plan.atoms
        grad = grad.contiguous()
        summed = _Reductions(_views(plan, grad), average=False)
        reduced = _Reductions(_views(plan, data), average=True)
        needs_data, needs_bias, *needs_weight = ctx.needs_input_grad[1:]
        d_data = torch.empty_like(data) if needs_data else None
        found: list[list[Piece]] = [[] for _ in parts]
        d_weights: list[Tensor | None] = []
        later = []
        for product, weight, needed in zip(plan.products, weights, needs_weight):
            if _whole(plan, product):
                (target,) = product.outputs
                g = summed(_as_reduction(target))
                d_weight = torch.empty_like(weight) if needed else None
                row = 0
                for reduction in product.inputs:
                    width = parts[reduction.part].fold * data.shape[-1]
                    if needed:
                        _outer(reduced(reduction), g, d_weight[row : row + width])
                    if needs_data and reduction.plain:
                        later.append((reduction.part, g, weight[row : row + width].T))
                    elif needs_data:
                        back = weight[row : row + width].T.expand(len(g), -1, -1)
                        piece = torch.bmm(_rows(g), back).view(*g.shape[:-1], width)
                        found[reduction.part].append((_as_target(reduction), piece))
                    row += width
                d_weights.append(d_weight)
                continue
            g = _join([summed(_as_reduction(target)) for target in product.outputs])
            x = next(joined)
            d_weights.append(x.flatten(0, -2).T @ g.flatten(0, -2) if needed else None)
            if needs_data:
                widths = [parts[reduction.part].fold * data.shape[-1] for reduction in product.inputs]
                for reduction, piece in zip(product.inputs, (g @ weight.T).split(widths, dim=-1)):
                    blocks = dict(zip(reduction.pattern, (atom.size for atom in atoms[reduction.part])))
                    averaged = math.prod(size for block, size in blocks.items() if block not in reduction.kept)
                    found[reduction.part].append((_as_target(reduction), piece / averaged if averaged > 1 else piece))
        if needs_data:
            slots = _views(plan, d_data)
            for slot, pieces in zip(slots, found):
                _write(slot, pieces, None)
            for part, g, weight in later:
                _accumulate(slots[part], g, weight)
        d_bias = None
        if ctx.biased and needs_bias:
            every = [summed(Reduction(n, tuple(range(len(indices))), ())) for n, indices in enumerate(atoms)]
            d_bias = torch.cat([g.sum(0) for g in every])
        return None, d_data, d_bias, *d_weights


def _channels_out(plan: Plan, weights: Sequence[Tensor]) -> int:
    return weights[0].shape[1] // sum(plan.layout.parts[target.part].fold for target in plan.products[0].outputs)


def _views(plan: Plan, data: Tensor) -> list[Tensor]:
    """Each part of [B, P, C] with its indices, [B, *sizes, fold * C]; views of contiguous data."""
    return [
        data.narrow(1, part.offset, part.length).reshape(len(data), *(atom.size for atom in atoms), -1)
        for part, atoms in zip(plan.layout.parts, plan.atoms)
    ]


def _whole(plan: Plan, product: Product) -> bool:
    """Whether all that a product gives is one part, place by place, along two axes or more."""
    if len(product.outputs) != 1 or len(product.labels) < 2:
        return False
    (target,) = product.outputs
    return target.carried == target.pattern == tuple(range(len(plan.atoms[target.part])))


def _as_reduction(target: Target) -> Reduction:
    return Reduction(target.part, target.pattern, target.carried)


def _as_target(reduction: Reduction) -> Target:
    return Target(reduction.part, reduction.pattern, reduction.kept)


def _join(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim=-1)


def _rows(x: Tensor) -> Tensor:
    """[B, *sizes, K] -> [B, prod(sizes), K]."""
    return x.reshape(len(x), -1, x.shape[-1])


def _accumulate(slot: Tensor, x: Tensor, weight: Tensor) -> None:
    """Adds x @ weight in place; a slot is a view of some rows of the flat tensor, so that networks lie apart."""
    out = slot.view(len(slot), -1, slot.shape[-1])
    out.baddbmm_(_rows(x), weight.expand(len(slot), -1, -1))


def _outer(x: Tensor, g: Tensor, out: Tensor) -> None:
    """The sum over networks and places of the outer products, [B, *sizes, K] and [B, *sizes, N] -> [K, N]."""
    x, g = _rows(x), _rows(g)
    if x.device.type != "cpu":
        torch.mm(x.flatten(0, 1).T, g.flatten(0, 1), out=out)
        return
    # Rows of different networks lie apart; joining them would copy everything.
    torch.mm(x[0].T, g[0], out=out)
    for one, other in zip(x[1:], g[1:]):
        out.addmm_(one.T, other)


def _write(slot: Tensor, pieces: list[Piece], shift: Tensor | None) -> None:
    """:func:`_assemble` into a given tensor."""
    plain, others = _sorted_pieces(slot.dim() - 2, pieces, shift)
    if not plain:
        slot.zero_()
    else:
        plain = _merge(plain, 2)
        if len(plain) == 2:
            torch.add(plain[0][1].expand_as(slot), plain[1][1], out=slot)
        else:
            slot.copy_(plain[0][1])
    for pattern, found in others.items():
        _diagonals(slot, pattern).add_(_merge(found, 1)[0][1])


class _Reductions:
    """Averages (or sums) of parts, each computed once, from the smallest that is there."""

    def __init__(self, views: list[Tensor], *, average: bool) -> None:
        self.views, self.average = views, average
        self.made: dict[tuple[int, tuple[int, ...]], dict[tuple[int, ...], Tensor]] = {}

    def __call__(self, reduction: Reduction) -> Tensor:
        """[B, *sizes of the kept blocks, fold * C]."""
        ordered = tuple(sorted(reduction.kept))
        made = self.made.setdefault((reduction.part, reduction.pattern), {})
        if ordered not in made:
            everything = tuple(range(max(reduction.pattern, default=-1) + 1))
            if everything not in made:
                made[everything] = _diagonals(self.views[reduction.part], reduction.pattern)
            if ordered != everything:
                above = [kept for kept in made if set(ordered) < set(kept)]
                start = min(above, key=lambda kept: math.prod(made[kept].shape[1:-1]))
                gone = [1 + place for place, block in enumerate(start) if block not in ordered]
                made[ordered] = made[start].mean(gone) if self.average else made[start].sum(gone)
        x = made[ordered]
        if reduction.kept != ordered:
            x = x.permute(0, *(1 + ordered.index(block) for block in reduction.kept), -1)
        return x


def _diagonals(x: Tensor, pattern: Iterable[int]) -> Tensor:
    """Sets indices of one block equal: [B, *sizes of indices, C] -> [B, *sizes of blocks, C]."""
    blocks = list(pattern)
    place = 0
    while place < len(blocks):
        first = blocks.index(blocks[place])
        if first == place:
            place += 1
            continue
        x = x.diagonal(0, 1 + first, 1 + place).movedim(-1, 1 + first)
        del blocks[place]
    return x


def _sorted_pieces(
    rank: int, pieces: list[Piece], shift: Tensor | None
) -> tuple[list[tuple[set[int], Tensor]], dict[tuple[int, ...], list[tuple[set[int], Tensor]]]]:
    """Pieces with one axis for each block, of length one where they are the same: off diagonals, and on each."""
    plain = tuple(range(rank))
    by_pattern: dict[tuple[int, ...], list[tuple[set[int], Tensor]]] = {plain: []}
    if shift is not None:
        by_pattern[plain].append((set(), shift))
    for target, piece in pieces:
        order = [1 + target.carried.index(block) for block in sorted(target.carried)]
        piece = piece.permute(0, *order, -1)
        for block in range(max(target.pattern, default=-1) + 1):
            if block not in target.carried:
                piece = piece.unsqueeze(1 + block)
        by_pattern.setdefault(target.pattern, []).append((set(target.carried), piece))
    return by_pattern.pop(plain), by_pattern


def _merge(entries: list[tuple[set[int], Tensor]], most: int) -> list[tuple[set[int], Tensor]]:
    """Adds tensors that vary along few axes to those that vary along more, until at most ``most`` are left."""
    entries = sorted(entries, key=lambda entry: len(entry[0]))
    while len(entries) > most:
        (axes, tensor), *entries = entries
        host = next((n for n, (other, _) in enumerate(entries) if axes <= other), len(entries) - 1)
        entries[host] = (entries[host][0] | axes, entries[host][1] + tensor)
        entries.sort(key=lambda entry: len(entry[0]))
    return entries


def _assemble(sizes: list[int], pieces: list[Piece], shift: Tensor | None) -> Tensor:
    """Adds up what reaches an output part, small to large: [B, *sizes, fold * c_out]."""
    plain, others = _sorted_pieces(len(sizes), pieces, shift)
    ((_, total),) = _merge(plain, 1)
    total = total.expand(*total.shape[:1], *sizes, total.shape[-1])
    for pattern, found in others.items():
        total = _add_diagonal(total, pattern, _merge(found, 1)[0][1])
    return total


def _add_diagonal(total: Tensor, pattern: tuple[int, ...], piece: Tensor) -> Tensor:
    """Adds [B, *sizes of blocks, C] where indices of one block are equal; nothing is written in place."""
    place = next(place for place, block in enumerate(pattern) if pattern.index(block) < place)
    first = pattern.index(pattern[place])
    inner = total.diagonal(0, 1 + first, 1 + place).movedim(-1, 1 + first)
    rest = pattern[:place] + pattern[place + 1 :]
    inner = inner + piece if len(set(rest)) == len(rest) else _add_diagonal(inner, rest, piece)
    return torch.diagonal_scatter(total, inner.movedim(1 + first, -1), 0, 1 + first, 1 + place)
