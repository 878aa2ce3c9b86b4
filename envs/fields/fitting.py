"""What all kinds of radiance field share: which captures can be fitted, their rays, steps, judgement and drawing."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fleetgym.core.checkpoint import load_tensors, save_tensors
from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_folder, current_folder, read_json, write_json
from fleetgym.core.pictures import psnr
from fleetgym.core.run import track
from fleetgym.core.seeding import generator, torch_generator
from fleetgym.envs.fields.captures import Capture, Intrinsics, check_poses, rays, surfaces
from fleetgym.envs.fields.marching import Scenes, march

__all__ = ["Radiance", "Report", "Work", "middle"]

# Adam's decay rates.
BETAS = (0.9, 0.99)
# Steps over which the step size rises to its full value.
_WARM = 10
# The step size falls to this share of itself.
_DECAY = 0.1
# Rays of the training views on which a fit is judged.
_JUDGED = 4096
# Bytes that a fit or a picture may take on a CPU at once; an accelerator gives half of what it has free.
_ROOM = 1 << 28


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
class View:
    """How rays go through space, whatever the field is made of.

    Attributes:
        scale: Half the side of the cube about the centre that is not contracted, metres.
        near: Where rays begin, metres from the camera.
        far: Where they end.
        coarse: Intervals along a ray.
        fine: Samples that are placed by the intervals' weights.
        merge: Whether the intervals' own samples are rendered, too.
        background: Colour of what is behind everything.
    """

    scale: float
    near: float
    far: float
    coarse: int
    fine: int
    merge: bool
    background: tuple[float, float, float]

    @staticmethod
    def checked(scale: float, near: float, far: float, samples: Any, merge: bool, background: Any) -> dict[str, Any]:
        """The attributes, as a layout takes them.

        Raises:
            UserError: A length that is not positive, too few samples, or a background that is no colour.
        """
        if not 0 < scale < math.inf:
            raise UserError(f"scale={scale}: it is a length in metres, positive and finite")
        if not 0 < near < far < math.inf:
            raise UserError(f"near={near}, far={far}: 0 < near < far")
        if len(samples) != 2 or min(samples) < 2:
            raise UserError(f"samples={tuple(samples)}: (intervals, samples placed by weight), each at least 2")
        colour = tuple(float(value) for value in background)
        if len(colour) != 3 or not all(0 <= value <= 1 for value in colour):
            raise UserError(f"background={colour}: red, green and blue from 0 to 1")
        return {
            "scale": float(scale), "near": float(near), "far": float(far), "coarse": int(samples[0]),
            "fine": int(samples[1]), "merge": bool(merge), "background": colour,
        }  # fmt: skip

    def edges(self) -> np.ndarray:
        """Ends of the intervals along a ray, metres, [coarse + 1]."""
        return np.geomspace(self.near, self.far, self.coarse + 1)

    def walk(self, like: Tensor) -> dict[str, Any]:
        """What :func:`fleetgym.envs.fields.marching.march` wants, on the device of ``like`` and in its type."""
        return {
            "edges": torch.as_tensor(self.edges()).to(like),
            "fine": self.fine,
            "merge": self.merge,
            "background": like.new_tensor(self.background),
        }


@dataclass(frozen=True)
class Steps:
    """How to fit, whatever the field is made of.

    Attributes:
        iterations: Steps.
        batch: Rays a step and scene.
        learning_rate: Adam's step size at the beginning; it falls to a tenth.
        seed: Of the order of rays and the places of samples.
    """

    iterations: int
    batch: int
    learning_rate: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("iterations", "batch"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1")
        if not 0 < self.learning_rate < math.inf:
            raise UserError(f"learning_rate={self.learning_rate}: it must be positive and finite")

    def rate(self, step: int) -> float:
        """The share of the step size that step 1, 2, ... takes, times the step size."""
        return self.learning_rate * _DECAY ** (step / self.iterations) * min(1.0, step / _WARM)


@dataclass(frozen=True)
class Work:
    """The scenes of a fit.

    Attributes:
        fit: For each usable capture, by its number, the views to fit.
        held: The views held out of them; None where there are none.
        failed: Why other captures are not usable.
        centres: Where detail is wanted, metres, [N, 3].
        camera: Of all captures.
    """

    fit: dict[int, Capture]
    held: dict[int, Capture | None]
    failed: dict[int, str]
    centres: np.ndarray
    camera: Intrinsics

    def __len__(self) -> int:
        return len(self.centres)

    @classmethod
    def of(cls, captures: Any, centre: Any, hold_out: int, on_error: str) -> Work:
        """Checks captures.

        Args:
            captures: A list of captures, or one.
            centre: Metres, [3] or [N, 3]; None for where the cameras look at (:func:`middle`).
            hold_out: Views of each capture, evenly spread, to keep from the fit.
            on_error: ``"raise"``, or ``"skip"`` to note what is wrong with a capture and go on.

        Raises:
            UserError: No capture, one that is unusable (unless skipped), or an option out of its range.
        """
        if hold_out < 0:
            raise UserError(f"hold_out={hold_out}: it may not be negative")
        if on_error not in ("raise", "skip"):
            raise UserError(f"on_error={on_error!r}: choose from 'raise', 'skip'")
        captures = [captures] if isinstance(captures, Capture) else list(captures)
        if not captures:
            raise UserError("no capture; give one or more")
        number = len(captures)
        centres = np.zeros((number, 3))
        if centre is not None:
            given = np.asarray(centre, np.float64)
            if given.shape not in ((3,), (number, 3)):
                raise UserError(f"centre of shape {list(given.shape)} for {number} captures; give [3] or [{number}, 3]")
            centres[:] = given
        work = cls({}, {}, {}, centres, None)
        camera = None
        for n, capture in enumerate(captures):
            try:
                if not isinstance(capture, Capture):
                    raise UserError(
                        f"capture {n}: a {type(capture).__name__}; give a Capture(images, poses, intrinsics)"
                    )
                capture = capture.checked(f"capture {n}")
                camera = camera or capture.intrinsics
                if capture.intrinsics != camera:
                    raise UserError(
                        f"capture {n}: {capture.intrinsics}, and others have {camera}; fit them by themselves"
                    )
                views = len(capture.images)
                if hold_out and views - hold_out < 3:
                    raise UserError(
                        f"capture {n}: {views} views, of which {hold_out} are held out; 3 or more must be left"
                    )
                if not np.isfinite(centres[n]).all():
                    raise UserError(f"capture {n}: centre {centres[n].tolist()} is not finite; give a point in metres")
                held = np.zeros(views, bool)
                held[((np.arange(hold_out) + 0.5) * views / max(hold_out, 1)).astype(int)] = True
                work.fit[n], work.held[n] = capture.subset(~held), capture.subset(held) if hold_out else None
                if centre is None:
                    centres[n] = middle(work.fit[n].poses)
            except UserError as error:
                if on_error == "raise":
                    raise
                work.failed[n] = str(error)
        if camera is None:  # nothing was usable; the fields still have a camera
            lenses = (getattr(capture, "intrinsics", None) for capture in captures)
            camera = next((lens for lens in lenses if isinstance(lens, Intrinsics)), None)
            if camera is None:
                raise UserError(f"no capture with a camera: {work.failed[0]}")
        return cls(work.fit, work.held, work.failed, centres, camera)


def room(device: str | torch.device) -> int:
    """Bytes that may be taken at once."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return _ROOM


def synchronize(device: str | torch.device) -> None:
    """Waits until a device has done what it was asked for, so that a clock can be read."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def parts(number: int, size: int, device: str | torch.device) -> Iterator[slice]:
    """Cuts ``number`` things of ``size`` bytes each into runs that fit into the device's :func:`room`."""
    at_once = max(1, room(device) // max(size, 1))
    for first in range(0, number, at_once):
        yield slice(first, min(first + at_once, number))


class Rays:
    """The usable rays of N scenes on a device, each scene's in a random order that does not depend on the others.

    Args:
        captures: Checked ones, by one camera.
        seed: Of the orders.
        device: Where to keep them.
    """

    def __init__(self, captures: Sequence[Capture], seed: int, device: str | torch.device) -> None:
        usable = [np.flatnonzero(capture.masks) for capture in captures]
        self.counts = torch.tensor([len(u) for u in usable], device=device)
        longest = max(len(u) for u in usable)
        self.lines = torch.zeros(len(captures), longest, 6, device=device)
        self.wanted = torch.zeros(len(captures), longest, 3, dtype=torch.uint8, device=device)
        for n, (capture, u) in enumerate(zip(captures, usable)):
            order = generator("radiance", "rays", seed).permutation(u)
            lines = rays(capture.poses, capture.intrinsics).reshape(-1, 6)[order]
            self.lines[n, : len(u)] = torch.as_tensor(lines, device=device)
            self.wanted[n, : len(u)] = torch.as_tensor(capture.images.reshape(-1, 3)[order], device=device)

    def batch(self, step: int, size: int) -> tuple[Tensor, Tensor]:
        """The rays of step 1, 2, ...: as many of each scene, [N * size, 6], and what they see, 0 to 1, [N * size, 3].

        A scene's rays come in its order, and from the beginning again when they have all been seen.
        """
        scenes = torch.arange(len(self.lines), device=self.lines.device)[:, None]
        at = torch.arange((step - 1) * size, step * size, device=self.lines.device) % self.counts[:, None]
        return self.lines[scenes, at].flatten(0, 1), self.wanted[scenes, at].flatten(0, 1) / 255


def descend(
    parameters: Sequence[Tensor],
    scenes_of: Callable[[Sequence[Tensor], int], Scenes],
    table: Rays,
    steps: Steps,
    walk: dict[str, Any],
    progress: bool,
    more: Callable[[list[Tensor]], Any] | None = None,
    factors: Sequence[float] | None = None,
) -> None:
    """Fits N scenes at once by autograd, in place: Adam on each scene's mean squared error.

    A value whose gradient is zero, which no ray has touched, stays, and so do its moments. All scenes place their
    samples by the same random numbers, so that each is fitted as it would be alone.

    Args:
        parameters: Tensors [N, ...].
        scenes_of: The field of parameters and the number of the step.
        table: Rays.
        steps: How many, of what size.
        walk: :meth:`View.walk`.
        progress: Whether to show a progress bar.
        more: Changes gradients in place, such as for a term of the loss that has no rays.
        factors: Of the step size, for each parameter.
    """
    device, number = table.lines.device, len(table.lines)
    rng = torch_generator("radiance", "places", steps.seed, device=str(device))
    scene = torch.arange(number, device=device).repeat_interleave(steps.batch)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    b1, b2 = BETAS
    numbers = range(1, steps.iterations + 1)
    for step in track(numbers, "fitting radiance fields") if progress else numbers:
        lines, wanted = table.batch(step, steps.batch)
        leaves = [p.detach().requires_grad_() for p in parameters]
        seen, _, _ = march(scenes_of(leaves, step), lines, scene, **walk, generator=rng, blocks=number)
        loss = (seen - wanted).square().sum() / (3 * steps.batch)
        gradients = list(torch.autograd.grad(loss, leaves))
        if more is not None:
            more(gradients)
        rate = steps.rate(step)
        for value, gradient, (first, second), factor in zip(
            parameters, gradients, moments, factors or [1.0] * len(parameters)
        ):
            touched = gradient != 0
            first.add_(torch.where(touched, (gradient - first) * (1 - b1), 0))
            second.add_(torch.where(touched, (gradient.square() - second) * (1 - b2), 0))
            change = first / (1 - b1**step) / ((second / (1 - b2**step)).sqrt() + 1e-12)
            value.sub_(torch.where(touched, rate * factor * change, 0))


def draw(scenes: Scenes, poses: Tensor, camera: Intrinsics, walk: dict[str, Any], size: int) -> Tensor:
    """Renders views of N scenes in parts, without gradients; rays are made where the poses are.

    Args:
        scenes: The fields.
        poses: Camera to world, [N, M, 4, 4].
        camera: The intrinsics.
        walk: :meth:`View.walk`.
        size: Bytes that a ray takes on its way.

    Returns:
        Red, green, blue, distance, light left; [N, M, h, w, 5].
    """
    number, views = poses.shape[:2]
    ways = torch.as_tensor(rays(np.eye(4)[None], camera)[0, ..., 3:].reshape(-1, 3)).to(poses)
    each = len(ways)
    out = poses.new_empty(number, views * each, 5)
    with torch.no_grad():
        for part in parts(views * each, max(number, 1) * size, poses.device):
            index = torch.arange(part.start, part.stop, device=poses.device)
            pose = poses[:, index // each]
            way = (pose[..., :3, :3] @ ways[index % each][..., None])[..., 0]
            scene = torch.arange(number, device=poses.device).repeat_interleave(len(index))
            lines = torch.cat([pose[..., :3, 3], way], -1).flatten(0, 1)
            colour, distance, left = march(scenes, lines, scene, **walk)
            drawn = torch.cat([colour, distance[:, None], left[:, None]], 1)
            out[:, part] = drawn.unflatten(0, (number, len(index)))
    return out.view(number, views, camera.height, camera.width, 5)


@dataclass(frozen=True, eq=False)
class Radiance:
    """N fitted scenes; the part of it that does not depend on what a field is made of.

    Attributes:
        weights: Tensors [N, ...] of all scenes.
        config: Keyword arguments of the layout.
        centres: What the fields lie about, metres, [N, 3].
        intrinsics: The camera.
        report: How each scene's fit went.
    """

    weights: dict[str, Tensor]
    config: dict[str, Any]
    centres: np.ndarray
    intrinsics: Intrinsics
    report: list[Report] = field(repr=False)

    #: Name of the files' format.
    SCHEMA: ClassVar[str]
    #: First key of the random numbers.
    KEY: ClassVar[str]

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
        drawn = self._draw(poses, scenes, intrinsics)[..., :3]
        return (drawn * 255 + 0.5).clamp_(0, 255).to(torch.uint8).cpu().numpy()

    def distances(
        self, poses: Any, *, scenes: Sequence[int] | None = None, intrinsics: Intrinsics | None = None
    ) -> np.ndarray:
        """How far from the camera each pixel's surface is, along its ray, in metres; arguments as in :meth:`render`.

        Returns:
            [N, M, h, w] float32, the mean by the samples' weights; infinite where nothing stops a ray.
        """
        drawn = self._draw(poses, scenes, intrinsics)[..., 3:].cpu().numpy()
        met = 1 - drawn[..., 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(met > 0.5, drawn[..., 0] / met, np.inf).astype(np.float32)

    def surfaces(self, poses: Any, size: int = 24, farthest: float = 1.0) -> list[np.ndarray]:
        """Where each scene's surfaces are, by small pictures from poses; arguments as in :meth:`render`.

        Args:
            poses: Camera to world, OpenGL axes; [M, 4, 4] for all scenes, or [N, M, 4, 4].
            size: Pixels of the pictures' shorter side.
            farthest: What is farther from a camera is left out, metres.

        Returns:
            For each scene, points in the world [P, 3], metres.
        """
        shorter = min(self.intrinsics.height, self.intrinsics.width)
        sides = (max(1, round(size * side / shorter)) for side in (self.intrinsics.height, self.intrinsics.width))
        camera = self.intrinsics.resized(*sides)
        poses = np.broadcast_to(poses, (len(self), *np.shape(poses)[-3:]))
        found = self.distances(poses, intrinsics=camera)
        return [surfaces(*scene, camera, farthest) for scene in zip(found, poses)]

    def _draw(self, poses: Any, scenes: Sequence[int] | None, camera: Intrinsics | None) -> Tensor:
        """Red, green, blue, distance and light left, [N, M, h, w, 5] float32."""
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
        if not poses.shape[0] * poses.shape[1]:
            return torch.empty(*poses.shape[:2], camera.height, camera.width, 5)
        return self._paint(poses, list(scenes), camera)

    def _paint(self, poses: np.ndarray, scenes: list[int], camera: Intrinsics) -> Tensor:
        """:meth:`_draw` of checked arguments."""
        raise TypeError(f"{type(self).__name__} draws nothing; use one of the kinds of fleetgym.envs.fields.FIELDS")

    def _sound(self, n: int) -> bool:
        """Whether what was fitted to scene n is finite."""
        return all(bool(torch.isfinite(value[n]).all()) for value in self.weights.values())

    def _clear(self, n: int) -> None:
        """Takes out what was fitted to a scene."""
        for value in self.weights.values():
            value[n] = 0

    def _trace(self, n: int, capture: Capture, chosen: np.ndarray) -> np.ndarray:
        """What the field alone shows at some pixels of a capture's views, counted through; [R, 3], 0 to 1."""
        return self._draw(capture.poses, [n], None)[0, ..., :3].reshape(-1, 3).cpu().numpy()[chosen]

    def _judged(self, n: int, capture: Capture, seed: int) -> float:
        """PSNR in dB of the field alone on random pixels of the views that a scene was fitted to."""
        usable = np.flatnonzero(capture.masks)
        chosen = generator(self.KEY, "judge", seed).choice(usable, min(len(usable), _JUDGED), replace=False)
        drawn = self._trace(n, capture, chosen)
        return psnr(np.clip(drawn * 255, 0, 255), capture.images.reshape(-1, 3)[chosen])

    def conclude(
        self,
        work: Work,
        iterations: int,
        seconds: dict[int, float],
        seed: int,
        on_error: str,
        advice: str,
        settle: Callable[[int, Capture], float] | None = None,
    ) -> None:
        """Fills in the report: which fits diverged, and how good the others are.

        Args:
            work: What was fitted.
            iterations: Steps.
            seconds: Of each usable scene's fit.
            seed: Of the pixels that a fit is judged by.
            on_error: ``"raise"`` or ``"skip"``, for a fit that diverged.
            advice: What to do about one.
            settle: Called with the number and the views of a sound scene before it is judged; gives seconds.

        Raises:
            UserError: A fit diverged and ``on_error`` is ``"raise"``.
        """
        for n in range(len(work)):
            failed = work.failed.get(n)
            if failed is None and not self._sound(n):
                failed = f"the fit diverged; {advice}"
                if on_error == "raise":
                    raise UserError(f"capture {n}: {failed}")
                self._clear(n)
            if failed is not None:
                self.report.append(Report(n, failed=failed))
                continue
            fit, held = work.fit[n], work.held[n]
            self.report.append(Report(n))  # a scene that can be drawn
            more = settle(n, fit) if settle is not None else 0.0
            quality = None
            if held is not None:
                quality = psnr(self.render(held.poses, scenes=[n])[0], held.images, held.masks)
            self.report[n] = Report(
                n, self._judged(n, fit, seed), quality, iterations, seconds[n] + more, len(fit.images)
            )

    def write(self, folder: str | os.PathLike, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
        """Writes tensors and facts into a folder, which appears complete or not at all: safetensors and JSON."""
        with atomic_folder(folder) as temporary:
            centres = torch.as_tensor(np.asarray(self.centres))
            save_tensors(temporary / "fields.safetensors", {**tensors, "centres": centres})
            write_json(
                temporary / "fields.json",
                {
                    "schema": self.SCHEMA,
                    "config": config,
                    "intrinsics": asdict(self.intrinsics),
                    "report": [asdict(report) for report in self.report],
                },
            )

    @classmethod
    def read(cls, folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """The document and the tensors that :meth:`write` wrote; the background is a tuple again.

        Raises:
            UserError: The folder is missing, or what it holds are not such fields.
        """
        folder = current_folder(folder)
        document = read_json(Path(folder) / "fields.json")
        if not isinstance(document, dict) or document.get("schema") != cls.SCHEMA:
            raise UserError(f"{folder}/fields.json is not of {cls.SCHEMA}; save the fields anew")
        if "background" in document["config"]:
            document["config"]["background"] = tuple(document["config"]["background"])
        document["intrinsics"] = Intrinsics(**document["intrinsics"])
        document["report"] = [Report(**report) for report in document["report"]]
        return document, load_tensors(Path(folder) / "fields.safetensors")


def fits(folder: str | os.PathLike, tensors: dict[str, Tensor], wanted: dict[str, list[int]]) -> None:
    """Checks the shapes of tensors that were read.

    Raises:
        UserError: They are not those that the document says.
    """
    shapes = {name: list(value.shape) for name, value in tensors.items()}
    if shapes != wanted:
        raise UserError(f"{folder}/fields.safetensors holds {shapes}, and fields.json says {wanted}; save them anew")
