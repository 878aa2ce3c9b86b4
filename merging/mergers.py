"""Merging policies: validation, averaging, and the front door to every merger."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fleetgym.core.checkpoint import check_finite
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging import MATCHERS, MERGERS
from fleetgym.merging.matching import check_needed

MEAN, STD = "normaliser.mean", "normaliser.std"
Merged = tuple[dict[str, Tensor], list[Element], list[dict[str, Any]]]
"""What a merger gives: weights, for each policy the element that moved it, and a history."""


@dataclass(frozen=True)
class MergeResult:
    """What a merge gives.

    Attributes:
        weights: The merged state dict.
        elements: For each policy the group element that it was moved by before averaging.
        distance_before: Mean squared distance between the weights of two policies, over all pairs; for two policies
            ||a - b||^2.
        distance_after: The same after alignment; never above ``distance_before`` for mergers that align.
        history: What the merger noted, a dict a pass.
        method: The merger's name.
        spec: The policies' symmetry.
        aligned: The policies' state dicts after alignment, on common input statistics: the ends of interpolations.
    """

    weights: dict[str, Tensor]
    elements: list[Element]
    distance_before: float
    distance_after: float
    history: list[dict[str, Any]]
    method: str
    spec: WeightSpec
    aligned: list[dict[str, Tensor]] = field(repr=False)
    template: nn.Module | None = field(default=None, repr=False)

    def module(self) -> nn.Module:
        """A new module of the policies' kind with the merged weights.

        Raises:
            UserError: The policies were given as state dicts, so their kind is not known.
        """
        if self.template is None:
            raise UserError("merged from state dicts: load .weights into a module of your own")
        module = copy.deepcopy(self.template)
        module.load_state_dict(self.weights)
        return module


def normalised(coefficients: Sequence[float] | None, count: int) -> list[float]:
    """Coefficients that sum to one; equal ones if None.

    Raises:
        UserError: Not ``count`` of them, or one is negative or not finite, or all are zero.
    """
    if coefficients is None:
        return [1.0 / count] * count
    values = [float(c) for c in coefficients]
    if len(values) != count:
        raise UserError(f"{len(values)} coefficients {values} for {count} policies; give one a policy")
    if not all(math.isfinite(c) and c >= 0 for c in values) or sum(values) == 0:
        raise UserError(f"coefficients {values}: they must be finite, not negative, and not all zero")
    return [c / sum(values) for c in values]


@torch.no_grad()
def average(state_dicts: Sequence[StateDict], coefficients: Sequence[float] | None = None) -> dict[str, Tensor]:
    """The weighted mean of state dicts, computed in float64.

    Args:
        state_dicts: Weights of one architecture; not touched.
        coefficients: Weights of the mean, such as numbers of demonstrations; scaled to sum to one. Equal if None.

    Returns:
        New tensors, of the dtype and device of the first. Tensors of integers are the first's.
    """
    shares = normalised(coefficients, len(state_dicts))
    out = {}
    for key, first in state_dicts[0].items():
        if not first.is_floating_point():
            out[key] = first.clone()
            continue
        # Around the first, so that equal weights stay bit for bit what they are.
        total = torch.zeros_like(first, dtype=torch.float64)
        for share, state in zip(shares[1:], state_dicts[1:]):
            total += share * (state[key].to(first.device, torch.float64) - first.double())
        out[key] = (first.double() + total).to(first.dtype)
    return out


def norm_keys(spec: WeightSpec) -> list[str]:
    """The tensors whose norms are restored: those that count in distances, but for statistics of inputs or batches."""
    return [key for key in spec.cost_keys if key not in spec.buffers]


@torch.no_grad()
def restore_norms(
    merged: StateDict,
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    coefficients: Sequence[float] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Scales each tensor of a mean to the mean norm of what it is the mean of.

    Weights that do not agree cancel: the mean of N independent initialisations is shorter than each by the root of N,
    its hidden units barely move, and training on from there is slow. The same loss of variance is what REPAIR (Jordan
    et al., ICLR 2023) mends with statistics of activations; norms need no data, and no symmetry changes them.

    Args:
        merged: The mean; not touched.
        spec: The networks' symmetry; its tensors are scaled, buffers (statistics of inputs or batches) are left.
        state_dicts: What it is the mean of.
        coefficients: Their weights in the mean.

    Returns:
        The scaled state dict, and the geometric mean of the factors.
    """
    shares = normalised(coefficients, len(state_dicts))
    norms = {
        key: sum(share * float(state[key].double().norm()) for share, state in zip(shares, state_dicts))
        for key in norm_keys(spec)
    }
    return scale_to(merged, norms)


@torch.no_grad()
def scale_to(merged: StateDict, norms: Mapping[str, float]) -> tuple[dict[str, Tensor], float]:
    """:func:`restore_norms` where the norms are known: scales each tensor to its norm."""
    out, logs = dict(merged), []
    for key, wanted in norms.items():
        own = float(merged[key].double().norm())
        # Equal networks come back to the bit.
        if own > 0 and wanted > 0 and abs(wanted / own - 1) > 1e-6:
            out[key] = merged[key] * (wanted / own)
            logs.append(math.log(wanted / own))
    return out, math.exp(sum(logs) / len(logs)) if logs else 1.0


@torch.no_grad()
def interpolate(weights_a: StateDict, weights_b: StateDict, lam: float) -> dict[str, Tensor]:
    """Weights on the line from a (``lam`` = 0) to b (``lam`` = 1).

    To see whether two policies lie in one basin, evaluate along the line between ``result.aligned[0]`` and
    ``result.aligned[1]``.
    """
    if lam == 1:
        return {key: value.clone() for key, value in weights_b.items()}
    return {
        key: torch.lerp(a, weights_b[key].to(a), lam) if a.is_floating_point() else a.clone()
        for key, a in weights_a.items()
    }


def mean_distance(spec: WeightSpec, state_dicts: Sequence[StateDict]) -> float:
    """Mean squared distance between two of the state dicts, over all pairs, in float64."""
    return spec.distance(*state_dicts) if len(state_dicts) == 2 else _mean_distance(spec.cost_keys, state_dicts)


def _mean_distance(keys: Sequence[str], state_dicts: Sequence[StateDict]) -> float:
    spread = 0.0
    for key in keys:
        stack = torch.stack([state[key].double() for state in state_dicts])
        # The sum over pairs is N times the sum around the mean.
        spread += float((stack - stack.mean(0)).square().sum())
    return 2.0 * spread / max(1, len(state_dicts) - 1)


def pointing_keys(spec: WeightSpec) -> list[str]:
    """The tensors that show which way a network points: matrices and filters with units that can move.

    Gains and running variances lie near one in unrelated networks, too.
    """
    keys = [key for key in spec.cost_keys if not all(axis.fixed for axis in spec.axes[key]) and key not in spec.buffers]
    return [key for key in keys if len(spec.axes[key]) > 1] or keys


def point_the_same_way(spec: WeightSpec, states: Sequence[StateDict]) -> bool:
    """Whether the mean cosine between two networks exceeds 1/2, as it does after a shared initialisation."""
    keys = pointing_keys(spec)
    squares = sum(float(state[key].double().square().sum()) for state in states for key in keys) / len(states)
    return _mean_distance(keys, states) < squares  # ||a - b||^2 = 2 |a|^2 (1 - cosine)


def wants_norms(norms: bool | str, spec: WeightSpec, states: Sequence[StateDict]) -> bool:
    """Whether to restore norms; ``"auto"`` does where the networks point different ways.

    Raises:
        UserError: ``norms`` is something else.
    """
    if norms not in (True, False, "auto"):
        raise UserError(f"norms={norms!r}: True, False or 'auto' is wanted")
    return not point_the_same_way(spec, states) if norms == "auto" else bool(norms)


def plain_average(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    coefficients: Sequence[float] | None = None,
    norms: bool | str = False,
) -> Merged:
    """The merger ``average``: no alignment, and no :func:`restore_norms` unless ``norms`` is True or ``"auto"``."""
    weights, history = average(state_dicts, coefficients), []
    if wants_norms(norms, spec, state_dicts):
        weights, factor = restore_norms(weights, spec, state_dicts, coefficients)
        history.append({"norm_factor": factor})
    return weights, [spec.identity() for _ in state_dicts], history


def merge(method: str, policies: Sequence[Any], *, example_input: Any = None, **options: Any) -> MergeResult:
    """Merges policies of one architecture into one.

    Everything is checked before any work starts, and no input is changed.

    Args:
        method: ``average``, ``fleet_merge``, or a registered merger: a function
            ``(spec, state_dicts, **options) -> (weights, elements, history)``.
        policies: Modules, checkpoints (or paths of checkpoints), or a pair ``(spec, state_dicts)``. Policies that
            normalise their observations by statistics of their own (buffers ``normaliser.mean`` and
            ``normaliser.std``) are first re-expressed under pooled statistics by their ``renormalise(mean, std)``.
        example_input: A tensor (or a tuple of arguments) to run the policies on, for modules whose symmetry shows only
            then (convolutions, attention); see :meth:`WeightSpec.from_module`.
        options: ``coefficients``, one weight a policy, and the merger's own; for ``fleet_merge``: ``matcher`` (``lap``,
            ``frank_wolfe``, ``git_rebasin``, ``sinkhorn``), ``signs``, ``max_passes``, ``reference``, ``device``,
            ``seed`` and the matcher's options.

    Returns:
        The merged weights, and how they came about.

    Raises:
        UserError: Unknown merger, matcher or option (with the three nearest names); fewer than two policies; a policy
            of another architecture or observation size, or with NaN weights (the message has the policy, the key and
            both shapes); a symmetry that cannot be derived, or an example for one that is given.
    """
    check_merger(method, options)
    merger = MERGERS.get(method)
    names, modules, spec, states = _load(policies)
    if spec is not None and example_input is not None:
        raise UserError("example_input shows the symmetry of modules; (spec, state_dicts) has it: leave one out")
    shares = normalised(options.get("coefficients"), len(states))

    _check_alike(names, modules, states)
    for name, state in zip(names, states):
        check_finite(state, name)
    if spec is None:
        spec = WeightSpec.from_module(modules[0], example_input)
    for name, state in zip(names, states):
        spec.validate(state, name=name)
    states = _renormalised(names, modules, states, shares)

    if "module" in inspect.signature(merger).parameters:
        if modules[0] is None:
            raise UserError(f"merger {method!r} runs the policies: give modules or checkpoints, not state dicts")
        options["module"] = modules[0]
    before = mean_distance(spec, states)
    weights, elements, history = merger(spec, states, **options)
    aligned = [spec.apply(state, element) for state, element in zip(states, elements)]
    template = copy.deepcopy(modules[0]) if modules[0] is not None else None
    return MergeResult(
        weights, list(elements), before, mean_distance(spec, aligned), history, method, spec, aligned, template
    )


def check_merger(method: str, options: Mapping[str, Any]) -> None:
    """Checks a merger's name and options before any work.

    Raises:
        UserError: There is no such merger or matcher, or an option is not one of theirs, or one that they need is
            missing.
    """
    merger = MERGERS.get(method)
    parameters = inspect.signature(merger).parameters
    known = [name for name, p in parameters.items() if p.kind is not p.VAR_KEYWORD and name != "module"][2:]
    if "matcher" in parameters:
        name = options.get("matcher", parameters["matcher"].default)
        matcher = MATCHERS.get(name)
        check_needed(f"matcher {name!r}", matcher, options)
        known += list(inspect.signature(matcher).parameters)[2:]
    elif any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return  # a foreign merger that judges its options itself
    for name in options:
        if name not in known:
            raise unknown(f"option of merger {method!r}", name, known)
    check_needed(f"merger {method!r}", merger, options, skip=("module",))


def _load(policies: Any) -> tuple[list[str], list[nn.Module | None], WeightSpec | None, list[dict[str, Tensor]]]:
    spec = None
    if isinstance(policies, tuple) and len(policies) == 2 and isinstance(policies[0], WeightSpec):
        spec, policies = policies
    if isinstance(policies, (nn.Module, str, PathLike, Mapping)) or not isinstance(policies, Sequence):
        raise UserError(f"policies: a list of at least two is wanted, got {type(policies).__name__}")
    if len(policies) < 2:
        raise UserError(f"merging takes at least two policies, got {len(policies)}")
    names: list[str] = []
    modules: list[nn.Module | None] = []
    states: list[dict[str, Tensor]] = []
    for i, policy in enumerate(policies):
        name = f"policy {i}"
        if isinstance(policy, (str, PathLike)):
            from fleetgym.core.checkpoint import Checkpoint

            policy = Checkpoint.load(policy)
        if not isinstance(policy, (nn.Module, Mapping)) and callable(getattr(policy, "module", None)):
            path = getattr(policy, "path", None)
            name = f"{name} ({path})" if path is not None else name
            policy = policy.module()
        if isinstance(policy, nn.Module):
            modules.append(policy)
            states.append({key: value.detach() for key, value in policy.state_dict().items()})
        elif isinstance(policy, Mapping) and spec is not None:
            modules.append(None)
            states.append({key: value.detach() for key, value in policy.items()})
        else:
            hint = "; give state dicts as (spec, [state_dict, ...])" if isinstance(policy, Mapping) else ""
            raise UserError(f"{name} is a {type(policy).__name__}, not a module or a checkpoint{hint}")
        names.append(name)
    home = {key: value.device for key, value in states[0].items()}
    states = [{key: value.to(home.get(key, value.device)) for key, value in state.items()} for state in states]
    return names, modules, spec, states


def _check_alike(names: Sequence[str], modules: Sequence[nn.Module | None], states: Sequence[StateDict]) -> None:
    """Raises a UserError for the first policy that is not of the first one's architecture."""
    first = states[0]
    for name, module, state in zip(names[1:], modules[1:], states[1:]):
        said: list[str] = []
        if module is not None and modules[0] is not None:
            kinds = [getattr(m, "architecture", None) or type(m).__name__ for m in (module, modules[0])]
            if kinds[0] != kinds[1]:
                said.append(f"its architecture is {kinds[0]!r}, not {kinds[1]!r}")
            configs = [getattr(m, "config", None) for m in (module, modules[0])]
            if all(isinstance(config, Mapping) for config in configs):
                own, wanted = configs
                for key in sorted({*own, *wanted}):
                    if own.get(key) != wanted.get(key):
                        said.append(f"its {key} is {own.get(key)!r}, not {wanted.get(key)!r}")
        for key in [*first, *(key for key in state if key not in first)]:
            shapes = [tuple(s[key].shape) if key in s else None for s in (state, first)]
            if shapes[0] != shapes[1]:
                own, wanted = (f"has shape {shape}" if shape is not None else "is missing" for shape in shapes)
                said.append(f"its {key!r} {own}, where that of {names[0]} {wanted}")
                break
        if said:
            raise UserError(f"{name} cannot be merged with {names[0]}: {'; '.join(said)}; merge policies of one kind")


def pooled(means: Sequence[Tensor], stds: Sequence[Tensor], shares: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of pooled data, in float64, from those of its parts."""
    mean = sum(share * m.double() for share, m in zip(shares, means))
    # The variance of pooled data: the mean variance plus the variance of the means.
    variance = sum(
        share * (s.double().square() + (m.double() - mean).square()) for share, m, s in zip(shares, means, stds)
    )
    return mean, variance.sqrt()


def _renormalised(
    names: Sequence[str],
    modules: Sequence[nn.Module | None],
    states: list[dict[str, Tensor]],
    shares: Sequence[float],
) -> list[dict[str, Tensor]]:
    """State dicts of policies that share their input statistics; the inputs where they do already."""
    if MEAN not in states[0] or STD not in states[0]:
        return states
    differs = [
        i for i, state in enumerate(states) if not all(torch.equal(state[key], states[0][key]) for key in (MEAN, STD))
    ]
    if not differs:
        return states
    for name, module in zip(names, modules):
        if not callable(getattr(module, "renormalise", None)):
            raise UserError(
                f"{names[differs[0]]} normalises observations by other statistics than {names[0]}, and {name} has no "
                "renormalise(mean, std) to bring them together; train all with the same statistics"
            )
    mean, std = pooled([state[MEAN] for state in states], [state[STD] for state in states], shares)
    copies = []
    for module in modules:
        module = copy.deepcopy(module)
        with torch.no_grad():
            module.renormalise(mean.to(states[0][MEAN]), std.to(states[0][STD]))
        copies.append({key: value.detach() for key, value in module.state_dict().items()})
    return [{key: value.to(states[0][key].device) for key, value in state.items()} for state in copies]
