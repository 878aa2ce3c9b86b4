"""Which linear maps commute with a network's symmetry, and how to compute all of them with few matrix products.

An equivariant linear map from one part of the weights to another is a sum of basis maps, one for each valid partition
of the indices of both (Zhou et al., Universal Neural Functionals, arXiv 2402.05232, Theorem 3.3): indices in one block
are equal, and only indices of one group may share a block. Blocks with input indices only are averaged over, blocks
with output indices only are broadcast along, blocks with both are carried from input to output.

Two things are added to the paper. A group whose units form blocks of another group (the channels of attention heads)
has two indices, the block and the place in it, and places may be equal only in equal blocks: that is the complete basis
of the nested symmetry. And a partition that has more blocks of a group than the group has units is left out, because
its map is a combination of others: the basis stays a basis however small the groups are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from math import comb, prod

from fleetgym.core import UserError
from fleetgym.merging.functionals.layout import Layout, Part


@dataclass(frozen=True)
class Atom:
    """An index of a part: of a dimension, or one of the two of a dimension whose group is nested.

    Attributes:
        label: The group; for the inner index of a nested group, the place in the block.
        size: How many values it takes.
        parent: Which of the part's atoms is the block that this one lies in; None for a group of its own.
    """

    label: str
    size: int
    parent: int | None = None


@dataclass(frozen=True)
class Reduction:
    """A part with some indices set equal and others averaged over.

    Attributes:
        part: Position of the part in the layout.
        pattern: For each atom the number of its block; atoms of one block are set equal. Blocks are numbered in the
            order of their first atoms.
        kept: The blocks that stay, in the order in which they are to stand; the mean is taken over the others.
    """

    part: int
    pattern: tuple[int, ...]
    kept: tuple[int, ...]

    @property
    def plain(self) -> bool:
        """Whether it is the part itself."""
        return self.kept == tuple(range(len(self.pattern)))


@dataclass(frozen=True)
class Target:
    """Where a result goes in an output part.

    Attributes:
        part: Position of the part in the layout.
        pattern: For each atom the number of its block; two atoms of one block make a diagonal, off which nothing is
            added.
        carried: The blocks along which the result varies, in the order of its axes; along the others it is the same.
    """

    part: int
    pattern: tuple[int, ...]
    carried: tuple[int, ...]


@dataclass(frozen=True)
class Product:
    """One matrix product: every input that has the same axes, for every output that they go to.

    Attributes:
        labels: The group (or place) along each axis that inputs and outputs have; none for global terms.
        sizes: Their lengths.
        inputs: What is joined along channels, ``fold * c_in`` channels each, in this order.
        outputs: What the channels of the result are cut into, ``fold * c_out`` channels each, in this order.
    """

    labels: tuple[str, ...]
    sizes: tuple[int, ...]
    inputs: tuple[Reduction, ...]
    outputs: tuple[Target, ...]


@dataclass(frozen=True)
class Term:
    """A basis map, with every pair of folded entries of the two parts: ``fold`` times ``fold`` basis terms.

    Attributes:
        output: Position of the output part.
        input: Position of the input part.
        partition: The block of each atom, those of the output part first.
        fold: How many basis terms it stands for.
        carried: How many axes it carries; the block of an axis that is carried too is not counted.
        identity: Whether it is the map of each place to itself.
    """

    output: int
    input: int
    partition: tuple[int, ...]
    fold: int
    carried: int
    identity: bool


def atoms_of(layout: Layout, part: Part) -> tuple[Atom, ...]:
    """The indices of a part: one for each dimension, and one for each block in which its group is nested."""
    nested, found = layout.spec.nested, []
    for group in part.dims:
        chain = [group]
        while chain[-1] in nested:
            chain.append(nested[chain[-1]])
        above = None
        for label in reversed(chain):
            size = layout.groups[label] // (layout.groups[nested[label]] if label in nested else 1)
            found.append(Atom(label, size, above))
            above = len(found) - 1
    return tuple(found)


def partitions(
    output: tuple[Atom, ...], source: tuple[Atom, ...] = (), *, prune: bool = True
) -> Iterator[tuple[int, ...]]:
    """Every valid partition of the indices of two parts.

    Args:
        output: Indices of the output part.
        source: Indices of the input part.
        prune: Whether partitions with more blocks of a group than it has units are left out.

    Yields:
        For each index the number of its block, outputs first; blocks are numbered in the order of their first indices.
    """
    shift = len(output)
    items = [*output, *(Atom(a.label, a.size, None if a.parent is None else a.parent + shift) for a in source)]

    def extend(assigned: tuple[int, ...], blocks: tuple[tuple[str, int | None], ...]) -> Iterator[tuple[int, ...]]:
        if len(assigned) == len(items):
            yield assigned
            return
        atom = items[len(assigned)]
        kind = (atom.label, None if atom.parent is None else assigned[atom.parent])
        for number, other in enumerate(blocks):
            if other == kind:
                yield from extend((*assigned, number), blocks)
        if not prune or blocks.count(kind) < atom.size:
            yield from extend((*assigned, len(blocks)), (*blocks, kind))

    yield from extend((), ())


@cache
def bell(n: int) -> int:
    """The n-th Bell number, how many partitions a set of n things has."""
    return 1 if n == 0 else sum(comb(n - 1, k) * bell(k) for k in range(n))


def formula(output: Part, source: Part) -> int:
    """How many partitions a pair of parts has when no group is nested or small: the product of Bell(count) of groups.

    This is the count of arXiv 2402.05232, section 3, without the folded entries.
    """
    return prod(bell(count) for count in Counter(output.dims + source.dims).values())


class Plan:
    """Every basis term of a layout, grouped into matrix products.

    Args:
        layout: The order of the weights.
        max_rank: Terms that carry more axes than this are left out, but those of a place to itself; None for all.
        max_terms: At most this many basis terms are kept: first those of a place to itself, then those that carry
            more axes, have fewer diagonals and join nearer tensors. None for all.
        prune: See :func:`partitions`.

    Attributes:
        layout: See above.
        atoms: For each part its indices.
        terms: The basis maps, in the order in which they were found.
        products: The matrix products, those with more axes first.
        places: For each term, which product computes it, at which of its inputs and at which of its outputs.
        count: How many basis terms there are for a pair of channels, folded entries counted.

    Raises:
        UserError: ``max_rank`` is negative, or ``max_terms`` is too small for the terms of a place to itself.
    """

    def __init__(
        self, layout: Layout, max_rank: int | None = None, max_terms: int | None = None, *, prune: bool = True
    ) -> None:
        if max_rank is not None and max_rank < 0:
            raise UserError(f"max_rank={max_rank}: it must be at least 0, or None for all terms")
        self.layout = layout
        self.atoms = tuple(atoms_of(layout, part) for part in layout.parts)
        terms = [
            self._term(o, i, partition)
            for o, output in enumerate(self.atoms)
            for i, source in enumerate(self.atoms)
            for partition in partitions(output, source, prune=prune)
        ]
        if max_rank is not None:
            terms = [term for term in terms if term.carried <= max_rank or term.identity]
        if max_terms is not None:
            terms = self._nearest(terms, max_terms)
        self.terms = tuple(terms)
        self.count = sum(term.fold for term in terms)
        self._group()

    @classmethod
    def of(
        cls, layout: Layout, max_rank: int | None = None, max_terms: int | None = None, *, prune: bool = True
    ) -> Plan:
        """The plan of a layout, made once for each layout object and set of options."""
        made = layout.__dict__.setdefault("_plans", {})
        key = (max_rank, max_terms, prune)
        if key not in made:
            made[key] = cls(layout, max_rank, max_terms, prune=prune)
        return made[key]

    def _term(self, output: int, source: int, partition: tuple[int, ...]) -> Term:
        split = len(self.atoms[output])
        shared = set(partition[:split]) & set(partition[split:])
        above = {
            partition[atom.parent]
            for number, atom in zip(partition, self.atoms[output])
            if atom.parent is not None and number in shared
        }
        parts = self.layout.parts
        return Term(
            output,
            source,
            partition,
            parts[output].fold * parts[source].fold,
            len(shared - above),
            output == source and partition[:split] == partition[split:] == tuple(range(split)),
        )

    def _nearest(self, terms: list[Term], most: int) -> list[Term]:
        own = sum(term.fold for term in terms if term.identity)
        if most < own:
            raise UserError(f"max_terms={most}: {own} are needed for the terms of each place to itself")

        def distance(n: int) -> tuple[int, ...]:
            term = terms[n]
            split = len(self.atoms[term.output])
            halves = term.partition[:split], term.partition[split:]
            diagonals = sum(len(half) - len(set(half)) for half in halves)
            return not term.identity, -term.carried, diagonals, abs(term.output - term.input), n

        kept: list[int] = []
        for n in sorted(range(len(terms)), key=distance):
            most -= terms[n].fold
            if most < 0:
                break
            kept.append(n)
        return [terms[n] for n in sorted(kept)]

    def _group(self) -> None:
        """Terms with one output pattern share their inputs; outputs with the same inputs share the product."""
        # Outputs with the most axes say in which order the axes stand, so that they need no transposed copy.
        order: dict[tuple[str, ...], tuple[str, ...]] = {}
        into: dict[Target, list[tuple[Reduction, int]]] = {}
        for n in sorted(range(len(self.terms)), key=lambda n: (-len(self.atoms[self.terms[n].output]), n)):
            term = self.terms[n]
            atoms = self.atoms[term.output]
            out, source = term.partition[: len(atoms)], term.partition[len(atoms) :]
            numbers: dict[int, int] = {}  # blocks of the input, numbered by themselves
            pattern = tuple(numbers.setdefault(block, len(numbers)) for block in source)
            carried = [block for block in dict.fromkeys(out) if block in numbers]
            label = {block: atom.label for block, atom in zip(out, atoms)}
            names = [label[block] for block in carried]
            wanted = order.setdefault(tuple(sorted(names)), tuple(names))
            carried = sorted(carried, key=lambda block: (wanted.index(label[block]), block))
            reduction = Reduction(term.input, pattern, tuple(numbers[block] for block in carried))
            into.setdefault(Target(term.output, out, tuple(carried)), []).append((reduction, n))
        alike: dict[tuple[tuple[str, ...], tuple[Reduction, ...]], list[Target]] = {}
        for target, found in into.items():
            found.sort(key=lambda pair: (pair[0].part, pair[0].pattern, pair[0].kept))
            label = {block: atom.label for block, atom in zip(target.pattern, self.atoms[target.part])}
            labels = tuple(label[block] for block in target.carried)
            alike.setdefault((labels, tuple(reduction for reduction, _ in found)), []).append(target)
        products = []
        for (labels, inputs), targets in alike.items():
            targets.sort(key=lambda target: (target.part, target.pattern))
            size = {block: atom.size for block, atom in zip(targets[0].pattern, self.atoms[targets[0].part])}
            sizes = tuple(size[block] for block in targets[0].carried)
            products.append(Product(labels, sizes, inputs, tuple(targets)))
        products.sort(key=lambda p: (-len(p.labels), p.outputs[0].part, p.outputs[0].pattern, p.outputs[0].carried))
        self.products = tuple(products)
        self.places: list[tuple[int, int, int]] = [(0, 0, 0)] * len(self.terms)
        for p, product in enumerate(products):
            for column, target in enumerate(product.outputs):
                for row, (_, n) in enumerate(into[target]):
                    self.places[n] = (p, row, column)
