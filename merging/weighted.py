"""Averages weighted by statistics that robots send in place of data: Fisher-weighted averaging and RegMean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fleetgym.core.errors import UserError
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging.fleet_merge import align as bring_together
from fleetgym.merging.mergers import Merged, average, normalised
from fleetgym.merging.statistics import unpack


def _prepared(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    statistics: Sequence[Mapping[str, Tensor]],
    kind: str,
    coefficients: Sequence[float] | None,
    align: bool,
    options: dict[str, Any],
) -> tuple[list[float], list[dict[str, Tensor]], list[Element], list[dict[str, Tensor]], list[dict[str, Any]]]:
    """Shares (numbers of steps by default), the statistics of one kind, elements, moved weights, history."""
    if len(statistics) != len(state_dicts):
        raise UserError(f"{len(statistics)} statistics for {len(state_dicts)} policies; give one a policy")
    own = []
    for i, tensors in enumerate(statistics):
        own.append({k.removeprefix(f"{kind}/"): v for k, v in tensors.items() if k.startswith(f"{kind}/")})
        if not own[-1]:
            raise UserError(
                f"statistics {i} hold no {kind}; compute them with statistics(policy, demonstrations, ({kind!r},))"
            )
        if own[-1].keys() != own[0].keys():
            raise UserError(f"statistics {i} are of other layers than statistics 0")
    if coefficients is None and all("count" in tensors for tensors in statistics):
        coefficients = [float(tensors["count"]) for tensors in statistics]
    shares = normalised(coefficients, len(state_dicts))
    if not align:
        if options:
            raise UserError(f"align=False takes no options of alignment, got {', '.join(options)}")
        copies = [{key: value.clone() for key, value in state.items()} for state in state_dicts]
        return shares, own, [spec.identity() for _ in state_dicts], copies, []
    elements, moved, history = bring_together(spec, state_dicts, coefficients=shares, **options)
    return shares, own, elements, moved, history


@torch.no_grad()
def fisher_average(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    statistics: Sequence[Mapping[str, Tensor]],
    floor: float = 1e-6,
    align: bool = True,
    coefficients: Sequence[float] | None = None,
    matcher: str = "frank_wolfe",
    **options: Any,
) -> Merged:
    """The merger ``fisher``: each parameter's mean, weighted by its Fisher information in each policy.

    theta_j = sum_i c_i (F_ij + e) theta_ij / sum_i c_i (F_ij + e), e a floor times the mean of F.

    Source: Matena and Raffel, "Merging Models with Fisher-Weighted Averaging", NeurIPS 2022, equation 4.

    Args:
        spec: The policies' symmetry.
        state_dicts: Their weights.
        statistics: What each robot sent, with kind ``fisher``: as many float32 numbers as the policy has parameters.
        floor: Keeps parameters that nobody needs at their plain mean.
        align: Whether to align first.
        coefficients: Weights of the policies; their numbers of steps if None.
        matcher: How to align.
        options: Options of :func:`fleetgym.merging.fleet_merge.align`.

    Raises:
        UserError: Statistics that are missing or do not fit.
    """
    chosen = {"matcher": matcher, **options} if align else options
    shares, own, elements, moved, history = _prepared(
        spec, state_dicts, statistics, "fisher", coefficients, align, chosen
    )
    merged = average(moved, shares)
    shapes = spec.shapes
    weights = []
    for number, (fisher, element) in enumerate(zip(own, elements)):
        for key, value in fisher.items():
            if tuple(value.shape) != shapes.get(key):
                raise UserError(
                    f"statistics {number}: {key!r} has shape {tuple(value.shape)}, the policy's is {shapes.get(key)}"
                )
        # The information moves with its parameter and has no sign.
        unsigned = Element(element.perms, {g: torch.ones_like(s) for g, s in element.signs.items()})
        full = {key: fisher.get(key, torch.zeros(shape)).double() for key, shape in shapes.items()}
        weights.append(spec.apply(full, unsigned))
    for key in own[0]:
        level = floor * max(float(sum(share * w[key].mean() for share, w in zip(shares, weights))), 1e-30)
        total = torch.zeros_like(merged[key], dtype=torch.float64)
        mass = torch.zeros_like(total)
        for share, state, weight in zip(shares, moved, weights):
            part = share * (weight[key].to(total.device) + level)
            # Around the mean, so that equal policies stay what they are.
            total += part * (state[key].double() - merged[key].double())
            mass += part
        merged[key] = (merged[key].double() + total / mass).to(merged[key].dtype)
    return merged, elements, history


@torch.no_grad()
def regmean(
    spec: WeightSpec,
    state_dicts: Sequence[StateDict],
    *,
    statistics: Sequence[Mapping[str, Tensor]],
    shrink: float = 0.9,
    ridge: float = 1e-6,
    align: bool = True,
    coefficients: Sequence[float] | None = None,
    matcher: str = "frank_wolfe",
    **options: Any,
) -> Merged:
    """The merger ``regmean``: layer by layer the weights that best reproduce what every policy's layer computes.

    min_W sum_i c_i E |W z - W_i z|^2 has the solution W = (sum_i c_i W_i G_i) (sum_i c_i G_i)^-1 with G_i = E[z z^T].
    For a linear layer z = [x, 1]. For a recurrent one z = [x_t, h_{t-1}, 1], since its gates add W_ih x and W_hh h up;
    the candidate of a GRU keeps the two apart and is solved for each alone. Other tensors are averaged.

    Source: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, equations 1 and 2;
    the recurrent layers, and moving G with the alignment, are ours.

    Args:
        spec: The policies' symmetry.
        state_dicts: Their weights.
        statistics: What each robot sent, with kind ``gram``.
        shrink: Factor of the entries off the diagonal of G (the paper's alpha).
        ridge: Added to the diagonal, in units of its mean; pulls towards the average.
        align: Whether to align first.
        coefficients: Weights of the policies; their numbers of steps if None.
        matcher: How to align.
        options: Options of :func:`fleetgym.merging.fleet_merge.align`.

    Raises:
        UserError: Statistics that are missing or do not fit, or ``shrink`` outside [0, 1].
    """
    if not 0 <= shrink <= 1:
        raise UserError(f"shrink={shrink}: a factor between 0 and 1 is wanted")
    chosen = {"matcher": matcher, **options} if align else options
    shares, own, elements, moved, history = _prepared(
        spec, state_dicts, statistics, "gram", coefficients, align, chosen
    )
    merged = average(moved, shares)

    def solve(grams: Sequence[Tensor], key: str, layers: Sequence[Tensor]) -> Tensor:
        """The layer [rows, n] of layers [rows, n] of each policy, with the grams [n, n] of their inputs."""
        mean = sum(share * layer for share, layer in zip(shares, layers))
        total = torch.zeros_like(grams[0])
        off = torch.zeros_like(mean)
        for share, gram, layer in zip(shares, grams, layers):
            if gram.shape[0] != layer.shape[1]:
                raise UserError(f"the Gram matrix of {key!r} is {tuple(gram.shape)}, the layer takes {layer.shape[1]}")
            gram = shrink * gram + (1 - shrink) * torch.diag(gram.diagonal())
            gram = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            total += share * gram
            off += share * (layer - mean) @ gram
        return mean + torch.linalg.solve(total, off.T).T

    for name in own[0]:
        grams = [unpack(tensors[name]) for tensors in own]
        prefix, _, number = name.rpartition(".")
        dot = f"{prefix}." if prefix else ""
        ih, hh = f"{dot}weight_ih_l{number}", f"{dot}weight_hh_l{number}"
        recurrent = ih in spec.axes and hh in spec.axes
        plain = f"{name}.weight" if name else "weight"
        if not recurrent and plain not in spec.axes:
            raise UserError(f"the Gram matrix of {name!r} belongs to no layer of these policies")
        weights = [ih, hh] if recurrent else [plain]
        biases = [key.replace("weight", "bias") for key in weights]
        biases = [key for key in biases if key in spec.axes]
        moved_grams = [
            _moved(spec, gram, [spec.axes[key][1] for key in weights], e) for gram, e in zip(grams, elements)
        ]
        sizes = [spec.shapes[key][1] for key in weights]
        if grams[0].shape[0] != sum(sizes) + 1:
            raise UserError(
                f"the Gram matrix of {name!r} is {tuple(grams[0].shape)}, wanted is {sum(sizes) + 1} square"
            )
        rows = spec.shapes[weights[-1]][0]
        width = sizes[-1] if recurrent else rows
        columns = list(range(sum(sizes)))
        # (rows, columns, weights they are made of): one problem for all gates, but two for the candidate of a GRU.
        problems: list[tuple[slice, list[int], list[int]]] = [(slice(0, rows), columns, list(range(len(weights))))]
        if recurrent and rows == 3 * width:
            problems = [
                (slice(0, 2 * width), columns, [0, 1]),
                (slice(2 * width, rows), columns[: sizes[0]], [0]),
                (slice(2 * width, rows), columns[sizes[0] :], [1]),
            ]
        out = {key: merged[key].double() for key in (*weights, *biases)}
        for part, inputs, which in problems:
            # A layer without a bias cannot use the 1.
            chosen_inputs = inputs + ([sum(sizes)] if biases else [])
            layers = []
            for state in moved:
                blocks = [state[weights[w]][part].double().cpu() for w in which]
                if biases:
                    blocks.append(sum(state[biases[w]][part].double().cpu() for w in which)[:, None])
                layers.append(torch.cat(blocks, 1))
            index = torch.tensor(chosen_inputs)
            solved = solve([gram[index][:, index] for gram in moved_grams], name, layers)
            offset = 0
            for w in which:
                out[weights[w]][part] = solved[:, offset : offset + sizes[w]].to(out[weights[w]].device)
                offset += sizes[w]
            if biases:
                # Only their sum matters; what the mean does not explain goes to the first.
                others = sum((out[biases[w]][part] for w in which[1:]), torch.zeros_like(out[biases[which[0]]][part]))
                out[biases[which[0]]][part] = solved[:, -1].to(others.device) - others
        merged |= {key: value.to(merged[key].dtype) for key, value in out.items()}
    return merged, elements, history


def _moved(spec: WeightSpec, gram: Tensor, axes: Sequence[Any], element: Element) -> Tensor:
    """The Gram matrix of inputs that were moved by an element; the last entry is the 1."""
    indices, signs, offset = [], [], 0
    for axis in axes:
        index, sign = spec._index(axis, element)
        indices.append(index + offset)
        signs.append(torch.ones(len(index)) if sign is None else sign.double())
        offset += len(index)
    index = torch.cat([*indices, torch.tensor([offset])])
    sign = torch.cat([*(s.double() for s in signs), torch.ones(1, dtype=torch.float64)])
    return gram[index][:, index] * sign[:, None] * sign
