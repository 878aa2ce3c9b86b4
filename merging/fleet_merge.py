"""fleet-merge: align N (recurrent) policies to a running reference, then average, and keep the weights' norms.

Source: Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024. The reference, the order and the guards are
ours: every step lowers the mean squared distance between the policies, or is not taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fleetgym.core.errors import UserError
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging.matching import match
from fleetgym.merging.mergers import (
    average,
    mean_distance,
    normalised,
    point_the_same_way,
    restore_norms,
    wants_norms,
)


@torch.no_grad()
def align(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    matcher: str = "frank_wolfe",
    signs: bool = True,
    max_passes: int = 3,
    reference: str | int = "auto",
    coefficients: Sequence[float] | None = None,
    tolerance: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> tuple[list[Element], list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Moves N networks by elements of their symmetry group so that they lie close together.

    The first pass matches each to the mean of those placed before it (``reference`` is placed first). Further passes
    match each to the mean of all others, until the distance stops falling. For two networks one pass says it all.

    Args:
        spec: Their symmetry.
        state_dicts: Their weights; not touched.
        matcher: ``lap``, ``frank_wolfe``, ``sinkhorn`` or a registered matcher.
        signs: Whether to search sign flips as well as permutations.
        max_passes: Most passes over the networks.
        reference: What the first pass matches to: ``"first"`` or an index, that network and those placed after it;
            ``"mean"``, the mean of all others, for networks that share their initialisation; ``"auto"``, the mean if
            the networks point the same way already.
        coefficients: Weights of the networks in the means.
        tolerance: Passes end when the distance falls by less than this fraction.
        device: Where the matcher computes.
        seed: Seeds the matcher.
        options: Options of the matcher.

    Returns:
        For each network its element and its moved weights, and a history: for each pass ``pass``, ``distance`` (mean
        over pairs), ``moved`` (how many networks were) and ``seconds`` (CPU).

    Raises:
        UserError: Unknown matcher, option or reference.
    """
    count = len(state_dicts)
    shares = normalised(coefficients, count)
    if not (reference in ("auto", "first", "mean") or isinstance(reference, int) and 0 <= reference < count):
        raise UserError(f"reference {reference!r}: 'auto', 'first', 'mean' or an index below {count} is wanted")
    if max_passes < 1:
        raise UserError(f"max_passes={max_passes}: at least 1 is wanted")
    elements = [spec.identity() for _ in range(count)]
    aligned = [{key: value.clone() for key, value in state.items()} for state in state_dicts]
    distance = first = mean_distance(spec, aligned)
    history: list[dict[str, Any]] = [{"pass": 0, "distance": distance, "moved": 0, "seconds": 0.0}]
    if reference == "auto":
        reference = "mean" if point_the_same_way(spec, aligned) else "first"
    anchor = reference if isinstance(reference, int) else 0
    order = [anchor, *(i for i in range(count) if i != anchor)]

    for number in range(1, max_passes + 1):
        moved, seconds = 0, 0.0
        running = count == 2 or number == 1 and reference != "mean"
        for place, i in enumerate(order):
            others = order[:place] if running else [j for j in order if j != i]
            weight = [shares[j] for j in others]
            if not others or sum(weight) == 0:
                continue
            target = average([aligned[j] for j in others], weight)
            result = match(
                spec, target, aligned[i], matcher, signs=signs, device=device, seed=seed + number - 1, **options
            )
            seconds += result.seconds
            if not result.element.is_identity:
                moved += 1
                elements[i] = result.element @ elements[i]
                # From the original, so that no rounding piles up.
                aligned[i] = spec.apply(state_dicts[i], elements[i])
        last, distance = distance, mean_distance(spec, aligned)
        history.append({"pass": number, "distance": distance, "moved": moved, "seconds": seconds})
        if not moved or count == 2 or last - distance < tolerance * last:
            break
    if distance >= first:  # matching to a mean of few can part others
        elements = [spec.identity() for _ in range(count)]
        aligned = [{key: value.clone() for key, value in state.items()} for state in state_dicts]
    return elements, aligned, history


def fleet_merge(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    matcher: str = "frank_wolfe",
    signs: bool = True,
    max_passes: int = 3,
    reference: str | int = "auto",
    coefficients: Sequence[float] | None = None,
    tolerance: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
    norms: bool | str = "auto",
    **options: Any,
) -> tuple[dict[str, Tensor], list[Element], list[dict[str, Any]]]:
    """The merger ``fleet_merge``: :func:`align`, then the weighted mean, then its norms restored.

    ``norms`` says whether :func:`fleetgym.merging.mergers.restore_norms` follows the mean. ``"auto"`` does it where it
    is needed: for networks that point different ways even after alignment, as unrelated initialisations do, whose mean
    is too short. After a common start the mean is as long as it should be, and stretching it round by round would add
    up. The other arguments, the errors and the results are those of :func:`align`, with the merged weights in first
    place.
    """
    wants_norms(norms, spec, state_dicts[:1])  # a wrong value is said before the work
    elements, aligned, history = align(
        spec,
        state_dicts,
        matcher=matcher,
        signs=signs,
        max_passes=max_passes,
        reference=reference,
        coefficients=coefficients,
        tolerance=tolerance,
        device=device,
        seed=seed,
        **options,
    )
    weights = average(aligned, coefficients)
    if wants_norms(norms, spec, aligned):
        weights, factor = restore_norms(weights, spec, aligned, coefficients)
        history[-1]["norm_factor"] = factor
    return weights, elements, history
