"""fleet-merge: align N (recurrent) policies to a running reference, then average, and keep the weights' norms.

Source: Wang et al., "Robot Fleet Learning via Policy Merging", ICLR 2024. The reference, the order and the guards are
ours: every step lowers the mean squared distance between the policies, or is not taken.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fleetgym.core.errors import UserError
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging.matching import match
from fleetgym.merging.mergers import Merged, average, norm_keys, normalised, pointing_keys, restore_norms, wants_norms


class RunningMean:
    """The weighted mean of state dicts that come and go one by one, and how far they lie apart.

    It holds one set of weights in float64. Equal networks give their weights back to the bit, and distance 0.

    Args:
        spec: The networks' symmetry.
    """

    def __init__(self, spec: WeightSpec) -> None:
        self.spec = spec
        self.mean: dict[str, Tensor] = {}
        self.total = 0.0
        self._counted, self._pointing = frozenset(spec.cost_keys), frozenset(pointing_keys(spec))
        # sum_i c_i |theta_i - mean|^2 over the tensors that count, and over those that show the direction.
        self._squares = [0.0, 0.0]

    def change(self, state: StateDict, weight: float) -> None:
        """Adds a network, or takes one out again (a negative weight)."""
        if not self.mean:
            self.mean = {k: v.double() if v.is_floating_point() else v.clone() for k, v in state.items()}
        old, self.total = self.total, self.total + weight
        if abs(self.total) < 1e-12:  # nobody left: the next one is the mean
            self.mean, self.total, self._squares = {}, 0.0, [0.0, 0.0]
            return
        share, apart = weight / self.total, [0.0, 0.0]
        for key, value in state.items():
            if not value.is_floating_point():
                continue
            difference = value.double() - self.mean[key]
            if key in self._counted:
                square = float(difference.square().sum())
                apart[0] += square
                apart[1] += square if key in self._pointing else 0.0
            self.mean[key] = self.mean[key].add_(difference, alpha=share)
        self._squares = [max(0.0, so_far + old * share * more) for so_far, more in zip(self._squares, apart)]

    def distance(self, count: int, *, pointing: bool = False) -> float:
        """Mean squared distance over all pairs of ``count`` networks that were added with equal weights.

        With ``pointing`` only over the tensors of :func:`fleetgym.merging.mergers.pointing_keys`.
        """
        return 2.0 * count * self._squares[pointing] / self.total / max(1, count - 1) if self.total else 0.0

    def weights(self, like: StateDict) -> dict[str, Tensor]:
        """The mean, in the types and on the devices of ``like``."""
        return {key: self.mean[key].to(value) for key, value in like.items()}

    def without(self, state: StateDict, weight: float) -> dict[str, Tensor] | None:
        """The mean of the others, or None where nobody else counts."""
        rest = self.total - weight
        if rest < 1e-12:
            return None
        return {
            key: (self.mean[key] - (weight / rest) * (value.double() - self.mean[key])).to(value)
            if value.is_floating_point()
            else value
            for key, value in state.items()
        }


@dataclass
class Aligned:
    """What aligning one by one leaves.

    Attributes:
        elements: For each network its element.
        mean: The weighted mean of the moved networks.
        distance: Their mean squared distance over all pairs.
        history: As :func:`align` gives it.
        norms: For each tensor of ``norm_keys`` the weighted mean of the networks' norms, which no element changes.
        agree: Whether the moved networks point the same way (``point_the_same_way``).
    """

    elements: list[Element]
    mean: dict[str, Tensor]
    distance: float
    history: list[dict[str, Any]]
    norms: dict[str, float]
    agree: bool


@torch.no_grad()
def align_one_by_one(
    spec: WeightSpec,
    read: Sequence[Callable[[], StateDict]],
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
) -> Aligned:
    """:func:`align` for networks that are read one at a time, and again for each pass.

    At any moment three sets of weights exist: the mean, the network at hand, and its moved copy. What grows with the
    number of networks are their elements, a few integers a unit.

    Args:
        spec: Their symmetry.
        read: For each network a function that gives its weights.
        matcher: See :func:`align`.
        signs: See :func:`align`.
        max_passes: See :func:`align`; with 0 nothing is aligned.
        reference: See :func:`align`.
        coefficients: See :func:`align`.
        tolerance: See :func:`align`.
        device: See :func:`align`.
        seed: See :func:`align`.
        options: See :func:`align`.

    Returns:
        Elements, the mean and the history.

    Raises:
        UserError: As :func:`align`.
    """
    count = len(read)
    shares = [share * count for share in normalised(coefficients, count)]
    if not (reference in ("auto", "first", "mean") or isinstance(reference, int) and 0 <= reference < count):
        raise UserError(f"reference {reference!r}: 'auto', 'first', 'mean' or an index below {count} is wanted")
    if max_passes < 0:
        raise UserError(f"max_passes={max_passes}: it must not be negative")
    # The distance is over all pairs alike, whatever the weights in the mean.
    weighted = any(share != 1.0 for share in shares)
    pointing = frozenset(pointing_keys(spec))
    norms, squares, like = dict.fromkeys(norm_keys(spec), 0.0), 0.0, {}

    def means() -> tuple[RunningMean, RunningMean]:
        mean = RunningMean(spec)
        return mean, RunningMean(spec) if weighted else mean

    def put(both: tuple[RunningMean, RunningMean], state: StateDict, share: float, way: float = 1.0) -> None:
        both[0].change(state, way * share)
        if weighted:
            both[1].change(state, way)

    both = means()
    for share, get in zip(shares, read):
        state = get()
        like = like or {key: value.new_empty(0) for key, value in state.items()}
        put(both, state, share)
        for key in norms:
            norm = float(state[key].double().norm())
            norms[key] += share / count * norm
            squares += norm * norm / count if key in pointing else 0.0
        del state
    distance = first = both[1].distance(count)
    elements = [spec.identity() for _ in read]
    history: list[dict[str, Any]] = [{"pass": 0, "distance": distance, "moved": 0, "seconds": 0.0}]
    if reference == "auto":
        # ||a - b||^2 = 2 |a|^2 (1 - cosine), as in point_the_same_way
        reference = "mean" if both[1].distance(count, pointing=True) < squares else "first"
    anchor = reference if isinstance(reference, int) else 0
    order = [anchor, *(i for i in range(count) if i != anchor)]

    for number in range(1, max_passes + 1):
        moved, seconds = 0, 0.0
        running = count == 2 or number == 1 and reference != "mean"
        if running:
            both = means()
        for i in order:
            state = read[i]()
            own = state if elements[i].is_identity else spec.apply(state, elements[i])
            del state
            target = both[0].without(own, 0.0 if running else shares[i]) if both[0].total else None
            if target is not None:
                result = match(
                    spec, target, own, matcher, signs=signs, device=device, seed=seed + number - 1, **options
                )
                del target
                seconds += result.seconds
                if not result.element.is_identity:
                    moved += 1
                    if not running:
                        put(both, own, shares[i], -1.0)
                    elements[i] = result.element @ elements[i]
                    del own
                    # From the original, so that no rounding piles up; read again, so that no third copy waits for it.
                    own = spec.apply(read[i](), elements[i])
                    if not running:
                        put(both, own, shares[i])
            if running:
                put(both, own, shares[i])
            del own
        last, distance = distance, both[1].distance(count)
        history.append({"pass": number, "distance": distance, "moved": moved, "seconds": seconds})
        if not moved or count == 2 or last - distance < tolerance * last:
            break
    if distance >= first and not all(element.is_identity for element in elements):
        # Matching to a mean of few can part others.
        elements, distance, both = [spec.identity() for _ in read], first, means()
        for share, get in zip(shares, read):
            put(both, get(), share)
    agree = both[1].distance(count, pointing=True) < squares
    return Aligned(elements, both[0].weights(like), distance, history, norms, agree)


def align(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    max_passes: int = 3,
    **options: Any,
) -> tuple[list[Element], list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Moves N networks by elements of their symmetry group so that they lie close together.

    The first pass matches each to the mean of those placed before it (``reference`` is placed first). Further passes
    match each to the mean of all others, until the distance stops falling. For two networks one pass says it all. Every
    network has one element into one frame, so cycles close: the map from j to i is ``g_i^-1 g_j``.

    Args:
        spec: Their symmetry.
        state_dicts: Their weights; not touched.
        max_passes: Most passes over the networks.
        options: ``matcher`` (``frank_wolfe``, ``lap``, ``git_rebasin``, ``sinkhorn`` or a registered matcher) and its
            own options; ``signs``, whether to search sign flips as well as permutations; ``reference``, what the first
            pass matches to: ``"first"`` or an index, that network and those placed after it, ``"mean"``, the mean of
            all others, for networks that share their initialisation, ``"auto"``, the mean if they point the same way
            already; ``coefficients``, weights of the networks in the means; ``tolerance``, passes end when the
            distance falls by less than this fraction; ``device``, where the matcher computes; ``seed``, seeds the
            matcher.

    Returns:
        For each network its element and its moved weights, and a history: for each pass ``pass``, ``distance`` (mean
        over pairs), ``moved`` (how many networks were) and ``seconds`` (CPU).

    Raises:
        UserError: Unknown matcher, option or reference.
    """
    if max_passes < 1:
        raise UserError(f"max_passes={max_passes}: at least 1 is wanted")
    read = [lambda state=state: state for state in state_dicts]
    done = align_one_by_one(spec, read, max_passes=max_passes, **options)
    aligned = [
        {key: value.clone() for key, value in (state if e.is_identity else spec.apply(state, e)).items()}
        for state, e in zip(state_dicts, done.elements)
    ]
    return done.elements, aligned, done.history


@torch.no_grad()
def fleet_merge(
    spec: WeightSpec, state_dicts: Sequence[StateDict], *, norms: bool | str = "auto", **options: Any
) -> Merged:
    """The merger ``fleet_merge``: :func:`align`, then the weighted mean, then its norms restored.

    ``norms`` says whether :func:`fleetgym.merging.mergers.restore_norms` follows the mean. ``"auto"`` does it where it
    is needed: for networks that point different ways even after alignment, as unrelated initialisations do, whose mean
    is too short. After a common start the mean is as long as it should be, and stretching it round by round would add
    up. The other arguments, the errors and the results are those of :func:`align`, with the merged weights in first
    place.
    """
    wants_norms(norms, spec, state_dicts[:1])  # a wrong value is said before the work
    elements, aligned, history = align(spec, state_dicts, **options)
    coefficients = options.get("coefficients")
    weights = average(aligned, coefficients)
    if wants_norms(norms, spec, aligned):
        weights, factor = restore_norms(weights, spec, aligned, coefficients)
        history[-1]["norm_factor"] = factor
    return weights, elements, history


def _signature_of_options(function: Callable[..., Any], source: Callable[..., Any]) -> inspect.Signature:
    """The signature of a function whose ``**options`` are the keyword arguments of another."""
    own = inspect.signature(function)
    *named, rest = own.parameters.values()
    taken = [p for name, p in inspect.signature(source).parameters.items() if name not in own.parameters]
    shared = [p for p in taken if p.kind is p.KEYWORD_ONLY]
    return own.replace(parameters=[*named, *shared, rest])


# Which options there are is read from the signature; what they are is written once, at align.
fleet_merge.__signature__ = _signature_of_options(fleet_merge, align_one_by_one)
