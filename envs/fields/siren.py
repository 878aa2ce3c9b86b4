"""Images kept as sine networks (SIRENs): one network, and N of them fitted at once.

Sitzmann et al., "Implicit Neural Representations with Periodic Activation Functions", NeurIPS 2020. A pixel's place is
(row, column), each from -1 to 1; the network maps it to the pixel's channels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fleetgym.core.checkpoint import check_keys
from fleetgym.core.errors import UserError
from fleetgym.core.run import track
from fleetgym.core.seeding import torch_generator

# Bytes of one hidden layer of a block of networks: small enough that a processor's cache holds a block's dozen such
# buffers, large enough that the calls cost little. A GPU wants all its memory used instead.
_BLOCK = {"cpu": 2 << 20, "cuda": 256 << 20}
# Adam's decay rates. A fit has tens of steps, all with the whole image: short memories reach 38 dB in a third of the
# steps that (0.9, 0.999) takes.
_BETAS = (0.7, 0.85)
INITS = ("independent", "shared")
"""Ways to draw initial weights: each network its own, or all the same."""


class Siren(nn.Module):
    """A multilayer perceptron with sine units, ``x -> sin(omega (W x + b))``, and a linear output.

    Initial weights are those of the paper: uniform within 1 / inputs in the first layer and within
    sqrt(6 / inputs) / omega in the others; biases within 1 / sqrt(inputs).

    Args:
        inputs: Size of a place, 2 for images.
        hidden: Widths of the hidden layers.
        outputs: Channels C.
        omega: Frequency omega_0, in every hidden layer.

    Raises:
        UserError: No hidden layer, a size below one, or a frequency that is not positive.
    """

    architecture = "siren"

    def __init__(
        self, inputs: int = 2, hidden: Sequence[int] = (32, 32), outputs: int = 1, omega: float = 30.0
    ) -> None:
        super().__init__()
        sizes = [inputs, *hidden, outputs]
        if not hidden or min(sizes) < 1:
            raise UserError(f"sizes {sizes}: a SIREN has one hidden layer or more, and every size is at least 1")
        if not 0 < omega < math.inf:
            raise UserError(f"omega={omega}: it must be positive and finite")
        self.config: dict[str, Any] = {
            "inputs": inputs,
            "hidden": list(hidden),
            "outputs": outputs,
            "omega": omega,
        }
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:]))
        bounds = _bounds(sizes, omega)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.uniform_(-bounds[name], bounds[name])

    def forward(self, places: Tensor) -> Tensor:  # [..., inputs] -> [..., C]
        """The channels at some places."""
        for layer in self.layers[:-1]:
            places = torch.sin(self.config["omega"] * layer(places))
        return self.layers[-1](places)


def _bounds(sizes: Sequence[int], omega: float) -> dict[str, float]:
    """For each tensor of a SIREN the bound of its initial values, in the order of the state dict."""
    bounds = {}
    for i, inputs in enumerate(sizes[:-1]):
        bounds[f"layers.{i}.weight"] = 1 / inputs if i == 0 else math.sqrt(6 / inputs) / omega
        bounds[f"layers.{i}.bias"] = 1 / math.sqrt(inputs)
    return bounds


def _shapes(sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for i, (inputs, outputs) in enumerate(zip(sizes, sizes[1:])):
        shapes[f"layers.{i}.weight"] = (outputs, inputs)
        shapes[f"layers.{i}.bias"] = (outputs,)
    return shapes


def _expected(sizes: Sequence[int], number: int | None) -> dict[str, Tensor]:
    """The shapes of a state dict, stacked unless ``number`` is None."""
    lead = () if number is None else (number,)
    return {name: torch.empty((*lead, *shape), device="meta") for name, shape in _shapes(sizes).items()}


def places(size: Sequence[int], **options: Any) -> Tensor:
    """The places of the pixels of an image: (row, column) of each, from -1 to 1.

    Args:
        size: (h, w).
        options: ``dtype`` and ``device``.

    Returns:
        [h w, 2], row by row.
    """
    axes = [torch.linspace(-1, 1, n, **options) for n in size]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class Sirens:
    """N fitted SIRENs of one architecture; a kind of field (:class:`fleetgym.envs.fields.Fields`).

    Attributes:
        weights: Stacked state dict, tensors [N, ...].
        config: Keyword arguments of :class:`Siren`.
        size: (h, w) of the images that they were fitted to.
        psnr: Peak signal-to-noise ratio of each image in dB, for a peak of 1; [N].
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    size: tuple[int, int]
    psnr: Tensor = field(repr=False)

    @classmethod
    def fit(cls, views: Any, **options: Any) -> Sirens:
        """:func:`fit_sirens`."""
        return fit_sirens(views, **options)

    def __len__(self) -> int:
        return len(self.psnr)

    def render(self, view: Sequence[int] | None = None) -> Tensor:
        """Draws all N, [N, h, w, C], in the size ``view`` = (h, w) or that of the images they were fitted to."""
        return render(self.weights, self.size if view is None else view, omega=self.config["omega"])

    def siren(self, n: int) -> Siren:
        """Network ``n`` (a copy)."""
        module = Siren(**self.config).to(self.psnr.device)
        module.load_state_dict({name: value[n] for name, value in self.weights.items()})
        return module


def render(weights: Mapping[str, Tensor], size: Sequence[int], *, omega: float = 30.0) -> Tensor:
    """Draws the images of N SIRENs, in any size; gradients flow to the weights.

    Args:
        weights: Stacked state dict of :class:`Siren` with two inputs, tensors [N, ...].
        size: (h, w) in pixels.
        omega: Frequency of the networks.

    Returns:
        [N, h, w, C].

    Raises:
        UserError: Weights that are not those of such networks, or a size below one pixel.
    """
    size = _checked_size(size)
    sizes, number = _sizes_of(weights)
    first = weights["layers.0.weight"]
    grid = places(size, dtype=first.dtype, device=first.device)
    out = []
    for rows in _blocks(number, sizes, len(grid), first):
        x = grid.expand(len(first[rows]), -1, -1)
        for i in range(len(sizes) - 1):
            x = torch.baddbmm(weights[f"layers.{i}.bias"][rows, None], x, weights[f"layers.{i}.weight"][rows].mT)
            if i < len(sizes) - 2:
                x = torch.sin(omega * x)
        out.append(x)
    return torch.cat(out).unflatten(1, size)


def _checked_size(size: Sequence[int]) -> tuple[int, int]:
    if len(size) != 2 or min(size) < 1:
        raise UserError(f"size {tuple(size)}: it is (height, width) in pixels, each at least 1")
    return int(size[0]), int(size[1])


def _sizes_of(weights: Mapping[str, Tensor]) -> tuple[list[int], int]:
    """The layer sizes of a stacked state dict of SIRENs of images, and how many networks it holds."""
    sizes, layer = [2], 0
    while f"layers.{layer}.weight" in weights:
        sizes.append(int(weights[f"layers.{layer}.weight"].shape[1]))
        layer += 1
    if layer < 2:
        raise UserError(f"keys {sorted(weights)[:6]}: a SIREN has layers.0.weight, layers.0.bias, layers.1.weight, ...")
    number = len(weights["layers.0.weight"])
    check_keys(_expected(sizes, number), weights, "the stacked weights")
    return sizes, number


def _blocks(number: int, sizes: Sequence[int], pixels: int, like: Tensor) -> list[slice]:
    """Networks that are computed together."""
    each = pixels * max(sizes[1:]) * like.element_size()
    step = max(1, _BLOCK.get(like.device.type, _BLOCK["cuda"]) // each)
    return [slice(first, min(first + step, number)) for first in range(0, number, step)]


def fit_sirens(
    images: Any,
    *,
    hidden: Sequence[int] = (32, 32),
    steps: int = 40,
    learning_rate: float = 0.012,
    omega: float = 30.0,
    seed: int = 0,
    init: str | Mapping[str, Tensor] = "independent",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Sirens:
    """Fits one SIREN to each of N images, all at once, by Adam on the mean squared error of all pixels.

    The learning rate falls along half a cosine to zero. A block of networks takes all its steps before the next one
    begins, so that a processor works in its cache; the gradient is written out (:class:`_Block`).

    Args:
        images: [N, h, w] or [N, h, w, C], an array or a tensor; values of about 0 to 1.
        hidden: Widths of the hidden layers.
        steps: Gradient steps. For 28 x 28 digits 40 give about 42 dB and 100 about 70.
        learning_rate: Adam's step size at the beginning.
        omega: Frequency omega_0.
        seed: Of the initial weights. Network n's depend on the seed and n alone, not on how many there are.
        init: ``"independent"``, ``"shared"`` (all networks begin with the same weights), or a state dict to begin
            with: that of one network, or stacked, tensors [N, ...].
        device: Where to fit.
        dtype: ``torch.float32`` or ``torch.float64``.
        progress: Whether to show a progress bar.

    Returns:
        The networks, on ``device``.

    Raises:
        UserError: Images of another shape, without a pixel or not finite; sizes, steps or rates that are not positive;
            an initial state that does not fit; or a fit that diverged.
    """
    if not isinstance(images, Tensor):
        images = torch.as_tensor(np.ascontiguousarray(images))
    if images.dim() not in (3, 4) or not images.numel():
        raise UserError(f"images of shape {list(images.shape)}: wanted [N, h, w] or [N, h, w, C], none of them 0")
    if images.dim() == 3:
        images = images.unsqueeze(-1)
    images = images.to(device=device, dtype=dtype)
    if not torch.isfinite(images).all():
        bad = int(torch.nonzero(~torch.isfinite(images.flatten(1)).all(1))[0])
        raise UserError(f"image {bad} holds values that are not finite")
    if steps < 1:
        raise UserError(f"steps={steps}: it must be at least 1")
    if not 0 < learning_rate < math.inf:
        raise UserError(f"learning_rate={learning_rate}: it must be positive and finite")
    if dtype not in (torch.float32, torch.float64):
        raise UserError(f"dtype={dtype}: SIRENs are fitted in torch.float32 or torch.float64")
    number, height, width, channels = images.shape
    config = Siren(2, hidden, channels, omega).config
    sizes = [2, *hidden, channels]
    flat = _initial(sizes, omega, number, seed, init, images)
    targets = images.flatten(1, 2).mT.contiguous()  # [N, C, h w]
    psnr = torch.empty(number, dtype=dtype, device=images.device)
    blocks = _blocks(number, sizes, height * width, images)
    block = None
    for rows in track(blocks, "fitting SIRENs") if progress else blocks:
        count = rows.stop - rows.start
        if block is None or block.number != count:
            block = _Block(count, (height, width), sizes, omega, images)
        psnr[rows] = block.fit(flat[rows], targets[rows], steps, learning_rate)
    if not torch.isfinite(flat).all() or bool(psnr.isnan().any()):
        bad = torch.nonzero(~torch.isfinite(flat).all(1)).flatten().tolist()
        raise UserError(f"{len(bad)} fits diverged (the first: image {bad[0]}); lower learning_rate={learning_rate}")
    weights = {name: value.contiguous() for name, value in _views(flat, _shapes(sizes)).items()}
    return Sirens(weights, config, (height, width), psnr)


def _views(flat: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Tensors [N, *shape] that lie in a flat one, [N, P]."""
    counts = [math.prod(shape) for shape in shapes.values()]
    parts = flat.split(counts, dim=1)
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), parts)}


def _initial(
    sizes: Sequence[int], omega: float, number: int, seed: int, init: str | Mapping[str, Tensor], like: Tensor
) -> Tensor:
    """Initial weights, flat: [N, P]."""
    shapes = _shapes(sizes)
    if isinstance(init, str):
        if init not in INITS:
            raise UserError(f"init={init!r}: choose from {', '.join(INITS)}, or give a state dict")
        bounds = torch.cat(
            [torch.full((math.prod(s),), b) for s, b in zip(shapes.values(), _bounds(sizes, omega).values())]
        )
        rows = number if init == "independent" else 1
        # Row after row from one stream, on the CPU: the same on every device, and for any number of networks.
        drawn = torch.rand((rows, len(bounds)), generator=torch_generator("siren", seed))
        flat = (2 * drawn - 1) * bounds
        return flat.expand(number, -1).to(device=like.device, dtype=like.dtype, copy=True).contiguous()
    single = init.get("layers.0.bias", torch.empty(0)).dim() == 1
    check_keys(_expected(sizes, None if single else number), init, "init")
    parts = [init[name].detach().to(like).expand(number, *shape).flatten(1) for name, shape in shapes.items()]
    return torch.cat(parts, 1)


class _Block:
    """Buffers of N networks over the pixels of an image, and the gradient of their loss.

    Along the rows and the columns of an image the first layer's angle is a sum, so its sine and cosine are sums of
    products of h + w values (the angle addition theorem). The other hidden layers need a sine and a cosine of each
    unit and pixel, the latter for the derivative.

    Args:
        number: N.
        size: (h, w).
        sizes: Layer sizes, places to channels.
        omega: Frequency.
        like: Gives device and dtype.
    """

    def __init__(self, number: int, size: Sequence[int], sizes: Sequence[int], omega: float, like: Tensor) -> None:
        self.number, self.size, self.sizes, self.omega = number, tuple(size), list(sizes), omega
        options = {"device": like.device, "dtype": like.dtype}
        pixels = math.prod(size)
        self.shapes = _shapes(sizes)
        self.axes = [torch.linspace(-1, 1, n, **options)[:, None] for n in size]
        # (row, column, 1) of each pixel: one product gives the first layer's gradients.
        corner = torch.cat([places(size, **options), torch.ones(pixels, 1, **options)], 1)
        self.corner = corner.t().contiguous().expand(number, -1, -1)
        self.sine = [torch.empty(number, pixels, width, **options) for width in sizes[1:-1]]
        self.cosine = [torch.empty_like(buffer) for buffer in self.sine]
        self.slope = [torch.empty_like(buffer) for buffer in self.sine[:-1]]
        self.error = torch.empty(number, sizes[-1], pixels, **options)
        self.gradient = torch.zeros(number, sum(map(math.prod, self.shapes.values())), **options)
        # Products of a batch are quick into tensors of their own only, not into views of the flat gradient.
        self._products = {name: torch.empty(number, *shape, **options) for name, shape in self.shapes.items()}

    def _parts(self, views: Mapping[str, Tensor], layer: int) -> tuple[Tensor, Tensor]:
        return views[f"layers.{layer}.weight"], views[f"layers.{layer}.bias"]

    def loss(self, flat: Tensor, targets: Tensor) -> Tensor:
        """The forward pass.

        Args:
            flat: Weights [N, P].
            targets: [N, C, h w].

        Returns:
            The mean squared error of each network, [N]; ``error`` then holds the difference, [N, C, h w].
        """
        views = _views(flat, self.shapes)
        weight, bias = self._parts(views, 0)
        rows = self.omega * self.axes[0] * weight[:, None, :, 0]
        columns = self.omega * torch.addcmul(bias[:, None], self.axes[1], weight[:, None, :, 1])
        sine_r, cosine_r = (x[:, :, None] for x in _sincos(rows, torch.empty_like(rows)))
        sine_c, cosine_c = (x[:, None] for x in _sincos(columns, torch.empty_like(columns)))
        sine, cosine = (buffer[0].unflatten(1, self.size) for buffer in (self.sine, self.cosine))
        torch.mul(sine_r, cosine_c, out=sine).addcmul_(cosine_r, sine_c)
        torch.mul(cosine_r, cosine_c, out=cosine).addcmul_(sine_r, sine_c, value=-1)
        last = len(self.sizes) - 2
        for layer in range(1, last):
            weight, bias = self._parts(views, layer)
            torch.bmm(self.sine[layer - 1], weight.mT, out=self.sine[layer])
            _sincos(self.sine[layer], self.cosine[layer], bias, self.omega)
        weight, bias = self._parts(views, last)
        torch.bmm(weight, self.sine[-1].mT, out=self.error)
        self.error.add_(bias[:, :, None]).sub_(targets)
        return self.error.square().mean((1, 2))

    def backward(self, flat: Tensor) -> Tensor:
        """The gradient of each network's own loss, [N, P], after :meth:`loss` with the same weights."""
        views, out, made = _views(flat, self.shapes), _views(self.gradient, self.shapes), self._products
        last = len(self.sizes) - 2
        ones = self.corner[:, 2:]
        weight, _ = self._parts(views, last)
        g_weight, g_bias = self._parts(made, last)
        error = self.error.mul_(2 / self.error[0].numel())
        torch.bmm(error, self.sine[-1], out=g_weight)
        torch.sum(error, 2, out=g_bias)
        scale = 1.0  # the factors omega of the layers passed, which are left out of the slopes
        # The loss by the sine, times the cosine, in the place of the cosine.
        if self.sizes[-1] == 1:
            slope = self.cosine[-1].mul_(error.mT).mul_(weight)
        else:
            slope = self.cosine[-1].mul_(torch.bmm(error.mT, weight))
        for name in (f"layers.{last}.weight", f"layers.{last}.bias"):
            out[name].copy_(made[name])
        for layer in range(last - 1, 0, -1):
            scale *= self.omega
            weight, _ = self._parts(views, layer)
            g_weight, g_bias = self._parts(made, layer)
            torch.bmm(slope.mT, self.sine[layer - 1], out=g_weight)
            torch.bmm(ones, slope, out=g_bias[:, None])
            slope = torch.bmm(slope, weight, out=self.slope[layer - 1]).mul_(self.cosine[layer - 1])
            for name in (f"layers.{layer}.weight", f"layers.{layer}.bias"):
                torch.mul(made[name], scale, out=out[name])
        scale *= self.omega
        first = torch.bmm(self.corner, slope).mul_(scale)  # [N, 3, H]
        g_weight, g_bias = self._parts(out, 0)
        g_weight.copy_(first[:, :2].mT)
        g_bias.copy_(first[:, 2])
        return self.gradient

    def fit(self, flat: Tensor, targets: Tensor, steps: int, learning_rate: float) -> Tensor:
        """Adam from the weights [N, P], which are overwritten; returns the PSNR reached in dB, [N]."""
        b1, b2 = _BETAS
        first, second, scale = torch.zeros_like(flat), torch.zeros_like(flat), torch.empty_like(flat)
        for step in range(1, steps + 1):
            self.loss(flat, targets)
            gradient = self.backward(flat)
            first.lerp_(gradient, 1 - b1)
            second.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
            rate = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
            torch.sqrt(second, out=scale).mul_(1 / math.sqrt(1 - b2**step)).add_(1e-8)
            flat.addcdiv_(first, scale, value=-rate / (1 - b1**step))
        return -10 * torch.log10(self.loss(flat, targets))


def _sincos(angle: Tensor, cosine: Tensor, bias: Tensor | None = None, omega: float = 1.0) -> tuple[Tensor, Tensor]:
    """Overwrites ``angle`` [N, M, H] with sin(omega (angle + bias)) and ``cosine`` with its cosine; returns both."""
    if angle.device.type == "cpu" and angle.dtype == torch.float32:
        from fleetgym.envs.fields.sincos import sincos

        bias = angle.new_zeros(len(angle), angle.shape[-1]) if bias is None else bias.contiguous()
        sincos(angle.numpy(), bias.numpy(), np.float32(omega), cosine.numpy())
    else:
        if bias is not None:
            angle.add_(bias[:, None])
        angle.mul_(omega)
        torch.cos(angle, out=cosine)
        angle.sin_()
    return angle, cosine
