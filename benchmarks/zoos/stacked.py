"""Training N networks of one architecture at once, each with settings of its own: stacked tensors, one batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """N linear layers: [N, M, I], [N, O, I], [N, O] -> [N, M, O]."""
    return torch.baddbmm(bias[:, None], x, weight.mT)


def log_uniform(low: float, high: float, *shape: int, rng: torch.Generator) -> Tensor:
    """Numbers whose logarithm is uniform between those of ``low`` and ``high``."""
    return low * (high / low) ** torch.rand(shape, generator=rng)


def fan_in_uniform(shapes: Mapping[str, tuple[int, ...]], number: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Initial weights of N networks as torch's layers draw them: uniform within 1 / sqrt(inputs of a unit).

    Args:
        shapes: Of a network's tensors; each bias follows its weight.
        number: N.
        rng: Where they are drawn from.

    Returns:
        Tensors [N, ...].
    """
    out, bound = {}, 1.0
    for name, shape in shapes.items():
        if len(shape) > 1:
            bound = 1 / math.sqrt(math.prod(shape[1:]))
        out[name] = bound * (2 * torch.rand((number, *shape), generator=rng) - 1)
    return out


def train(
    weights: dict[str, Tensor],
    loss: Callable[[Mapping[str, Tensor], int, int], Tensor],
    *,
    steps: Tensor,
    learning_rate: Tensor,
    weight_decay: Tensor | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Adam (with decoupled weight decay) on N networks, each with its own number of steps, rate and decay.

    Each rate falls along half a cosine to zero over the network's own steps. Networks are wanted in the order of their
    steps, longest first: what is computed at a step is then the first rows of every tensor.

    Args:
        weights: Tensors [N, ...] by name, overwritten.
        loss: ``(weights, count, step)`` -> the losses of the first ``count`` networks, [count], given their weights,
            [count, ...].
        steps: [N], falling.
        learning_rate: [N], at the beginning.
        weight_decay: [N], or None for none.
        betas: Adam's decay rates.
    """
    b1, b2 = betas
    first = {name: torch.zeros_like(value) for name, value in weights.items()}
    second = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(int(steps[0])):
        count = int((steps > step).sum())
        leaves = {name: value[:count].detach().requires_grad_() for name, value in weights.items()}
        losses = loss(leaves, count, step)
        # The sum keeps networks apart: each one's gradient is that of its own loss.
        gradients = torch.autograd.grad(losses.sum(), list(leaves.values()))
        rate = learning_rate[:count] * 0.5 * (1 + torch.cos(math.pi * step / steps[:count]))
        for (name, value), gradient in zip(weights.items(), gradients):
            rows = value[:count]
            m, v = first[name][:count], second[name][:count]
            m.lerp_(gradient, 1 - b1)
            v.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            scale = (v / (1 - b2 ** (step + 1))).sqrt_().add_(1e-8)
            own = rate.view(-1, *[1] * (rows.dim() - 1))
            if weight_decay is not None:
                rows.mul_(1 - own * weight_decay[:count].view_as(own))
            rows.sub_(own / (1 - b1 ** (step + 1)) * m / scale)
