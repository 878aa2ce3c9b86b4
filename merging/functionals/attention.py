"""Attention between the weights of a network, for any spec.

What is attended to follows Zhou et al., "Neural functional transformers" (NeurIPS 2023, arXiv 2305.13546), equations 4
to 6, as their published code has it. There it is defined for chains of dense layers and filters; here tokens are
defined by the groups of a :class:`fleetgym.core.WeightSpec`, so that recurrent matrices, embeddings, normalisations and
residual paths have them too.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.fast import fresh
from fleetgym.merging.functionals.layout import Layout

_CACHE_BYTES = 4 * 2**20  # of queries, keys and values at a time: what stays near the core


class _Slices(NamedTuple):
    """The slices of one part along one of its dimensions: ``before * after`` tokens."""

    start: int  # where the part's places begin
    before: int  # places before the dimension
    n: int
    after: int  # and behind it
    first: bool  # whether no earlier slices are of this part

    @property
    def count(self) -> int:
        return self.before * self.after

    @property
    def places(self) -> int:
        return self.count * self.n


class _Set(NamedTuple):
    """Tokens that lie together in memory: one behind the other where ``rows``, else feature by feature.

    The slices along the last dimension of a part lie one behind the other, those along the first do not.
    """

    rows: bool
    n: int
    slices: tuple[_Slices, ...]

    @property
    def count(self) -> int:
        return sum(s.count for s in self.slices)


class _Room:
    """Memory that one block of networks leaves to the next: fresh pages cost as much as what is done with them."""

    def __init__(self) -> None:
        self._tensors: dict[Any, Tensor] = {}

    def __call__(self, name: Any, like: Tensor, *shape: int) -> Tensor:
        """What has this name, of the type of ``like``; its values are undefined."""
        if name not in self._tensors or self._tensors[name].shape != shape:
            self._tensors[name] = fresh(like, *shape)
        return self._tensors[name]


class NFAttention(nn.Module):
    """Self-attention over slices of weight tensors, along every group of units.

    Each scalar's C channels give a query, a key and a value; the maps are shared by all parts. For a group of n units,
    every part that has it gives one token for each place of its other dimensions, once for each of its dimensions that
    the group lies along: a matrix between groups of n and m units gives m tokens along the first and n along the
    second, a vector gives one, a recurrent matrix n tokens twice. A token's features are the n units times C / heads
    channels of a head, so scores are scaled by 1 / sqrt(n C / heads). All tokens of a group attend to one another.
    What comes out has the place of the token it was computed for; the results for several groups are added. A further
    head attends between the means of the parts and adds the same to every place of a part.

    Where several scalars share a place (fixed axes, filters, gates), they are projected to C channels first and
    back to their own channels at the end, by maps of their own.

    The result is equivariant to permutations; signs are not respected, as the symmetry of an odd activation would want.

    Computed in blocks of networks that fit a cache, and again when the gradient is taken, so that no queries, keys,
    values or scores are kept. Inside a transform of ``torch.func`` and for second derivatives it is plain autograd.

    Args:
        spec: The symmetry, or a layout.
        channels: C, of the input and the output.
        heads: How many heads; it divides C.
        means: Whether there is the head between the means of the parts.

    Raises:
        UserError: No channels, no heads, or heads that do not divide the channels.
    """

    def __init__(self, spec: WeightSpec | Layout, channels: int, heads: int = 8, *, means: bool = True) -> None:
        super().__init__()
        if channels < 1:
            raise UserError(f"channels={channels}: attention needs at least one")
        if heads < 1 or channels % heads:
            raise UserError(
                f"heads={heads} do not divide channels={channels}; choose a divisor, such as {math.gcd(channels, 8)}"
            )
        self.layout = Layout.of(spec)
        self.channels, self.heads, self.means = channels, heads, means
        self.weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.bias = nn.Parameter(torch.empty(3 * channels))
        self.own = nn.ParameterDict()
        for i, part in enumerate(self.layout.parts):
            if part.fold > 1:
                self.own[f"weight{i}"] = nn.Parameter(torch.empty(3 * channels, part.fold * channels))
                self.own[f"bias{i}"] = nn.Parameter(torch.empty(3 * channels))
                self.own[f"back{i}"] = nn.Parameter(torch.empty(part.fold * channels, channels))
                self.own[f"shift{i}"] = nn.Parameter(torch.empty(part.fold * channels))
        self._names = tuple(self.own)
        self._counts = [part.count for part in self.layout.parts]
        self._runs = _runs(self.layout)
        self._groups = _groups(self.layout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws the parameters anew, uniform in +-1 / sqrt(inputs) as those of ``nn.Linear``."""
        with torch.no_grad():
            for weight, bias in [(self.weight, self.bias), *self._own_maps()]:
                bound = 1 / math.sqrt(weight.shape[1])
                weight.uniform_(-bound, bound)
                bias.uniform_(-bound, bound)

    def _own_maps(self) -> list[tuple[Tensor, Tensor]]:
        pairs = {"weight": "bias", "back": "shift"}
        return [
            (self.own[a + str(i)], self.own[b + str(i)])
            for i, part in enumerate(self.layout.parts)
            if part.fold > 1
            for a, b in pairs.items()
        ]

    def extra_repr(self) -> str:
        """What it was made for."""
        return f"{self.layout!r}, channels={self.channels}, heads={self.heads}"

    def forward(self, x: WeightBatch) -> WeightBatch:
        """Features [B, P, C] to features [B, P, C]."""
        WeightBatch.expect(x, self.layout, self.channels, "NFAttention")
        parameters = [self.weight, self.bias, *(self.own[name] for name in self._names)]
        if torch._C._are_functorch_transforms_active():
            return x.replace(self._plain(x.data, parameters))
        return x.replace(_Blocks.apply(x.data, self, *parameters))

    # ---- the map in functions that autograd and vmap know ------------------------------------------------------------

    def _maps(self, i: int, parameters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Weight and bias of part i's projection and, where it has its own, of the map back."""
        if self.layout.parts[i].fold == 1:
            return tuple(parameters[:2])
        own = dict(zip(self._names, parameters[2:]))
        return tuple(own[f"{name}{i}"] for name in ("weight", "bias", "back", "shift"))

    def _plain(self, data: Tensor, parameters: Sequence[Tensor]) -> Tensor:
        """The whole map, [B, P, C] -> [B, P, C]."""
        parts = self.layout.parts
        pieces = data.split([part.length for part in parts], dim=1)
        projected = []
        for i, (part, piece) in enumerate(zip(parts, pieces)):
            weight, bias = self._maps(i, parameters)[:2]
            y = piece.reshape(len(data), part.count, -1) @ weight.mT + bias
            projected.append(y.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))
        y = torch.cat(projected, 3)  # [3, B, heads, places, C / heads]
        out = torch.zeros_like(y[0])
        for sets in self._groups:
            slices = [s for tokens in sets for s in tokens.slices]
            tokens = [
                y.narrow(3, s.start, s.places).unflatten(3, (s.before, s.n, s.after)).transpose(4, 5).flatten(3, 4)
                for s in slices
            ]
            found = _attention(torch.cat(tokens, 3).flatten(4)).unflatten(-1, (sets[0].n, -1))
            for s, piece in zip(slices, found.split([s.count for s in slices], 2)):
                piece = piece.unflatten(2, (s.before, s.after)).transpose(3, 4).flatten(2, 4)
                out = out + torch.nn.functional.pad(piece, (0, 0, s.start, out.shape[2] - s.start - s.places))
        if self.means:
            means = torch.stack([part.mean(3) for part in y.split(self._counts, 3)], 3)
            found = _attention(means)
            out = out + torch.cat([one.expand(-1, -1, n, -1) for one, n in zip(found.split(1, 2), self._counts)], 2)
        columns = out.transpose(1, 2).flatten(2)  # [B, places, C]
        results = []
        for i, (part, piece) in enumerate(zip(parts, columns.split(self._counts, 1))):
            if part.fold > 1:
                back, shift = self._maps(i, parameters)[2:]
                piece = (piece @ back.mT + shift).reshape(len(data), part.length, self.channels)
            results.append(piece)
        return torch.cat(results, dim=1)

    # ---- the same in blocks of networks ------------------------------------------------------------------------------
    # Places come last here, [b, C, places]: so the units of a group and the channels of a head lie together.

    def _block(self, data: Tensor) -> int:
        """How many networks to treat at a time."""
        room = _CACHE_BYTES if data.device.type == "cpu" else 2**28
        return max(1, room // (3 * self.channels * sum(self._counts) * data.element_size()))

    def _project(self, data: Tensor, parameters: Sequence[Tensor], room: _Room) -> Tensor:
        """Queries, keys and values, [3, b, C, places]."""
        b, c = len(data), self.channels
        out = room("projected", data, 3, b, c, sum(self._counts))
        for run in self._runs:
            weight, bias = self._maps(run.part, parameters)[:2]
            x = data.narrow(1, run.offset, run.length).reshape(b, run.places, -1).mT
            for which in range(3):
                rows = slice(which * c, (which + 1) * c)
                target = out[which].narrow(2, run.start, run.places)
                torch.baddbmm(bias[rows, None], weight[rows].expand(b, -1, -1), x, out=target)
        return out

    def _scores(self, y: Tensor, room: _Room) -> list[Any]:
        """What attends to what: for each group of tokens queries, keys, values and attention, set by set."""
        b, width = y.shape[1], self.channels // self.heads
        y = y.view(3, b, self.heads, width, -1)
        kept: list[Any] = []
        for sets in self._groups:
            q, k, v = zip(*(_gather(y, tokens, room).unbind(0) for tokens in sets))
            kept.append((q, k, v, _softmax(q, k)))
        if self.means:
            means = torch.stack([part.mean(-1) for part in y.split(self._counts, -1)], 3)
            q, k, v = zip(means.flatten(1, 2).unbind(0))
            kept.append((q, k, v, _softmax(q, k)))
        return kept

    def _cleared(self, out: Tensor) -> Tensor:
        """Sets places to zero that belong to no group; all others are written before they are added to."""
        for part, piece in zip(self.layout.parts, out.split(self._counts, -1)):
            if not part.dims:
                piece.zero_()
        return out

    def _results(self, kept: list[Any], b: int, room: _Room) -> Tensor:
        """What the tokens get, [b, C, places]."""
        width = self.channels // self.heads
        out = self._cleared(room("results", self.weight, b, self.heads, width, sum(self._counts)))
        for sets, (_, _, v, attention) in zip(self._groups, kept):
            for tokens, blocks in zip(sets, attention):
                found = _total([_mix(a, y, tokens.rows) for a, y in zip(blocks, v)])
                _scatter(out[None], found[None], tokens)
        if self.means:
            _, _, (v,), ((a,),) = kept[-1]
            found = (a @ v).unflatten(0, (b, self.heads))
            for i, piece in enumerate(out.split(self._counts, -1)):
                piece += found[:, :, i, :, None]
        return out.flatten(1, 2)

    def _gradients(self, kept: list[Any], grad: Tensor, room: _Room) -> Tensor:
        """Gradients of queries, keys and values, [b, 3C, places], from those of the results, [b, C, places]."""
        b, width = len(grad), self.channels // self.heads
        grad = grad.view(1, b, self.heads, width, -1)
        out = self._cleared(room("gradients", grad, b, 3, self.heads, width, grad.shape[-1]))
        spread = out.transpose(0, 1)
        for sets, found in zip(self._groups, kept):
            g = [_gather(grad, tokens, room)[0] for tokens in sets]
            for tokens, z in zip(sets, _back(*found, g, [tokens.rows for tokens in sets], room)):
                _scatter(spread, z, tokens)
        if self.means:
            sums = torch.stack([part.sum(-1) for part in grad[0].split(self._counts, -1)], 2).flatten(0, 1)
            (z,) = _back(*kept[-1], [sums], [True], room)
            z = z.unflatten(1, (b, self.heads))
            for i, piece in enumerate(spread.split(self._counts, -1)):
                piece += z[:, :, :, i, :, None] / piece.shape[-1]
        return out.flatten(1, 3)

    def _forward_block(self, data: Tensor, parameters: Sequence[Tensor], out: Tensor, room: _Room) -> None:
        results = self._results(self._scores(self._project(data, parameters, room), room), len(data), room)
        for run in self._runs:
            columns = results.narrow(2, run.start, run.places)
            piece = out.narrow(1, run.offset, run.length)
            if run.fold > 1:
                back, shift = self._maps(run.part, parameters)[2:]
                piece.copy_((columns.mT @ back.mT + shift).view(piece.shape))
            else:
                _transpose(piece, columns)

    def _backward_block(
        self,
        data: Tensor,
        parameters: Sequence[Tensor],
        grad: Tensor,
        grad_data: Tensor | None,
        grad_parameters: Sequence[Tensor],
        room: _Room,
    ) -> None:
        b = len(data)
        kept = self._scores(self._project(data, parameters, room), room)
        folded = any(run.fold > 1 for run in self._runs)
        results = self._results(kept, b, room) if folded else None
        columns = room("columns", grad, b, self.channels, sum(self._counts))
        for run in self._runs:
            piece = grad.narrow(1, run.offset, run.length).reshape(b, run.places, -1)
            target = columns.narrow(2, run.start, run.places)
            if results is not None and run.fold > 1:
                back = self._maps(run.part, parameters)[2]
                to_back, to_shift = self._maps(run.part, grad_parameters)[2:]
                to_back += (piece.mT @ results.narrow(2, run.start, run.places).mT).sum(0)
                to_shift += piece.sum((0, 1))
                target.copy_(back.mT @ piece.mT)
            else:
                _transpose(target, piece)
        y = self._gradients(kept, columns, room)
        for run in self._runs:
            piece = y.narrow(2, run.start, run.places)
            weight = self._maps(run.part, parameters)[0]
            to_weight, to_bias = self._maps(run.part, grad_parameters)[:2]
            to_weight += torch.bmm(piece, data.narrow(1, run.offset, run.length).reshape(b, run.places, -1)).sum(0)
            to_bias += piece.sum((0, 2))
            if grad_data is not None:
                target = grad_data.narrow(1, run.offset, run.length)
                if run.fold > 1:
                    target.copy_((piece.mT @ weight).view(target.shape))
                else:
                    torch.bmm(piece.mT, weight.expand(b, -1, -1), out=target)


class _Blocks(torch.autograd.Function):
    """:meth:`NFAttention._plain` in blocks of networks, keeping its input alone."""

    @staticmethod
    def forward(ctx: Any, data: Tensor, layer: NFAttention, *parameters: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(data, *parameters)
        size = layer._block(data)
        out = fresh(data, *data.shape)
        room = _Room()
        for x, y in zip(data.split(size), out.split(size)):
            layer._forward_block(x, parameters, y, room)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        data, *parameters = ctx.saved_tensors
        layer = ctx.layer
        wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[2:]]
        if torch.is_grad_enabled():  # somebody wants to differentiate what we return
            inputs = [t for t, want in zip([data, *parameters], wanted) if want]
            found = iter(torch.autograd.grad(layer._plain(data, parameters), inputs, grad, create_graph=True))
            first, *rest = [next(found) if want else None for want in wanted]
            return first, None, *rest
        grad_parameters = [torch.zeros_like(p) for p in parameters]
        grad_data = fresh(data, *data.shape) if wanted[0] else None
        size = layer._block(data)
        pieces = [None] * len(data) if grad_data is None else grad_data.split(size)
        room = _Room()
        for x, g, d in zip(data.split(size), grad.split(size), pieces):
            layer._backward_block(x, parameters, g, d, grad_parameters, room)
        return grad_data, None, *grad_parameters


# ---- tokens ----------------------------------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Parts that lie side by side and have the same map: all without folds, or one with."""

    part: int  # the first of them
    fold: int
    offset: int  # scalars, in the data
    length: int
    start: int  # places
    places: int


def _runs(layout: Layout) -> list[_Run]:
    out: list[_Run] = []
    start = 0
    for i, part in enumerate(layout.parts):
        run = _Run(i, part.fold, part.offset, part.length, start, part.count)
        if out and out[-1].fold == part.fold == 1:
            last = out.pop()
            run = last._replace(length=last.length + part.length, places=last.places + part.count)
        out.append(run)
        start += part.count
    return out


def _groups(layout: Layout) -> list[tuple[_Set, ...]]:
    """For each group its tokens, in one or two sets."""
    starts = [0, *itertools.accumulate(part.count for part in layout.parts)]
    out, seen = [], set()
    for group, n in layout.groups.items():
        found = []
        for i, part in enumerate(layout.parts):
            for dim, name in enumerate(part.dims):
                if name == group:
                    before, after = math.prod(part.sizes[:dim]), math.prod(part.sizes[dim + 1 :])
                    found.append(_Slices(starts[i], before, n, after, i not in seen))
                    seen.add(i)
        if not found:
            continue  # the blocks of another group, along which no tensor lies
        rows = [s for s in found if s.before > 1 and s.after == 1]
        columns = [s for s in found if s not in rows]
        many, few = sum(s.count for s in rows), sum(s.count for s in columns)
        # Transposing few tokens is quicker than scores between two sets.
        if many >= 4 * few or few >= 4 * many:
            out.append((_Set(many > few, n, tuple(found)),))
        else:
            out.append((_Set(False, n, tuple(columns)), _Set(True, n, tuple(rows))))
    return out


def _attention(qkv: Tensor) -> Tensor:
    """Softmax attention between tokens: queries, keys and values [3, ..., T, F] to [..., T, F]."""
    q, k, v = qkv.unbind(0)
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _gather(y: Tensor, tokens: _Set, room: _Room) -> Tensor:
    """The tokens of a set, [K, b h, T, c n], from [K, b, h, c, places]."""
    kinds, b, h, c, _ = y.shape
    n, total = tokens.n, tokens.count
    if tokens.rows:
        out = room((tokens, kinds), y, kinds, b, h, total, c, n)
        pieces = out.permute(0, 1, 2, 4, 5, 3)
    else:
        out = pieces = room((tokens, kinds), y, kinds, b, h, c, n, total)
    at = 0
    for s in tokens.slices:
        piece = y.narrow(4, s.start, s.places).view(kinds, b, h, c, s.before, n, s.after).transpose(4, 5)
        pieces.narrow(5, at, s.count).unflatten(5, (s.before, s.after)).copy_(piece)
        at += s.count
    return out.view(kinds, b * h, total, c * n) if tokens.rows else out.view(kinds, b * h, c * n, total).mT


def _scatter(y: Tensor, z: Tensor, tokens: _Set) -> None:
    """Adds tokens [K, b h, T, c n] to where :func:`_gather` takes them from."""
    kinds, b, h, c, _ = y.shape
    if tokens.rows:
        pieces = z.view(kinds, b, h, tokens.count, c, tokens.n).permute(0, 1, 2, 4, 5, 3)
    else:
        pieces = z.mT.view(kinds, b, h, c, tokens.n, tokens.count)
    at = 0
    for s in tokens.slices:
        target = y.narrow(4, s.start, s.places).unflatten(4, (s.before, s.n, s.after)).transpose(4, 5)
        piece = pieces.narrow(5, at, s.count).unflatten(5, (s.before, s.after))
        if s.first:
            target.copy_(piece)
        else:
            target += piece
        at += s.count


def _transpose(target: Tensor, source: Tensor) -> None:
    """Writes [b, n, m] into [b, m, n]: one by one, since torch is slow at transposing more than two dimensions."""
    for to, this in zip(target, source):
        to.copy_(this.mT)


def _total(terms: Sequence[Tensor]) -> Tensor:
    """Their sum; ``sum`` would begin by adding zero, which is a pass over the data."""
    return functools.reduce(torch.add, terms)


def _mix(a: Tensor, y: Tensor, rows: bool) -> Tensor:
    """Combinations [b h, T, c n] of tokens y with weights a, laid out as the set wants them."""
    return torch.bmm(a, y) if rows else torch.bmm(y.mT, a.mT).mT


def _softmax(q: Sequence[Tensor], k: Sequence[Tensor]) -> list[tuple[Tensor, ...]]:
    """For each set of queries its attention to each set of keys, [b h, T, S]."""
    scale = 1 / math.sqrt(q[0].shape[-1])
    out = []
    for x in q:
        blocks = [torch.baddbmm(x.new_empty(()), x, y.mT, beta=0, alpha=scale) for y in k]
        joined = blocks[0] if len(blocks) == 1 else torch.cat(blocks, -1)
        out.append(joined.softmax(-1).split([block.shape[-1] for block in blocks], -1))
    return out


def _back(
    q: Sequence[Tensor],
    k: Sequence[Tensor],
    v: Sequence[Tensor],
    attention: Sequence[tuple[Tensor, ...]],
    grads: Sequence[Tensor],
    forms: Sequence[bool],
    room: _Room,
) -> list[Tensor]:
    """For each set the gradients of queries, keys and values, [3, b h, T, c n], from those of its results."""
    scale = 1 / math.sqrt(q[0].shape[-1])
    products = []
    for blocks, g in zip(attention, grads):
        inner = [b * torch.bmm(g, y.mT) for b, y in zip(blocks, v)]
        total = _total([block.sum(-1, keepdim=True) for block in inner])
        products.append([block.addcmul_(b, total, value=-1).mul_(scale) for block, b in zip(inner, blocks)])
    sets = range(len(forms))
    out = []
    for i, rows in enumerate(forms):
        shape = q[i].shape if rows else q[i].mT.shape
        z = room(("back", i, shape), q[i], 3, *shape)
        for j in sets:  # a first product is written, further ones are added
            terms = ((products[i][j], k[j]), (products[j][i].mT, q[j]), (attention[j][i].mT, grads[j]))
            for target, (a, y) in zip(z, terms):
                left, right = (a, y) if rows else (y.mT, a.mT)
                torch.baddbmm(target, left, right, beta=0 if j == 0 else 1, out=target)
        out.append(z if rows else z.mT)
    return out
