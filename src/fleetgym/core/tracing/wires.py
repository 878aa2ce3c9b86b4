"""Wires: what lies along one dimension of a tensor, as stretches of units that move together.

A wire is a list of nodes, and nodes are joined by union-find: a residual sum ties both summands' nodes, a slice splits
a node, an output pins it. Two relations go beyond equality. A node may be *nested* in another, its home: its units form
blocks, one for each unit of the home, and blocks move with the home while units also move inside their block (the
channels of attention heads, of a group normalisation's groups). And it may be *rigid* in its home: the same, but inside
a block nothing moves (the pixels of a flattened feature map).

What becomes of a home is followed lazily: whoever reads the leaves of a wire finds nested nodes split where their home
was split, and freed or fixed where it was fixed. Nodes only ever lose freedom, so the order of ties does not matter.
"""

from __future__ import annotations


class Conflict(Exception):
    """Two axes that the module combines cannot be the same; becomes a UserError that names the operation."""


class Node:
    """A stretch of an axis whose units move (or change sign) together; a union-find node that can be split.

    Attributes:
        size: How many units; None where the trace does not show it.
        fixed: Whether nothing here can move.
        name: What to call the group.
        rank: Of the names of united nodes the one of least rank is kept.
        parent: The node that this one was united with.
        parts: The nodes that this one was split into.
        home: The node whose units are the blocks of this one's.
        rigid: Whether units keep their order inside a block.
        seen: Whether it was ever united with another.
    """

    __slots__ = ("size", "fixed", "name", "rank", "parent", "parts", "home", "rigid", "seen")

    def __init__(
        self,
        size: int | None,
        fixed: bool = False,
        name: str = "",
        rank: float = 5,
        home: Node | None = None,
        rigid: bool = False,
    ) -> None:
        self.size, self.fixed, self.name = size, fixed, name
        self.rank = 0 if name in ("in", "out") else 9 if name in ("", "fixed") else rank
        self.parent: Node | None = None
        self.parts: list[Node] = []
        self.home, self.rigid = home, rigid
        self.seen = False

    def root(self) -> Node:
        """The node that stands for this one."""
        node = self
        while node.parent is not None:
            node = node.parent
        return node

    def leaves(self) -> list[Node]:
        """The nodes that this one consists of."""
        root = self.root()
        root._settle()
        return [leaf for part in root.parts for leaf in part.leaves()] if root.parts else [root]

    def split(self, *sizes: int) -> None:
        """Splits a leaf without a home."""
        start = 0
        for size in sizes:
            name = self.name if self.fixed else f"{self.name}[{start}:{start + size}]"
            part = Node(size, self.fixed, name, self.rank)
            part.seen = self.seen
            self.parts.append(part)
            start += size

    def divide(self, at: int) -> None:
        """Splits a leaf in two; a nested one where its home can be split, or it is fixed."""
        if self.home is not None:
            block = self.size // self.home.root().size
            if at % block == 0:
                self.home.root().divide(at // block)
                self._settle()
                return
            self.fix()
        self.split(at, self.size - at)

    def fix(self) -> None:
        """Pins it, and its home with it."""
        root = self.root()
        if root.parts:
            for part in root.parts:
                part.fix()
        elif not root.fixed:
            root.fixed = True
            home, root.home, root.rigid = root.home, None, False
            if home is not None:
                home.fix()

    def block(self) -> int:
        """How many of its units belong to one unit of its home."""
        return self.size // self.home.root().size

    def _settle(self) -> None:
        """Follows what became of the home."""
        while self.home is not None and not self.parts:
            homes = self.home.leaves()
            block = self.size // sum(home.size for home in homes)
            if len(homes) > 1:
                rigid, self.home = self.rigid, None
                self.split(*[home.size * block for home in homes])
                for part, home in zip(self.parts, homes):
                    part.home, part.rigid = home, rigid
                return
            (home,) = homes
            if home.fixed:
                if self.rigid:
                    self.fix()
                self.home = None
                if not self.fixed and home.size > 1:
                    self.split(*[block] * home.size)
            elif home.rigid:
                self.home, self.rigid = home.home, True
            else:
                self.home = home
                return

    def unite(self, other: Node) -> None:
        """Makes two leaves of one size one."""
        p, q = self.root(), other.root()
        if p is q:
            return
        p.seen = q.seen = True
        if q.rank < p.rank:
            p.name, p.rank = q.name, q.rank
        homes = [(node.home.root(), node.rigid) for node in (p, q) if node.home is not None]
        fixed = p.fixed or q.fixed
        q.parent, q.home = p, None
        if homes:
            p.home, p.rigid = homes[0]
        if len(homes) == 2:
            # The home of larger blocks first: blocks of the other lie inside them.
            (coarse, stiff), (fine, rigid) = sorted(homes, key=lambda pair: pair[0].size)
            count, rest = divmod(fine.size, coarse.size)
            if rest:
                fine.fix()
                fixed = True
            elif count == 1:
                tie([coarse], [fine])
                p.rigid = stiff or rigid
            elif stiff:
                tie([fine], spread([coarse], count))
                p.home, p.rigid = coarse, True
            else:
                tie([fine], [Node(fine.size, home=coarse)])
                p.home, p.rigid = fine, rigid
        if fixed:
            p.fixed = False
            p.fix()


Wire = list[Node]


def leaves(wire: Wire) -> Wire:
    """The nodes along a wire that are neither split nor united with another."""
    return [leaf for node in wire for leaf in node.leaves()]


def total(wire: Wire) -> int | None:
    """Its length; None if it is not known."""
    sizes = [leaf.size for leaf in leaves(wire)]
    return None if None in sizes else sum(sizes)


def pin(*wires: Wire) -> None:
    """Fixes wires."""
    for wire in wires:
        for leaf in leaves(wire):
            leaf.fix()


def fixed_wire(size: int | None, name: str = "fixed") -> Wire:
    """A wire along which nothing moves."""
    return [Node(size, True, name)]


def is_fixed(wire: Wire) -> bool:
    """Whether nothing along it moves."""
    return all(leaf.fixed for leaf in leaves(wire))


def resize(wire: Wire, size: int) -> None:
    """Tells a wire its length: fills in the one stretch whose length was not known."""
    open_ = [leaf for leaf in leaves(wire) if leaf.size is None]
    known = sum(leaf.size or 0 for leaf in leaves(wire))
    if len(open_) == 1 and size >= known:
        open_[0].size = size - known
    elif not open_ and known != size:
        raise Conflict(f"an axis of {known} units meets one of {size}")


def aligned(a: Wire, b: Wire) -> list[tuple[Node, Node]] | None:
    """Splits both wires at each other's borders; None if a length is not known (such wires are fixed ones)."""
    if total(a) is None and total(b) is not None:
        resize(a, total(b))
    if total(b) is None and total(a) is not None:
        resize(b, total(a))
    if total(a) is None or total(b) is None:
        return None
    if total(a) != total(b):
        raise Conflict(f"an axis of {total(a)} units meets one of {total(b)}")
    # A node may stand several times in a wire (the gates of a cell), so after a split all is read again.
    while True:
        pairs, split = [], False
        left, right = leaves(a), leaves(b)
        for x, y in zip(left, right):
            if x.size != y.size:
                big, small = (x, y) if x.size > y.size else (y, x)
                big.divide(small.size)
                split = True
                break
            pairs.append((x, y))
        if not split:
            return pairs


def tie(a: Wire, b: Wire) -> None:
    """Says that two wires are one and the same."""
    pairs = aligned(a, b)
    if pairs is None:
        pin(a, b)
        return
    for x, y in pairs:
        # Uniting one pair can split another through a common home.
        if x.leaves() == [x.root()] and y.leaves() == [y.root()]:
            x.unite(y)
        else:
            tie([x], [y])


def product_signs(a: Wire, b: Wire) -> Wire:
    """The signs that a product carries: those of the one factor that has any; none if both have the same."""
    pairs = aligned(a, b)
    if pairs is None:
        pin(a, b)
        return fixed_wire(total(a) or total(b))
    out = []
    for x, y in pairs:
        if x.fixed:
            out.append(y)
        elif y.fixed:
            out.append(x)
        else:
            if x.root() is not y.root():
                pin([x], [y])
            out.append(Node(x.size, True))
    return out


def cut(wire: Wire, start: int, stop: int) -> Wire:
    """The stretch [start, stop) of a wire."""
    length = total(wire)
    if length is None:
        return fixed_wire(stop - start)
    borders = [Node(size, True) for size in (start, stop - start, length - stop) if size]
    aligned(wire, borders)
    out, offset = [], 0
    for leaf in leaves(wire):
        if start <= offset < stop:
            out.append(leaf)
        offset += leaf.size
    return out


def spread(wire: Wire, count: int) -> Wire:
    """Each unit ``count`` times in a row."""
    if count == 1:
        return wire
    return [
        Node(leaf.size * count, True, leaf.name) if leaf.fixed else Node(leaf.size * count, home=leaf, rigid=True)
        for leaf in leaves(wire)
    ]


def nest(wire: Wire, count: int, name: str = "") -> Wire:
    """Cuts a wire into ``count`` blocks of equal length and returns the wire along which the blocks lie."""
    block = total(wire) // count
    while True:
        out: Wire = []
        offset, filled = 0, True
        for leaf in leaves(wire):
            room = block - offset % block
            if room == block and leaf.size % block == 0:
                out += _homes(leaf, leaf.size // block, name)
            elif leaf.size <= room:
                if leaf.size == room:  # a block of several stretches stays where it is
                    out.append(Node(1, True))
            else:
                leaf.divide(room if room < block else leaf.size // block * block)
                filled = False
                break
            offset += leaf.size
        if filled:
            return out


def _homes(leaf: Node, count: int, name: str) -> Wire:
    """What a leaf's units are blocks of, if they form ``count`` blocks."""
    if count == 1 or leaf.fixed:
        return [Node(count, True)]
    if count == leaf.size:
        return [leaf]
    if leaf.home is None:
        leaf.home = Node(count, name=name or f"{leaf.name}.blocks", rank=6)
        return [leaf.home]
    home = leaf.home.root()
    if home.size % count == 0:
        return _homes(home, count, name)
    if count % home.size == 0:
        if leaf.rigid:
            return spread([home], count // home.size)
        leaf.home = Node(count, name=name or f"{leaf.name}.blocks", rank=6, home=home)
        return [leaf.home]
    leaf.fix()
    return [Node(count, True)]
