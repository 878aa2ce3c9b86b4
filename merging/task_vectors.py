"""Merging by task vectors: what training added to a common start.

All three take ``base``, the weights that training began from. With ``align`` every policy is first moved, by an element
of its symmetry group, as near to the base as it comes; after a common start that is the identity, and the check is
cheap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn

from fleetgym.core.checkpoint import check_finite
from fleetgym.core.errors import UserError
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging.matching import match
from fleetgym.merging.mergers import MEAN, STD, Merged, normalised


def _vectors(
    spec: WeightSpec, state_dicts: Sequence[StateDict], base: Any, align: bool, matcher: str, seed: int, options: dict
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]], list[Element]]:
    """The base, each policy's difference from it in float64, and the elements that moved the policies."""
    if isinstance(base, (str, PathLike)):
        from fleetgym.core.checkpoint import Checkpoint

        base = Checkpoint.load(base).weights
    elif isinstance(base, nn.Module):
        base = base.state_dict()
    if not isinstance(base, Mapping):
        raise UserError(
            f"base is a {type(base).__name__}; give the state dict, module or checkpoint training began from"
        )
    spec.validate(base, name="base")
    check_finite(base, "base")
    for key in (MEAN, STD):
        if key in base and not all(torch.equal(base[key].cpu(), state[key].cpu()) for state in state_dicts):
            raise UserError(
                f"the base's {key!r} is not that of the policies; task vectors need common input statistics"
            )
    elements, vectors = [], []
    for state in state_dicts:
        element = match(spec, base, state, matcher, seed=seed, **options).element if align else spec.identity()
        moved = spec.apply(state, element)
        elements.append(element)
        vectors.append({k: moved[k].double() - base[k].double() for k in moved if moved[k].is_floating_point()})
    return dict(base), vectors, elements


def _added(base: StateDict, change: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k: (v.double() + change[k]).to(v.dtype) if k in change else v.clone() for k, v in base.items()}


@torch.no_grad()
def task_arithmetic(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    base: Any,
    scaling: float | None = None,
    align: bool = True,
    coefficients: Sequence[float] | None = None,
    matcher: str = "frank_wolfe",
    seed: int = 0,
    **options: Any,
) -> Merged:
    """The merger ``task_arithmetic``: theta = base + scaling * sum_i tau_i, with tau_i = theta_i - base.

    Source: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, section 2.

    Args:
        spec: The policies' symmetry.
        state_dicts: Their weights.
        base: What training began from: a state dict, module, checkpoint or path of one.
        scaling: Factor of the sum; 1 / N (the average) if None. The paper chooses it on validation data.
        align: Whether to move policies near to the base first.
        coefficients: Weights of the policies, scaled to sum to N; equal if None.
        matcher: How to align.
        seed: Seeds the matcher.
        options: Options of :func:`fleetgym.merging.match`.

    Raises:
        UserError: A base that does not fit.
    """
    shares = normalised(coefficients, len(state_dicts))
    base, vectors, elements = _vectors(spec, state_dicts, base, align, matcher, seed, options)
    factor = 1.0 if scaling is None else scaling * len(vectors)
    change = {k: factor * sum(share * v[k] for share, v in zip(shares, vectors)) for k in vectors[0]}
    return _added(base, change), elements, []


@torch.no_grad()
def ties(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    base: Any,
    keep: float = 0.2,
    scaling: float = 1.0,
    align: bool = True,
    coefficients: Sequence[float] | None = None,
    matcher: str = "frank_wolfe",
    seed: int = 0,
    **options: Any,
) -> Merged:
    """The merger ``ties``: task vectors are trimmed, their signs elected, and those that agree averaged.

    Of each tau_i the ``keep`` largest entries stay; each entry's sign is that of the sum over policies; the mean is
    over the policies that have it; theta = base + scaling * mean.

    Source: Yadav et al., "TIES-Merging: Resolving Interference When Merging Models", NeurIPS 2023, algorithm 1.

    Args:
        spec: The policies' symmetry.
        state_dicts: Their weights.
        base: What training began from.
        keep: Share of each task vector's entries that stay, in (0, 1].
        scaling: Factor of the merged task vector.
        align: Whether to move policies near to the base first.
        coefficients: Weights of the policies.
        matcher: How to align.
        seed: Seeds the matcher.
        options: Options of :func:`fleetgym.merging.match`.

    Raises:
        UserError: ``keep`` outside (0, 1], or a base that does not fit.
    """
    if not 0 < keep <= 1:
        raise UserError(f"keep={keep}: a share above 0 and at most 1 is wanted")
    shares = normalised(coefficients, len(state_dicts))
    base, vectors, elements = _vectors(spec, state_dicts, base, align, matcher, seed, options)
    for vector in vectors:
        sizes = torch.cat([v.abs().flatten() for v in vector.values()])
        smallest = sizes.sort(descending=True).values[max(1, round(keep * len(sizes))) - 1]
        for k, v in vector.items():
            vector[k] = torch.where(v.abs() >= smallest, v, torch.zeros_like(v))
    change = {}
    for k in vectors[0]:
        stack = torch.stack([v[k] for v in vectors])
        weight = torch.tensor(shares, dtype=stack.dtype, device=stack.device).view(-1, *[1] * (stack.ndim - 1))
        elected = (weight * stack).sum(0).sign()
        agrees = weight * ((stack.sign() == elected) & (stack != 0))
        change[k] = scaling * (agrees * stack).sum(0) / agrees.sum(0).clamp(min=1e-300)
    return _added(base, change), elements, []


@torch.no_grad()
def dare(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    base: Any,
    drop: float = 0.5,
    scaling: float | None = None,
    align: bool = True,
    coefficients: Sequence[float] | None = None,
    matcher: str = "frank_wolfe",
    seed: int = 0,
    **options: Any,
) -> Merged:
    """The merger ``dare``: entries of task vectors are dropped at random and the rest rescaled, then summed.

    tau_i <- m_i * tau_i / (1 - drop) with m_i ~ Bernoulli(1 - drop), then task arithmetic.

    Source: Yu et al., "Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch",
    ICML 2024, equation 2.

    Args:
        spec: The policies' symmetry.
        state_dicts: Their weights.
        base: What training began from.
        drop: Probability that an entry is dropped, in [0, 1).
        scaling: Factor of the sum; 1 / N if None.
        align: Whether to move policies near to the base first.
        coefficients: Weights of the policies.
        matcher: How to align.
        seed: Seeds the draws and the matcher.
        options: Options of :func:`fleetgym.merging.match`.

    Raises:
        UserError: ``drop`` outside [0, 1), or a base that does not fit.
    """
    if not 0 <= drop < 1:
        raise UserError(f"drop={drop}: a probability below 1 is wanted")
    shares = normalised(coefficients, len(state_dicts))
    base, vectors, elements = _vectors(spec, state_dicts, base, align, matcher, seed, options)
    generator = torch.Generator().manual_seed(seed)
    factor = 1.0 if scaling is None else scaling * len(vectors)
    change = {k: torch.zeros_like(v) for k, v in vectors[0].items()}
    for share, vector in zip(shares, vectors):
        for k, v in vector.items():
            kept = (torch.rand(v.shape, generator=generator) >= drop).to(v)
            change[k] += factor * share / (1 - drop) * kept * v
    return _added(base, change), elements, []
