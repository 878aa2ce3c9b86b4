"""Matching: which element of a network's symmetry group brings its weights nearest to another network's.

One cost for every matcher, the squared distance over all tensors together::

    min_g ||ref - g.theta||^2  =  const - 2 max_g F(g),     F(g) = <ref, g.theta>

Per group of units, g is a signed permutation matrix (of blocks of units, and of units inside their block, for a group
that is nested in another). Written with P (the permutation) and D = diag(signs) P, a tensor
that touches one group adds <U, P> or <U, D> to F, and one that touches two adds <R, M_a T M_b^T> with M in {P, D}. For
the recurrent weights of a cell both sides are the same group: F is quadratic and the problem is a quadratic assignment,
which is why assigning units by a linearisation alone (Git Re-Basin's weight matching) stops early.
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

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging import MATCHERS


@dataclass(frozen=True)
class MatchResult:
    """What a matcher found.

    Attributes:
        element: The group element g.
        distance_before: ||ref - theta||^2.
        distance_after: ||ref - g.theta||^2; never above ``distance_before``.
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
    """A tensor [N, K] that touches one group; K folds all fixed dimensions."""

    group: str
    signed: bool
    ref: Tensor
    own: Tensor


@dataclass
class _Pair:
    """Tensors [F, Na, Nb] that touch groups a (rows) and b (columns); F stacks gates and fixed dimensions."""

    a: str
    b: str
    row_signed: bool
    column_signed: bool
    ref: Tensor
    own: Tensor

    def __post_init__(self) -> None:
        frames, na, nb = self.ref.shape
        # The frames folded into one matrix product: sum_f R_f X_f^T and sum_f R_f^T X_f.
        self.by_row = self.ref.permute(1, 0, 2).reshape(na, frames * nb)
        self.by_column = self.ref.permute(2, 0, 1).reshape(nb, frames * na)


Vertex = dict[str, tuple[Tensor, Tensor]]  # for each group perm [S, n] and sign [S, n]
Point = dict[str, Tensor]  # for each group [S, m, n, n]: P, and D where signs are searched (m = 2)


@dataclass
class Problem:
    """The objective F of one pair of networks, and its gradient, for S points at once.

    Attributes:
        sizes: Units of each group.
        signed: Whether signs of the group are searched.
        linear: For each group [m, n, n], the gradient of the part of F that is linear in it alone.
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
                        singles.append(_Single(group_a, flips_a, r.flatten(1), t.flatten(1)))
                    elif group_b is not None:
                        r, t = r.transpose(0, 1).flatten(1), t.transpose(0, 1).flatten(1)
                        singles.append(_Single(group_b, flips_b, r, t))
        pairs = [
            _Pair(
                *names, torch.cat([r for r, _ in blocks]).contiguous(), torch.cat([t for _, t in blocks]).contiguous()
            )
            for names, blocks in stacks.items()
        ]
        linear = {
            g: torch.zeros(1 + signed[g], n, n, dtype=torch.float64, device=device) for g, n in spec.groups.items()
        }
        for single in singles:
            linear[single.group][int(single.signed)] += single.ref @ single.own.T
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

    # ---- gradients --------------------------------------------------------------------------------------------------

    def gradient(self, point: Point) -> Point:
        """The gradient of F at a point (dense)."""
        out = {g: u.expand(len(point[g]), *u.shape).clone() for g, u in self.linear.items()}
        for p in self.pairs:
            column = point[p.b][:, int(p.column_signed), None]
            row = point[p.a][:, int(p.row_signed), None]
            self._add(out, p, p.own @ column.transpose(-1, -2), row @ p.own)
        return out

    def gradient_at(self, vertex: Vertex, only: Sequence[str] | None = None) -> Point:
        """The gradient of F at signed permutations, where half of the products are mere indexing."""
        out = {
            g: u.expand(len(vertex[g][0]), *u.shape).clone()
            for g, u in self.linear.items()
            if only is None or g in only
        }
        for p in self.pairs:
            right = left = None
            if only is None or p.a in only:
                perm, sign = vertex[p.b]
                right = p.own[:, :, perm].permute(2, 0, 1, 3)  # [S, F, Na, Nb]
                right = right * sign[:, None, None] if p.column_signed else right
            if only is None or p.b in only:
                perm, sign = vertex[p.a]
                left = p.own[:, perm].transpose(0, 1)
                left = left * sign[:, None, :, None] if p.row_signed else left
            self._add(out, p, right, left)
        return out

    def _add(self, out: Point, p: _Pair, right: Tensor | None, left: Tensor | None) -> None:
        """Adds the gradient by the rows, R (T M_b^T)^T, and by the columns, R^T (M_a T); both are [S, F, Na, Nb]."""
        frames, na, nb = p.ref.shape
        if right is not None and p.a in out:
            out[p.a][:, int(p.row_signed)] += p.by_row @ right.transpose(-1, -2).reshape(len(right), frames * nb, na)
        if left is not None and p.b in out:
            out[p.b][:, int(p.column_signed)] += p.by_column @ left.reshape(len(left), frames * na, nb)

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
            total = total + g[:, 0].gather(2, perm[..., None]).sum((1, 2))
            if self.signed[group]:
                total = total + (g[:, 1].gather(2, perm[..., None]).squeeze(-1) * sign).sum(1)
        return total

    def value_at(self, vertex: Vertex, gradient: Point | None = None) -> Tensor:
        """F at signed permutations, [S]."""
        gradient = self.gradient_at(vertex) if gradient is None else gradient
        linear = {g: self.linear[g][None] for g in gradient}
        linear = {g: u.expand(len(vertex[g][0]), *u.shape[1:]) for g, u in linear.items()}
        return 0.5 * (self.inner_at(gradient, vertex) + self.inner_at(linear, vertex))

    def identity(self, count: int = 1) -> Vertex:
        """The identity, S times."""
        return {
            g: (
                torch.arange(n, device=u.device).expand(count, n).clone(),
                torch.ones(count, n, dtype=u.dtype, device=u.device),
            )
            for (g, n), u in zip(self.sizes.items(), self.linear.values())
        }

    def barycentre(self, count: int = 1) -> Point:
        """The centre of the polytope: all permutations and signs equally."""
        out = {}
        for group, n in self.sizes.items():
            u = self.linear[group]
            out[group] = torch.zeros(count, len(u), n, n, dtype=u.dtype, device=u.device)
            out[group][:, 0] = 1.0 / n
        return out

    def pick(self, vertex: Vertex, index: int) -> Vertex:
        """One of the S vertices, as S = 1."""
        return {g: (perm[index : index + 1], sign[index : index + 1]) for g, (perm, sign) in vertex.items()}

    def polish(self, vertex: Vertex, sweeps: int = 50) -> tuple[Vertex, int]:
        """Coordinate ascent: one group's assignment at a time (with those nested in it), kept only if F rises (S = 1).

        For a group that no tensor touches twice the assignment is exact; for a recurrent one it is the linearisation.
        """
        value, steps = float(self.value_at(vertex)), 0
        for _ in range(sweeps):
            moved = False
            for family in self.families:
                gradient = self.gradient_at(vertex, only=family)
                best = self.assign(gradient)
                trial = {**vertex, **best}
                if any(p.a in family and p.b in family for p in self.pairs):
                    gain = float(self.value_at(trial)) - value
                else:  # F is linear in these groups alone
                    gain = float(self.inner_at(gradient, best) - self.inner_at(gradient, vertex))
                steps += 1
                if gain > 1e-12 * max(1.0, abs(value)):
                    vertex, value, moved = trial, value + gain, True
            if not moved:
                break
        return vertex, steps

    def spread(self) -> float:
        """Standard deviation of the gains of single assignments: the unit of temperature."""
        start = self.assign({g: u[None] for g, u in self.linear.items()})
        return max(float(g.std()) for g in self.gradient_at(start).values()) if self.sizes else 0.0

    def element(self, vertex: Vertex) -> Element:
        """The group element of a vertex (S = 1)."""
        return Element(
            {g: perm[0].cpu().clone() for g, (perm, _) in vertex.items()},
            {g: sign[0].cpu().to(torch.int8) for g, (_, sign) in vertex.items()},
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


# ---- matchers -------------------------------------------------------------------------------------------------------
# A matcher takes a problem, a torch generator and options, and returns a vertex (S = 1) and the number of steps.


def lap(problem: Problem, generator: torch.Generator, *, sweeps: int = 50) -> tuple[Vertex, int]:
    """Coordinate-wise linear assignment from the identity (Git Re-Basin's weight matching, guarded by the true cost).

    Args:
        problem: The objective.
        generator: Not used.
        sweeps: Most passes over the groups.
    """
    return problem.polish(problem.identity(), sweeps)


def soft_assign(problem: Problem, point: Point, inverse_temperatures: Tensor, balance: int = 2) -> Point:
    """Follows the maximum of F + entropy as the temperature falls (graduated assignment).

    At each temperature every group becomes the doubly stochastic matrix nearest in entropy to exp(gradient / T); with
    signs, [P+, P-] is balanced as one matrix whose rows sum to one and whose column pairs do.

    Source: Gold and Rangarajan, "A graduated assignment algorithm for graph matching", PAMI 1996; signs are ours.

    Args:
        problem: The objective.
        point: Where to start, [S, m, n, n] a group; it is not touched.
        inverse_temperatures: [steps].
        balance: Row and column normalisations at each step.

    Returns:
        The last point.
    """
    point = dict(point)
    # A group that lies along no tensor of its own (heads, known by their channels only) never makes up its mind.
    felt = {s.group for s in problem.singles} | {g for p in problem.pairs for g in (p.a, p.b)}
    for k, beta in enumerate(inverse_temperatures.tolist()):
        gradient = problem.gradient(point)
        hardness = 1.0
        for group, g in gradient.items():
            n = problem.sizes[group]
            logits = torch.cat([g[:, 0] + g[:, 1], g[:, 0] - g[:, 1]], -1) if problem.signed[group] else g[:, 0]
            mass = torch.exp(beta * (logits - logits.amax(-1, keepdim=True))).clamp_(min=1e-30)
            for _ in range(balance):
                mass = mass / mass.sum(-1, keepdim=True)
                columns = mass.sum(1, keepdim=True)
                if problem.signed[group]:
                    columns = (columns[..., :n] + columns[..., n:]).repeat(1, 1, 2)
                mass = mass / columns
            if problem.signed[group]:
                plus, minus = mass[..., :n], mass[..., n:]
                point[group] = torch.stack([plus + minus, plus - minus], 1)
            else:
                point[group] = mass[:, None]
            if k % 5 == 4 and group in felt:
                hardness = min(hardness, float(mass.amax(-1).amin()))
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
    gradient, steps = problem.gradient(point), 0
    for _ in range(iterations):
        vertex = problem.assign(gradient)
        at_vertex = problem.gradient_at(vertex)
        best, here = problem.inner_at(gradient, vertex), problem.inner(gradient, point)
        slope = best - here
        bend = 0.5 * (problem.inner_at(at_vertex, vertex) - problem.inner(at_vertex, point) - slope)
        # A convex segment is best at its end; on a concave one the parabola has its top inside or beyond.
        step = torch.where(bend < 0, (-slope / (2 * bend.clamp(max=-1e-300))).clamp(0, 1), torch.ones_like(slope))
        steps += len(step)
        corner = problem.dense(vertex)
        for group in point:
            size = step[:, None, None, None]
            point[group] = point[group] + size * (corner[group] - point[group])
            gradient[group] = gradient[group] + size * (at_vertex[group] - gradient[group])
        if bool((slope <= tolerance * best.abs()).all()):
            break
    return point, steps


def frank_wolfe(
    problem: Problem,
    generator: torch.Generator,
    *,
    iterations: int = 100,
    annealing: int = 80,
    restarts: int = 1,
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
        annealing: Temperatures of the annealing; with 0, Frank-Wolfe starts from the barycentre and the identity.
        restarts: How often the best is warmed up again.
        thorough: Whether to search where the identity looks right, too.
    """
    identity = problem.identity()
    gradient = problem.gradient_at(identity)
    vertex = problem.assign(gradient)
    stationary = float(problem.inner_at(gradient, vertex) - problem.inner_at(gradient, identity))
    blocks = [*problem.singles, *problem.pairs]
    norm = math.sqrt(math.prod(math.fsum(float(getattr(b, n).square().sum()) for b in blocks) for n in ("ref", "own")))
    if not thorough and stationary <= 1e-9 * norm and float(problem.value_at(identity)) > 0.5 * norm:
        return identity, 1

    found: list[tuple[float, Vertex]] = [(float(problem.value_at(identity)), identity)]
    total = 0

    def climb(point: Point) -> None:
        nonlocal total
        point, steps = ascend(problem, point, iterations)
        total += steps
        vertex = problem.assign(point)
        found.extend((float(v), problem.pick(vertex, i)) for i, v in enumerate(problem.value_at(vertex)))
        found[:] = [max(found, key=lambda pair: pair[0])]

    spread = problem.spread()
    # The annealing needs no precision: what it ends in is climbed, rounded and valued in float64.
    rough = problem.to(torch.float32)
    if annealing and spread > 0:
        betas = torch.logspace(0, math.log10(9), annealing) / spread
        climb({g: x.double() for g, x in soft_assign(rough, rough.barycentre(), betas).items()})
        total += annealing
    else:
        starts = (problem.dense(identity), problem.barycentre())
        climb({g: torch.cat([start[g] for start in starts]) for g in problem.sizes})
    for _ in range(restarts if annealing and spread > 0 else 0):
        betas = torch.logspace(math.log10(4), math.log10(9), max(1, annealing * 3 // 8)) / spread
        centre, best = rough.barycentre(), rough.dense({g: (p, s.float()) for g, (p, s) in found[0][1].items()})
        for g in centre:
            noise = torch.randn(centre[g].shape, generator=generator).to(centre[g])
            centre[g] = 0.8 * centre[g] + 0.2 * best[g] + 0.05 / math.sqrt(problem.sizes[g]) * noise
        climb({g: x.double() for g, x in soft_assign(rough, centre, betas).items()})
        total += len(betas)
    vertex, steps = problem.polish(found[0][1])
    return vertex, total + steps


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
    """
    rough = problem.to(torch.float32)
    logits = {}
    for g, n in problem.sizes.items():
        noise = 0.1 * torch.randn(1, n, n * (2 if problem.signed[g] else 1), generator=generator)
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
    with torch.enable_grad():
        for _ in range(steps):
            point = soften()
            loss = sum((s.ref - point[s.group][0, int(s.signed)] @ s.own).square().sum() for s in rough.singles)
            for p in rough.pairs:
                rows, columns = point[p.a][0, int(p.row_signed)], point[p.b][0, int(p.column_signed)]
                loss = loss + (p.ref - rows @ p.own @ columns.T).square().sum()
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
    device: str | torch.device = "cpu",
    seed: int = 0,
    **options: Any,
) -> MatchResult:
    """Finds the group element that brings ``weights`` nearest to ``reference``.

    Args:
        spec: The symmetry of the network.
        reference: Weights to come near to.
        weights: Weights to move; not touched.
        method: ``lap``, ``frank_wolfe`` or ``sinkhorn``, or a registered matcher.
        signs: Whether to search signs as well as permutations.
        device: Where to compute; assignments run on the CPU in any case.
        seed: Seeds what is random in the method.
        options: Options of the method.

    Returns:
        The element and both distances. Where the method finds nothing better, the identity.

    Raises:
        UserError: Unknown method or option, weights that do not fit the spec, or NaN or infinite weights.
    """
    start = time.process_time()
    matcher = MATCHERS.get(method)
    check_options(f"matcher {method!r}", matcher, options, skip=("problem", "generator"))
    for name, state in (("reference", reference), ("weights", weights)):
        spec.validate(state, name=name)
        check_finite(state, name)
    identity = spec.identity()
    before = spec.distance(reference, weights)
    if before == 0.0 or not spec.groups:
        return MatchResult(identity, before, before, time.process_time() - start, 0)
    problem = Problem.build(spec, reference, weights, signs=signs, device=str(device))
    vertex, iterations = matcher(problem, torch.Generator().manual_seed(seed), **options)
    element = problem.element(vertex)
    after = spec.distance(reference, spec.apply(weights, element))
    if not after < before:
        element, after = identity, before
    return MatchResult(element, before, after, time.process_time() - start, iterations)


def check_finite(state: StateDict, name: str) -> None:
    """Raises a UserError that names the first tensor with NaN or infinite entries."""
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(f"{name}: {key!r} has {bad} NaN or infinite entries of {tensor.numel()}; train it anew")


def check_options(what: str, function: Any, options: Mapping[str, Any], skip: tuple[str, ...] = ()) -> None:
    """Raises a UserError for an option that ``function`` does not take, with the nearest names that it does."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in parameters if name not in skip]
    for name in options:
        if name not in known:
            raise unknown(f"option of {what}", name, known)
