"""Inr2Array: an array of latents for each implicit neural representation (INR) of a field.

A transformer over weights reads an INR and gives M latents. Each stands for one patch of the field: a decoder makes the
weights of a small SIREN of it, and these together must show what the INR shows. What is learned from the latents then
does not see weights any more. After Zhou et al., "Neural functional transformers" (NeurIPS 2023, arXiv 2305.13546),
section 3.3, with the decoder of their published configuration for MNIST.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.weights import evaluating
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout
from fleetgym.merging.functionals.models import Reader, nft_body, run_networks
from fleetgym.merging.functionals.pool import QueryPool
from fleetgym.merging.functionals.training import Fitted, predict, select, train

if TYPE_CHECKING:
    from fleetgym.core.run import Run


def grid_coordinates(height: int, width: int | None = None) -> Tensor:
    """The centres' coordinates of an image's pixels, row by row: [height * width, 2] in [-1, 1], row first.

    The first and last rows and columns are at -1 and 1.
    """
    rows, columns = torch.linspace(-1, 1, height), torch.linspace(-1, 1, width or height)
    return torch.cartesian_prod(rows, columns)


class PatchDecoder(nn.Module):
    """Makes a SIREN of each patch from its latent and shows it.

    Each tensor of the patch's SIREN has a hypernetwork of its own, a perceptron that all patches share. Its last layer
    begins small, with biases that are a SIREN's first weights (Sitzmann et al., NeurIPS 2020).

    Args:
        size: D of a latent.
        grid: Patches along each of two axes.
        outputs: Numbers at a coordinate.
        hidden: Widths of the SIREN's hidden layers.
        width: Width of the hypernetworks.
        omega: Frequency of the SIREN.

    Raises:
        UserError: A number below one.
    """

    def __init__(
        self,
        size: int,
        grid: int,
        outputs: int = 1,
        hidden: Sequence[int] = (32, 32),
        width: int = 256,
        omega: float = 30.0,
    ) -> None:
        super().__init__()
        for name, value in {
            "size": size,
            "grid": grid,
            "outputs": outputs,
            "width": width,
            "hidden": min(hidden),
        }.items():
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        self.grid, self.omega = grid, omega
        sizes = [2, *hidden, outputs]
        self.shapes = [shape for a, b in zip(sizes, sizes[1:]) for shape in ((b, a), (b,))]
        self.hypernetworks = nn.ModuleList()
        for i, shape in enumerate(self.shapes):
            last = nn.Linear(width, math.prod(shape))
            layer, fan_in = i // 2, sizes[i // 2]
            bound = 1 / fan_in if layer == 0 else math.sqrt(6 / fan_in) / omega
            with torch.no_grad():
                nn.init.kaiming_normal_(last.weight)
                last.weight /= 100
                if len(shape) == 2:
                    last.bias.uniform_(-bound, bound)
                else:
                    last.bias.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in))
            self.hypernetworks.append(
                nn.Sequential(nn.Linear(size, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
            )

    def arrange(self, coordinates: Tensor) -> tuple[Tensor, Tensor]:
        """Which coordinates belong to which patch.

        Args:
            coordinates: [N, 2] in [-1, 1].

        Returns:
            For each patch the indices of its coordinates, [M, K], padded by repetition of index 0; and for each
            coordinate where in these it is, [N].
        """
        place = ((self.grid - 1) * (coordinates + 1) / 2).round().long().clamp(0, self.grid - 1)
        patch = place[:, 0] * self.grid + place[:, 1]
        counts = torch.bincount(patch, minlength=self.grid**2)
        most = int(counts.max())
        order = torch.argsort(patch, stable=True)
        within = torch.arange(len(patch), device=patch.device) - (counts.cumsum(0) - counts)[patch[order]]
        slots = torch.empty_like(patch)
        slots[order] = patch[order] * most + within
        members = torch.zeros(self.grid**2 * most, dtype=torch.long, device=patch.device)
        members[slots] = torch.arange(len(patch), device=patch.device)
        return members.view(self.grid**2, most), slots

    def forward(self, latents: Tensor, coordinates: Tensor) -> Tensor:
        """The fields.

        Args:
            latents: [B, M, D].
            coordinates: [N, 2] in [-1, 1].

        Returns:
            [B, N, outputs].
        """
        batch, patches, _ = latents.shape
        members, slots = self.arrange(coordinates)
        x = coordinates.to(latents)[members].expand(batch, -1, -1, -1).flatten(0, 1)  # [B M, K, 2]
        layers = len(self.shapes) // 2
        for i in range(layers):
            weight, bias = (
                net(latents).view(batch * patches, *shape)
                for net, shape in zip(self.hypernetworks[2 * i : 2 * i + 2], self.shapes[2 * i : 2 * i + 2])
            )
            x = torch.baddbmm(bias[:, None], x, weight.mT)
            x = torch.sin(self.omega * x) if i < layers - 1 else x
        return x.view(batch, -1, x.shape[-1])[:, slots]


class Inr2Array(Reader):
    """Reads INRs into arrays of latents, and shows what the latents say.

    Args:
        spec: Symmetry of the INRs as it is derived, or its ``to_dict()``.
        grid: Latents along each axis of the field; M is its square.
        size: D of a latent.
        width: Channels of the transformer.
        blocks: Its blocks.
        heads: Heads of all attention.
        factor: Width of feed-forward layers in units of channels.
        frequencies: Random frequencies that weights are encoded by.
        scale: Their standard deviation, in units of a weight's.
        outputs: Numbers at a coordinate.
        hidden: Widths of a patch's SIREN.
        decoder_width: Width of the hypernetworks.
        omega: Frequency of a patch's SIREN; 30 suits images of tens of pixels, a few suit fewer.

    Raises:
        UserError: A number below one, or heads that do not divide the width and the size.
    """

    architecture = "inr2array"

    def __init__(
        self,
        spec: WeightSpec | dict[str, Any],
        grid: int = 4,
        size: int = 64,
        width: int = 64,
        blocks: int = 3,
        heads: int = 4,
        factor: int = 4,
        frequencies: int = 32,
        scale: float = 0.3,
        outputs: int = 1,
        hidden: Sequence[int] = (32, 32),
        decoder_width: int = 256,
        omega: float = 30.0,
    ) -> None:
        spec = spec if isinstance(spec, WeightSpec) else WeightSpec.from_dict(spec)
        for name, value in {"grid": grid, "blocks": blocks}.items():
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        super().__init__(Layout.of(spec.free("in", "out")), 1)
        self.config: dict[str, Any] = {
            "spec": spec.to_dict(),
            "grid": grid,
            "size": size,
            "width": width,
            "blocks": blocks,
            "heads": heads,
            "factor": factor,
            "frequencies": frequencies,
            "scale": scale,
            "outputs": outputs,
            "hidden": list(hidden),
            "decoder_width": decoder_width,
            "omega": omega,
        }
        self.body = nft_body(self.layout, 1, width, blocks, heads, factor, frequencies, scale)
        self.pool = QueryPool(self.layout, width, grid**2, size, heads)
        self.decoder = PatchDecoder(size, grid, outputs, hidden, decoder_width, omega)

    def encode(self, x: WeightBatch) -> Tensor:
        """Latents, [B, M, D]."""
        return self.pool(self.body(self._standard(x)))

    def decode(self, latents: Tensor, coordinates: Tensor) -> Tensor:
        """Fields at coordinates [N, 2]: [B, N, outputs]."""
        return self.decoder(latents, coordinates)

    def forward(self, x: WeightBatch, coordinates: Tensor) -> Tensor:
        """What the latents of INRs show at coordinates [N, 2]: [B, N, outputs]."""
        return self.decode(self.encode(x), coordinates)


@torch.no_grad()
def show(
    module: nn.Module,
    weights: WeightBatch,
    coordinates: Tensor,
    rest: dict[str, Tensor] | None = None,
    batch_size: int = 64,
) -> Tensor:
    """What INRs show: their values [B, N, outputs] at coordinates [N, inputs].

    Args:
        module: An INR of the kind.
        weights: Theirs.
        coordinates: Where.
        rest: Tensors of the state dict that the batch has not; the module's by default.
        batch_size: INRs at a time.
    """
    if rest is None:
        rest = {k: v for k, v in module.state_dict().items() if k not in weights.layout.shapes}
    out = []
    for data in weights.data.split(batch_size):
        tensors = {key: tensor[..., 0] for key, tensor in weights.replace(data).tensors().items()}
        out.append(run_networks(module, tensors, coordinates.to(data), rest))
    return torch.cat(out)


@torch.no_grad()
def encode(model: Inr2Array, weights: WeightBatch, batch_size: int = 64, device: str | torch.device = "cpu") -> Tensor:
    """Latents of INRs, [B, M, D], on the CPU."""
    return predict(_Encoder(model), model.fitted(weights), batch_size, device)


class _Encoder(nn.Module):
    def __init__(self, model: Inr2Array) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: WeightBatch) -> Tensor:
        return self.model.encode(x)


def fit_inr2array(
    model: Inr2Array,
    weights: WeightBatch,
    fields: Tensor,
    coordinates: Tensor,
    *,
    validation: tuple[WeightBatch, Tensor] | None = None,
    steps: int = 2000,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    warmup: int = 100,
    evaluate_every: int = 200,
    seed: int = 0,
    device: str | torch.device = "cpu",
    run: Run | None = None,
    report: Callable[[dict[str, float]], None] | None = None,
) -> Fitted:
    """Trains encoder and decoder to show what the INRs show, by squared error. No labels are used.

    Args:
        model: Its statistics of the weights (:meth:`Reader.normalise`) are taken from these weights.
        weights: N INRs.
        fields: What they show, [N, pixels, outputs]; see :func:`show`.
        coordinates: Where, [pixels, 2].
        validation: Weights and fields to select the best step by.
        steps: Gradient steps.
        batch_size: INRs in one.
        learning_rate: Largest step size.
        weight_decay: Of AdamW.
        warmup: Steps over which the step size rises.
        evaluate_every: Steps between evaluations.
        seed: Draws batches.
        device: Where to compute.
        run: Keeps state, metrics and at the end the checkpoint ``inr2array`` there; goes on from its saved state.
        report: Called with each row of the history.

    Returns:
        The best score (peak signal to noise ratio in decibels for fields of range 2, such as images in [-1, 1]), its
        step and the history.

    Raises:
        UserError: Weights, fields and coordinates that do not fit one another.
    """
    for what, (x, y) in {"training set": (weights, fields), "validation set": validation or (weights, fields)}.items():
        wanted = (len(x), len(coordinates), model.config["outputs"])
        if tuple(y.shape) != wanted:
            raise UserError(
                f"{what}: fields have shape {tuple(y.shape)}, expected {wanted}: INRs, coordinates, outputs"
            )
    weights = model.fitted(weights)
    model.normalise(weights)
    inputs, targets, places = weights.to(device), fields.to(device), coordinates.to(device)
    if validation is not None:
        validation = (model.fitted(validation[0]).to(device), validation[1].to(device))

    def step_loss(index: Tensor, rng: Any) -> Tensor:
        index = index.to(targets.device)
        return (model(select(inputs, index), places) - targets[index]).square().mean()

    @torch.no_grad()
    def judge() -> dict[str, float]:
        x, y = validation
        with evaluating(model):
            pieces = torch.arange(len(x), device=y.device).split(batch_size)
            total = sum((model(select(x, i), places) - y[i]).square().sum().double() for i in pieces)
        error = float(total) / y.numel()
        return {"loss": error, "score": 10 * math.log10(4 / max(error, 1e-12))}

    result = train(
        model,
        step_loss,
        len(weights),
        steps=steps,
        batch_size=min(batch_size, len(weights)),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        warmup=warmup,
        evaluate_every=evaluate_every,
        judge=judge if validation is not None else None,
        seed=seed,
        device=device,
        run=run,
        report=report,
    )
    if run is not None:
        run.save_checkpoint("inr2array", model, info={"metrics": {"score": result.score, "step": result.step}})
    return result


class LatentClassifier(nn.Module):
    """A transformer on an array of latents; the class is read at the first (arXiv 2305.13546, appendix).

    Args:
        size: D of a latent.
        latents: M, how many there are.
        outputs: Classes.
        width: Of the transformer.
        layers: Of the transformer.
        heads: They divide the width.
        factor: Width of feed-forward layers in units of ``width``.
        dropout: In the transformer.

    Raises:
        UserError: A number below one, or heads that do not divide the width.
    """

    def __init__(
        self,
        size: int,
        latents: int,
        outputs: int,
        width: int = 128,
        layers: int = 4,
        heads: int = 4,
        factor: int = 4,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        numbers = {"size": size, "latents": latents, "outputs": outputs, "width": width, "layers": layers}
        for name, value in {**numbers, "heads": heads}.items():
            if value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        if width % heads:
            raise UserError(f"heads={heads} do not divide width={width}")
        self.norm = nn.BatchNorm1d(size, affine=False)
        self.first = nn.Linear(size, width)
        self.places = nn.Parameter(0.02 * torch.randn(latents, width))
        layer = nn.TransformerEncoderLayer(
            width, heads, factor * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.last = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, outputs))

    def forward(self, latents: Tensor) -> Tensor:
        """[B, M, D] to [B, outputs]."""
        x = self.norm(latents.transpose(1, 2)).transpose(1, 2)
        return self.last(self.transformer(self.first(x) + self.places)[:, 0])
