"""Values of a traced run: for each dimension of a tensor what lies along it, and the moves that all rules share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fleetgym.core.tracing.wires import (
    Conflict,
    Node,
    Wire,
    cut,
    fixed_wire,
    is_fixed,
    leaves,
    nest,
    pin,
    product_signs,
    spread,
    tie,
    total,
)


class Dim:
    """One dimension of a value.

    A *local* dimension runs inside the blocks of another one, its ``outer``: after [B, T, H * d] became [B, T, H, d],
    which channel stands at place c depends on the head. Its wires are then those of all blocks, end to end.

    Attributes:
        size: Its length.
        perm: What moves along it.
        sign: What changes sign along it.
        outer: The dimension in whose blocks it runs, or None.
        tag: Identity: copies of a dimension keep it, so that local ones find their outer.
    """

    __slots__ = ("size", "perm", "sign", "outer", "tag")

    def __init__(self, size: int, perm: Wire, sign: Wire, outer: Dim | None = None, tag: object | None = None) -> None:
        self.size, self.perm, self.sign, self.outer = size, perm, sign, outer
        self.tag = object() if tag is None else tag

    @property
    def fixed(self) -> bool:
        """Whether nothing moves or changes sign along it."""
        return is_fixed(self.perm) and is_fixed(self.sign)

    def like(self, perm: Wire | None = None, sign: Wire | None = None) -> Dim:
        """The same dimension with other wires."""
        return Dim(self.size, self.perm if perm is None else perm, self.sign if sign is None else sign, self.outer,
                   self.tag)  # fmt: skip

    def pin(self) -> None:
        """Fixes it."""
        pin(self.perm, self.sign)


@dataclass
class Value:
    """A tensor of the run.

    Attributes:
        dims: Its dimensions.
        source: Whether it comes straight from an argument of forward.
        zero: Whether it is all zeros, which any permutation and any sign leave as they are.
        memory: Whether it is recurrent memory, which as an output moves with the symmetry.
    """

    dims: list[Dim]
    source: bool = False
    zero: bool = False
    memory: bool = False

    @property
    def fixed(self) -> bool:
        """Whether nothing along it moves."""
        return all(dim.fixed for dim in self.dims)

    def pin(self) -> None:
        """Fixes all its dimensions."""
        for dim in self.dims:
            dim.pin()

    def pin_signs(self) -> None:
        """Fixes the signs of all its dimensions."""
        for dim in self.dims:
            pin(dim.sign)

    def place(self, dim: int) -> int:
        """An index of a dimension, counted from the front."""
        return dim + len(self.dims) if dim < 0 else dim


def flat(size: int, name: str = "fixed") -> Dim:
    """A dimension along which nothing moves."""
    return Dim(size, fixed_wire(size, name), fixed_wire(size))


def constant(shape: Sequence[int]) -> Value:
    """A value in which nothing moves."""
    return Value([flat(n) for n in shape])


def free(size: int, name: str, rank: int = 5) -> Dim:
    """A dimension of which nothing is known yet."""
    fixed = size == 1
    return Dim(size, [Node(size, fixed, name, rank)], [Node(size, fixed, name)])


def uniform(size: int) -> Dim:
    """A dimension along which all entries are equal: every order of them is the same, and a sign is not."""
    return Dim(size, [Node(size, size == 1)], fixed_wire(size))


def empty(size: int) -> Dim:
    """A dimension of zeros: any order and any signs are the same."""
    return Dim(size, [Node(size, size == 1)], [Node(size)])


def plain(dim: Dim) -> Dim:
    """A local dimension as one of its own: all blocks must then be in the same order."""
    if dim.outer is None:
        return dim
    size, outer = dim.size, dim.outer
    if is_fixed(outer.perm):
        blocks = total(dim.perm) // size
        first = [cut(wire, 0, size) for wire in (dim.perm, dim.sign)]
        for i in range(1, blocks):
            tie(first[0], cut(dim.perm, i * size, (i + 1) * size))
            tie(first[1], cut(dim.sign, i * size, (i + 1) * size))
        return Dim(size, first[0], first[1], tag=dim.tag)
    tie(dim.perm, spread(outer.perm, size))
    pin(dim.sign)
    return Dim(size, fixed_wire(size), fixed_wire(size), tag=dim.tag)


def tidy(dims: Sequence[Dim]) -> list[Dim]:
    """Makes local dimensions plain whose outer one is gone."""
    tags = {dim.tag: dim for dim in dims}
    out = []
    for dim in dims:
        if dim.outer is not None and dim.outer.tag not in tags:
            dim = plain(dim)
        elif dim.outer is not None and dim.outer is not tags[dim.outer.tag]:
            dim = Dim(dim.size, dim.perm, dim.sign, tags[dim.outer.tag], dim.tag)
        out.append(dim)
    return out


def join(pairs: Sequence[tuple[Dim, Dim]], signs: Sequence[bool]) -> list[tuple[Dim, Dim]]:
    """Ties dimensions of two values pairwise.

    Args:
        pairs: Dimensions of the first and of the second value, of equal sizes.
        signs: For each pair, whether the signs are tied, too.

    Returns:
        The pairs as they are now: local dimensions that cannot stay so are plain.
    """
    partner = {a.tag: b.tag for a, b in pairs}
    order = sorted(range(len(pairs)), key=lambda i: pairs[i][0].outer is not None)
    out = list(pairs)
    for i in order:
        a, b = pairs[i]
        if a.size != b.size:
            raise Conflict(f"a dimension of {a.size} meets one of {b.size}")
        both = a.outer is not None and b.outer is not None
        if not (both and partner.get(a.outer.tag) is b.outer.tag and total(a.perm) == total(b.perm)):
            a, b = plain(a), plain(b)
        tie(a.perm, b.perm)
        if signs[i]:
            tie(a.sign, b.sign)
        out[i] = (a, b)
    return out


def merge(dims: Sequence[Dim]) -> tuple[Dim, dict[object, tuple[Dim, int, int]]]:
    """Several neighbouring dimensions as one, the last running fastest.

    Returns:
        The dimension, and for the tag of each dimension that others may be local to: the merged one, how often the
        blocks of the old one are repeated before it, and how many entries of the merged one lie in one of its units.
    """
    dims = [dim for dim in dims if dim.size != 1] or list(dims[:1])
    if len(dims) == 1:
        return dims[0], {dims[0].tag: (dims[0], 1, 1)}
    size = 1
    for dim in dims:
        size *= dim.size
    last = dims[-1]
    inside: dict[object, tuple[int, int]] = {last.tag: (1, 1)}
    for dim in reversed(dims[:-1]):
        if last.outer is not None and last.outer.tag is dim.tag:
            pin(dim.sign)
            last = Dim(dim.size * last.size, last.perm, last.sign, dim.outer)
        else:
            last = plain(last)
            if is_fixed(dim.perm) and dim.outer is None:
                pin(dim.sign)
                last = Dim(dim.size * last.size, last.perm * dim.size, last.sign * dim.size)
                inside = {tag: (before * dim.size, after) for tag, (before, after) in inside.items()}
            else:
                last.pin()
                count = last.size
                last = Dim(dim.size * count, spread(dim.perm, count), spread(dim.sign, count), dim.outer)
                if dim.outer is not None:  # its blocks now are blocks of spread units
                    last.outer = dim.outer
                inside = {dim.tag: (1, count)}
    return last, {tag: (last, *how) for tag, how in inside.items()}


def split(dim: Dim, sizes: Sequence[int], name: str = "") -> list[Dim]:
    """One dimension as several, the last running fastest; the inverse of :func:`merge`."""
    sizes = list(sizes)
    live = [i for i, n in enumerate(sizes) if n != 1]
    out = [flat(1) for _ in sizes]
    if len(live) < 2:
        for i in live:
            out[i] = dim
        return out
    first, rest = live[0], live[1:]
    count = sizes[first]
    size = dim.size // count
    if dim.fixed and dim.outer is None:
        for i in live:
            out[i] = flat(sizes[i], leaves(dim.perm)[0].name)
        return out
    if dim.outer is not None:
        blocks = total(dim.perm) // dim.size
        perm = nest(dim.perm, blocks * count, name)
    else:
        perm = nest(dim.perm, count, name)
    outer = Dim(count, perm, fixed_wire(total(perm)), dim.outer)
    inner = Dim(size, dim.perm, dim.sign, outer)
    if dim.outer is None and is_fixed(perm) and _periodic(dim, count):
        outer = flat(count)
        inner = Dim(size, cut(dim.perm, 0, size), cut(dim.sign, 0, size))
    out[first] = outer
    for i, made in zip(rest, split(inner, [sizes[i] for i in rest], name)):
        out[i] = made
    return out


def _periodic(dim: Dim, count: int) -> bool:
    """Whether its wires are one stretch repeated."""
    length = total(dim.perm) // count
    for wire in (dim.perm, dim.sign):
        pieces = [[leaf.root() for leaf in cut(wire, i * length, (i + 1) * length)] for i in range(count)]
        if not all(
            len(piece) == len(pieces[0]) and all(x is y or x.fixed and y.fixed for x, y in zip(piece, pieces[0]))
            for piece in pieces
        ):
            return False
    return True


def reshape(value: Value, shape: Sequence[int], name: str = "") -> Value:
    """A value in another shape."""
    old, new = list(value.dims), list(shape)
    out: list[Dim] = []
    moved: dict[object, tuple[Dim, int, int]] = {}
    i = j = 0
    while i < len(old) or j < len(new):
        a, b = i, j
        left = right = 1
        while a == i and b == j or left != right:
            if (left <= right and a < len(old)) or b >= len(new):
                if a >= len(old):
                    raise Conflict(f"{[d.size for d in old]} does not become {list(shape)}")
                left *= old[a].size
                a += 1
            else:
                right *= new[b]
                b += 1
            if left == right and a > i and b > j:
                break
            if a >= len(old) and b >= len(new):
                break
        if left != right:
            raise Conflict(f"{[d.size for d in old]} does not become {list(shape)}")
        part, sizes = old[i:a], new[j:b]
        if [d.size for d in part] == sizes:
            out += part
        elif not part:
            out += [flat(1) for _ in sizes]
        elif not sizes:
            pass
        else:
            one, where = merge(part)
            pieces = split(one, sizes, name)
            last = next((piece for piece in reversed(pieces) if piece.size != 1), pieces[-1])
            moved.update({tag: (last, before, after) for tag, (_, before, after) in where.items()})
            out += pieces
        i, j = a, b
    made = []
    tags = {dim.tag for dim in out}
    for dim in out:
        if dim.outer is not None and dim.outer.tag not in tags and dim.outer.tag in moved:
            last, before, after = moved[dim.outer.tag]
            blocks = total(dim.perm) // dim.size
            wanted = total(last.perm)
            if after == 1 and wanted in (blocks, blocks * before):
                times = wanted // blocks
                dim = Dim(dim.size, dim.perm * times, dim.sign * times, last, dim.tag)
            elif after == 1 and blocks % wanted == 0 and _periodic(dim, blocks // wanted):
                length = wanted * dim.size
                dim = Dim(dim.size, cut(dim.perm, 0, length), cut(dim.sign, 0, length), last, dim.tag)
        made.append(dim)
    return Value(tidy(made), source=value.source, zero=value.zero, memory=value.memory)


def contract(a: Value, b: Value, left: str, right: str, out: str) -> Value:
    """A product of two values summed over letters, as in ``einsum``.

    Args:
        a: The first value.
        b: The second.
        left: A letter for each dimension of the first.
        right: And of the second.
        out: The letters of the result; those that are missing are summed over.
    """
    mine, other = dict(zip(left, a.dims)), dict(zip(right, b.dims))
    both = [x for x in mine if x in other and mine[x].size == other[x].size]
    for x in mine:
        if x in other and x not in both and 1 not in (mine[x].size, other[x].size):
            raise Conflict(f"a dimension of {mine[x].size} meets one of {other[x].size}")
    if a.zero or b.zero:
        sizes = {x: max(v[x].size for v in (mine, other) if x in v) for x in {*mine, *other}}
        return Value([flat(sizes[x]) for x in out], zero=True)
    pairs = join([(mine[x], other[x]) for x in both], [x not in out for x in both])
    alias = {}
    for x, (p, q) in zip(both, pairs):
        mine[x], other[x] = p, q
        alias[q.tag] = p
    dims = []
    for x in {**mine, **other}:
        if x not in out and x not in both:
            pin((mine if x in mine else other)[x].sign)
    for x in out:
        if x in both:
            dim = mine[x].like(sign=product_signs(mine[x].sign, other[x].sign))
        else:
            holders = [v[x] for v in (mine, other) if x in v]
            dim = max(holders, key=lambda d: d.size)
        if dim.outer is not None and dim.outer.tag in alias:
            dim = Dim(dim.size, dim.perm, dim.sign, alias[dim.outer.tag], dim.tag)
        dims.append(dim)
    return Value(tidy(dims))


def broadcast(values: Sequence[Value], signs: str) -> Value:
    """Element-wise work on values of broadcastable shapes.

    Args:
        values: The values.
        signs: ``"sum"``: signs are tied; ``"product"``: they multiply; ``"none"``: they are pinned.
    """
    live = [v for v in values if not v.zero or signs != "sum"]
    rank = max(len(v.dims) for v in values)
    sizes = [1] * rank
    for v in values:
        for i, dim in enumerate(v.dims, rank - len(v.dims)):
            sizes[i] = max(sizes[i], dim.size) if dim.size != 0 else 0
    if not live or (signs == "product" and any(v.zero for v in live)):
        return Value([flat(n) for n in sizes], zero=True)
    out = _padded(live[0], rank)
    if signs == "none":
        live[0].pin_signs()
    for v in live[1:]:
        dims = _padded(v, rank)
        if signs == "none":
            v.pin_signs()
        same = [i for i in range(rank) if out[i].size == dims[i].size]
        pairs = join([(out[i], dims[i]) for i in same], [signs == "sum"] * len(same))
        alias = {}
        made: dict[int, Dim] = {}
        for i, (p, q) in zip(same, pairs):
            alias[q.tag] = p
            made[i] = p.like(sign=product_signs(p.sign, q.sign)) if signs == "product" else p
        for i in range(rank):
            if i not in made:
                dim = out[i] if out[i].size != 1 else dims[i]
                if signs == "sum":
                    pin(dim.sign)  # one number is added to all
                made[i] = dim
        out = []
        for i in range(rank):
            dim = made[i]
            if dim.outer is not None and dim.outer.tag in alias:
                dim = Dim(dim.size, dim.perm, dim.sign, alias[dim.outer.tag], dim.tag)
            out.append(dim)
    # Zeros of a larger shape spread what is there.
    out = [dim if dim.size == n else flat(n) for dim, n in zip(out, sizes)]
    return Value(tidy(out))


def _padded(value: Value, rank: int) -> list[Dim]:
    return [flat(1) for _ in range(rank - len(value.dims))] + value.dims


def narrow(value: Value, place: int, start: int, stop: int) -> Value:
    """The entries [start, stop) along a dimension."""
    if (start, stop) == (0, value.dims[place].size):
        return value
    dims, dim = _own(value, place)
    dims[place] = new = Dim(stop - start, cut(dim.perm, start, stop), cut(dim.sign, start, stop))
    return Value(_inside(dims, dim.tag, new, start, stop), zero=value.zero)


def _own(value: Value, place: int) -> tuple[list[Dim], Dim]:
    """The dimensions, with that at ``place`` plain; what is local to a local one becomes plain first."""
    dims, dim = list(value.dims), value.dims[place]
    if dim.outer is not None:
        dims = [plain(d) if d.outer is not None and d.outer.tag is dim.tag else d for d in dims]
        dims[place] = dim = plain(dim)
    return dims, dim


def _inside(dims: list[Dim], tag: object, new: Dim | None, start: int, stop: int) -> list[Dim]:
    """Cuts what is local to a dimension, directly or through another, as that one is cut."""
    out = []
    changed: dict[object, Dim | None] = {tag: new}
    for dim in sorted(dims, key=lambda d: _depth(d)):
        if dim.outer is not None and dim.outer.tag in changed:
            at = changed[dim.outer.tag]
            blocks = total(dim.perm)
            unit = blocks // _whole(dim, tag)
            made = Dim(
                dim.size,
                cut(dim.perm, start * unit, stop * unit),
                cut(dim.sign, start * unit, stop * unit),
                at,
                dim.tag,
            )
            changed[dim.tag] = made
    for dim in dims:
        out.append(changed[dim.tag] if dim.tag in changed and dim.tag is not tag else dim)
    return tidy(out)


def _depth(dim: Dim) -> int:
    return 0 if dim.outer is None else 1 + _depth(dim.outer)


def _whole(dim: Dim, tag: object) -> int:
    """The size of the outermost dimension ``tag`` that a dimension is local to."""
    outer = dim.outer
    while outer.tag is not tag:
        outer = outer.outer
    return total(outer.perm)


def pick(value: Value, place: int, index: int) -> Value:
    """One entry along a dimension, which must then stay where it is."""
    dims, dim = _own(value, place)
    dim.pin()
    index += dim.size if index < 0 else 0
    dims.pop(place)
    return Value(_inside(dims, dim.tag, None, index, index + 1), zero=value.zero)


def drop(value: Value, places: Sequence[int], keep: bool) -> Value:
    """Reduces dimensions."""
    for i in places:
        pin(value.dims[i].sign)
    gone = set(places)
    dims = [flat(1) if i in gone else dim for i, dim in enumerate(value.dims) if keep or i not in gone]
    return Value(tidy(dims), zero=value.zero)
