"""From wires to a spec: what is left free at the end of a trace is the symmetry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from fleetgym.core.errors import UserError
from fleetgym.core.tracing.wires import Node, Wire, leaves
from fleetgym.core.weights import Axis, WeightSpec

Stretch = tuple[Node, Node, int]


def build(
    module: nn.Module,
    wires: Mapping[str, Sequence[tuple[Wire, Wire] | None]],
    inputs: Sequence[int | None],
    memory: Sequence[int],
) -> WeightSpec:
    """Makes the spec of a module.

    Args:
        module: The module.
        wires: For each key of its state dict the wires (permutation, signs) of each dimension; None is fixed.
        inputs: Size of the last dimension of each input.
        memory: Positions of the outputs that are recurrent state.
    """
    state = module.state_dict()
    _flatten_homes([leaf for dims in wires.values() for dim in dims if dim for leaf in leaves(dim[0])])
    stretches = {key: [_stretches(w, n) for w, n in zip(wires[key], state[key].shape)] for key in state}

    # Which sign vector belongs to a group: the first that always lies exactly on it and on no other group.
    chosen: dict[Node, Node] = {}
    owner: dict[Node, Node] = {}
    bad: set[Node] = set()
    flat = [stretch for dims in stretches.values() for dim in dims for stretch in dim]
    for perm, sign, size in flat:
        if sign.fixed:
            continue
        (unit, inner), (flip, repeats) = _unit(perm), _unit(sign)
        whole = perm.size == size == sign.size and inner == repeats
        if perm.fixed or not whole or owner.setdefault(flip, unit) is not unit:
            bad.add(flip)
    for perm, sign, _ in flat:
        if not sign.fixed and _unit(sign)[0] not in bad:
            chosen.setdefault(_unit(perm)[0], _unit(sign)[0])

    names: dict[Node, str] = {}
    nested: dict[str, str] = {}

    def enter(unit: Node) -> None:
        if unit in names:
            return
        base = name = unit.name or "units"
        count = 2
        while name in names.values():
            name, count = f"{base}#{count}", count + 1
        names[unit] = name
        if unit.home is not None:
            enter(unit.home.root())
            nested[name] = names[unit.home.root()]

    for perm, _, _ in flat:
        if not perm.fixed:
            enter(_unit(perm)[0])

    def axis(dim: list[Stretch]) -> Axis:
        made: list[Axis] = []
        for perm, sign, size in dim:
            if perm.fixed:
                label = perm.name if perm.name in ("in", "out") else "fixed"
                if made and made[-1].group is None and made[-1].name == label:
                    size += made.pop().size
                made.append(Axis(name=label, size=size))
                continue
            unit, inner = _unit(perm)
            signs = (not sign.fixed and chosen.get(unit) is _unit(sign)[0],)
            if made and made[-1].group == names[unit] and made[-1].inner == inner:
                signs = made.pop().signs + signs
            made.append(Axis(names[unit], len(signs), signs, inner=inner))
        return made[0] if len(made) == 1 else Axis(parts=tuple(made))

    trained = dict(module.named_parameters(remove_duplicate=False))
    return WeightSpec(
        axes={key: tuple(axis(dim) for dim in dims) for key, dims in stretches.items()},
        groups={name: unit.size for unit, name in names.items()},
        signed={name: unit in chosen for unit, name in names.items()},
        buffers=tuple(key for key in state if key not in trained),
        inputs=tuple(inputs),
        memory=tuple(memory),
        nested=nested,
    )


def _unit(leaf: Node) -> tuple[Node, int]:
    """Which units a leaf carries, and how many entries each takes."""
    return (leaf.home.root(), leaf.block()) if leaf.rigid else (leaf, 1)


def _flatten_homes(found: Sequence[Node]) -> None:
    """Keeps one level of nesting: a group whose home is itself nested moves with that home, in whole blocks."""
    todo = list(found)
    while todo:
        leaf = todo.pop()
        if leaf.home is None:
            continue
        home = leaf.home.leaves()[0]
        todo.append(home)
        if home.home is not None and not home.rigid and not leaf.rigid:
            leaf.rigid = True


def _stretches(wires: tuple[Wire, Wire] | None, size: int) -> list[Stretch]:
    """A dimension as stretches over which both the permutation and the sign are of one node."""
    if wires is None:
        return [(Node(size, True, "fixed"), Node(size, True), size)]
    perm, sign = ([(leaf, leaf.size) for leaf in leaves(wire)] for wire in wires)
    if sum(n for _, n in perm) != sum(n for _, n in sign):
        raise UserError(f"internal: permutation and sign of an axis of {size} differ in length")
    out = []
    while perm and sign:
        (p, n), (s, m) = perm[0], sign[0]
        step = min(n, m)
        out.append((p, s, step))
        perm[0], sign[0] = (p, n - step), (s, m - step)
        perm, sign = perm[perm[0][1] == 0 :], sign[sign[0][1] == 0 :]
    return out
