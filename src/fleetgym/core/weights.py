"""The permutation and sign symmetry of a network, as one object that everything working on weights reads.

Hidden units of a network have no order, and behind an odd activation (tanh) no sign: re-ordering the units of a layer
and negating some of them, consistently in every tensor that touches them, leaves the function alone. A
:class:`WeightSpec` names the axis behind each dimension of each tensor of a state dict; two dimensions that carry the
same name are re-ordered together. It is derived from a module by tracing (:meth:`WeightSpec.from_module`).

The idea of naming axes is that of ``axes_to_perm`` in Git Re-Basin (Ainsworth et al., ICLR 2023); recurrent cells,
where one tensor carries the same name twice, and sign flips are added here.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from fleetgym.core.errors import UserError, unknown

StateDict = Mapping[str, Tensor]
Rng = np.random.Generator | torch.Generator | int


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Has a module in evaluation mode; then its flags are as they were, submodule by submodule (some may be frozen)."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


class Segment(NamedTuple):
    """A stretch of a dimension: ``size`` units of ``group`` (None: fixed), ``inner`` entries each."""

    group: str | None
    signed: bool
    size: int
    inner: int = 1

    @property
    def length(self) -> int:
        """How many entries it takes."""
        return self.size * self.inner


@dataclass(frozen=True)
class Axis:
    """What lies behind one dimension of a tensor.

    Attributes:
        group: The group of hidden units along this dimension; None where the order is fixed (observations, actions).
        blocks: How often the units are stacked along the dimension: 3 for the gates of a GRU, 4 for an LSTM.
        signs: For each block, whether it is negated together with its unit. Rows of sigmoid gates are not.
        name: What a fixed axis is: ``"in"``, ``"out"`` or ``"fixed"``.
        size: Length of a fixed axis.
        parts: The axes that this one joins end to end (a bidirectional cell's output); ``group`` is then None.
        inner: How many consecutive entries belong to one unit of a block: h w for a flattened feature map [C, h, w].
    """

    group: str | None = None
    blocks: int = 1
    signs: tuple[bool, ...] = ()
    name: str = ""
    size: int = 0
    parts: tuple[Axis, ...] = ()
    inner: int = 1

    def __post_init__(self) -> None:
        if self.group is not None and not self.signs:
            object.__setattr__(self, "signs", (False,) * self.blocks)
        if self.group is not None and len(self.signs) != self.blocks:
            raise UserError(
                f"axis {self.group!r} has {self.blocks} blocks and {len(self.signs)} signs; give one a block"
            )

    @property
    def fixed(self) -> bool:
        """Whether nothing along this dimension can move."""
        return self.group is None and all(part.fixed for part in self.parts)

    @property
    def leaves(self) -> list[Axis]:
        """The axes joined end to end in this one, or itself."""
        return [leaf for part in self.parts for leaf in part.leaves] if self.parts else [self]

    def segments(self, groups: Mapping[str, int]) -> list[Segment]:
        """The dimension from end to end."""
        if self.parts:
            return [segment for part in self.parts for segment in part.segments(groups)]
        if self.group is None:
            return [Segment(None, False, self.size)]
        if self.group not in groups:
            raise unknown("group of an axis", self.group, groups)
        return [Segment(self.group, signed, groups[self.group], self.inner) for signed in self.signs]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        if self.parts:
            return {"parts": [part.to_dict() for part in self.parts]}
        if self.group is None:
            return {"name": self.name, "size": self.size}
        out = {"group": self.group, "blocks": self.blocks, "signs": list(self.signs)}
        return {**out, "inner": self.inner} if self.inner != 1 else out

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Axis:
        """The inverse of :meth:`to_dict`."""
        if "parts" in data:
            return cls(parts=tuple(cls.from_dict(part) for part in data["parts"]))
        return cls(**{**data, "signs": tuple(data.get("signs", ()))})


@dataclass(frozen=True)
class Element:
    """An element of the symmetry group: unit i of the new network is ``signs[i]`` times unit ``perms[i]`` of the old.

    Attributes:
        perms: For each group an index vector, [n] int64.
        signs: For each group a vector of plus and minus ones, [n] int8; all ones where signs are no symmetry.
    """

    perms: dict[str, Tensor]
    signs: dict[str, Tensor]

    def inverse(self) -> Element:
        """The element that undoes this one."""
        perms = {group: torch.argsort(perm) for group, perm in self.perms.items()}
        return Element(perms, {group: self.signs[group][perms[group]] for group in perms})

    def __matmul__(self, other: Element) -> Element:
        """``(g @ h)`` acts as h first, then g."""
        return Element(
            {group: other.perms[group][perm] for group, perm in self.perms.items()},
            {group: self.signs[group] * other.signs[group][perm] for group, perm in self.perms.items()},
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Element) or self.perms.keys() != other.perms.keys():
            return NotImplemented if not isinstance(other, Element) else False
        return all(
            torch.equal(self.perms[group], other.perms[group]) and torch.equal(self.signs[group], other.signs[group])
            for group in self.perms
        )

    __hash__ = None  # holds tensors

    @property
    def is_identity(self) -> bool:
        """Whether it changes nothing."""
        return all(
            torch.equal(perm, torch.arange(len(perm))) and bool((self.signs[group] == 1).all())
            for group, perm in self.perms.items()
        )

    def to_dict(self) -> dict[str, dict[str, list[int]]]:
        """As JSON-able values."""
        return {
            "perms": {group: perm.tolist() for group, perm in self.perms.items()},
            "signs": {group: sign.tolist() for group, sign in self.signs.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Mapping[str, Sequence[int]]]) -> Element:
        """The inverse of :meth:`to_dict`."""
        return cls(
            {group: torch.tensor(perm, dtype=torch.int64) for group, perm in data["perms"].items()},
            {group: torch.tensor(sign, dtype=torch.int8) for group, sign in data["signs"].items()},
        )


@dataclass(frozen=True)
class WeightSpec:
    """The symmetry of a network: the named axis behind each dimension of each tensor of its state dict.

    Attributes:
        axes: For each key of the state dict, one :class:`Axis` a dimension.
        groups: For each group of interchangeable units, how many they are.
        signed: For each group, whether its units may also be negated. A group that is not listed may not.
        buffers: Keys of the state dict that are buffers, not parameters.
        inputs: Size of the last dimension of each input, where the trace shows it.
        memory: Positions of the outputs that are recurrent state. They are expressed in hidden units, so they move
            with the symmetry while every other output stays.
        nested: For a group whose units form blocks, the group of these blocks: blocks move as its units do, and units
            move inside their block (the channels of attention heads). A permutation of such a group is one of all
            its units that maps blocks to blocks.
    """

    axes: Mapping[str, tuple[Axis, ...]]
    groups: Mapping[str, int]
    signed: Mapping[str, bool] = field(default_factory=dict)
    buffers: tuple[str, ...] = ()
    inputs: tuple[int | None, ...] = ()
    memory: tuple[int, ...] = ()
    nested: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_module(cls, module: nn.Module, example_input: Any = None, *, strict: bool = True) -> WeightSpec:
        """Derives the symmetry from a module by tracing it; with an example it is proved on the module, too.

        With an example the module is run on it and every torch function that it calls is followed: linear layers,
        convolutions, normalisations, pooling, reshapes between them, embeddings, attention (heads, and channels inside
        a head), recurrent layers and cells, residual and concatenation paths, tied weights, loops in Python. The
        result is proved by :meth:`verify`. What it shows holds for inputs that take the same path through ``forward``;
        a forward that branches on values of tensors is refused. Memory in the example must be zero.

        Without one the module is traced by ``torch.fx`` along the last dimension of its values only: linear layers,
        RNN, GRU and LSTM, layer normalisation, element-wise functions, sums, products, concatenation and slicing, as
        policies are made of. Arguments of ``forward`` that have a default take it. Nothing is run, so nothing is
        proved; :meth:`verify` does it where the sizes of the inputs are known.

        Found is less than there is in two cases: inputs of grouped convolutions and of grouped queries move in whole
        groups only, and units that an operation tells apart (sorting, fixed tables, rotary embeddings) stay.

        Args:
            module: The network.
            example_input: A tensor (or a tuple of arguments) to run it on.
            strict: Whether an operation without a rule is an error. If not, what goes through it stays fixed, which
                is always right and finds less symmetry.

        Returns:
            The spec.

        Raises:
            UserError: The module cannot be traced, holds an operation without a rule or one that breaks the symmetry
                (its name and the submodule are in the message), or the proof fails.
        """
        from fleetgym.core.tracing import derive

        spec = derive(module, example_input, strict=strict)
        if example_input is not None:
            spec._prove(module, example_input)
        return spec

    def _prove(self, module: nn.Module, example_input: Any) -> None:
        """:meth:`verify` in float64 where the module can be run so, else with a tolerance of 1e-4."""
        args = example_input if isinstance(example_input, tuple) else (example_input,)
        precise = None
        try:
            precise = copy.deepcopy(module).double()
            doubled = torch.utils._pytree.tree_map_only(
                Tensor, lambda x: x.double() if x.is_floating_point() else x, args
            )
            with torch.no_grad(), torch.random.fork_rng(devices=[]):
                precise(*doubled)
        except Exception:  # it holds what cannot be copied, or types that it wants as they are
            precise = None
        if precise is not None:
            self.verify(precise, doubled, tolerance=1e-9)
        else:
            self.verify(module, args, tolerance=1e-4)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor."""
        return {
            key: tuple(sum(part.length for part in axis.segments(self.groups)) for axis in axes)
            for key, axes in self.axes.items()
        }

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return self.shapes

    @cached_property
    def cost_keys(self) -> tuple[str, ...]:
        """Keys whose tensors count in a distance between weights: all but buffers that nothing moves."""
        return tuple(k for k, axes in self.axes.items() if k not in self.buffers or not all(a.fixed for a in axes))

    # ---- elements ---------------------------------------------------------------------------------------------------

    def identity(self) -> Element:
        """The element that changes nothing."""
        return Element(
            {group: torch.arange(size) for group, size in self.groups.items()},
            {group: torch.ones(size, dtype=torch.int8) for group, size in self.groups.items()},
        )

    def random(self, rng: Rng) -> Element:
        """An element drawn uniformly: a permutation of every group, and signs where they are a symmetry.

        Args:
            rng: A NumPy or torch generator, or a seed.
        """
        if isinstance(rng, torch.Generator):
            rng = int(torch.randint(2**62, (), generator=rng))
        rng = np.random.default_rng(rng)
        perms, signs = {}, {}
        for group in self._parents_first:
            size = self.groups[group]
            perms[group] = torch.from_numpy(rng.permutation(size))
            if group in self.nested:
                blocks = perms[self.nested[group]]
                inside = [rng.permutation(size // len(blocks)) for _ in blocks]
                perms[group] = self._blockwise(blocks, torch.from_numpy(np.stack(inside)))
            flips = rng.integers(0, 2, size) * 2 - 1
            signs[group] = torch.from_numpy(flips).to(torch.int8) if self.signed.get(group) else torch.ones(size).char()
        return Element(perms, signs)

    @cached_property
    def _parents_first(self) -> list[str]:
        return sorted(self.groups, key=lambda group: group in self.nested)

    @staticmethod
    def _blockwise(blocks: Tensor, inside: Tensor) -> Tensor:
        """The permutation that takes block ``blocks[i]`` to i and moves its units by ``inside[i]``, [n / b, b]."""
        return (blocks[:, None] * inside.shape[1] + inside).flatten()

    def check_element(self, element: Element) -> None:
        """Raises a UserError unless ``element`` belongs to this spec's group."""
        for group, size in self.groups.items():
            for kind, table in (("permutation", element.perms), ("signs", element.signs)):
                if group not in table or tuple(table[group].shape) != (size,):
                    got = tuple(table[group].shape) if group in table else "nothing"
                    raise UserError(f"{kind} of group {group!r}: expected shape ({size},), got {got}")
            if not torch.equal(torch.sort(element.perms[group]).values, torch.arange(size)):
                raise UserError(f"group {group!r}: not a permutation of 0..{size - 1}: {element.perms[group].tolist()}")
            sign = element.signs[group]
            if not bool((sign.abs() == 1).all()) or not (self.signed.get(group) or bool((sign == 1).all())):
                raise UserError(f"group {group!r}: signs must be 1{' or -1' if self.signed.get(group) else ''}")
        for group, parent in self.nested.items():
            blocks = element.perms[group].view(self.groups[parent], -1) // (self.groups[group] // self.groups[parent])
            if not torch.equal(blocks, element.perms[parent][:, None].expand_as(blocks)):
                raise UserError(f"group {group!r}: its permutation does not move whole blocks as {parent!r} moves")

    # ---- acting on weights ------------------------------------------------------------------------------------------

    def validate(self, state_dict: StateDict, *, name: str = "state dict", batched: bool = False) -> None:
        """Checks that a state dict belongs to this spec.

        Args:
            state_dict: Tensors by key.
            name: What to call it in the message.
            batched: Whether tensors carry one leading axis N.

        Raises:
            UserError: A key is missing or foreign, or a shape differs; the message has the key and both shapes.
        """
        for key, shape in self._shapes.items():
            if key not in state_dict:
                raise UserError(f"{name} lacks {key!r} of shape {shape}; it belongs to another architecture")
            got = tuple(state_dict[key].shape)
            if (got[1:] if batched else got) != shape:
                wanted = ("N", *shape) if batched else shape
                raise UserError(f"{name}: {key!r} has shape {got}, expected {wanted}; it has another architecture")
        for key in state_dict:
            if key not in self.axes:
                raise UserError(f"{name} has {key!r} of shape {tuple(state_dict[key].shape)}, which the spec does not")

    def apply(self, state_dict: StateDict, element: Element, *, batched: bool = False) -> dict[str, Tensor]:
        """Acts on weights: other weights, the same function.

        Args:
            state_dict: Tensors by key; they are not touched.
            element: The group element.
            batched: Whether tensors carry one leading axis N; the element then acts on each of the N.

        Returns:
            New tensors by key.

        Raises:
            UserError: The state dict or the element does not belong to this spec.
        """
        self.validate(state_dict, batched=batched)
        self.check_element(element)
        made: dict[Axis, tuple[Tensor, Tensor | None]] = {}
        out = {}
        for key, tensor in state_dict.items():
            start = tensor
            for dim, axis in enumerate(self.axes[key]):
                if axis.fixed:
                    continue
                if axis not in made:
                    made[axis] = self._index(axis, element)
                index, sign = made[axis]
                dim += batched
                tensor = tensor.index_select(dim, index.to(tensor.device))
                if sign is not None and tensor.is_floating_point():
                    tensor = tensor * sign.to(tensor).view(-1, *[1] * (tensor.dim() - dim - 1))
            out[key] = tensor.clone() if tensor is start else tensor
        return out

    def permute(self, state_dict: StateDict, perms: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """:meth:`apply` for a permutation of some groups, signs untouched."""
        for group in perms:
            if group not in self.groups:
                raise unknown("group", group, self.groups)
        identity = self.identity()
        perms = {**identity.perms, **perms}
        for group, parent in self.nested.items():
            if torch.equal(perms[group], identity.perms[group]):  # not given: blocks move whole
                inside = identity.perms[group].view(len(perms[parent]), -1)[:1].expand(len(perms[parent]), -1)
                perms[group] = self._blockwise(perms[parent], inside)
        return self.apply(state_dict, Element(perms, identity.signs))

    def free(self, *names: str) -> WeightSpec:
        """The same tensors with fixed axes made permutable: axes of one name and one length move together.

        Freeing ``"in"`` and ``"out"`` gives the symmetry NP of Zhou et al. (NeurIPS 2023, arXiv 2302.14040), in which
        inputs and outputs are permuted as hidden units are. It is no symmetry of the function: layers that read weights
        use it to share parameters. :meth:`fix` is the inverse.

        Args:
            names: Names of fixed axes, ``"in"`` or ``"out"`` for a derived spec. A name without fixed axes changes
                nothing. The group is called as the axis is, or ``in.5`` where axes of that name differ in length or
                a hidden group has the name already.

        Returns:
            A spec with the same tensors and more groups.

        Raises:
            UserError: No axis has the name, or it is ``"fixed"``: such axes have nothing in common but the name.
        """
        leaves = [leaf for axes in self.axes.values() for axis in axes for leaf in axis.leaves if leaf.group is None]
        sizes: dict[str, list[int]] = {}
        for leaf in leaves:
            if leaf.size not in sizes.setdefault(leaf.name, []):
                sizes[leaf.name].append(leaf.size)
        for name in names:
            if name not in sizes and name not in ("in", "out") and name not in self.groups:
                raise unknown("fixed axis", name, sizes)
            if name in ("fixed", ""):
                raise UserError(
                    f"free({name!r}): axes of this name have nothing in common; give them names of their own"
                )
        made = {
            (name, size): f"{name}.{size}" if len(sizes[name]) > 1 or name in self.groups else name
            for name in dict.fromkeys(names)
            for size in sizes.get(name, ())
        }
        taken = [group for group in made.values() if group in self.groups]
        if taken:
            raise UserError(f"free: group {taken[0]!r} exists already; give the axes or the group another name")

        def freed(axis: Axis) -> Axis:
            if axis.parts:
                return Axis(parts=tuple(freed(part) for part in axis.parts))
            group = made.get((axis.name, axis.size)) if axis.group is None else None
            return axis if group is None else Axis(group)

        return replace(
            self,
            axes={key: tuple(freed(axis) for axis in axes) for key, axes in self.axes.items()},
            groups={**self.groups, **{group: size for (_, size), group in made.items()}},
        )

    def fix(self, *groups: str) -> WeightSpec:
        """The same symmetry without some groups: their units keep their places and signs.

        Args:
            groups: Names of groups. Groups that are nested in one another (heads and their channels) go together:
                blocks cannot move when the units in them may not, and their units are not free while blocks stay.
                A name of axes that are fixed already changes nothing; the name of axes that :meth:`free` made
                permutable fixes all of them.

        Returns:
            A spec with the same tensors and fewer groups.

        Raises:
            UserError: A name is neither a group nor that of fixed axes.
        """
        names = {
            leaf.name for axes in self.axes.values() for axis in axes for leaf in axis.leaves if leaf.group is None
        }
        named: dict[str, str] = {}  # what the axes of a group that goes are called
        for name in groups:
            found = [g for g, size in self.groups.items() if g in (name, f"{name}.{size}")]
            if not found and name not in names | {"in", "out"}:
                raise unknown("group", name, self.groups)
            named |= {group: name if name in ("in", "out") else "fixed" for group in found}
        gone = set(named) | {child for child, parent in self.nested.items() if parent in named}
        # Blocks cannot move when the units in them are fixed.
        gone |= {parent for child, parent in self.nested.items() if child in named}
        gone |= {child for child, parent in self.nested.items() if parent in gone}

        def without(axis: Axis) -> Axis:
            if axis.parts:
                return Axis(parts=tuple(without(part) for part in axis.parts))
            if axis.group not in gone:
                return axis
            size = sum(part.length for part in axis.segments(self.groups))
            return Axis(name=named.get(axis.group, "fixed"), size=size)

        return replace(
            self,
            axes={key: tuple(without(axis) for axis in axes) for key, axes in self.axes.items()},
            groups={group: size for group, size in self.groups.items() if group not in gone},
            signed={group: signed for group, signed in self.signed.items() if group not in gone},
            nested={child: parent for child, parent in self.nested.items() if child not in gone},
        )

    def _index(self, axis: Axis, element: Element) -> tuple[Tensor, Tensor | None]:
        indices, signs, offset, flips = [], [], 0, False
        for part in axis.segments(self.groups):
            perm = torch.arange(part.size) if part.group is None else element.perms[part.group]
            indices.append((perm[:, None] * part.inner + torch.arange(part.inner)).flatten() + offset)
            plain = part.group is None or not part.signed
            sign = torch.ones(part.size, dtype=torch.int8) if plain else element.signs[part.group]
            signs.append(sign.repeat_interleave(part.inner))
            flips = flips or part.signed
            offset += part.length
        return torch.cat(indices), torch.cat(signs) if flips else None

    def distance(self, a: StateDict, b: StateDict) -> float:
        """Squared Euclidean distance between two sets of weights, over :attr:`cost_keys`, in float64."""
        return math.fsum(float((a[k].double() - b[k].double()).square().sum()) for k in self.cost_keys)

    # ---- self-check -------------------------------------------------------------------------------------------------

    def check(self, module: nn.Module, example_input: Any = None, rng: Rng = 0, *, stir: bool = False) -> float:
        """How far a random element moves the module's outputs. Exact symmetry gives rounding error only.

        Args:
            module: The module; it is run in evaluation mode and left as it was.
            example_input: A tensor or a tuple of arguments; if None, standard normal [3, 7, in] for each input.
            rng: Draws the element and the input.
            stir: Whether to disturb the weights first. Gains of one, shifts of zero and fresh running statistics look
                the same in any order, so a wrong axis of theirs would go unseen.

        Returns:
            Largest absolute difference over all outputs but the memory.

        Raises:
            UserError: An input's size is not known and no example is given.
        """
        return self._deviation(module, example_input, rng, stir)[0]

    def _deviation(self, module: nn.Module, example_input: Any, rng: Rng, stir: bool) -> tuple[float, float]:
        """The largest difference, and the largest output."""
        if isinstance(rng, torch.Generator):
            rng = int(torch.randint(2**62, (), generator=rng))
        rng = np.random.default_rng(rng)
        weights = module.state_dict()
        if example_input is None:
            if not self.inputs or None in self.inputs:
                raise UserError("the size of the input does not follow from the module; pass example_input")
            dtype = next((t.dtype for t in weights.values() if t.is_floating_point()), torch.float32)
            device = next((t.device for t in weights.values()), "cpu")
            draw = [torch.from_numpy(rng.standard_normal((3, 7, size))) for size in self.inputs]
            example_input = tuple(x.to(device, dtype) for x in draw)
        args = example_input if isinstance(example_input, tuple) else (example_input,)
        if stir:
            weights = self._stirred(weights, rng)
        moved = self.apply(weights, self.random(rng))
        outputs = []
        for state in (weights, moved):
            # What a forward draws (a sampled action) it must draw alike both times.
            with evaluating(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                outputs.append(
                    _tensors(torch.func.functional_call(module, state, args, tie_weights=False), self.memory)
                )
        pairs = [(x, y) for x, y in zip(*outputs) if x.numel()]
        pairs = [(x.double(), y.double()) for x, y in pairs if not x.is_complex()]
        gaps = [float(torch.where(x == y, torch.zeros_like(x), x - y).abs().max()) for x, y in pairs]
        sizes = [float(torch.where(x.isfinite(), x, torch.zeros_like(x)).abs().max()) for x, _ in pairs]
        return max(gaps, default=0.0), max(sizes, default=0.0)

    def _stirred(self, weights: StateDict, rng: np.random.Generator) -> dict[str, Tensor]:
        """Weights that differ from place to place; positive ones (variances) stay positive."""
        out = dict(weights)
        tied: dict[tuple[int, tuple[int, ...]], str] = {}
        for key, tensor in weights.items():
            first = tied.setdefault((tensor.data_ptr(), tuple(tensor.shape)), key)
            if first != key:
                out[key] = out[first]
                continue
            if not tensor.is_floating_point() or not tensor.numel() or not bool(torch.isfinite(tensor).all()):
                continue
            # A buffer that the spec fixes and whose entries differ (a mask, a table) may have to be as it is.
            equal = bool((tensor == tensor.flatten()[0]).all())
            if key in self.buffers and all(axis.fixed for axis in self.axes[key]) and not equal:
                continue
            noise = torch.from_numpy(rng.standard_normal(tuple(tensor.shape))).to(tensor)
            if bool((tensor > 0).all()):
                out[key] = tensor * (0.2 * noise.clamp(-2, 2)).exp()
            else:
                scale = float(tensor.std()) if tensor.numel() > 1 else 0.0
                out[key] = tensor + (0.2 * scale or 0.05) * noise
        return out

    def verify(
        self, module: nn.Module, example_input: Any = None, rng: Rng = 0, tolerance: float | None = None
    ) -> float:
        """Proves a spec, derived or written by hand, on the module itself; raises where it fails.

        The axes must fit the module's tensors, every group must lie along some axis, and random elements must leave
        the outputs alone (:meth:`check`): one acts on the weights as they are, one on disturbed weights.

        Args:
            module: See :meth:`check`.
            example_input: See :meth:`check`.
            rng: See :meth:`check`.
            tolerance: Largest deviation allowed, in units of the largest output where that exceeds one; 1e-5 for
                float32 weights and 1e-12 for float64 unless given.

        Returns:
            The deviation, in the same units.

        Raises:
            UserError: The axes do not fit, those of a tensor with two names differ, a group moves nothing, or the
                deviation is larger.
        """
        kind = type(module).__name__
        state = module.state_dict()
        self.validate(state, name=kind)
        first: dict[int, str] = {}
        for key, tensor in module.state_dict(keep_vars=True).items():
            other = first.setdefault(id(tensor), key)
            if self.axes[other] != self.axes[key]:
                raise UserError(f"{kind}: {other!r} and {key!r} are one tensor; give them the same axes")
        along = {part.group for axes in self.axes.values() for axis in axes for part in axis.segments(self.groups)}
        idle = [g for g in self.groups if g not in along | {self.nested[c] for c in along & self.nested.keys()}]
        if idle:
            raise UserError(f"{kind}: no axis carries group {idle[0]!r}; name it in axes or leave it out")
        if tolerance is None:
            double = all(t.dtype == torch.float64 for t in state.values() if t.is_floating_point())
            tolerance = 1e-12 if double else 1e-5
        worst = 0.0
        for stir in (False, True):
            deviation, size = self._deviation(module, example_input, rng, stir)
            deviation /= max(1.0, size)
            if not deviation <= tolerance:
                raise UserError(
                    f"{kind}: a random element of its group moves the output by {deviation:.3g}, more "
                    f"than {tolerance:.3g}; the spec does not describe this module"
                )
            worst = max(worst, deviation)
        return worst

    # ---- plain values -----------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {
            "schema": 1,
            "axes": {key: [axis.to_dict() for axis in axes] for key, axes in self.axes.items()},
            "groups": dict(self.groups),
            "signed": dict(self.signed),
            "buffers": list(self.buffers),
            "inputs": list(self.inputs),
            "memory": list(self.memory),
            **({"nested": dict(self.nested)} if self.nested else {}),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> WeightSpec:
        """The inverse of :meth:`to_dict`.

        Raises:
            UserError: Written by a newer version.
        """
        if data.get("schema") != 1:
            raise UserError(f"weight spec of schema {data.get('schema')}; this version reads schema 1, please upgrade")
        return cls(
            axes={key: tuple(Axis.from_dict(axis) for axis in axes) for key, axes in data["axes"].items()},
            groups=dict(data["groups"]),
            signed=dict(data["signed"]),
            buffers=tuple(data["buffers"]),
            inputs=tuple(data["inputs"]),
            memory=tuple(data["memory"]),
            nested=dict(data.get("nested", {})),
        )

    def __str__(self) -> str:
        lines = [
            f"{name}: {size} units{', signed' if self.signed.get(name) else ''}"
            f"{f', in blocks of {self.nested[name]}' if name in self.nested else ''}"
            for name, size in self.groups.items()
        ]
        return "\n".join(
            lines + [f"{key}: {json.dumps([a.to_dict() for a in axes])}" for key, axes in self.axes.items()]
        )


def _tensors(value: Any, skip: Iterable[int] = ()) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [tensor for i, item in enumerate(value) if i not in skip for tensor in _tensors(item)]
    return []
