"""Equivariant linear maps between the weights of networks: all of them for any symmetry, and those of chains."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.errors import unknown
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.partitions import Plan, Reduction, Target


class _Grouped(nn.Module):
    """The parameters of a plan's matrix products, and the map that they make."""

    def __init__(self, plan: Plan, c_in: int, c_out: int, bias: bool, generator: torch.Generator | None) -> None:
        super().__init__()
        kind = type(self).__name__
        for name, value in (("c_in", c_in), ("c_out", c_out)):
            if value < 1:
                raise UserError(f"{kind}: {name}={value} channels; it must be at least 1")
        self.plan, self.layout = plan, plan.layout
        self.c_in, self.c_out = c_in, c_out
        folds = [part.fold for part in self.layout.parts]
        self.weights = nn.ParameterList(
            torch.empty(
                sum(folds[i.part] for i in product.inputs) * c_in, sum(folds[o.part] for o in product.outputs) * c_out
            )
            for product in plan.products
        )
        if bias:
            self.bias = nn.Parameter(torch.zeros(sum(folds) * c_out))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters(generator)

    @property
    def terms(self) -> int:
        """How many basis terms there are for a pair of channels, without the bias."""
        return self.plan.count

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draws the weights from N(0, 1 / (c_in t)), t the terms that reach an entry of the output; biases are zero.

        The variance is that of arXiv 2402.05232 (appendix A), with folded entries counted as terms.

        Args:
            generator: Where to draw from; torch's global generator if None.
        """
        parts = self.layout.parts
        reach = [0] * len(parts)
        for product in self.plan.products:
            width = sum(parts[i.part].fold for i in product.inputs)
            for target in product.outputs:
                reach[target.part] += width
        for product, weight in zip(self.plan.products, self.weights):
            weight.normal_(generator=generator)
            pieces = weight.split([parts[o.part].fold * self.c_out for o in product.outputs], dim=1)
            for target, piece in zip(product.outputs, pieces):
                piece.mul_(1.0 / math.sqrt(self.c_in * reach[target.part]))
        if self.bias is not None:
            self.bias.zero_()

    def coefficient(self, term: int) -> Tensor:
        """The matrix of a basis map, [fold_in * c_in, fold_out * c_out], a view of the parameters.

        Args:
            term: Position in ``plan.terms``.

        Raises:
            UserError: There is no such term.
        """
        if not 0 <= term < len(self.plan.terms):
            raise UserError(f"term {term}: the plan has {len(self.plan.terms)}, counted from 0")
        p, row, column = self.plan.places[term]
        product, parts = self.plan.products[p], self.layout.parts
        above = sum(parts[i.part].fold for i in product.inputs[:row]) * self.c_in
        before = sum(parts[o.part].fold for o in product.outputs[:column]) * self.c_out
        height = parts[product.inputs[row].part].fold * self.c_in
        width = parts[product.outputs[column].part].fold * self.c_out
        return self.weights[p][above : above + height, before : before + width]

    def forward(self, x: WeightBatch) -> WeightBatch:
        """Applies the map, [B, P, c_in] -> [B, P, c_out].

        Raises:
            UserError: The batch has another layout or another number of channels.
        """
        x = WeightBatch.expect(x, self.layout, self.c_in, type(self).__name__)
        return x.replace(self._map(x.data))

    def _map(self, data: Tensor) -> Tensor:
        return grouped(self.plan, data, list(self.weights), self.bias)

    def extra_repr(self) -> str:
        return f"{self.layout!r}, c_in={self.c_in}, c_out={self.c_out}, terms={self.terms}"


class UNFLinear(_Grouped):
    """Every linear map that commutes with a network's symmetry (UNF, Zhou et al., arXiv 2402.05232, Algorithm 1).

    The terms of :mod:`fleetgym.merging.functionals.partitions` are not computed one by one: all that have the same
    axes in the output are one matrix product of the joined, averaged inputs, and averages are computed once.

    Args:
        spec: The symmetry, or a layout.
        c_in: Channels of the input.
        c_out: Channels of the output.
        bias: Whether each part has a bias, [fold * c_out].
        max_rank: Leaves out terms that carry more axes from input to output; None for all.
        max_terms: Keeps at most so many basis terms, see :class:`~fleetgym.merging.functionals.partitions.Plan`.
        generator: Where initial weights are drawn from; torch's global generator if None.

    Attributes:
        plan: Terms and products.
        weights: For each product of the plan, [sum of fold * c_in over inputs, sum of fold * c_out over outputs].
        bias: [sum of fold * c_out over parts], in the order of the layout; None without.

    Raises:
        UserError: No channels, a cap that cannot be held, or a spec without weights.
    """

    def __init__(
        self,
        spec: WeightSpec | Layout,
        c_in: int,
        c_out: int,
        bias: bool = True,
        max_rank: int | None = None,
        max_terms: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(Plan.of(Layout.of(spec), max_rank, max_terms), c_in, c_out, bias, generator)


class NFLinear(_Grouped):
    """The linear layer for feed-forward chains: multi-layer perceptrons and convolutional networks.

    It spans what :class:`UNFLinear` spans on the same spec; that is NPLinear and the complete HNPLinear of Zhou et al.
    (NeurIPS 2023, arXiv 2302.14040, Tables 5 to 11), convolutions with their filter positions as channels included.

    ``symmetry="np"`` works on ``spec.free("in", "out")``: inputs and outputs are permuted like hidden units.
    ``symmetry="hnp"`` works on ``spec.fix("in", "out")``: only hidden units are, and each input and output is a channel
    of its own. The batches that it takes must be stacked with ``layer.layout`` (or an equal spec).

    With ``parts`` those of the layout, ``f`` their folds, the parameters are, in this order of ``weights``:

    1. for each part with two axes, in the order of the parts, the pointwise term: ``[f c_in, f c_out]``;
    2. for each group g that lies along an axis, in the order in which axes of parts name it first, the terms along g:
       ``[sum of f c_in, sum of f c_out]``, both over all parts that have g among their axes, in the order of the
       parts; input of a part with two axes is its mean over the other one. The result is added to each of these parts,
       constant along its other axis: rows and columns of a matrix are two groups;
    3. the global terms, ``[sum of f c_in, sum of f c_out]`` over all parts; input is the mean over all axes.

    ``bias`` is ``[sum of f c_out]`` over all parts in their order. ``plan.products`` lists the same with positions.
    Channels of a part are ordered ``[f, C]``, as in its view.

    Args:
        spec: The symmetry, or a layout (then it must be free or fixed already, and ``symmetry`` is ``None``).
        c_in: Channels of the input.
        c_out: Channels of the output.
        symmetry: ``"np"``, ``"hnp"`` or None for the spec as it is.
        bias: Whether each part has a bias.
        generator: Where initial weights are drawn from; torch's global generator if None.

    Attributes:
        layout: The layout of what it takes and gives.

    Raises:
        UserError: Unknown symmetry, no channels, or a spec that is no chain; the message names the tensor.
    """

    def __init__(
        self,
        spec: WeightSpec | Layout,
        c_in: int,
        c_out: int,
        symmetry: str | None = "np",
        bias: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        if symmetry not in ("np", "hnp", None):
            raise unknown("symmetry", str(symmetry), ("np", "hnp"))
        if isinstance(spec, WeightSpec) and symmetry is not None:
            spec = spec.free("in", "out") if symmetry == "np" else spec.fix("in", "out")
        layout = Layout.of(spec)
        seen: dict[frozenset[str], str] = {}
        for part in layout.parts:
            reason = None
            if len(part.dims) > 2:
                reason = f"has {len(part.dims)} axes"
            elif len(set(part.dims)) < len(part.dims):
                reason = f"has {part.dims[0]!r} along both axes"
            elif any(group in layout.spec.nested for group in part.dims):
                reason = "has a nested group"
            elif len(part.dims) == 2 and seen.setdefault(frozenset(part.dims), part.name) != part.name:
                reason = f"has the groups of {seen[frozenset(part.dims)]!r}"
            if reason:
                raise UserError(f"NFLinear takes feed-forward chains, and {part.name!r} {reason}; use UNFLinear")
        super().__init__(Plan.of(layout, prune=False), c_in, c_out, bias, generator)


def grouped(plan: Plan, data: Tensor, weights: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The map of a plan: [B, P, c_in] -> [B, P, c_out].

    Args:
        plan: Terms and products.
        data: [B, P, c_in].
        weights: For each product [sum of fold * c_in, sum of fold * c_out].
        bias: [sum of fold * c_out] or None.
    """
    parts, batch, channels = plan.layout.parts, data.shape[0], data.shape[-1]
    c_out = weights[0].shape[1] // sum(parts[target.part].fold for target in plan.products[0].outputs)
    # One split has one backward; narrowing for each part would fill a tensor of whole size with zeros for each.
    views = [
        piece.reshape(batch, *(atom.size for atom in atoms), part.fold * channels)
        for part, atoms, piece in zip(parts, plan.atoms, data.split([part.length for part in parts], dim=1))
    ]
    reduced = _Reductions(plan, views)
    found: list[list[tuple[Target, Tensor]]] = [[] for _ in parts]
    for product, weight in zip(plan.products, weights):
        inputs = [reduced(reduction) for reduction in product.inputs]
        result = (inputs[0] if len(inputs) == 1 else torch.cat(inputs, dim=-1)) @ weight
        pieces = result.split([parts[o.part].fold * c_out for o in product.outputs], dim=-1)
        for target, piece in zip(product.outputs, pieces):
            found[target.part].append((target, piece))
    shifts = [None] * len(parts) if bias is None else bias.split([part.fold * c_out for part in parts])
    out = [
        _assemble([atom.size for atom in atoms], pieces, shift).reshape(batch, part.length, c_out)
        for part, atoms, pieces, shift in zip(parts, plan.atoms, found, shifts)
    ]
    return torch.cat(out, dim=1)


class _Reductions:
    """Averages of parts, each computed once, from the smallest that is there."""

    def __init__(self, plan: Plan, views: list[Tensor]) -> None:
        self.plan, self.views = plan, views
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
                made[ordered] = made[start].mean(gone)
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


def _assemble(sizes: list[int], pieces: list[tuple[Target, Tensor]], shift: Tensor | None) -> Tensor:
    """Adds up what reaches an output part, small to large: [B, *sizes, fold * c_out]."""
    plain = tuple(range(len(sizes)))
    by_pattern: dict[tuple[int, ...], list[tuple[set[int], Tensor]]] = {plain: []}
    for target, piece in pieces:
        blocks = max(target.pattern, default=-1) + 1
        order = [1 + target.carried.index(block) for block in sorted(target.carried)]
        piece = piece.permute(0, *order, -1)
        for block in range(blocks):
            if block not in target.carried:
                piece = piece.unsqueeze(1 + block)
        by_pattern.setdefault(target.pattern, []).append((set(target.carried), piece))
    entries = by_pattern.pop(plain)
    if shift is not None:
        entries.insert(0, (set(), shift))
    total = _fold(entries).expand(-1, *sizes, -1)
    if by_pattern and len(entries) == 1:
        total = total.clone()  # a piece of a product's result, in which diagonals must not be written
    for pattern, found in by_pattern.items():
        total = _add_diagonal(total, pattern, _fold(found))
    return total


def _fold(entries: list[tuple[set[int], Tensor]]) -> Tensor:
    """The sum of tensors that vary along some axes each; what varies along few is added to what varies along more."""
    entries = sorted(entries, key=lambda entry: len(entry[0]))
    while len(entries) > 1:
        (axes, tensor), *entries = entries
        host = next((n for n, (other, _) in enumerate(entries) if axes <= other), len(entries) - 1)
        entries[host] = (entries[host][0] | axes, entries[host][1] + tensor)
        entries.sort(key=lambda entry: len(entry[0]))
    return entries[0][1]


def _add_diagonal(total: Tensor, pattern: tuple[int, ...], piece: Tensor) -> Tensor:
    """Adds [B, *sizes of blocks, C] where indices of one block are equal."""
    if not torch._C._are_functorch_transforms_active():
        _diagonals(total, pattern).add_(piece)
        return total
    # A tensor that a transform does not batch cannot take one in place that it does.
    place = next(place for place, block in enumerate(pattern) if pattern.index(block) < place)
    first = pattern.index(pattern[place])
    inner = total.diagonal(0, 1 + first, 1 + place).movedim(-1, 1 + first)
    rest = pattern[:place] + pattern[place + 1 :]
    inner = inner + piece if len(set(rest)) == len(rest) else _add_diagonal(inner, rest, piece)
    return torch.diagonal_scatter(total, inner.movedim(1 + first, -1), 0, 1 + first, 1 + place)
