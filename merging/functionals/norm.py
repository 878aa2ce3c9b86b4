"""Normalisation over the channels of each weight, and the block of a linear map, a norm and an activation."""

from __future__ import annotations

import torch
from torch import nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.errors import unknown
from fleetgym.merging.functionals import fast
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.linear import NFLinear, UNFLinear


class NFNorm(nn.Module):
    """Layer normalisation over the channels of each weight (Ba et al., arXiv 1607.06450).

    Each scalar of a network is one row: (x - mean) / sqrt(variance + eps) over its C channels, with the variance of
    ``torch.nn.functional.layer_norm`` (divided by C, ``eps`` under the root). Where all channels are equal the result
    is the shift and the gradient is finite. The map commutes with every symmetry.

    Args:
        spec: The symmetry, or a layout.
        channels: C, at least 2.
        affine: ``"part"`` for a scale and a shift for each part (as the norms of nfn have them for each tensor),
            ``"shared"`` for one of both, None for none.
        eps: Added to the variance.

    Attributes:
        layout: The layout of what it takes and gives.
        scale: [parts or 1, C], or None.
        shift: [parts or 1, C], or None.

    Raises:
        UserError: Fewer than two channels, a negative ``eps``, an unknown ``affine``.
    """

    def __init__(
        self, spec: WeightSpec | Layout, channels: int, affine: str | None = "part", eps: float = 1e-5
    ) -> None:
        super().__init__()
        if channels < 2:
            raise UserError(
                f"NFNorm with {channels} channel{'s' * (channels != 1)}: one-channel normalisation makes every weight "
                "zero; normalise after a layer that makes channels"
            )
        if affine not in ("part", "shared", None):
            raise unknown("affine", str(affine), ("part", "shared"))
        if not eps > 0:
            raise UserError(f"NFNorm: eps={eps}; it must be positive, so that equal channels can be normalised")
        self.layout, self.channels, self.affine, self.eps = Layout.of(spec), channels, affine, eps
        lengths = tuple(part.length for part in self.layout.parts) if affine == "part" else (self.layout.size,)
        self.norm = fast.Norm(lengths, eps)
        if affine is None:
            self.register_parameter("scale", None)
            self.register_parameter("shift", None)
        else:
            self.scale = nn.Parameter(torch.ones(len(lengths), channels))
            self.shift = nn.Parameter(torch.zeros(len(lengths), channels))

    def forward(self, x: WeightBatch) -> WeightBatch:
        """Normalises, [B, P, C] -> [B, P, C].

        Raises:
            UserError: The batch has another layout or another number of channels.
        """
        x = WeightBatch.expect(x, self.layout, self.channels, "NFNorm")
        return x.replace(fast.normalised(self.norm, x.data, self.scale, self.shift))

    def extra_repr(self) -> str:  # noqa: D102 torch describes it
        return f"{self.layout!r}, channels={self.channels}, affine={self.affine!r}, eps={self.eps}"


class NFBlock(nn.Module):
    """A linear layer, a norm and an activation, computed together: ``activation(norm(linear(x)))``.

    It gives what the three give one after the other. Together, a network's features are still in the processor's cache
    when they are normalised, and one tensor of the size of the batch less is made.

    Args:
        linear: The linear layer.
        norm: The norm of its output.
        activation: ``"relu"``, ``"gelu"``, ``"silu"``, ``"tanh"`` or None.

    Raises:
        UserError: An unknown activation, or a norm for another layout or number of channels.
    """

    def __init__(self, linear: NFLinear | UNFLinear, norm: NFNorm, activation: str | None = "relu") -> None:
        super().__init__()
        if activation is not None and activation not in fast.ACTIVATIONS:
            raise unknown("activation", activation, fast.ACTIVATIONS)
        if norm.layout != linear.layout:
            raise UserError("NFBlock: linear layer and norm were made for different layouts; give both one layout")
        if norm.channels != linear.c_out:
            raise UserError(f"NFBlock: the linear layer gives {linear.c_out} channels, the norm takes {norm.channels}")
        self.linear, self.norm, self.activation = linear, norm, activation
        self._norm = fast.Norm(norm.norm.lengths, norm.eps, activation)

    def forward(self, x: WeightBatch) -> WeightBatch:
        """Applies the block, [B, P, c_in] -> [B, P, c_out].

        Raises:
            UserError: The batch has another layout or another number of channels.
        """
        linear, norm = self.linear, self.norm
        x = WeightBatch.expect(x, linear.layout, linear.c_in, type(linear).__name__)
        if fast.worthwhile(linear.plan, x.data, linear.c_out, list(self.parameters())):
            weights = list(linear.weights)
            data = fast.block(linear.plan, x.data, weights, linear.bias, self._norm, norm.scale, norm.shift)
            return x.replace(data)
        return x.replace(fast.normalised(self._norm, linear(x).data, norm.scale, norm.shift))
