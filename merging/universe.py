"""Cycle-consistent merging: all networks are moved into one common frame, by one joint optimisation.

Matching pairs one by one, P_ij from j to i need not agree with P_ik P_kj. Here every network has one element g_i that
takes it into a common frame (the "universe"), and P_ij = g_i^-1 g_j, so cycles close by construction. The objective is
that of all pairs together::

    max_{g_1..g_N}  sum_{i<j} <g_i theta_i, g_j theta_j>  =  (|sum_i g_i theta_i|^2 - sum_i |g_i theta_i|^2) / 2

Source: Crisostomi et al., "C2M3: Cycle-Consistent Multi-Model Merging", NeurIPS 2024, section 3 (Frank-Wolfe over
factored permutations). Recurrent groups, signs, the exact line search and the annealed start are ours.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fleetgym.core.errors import UserError
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging.fleet_merge import align
from fleetgym.merging.matching import Point, Problem, Vertex, soft_assign
from fleetgym.merging.mergers import Merged, average, mean_distance, normalised, restore_norms, wants_norms


class Universe:
    """The objective of N networks, and its gradient with respect to each one's (soft) element.

    Args:
        spec: Their symmetry.
        state_dicts: Their weights.
        coefficients: Their weights in the sum; scaled to sum to N.
        signs: Whether signs are searched.
        device: Where to compute.
    """

    def __init__(
        self,
        spec: WeightSpec,
        state_dicts: Sequence[StateDict],
        coefficients: Sequence[float] | None = None,
        *,
        signs: bool = True,
        device: str = "cpu",
    ) -> None:
        self.count = len(state_dicts)
        shares = torch.tensor(normalised(coefficients, self.count), dtype=torch.float64, device=device) * self.count
        problem = Problem.stack([Problem.build(spec, s, s, signs=signs, device=device) for s in state_dicts])
        scale = [shares.view(-1, *[1] * (x.ndim - 1)) for x in (torch.empty(1, 1, 1), torch.empty(1, 1, 1, 1))]
        self.problem = replace(
            problem,
            singles=[replace(s, own=s.own * scale[0]) for s in problem.singles],
            pairs=[replace(p, own=p.own * scale[1]) for p in problem.pairs],
        )

    def moved(self, point: Point, which: slice = slice(None)) -> tuple[list[Tensor], list[Tensor]]:
        """Every tensor block of (some) networks moved by its soft element: singles [N, n, K], pairs [N, Na, F, Nb]."""
        singles = [point[s.group][:, int(s.signed)] @ s.own[which] for s in self.problem.singles]
        pairs = []
        for p in self.problem.pairs:
            own, row, column = p.own[which], point[p.a][:, int(p.row_signed)], point[p.b][:, int(p.column_signed)]
            pairs.append((row @ own.flatten(2)).view(own.shape) @ column[:, None].mT)
        return singles, pairs

    def rough(self) -> Universe:
        """The same in single precision, for the search."""
        other = copy.copy(self)
        other.problem = self.problem.to(torch.float32)
        return other

    def value(self, point: Point) -> float:
        """Half the squared length of the sum less the squared lengths of its parts."""
        return 0.5 * sum(
            float(x.sum(0).square().sum() - x.square().sum()) for blocks in self.moved(point) for x in blocks
        )

    def against_others(self, point: Point) -> Problem:
        """N matching problems: network i against the sum of all others as they are moved now."""
        singles, pairs = self.moved(point)
        problem = self.problem
        linear = {g: torch.zeros_like(u) for g, u in problem.linear.items()}
        new_singles = [replace(s, ref=x.sum(0) - x) for s, x in zip(problem.singles, singles)]
        for s in new_singles:
            linear[s.group][:, int(s.signed)] += s.ref @ s.own.mT
        new_pairs = [replace(p, ref=(x.sum(0) - x).contiguous()) for p, x in zip(problem.pairs, pairs)]
        return Problem(problem.sizes, problem.signed, linear, new_singles, new_pairs, problem.nested)

    def gradient(self, point: Point) -> Point:
        """The derivative of :meth:`value` by each network's soft element."""
        return self.against_others(point).gradient(point)

    def climb(self, point: Point, iterations: int, tolerance: float = 1e-6) -> tuple[Point, list[float]]:
        """Frank-Wolfe over all N elements at once.

        Along a segment the objective is a polynomial of degree four (two elements act on each tensor, two networks
        meet in each product), so five values give its maximum exactly. The first network's element stays: it is the
        frame.

        Returns:
            The last point, and the values on the way, which never fall.
        """
        values = [self.value(point)]
        times = torch.linspace(0, 1, 5, dtype=torch.float64)
        basis = torch.linalg.inv(torch.stack([times**k for k in range(5)], 1))
        for _ in range(iterations):
            corner = self.problem.dense(self.problem.assign(self.gradient(point)))
            for g in corner:
                corner[g] = corner[g].to(point[g])
                corner[g][0] = point[g][0]

            def between(t: float, corner: Point = corner, point: Point = point) -> Point:
                return {g: torch.lerp(point[g], corner[g], t) for g in point}

            samples = [values[-1], *(self.value(between(float(t))) for t in times[1:])]
            coefficients = (basis @ torch.tensor(samples, dtype=torch.float64)).flip(0)
            grid = torch.linspace(0, 1, 201, dtype=torch.float64)
            heights = sum(c * grid**k for k, c in enumerate(coefficients.flip(0)))
            best = int(heights.argmax())
            step = float(grid[best])
            new = self.value(between(step)) if 0 < best < 200 else samples[0 if best == 0 else 4]
            if not new > values[-1] + tolerance * abs(values[-1]):
                break
            point = between(step)
            values.append(new)
        return point, values


@torch.no_grad()
def universe(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    matcher: str = "frank_wolfe",
    signs: bool = True,
    max_passes: int = 3,
    coefficients: Sequence[float] | None = None,
    iterations: int = 50,
    annealing: int = 40,
    norms: bool | str = "auto",
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> Merged:
    """The merger ``universe``: all networks are moved jointly into one frame, then averaged.

    Two starts are climbed and the better one is kept: the result of :func:`fleetgym.merging.fleet_merge.align`, and an
    annealing of all elements at once (mean field: each network sees the softly moved others). The memory is that of
    all N networks.

    Args:
        spec: The networks' symmetry.
        state_dicts: Their weights; not touched.
        matcher: How the sequential start aligns.
        signs: Whether signs are searched.
        max_passes: Of the sequential start.
        coefficients: Weights of the networks.
        iterations: Most Frank-Wolfe steps.
        annealing: Temperatures of the joint annealing; with 0 there is none.
        norms: As for ``fleet_merge``.
        device: Where to compute.
        seed: Seeds the matcher.
        options: Options of the matcher.

    Returns:
        The merged weights; for each network its element g_i (``elements[i].inverse() @ elements[j]`` takes network j to
        network i); a history with ``distance`` before, after the sequential start and at the end.

    Raises:
        UserError: Unknown matcher, option or value of ``norms``.
    """
    wants_norms(norms, spec, state_dicts[:1])
    if iterations < 1:
        raise UserError(f"iterations={iterations}: at least 1 is wanted")
    elements, moved, history = align(
        spec,
        state_dicts,
        matcher=matcher,
        signs=signs,
        max_passes=max_passes,
        coefficients=coefficients,
        device=device,
        seed=seed,
        **options,
    )
    began = time.process_time()
    distance = mean_distance(spec, moved)
    best = (distance, elements, moved, "sequential")
    if spec.groups and len(state_dicts) > 1 and distance > 0:
        worlds = Universe(spec, state_dicts, coefficients, signs=signs, device=device)
        rough = worlds.rough()
        starts = [("joint", rough.problem.dense(_vertex(rough.problem, elements)))]
        if annealing:
            starts.append(("annealed", _anneal(rough, annealing)))
        for name, start in starts:
            point, _ = rough.climb(start, iterations, 1e-5)
            vertex = _polished(worlds, {g: (p, s.double()) for g, (p, s) in rough.problem.assign(point).items()})
            found = [worlds.problem.element(vertex, i) for i in range(len(state_dicts))]
            states = [spec.apply(state, element) for state, element in zip(state_dicts, found)]
            now = mean_distance(spec, states)
            if now < best[0]:
                best = (now, found, states, name)
    distance, elements, moved, name = best
    history.append({"distance": distance, "start": name, "seconds": time.process_time() - began})
    weights = average(moved, coefficients)
    if wants_norms(norms, spec, moved):
        weights, history[-1]["norm_factor"] = restore_norms(weights, spec, moved, coefficients)
    return weights, elements, history


def _vertex(problem: Problem, elements: Sequence[Element]) -> Vertex:
    out = {}
    for g, u in problem.linear.items():
        perms = torch.stack([element.perms[g] for element in elements]).to(u.device)
        out[g] = (perms, torch.stack([element.signs[g] for element in elements]).to(u))
    return out


def _anneal(worlds: Universe, temperatures: int) -> Point:
    """All elements at once as the temperature falls, each network against the others as they are moved now."""
    problem = worlds.problem
    point = problem.barycentre()
    first = problem.dense(problem.identity())
    for g in point:
        point[g][0] = first[g][0]  # the frame; without one, all elements could turn together and none would begin
    spread = worlds.against_others(first).spread()
    for beta in torch.logspace(0, math.log10(9), temperatures).tolist():
        against = worlds.against_others(point)
        # One step for every network but the first.
        new = soft_assign(against, point, (beta / spread.clamp(min=1e-30))[None])
        point = {g: torch.cat([point[g][:1], x[1:]]) for g, x in new.items()}
    return point


def _polished(worlds: Universe, vertex: Vertex, passes: int = 5) -> Vertex:
    """Each network's groups in turn against the sum of the others, as long as the sum over all pairs grows."""
    problem = worlds.problem
    singles, pairs = worlds.moved(problem.dense(vertex))
    sums = [[x.sum(0, keepdim=True) for x in blocks] for blocks in (singles, pairs)]
    for _ in range(passes):
        changed = False
        for i in range(1, worlds.count):
            one = slice(i, i + 1)
            before = {g: (perm[one].clone(), sign[one].clone()) for g, (perm, sign) in vertex.items()}
            linear = {g: torch.zeros_like(u[one]) for g, u in problem.linear.items()}
            against = [
                replace(s, ref=total - x[one], own=s.own[one]) for s, x, total in zip(problem.singles, singles, sums[0])
            ]
            for s in against:
                linear[s.group][:, int(s.signed)] += s.ref @ s.own.mT
            alone = Problem(
                problem.sizes,
                problem.signed,
                linear,
                against,
                [replace(p, ref=t - x[one], own=p.own[one]) for p, x, t in zip(problem.pairs, pairs, sums[1])],
                problem.nested,
            )
            mine, _ = alone.polish(before, 10)
            if all(torch.equal(x, y) for g in mine for x, y in zip(mine[g], before[g])):
                continue
            changed = True
            for blocks, new, totals in zip((singles, pairs), worlds.moved(problem.dense(mine), one), sums):
                for x, y, total in zip(blocks, new, totals):
                    total += y - x[one]
                    x[one] = y
            for g, (perm, sign) in mine.items():
                vertex[g][0][i], vertex[g][1][i] = perm[0], sign[0]
        if not changed:
            break
    return vertex
