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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fleetgym.core.checkpoint import load_tensors, save_tensors
from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_folder, current_folder, read_json, write_json
from fleetgym.core.run import track
from fleetgym.core.seeding import generator, torch_generator
from fleetgym.envs.fields import voxel_kernels as kernels
from fleetgym.envs.fields.captures import Capture, Intrinsics, check_poses, psnr, rays
from fleetgym.envs.fields.marching import contract, march
from fleetgym.envs.fields.marching import draw as draw_torch

__all__ = ["GRIDS", "Report", "Voxels", "fit_voxels", "middle"]

GRIDS = ((8, 0.0), (24, 0.0), (32, 1.0), (64, 0.5))
"""Nodes along a side, and half the side of the box in units of ``scale`` (0: all space, contracted)."""
# Adam's decay rates.
_BETAS = (0.9, 0.99)
# Steps over which the step size rises to its full value.
_WARM = 10
# The step size falls to this share of itself.
_DECAY = 0.1
# How far apart, as a share of the distance, two views' surfaces may be to count as one.
_TOLERANCE = 0.1
# How many views a picture takes from, and how many metres a turn by one radian is worth when the nearest are chosen.
_NEAREST, _TURN = 8, 0.2
# Rays of the training views on which a fit is judged.
_JUDGED = 4096
SCHEMA = "fleetgym.voxels/1"


@dataclass(frozen=True)
class Report:
    """How one scene's fit went.

    Attributes:
        scene: Its number.
        psnr: Of the field alone on pixels that it was fitted to, dB; None if the fit failed.
        held_out: On the views that were held out, dB; None if there were none.
        iterations: Steps done.
        seconds: Processor seconds of the fit (seconds on the clock on an accelerator, where scenes share it).
        views: Views that it was fitted to.
        failed: Why there is no field, or None.
    """

    scene: int
    psnr: float | None = None
    held_out: float | None = None
    iterations: int = 0
    seconds: float = 0.0
    views: int = 0
    failed: str | None = None


def middle(poses: np.ndarray, distance: float = 0.2) -> np.ndarray:
    """Where cameras look at: the point nearest to the axes of all, by least squares.

    Axes that are nearly parallel leave it open how far away that is; a weak pull to ``distance`` in front of the last
    camera settles it.

    Args:
        poses: Camera to world, [V, 4, 4].
        distance: Metres.

    Returns:
        [3], metres.
    """
    origin, way = poses[:, :3, 3], -poses[:, :3, 2]
    across = np.eye(3) - way[:, :, None] * way[:, None, :]
    pull = 0.01 * len(poses)
    guess = origin[-1] + distance * way[-1]
    right = np.einsum("vij,vj->i", across, origin) + pull * guess
    return np.linalg.solve(across.sum(0) + pull * np.eye(3), right)


@dataclass(frozen=True)
class _Layout:
    """Where grids lie in a flat array, and how rays go through them."""

    grids: tuple[tuple[int, float], ...]
    scale: float
    near: float
    far: float
    coarse: int
    fine: int
    merge: bool
    background: tuple[float, float, float]

    @property
    def nodes(self) -> int:
        return sum(size**3 for size, _ in self.grids)

    @property
    def starts(self) -> list[int]:
        return [sum(size**3 for size, _ in self.grids[:g]) for g in range(len(self.grids))]

    def edges(self) -> np.ndarray:
        return np.geomspace(self.near, self.far, self.coarse + 1)

    def arrays(self, dtype: Any) -> tuple[np.ndarray, ...]:
        """What the kernels want: levels, extents, sizes, starts, edges."""
        sizes = np.array([size for size, _ in self.grids], np.int64)
        extents = np.array([extent for _, extent in self.grids], dtype)
        levels = np.stack([sizes - 1, (sizes - 1) / np.where(extents == 0, 4, 2 * extents)]).astype(dtype)
        return levels, extents, sizes, np.array(self.starts), self.edges().astype(dtype)


class _Grids:
    """N scenes for :func:`fleetgym.envs.fields.marching.march`; density [N, P], colour [N, P, 3], centres [N, 3]."""

    def __init__(self, layout: _Layout, density: Tensor, colour: Tensor, centres: Tensor) -> None:
        self.layout, self.centres = layout, centres
        self.values, self.tints, self.per_scene = density.reshape(-1), colour.reshape(-1, 3), density.shape[1]

    def _corners(self, points: Tensor, scene: Tensor) -> Any:
        """For each grid the nodes about each point [M, S, 8] and their weights (0 outside)."""
        q = (points - self.centres[scene][:, None]) / self.layout.scale
        far = q.abs().amax(-1)
        for (size, extent), start in zip(self.layout.grids, self.layout.starts):
            x = (contract(q) + 2) * ((size - 1) / 4) if extent == 0 else (q + extent) * ((size - 1) / (2 * extent))
            inside = torch.ones_like(far) if extent == 0 else (far < extent).to(far)
            low = x.floor().clamp(0, size - 2)
            x = (x - low).clamp(0, 1)
            first = (low[..., 0] * size + low[..., 1]) * size + low[..., 2]
            first = first.long() + start + (scene * self.per_scene)[:, None]
            nodes, parts = [], []
            for corner in range(8):
                i, j, k = corner >> 2, (corner >> 1) & 1, corner & 1
                nodes.append(first + (i * size + j) * size + k)
                sides = [x[..., a] if bit else 1 - x[..., a] for a, bit in enumerate((i, j, k))]
                parts.append(sides[0] * sides[1] * sides[2] * inside)
            yield torch.stack(nodes, -1), torch.stack(parts, -1)

    def density(self, points: Tensor, scene: Tensor) -> Tensor:
        return sum((self.values[nodes] * parts).sum(-1) for nodes, parts in self._corners(points, scene))

    def look(self, points: Tensor, scene: Tensor) -> tuple[Tensor, Tensor]:
        density = colour = 0
        for nodes, parts in self._corners(points, scene):
            density = density + (self.values[nodes] * parts).sum(-1)
            colour = colour + (self.tints[nodes] * parts[..., None]).sum(-2)
        return density, colour


def _rate(learning_rate: float, step: int, steps: int) -> float:
    return learning_rate * _DECAY ** (step / steps) * min(1.0, step / _WARM)


@dataclass(frozen=True, eq=False)
class Voxels:
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

    weights: dict[str, Tensor]
    config: dict[str, Any]
    centres: np.ndarray
    intrinsics: Intrinsics
    report: list[Report] = field(repr=False)
    views: dict[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    @classmethod
    def fit(cls, views: Any, **options: Any) -> Voxels:
        """:func:`fit_voxels`."""
        return fit_voxels(views, **options)

    def __len__(self) -> int:
        return len(self.report)

    @property
    def failed(self) -> dict[int, str]:
        """The scenes without a field, and why."""
        return {report.scene: report.failed for report in self.report if report.failed}

    def render(
        self, poses: Any = None, *, scenes: Sequence[int] | None = None, intrinsics: Intrinsics | None = None
    ) -> np.ndarray:
        """What a camera would see.

        Args:
            poses: Camera to world, OpenGL axes; [M, 4, 4] for all scenes, or [N, M, 4, 4].
            scenes: Numbers of the scenes to draw; all if None.
            intrinsics: Another camera than that of the captures, in pictures of another size, say.

        Returns:
            [N, M, h, w, 3] uint8.

        Raises:
            UserError: No poses, or poses that are not rigid or not as many; a scene that does not exist, or whose fit
                failed.
        """
        return np.clip(self._draw(poses, scenes, intrinsics)[..., :3] * 255 + 0.5, 0, 255).astype(np.uint8)

    def distances(
        self, poses: Any, *, scenes: Sequence[int] | None = None, intrinsics: Intrinsics | None = None
    ) -> np.ndarray:
        """How far from the camera each pixel's surface is, along its ray, in metres; arguments as in :meth:`render`.

        Returns:
            [N, M, h, w] float32, the mean by the samples' weights; infinite where nothing stops a ray.
        """
        drawn = self._draw(poses, scenes, intrinsics)
        met = 1 - drawn[..., 4]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(met > 0.5, drawn[..., 3] / met, np.inf).astype(np.float32)

    def _draw(self, poses: Any, scenes: Sequence[int] | None, camera: Intrinsics | None) -> np.ndarray:
        scenes = range(len(self)) if scenes is None else list(scenes)
        if poses is None:
            raise UserError("no poses; give where to look from, [M, 4, 4] or one set a scene, [N, M, 4, 4]")
        for n in scenes:
            if not 0 <= n < len(self):
                raise UserError(f"scene {n}: there are {len(self)}, from 0")
            if self.report[n].failed:
                raise UserError(
                    f"scene {n} has no field ({self.report[n].failed}); "
                    "mend its capture, or give the numbers of others as scenes="
                )
        poses = check_poses(poses)
        if poses.ndim == 3:
            poses = np.broadcast_to(poses, (len(scenes), *poses.shape))
        if poses.ndim != 4 or len(poses) != len(scenes):
            raise UserError(
                f"poses of shape {list(poses.shape)} for {len(scenes)} scenes; give [M, 4, 4] or [N, M, 4, 4]"
            )
        camera = camera or self.intrinsics
        layout = _Layout(**self.config)
        density, colour = self.weights["density"], self.weights["colour"]
        out = np.empty((*poses.shape[:2], camera.height, camera.width, 5), np.float32)
        if density.device.type == "cpu":
            for row, n in enumerate(scenes):
                _draw_numba(
                    layout, rays(poses[row], camera).reshape(-1, 6), density[n].numpy(), colour[n].numpy(),
                    self.centres[n], out[row].reshape(-1, 5),
                )  # fmt: skip
                if n in self.views:
                    _mend(self.views[n], self.intrinsics, poses[row], rays(poses[row], camera).reshape(-1, 6), out[row])
        else:
            chosen = torch.as_tensor(list(scenes), device=density.device)
            where = torch.as_tensor(self.centres, dtype=density.dtype, device=density.device)
            grids, walk = _Grids(layout, density, colour, where), _walk(layout, density)
            each = math.prod(out.shape[1:-1])
            lines = np.concatenate([rays(p, camera).reshape(-1, 6) for p in poses])
            drawn = draw_torch(
                lambda r, s: march(grids, r, s, **walk),
                torch.as_tensor(lines, device=density.device),
                chosen.repeat_interleave(each),
            )
            out[:] = drawn.cpu().numpy().reshape(out.shape)
        return out

    def save(self, folder: str | os.PathLike) -> None:
        """Writes the fields into a folder, which appears complete or not at all: safetensors (16-bit) and JSON."""
        with atomic_folder(folder) as temporary:
            tensors = {name: value.half() for name, value in self.weights.items()}
            save_tensors(
                temporary / "fields.safetensors",
                {**tensors, "centres": torch.as_tensor(np.asarray(self.centres)), **self._kept()},
            )
            write_json(
                temporary / "fields.json",
                {
                    "schema": SCHEMA,
                    "config": {**self.config, "grids": [list(grid) for grid in self.config["grids"]]},
                    "intrinsics": asdict(self.intrinsics),
                    "report": [asdict(report) for report in self.report],
                },
            )

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
        folder = current_folder(folder)
        document = read_json(Path(folder) / "fields.json")
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise UserError(f"{folder}/fields.json is not of {SCHEMA}; save the fields anew")
        tensors = load_tensors(Path(folder) / "fields.safetensors")
        views: dict[int, dict[str, Tensor]] = {}
        for name in [name for name in tensors if name.startswith("views.")]:
            _, scene, part = name.split(".")
            value = tensors.pop(name)
            views.setdefault(int(scene), {})[part] = value.float() if part == "residual" else value
        config = document["config"]
        config["grids"] = tuple((int(size), float(extent)) for size, extent in config["grids"])
        config["background"] = tuple(config["background"])
        number, nodes = len(document["report"]), _Layout(**config).nodes
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        wanted = {"density": [number, nodes], "colour": [number, nodes, 3], "centres": [number, 3]}
        if shapes != wanted:
            raise UserError(
                f"{folder}/fields.safetensors holds {shapes}, and fields.json says {wanted}; save them anew"
            )
        return cls(
            {name: tensors[name].float().to(device) for name in ("density", "colour")},
            config,
            tensors["centres"].double().numpy(),
            Intrinsics(**document["intrinsics"]),
            [Report(**report) for report in document["report"]],
            views if torch.device(device).type == "cpu" else {},
        )


def _walk(layout: _Layout, like: Tensor) -> dict[str, Any]:
    return {
        "edges": torch.as_tensor(layout.edges()).to(like),
        "fine": layout.fine,
        "merge": layout.merge,
        "background": like.new_tensor(layout.background),
    }


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
    drawn = fields._draw(capture.poses, [n], None)[0]
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


@dataclass(frozen=True)
class _Options:
    """How to fit."""

    iterations: int
    batch: int
    learning_rate: float
    smoothness: float
    seed: int


def _fit_numba(
    layout: _Layout, capture: Capture, centre: np.ndarray, options: _Options, density: np.ndarray, colour: np.ndarray
) -> None:
    """Fits one scene into zeroed arrays."""
    kind = density.dtype
    lines = rays(capture.poses, capture.intrinsics, kind).reshape(-1, 6)
    wanted = (capture.images.reshape(-1, 3) / 255).astype(kind)
    rng = generator("voxels", options.seed)
    batches = _Batches(np.flatnonzero(capture.masks), options.batch, rng)
    *grids, edges = layout.arrays(kind)
    sizes, starts = grids[2], grids[3]
    place, scale, background = centre.astype(kind), kind.type(layout.scale), np.array(layout.background, kind)
    d_density, d_colour = np.zeros_like(density), np.zeros_like(colour)
    first, second = np.zeros((2, 4, density.size), kind)
    k = kernels.constants(kind)
    for step in range(1, options.iterations + 1):
        kernels.step(
            k, lines, wanted, batches.next(), int(rng.integers(1, 2**31)), density, colour, place, scale, *grids, edges,
            layout.fine, layout.merge, background, d_density, d_colour,
        )  # fmt: skip
        if options.smoothness:
            for size, start in zip(sizes, starts):
                kernels.smooth(density, d_density, size, start, kind.type(options.smoothness))
        b1, b2 = _BETAS
        rate = _rate(options.learning_rate, step, options.iterations)
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
    layout: _Layout, captures: list[Capture], centres: np.ndarray, options: _Options, device: str, progress: bool
) -> tuple[Tensor, Tensor]:
    """Fits N scenes at once by autograd; density [N, P], colour [N, P, 3]."""
    number = len(captures)
    density = torch.zeros(number, layout.nodes, device=device)
    colour = torch.zeros(number, layout.nodes, 3, device=device)
    lines = [torch.as_tensor(rays(c.poses, c.intrinsics).reshape(-1, 6), device=device) for c in captures]
    wanted = [torch.as_tensor(c.images.reshape(-1, 3), device=device) for c in captures]
    batches = [_Batches(np.flatnonzero(c.masks), options.batch, generator("voxels", options.seed)) for c in captures]
    rng = torch_generator("voxels", options.seed, device=device)
    where, walk = torch.as_tensor(centres, dtype=density.dtype, device=device), _walk(layout, density)
    parameters, moments = (density, colour), [(torch.zeros_like(p), torch.zeros_like(p)) for p in (density, colour)]
    b1, b2 = _BETAS
    steps = range(1, options.iterations + 1)
    for step in track(steps, "fitting radiance fields") if progress else steps:
        chosen = [torch.as_tensor(b.next(), device=device) for b in batches]
        scene = torch.cat([torch.full_like(c, n) for n, c in enumerate(chosen)])
        leaves = [p.detach().requires_grad_() for p in parameters]
        seen, _, _ = march(
            _Grids(layout, *leaves, where), torch.cat([line[c] for line, c in zip(lines, chosen)]), scene, **walk,
            generator=rng,
        )  # fmt: skip
        target = torch.cat([w[c] for w, c in zip(wanted, chosen)]).to(seen) / 255
        size = torch.cat([torch.full((len(c),), 1 / (3 * len(c)), device=device) for c in chosen])
        gradients = torch.autograd.grad(((seen - target).square().sum(1) * size).sum(), leaves)
        if options.smoothness:
            more = smoothness_gradient(layout, density, gradients[0] != 0, options.smoothness)
            gradients = (gradients[0] + more, gradients[1])
        rate = _rate(options.learning_rate, step, options.iterations)
        for value, gradient, (first, second) in zip(parameters, gradients, moments):
            touched = gradient != 0
            first.add_(torch.where(touched, (gradient - first) * (1 - b1), 0))
            second.add_(torch.where(touched, (gradient.square() - second) * (1 - b2), 0))
            change = first / (1 - b1**step) / ((second / (1 - b2**step)).sqrt() + 1e-12)
            value.sub_(torch.where(touched, rate * change, 0))
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
    layout = _layout(grids, scale, near, far, samples, merge, background)
    for name, value in (("iterations", iterations), ("batch", batch)):
        if value < 1:
            raise UserError(f"{name}={value}: it must be at least 1")
    if not 0 < learning_rate < math.inf:
        raise UserError(f"learning_rate={learning_rate}: it must be positive and finite")
    if not 0 <= smoothness < math.inf or hold_out < 0:
        raise UserError(f"smoothness={smoothness}, hold_out={hold_out}: neither may be negative")
    if on_error not in ("raise", "skip"):
        raise UserError(f"on_error={on_error!r}: choose from 'raise', 'skip'")
    backend = backend or ("numba" if torch.device(device).type == "cpu" else "torch")
    if backend not in ("numba", "torch") or (backend == "numba" and torch.device(device).type != "cpu"):
        raise UserError(f"backend={backend!r} on {device!r}: choose 'torch', or 'numba' on the CPU")
    captures = [captures] if isinstance(captures, Capture) else list(captures)
    if not captures:
        raise UserError("no capture; give one or more")
    number = len(captures)
    checked, failed, centres = _checked(captures, centre, hold_out, on_error)
    good = [n for n in range(number) if n not in failed]
    camera = checked[good[0]][0].intrinsics if good else captures[0].intrinsics
    options = _Options(iterations, batch, learning_rate, smoothness, seed)
    density = torch.zeros(number, layout.nodes, device=device)
    colour = torch.zeros(number, layout.nodes, 3, device=device)
    seconds = dict.fromkeys(good, 0.0)
    if backend == "numba":
        for n in track(good, "fitting radiance fields") if progress else good:
            began = time.process_time()
            _fit_numba(layout, checked[n][0], centres[n], options, density[n].numpy(), colour[n].numpy())
            seconds[n] = time.process_time() - began
    elif good:
        began = time.perf_counter()
        density[good], colour[good] = _fit_torch(
            layout, [checked[n][0] for n in good], centres[good], options, device, progress
        )
        seconds = dict.fromkeys(good, (time.perf_counter() - began) / len(good))
    fields = Voxels({"density": density, "colour": colour}, asdict(layout), centres, camera, [])
    for n in range(number):
        if n not in failed and not (torch.isfinite(density[n]).all() and torch.isfinite(colour[n]).all()):
            failed[n] = f"the fit diverged; lower learning_rate={learning_rate}"
            if on_error == "raise":
                raise UserError(f"capture {n}: {failed[n]}")
            density[n], colour[n] = 0, 0
        if n in failed:
            fields.report.append(Report(n, failed=failed[n]))
            continue
        fit, held = checked[n]
        fields.report.append(Report(n))  # a scene that can be drawn
        if residuals and density.device.type == "cpu":
            began = time.process_time()
            fields.views[n] = _keep(fields, n, fit)
            seconds[n] += time.process_time() - began
        fields.report[n] = Report(
            n, _judge(fields, n, fit, seed), _held_out(fields, n, held), iterations, seconds[n], len(fit.images)
        )
    return fields


def _layout(grids: Any, scale: float, near: float, far: float, samples: Any, merge: bool, background: Any) -> _Layout:
    grids = tuple((int(size), float(extent)) for size, extent in grids)
    if not grids or min(size for size, _ in grids) < 2 or not all(0 <= extent < math.inf for _, extent in grids):
        raise UserError(f"grids={grids}: give pairs (nodes along a side, at least 2; half the box, 0 for all space)")
    if not 0 < scale < math.inf:
        raise UserError(f"scale={scale}: it is a length in metres, positive and finite")
    if not 0 < near < far < math.inf:
        raise UserError(f"near={near}, far={far}: 0 < near < far")
    if len(samples) != 2 or min(samples) < 2:
        raise UserError(f"samples={tuple(samples)}: (intervals, samples placed by weight), each at least 2")
    colour = tuple(float(value) for value in background)
    if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
        raise UserError(f"background={colour}: red, green and blue from 0 to 1")
    return _Layout(grids, float(scale), float(near), float(far), int(samples[0]), int(samples[1]), bool(merge), colour)


def _checked(
    captures: list[Capture], centre: Any, hold_out: int, on_error: str
) -> tuple[dict[int, tuple[Capture, Capture | None]], dict[int, str], np.ndarray]:
    """For each usable capture the views to fit and those held out; why others are not; and the centres [N, 3]."""
    number = len(captures)
    centres = np.zeros((number, 3))
    if centre is not None:
        given = np.asarray(centre, np.float64)
        if given.shape not in ((3,), (number, 3)):
            raise UserError(f"centre of shape {list(given.shape)} for {number} captures; give [3] or [{number}, 3]")
        centres[:] = given
    checked: dict[int, tuple[Capture, Capture | None]] = {}
    failed: dict[int, str] = {}
    camera = None
    for n, capture in enumerate(captures):
        try:
            if not isinstance(capture, Capture):
                raise UserError(f"capture {n}: a {type(capture).__name__}; give a Capture(images, poses, intrinsics)")
            capture = capture.checked(f"capture {n}")
            camera = camera or capture.intrinsics
            if capture.intrinsics != camera:
                raise UserError(f"capture {n}: {capture.intrinsics}, and others have {camera}; fit them by themselves")
            views = len(capture.images)
            if hold_out and views - hold_out < 3:
                raise UserError(f"capture {n}: {views} views, of which {hold_out} are held out; 3 or more must be left")
            if not np.isfinite(centres[n]).all():
                raise UserError(f"capture {n}: centre {centres[n].tolist()} is not finite; give a point in metres")
            held = np.zeros(views, bool)
            held[((np.arange(hold_out) + 0.5) * views / max(hold_out, 1)).astype(int)] = True
            fit = capture.subset(~held)
            checked[n] = fit, capture.subset(held) if hold_out else None
            if centre is None:
                centres[n] = middle(fit.poses)
        except UserError as error:
            if on_error == "raise":
                raise
            failed[n] = str(error)
    return checked, failed, centres


def _judge(fields: Voxels, n: int, capture: Capture, seed: int) -> float:
    """PSNR in dB on random pixels of the views that a scene was fitted to."""
    usable = np.flatnonzero(capture.masks)
    usable = generator("voxels", "judge", seed).choice(usable, min(len(usable), _JUDGED), replace=False)
    lines = rays(capture.poses, capture.intrinsics).reshape(-1, 6)[usable]
    out = np.empty((len(lines), 5), np.float32)
    layout = _Layout(**fields.config)
    _draw_numba(
        layout, lines, fields.weights["density"][n].cpu().numpy(), fields.weights["colour"][n].cpu().numpy(),
        fields.centres[n], out,
    )  # fmt: skip
    return psnr(np.clip(out[:, :3] * 255, 0, 255), capture.images.reshape(-1, 3)[usable])


def _held_out(fields: Voxels, n: int, held: Capture | None) -> float | None:
    if held is None:
        return None
    return psnr(fields.render(held.poses, scenes=[n])[0], held.images, held.masks)
