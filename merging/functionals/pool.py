"""From features of weights to one vector, or a few, for each network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.errors import unknown
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout

STATISTICS = ("mean", "std", "max", "min")


class NFPool(nn.Module):
    """Statistics over the places of each part: invariant to the symmetry.

    Fixed axes are folded into channels and so are not pooled over: on a spec with fixed inputs and outputs the means
    are those of HNPPool, on one where they are free those of NPPool (Zhou et al., arXiv 2302.14040). The standard
    deviation is what lets networks with many hidden units be told apart, whose means differ little.

    Args:
        spec: The symmetry, or a layout.
        stats: Which of ``mean``, ``std`` (of the population), ``max`` and ``min``. A part with one place has its value
            instead of them, once.
        epsilon: Variances below are taken for it, which makes the gradient at equal values zero and not NaN.

    Attributes:
        features: For each channel of the input, how many numbers come out.

    Raises:
        UserError: No statistic, or one that is not known.
    """

    def __init__(
        self, spec: WeightSpec | Layout, stats: Sequence[str] = ("mean", "std"), epsilon: float = 1e-10
    ) -> None:
        super().__init__()
        self.layout, self.stats, self.epsilon = Layout.of(spec), tuple(stats), epsilon
        if not self.stats or isinstance(stats, str):
            raise UserError(f"stats={stats!r}: give a tuple of some of {', '.join(STATISTICS)}")
        for name in self.stats:
            if name not in STATISTICS:
                raise unknown("statistic", name, STATISTICS)
        self.features = sum(part.fold * (len(self.stats) if part.count > 1 else 1) for part in self.layout.parts)

    def extra_repr(self) -> str:
        """What it was made for."""
        return f"{self.layout!r}, stats={self.stats}"

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, P, C] to [B, features * C]."""
        WeightBatch.expect(x, self.layout, None, "NFPool")
        out = []
        for part, view in x:
            places = view.reshape(x.batch, part.count, -1)
            if part.count == 1:
                out.append(places[:, 0])
                continue
            for name in self.stats:
                if name == "mean":
                    out.append(places.mean(1))
                elif name == "std":
                    out.append(places.var(1, unbiased=False).clamp_min(self.epsilon).sqrt())
                else:
                    out.append(places.amax(1) if name == "max" else places.amin(1))
        return torch.cat(out, 1)


class QueryPool(nn.Module):
    """Learned queries attend to all scalars of a network: [B, P, C] to [B, queries, size].

    Keys and values are linear in the normalised features; a feed-forward layer follows (the encoder of Perceiver,
    Jaegle et al., ICML 2021, with one cross-attention, as Zhou et al., arXiv 2305.13546, pool weights by). Scalars are
    a set to it, so it is invariant to any permutation; what they are must be in their features.

    Args:
        spec: The symmetry, or a layout.
        channels: C of the input.
        queries: How many vectors come out.
        size: Their size D.
        heads: Heads of the attention; they divide D.
        factor: Width of the feed-forward layer in units of D.

    Raises:
        UserError: A number below one, or heads that do not divide the size.
    """

    def __init__(
        self,
        spec: WeightSpec | Layout,
        channels: int,
        queries: int = 16,
        size: int = 64,
        heads: int = 4,
        factor: int = 2,
    ) -> None:
        super().__init__()
        for name, value in {"channels": channels, "queries": queries, "size": size, "heads": heads}.items():
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        if size % heads:
            raise UserError(f"heads={heads} do not divide size={size}")
        self.layout, self.channels, self.heads = Layout.of(spec), channels, heads
        self.queries = nn.Parameter(torch.randn(queries, size))
        self.norm = nn.LayerNorm(channels)
        self.to_query, self.to_values = nn.Linear(size, size), nn.Linear(channels, 2 * size)
        self.out = nn.Linear(size, size)
        self.feed = nn.Sequential(
            nn.LayerNorm(size), nn.Linear(size, factor * size), nn.GELU(), nn.Linear(factor * size, size)
        )

    def forward(self, x: WeightBatch) -> Tensor:
        """[B, P, C] to [B, queries, D]."""
        WeightBatch.expect(x, self.layout, self.channels, "QueryPool")
        queries = self.to_query(self.queries).expand(x.batch, -1, -1)
        keys, values = self.to_values(self.norm(x.data)).chunk(2, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (queries, keys, values))
        found = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        z = self.queries + self.out(found)
        return z + self.feed(z)
