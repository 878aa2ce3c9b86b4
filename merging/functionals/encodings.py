"""What tells scalars of a network's weights apart that a symmetry leaves alike: values, tensors, inputs and outputs.

A layer that permutes inputs and outputs as it does hidden units (symmetry NP) cannot know which input a weight belongs
to; these encodings say so. They are those of Zhou et al. (arXiv 2302.14040, section 2; arXiv 2305.13546, section 3),
for any spec: a tensor's layer is the module that it is of, and every axis named ``"in"`` or ``"out"`` is numbered,
whether it is fixed or was freed.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fleetgym.core import UserError, WeightSpec
from fleetgym.core.seeding import torch_generator
from fleetgym.merging.functionals.batch import WeightBatch
from fleetgym.merging.functionals.layout import Layout


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")


def _ends(layout: Layout) -> dict[str, list[tuple[int, Tensor]]]:
    """For ``in`` and ``out``: the lengths of axes of that name, each with every scalar's place along it, [P], or -1."""
    out: dict[str, list[tuple[int, Tensor]]] = {}
    for end in ("in", "out"):
        sizes: dict[int, dict[str, Tensor]] = {}
        for key, shape in layout.shapes.items():
            for dim, axis in enumerate(layout.spec.axes[key]):
                begin = 0
                for leaf in axis.leaves:
                    length = sum(part.length for part in leaf.segments(layout.groups))
                    if leaf.name == end or leaf.group in (end, f"{end}.{length}"):
                        place = torch.full((shape[dim],), -1)
                        place[begin : begin + length] = torch.arange(length)
                        view = place.view(-1, *[1] * (len(shape) - dim - 1)).expand(shape)
                        before = sizes.setdefault(length, {}).get(key, torch.full(shape, -1))
                        sizes[length][key] = torch.maximum(before, view)
                    begin += length
        out[end] = [
            (length, _laid(layout, {key: found.get(key, torch.full(s, -1)) for key, s in layout.shapes.items()}))
            for length, found in sorted(sizes.items())
        ]
    return out


def _laid(layout: Layout, tensors: dict[str, Tensor]) -> Tensor:
    """Numbers in the shape of the tensors, in the order of the layout: [P]."""
    return layout.gather(torch.cat([tensors[key].flatten() for key in layout.keys])[None])[0]


def _tensor_numbers(layout: Layout) -> Tensor:
    """For each scalar the number of its tensor, [P]."""
    return _laid(layout, {key: torch.full(shape, i) for i, (key, shape) in enumerate(layout.shapes.items())})


def _layer_numbers(layout: Layout) -> tuple[int, Tensor]:
    """How many modules have weights, and for each scalar the number of its module, [P]."""
    modules: dict[str, int] = {}
    for key in layout.keys:
        modules.setdefault(key.rpartition(".")[0], len(modules))
    tensors = {key: torch.full(shape, modules[key.rpartition(".")[0]]) for key, shape in layout.shapes.items()}
    return len(modules), _laid(layout, tensors)


class FourierFeatures(nn.Module):
    """Sines and cosines of random projections of the channels: [sin(2 pi x B), cos(2 pi x B)] with B ~ N(0, scale^2).

    Zhou et al. have scale 3 for SIRENs of MNIST and 10 for those of CIFAR (arXiv 2305.13546, released configurations).

    Args:
        channels: C of the input.
        size: Frequencies m; the output has 2 m channels.
        scale: Standard deviation of the frequencies.
        seed: Draws them; they are a buffer and are not trained.
        keep: Whether the channels themselves are appended.

    Attributes:
        channels: Channels of the output, 2 m, and C more where they are kept.

    Raises:
        UserError: No channels, no frequencies, or a scale that is not positive.
    """

    def __init__(
        self, channels: int = 1, size: int = 128, scale: float = 3.0, seed: int = 0, *, keep: bool = False
    ) -> None:
        super().__init__()
        _positive(channels=channels, size=size)
        if not scale > 0:
            raise UserError(f"scale={scale}: it must be positive")
        self.c_in, self.keep = channels, keep
        self.channels = 2 * size + keep * channels
        draws = torch.randn(channels, size, generator=torch_generator("fourier_features", seed))
        self.register_buffer("frequencies", draws * scale)

    def forward(self, x: WeightBatch) -> WeightBatch:
        """[B, P, C] to [B, P, channels]."""
        WeightBatch.expect(x, x.layout, self.c_in, "FourierFeatures")
        angles = (2 * math.pi) * (x.data @ self.frequencies.to(x.data.dtype))
        return x.replace(torch.cat([angles.sin(), angles.cos(), *([x.data] if self.keep else [])], -1))


class IOEncoding(nn.Module):
    """Appends sines, cosines and the number itself of a scalar's layer, input and output, added to one another.

    A number t in [-1, 1] gives sin(pi s_b t), cos(pi s_b t) and t, with scales s evenly from 1 to half the largest
    frequency: 2 bands + 1 channels.

    Args:
        spec: The symmetry, or a layout.
        bands: Scales.
        max_frequency: See above.
        layers: Whether layers are encoded too, or inputs and outputs alone.

    Attributes:
        extra: How many channels are appended.

    Raises:
        UserError: No bands.
    """

    def __init__(
        self, spec: WeightSpec | Layout, bands: int = 6, max_frequency: float = 10.0, *, layers: bool = True
    ) -> None:
        super().__init__()
        _positive(bands=bands)
        self.layout = Layout.of(spec)
        self.extra = 2 * bands + 1
        scales = torch.linspace(1.0, max_frequency / 2, bands, dtype=torch.float64) * math.pi

        def encoded(count: int, places: Tensor) -> Tensor:  # [P] -> [P, extra], zero where the place is -1
            t = torch.linspace(-1.0, 1.0, count, dtype=torch.float64)[:, None]
            table = torch.cat([(t * scales).sin(), (t * scales).cos(), t], 1)
            return torch.cat([table, torch.zeros_like(table[:1])])[places]

        table = torch.zeros(self.layout.size, self.extra, dtype=torch.float64)
        if layers:
            table += encoded(*_layer_numbers(self.layout))
        for axes in _ends(self.layout).values():
            for length, places in axes:
                table += encoded(length, places)
        self.register_buffer("table", table.float())

    def forward(self, x: WeightBatch) -> WeightBatch:
        """[B, P, C] to [B, P, C + extra]."""
        WeightBatch.expect(x, self.layout, None, "IOEncoding")
        table = self.table.to(x.data.dtype).expand(x.batch, -1, -1)
        return x.replace(torch.cat([x.data, table], -1))


class LayerEncoding(nn.Module):
    """Adds a learned vector for each tensor.

    Args:
        spec: The symmetry, or a layout.
        channels: C.

    Raises:
        UserError: No channels.
    """

    def __init__(self, spec: WeightSpec | Layout, channels: int) -> None:
        super().__init__()
        _positive(channels=channels)
        self.layout, self.channels = Layout.of(spec), channels
        self.tensors = nn.Parameter(torch.randn(len(self.layout.keys), channels))
        self.register_buffer("which", _tensor_numbers(self.layout), persistent=False)

    def _table(self) -> Tensor:
        return self.tensors[self.which]

    def forward(self, x: WeightBatch) -> WeightBatch:
        """[B, P, C] to [B, P, C]."""
        WeightBatch.expect(x, self.layout, self.channels, type(self).__name__)
        return x.replace(x.data + self._table())


class LearnedEncoding(LayerEncoding):
    """Adds a learned vector for each tensor, each input and each output.

    An output's vector is shared by all axes named ``"out"`` of one length, such as those of the last weight and bias.

    Args:
        spec: The symmetry, or a layout.
        channels: C.

    Raises:
        UserError: No channels.
    """

    def __init__(self, spec: WeightSpec | Layout, channels: int) -> None:
        super().__init__(spec, channels)
        self.ends = nn.ParameterDict()
        for end, axes in _ends(self.layout).items():
            for length, places in axes:
                self.ends[f"{end}_{length}"] = nn.Parameter(torch.randn(length, channels))
                self.register_buffer(f"place_{end}_{length}", places, persistent=False)

    def _table(self) -> Tensor:
        table = super()._table()
        for name, vectors in self.ends.items():
            padded = torch.cat([vectors, torch.zeros_like(vectors[:1])])  # -1 is the row of zeros
            table = table + padded[getattr(self, f"place_{name}")]
        return table
