"""Matching: which element of a network's symmetry group brings its weights nearest to another network's.

One cost for every matcher, the squared distance over all tensors together::

    min_g ||ref - g.theta||^2  =  const - 2 max_g F(g),     F(g) = <ref, g.theta>

Per group of units, g is a signed permutation matrix (of blocks of units, and of units inside their block, for a group
that is nested in another). Written with P (the permutation) and D = diag(signs) P, a tensor that touches one group adds
<U, P> or <U, D> to F, and one that touches two adds <R, M_a T M_b^T> with M in {P, D}. For the recurrent weights of a
cell both sides are the same group: F is quadratic and the problem is a quadratic assignment, which is why assigning
units by a linearisation alone (Git Re-Basin's weight matching) stops early.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from fleetgym.core.checkpoint import check_finite
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging import MATCHERS


@dataclass(frozen=True)
class MatchResult:
    """What a matcher found.

    Attributes:
        element: The group element g.
        distance_before: ||ref - theta||^2.
        distance_after: ||ref - g.theta||^2; never above ``distance_before`` if the result is guarded.
        seconds: CPU seconds.
        iterations: Steps of the matcher, all starts together.
    """

    element: Element
    distance_before: float
    distance_after: float
    seconds: float
    iterations: int


@dataclass
class _Single:
    """A tensor [S, N, K] that touches one group; K folds all fixed dimensions."""

    group: str
    signed: bool
    ref: Tensor
    own: Tensor


@dataclass
class _Pair:
    """Tensors [S, Na, F, Nb] that touch groups a (rows) and b (columns); F stacks gates and fixed dimensions.

    Laid out so that every product with them is one matrix product over all frames.
    """

    a: str
    b: str
    row_signed: bool
    column_signed: bool
    ref: Tensor
    own: Tensor


# S counts points. A problem holds one pair of networks, at which any number of points is looked at, or S pairs, each
# with a point of its own.
Vertex = dict[str, tuple[Tensor, Tensor]]  # for each group perm [S, n] and sign [S, n]
Point = dict[str, Tensor]  # for each group [S, m, n, n]: P, and D where signs are searched (m = 2)


@dataclass
class Problem:
    """The objective F of one pair of networks, or of S of them, and its gradient, for S points at once.

    Attributes:
        sizes: Units of each group.
        signed: Whether signs of the group are searched.
        linear: For each group [S, m, n, n], the gradient of the part of F that is linear in it alone.
        singles: The tensors that touch one group.
        pairs: The tensors that touch two groups, or one twice.
        nested: For a group whose units form blocks, the group of the blocks (heads, of channels in heads): a vertex
            moves blocks as its units, and units inside their block.
    """

    sizes: dict[str, int]
    signed: dict[str, bool]
    linear: dict[str, Tensor]
    singles: list[_Single] = field(default_factory=list)
    pairs: list[_Pair] = field(default_factory=list)
    nested: dict[str, str] = field(default_factory=dict)

    @property
    def families(self) -> list[list[str]]:
        """Groups that are assigned together: each group with those nested in it."""
        inside: dict[str, list[str]] = {}
        for child, parent in self.nested.items():
            inside.setdefault(parent, []).append(child)
        return [[group, *inside.get(group, ())] for group in self.sizes if group not in self.nested]

    @property
    def touched(self) -> list[set[int]]:
        """For each family, those that share a tensor with it: its best assignment changes only when one of them moves.

        A family that shares one with itself (recurrent weights) is among its own; F is linear in any other alone.
        """
        family_of = {group: i for i, family in enumerate(self.families) for group in family}
        touched: list[set[int]] = [set() for _ in self.families]
        for p in self.pairs:
            touched[family_of[p.a]].add(family_of[p.b])
            touched[family_of[p.b]].add(family_of[p.a])
        return touched

    @classmethod
    def build(
        cls, spec: WeightSpec, reference: StateDict, weights: StateDict, *, signs: bool = True, device: str = "cpu"
    ) -> Problem:
        """Cuts the tensors into blocks that touch one or two groups.

        Raises:
            UserError: A tensor has more than two dimensions that can be permuted.
        """
        signed = {group: bool(signs and spec.signed.get(group)) for group in spec.groups}
        singles: list[_Single] = []
        stacks: dict[tuple[str, str, bool, bool], list[tuple[Tensor, Tensor]]] = {}
        for key in spec.cost_keys:
            axes = spec.axes[key]
            moving = [dim for dim, axis in enumerate(axes) if not axis.fixed]
            if len(moving) > 2:
                raise UserError(f"{key!r} has {len(moving)} permutable dimensions; matching handles at most two")
            if not moving:
                continue
            # Permutable dimensions first, all fixed ones folded into the last.
            order = moving + [dim for dim in range(len(axes)) if dim not in moving]
            ref, own = (
                t[key].detach().to(device, torch.float64).permute(order).unsqueeze(-1).flatten(len(moving))
                for t in (reference, weights)
            )
            if len(moving) == 1:  # one column, so that all have rows, columns and the rest
                ref, own = ref.unsqueeze(1), own.unsqueeze(1)
            cuts = []
            for dim in moving:
                offset, here = 0, []
                for group, flips, size, inner in axes[dim].segments(spec.groups):
                    flips = group is not None and flips and signed[group]
                    here.append((group, flips, slice(offset, offset + size * inner), size))
                    offset += size * inner
                cuts.append(here)
            if len(moving) == 1:
                cuts.append([(None, False, slice(None), 1)])
            for group_a, flips_a, rows, na in cuts[0]:
                for group_b, flips_b, columns, nb in cuts[1]:
                    # Entries of one unit that are not told apart (pixels of a channel) join the fixed rest.
                    r, t = (
                        x[rows, columns]
                        .reshape(na, (rows.stop - rows.start) // na, nb, -1, x.shape[-1])
                        .permute(0, 2, 1, 3, 4)
                        .flatten(2)
                        for x in (ref, own)
                    )
                    if group_a is not None and group_b is not None:
                        stack = stacks.setdefault((group_a, group_b, flips_a, flips_b), [])
                        stack.append((r.permute(2, 0, 1), t.permute(2, 0, 1)))
                    elif group_a is not None:
                        singles.append(_Single(group_a, flips_a, r.flatten(1)[None], t.flatten(1)[None]))
                    elif group_b is not None:
                        r, t = r.transpose(0, 1).flatten(1), t.transpose(0, 1).flatten(1)
                        singles.append(_Single(group_b, flips_b, r[None], t[None]))
        pairs = [
            _Pair(*names, *(torch.cat(side).transpose(0, 1).contiguous()[None] for side in zip(*blocks)))
            for names, blocks in stacks.items()
        ]
        linear = {
            g: torch.zeros(1, 1 + signed[g], n, n, dtype=torch.float64, device=device) for g, n in spec.groups.items()
        }
        for single in singles:
            linear[single.group][:, int(single.signed)] += single.ref @ single.own.mT
        return cls(dict(spec.groups), signed, linear, singles, pairs, dict(spec.nested))

    def to(self, dtype: torch.dtype) -> Problem:
        """The same problem in another precision."""
        return Problem(
            self.sizes,
            self.signed,
            {g: u.to(dtype) for g, u in self.linear.items()},
            [replace(s, ref=s.ref.to(dtype), own=s.own.to(dtype)) for s in self.singles],
            [replace(p, ref=p.ref.to(dtype), own=p.own.to(dtype)) for p in self.pairs],
            self.nested,
        )

    @classmethod
    def stack(cls, problems: Sequence[Problem]) -> Problem:
        """Several pairs of networks of one architecture as one problem; point s belongs to pair s."""
        first = problems[0]
        if len(problems) == 1:
            return first

        def joined(lists: Sequence[Sequence[Any]]) -> list[Any]:
            return [
                replace(parts[0], ref=torch.cat([p.ref for p in parts]), own=torch.cat([p.own for p in parts]))
                for parts in zip(*lists)
            ]

        linear = {g: torch.cat([problem.linear[g] for problem in problems]) for g in first.sizes}
        singles, pairs = joined([p.singles for p in problems]), joined([p.pairs for p in problems])
        return cls(first.sizes, first.signed, linear, singles, pairs, first.nested)

    @property
    def count(self) -> int:
        """How many pairs of networks there are."""
        return next((len(u) for u in self.linear.values()), 1)

    def thin(self, part: int, parts: int) -> Problem:
        """An estimate of the problem that costs a fraction of it: every ``parts``-th frame of convolution kernels.

        Pairs with fewer than twice as many frames as parts stay whole. The mean over all parts is the problem itself.
        """
        pairs = [
            replace(p, ref=parts * p.ref[:, :, part::parts].contiguous(), own=p.own[:, :, part::parts].contiguous())
            if p.own.shape[2] >= 2 * parts and p.own.shape[2] % parts == 0
            else p
            for p in self.pairs
        ]
        return replace(self, pairs=pairs)

    # ---- gradients --------------------------------------------------------------------------------------------------

    def gradient(self, point: Point) -> Point:
        """The gradient of F at a point (dense)."""
        out = {g: u.expand(len(point[g]), *u.shape[1:]).clone() for g, u in self.linear.items()}
        for p in self.pairs:
            row, column = point[p.a][:, int(p.row_signed)], point[p.b][:, int(p.column_signed)]
            _, na, frames, nb = p.own.shape
            self._add(out, p, p.own.flatten(1, 2) @ column.mT, row @ p.own.flatten(2))
        return out

    def gradient_at(self, vertex: Vertex, only: Sequence[str] | None = None) -> Point:
        """The gradient of F at signed permutations, where half of the products are mere indexing."""
        out = {
            g: u.expand(len(vertex[g][0]), *u.shape[1:]).clone()
            for g, u in self.linear.items()
            if only is None or g in only
        }
        for p in self.pairs:
            right = self._columns_moved(p, vertex) if only is None or p.a in only else None
            left = self._rows_moved(p, vertex) if only is None or p.b in only else None
            self._add(out, p, right, left)
        return out

    @staticmethod
    def _columns_moved(p: _Pair, vertex: Vertex) -> Tensor:
        """T M_b^T, [S, Na, F, Nb]."""
        perm, sign = vertex[p.b]
        own = p.own.expand(len(perm), *p.own.shape[1:])
        moved = own.gather(3, perm[:, None, None].expand(own.shape))
        return moved.mul_(sign[:, None, None]) if p.column_signed else moved

    @staticmethod
    def _rows_moved(p: _Pair, vertex: Vertex) -> Tensor:
        """M_a T, [S, Na, F, Nb]."""
        perm, sign = vertex[p.a]
        moved = p.own[torch.arange(len(perm), device=perm.device)[:, None] if len(p.own) > 1 else 0, perm]
        return moved * sign[:, :, None, None] if p.row_signed else moved

    def _add(self, out: Point, p: _Pair, right: Tensor | None, left: Tensor | None) -> None:
        """Adds the gradient by the rows, R (T M_b^T)^T, and by the columns, R^T (M_a T), summed over frames."""
        _, na, frames, nb = p.ref.shape
        if right is not None and p.a in out:
            out[p.a][:, int(p.row_signed)] += p.ref.flatten(2) @ right.reshape(-1, na, frames * nb).mT
        if left is not None and p.b in out:
            out[p.b][:, int(p.column_signed)] += p.ref.flatten(1, 2).mT @ left.reshape(-1, na * frames, nb)

    # ---- points and vertices ----------------------------------------------------------------------------------------

    def assign(self, gradient: Point) -> Vertex:
        """The signed permutations that maximise <gradient, .>: a linear assignment for each group and point.

        For a group with others nested in it the best order inside each pair of blocks comes first; what these gain is
        added to the gain of moving the one block to the other's place.
        """
        host = {
            group: (g[:, 0] + g[:, 1].abs() if self.signed[group] else g[:, 0]).cpu().numpy()
            for group, g in gradient.items()
        }
        perms: dict[str, np.ndarray] = {}
        for parent, *children in self.families:
            if parent not in host:
                continue
            gain = host[parent]
            inside = {child: _inner_assignments(host[child], self.sizes[parent]) for child in children}
            for value, _ in inside.values():
                gain = gain + value
            perms[parent] = best = np.stack([linear_sum_assignment(m, maximize=True)[1] for m in gain])
            points, places = np.arange(len(best))[:, None], np.arange(best.shape[1])
            for child, (_, order) in inside.items():
                chosen = order[points, places, best] + (best * order.shape[-1])[..., None]
                perms[child] = chosen.reshape(len(best), -1)
        out = {}
        for group, g in gradient.items():
            perm = torch.from_numpy(perms[group]).to(g.device)
            sign = torch.ones(perm.shape, dtype=g.dtype, device=g.device)
            if self.signed[group]:
                sign = torch.where(g[:, 1].gather(2, perm[..., None]).squeeze(-1) < 0, -sign, sign)
            out[group] = (perm, sign)
        return out

    def dense(self, vertex: Vertex) -> Point:
        """Signed permutations as matrices."""
        out = {}
        for group, (perm, sign) in vertex.items():
            eye = torch.nn.functional.one_hot(perm, self.sizes[group]).to(sign)
            out[group] = torch.stack([eye, eye * sign[..., None]][: 2 if self.signed[group] else 1], dim=1)
        return out

    def inner(self, a: Point, b: Point) -> Tensor:
        """<a, b> for each of the S points."""
        return sum((a[g] * b[g]).sum((1, 2, 3)) for g in a)

    def inner_at(self, a: Point, vertex: Vertex) -> Tensor:
        """<a, vertex> for each of the S points."""
        total = 0
        for group, g in a.items():
            perm, sign = vertex[group]
            g = g.expand(len(perm), -1, -1, -1)
            total = total + g[:, 0].gather(2, perm[..., None]).sum((1, 2))
            if self.signed[group]:
                total = total + (g[:, 1].gather(2, perm[..., None]).squeeze(-1) * sign).sum(1)
        return total

    def value_at(self, vertex: Vertex) -> Tensor:
        """F at signed permutations, [S]; nothing but indexing."""
        total = self.inner_at(self.linear, vertex)
        for p in self.pairs:
            total = total + self._pair_value(p, vertex)
        return total

    def _share(self, groups: Sequence[str], vertex: Vertex) -> Tensor:
        """The part of F that some groups take part in, [S]."""
        total = self.inner_at({group: self.linear[group] for group in groups}, vertex)
        for p in self.pairs:
            if p.a in groups or p.b in groups:
                total = total + self._pair_value(p, vertex)
        return total

    def _pair_value(self, p: _Pair, vertex: Vertex) -> Tensor:
        perm, sign = vertex[p.b]
        moved = self._rows_moved(p, vertex).gather(3, perm[:, None, None].expand(-1, *p.own.shape[1:]))
        product = (p.ref * moved).sum((1, 2))
        return ((product * sign) if p.column_signed else product).sum(1)

    def identity(self, count: int | None = None) -> Vertex:
        """The identity, S times; once for each pair of networks by default."""
        count = self.count if count is None else count
        return {
            g: (
                torch.arange(n, device=u.device).expand(count, n).clone(),
                torch.ones(count, n, dtype=u.dtype, device=u.device),
            )
            for (g, n), u in zip(self.sizes.items(), self.linear.values())
        }

    def barycentre(self, count: int | None = None) -> Point:
        """The centre of the polytope: all permutations and signs equally."""
        count = self.count if count is None else count
        out = {}
        for group, n in self.sizes.items():
            u = self.linear[group]
            out[group] = torch.zeros(count, u.shape[1], n, n, dtype=u.dtype, device=u.device)
            out[group][:, 0] = 1.0 / n
        return out

    def choose(self, first: Tensor, a: Vertex, b: Vertex) -> Vertex:
        """For each of the S points that of ``a`` where ``first`` [S] is true, else that of ``b``."""
        first = first[:, None]
        return {g: tuple(torch.where(first, x, y.to(x)) for x, y in zip(a[g], b[g])) for g in a}

    def polish(self, vertex: Vertex, sweeps: int = 50, tolerance: float = 1e-12) -> tuple[Vertex, int]:
        """Coordinate ascent: one group's assignment at a time (with those nested in it), kept only if F rises.

        For a group that no tensor touches twice the assignment is exact; for a recurrent one it is the linearisation.

        Args:
            vertex: Where to start.
            sweeps: Most passes over the groups.
            tolerance: A rise below this fraction of F does not count.

        Returns:
            Where no assignment raises F, and the number of assignments.
        """
        scale, steps = self.value_at(vertex).abs().clamp(min=1.0), 0
        families, touched = self.families, self.touched
        waiting = [True] * len(families)
        for _ in range(sweeps):
            for i in [i for i, waits in enumerate(waiting) if waits]:
                waiting[i] = False
                gradient = self.gradient_at(vertex, only=families[i])
                best = self.assign(gradient)
                trial = {**vertex, **best}
                if i in touched[i]:
                    rise = self._share(families[i], trial) - self._share(families[i], vertex)
                else:  # F is linear in these groups alone
                    rise = self.inner_at(gradient, best) - self.inner_at(gradient, vertex)
                steps += len(rise)
                better = rise > tolerance * scale
                if bool(better.any()):
                    vertex = self.choose(better, trial, vertex)
                    for j in touched[i]:
                        waiting[j] = True
            if not any(waiting):
                break
        return vertex, steps

    def spread(self) -> Tensor:
        """Standard deviation of the gains of single assignments, [S]: the unit of temperature."""
        gradient = self.gradient_at(self.assign(self.linear))
        return torch.stack([g.flatten(1).std(1) for g in gradient.values()]).amax(0)

    def element(self, vertex: Vertex, index: int = 0) -> Element:
        """The group element of one of the S vertices."""
        return Element(
            {g: perm[index].cpu().clone() for g, (perm, _) in vertex.items()},
            {g: sign[index].cpu().to(torch.int8) for g, (_, sign) in vertex.items()},
        )


def _inner_assignments(gain: np.ndarray, blocks: int) -> tuple[np.ndarray, np.ndarray]:
    """For each pair of blocks the best assignment between their units.

    Args:
        gain: [S, n, n].
        blocks: How many blocks the n units form.

    Returns:
        What the best assignments gain, [S, blocks, blocks], and the assignments, [S, blocks, blocks, n / blocks].
    """
    points, n, _ = gain.shape
    size = n // blocks
    cells = gain.reshape(points, blocks, size, blocks, size).transpose(0, 1, 3, 2, 4).reshape(-1, size, size)
    order = np.stack([linear_sum_assignment(cell, maximize=True)[1] for cell in cells])
    value = np.take_along_axis(cells, order[:, :, None], 2).sum((1, 2))
    return value.reshape(points, blocks, blocks), order.reshape(points, blocks, blocks, size)


def _not_below(least: float, **options: float) -> None:
    for name, value in options.items():
        if not value >= least:
            raise UserError(f"{name}={value}: it must be at least {least:g}")


# ---- matchers -------------------------------------------------------------------------------------------------------
# A matcher takes a problem (of one pair of networks, or of S), a torch generator and options, and returns a vertex, one
# point a pair, and the number of steps.


def lap(problem: Problem, generator: torch.Generator, *, sweeps: int = 50) -> tuple[Vertex, int]:
    """Coordinate-wise linear assignment from the identity, group after group, guarded by the true cost.

    Args:
        problem: The objective.
        generator: Not used.
        sweeps: Most passes over the groups.

    Raises:
        UserError: ``sweeps`` is negative.
    """
    _not_below(0, sweeps=sweeps)
    return problem.polish(problem.identity(), sweeps)


def git_rebasin(problem: Problem, generator: torch.Generator, *, sweeps: int = 100) -> tuple[Vertex, int]:
    """Git Re-Basin's weight matching: groups in random order, each assigned exactly, until a pass changes nothing.

    The baseline of the literature: for a recurrent group the linearisation is taken at its word, without looking
    whether the distance falls (as the published algorithm, which assumes that no tensor touches a group twice, would).
    The best pass is returned, and :func:`match` keeps the identity where that is better.

    Source: Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023,
    algorithm 1. Signs, where they are searched, are ours.

    Args:
        problem: The objective.
        generator: Draws the orders.
        sweeps: Most passes over the groups.

    Raises:
        UserError: ``sweeps`` is negative.
    """
    _not_below(0, sweeps=sweeps)
    vertex, steps = problem.identity(), 0
    best, values = vertex, problem.value_at(vertex)
    families = problem.families
    for _ in range(sweeps):
        before = vertex
        for i in torch.randperm(len(families), generator=generator).tolist():
            gradient = problem.gradient_at(vertex, only=families[i])
            trial = problem.assign(gradient)
            gain = problem.inner_at(gradient, trial) - problem.inner_at(gradient, vertex)
            moves = gain > 1e-12 * values.abs().clamp(min=1.0)
            vertex = {**vertex, **problem.choose(moves, trial, vertex)}
            steps += problem.count
        now = problem.value_at(vertex)
        best, values = problem.choose(now > values, vertex, best), torch.maximum(now, values)
        if all(torch.equal(x, y) for g in vertex for x, y in zip(before[g], vertex[g])):
            break
    return best, steps


def soft_assign(
    problem: Problem,
    point: Point,
    inverse_temperatures: Tensor,
    balance: int = 2,
    parts: Sequence[Problem] = (),
) -> Point:
    """Follows the maximum of F + entropy as the temperature falls (graduated assignment).

    At each temperature every group becomes the doubly stochastic matrix nearest in entropy to exp(gradient / T); with
    signs, [P+, P-] is balanced as one matrix whose rows sum to one and whose column pairs do.

    Source: Gold and Rangarajan, "A graduated assignment algorithm for graph matching", PAMI 1996; signs are ours.

    Args:
        problem: The objective.
        point: Where to start, [S, m, n, n] a group; it is not touched.
        inverse_temperatures: [steps], or [steps, S].
        balance: Row and column normalisations at each step.
        parts: Estimates of the problem (:meth:`Problem.thin`) whose gradients are used in turn; its own if empty.

    Returns:
        The last point.
    """
    point = dict(point)
    # A group that lies along no tensor of its own (heads, known by their channels only) never makes up its mind.
    felt = {s.group for s in problem.singles} | {g for p in problem.pairs for g in (p.a, p.b)}
    for k, beta in enumerate(inverse_temperatures):
        gradient = (parts[k % len(parts)] if parts else problem).gradient(point)
        hardness = 1.0
        for group, g in gradient.items():
            # Axes: point, sign, unit of the reference, unit moved there.
            signed = problem.signed[group]
            mass = torch.stack([g[:, 0] + g[:, 1], g[:, 0] - g[:, 1]], 1) if signed else g
            mass -= mass.amax((1, 3), keepdim=True)
            mass.mul_(beta.view(-1, 1, 1, 1)).exp_().clamp_(min=1e-30)
            for _ in range(balance):
                mass /= mass.sum((1, 3), keepdim=True)
                mass /= mass.sum((1, 2), keepdim=True)
            point[group] = torch.stack([mass[:, 0] + mass[:, 1], mass[:, 0] - mass[:, 1]], 1) if signed else mass
            if k % 5 == 4 and group in felt:
                hardness = min(hardness, float(mass.amax((1, 3)).amin()))
        if k % 5 == 4 and hardness > 0.99:
            break  # every unit has made up its mind; a lower temperature changes nothing
    return point


def ascend(problem: Problem, point: Point, iterations: int, tolerance: float = 1e-7) -> tuple[Point, int]:
    """Frank-Wolfe on the signed Birkhoff polytope, with exact line search, for S points at once.

    F is quadratic, so its value along a segment follows from the gradients at both ends, and the gradient moves along
    with the point: each step costs one gradient at a vertex and one assignment a group.

    Source: Vogelstein et al., "Fast approximate quadratic programming for graph matching", PLoS ONE 2015; signs are
    ours.
    """
    if not iterations:
        return point, 0
    point, gradient, steps = dict(point), problem.gradient(point), 0
    for _ in range(iterations):
        vertex = problem.assign(gradient)
        best, here = problem.inner_at(gradient, vertex), problem.inner(gradient, point)
        slope = best - here
        if bool((slope <= tolerance * best.abs()).all()):
            break
        at_vertex = problem.gradient_at(vertex)
        bend = 0.5 * (problem.inner_at(at_vertex, vertex) - problem.inner(at_vertex, point) - slope)
        # A convex segment is best at its end; on a concave one the parabola has its top inside or beyond.
        step = torch.where(bend < 0, (-slope / (2 * bend.clamp(max=-1e-30))).clamp(0, 1), torch.ones_like(slope))
        steps += len(step)
        corner = problem.dense(vertex)
        size = step[:, None, None, None]
        for group in point:
            point[group] = torch.lerp(point[group], corner[group], size)
            gradient[group] = torch.lerp(gradient[group], at_vertex[group], size)
    return point, steps


def frank_wolfe(
    problem: Problem,
    generator: torch.Generator,
    *,
    iterations: int = 100,
    annealing: int | None = None,
    restarts: int | None = None,
    thorough: bool = False,
) -> tuple[Vertex, int]:
    """Frank-Wolfe from the end of an annealing (:func:`soft_assign`), polished by coordinate assignments.

    Plain Frank-Wolfe starts at the barycentre; the annealing is what finds a planted alignment under strong noise and
    the better optima between unrelated networks. The result is warmed up and annealed again ``restarts`` times, and
    the best of all, the identity included, is returned.

    If the networks are close already (cosine of the moving weights above 0.5) and the identity is stationary, as in
    every round of a fleet after the first, the identity is returned at once.

    Args:
        problem: The objective.
        generator: Draws the perturbations of the restarts.
        iterations: Most Frank-Wolfe steps from each start.
        annealing: Temperatures of the annealing; with 0, Frank-Wolfe starts from the barycentre and the identity. If
            None, 40; 16 where a group has 256 units or more, 8 from 512 on: wide layers need fewer.
        restarts: How often the best is warmed up again. If None, once, and not at all for wide layers.
        thorough: Whether to search where the identity looks right, too.

    Raises:
        UserError: A number is negative.
    """
    wide = max(problem.sizes.values(), default=0) >= 256
    if annealing is None:
        annealing = 40 if not wide else 16 if max(problem.sizes.values()) < 512 else 8
    restarts = (0 if wide else 1) if restarts is None else restarts
    _not_below(0, iterations=iterations, annealing=annealing, restarts=restarts)
    # The search needs no precision: what it ends in is rounded to a vertex, valued and polished in float64.
    rough = problem.to(torch.float32)
    identity = problem.identity()
    start = problem.value_at(identity)
    norm = _norm(problem)
    # A stationary identity promises nothing; single precision tells where the question is open at all.
    if not thorough and bool((start > 0.5 * norm).all()):
        gradient = problem.gradient_at(identity)
        vertex = problem.assign(gradient)
        if bool((problem.inner_at(gradient, vertex) - problem.inner_at(gradient, identity) <= 1e-9 * norm).all()):
            return identity, problem.count

    best, values, total = identity, start, 0
    spread = rough.spread()
    annealed = bool(annealing) and bool((spread > 0).all())
    # Where F is linear in each family alone, the polish assigns exactly; behind an annealing of a
    # wide network Frank-Wolfe then gains little (nothing on ResNet-18, 0.3% of the distance on an MLP of 512).
    recurrent = any(i in near for i, near in enumerate(rough.touched))
    climbs = 0 if wide and annealed and not recurrent else iterations

    def climb(point: Point) -> None:
        nonlocal best, values, total
        # The last steps of Frank-Wolfe are slow, and the polish makes them faster.
        point, steps = ascend(rough, point, climbs, 3e-3)
        found = {g: (perm, sign.double()) for g, (perm, sign) in rough.assign(point).items()}
        now = problem.value_at(found)
        best, values = problem.choose(now > values, found, best), torch.maximum(now, values)
        total += steps

    parts = [rough.thin(k, 3) for k in range(3)] if any(p.own.shape[2] >= 6 for p in rough.pairs) else []
    if annealed:
        betas = torch.logspace(0, math.log10(9), annealing)[:, None].to(spread) / spread
        climb(soft_assign(rough, rough.barycentre(), betas, parts=parts))
        total += annealing * problem.count
        for _ in range(restarts):
            betas = (
                torch.logspace(math.log10(4), math.log10(9), max(1, annealing * 3 // 8))[:, None].to(spread) / spread
            )
            centre, hard = rough.barycentre(), rough.dense({g: (p, s.float()) for g, (p, s) in best.items()})
            for g in centre:
                noise = torch.randn(centre[g].shape, generator=generator).to(centre[g])
                centre[g] = 0.8 * centre[g] + 0.2 * hard[g] + 0.05 / math.sqrt(problem.sizes[g]) * noise
            climb(soft_assign(rough, centre, betas, parts=parts))
            total += len(betas) * problem.count
    else:
        for point in (rough.dense(rough.identity()), rough.barycentre()):
            climb(point)
    vertex, steps = rough.polish({g: (p, s.float()) for g, (p, s) in best.items()}, tolerance=1e-5)
    vertex, total = {g: (p, s.double()) for g, (p, s) in vertex.items()}, total + steps
    if not wide:
        vertex, steps = problem.polish(vertex)
        total += steps
    return vertex, total


def _norm(problem: Problem) -> Tensor:
    """|ref| |own| over all that moves, for each pair of networks, [S]."""
    blocks = [*problem.singles, *problem.pairs]
    if not blocks:
        return torch.zeros(problem.count)
    sides = [sum(getattr(block, name).flatten(1).square().sum(1) for block in blocks).sqrt() for name in ("ref", "own")]
    return sides[0] * sides[1]


def sinkhorn(
    problem: Problem,
    generator: torch.Generator,
    *,
    steps: int = 150,
    rate: float = 0.1,
    temperature: float = 1.0,
    balance: int = 10,
) -> tuple[Vertex, int]:
    """Soft permutations by gradient descent, rounded to hard ones: the operators that fleet merging was published with.

    Free logits become doubly stochastic matrices by Sinkhorn's iteration; Adam minimises the squared distance between
    the reference and the softly permuted weights; a linear assignment on the soft matrices makes them hard.

    Source: Pena et al., "Re-basin via implicit Sinkhorn differentiation", CVPR 2023, differentiated here through the
    iteration; signs are ours.

    Args:
        problem: The objective.
        generator: Draws the first logits.
        steps: Steps of Adam.
        rate: Its learning rate.
        temperature: The logits are divided by it.
        balance: Row and column normalisations.

    Raises:
        UserError: A number is out of its range: ``rate`` and ``temperature`` are positive, ``balance`` is at least 1.
    """
    _not_below(0, steps=steps)
    _not_below(1, balance=balance)
    _not_below(1e-6, rate=rate, temperature=temperature)
    rough = problem.to(torch.float32)
    logits = {}
    for g, n in problem.sizes.items():
        noise = 0.1 * torch.randn(problem.count, n, n * (2 if problem.signed[g] else 1), generator=generator)
        logits[g] = noise.to(rough.linear[g].device).requires_grad_()

    def soften() -> Point:
        point = {}
        for g, x in logits.items():
            n = problem.sizes[g]
            x = x / temperature
            for _ in range(balance):
                x = x - x.logsumexp(-1, keepdim=True)
                column = x.logsumexp(1, keepdim=True)
                if problem.signed[g]:
                    column = torch.logaddexp(column[..., :n], column[..., n:]).repeat(1, 1, 2)
                x = x - column
            x = x.exp()
            point[g] = (
                torch.stack([x[..., :n] + x[..., n:], x[..., :n] - x[..., n:]], 1) if problem.signed[g] else x[:, None]
            )
        return point

    if not logits:
        return problem.identity(), 0
    optimiser = torch.optim.Adam(logits.values(), lr=rate)
    frames = [(p, p.ref.transpose(1, 2).contiguous(), p.own.transpose(1, 2).contiguous()) for p in rough.pairs]
    with torch.enable_grad():
        for _ in range(steps):
            point = soften()
            loss = sum((s.ref - point[s.group][:, int(s.signed)] @ s.own).square().sum() for s in rough.singles)
            for p, ref, own in frames:
                rows, columns = point[p.a][:, int(p.row_signed), None], point[p.b][:, int(p.column_signed), None]
                loss = loss + (ref - rows @ own @ columns.mT).square().sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    with torch.no_grad():
        return problem.assign({g: x.double() for g, x in soften().items()}), steps


@torch.no_grad()
def match(
    spec: WeightSpec,
    reference: StateDict,
    weights: StateDict,
    method: str = "frank_wolfe",
    *,
    signs: bool = True,
    guard: bool = True,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **options: Any,
) -> MatchResult:
    """Finds the group element that brings ``weights`` nearest to ``reference``.

    Args:
        spec: The symmetry of the network.
        reference: Weights to come near to.
        weights: Weights to move; not touched.
        method: ``lap``, ``git_rebasin``, ``frank_wolfe``, ``sinkhorn`` or ``activations``, or a registered matcher.
        signs: Whether to search signs as well as permutations.
        guard: Whether the identity is returned where what the method finds is not nearer.
        device: Where to compute; assignments run on the CPU in any case.
        seed: Seeds what is random in the method.
        options: Options of the method.

    Returns:
        The element and both distances. With ``guard``, the identity where the method finds nothing nearer.

    Raises:
        UserError: Unknown method or option, weights that do not fit the spec, or NaN or infinite weights.
    """
    return match_many(
        spec, [reference], [weights], method, signs=signs, guard=guard, device=device, seed=seed, **options
    )[0]


@torch.no_grad()
def match_many(
    spec: WeightSpec,
    references: Sequence[StateDict],
    weights: Sequence[StateDict],
    method: str = "frank_wolfe",
    *,
    signs: bool = True,
    guard: bool = True,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **options: Any,
) -> list[MatchResult]:
    """:func:`match` for several pairs of one architecture, as one batch.

    Small networks gain most: the products of all pairs are one batched product. The pairs share the stopping rules, so
    an element may differ from that of the pair alone; ``seconds`` and ``iterations`` are shared out equally.

    Args:
        spec: The symmetry of the networks.
        references: Weights to come near to, one a pair.
        weights: Weights to move, one a pair.
        method: See :func:`match`.
        signs: See :func:`match`.
        guard: See :func:`match`.
        device: See :func:`match`.
        seed: See :func:`match`.
        options: See :func:`match`.

    Returns:
        A result a pair.

    Raises:
        UserError: As :func:`match`, or not as many references as weights.
    """
    start = time.process_time()
    matcher = MATCHERS.get(method)
    check_options(f"matcher {method!r}", matcher, options, skip=("problem", "generator"))
    if len(references) != len(weights):
        raise UserError(f"{len(references)} references for {len(weights)} networks; give one a network")
    alone = len(weights) == 1
    for i, pair in enumerate(zip(references, weights)):
        for name, state in zip(("reference", "weights"), pair):
            name = name if alone else f"{name} {i}"
            spec.validate(state, name=name)
            check_finite(state, name)
    before = [spec.distance(a, b) for a, b in zip(references, weights)]
    results = [MatchResult(spec.identity(), d, d, 0.0, 0) for d in before]
    open_pairs = [i for i, d in enumerate(before) if d > 0.0 and spec.groups]
    if open_pairs:
        problem = Problem.stack(
            [Problem.build(spec, references[i], weights[i], signs=signs, device=str(device)) for i in open_pairs]
        )
        vertex, iterations = matcher(problem, torch.Generator().manual_seed(seed), **options)
        for place, i in enumerate(open_pairs):
            element = problem.element(vertex, place)
            after = spec.distance(references[i], spec.apply(weights[i], element))
            if guard and not after < before[i]:
                element, after = spec.identity(), before[i]
            results[i] = MatchResult(element, before[i], after, 0.0, iterations // len(open_pairs))
    seconds = (time.process_time() - start) / max(1, len(weights))
    return [replace(result, seconds=seconds) for result in results]


def check_options(what: str, function: Any, options: Mapping[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Raises a UserError for an option that ``function`` needs, or does not take (with the nearest names)."""
    parameters = inspect.signature(function).parameters
    check_needed(what, function, options, skip)
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in skip]
    for name in options:
        if name not in known:
            raise unknown(f"option of {what}", name, known)


def check_needed(what: str, function: Any, options: Mapping[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Raises a UserError for a keyword without a default that ``function`` is not given."""
    for name, p in inspect.signature(function).parameters.items():
        if p.kind is p.KEYWORD_ONLY and p.default is p.empty and name not in skip and name not in options:
            raise UserError(f"{what} needs {name}=...; see fleetgym.merging and docs/merging.md")
