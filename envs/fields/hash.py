"""Radiance fields in hash tables: features on grids of many resolutions, read by a small network.

Nodes of a grid that are too many for its table share entries, by a hash of where they are; the network sorts out what
falls together. Source: Mueller, Evans, Schied, Keller, "Instant Neural Graphics Primitives with a Multiresolution Hash
Encoding", SIGGRAPH 2022, sections 3 and 5.4 (the network's shape; colour does not depend on the direction here, as few
views of a dull scene do not show how it would). Space is contracted about the object, and samples are placed by
:mod:`fleetgym.envs.fields.marching`, as for voxels.

All scenes are fitted and drawn at once: their tables are one tensor, and their networks batches of matrices. It is made
for accelerators; on a CPU :mod:`fleetgym.envs.fields.voxel` reaches more in the same time.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from fleetgym.core.errors import UserError
from fleetgym.core.seeding import torch_generator
from fleetgym.envs.fields.captures import Capture, Intrinsics, rays
from fleetgym.envs.fields.fitting import (
    Radiance,
    Rays,
    Steps,
    View,
    Work,
    descend,
    draw,
    fits,
    parts,
    synchronize,
)
from fleetgym.envs.fields.marching import contract, march

__all__ = ["Hashes", "fit_hashes"]

# Factors of the hash, one for each axis; the first is 1 (equation 4 of the source).
_PRIMES = (1, 2654435761, 805459861)
# Numbers that the density's network hands on to the colour's.
_HANDED = 15
# Half the range of the tables' first values.
_FIRST = 1e-2
# Bytes of a point and level: its eight corners' places and weights, and what leads to them.
_POINT = 220
# Bytes of a table's number in a fit: itself, its gradient, moments, and what an optimiser's step has in between.
_NUMBER = 40


@dataclass(frozen=True)
class _Layout(View):
    """What N scenes' tables and networks look like, and how rays go through them."""

    levels: int
    table: int
    features: int
    coarsest: int
    finest: int
    hidden: int
    precision: str

    @property
    def sizes(self) -> list[int]:
        """Cells along a side of space, [-2, 2], at each level."""
        ratio = (self.finest / self.coarsest) ** (1 / max(self.levels - 1, 1))
        return [int(self.coarsest * ratio**level + 0.5) for level in range(self.levels)]

    @property
    def dense(self) -> int:
        """Levels, from the coarsest, whose nodes all have entries of their own."""
        return sum((size + 1) ** 3 <= self.table for size in self.sizes)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of each weight of one scene."""
        wide = self.levels * self.features
        return {
            "tables": (self.levels, self.table, self.features),
            "in": (wide, self.hidden),
            "in_bias": (1, self.hidden),
            "density": (self.hidden, 1 + _HANDED),
            "density_bias": (1, 1 + _HANDED),
            "colour_in": (1 + _HANDED, self.hidden),
            "colour_in_bias": (1, self.hidden),
            "colour": (self.hidden, 3),
            "colour_bias": (1, 3),
        }

    @property
    def ray(self) -> int:
        """Bytes that a ray takes on its way."""
        each = _POINT * self.levels + 16 * self.hidden
        return each * max(self.coarse, self.fine + self.merge * self.coarse)

    @property
    def scene(self) -> int:
        """Bytes that a scene takes in a fit, without its rays."""
        return _NUMBER * self.levels * self.table * self.features

    def first(self, seed: int) -> dict[str, Tensor]:
        """The weights that a scene begins with."""
        draws = torch_generator("hash", "first", seed)
        made = {}
        for name, shape in self.shapes.items():
            if name.endswith("bias"):
                made[name] = torch.zeros(shape)
            else:  # the networks' as in He et al. (2015), for rectifiers
                reach = _FIRST if name == "tables" else (6 / shape[0]) ** 0.5
                made[name] = reach * (2 * torch.rand(shape, generator=draws) - 1)
        return made


def _corners(layout: _Layout, places: Tensor) -> tuple[Tensor, Tensor]:
    """The eight entries about each of N scenes' P places in [0, 1]^3, and their weights, at each of L levels.

    Returns:
        Rows of the tables [N * L * T, F], and weights; both [N, P, L, 8].
    """
    sizes = torch.tensor(layout.sizes, device=places.device)
    x = places[:, :, None] * sizes[:, None]  # [N, P, L, 3]
    low = torch.minimum(x.floor(), sizes[:, None] - 1).clamp_min_(0)
    x = x - low
    # Along each axis the lower and the upper node, [N, P, L, 3, 2], and what they weigh.
    node = low.long()[..., None] + torch.arange(2, device=places.device)
    share = torch.stack([1 - x, x], -1)
    index = []
    for levels, hashed in ((slice(0, layout.dense), False), (slice(layout.dense, None), True)):
        i, j, k = node[:, :, levels].unbind(3)
        if hashed:  # the low bits of a xor are the xor of the low bits
            i, j, k = (((v * prime) & (layout.table - 1)).int() for v, prime in zip((i, j, k), _PRIMES))
            index.append(i[..., :, None, None] ^ j[..., None, :, None] ^ k[..., None, None, :])
        else:
            side = sizes[levels, None] + 1
            i, j, k = (i * side * side).int(), (j * side).int(), k.int()
            index.append(i[..., :, None, None] + j[..., None, :, None] + k[..., None, None, :])
    scenes = torch.arange(len(places), device=places.device, dtype=torch.int32)[:, None]
    first = (
        scenes * layout.levels + torch.arange(layout.levels, device=places.device, dtype=torch.int32)
    ) * layout.table
    rows = torch.cat(index, 2).flatten(3) + first[:, None, :, None]
    wx, wy, wz = share.unbind(3)
    return rows, (wx[..., :, None, None] * wy[..., None, :, None] * wz[..., None, None, :]).flatten(3)


class _Lookup(torch.autograd.Function):
    """Interpolated features [N, P, L * F] of tables [N, L, T, F] at places [N, P, 3].

    Places have no gradient. Corners are worked out again for the tables' gradient: they would take far more memory
    than all the rest.
    """

    @staticmethod
    def forward(ctx: Any, tables: Tensor, places: Tensor, layout: _Layout) -> Tensor:
        rows, shares = _corners(layout, places)
        ctx.save_for_backward(places)
        ctx.layout = layout
        found = embedding_bag(
            rows.flatten(0, 2), tables.flatten(0, 2), mode="sum", per_sample_weights=shares.flatten(0, 2)
        )
        return found.view(*places.shape[:2], -1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        layout, (places,) = ctx.layout, ctx.saved_tensors
        rows, shares = _corners(layout, places)
        number, wide = len(places), layout.features
        # Numbers and not rows are added up: on a CPU the sum of rows is a slow loop.
        flat = gradient.new_zeros(number * layout.levels * layout.table * wide)
        parts_ = gradient.view(*places.shape[:2], layout.levels, 1, wide) * shares[..., None]
        at = rows.long()[..., None] * wide + torch.arange(wide, device=rows.device)
        flat.index_add_(0, at.flatten(), parts_.flatten())
        return flat.view(number, layout.levels, layout.table, wide), None, None


class _Tables:
    """N scenes for :func:`fleetgym.envs.fields.marching.march`."""

    def __init__(self, layout: _Layout, weights: dict[str, Tensor], centres: Tensor) -> None:
        self.layout, self.weights, self.centres = layout, weights, centres

    def _layer(self, x: Tensor, name: str) -> Tensor:
        return torch.baddbmm(self.weights[f"{name}_bias"], x, self.weights[name])

    def _reduced(self) -> Any:
        """Wide layers in bfloat16, if the layout says so; tables, sums and what leaves a network stay in float32."""
        if self.layout.precision == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.centres.device.type, dtype=torch.bfloat16)

    def _density(self, points: Tensor) -> Tensor:
        """[N, P, 1 + _HANDED], the raw density first, at points [M, S, 3]."""
        q = (points.reshape(len(self.centres), -1, 3) - self.centres[:, None]) / self.layout.scale
        features = _Lookup.apply(self.weights["tables"], (contract(q) + 2) / 4, self.layout)
        with self._reduced():
            inner = torch.relu(self._layer(features, "in"))
        return self._layer(inner.float(), "density")

    def density(self, points: Tensor, scene: Tensor) -> Tensor:
        return self._density(points)[..., 0].view(points.shape[:2])

    def look(self, points: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        found = self._density(points)
        with self._reduced():
            inner = torch.relu(self._layer(found, "colour_in"))
        return found[..., 0].view(points.shape[:2]), self._layer(inner.float(), "colour").view(points.shape)


@dataclass(frozen=True, eq=False)
class Hashes(Radiance):
    """N fitted scenes; a kind of field (:class:`fleetgym.envs.fields.Fields`).

    Attributes:
        weights: ``tables`` [N, L, T, F] and the networks' matrices and biases (zero for a scene whose fit failed).
        config: Keyword arguments of the layout.
        centres: What space is contracted about, metres, [N, 3].
        intrinsics: The camera.
        report: How each scene's fit went.
    """

    SCHEMA = "fleetgym.hashes/1"
    KEY = "hashes"

    @classmethod
    def fit(cls, views: Any, **options: Any) -> Hashes:
        """:func:`fit_hashes`."""
        return fit_hashes(views, **options)

    def _scenes(self, scenes: Sequence[int]) -> _Tables:
        tables = self.weights["tables"]
        chosen = torch.as_tensor(list(scenes), device=tables.device)
        weights = {name: value[chosen] for name, value in self.weights.items()}
        return _Tables(_Layout(**self.config), weights, torch.as_tensor(self.centres[list(scenes)]).to(tables))

    def _paint(self, poses: np.ndarray, scenes: list[int], camera: Intrinsics) -> Tensor:
        made = self._scenes(scenes)
        poses_ = torch.as_tensor(poses.copy()).to(made.centres)
        return draw(made, poses_, camera, made.layout.walk(made.centres), made.layout.ray)

    def _trace(self, n: int, capture: Capture, chosen: np.ndarray) -> np.ndarray:
        made = self._scenes([n])
        lines = torch.as_tensor(rays(capture.poses, capture.intrinsics).reshape(-1, 6)[chosen]).to(made.centres)
        scene = torch.zeros(len(lines), dtype=torch.long, device=lines.device)
        with torch.no_grad():
            return march(made, lines, scene, **made.layout.walk(lines))[0].cpu().numpy()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the fields into a folder, which appears complete or not at all: safetensors (16-bit) and JSON."""
        self.write(folder, {name: value.half() for name, value in self.weights.items()}, dict(self.config))

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "cpu") -> Hashes:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: The folder is missing, or what it holds are not such fields.
        """
        document, tensors = cls.read(folder)
        number, layout = len(document["report"]), _Layout(**document["config"])
        wanted = {name: [number, *shape] for name, shape in layout.shapes.items()}
        fits(folder, tensors, {**wanted, "centres": [number, 3]})
        centres = tensors.pop("centres").double().numpy()
        weights = {name: value.float().to(device) for name, value in tensors.items()}
        return cls(weights, document["config"], centres, document["intrinsics"], document["report"])


def fit_hashes(
    captures: Any,
    *,
    centre: Any = None,
    scale: float = 0.2,
    iterations: int = 200,
    seed: int = 0,
    batch: int = 1024,
    learning_rate: float = 0.05,
    levels: int = 8,
    table: int = 1 << 15,
    features: int = 4,
    resolutions: tuple[int, int] = (16, 256),
    hidden: int = 64,
    near: float = 0.03,
    far: float = 3.0,
    samples: tuple[int, int] = (24, 16),
    merge: bool = False,
    background: Sequence[float] = (1.0, 1.0, 1.0),
    hold_out: int = 0,
    on_error: str = "raise",
    device: str = "cpu",
    precision: str | None = None,
    progress: bool = False,
) -> Hashes:
    """Fits a radiance field to each of N captures at once, by Adam on the mean squared error of random rays.

    A scene's field depends on its capture and the seed and not on the others, to the last bits of sums.

    Args:
        captures: A list of :class:`fleetgym.envs.fields.captures.Capture`, or one; all by the same camera.
        centre: Where detail is wanted, such as between the fingers at the moment of the grasp; metres, [3] or [N, 3].
            None: where the cameras look at (:func:`fleetgym.envs.fields.fitting.middle`).
        scale: Half the side of the cube about the centre that is not contracted, metres.
        iterations: Steps.
        seed: Of the first weights, the order of rays and the places of samples.
        batch: Rays a step and scene.
        learning_rate: Adam's step size of the tables at the beginning; it falls to a tenth. The networks' is a fifth.
        levels: Grids.
        table: Entries of a grid's table; a power of two.
        features: Numbers an entry.
        resolutions: Cells of the coarsest and of the finest grid along a side of contracted space, which is four times
            ``scale`` long; those between are of equal ratio.
        hidden: Units of a hidden layer.
        near: Where rays begin, metres from the camera.
        far: Where they end.
        samples: Intervals along a ray (of equal ratio), and samples that are placed by their weights.
        merge: Whether the intervals' own samples are rendered, too; slower.
        background: Colour of what is behind everything.
        hold_out: How many views of each capture, evenly spread, to keep from the fit and judge it by.
        on_error: ``"raise"``, or ``"skip"``: a capture that is unusable is reported, and the others are fitted.
        device: Where to fit; scenes that have no room there at once are fitted in parts.
        precision: Of the networks' wide layers: ``"float32"`` or ``"bfloat16"``; None for the latter on CUDA alone.
        progress: Whether to show a progress bar.

    Returns:
        The fields, with a report for each scene.

    Raises:
        UserError: An unusable capture (unless skipped) or no capture at all; an option out of its range.
    """
    steps = Steps(iterations, batch, learning_rate, seed)
    on_cuda = torch.device(device).type == "cuda"
    precision = precision or ("bfloat16" if on_cuda else "float32")
    layout = _layout(
        View.checked(scale, near, far, samples, merge, background),
        levels,
        table,
        features,
        resolutions,
        hidden,
        precision,
    )
    work = Work.of(captures, centre, hold_out, on_error)
    good = list(work.fit)
    weights = {name: torch.zeros(len(work), *shape, device=device) for name, shape in layout.shapes.items()}
    first, seconds = layout.first(seed), {}
    views = sum(len(work.fit[n].images) for n in good[:1]) * work.camera.height * work.camera.width
    clock = time.perf_counter if on_cuda else time.process_time
    for part in parts(len(good), layout.scene + 30 * views + layout.ray * batch, device):
        some, began = good[part], clock()
        mine = {name: value.to(device).expand(len(some), *value.shape).clone() for name, value in first.items()}
        where = torch.as_tensor(work.centres[some]).to(mine["tables"])
        descend(
            list(mine.values()),
            lambda leaves, step, where=where: _Tables(layout, dict(zip(layout.shapes, leaves)), where),
            Rays([work.fit[n] for n in some], seed, device),
            steps,
            layout.walk(where),
            progress,
            factors=[1.0 if name == "tables" else 0.2 for name in layout.shapes],
        )
        for name, value in mine.items():
            weights[name][some] = value
        synchronize(device)
        seconds.update(dict.fromkeys(some, (clock() - began) / len(some)))
    fields = Hashes(weights, asdict(layout), work.centres, work.camera, [])
    fields.conclude(work, iterations, seconds, seed, on_error, f"lower learning_rate={learning_rate}")
    return fields


def _layout(
    view: dict[str, Any],
    levels: int,
    table: int,
    features: int,
    resolutions: tuple[int, int],
    hidden: int,
    precision: str,
) -> _Layout:
    for name, value in (("levels", levels), ("features", features), ("hidden", hidden)):
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    if table < 2 or table & (table - 1):
        raise UserError(f"table={table}: it is a number of entries and a power of two, such as {1 << 15}")
    if len(resolutions) != 2 or not 1 <= resolutions[0] <= resolutions[1] <= 1 << 16:
        raise UserError(f"resolutions={tuple(resolutions)}: cells of the coarsest and of the finest grid, 1 to 65536")
    if precision not in ("float32", "bfloat16"):
        raise UserError(f"precision={precision!r}: choose from 'float32', 'bfloat16'")
    low, high = (int(size) for size in resolutions)
    return _Layout(
        levels=int(levels), table=int(table), features=int(features), coarsest=low, finest=high, hidden=int(hidden),
        precision=precision, **view,
    )  # fmt: skip
