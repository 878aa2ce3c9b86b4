"""Volume rendering in torch, for any field that has a raw density and a raw colour at each point.

The equations and the placing of samples are those of :mod:`fleetgym.envs.fields.voxel_kernels`. It is the way for
accelerators, and the reference that the kernels are tested against.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from fleetgym.envs.fields.voxel_kernels import DARK, FLOOR, GAIN, SHIFT


class Scenes(Protocol):
    """What can be marched through: N scenes at once.

    Rays come in N blocks of equal length, those of scene 0 first, so that the scenes' weights can be used as batches.
    """

    def density(self, points: Tensor, scene: Tensor) -> Tensor:
        """Raw density [M, S] at points [M, S, 3], metres in the world; ray m belongs to ``scene[m]``."""
        ...

    def look(self, points: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        """Raw density [M, S] and raw colour [M, S, 3]."""
        ...


def contract(q: Tensor) -> Tensor:
    """Brings all space into [-2, 2]^3: points [..., 3] in units of the scale, about the centre."""
    m = q.abs().amax(-1, keepdim=True).clamp_min(1)
    return q * (2 - 1 / m) / m


def _uniform(rays: int, each: int, like: Tensor, generator: torch.Generator | None, blocks: int) -> Tensor:
    if generator is None:
        return like.new_full((rays, each), 0.5)
    drawn = torch.rand((rays // blocks, each), generator=generator, device=like.device, dtype=like.dtype)
    return drawn.repeat(blocks, 1)


def march(
    field: Scenes,
    rays: Tensor,
    scene: Tensor,
    edges: Tensor,
    fine: int,
    merge: bool,
    background: Tensor,
    generator: torch.Generator | None = None,
    blocks: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """The light that comes along rays; gradients flow to the field, not to where it is looked at.

    Args:
        field: The scenes.
        rays: Origins and directions, [M, 6].
        scene: Which scene each ray is in, [M].
        edges: Ends of the intervals along a ray, metres, [Nc + 1].
        fine: Samples that are placed by the weights of the intervals.
        merge: Whether the samples in the intervals count, too.
        background: Colour of what is behind everything, [3].
        generator: Of the places within intervals; None for their middles.
        blocks: How many blocks of rays get the same places; with one for each scene, a scene's places do not depend on
            how many others there are.

    Returns:
        Colours [M, 3], distances [M] (weighted sums, without the background), and the light that is left [M].
    """
    origin, way = rays[:, None, :3], rays[:, None, 3:]
    number, intervals = len(rays), len(edges) - 1
    with torch.no_grad():
        width = edges[1:] - edges[:-1]
        coarse = edges[:-1] + width * _uniform(number, intervals, rays, generator, blocks)
        raw = field.density(origin + coarse[..., None] * way, scene)
        depth = (GAIN * softplus(raw - SHIFT, threshold=80) * width).cumsum(1)
        after = torch.exp(-depth)
        before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
        live = before >= DARK  # intervals behind the dark get no samples
        weight = torch.where(live, before - after + FLOOR, 0)
        reach = weight.cumsum(1)
        steps = torch.arange(fine, device=rays.device) + _uniform(number, fine, rays, generator, blocks)
        want = (steps / fine) * reach[:, -1:]
        at = torch.searchsorted(reach, want, right=False).clamp_max(intervals - 1)
        within = (want - (reach - weight).gather(1, at)) / weight.gather(1, at).clamp_min(1e-12)
        t = edges[at] + within.clamp(0, 1) * width[at]
        end = edges[live.sum(1)]
        if merge:
            t = torch.cat([t, torch.where(live, coarse, end[:, None])], 1).sort(1).values
        to = torch.cat([t[:, 1:], end[:, None]], 1) - t
    raw, colour = field.look(origin + t[..., None] * way, scene)
    after = torch.exp(-(GAIN * softplus(raw - SHIFT, threshold=80) * to).cumsum(1))
    before = torch.cat([torch.ones_like(after[:, :1]), after[:, :-1]], 1)
    weight = torch.where(before >= DARK, before - after, 0)
    left = 1 - weight.sum(1)
    seen = (weight[..., None] * torch.sigmoid(colour)).sum(1) + left[:, None] * background
    return seen, (weight * t).sum(1), left
