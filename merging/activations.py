"""Matching by what units do: correlations of activations on common inputs.

Needs data that both networks may see (public, synthetic, or a server's own); nothing but the correlation matrices goes
into the matching, so a party that has the inputs and both networks can compute them for others.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fleetgym.core.errors import UserError
from fleetgym.core.weights import Axis, StateDict, WeightSpec, evaluating
from fleetgym.merging.matching import Problem, Vertex


@torch.no_grad()
def correlations(
    spec: WeightSpec,
    module: nn.Module,
    reference: StateDict,
    weights: StateDict,
    inputs: Any,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Correlates the units of two networks on the same inputs.

    Units are seen where a layer puts them out: linear and convolutional layers before their activation, recurrent ones
    as their hidden state. Where several layers put out the same group (residual paths), their correlations are summed.

    Source: Li et al., "Convergent Learning: Do different neural networks learn the same representations?", ICLR 2016.

    Args:
        spec: The symmetry of the network.
        module: A network of this kind; its weights are not used and not touched.
        reference: Weights of the first network.
        weights: Weights of the second.
        inputs: A tensor, or a tuple of arguments.
        mask: Which samples count, of the inputs' leading dimensions ([B, T], say); all if None.

    Returns:
        For each group [n, n]: row i, column j is the correlation of unit i of the first with unit j of the second, in
        [-1, 1] times the number of layers that show it; negative where they mean the opposite.

    Raises:
        UserError: No layer shows a group's units.
    """
    arguments = inputs if isinstance(inputs, tuple) else (inputs,)
    seen = [_activations(spec, module, state, arguments, mask) for state in (reference, weights)]
    out: dict[str, Tensor] = {}
    for (group, signed, a), (_, _, b) in zip(*seen):
        a, b = (x - x.mean(0) for x in (a, b))
        a, b = (x / x.norm(dim=0).clamp(min=1e-12) for x in (a, b))
        # A block that keeps its sign says nothing about the sign of the unit, only about which it is.
        if signed or not spec.signed.get(group):
            out[group] = out.get(group, 0) + a.T @ b
    for group in spec.groups:
        if group not in out:
            raise UserError(f"no linear, convolutional or recurrent layer shows the units of group {group!r}")
    return out


def _activations(
    spec: WeightSpec, module: nn.Module, weights: StateDict, arguments: tuple, mask: Tensor | None
) -> list[tuple[str, bool, Tensor]]:
    """(group, negated with its unit, activations [samples, n]) of every layer output, in order."""
    found: list[tuple[str, bool, Tensor]] = []

    def note(axis: Axis, values: Tensor, channel: int) -> None:
        values = values.movedim(channel, -1)
        if mask is not None and values.shape[: mask.ndim] == mask.shape:
            values = values[mask.to(values.device, torch.bool)]
        values, offset = values.flatten(0, -2).double(), 0
        for group, signed, size, inner in axis.segments(spec.groups):
            if group is not None:
                # Entries of one unit that are not told apart count as further samples.
                part = values[:, offset : offset + size * inner].unflatten(1, (size, inner))
                found.append((group, signed, part.transpose(1, 2).flatten(0, 1)))
            offset += size * inner

    hooks = []
    for name, layer in module.named_modules():
        dot = f"{name}." if name else ""
        if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and f"{dot}weight" in spec.axes:
            axis, channel = spec.axes[f"{dot}weight"][0], -1 if isinstance(layer, nn.Linear) else 1
            hooks.append(layer.register_forward_hook(lambda _, __, y, a=axis, c=channel: note(a, y, c)))
        elif isinstance(layer, nn.RNNBase) and not (layer.bidirectional or layer.proj_size):
            hooks.append(layer.register_forward_hook(_recurrent(spec, dot, note), with_kwargs=False))
    try:
        with evaluating(module):
            torch.func.functional_call(module, dict(weights), arguments)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _recurrent(spec: WeightSpec, dot: str, note: Any) -> Any:
    def hook(layer: nn.RNNBase, inputs: tuple, output: Any) -> None:
        from fleetgym.merging.statistics import single_layer

        x = inputs[0]
        for number in range(layer.num_layers):
            last = number == layer.num_layers - 1
            x = output[0] if last else single_layer(layer, number).to(x.device)(x)[0]
            note(spec.axes[f"{dot}weight_hh_l{number}"][1], x, -1)

    return hook


def activations(
    problem: Problem, generator: torch.Generator, *, correlations: Mapping[str, Tensor]
) -> tuple[Vertex, int]:
    """The matcher ``activations``: units that rise and fall together belong together.

    One linear assignment a group on the correlations, on their absolute value where signs are searched; a unit that
    is negatively correlated with its partner is negated. The weights play no part, so the distance between them may
    rise: call ``match(..., guard=False)`` to take the assignment all the same.

    Source: Ainsworth et al., "Git Re-Basin", ICLR 2023, section 3.1 (activation matching); signs are ours.

    Args:
        problem: Says which groups there are.
        generator: Not used.
        correlations: What :func:`correlations` gave, for one pair of networks.

    Raises:
        UserError: The correlations are not those of these groups.
    """
    gains = {}
    for group, n in problem.sizes.items():
        if group not in correlations or tuple(correlations[group].shape) != (n, n):
            got = tuple(correlations[group].shape) if group in correlations else "nothing"
            raise UserError(f"correlations of group {group!r}: expected shape ({n}, {n}), got {got}")
        gain = correlations[group].to(problem.linear[group])
        zero = torch.zeros_like(gain)
        gains[group] = torch.stack([zero, gain] if problem.signed[group] else [gain])[None].expand(
            problem.count, -1, -1, -1
        )
    return problem.assign(gains), problem.count
