"""Radiance fields on grids: what a moving camera saw of a scene, kept so that it can be seen from elsewhere.

Raw density and colour lie on a few grids, whose sum is the field: one that spans all space by contraction, and finer
ones about the object. The coarse ones are learned first and fill what few rays have touched; so a hundred steps of a
thousand rays do. Without a network: Sun et al., "Direct Voxel Grid Optimization", CVPR 2022; Fridovich-Keil et al.,
"Plenoxels", CVPR 2022.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import grid_sample

from fleetgym.core.errors import UserError
from fleetgym.core.run import track
from fleetgym.core.seeding import generator
from fleetgym.envs.fields import voxel_kernels as kernels
from fleetgym.envs.fields.captures import Capture, Intrinsics, rays
from fleetgym.envs.fields.fitting import (
    BETAS,
    Radiance,
    Rays,
    Report,
    Steps,
    View,
    Work,
    descend,
    draw,
    fits,
    middle,
    parts,
    synchronize,
)
from fleetgym.envs.fields.marching import contract, march

__all__ = ["GRIDS", "Report", "Voxels", "fit_voxels", "middle"]

GRIDS = ((8, 0.0), (24, 0.0), (32, 1.0), (64, 0.5))
"""Nodes along a side, and half the side of the box in units of ``scale`` (0: all space, contracted)."""
# How far apart, as a share of the distance, two views' surfaces may be to count as one.
_TOLERANCE = 0.1
# How many views a picture takes from, and how many metres a turn by one radian is worth when the nearest are chosen.
_NEAREST, _TURN = 8, 0.2
# Bytes that a point of a ray takes in torch, and a node of a fit with its gradients and moments.
_POINT, _NODE = 400, 160


@dataclass(frozen=True)
class _Layout(View):
    """Where grids lie in a flat array, and how rays go through them."""

    grids: tuple[tuple[int, float], ...]

    @property
    def nodes(self) -> int:
        return sum(size**3 for size, _ in self.grids)

    @property
    def starts(self) -> list[int]:
        return [sum(size**3 for size, _ in self.grids[:g]) for g in range(len(self.grids))]

    def arrays(self, dtype: Any) -> tuple[np.ndarray, ...]:
        """What the kernels want: levels, extents, sizes, starts, edges."""
        sizes = np.array([size for size, _ in self.grids], np.int64)
        extents = np.array([extent for _, extent in self.grids], dtype)
        levels = np.stack([sizes - 1, (sizes - 1) / np.where(extents == 0, 4, 2 * extents)]).astype(dtype)
        return levels, extents, sizes, np.array(self.starts), self.edges().astype(dtype)


class _Grids:
    """N scenes for :func:`fleetgym.envs.fields.marching.march`; density [N, P], colour [N, P, 3], centres [N, 3]."""

    def __init__(self, layout: _Layout, density: Tensor, colour: Tensor, centres: Tensor) -> None:
        self.layout, self.density_, self.colour, self.centres = layout, density, colour, centres

    def _sampled(self, points: Tensor, *kinds: Tensor) -> list[Tensor]:
        """Values [N, P, C] of all grids at points [M, S, 3], summed; [M, S, C] for each kind."""
        number = len(self.centres)
        q = (points.reshape(number, -1, 3) - self.centres[:, None]) / self.layout.scale
        far, everywhere = q.abs().amax(-1)[..., None], contract(q) / 2
        sums = [0] * len(kinds)
        for (size, extent), start in zip(self.layout.grids, self.layout.starts):
            # The last axis of a grid is z, and grid_sample's first coordinate goes along it.
            at = (everywhere if extent == 0 else q / extent).flip(-1)[:, :, None, None]
            for index, values in enumerate(kinds):
                cube = values[:, start : start + size**3].unflatten(1, (size, size, size)).permute(0, 4, 1, 2, 3)
                found = grid_sample(cube, at, padding_mode="border", align_corners=True)[..., 0, 0].mT
                sums[index] = sums[index] + (found if extent == 0 else torch.where(far < extent, found, 0))
        return [total.reshape(*points.shape[:2], -1) for total in sums]

    def density(self, points: Tensor, scene: Tensor) -> Tensor:
        return self._sampled(points, self.density_[..., None])[0][..., 0]

    def look(self, points: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        density, colour = self._sampled(points, self.density_[..., None], self.colour)
        return density[..., 0], colour


@dataclass(frozen=True, eq=False)
class Voxels(Radiance):
    """N fitted scenes; a kind of field (:class:`fleetgym.envs.fields.Fields`).

    Attributes:
        weights: ``density`` [N, P] and ``colour`` [N, P, 3], raw values of the nodes of all grids (zero for a scene
            whose fit failed).
        config: Keyword arguments of the layout: grids, scale, near, far, samples, background.
        centres: What the grids lie about, metres, [N, 3].
        intrinsics: The camera.
        report: How each scene's fit went.
        views: For scenes that keep what the field lacks of its views: ``poses`` [V, 4, 4], ``residual`` [V, h, w, 3]
            (picture less field, 0 to 1), ``distance`` [V, h, w] (metres) and ``masks`` [V, h, w].
    """

    views: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    SCHEMA = "fleetgym.voxels/1"
    KEY = "voxels"

    @classmethod
    def fit(cls, views: Any, **options: Any) -> Voxels:
        """:func:`fit_voxels`."""
        return fit_voxels(views, **options)

    def _paint(self, poses: np.ndarray, scenes: list[int], camera: Intrinsics) -> Tensor:
        layout = _Layout(**self.config)
        density, colour = self.weights["density"], self.weights["colour"]
        if density.device.type != "cpu":
            chosen = torch.as_tensor(scenes, device=density.device)
            where = torch.as_tensor(self.centres[scenes]).to(density)
            grids = _Grids(layout, density[chosen], colour[chosen], where)
            size = _POINT * (layout.coarse * (1 + layout.merge) + layout.fine)
            return draw(grids, torch.as_tensor(poses.copy()).to(density), camera, layout.walk(density), size)
        out = np.empty((*poses.shape[:2], camera.height, camera.width, 5), np.float32)
        for row, n in enumerate(scenes):
            lines = rays(poses[row], camera).reshape(-1, 6)
            arrays = density[n].numpy(), colour[n].numpy()
            _draw_numba(layout, lines, *arrays, self.centres[n], out[row].reshape(-1, 5))
            if n in self.views:
                _mend(self.views[n], self.intrinsics, poses[row], lines, out[row])
        return torch.from_numpy(out)

    def _trace(self, n: int, capture: Capture, chosen: np.ndarray) -> np.ndarray:
        lines = rays(capture.poses, capture.intrinsics).reshape(-1, 6)[chosen]
        layout, density, colour = _Layout(**self.config), self.weights["density"], self.weights["colour"]
        if density.device.type == "cpu":
            out = np.empty((len(lines), 5), np.float32)
            _draw_numba(layout, lines, density[n].numpy(), colour[n].numpy(), self.centres[n], out)
            return out[:, :3]
        where = torch.as_tensor(self.centres[n : n + 1]).to(density)
        grids = _Grids(layout, density[n : n + 1], colour[n : n + 1], where)
        scene = torch.zeros(len(lines), dtype=torch.long, device=density.device)
        with torch.no_grad():
            return march(grids, torch.as_tensor(lines).to(density), scene, **layout.walk(density))[0].cpu().numpy()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the fields into a folder, which appears complete or not at all: safetensors (16-bit) and JSON."""
        tensors = {name: value.half() for name, value in self.weights.items()}
        grids = [list(grid) for grid in self.config["grids"]]
        self.write(folder, {**tensors, **self._kept()}, {**self.config, "grids": grids})

    def _kept(self) -> dict[str, Tensor]:
        kinds = {"residual": torch.float16, "distance": torch.float32, "poses": torch.float64, "masks": torch.bool}
        return {
            f"views.{n}.{name}": kept[name].to(kind) for n, kept in self.views.items() for name, kind in kinds.items()
        }

    @classmethod
    def load(cls, folder: str | os.PathLike, device: str = "cpu") -> Voxels:
        """Reads what :meth:`save` wrote.

        Raises:
            UserError: The folder is missing, or what it holds are not such fields.
        """
        document, tensors = cls.read(folder)
        views: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("views.")]:
            _, scene, part = name.split(".")
            value = tensors.pop(name)
            views.setdefault(int(scene), {})[part] = value.float() if part == "residual" else value
        config = document["config"]
        config["grids"] = tuple((int(size), float(extent)) for size, extent in config["grids"])
        number, nodes = len(document["report"]), _Layout(**config).nodes
        fits(folder, tensors, {"density": [number, nodes], "colour": [number, nodes, 3], "centres": [number, 3]})
        return cls(
            {name: tensors[name].float().to(device) for name in ("density", "colour")},
            config,
            tensors["centres"].double().numpy(),
            document["intrinsics"],
            document["report"],
            views if torch.device(device).type == "cpu" else {},
        )


def _draw_numba(
    layout: _Layout, lines: np.ndarray, density: np.ndarray, colour: np.ndarray, centre: np.ndarray, out: np.ndarray
) -> None:
    kind = lines.dtype
    *grids, edges = layout.arrays(kind)
    kernels.draw(
        kernels.constants(kind), lines, density, colour, centre.astype(kind), kind.type(layout.scale), *grids, edges,
        layout.fine, layout.merge, np.array(layout.background, kind), out,
    )  # fmt: skip


def _mend(kept: dict[str, Tensor], camera: Intrinsics, poses: np.ndarray, lines: np.ndarray, drawn: np.ndarray) -> None:
    """Adds to pictures [M, h, w, 5] from ``poses`` what the field lacks of the views nearest to each."""
    kind = lines.dtype
    views = kept["poses"].numpy()
    arrays = [kept[name].numpy() for name in ("residual", "distance", "masks")]
    lens = np.array([camera.fx, camera.fy, camera.cx, camera.cy], kind)
    for pose, line, picture in zip(poses, lines.reshape(*drawn.shape[:-1], 6), drawn):
        turned = np.arccos(np.clip(views[:, :3, 2] @ pose[:3, 2], -1, 1))
        apart = np.linalg.norm(views[:, :3, 3] - pose[:3, 3], axis=1) + _TURN * turned
        near = np.sort(np.argsort(apart, kind="stable")[:_NEAREST])
        kernels.mend(
            kernels.constants(kind), line.reshape(-1, 6), picture.reshape(-1, 5), views[near].astype(kind),
            *(array[near] for array in arrays), lens, kind.type(_TOLERANCE),
        )  # fmt: skip


def _keep(fields: Voxels, n: int, capture: Capture) -> dict[str, Tensor]:
    """What a field lacks of the views that it was fitted to."""
    drawn = fields._draw(capture.poses, [n], None)[0].numpy()
    met = 1 - drawn[..., 4]
    return {
        "poses": torch.as_tensor(capture.poses),
        "residual": torch.as_tensor(capture.images / np.float32(255) - drawn[..., :3]),
        "distance": torch.as_tensor(np.where(met > 0.5, drawn[..., 3] / np.maximum(met, 0.5), np.float32(1e6))),
        "masks": torch.as_tensor(capture.masks),
    }


class _Batches:
    """Which rays of a scene are taken at each step: all of them in random order, then anew."""

    def __init__(self, usable: np.ndarray, size: int, rng: np.random.Generator) -> None:
        self.usable, self.size, self.rng = usable, min(size, len(usable)), rng
        self.order, self.at = rng.permutation(usable), 0

    def next(self) -> np.ndarray:
        if self.at + self.size > len(self.order):
            self.order, self.at = self.rng.permutation(self.usable), 0
        self.at += self.size
        return self.order[self.at - self.size : self.at]


def _fit_numba(
    layout: _Layout, capture: Capture, centre: np.ndarray, steps: Steps, smoothness: float, density: np.ndarray,
    colour: np.ndarray,
) -> None:  # fmt: skip
    """Fits one scene into zeroed arrays."""
    kind = density.dtype
    lines = rays(capture.poses, capture.intrinsics, kind).reshape(-1, 6)
    wanted = (capture.images.reshape(-1, 3) / 255).astype(kind)
    rng = generator("voxels", steps.seed)
    batches = _Batches(np.flatnonzero(capture.masks), steps.batch, rng)
    *grids, edges = layout.arrays(kind)
    sizes, starts = grids[2], grids[3]
    place, scale, background = centre.astype(kind), kind.type(layout.scale), np.array(layout.background, kind)
    d_density, d_colour = np.zeros_like(density), np.zeros_like(colour)
    first, second = np.zeros((2, 4, density.size), kind)
    k = kernels.constants(kind)
    for step in range(1, steps.iterations + 1):
        kernels.step(
            k, lines, wanted, batches.next(), int(rng.integers(1, 2**31)), density, colour, place, scale, *grids, edges,
            layout.fine, layout.merge, background, d_density, d_colour,
        )  # fmt: skip
        if smoothness:
            for size, start in zip(sizes, starts):
                kernels.smooth(density, d_density, size, start, kind.type(smoothness))
        b1, b2 = BETAS
        rate = steps.rate(step)
        numbers = (rate, 1 - b1, 1 - b2, 1 / (1 - b1**step), 1 / (1 - b2**step), 1e-12)
        adam = tuple(kind.type(number) for number in numbers)
        kernels.adam(density, d_density, first[0], second[0], *adam)
        kernels.adam(
            colour.reshape(-1), d_colour.reshape(-1), first[1:].reshape(-1), second[1:].reshape(-1), *adam
        )  # fmt: skip


def smoothness_gradient(layout: _Layout, density: Tensor, touched: Tensor, strength: float) -> Tensor:
    """The gradient of the sum of |differences of neighbours|, where a node was touched; [N, P], as the kernel's."""
    out = torch.zeros_like(density)
    for (size, _), start in zip(layout.grids, layout.starts):
        cube = density[:, start : start + size**3].unflatten(1, (size, size, size))
        part = out[:, start : start + size**3].unflatten(1, (size, size, size))
        for axis in (1, 2, 3):
            sign = torch.sign(cube.diff(dim=axis)) * strength
            part.narrow(axis, 1, size - 1).add_(sign)
            part.narrow(axis, 0, size - 1).sub_(sign)
    return out.mul_(touched)


def _fit_torch(
    layout: _Layout, captures: list[Capture], centres: np.ndarray, steps: Steps, smoothness: float, device: str,
    progress: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Fits N scenes at once by autograd; density [N, P], colour [N, P, 3]."""
    density = torch.zeros(len(captures), layout.nodes, device=device)
    colour = torch.zeros(len(captures), layout.nodes, 3, device=device)
    where = torch.as_tensor(centres).to(density)

    def more(gradients: list[Tensor]) -> None:
        if smoothness:
            gradients[0] = gradients[0] + smoothness_gradient(layout, density, gradients[0] != 0, smoothness)

    table = Rays(captures, steps.seed, device)
    descend(
        (density, colour), lambda leaves, step: _Grids(layout, *leaves, where), table, steps, layout.walk(density),
        progress, more,
    )  # fmt: skip
    return density, colour


def fit_voxels(
    captures: Any,
    *,
    centre: Any = None,
    scale: float = 0.2,
    iterations: int = 120,
    seed: int = 0,
    batch: int = 1024,
    learning_rate: float = 0.3,
    smoothness: float = 1e-7,
    grids: Sequence[tuple[int, float]] = GRIDS,
    near: float = 0.03,
    far: float = 3.0,
    samples: tuple[int, int] = (24, 16),
    merge: bool = False,
    background: Sequence[float] = (1.0, 1.0, 1.0),
    residuals: bool = True,
    hold_out: int = 0,
    on_error: str = "raise",
    device: str = "cpu",
    backend: str | None = None,
    progress: bool = False,
) -> Voxels:
    """Fits a radiance field to each of N captures, by Adam on the mean squared error of random rays.

    A scene's field depends on its capture and the seed alone, not on the others.

    Args:
        captures: A list of :class:`fleetgym.envs.fields.captures.Capture`, or one; all by the same camera.
        centre: Where detail is wanted, such as between the fingers at the moment of the grasp; metres, [3] or [N, 3].
            None: where the cameras look at (:func:`middle`).
        scale: Half the side of the cube about the centre that is not contracted, metres.
        iterations: Steps.
        seed: Of the order of rays and the places of samples.
        batch: Rays a step.
        learning_rate: Adam's step size at the beginning; it falls to a tenth.
        smoothness: Weight of the sum of |differences| of neighbouring nodes' raw densities (total variation).
        grids: Nodes along a side and half the box's side in units of ``scale``, 0 for all space; see :data:`GRIDS`.
        near: Where rays begin, metres from the camera.
        far: Where they end.
        samples: Intervals along a ray (of equal ratio), and samples that are placed by their weights.
        merge: Whether the intervals' own samples are rendered, too; slower.
        background: Colour of what is behind everything.
        residuals: Whether to keep what the field lacks of its views, and add it where a picture shows the same surface
            (:func:`fleetgym.envs.fields.voxel_kernels.mend`); on the CPU only.
        hold_out: How many views of each capture, evenly spread, to keep from the fit and judge it by.
        on_error: ``"raise"``, or ``"skip"``: a capture that is unusable is reported, and the others are fitted.
        device: Where to fit.
        backend: ``"numba"`` (CPU only) or ``"torch"``; None takes the first on a CPU.
        progress: Whether to show a progress bar.

    Returns:
        The fields, with a report for each scene.

    Raises:
        UserError: An unusable capture (unless skipped) or no capture at all; an option out of its range.
    """
    layout = _layout(grids, View.checked(scale, near, far, samples, merge, background))
    steps = Steps(iterations, batch, learning_rate, seed)
    if not 0 <= smoothness < math.inf:
        raise UserError(f"smoothness={smoothness}: it must be finite and may not be negative")
    backend = backend or ("numba" if torch.device(device).type == "cpu" else "torch")
    if backend not in ("numba", "torch") or (backend == "numba" and torch.device(device).type != "cpu"):
        raise UserError(f"backend={backend!r} on {device!r}: choose 'torch', or 'numba' on the CPU")
    work = Work.of(captures, centre, hold_out, on_error)
    good = list(work.fit)
    density = torch.zeros(len(work), layout.nodes, device=device)
    colour = torch.zeros(len(work), layout.nodes, 3, device=device)
    seconds = dict.fromkeys(good, 0.0)
    if backend == "numba":
        for n in track(good, "fitting radiance fields") if progress else good:
            began = time.process_time()
            arrays = density[n].numpy(), colour[n].numpy()
            _fit_numba(layout, work.fit[n], work.centres[n], steps, smoothness, *arrays)
            seconds[n] = time.process_time() - began
    else:
        size = _NODE * layout.nodes + _POINT * batch * (layout.coarse * (1 + layout.merge) + layout.fine)
        for part in parts(len(good), size, device):
            some, began = good[part], time.perf_counter()
            scenes = [work.fit[n] for n in some]
            density[some], colour[some] = _fit_torch(
                layout, scenes, work.centres[some], steps, smoothness, device, progress
            )
            synchronize(device)
            seconds.update(dict.fromkeys(some, (time.perf_counter() - began) / len(some)))
    fields = Voxels({"density": density, "colour": colour}, asdict(layout), work.centres, work.camera, [])

    def settle(n: int, capture: Capture) -> float:
        if not residuals or density.device.type != "cpu":
            return 0.0
        began = time.process_time()
        fields.views[n] = _keep(fields, n, capture)
        return time.process_time() - began

    advice = f"lower learning_rate={learning_rate}"
    fields.conclude(work, iterations, seconds, seed, on_error, advice, settle)
    return fields


def _layout(grids: Any, view: dict[str, Any]) -> _Layout:
    grids = tuple((int(size), float(extent)) for size, extent in grids)
    if not grids or min(size for size, _ in grids) < 2 or not all(0 <= extent < math.inf for _, extent in grids):
        raise UserError(f"grids={grids}: give pairs (nodes along a side, at least 2; half the box, 0 for all space)")
    return _Layout(grids=grids, **view)
