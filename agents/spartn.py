"""SPARTN: demonstrations of an eye in hand, with views from where the robot would be if it had erred.

For each demonstration a radiance field is fitted to its pictures. From poses of the hand beside the demonstrated ones
the field is rendered, the gripper, which moves with the camera, is pasted back, and each view is labelled with the
action that leads to where the demonstration went next. With the hand's pose ``H_t`` and the demonstrated motion ``T``
in the hand's frame, the next pose is ``H_t T``; beside it, at ``H_t E``, the motion that leads there is ``E^-1 T``: the
label is exact and needs no field, only the picture is approximate. Nothing is asked of a simulator or an expert.

Source: A. Zhou, M. J. Kim, L. Wang, P. Florence, C. Finn, "NeRF in the Palm of Your Hand: Corrective Augmentation for
Robotics via Novel-View Synthesis", CVPR 2023 (arXiv 2301.08556). No code was released; ranges of the noise, the numbers
of views and the fields are ours.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from fleetgym.core import se3
from fleetgym.core.checkpoint import load_tensors, save_tensors
from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_write, jsonable, read_json, write_json
from fleetgym.core.pictures import psnr
from fleetgym.core.rollout import Episode
from fleetgym.core.run import Run
from fleetgym.core.seeding import generator
from fleetgym.core.workers import check_picklable, worker_pool

#: A field's surfaces are known to some millimetres: a hand collides if so many points are so deep within it, metres.
TOUCHES, SKIN = 2, 0.003


@dataclass(frozen=True)
class EyeInHand:
    """A camera that is fixed to the hand, and what an action means.

    Attributes:
        hand_eye: Pose of the camera in the hand [4, 4], OpenGL axes (x right, y up, it looks along -z).
        gripper: [h, w] bool, where the picture shows the gripper.
        translation: Metres that an action of 1 moves the hand by.
        rotation: Radians that an action of 1 turns it by.
        solid: Boxes [n, 2, 3] that the hand and its open fingers fill, lowest and highest corners in the hand's frame,
            metres; None where nobody knows them, and then no pose is dropped for what it would hit.
    """

    hand_eye: np.ndarray
    gripper: np.ndarray
    translation: float
    rotation: float
    solid: np.ndarray | None = None

    def motion(self, actions: Any) -> np.ndarray:
        """The motions [..., 4, 4] of the hand in its own frame that actions [..., 6] ask for."""
        actions = np.asarray(actions, np.float64)
        return se3.pose(self.translation * actions[..., :3], self.rotation * actions[..., 3:])

    def action(self, motions: Any) -> np.ndarray:
        """The actions [..., 6] that ask for motions [..., 4, 4]; they may be beyond -1..1."""
        translation, vector = se3.parts(motions)
        return np.concatenate([translation / self.translation, vector / self.rotation], axis=-1)


def collides(hands: np.ndarray, solid: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Whether a hand would be where something else is.

    Args:
        hands: Poses [M, 4, 4].
        solid: See :class:`EyeInHand`.
        points: Of the surfaces that were seen [P, 3], metres.

    Returns:
        [M] bool: more than :data:`TOUCHES` points are deeper than :data:`SKIN` within the boxes.
    """
    low, high = solid[:, 0] + SKIN, solid[:, 1] - SKIN
    reach = np.abs(solid).max(axis=(0, 1))
    found = np.zeros(len(hands), bool)
    for index, hand in enumerate(hands):
        # Few points are near enough to be looked at in the hand's frame.
        near = points[np.abs(points - hand[:3, 3]).max(axis=1) < np.linalg.norm(reach)]
        local = ((near - hand[:3, 3]) @ hand[:3, :3])[:, None]
        found[index] = ((local > low) & (local < high)).all(-1).any(-1).sum() > TOUCHES
    return found


@dataclass(frozen=True)
class Noise:
    """Where the hand would be if it had erred.

    Attributes:
        translation: Largest error along each axis of the hand, metres.
        rotation: Largest component of the rotation vector, radians.
        last: So many steps before the end errors are smaller: there is little room beside the object.
        shrink: By this factor.
        lowest: Poses whose hand would be lower than this above the table (z = 0) are dropped, metres.
    """

    translation: float = 0.03
    rotation: float = 0.2
    last: int = 4
    shrink: float = 0.4
    lowest: float = 0.06

    def __post_init__(self) -> None:
        for name in ("translation", "rotation", "last", "shrink"):
            if not getattr(self, name) >= 0:
                raise UserError(f"{name}={getattr(self, name)}: it must not be negative")

    def draw(self, rng: np.random.Generator, steps: int, number: int) -> np.ndarray:
        """Errors E in the hand's frame, [number, steps, 4, 4]."""
        size = np.ones(steps)
        if self.last:
            size[-self.last :] = self.shrink
        uniform = rng.uniform(-1.0, 1.0, (number, steps, 6)) * size[:, None]
        return se3.pose(self.translation * uniform[..., :3], self.rotation * uniform[..., 3:])


@dataclass
class Report:
    """What became of each demonstration.

    Attributes:
        rows: For each: ``seed``, ``views``, ``psnr`` (dB, on views left out of a fit; None where none was), ``made``
            and ``rejected`` (pictures), ``collided`` (how many of these because the hand would hit something),
            ``clipped`` (share of labels beyond the limits), ``cpu_seconds``, ``failed`` (why there are no pictures of
            it; None if there are); and the notes of the renderer.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        made = sum(row["made"] for row in self.rows)
        rejected = sum(row["rejected"] for row in self.rows)
        failed = sum(row["failed"] is not None for row in self.rows)
        known = [row["psnr"] for row in self.rows if row["psnr"] is not None]
        words = f"{len(self.rows)} demonstrations, {made} pictures, {rejected} rejected, {failed} fields failed"
        return words + (f", held-out views {np.mean(known):.1f} dB" if known else "")


#: ``render(episode, poses of the camera [M, 4, 4]) -> pictures [M, h, w, 3] uint8``, and notes for the report's row. A
#: note ``aside_seconds`` is processor time that went into measuring, and does not count as the row's ``cpu_seconds``; a
#: note ``collides`` [M] bool says at which poses the hand would hit something: these pictures are dropped.
Renderer = Callable[[Episode, np.ndarray], tuple[np.ndarray, Mapping[str, Any]]]


def approach(episode: Episode) -> int:
    """How many steps of an episode begin before the gripper closes: those of the approach.

    The info ``grasping`` is true in the step at whose end the fingers close, as the grasping suite's environments tell
    it (``collect(..., infos=("grasping",))`` keeps it). Where nobody has kept it, all steps count: there the script
    closes the fingers within the last step.
    """
    closing = np.flatnonzero(episode.infos.get("grasping", ()))
    return int(closing[0]) + 1 if len(closing) else episode.length


def augment(
    episode: Episode,
    eye: EyeInHand,
    render: Renderer,
    *,
    number: int = 6,
    noise: Noise | None = None,
    seed: int = 0,
) -> tuple[list[Episode], dict[str, Any]]:
    """Corrective episodes beside one demonstration.

    Args:
        episode: Its observations map ``rgb`` to [T+1, h, w, 3] uint8, ``pose`` to the hand's poses [T+1, 4, 4] and
            ``remaining`` to [T+1, 1]; its actions are [T, 6].
        eye: The camera.
        render: Draws views of the episode's scene; see :func:`field_renderer`.
        number: Pictures beside each step.
        noise: Where from.
        seed: Seed of the noise; the same for all methods of rendering.

    Returns:
        ``number`` episodes of unconnected steps (each has its own error), without those that were rejected; and a row
        of :class:`Report`. They observe ``rgb``, ``pose`` and ``remaining``; what else the demonstration observes is
        not known from there.

    Raises:
        UserError: Observations without picture, pose or remaining time; poses that are not rigid.
    """
    began = time.process_time()
    noise = noise or Noise()
    _check(episode)
    observations = episode.observations
    steps = approach(episode)
    hands = np.asarray(observations["pose"][:steps], np.float64)
    errors = noise.draw(generator("spartn", seed, int(episode.seed or 0)), steps, number)
    erred = hands @ errors
    kept = erred[..., 2, 3] >= noise.lowest
    labels = eye.action(se3.inverse(errors) @ eye.motion(episode.actions[:steps]))
    row = {"seed": episode.seed, "views": steps, "psnr": None, "made": 0, "rejected": int((~kept).sum())}
    row |= {"collided": 0, "clipped": 0.0, "failed": None}
    try:
        if not kept.any():
            raise UserError(f"all poses beside it are lower than lowest={noise.lowest}; lower that, or the noise")
        pictures, notes = render(episode, (erred @ eye.hand_eye)[kept])
    except UserError as error:
        return [], {**row, "failed": str(error), "cpu_seconds": round(time.process_time() - began, 2)}
    notes = dict(notes)
    hit = notes.pop("collides", None)
    if hit is not None and hit.any():
        row |= {"collided": int(hit.sum()), "rejected": row["rejected"] + int(hit.sum())}
        pictures, kept[kept] = pictures[~hit], ~hit
    if not kept.any():
        failed = f"the hand would hit something at all {row['rejected']} poses beside it; lower the noise"
        return [], {**row, **notes, "failed": failed, "cpu_seconds": round(time.process_time() - began, 2)}
    at = np.broadcast_to(np.arange(steps), (number, steps))[kept]
    pictures = np.where(eye.gripper[..., None], observations["rgb"][at], pictures)
    beyond = np.abs(labels).max(-1) > 1.0
    which = np.broadcast_to(np.arange(number)[:, None], (number, steps))[kept]
    made = []
    for index in range(number):
        mine = np.flatnonzero(which == index)
        if not len(mine):
            continue
        step = at[mine]
        # The last observation of an episode is not acted on; the format has one.
        later, again = np.append(mine, mine[-1]), np.append(step, step[-1])
        seen = {"rgb": pictures[later], "pose": erred[index, again], "remaining": observations["remaining"][again]}
        actions = np.clip(labels[index, step], -1.0, 1.0).astype(np.float32)
        made.append(_steps(episode, seen, actions, step))
    spent = time.process_time() - began - notes.get("aside_seconds", 0.0)
    row |= {"made": int(kept.sum()), "clipped": float(beyond[kept].mean())}
    return made, {**row, **notes, "cpu_seconds": round(spent, 2)}


#: What corrective steps observe.
_SEEN = ("rgb", "pose", "remaining")


def _check(episode: Episode) -> None:
    """Raises ``UserError`` if an episode is no demonstration that can be augmented."""
    observations = episode.observations
    for key in _SEEN:
        if not isinstance(observations, Mapping) or key not in observations:
            found = sorted(observations) if isinstance(observations, Mapping) else type(observations).__name__
            raise UserError(f"a demonstration of seed {episode.seed} observes {found}; {key!r} is needed")
    se3.check(observations["pose"][: approach(episode)], f"the hand's pose in the demonstration of seed {episode.seed}")


def _steps(episode: Episode, observations: dict[str, np.ndarray], actions: np.ndarray, at: np.ndarray) -> Episode:
    length = len(actions)
    truncations = np.zeros(length, bool)
    truncations[-1] = True
    return Episode(
        seed=episode.seed,
        observations=observations,
        actions=actions,
        rewards=np.zeros(length),
        terminations=np.zeros(length, bool),
        truncations=truncations,
        success=episode.success,
        infos={"step": at},
    )


@dataclass(frozen=True)
class _FieldRenderer:
    """See :func:`field_renderer`; an object, so that it goes to worker processes."""

    fit: Callable[..., Any]
    capture: Callable[..., Any]
    eye: EyeInHand
    left_out: int
    grasp: np.ndarray
    options: dict[str, Any]

    def _fitted(self, episode: Episode, at: np.ndarray) -> Any:
        steps = approach(episode)
        hands = episode.observations["pose"]
        masks = np.broadcast_to(~self.eye.gripper, (len(at), *self.eye.gripper.shape))
        views = self.capture(episode.observations["rgb"][at], hands[at] @ self.eye.hand_eye, masks)
        last = hands[steps - 1] @ self.eye.motion(episode.actions[steps - 1])
        return self.fit([views], centre=last[:3, :3] @ self.grasp + last[:3, 3], **self.options)

    def __call__(self, episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        steps = approach(episode)
        notes: dict[str, Any] = {}
        if self.left_out:
            out = np.linspace(1, steps - 2, self.left_out).round().astype(int)
            rest = np.setdiff1d(np.arange(steps), out)
            seen = self._fitted(episode, rest).render(episode.observations["pose"][out] @ self.eye.hand_eye)[0]
            notes["psnr"] = psnr(seen, episode.observations["rgb"][out], ~self.eye.gripper, most=120.0)
        began = time.process_time()
        fields = self._fitted(episode, np.arange(steps))
        fitted = time.process_time()
        look = getattr(fields, "surfaces", None)
        if self.eye.solid is not None and look is not None:
            points = look(episode.observations["pose"][:steps] @ self.eye.hand_eye)[0]
            hands = poses @ se3.inverse(self.eye.hand_eye)
            notes["collides"] = collides(hands, self.eye.solid, points)
        looked = time.process_time()
        pictures = fields.render(poses)[0]
        notes["fit_seconds"] = round(fitted - began, 3)
        notes["render_ms"] = round(1000 * (time.process_time() - looked) / max(len(poses), 1), 2)
        return pictures, notes


def field_renderer(
    fit: Callable[..., Any],
    capture: Callable[..., Any],
    eye: EyeInHand,
    *,
    left_out: int = 0,
    grasp: Any = (0.0, 0.0, 0.1034),
    **options: Any,
) -> Renderer:
    """A renderer that fits a field to each demonstration's own pictures.

    Where the camera knows what the hand fills (``eye.solid``) and the fields know their ``surfaces``, poses at which
    the hand would hit one are dropped.

    Its notes are ``fit_seconds`` and ``render_ms`` (of a picture), processor time, and ``psnr`` if views are left out.

    Args:
        fit: ``fit(captures, centre=, **options)`` gives fields with ``render(poses)``, such as
            ``functools.partial(fleetgym.envs.fields.fit, "voxel")``.
        capture: ``capture(images, poses, masks)`` makes a capture of one scene. For worker processes both must pickle:
            functions at the top of a module, or ``functools.partial`` of such.
        eye: The camera.
        left_out: Views that a second fit leaves out, evenly over the approach, to measure quality on: it doubles the
            cost. 0 measures nothing.
        grasp: Where the fingers close, in the hand's frame [3], metres. The field's centre is there at the pose that
            the last action of the approach commands, as there the object is. (What is observed after it comes too
            late: the hand has lifted the object by then.)
        **options: Of ``fit``.
    """
    return _FieldRenderer(fit, capture, eye, left_out, np.asarray(grasp, np.float64), options)


def spartn(
    demonstrations: Demonstrations,
    eye: EyeInHand,
    render: Renderer,
    *,
    number: int = 6,
    noise: Noise | None = None,
    seed: int = 0,
    folder: str | os.PathLike | None = None,
    workers: int = 1,
    executor: Executor | None = None,
    report: Callable[[int, int, str], None] | None = None,
) -> tuple[Demonstrations, Report]:
    """Demonstrations -> corrective demonstrations. A field that cannot be fitted costs its own demonstration only.

    The result depends neither on the number of workers nor on interruptions.

    Args:
        demonstrations: See :func:`augment`.
        eye: The camera.
        render: See :func:`field_renderer`.
        number: Pictures beside each step.
        noise: Where from.
        seed: Seed of the noise.
        folder: Where each demonstration's pictures are written when they are finished; what is there already is read
            instead of made. It belongs to these demonstrations, noise and seed; use one for each renderer. None keeps
            all in memory.
        workers: Processes that work on a demonstration each; ``render`` must pickle if there are several.
        executor: Takes the place of ``workers``: a ``concurrent.futures`` executor.
        report: Called with (done, of how many, words) after each demonstration.

    Returns:
        The corrective demonstrations alone, and what became of each.

    Raises:
        UserError: See :func:`augment`; not one field could be fitted; the folder belongs to another augmentation; no
            workers, or a renderer that does not pickle.
    """
    noise = noise or Noise()
    if workers < 1:
        raise UserError(f"{workers} workers: at least 1 is needed")
    for episode in demonstrations:
        _check(episode)
    lean = [
        replace(episode, observations={key: episode.observations[key] for key in _SEEN}) for episode in demonstrations
    ]
    place = None if folder is None else Path(folder)
    done: dict[int, tuple[list[Episode], dict[str, Any]]] = {}

    def note(index: int, result: tuple[list[Episode], dict[str, Any]]) -> None:
        done[index] = result
        if report is not None:
            report(len(done), len(lean), str(Report([row for _, row in done.values()])))

    with contextlib.ExitStack() as stack:
        if place is not None:
            settings = {"number": number, "noise": {"kind": type(noise).__name__, **asdict(noise)}, "seed": seed}
            settings["demonstrations"] = [[episode.seed, approach(episode)] for episode in lean]
            stack.enter_context(Run.open(place, settings, resume=True, name="corrective views", tensorboard=False))
            for index, episode in enumerate(lean):
                if (found := _read(place, index, episode)) is not None:
                    note(index, found)
        todo = [index for index in range(len(lean)) if index not in done]
        options = {"number": number, "noise": noise, "seed": seed}
        if executor is None and workers > 1 and len(todo) > 1:
            executor = stack.enter_context(worker_pool(min(workers, len(todo)), wait=False))
        if executor is None:
            for index in todo:
                note(index, _augmented(place, index, lean[index], eye, render, options))
        elif todo:
            check_picklable((eye, render, options), "the renderer", "workers=1")
            futures = {executor.submit(_augmented, place, i, lean[i], eye, render, options): i for i in todo}
            try:
                for future in as_completed(futures):
                    note(futures[future], future.result())
            except BaseException:
                for future in futures:
                    future.cancel()
                raise
    result = Report([done[index][1] for index in range(len(lean))])
    return gathered([one for index in range(len(lean)) for one in done[index][0]], demonstrations, result), result


def _augmented(
    folder: Path | None, index: int, episode: Episode, eye: EyeInHand, render: Renderer, options: Mapping[str, Any]
) -> tuple[list[Episode], dict[str, Any]]:
    """:func:`augment`, and its result is written."""
    made, row = augment(episode, eye, render, **options)
    if folder is not None:
        parts = {
            f"{number}.{name}": torch.from_numpy(np.ascontiguousarray(value))
            for number, one in enumerate(made)
            for name, value in {**one.observations, "action": one.actions, "step": one.infos["step"]}.items()
        }
        with atomic_write(folder / f"{index:05d}.safetensors") as temporary:
            digest = save_tensors(temporary, parts)
        # It comes last, so that its presence says that all is there.
        write_json(folder / f"{index:05d}.json", {"sha256": digest, "row": jsonable(row)})
    return made, row


def _read(folder: Path, index: int, episode: Episode) -> tuple[list[Episode], dict[str, Any]] | None:
    """What :func:`_augmented` has written; None if it has not, or if it is damaged: then it is made again."""
    try:
        note = read_json(folder / f"{index:05d}.json")
        parts = load_tensors(folder / f"{index:05d}.safetensors", sha256=note["sha256"])
        made: dict[int, dict[str, np.ndarray]] = {}
        for name, value in parts.items():
            number, _, key = name.partition(".")
            made.setdefault(int(number), {})[key] = value.numpy()
        return [
            _steps(episode, {key: made[number][key] for key in _SEEN}, made[number]["action"], made[number]["step"])
            for number in sorted(made)
        ], note["row"]
    except (UserError, KeyError, TypeError, ValueError):
        return None


def gathered(episodes: Sequence[Episode], like: Demonstrations, found: Report) -> Demonstrations:
    """Corrective episodes as demonstrations, with the spaces of those that they were made of.

    Raises:
        UserError: There are none; the message says why the first field failed.
    """
    if not episodes:
        reasons = [row["failed"] for row in found.rows if row["failed"]]
        raise UserError(f"none of {len(found.rows)} demonstrations gave corrective pictures; the first: {reasons[:1]}")
    space = like.observation_space
    if isinstance(space, spaces.Dict):
        space = spaces.Dict({key: part for key, part in space.items() if key in _SEEN})
    info = {"augmented": True, "made_of": len(found.rows)}
    return Demonstrations(list(episodes), observation_space=space, action_space=like.action_space, info=info)


@dataclass(frozen=True)
class _HomographyRenderer:
    """See :func:`homography_renderer`."""

    eye: EyeInHand
    focal: float

    def __call__(self, episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        steps, focal = approach(episode), self.focal
        own = episode.observations["pose"][:steps] @ self.eye.hand_eye
        images = episode.observations["rgb"][:steps]
        height, width = images.shape[1:3]
        rows, columns = np.mgrid[:height, :width].astype(np.float64)
        # A ray of the wanted camera; y points up and z backwards.
        rays = np.stack(
            [(columns + 0.5 - width / 2) / focal, -(rows + 0.5 - height / 2) / focal, -np.ones_like(rows)], -1
        )
        out = np.empty((len(poses), height, width, 3), np.uint8)
        for index, wanted in enumerate(poses):
            distances = np.linalg.norm(own[:, :3, 3] - wanted[:3, 3], axis=-1)
            nearest = int(np.argmin(distances))
            turned = rays @ (own[nearest, :3, :3].T @ wanted[:3, :3]).T
            depth = np.maximum(-turned[..., 2], 1e-6)
            column = turned[..., 0] / depth * focal + width / 2 - 0.5
            row = -turned[..., 1] / depth * focal + height / 2 - 0.5
            out[index] = _sampled(images[nearest], row, column)
        return out, {}


def homography_renderer(eye: EyeInHand, focal: float) -> Renderer:
    """A renderer without geometry: it turns the demonstrated pictures about the camera, and nothing else.

    Only the rotation of the nearest demonstrated view's camera to the wanted one is shown, by the homography
    ``K R K^-1``; what lies outside of the picture repeats its border. Translations are not seen at all, so use
    it with errors that turn the camera about itself: :class:`AboutTheEye`.

    Args:
        eye: The camera.
        focal: Focal length, pixels; the principal point is the middle of the picture.
    """
    return _HomographyRenderer(eye, focal)


def _sampled(image: np.ndarray, row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """Bilinear samples of an image [h, w, 3]; beyond its border the border is repeated."""
    height, width = image.shape[:2]
    row, column = np.clip(row, 0, height - 1), np.clip(column, 0, width - 1)
    top, left = np.minimum(row.astype(int), height - 2), np.minimum(column.astype(int), width - 2)
    down, right = (row - top)[..., None], (column - left)[..., None]
    values = image.astype(np.float64)
    upper = values[top, left] * (1 - right) + values[top, left + 1] * right
    lower = values[top + 1, left] * (1 - right) + values[top + 1, left + 1] * right
    return (upper * (1 - down) + lower * down + 0.5).astype(np.uint8)


@dataclass(frozen=True)
class AboutTheEye(Noise):
    """Errors that turn the hand about the camera's own centre: what a homography can show.

    Attributes:
        hand_eye: Pose of the camera in the hand [4, 4].
    """

    hand_eye: np.ndarray = field(default_factory=lambda: np.eye(4))

    def draw(self, rng: np.random.Generator, steps: int, number: int) -> np.ndarray:
        """Errors E = X R X^-1 in the hand's frame, [number, steps, 4, 4]."""
        turned = replace(Noise(), **{name: getattr(self, name) for name in ("rotation", "last", "shrink", "lowest")})
        errors = turned.draw(rng, steps, number)
        errors[..., :3, 3] = 0.0
        return self.hand_eye @ errors @ se3.inverse(self.hand_eye)
