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

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from fleetgym.core import se3
from fleetgym.core.demonstrations import Demonstrations
from fleetgym.core.errors import UserError
from fleetgym.core.rollout import Episode
from fleetgym.core.seeding import generator


@dataclass(frozen=True)
class EyeInHand:
    """A camera that is fixed to the hand, and what an action means.

    Attributes:
        hand_eye: Pose of the camera in the hand [4, 4], OpenGL axes (x right, y up, it looks along -z).
        gripper: [h, w] bool, where the picture shows the gripper.
        translation: Metres that an action of 1 moves the hand by.
        rotation: Radians that an action of 1 turns it by.
    """

    hand_eye: np.ndarray
    gripper: np.ndarray
    translation: float
    rotation: float

    def motion(self, actions: Any) -> np.ndarray:
        """The motions [..., 4, 4] of the hand in its own frame that actions [..., 6] ask for."""
        actions = np.asarray(actions, np.float64)
        return se3.pose(self.translation * actions[..., :3], self.rotation * actions[..., 3:])

    def action(self, motions: Any) -> np.ndarray:
        """The actions [..., 6] that ask for motions [..., 4, 4]; they may be beyond -1..1."""
        translation, vector = se3.parts(motions)
        return np.concatenate([translation / self.translation, vector / self.rotation], axis=-1)


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
            and ``rejected`` (pictures), ``clipped`` (share of labels beyond the limits), ``cpu_seconds``, ``failed``
            (why there are no pictures of it; None if there are).
    """

    rows: list[dict[str, Any]] = field(default_factory=list)

    def __str__(self) -> str:
        made = sum(row["made"] for row in self.rows)
        rejected = sum(row["rejected"] for row in self.rows)
        failed = sum(row["failed"] is not None for row in self.rows)
        known = [row["psnr"] for row in self.rows if row["psnr"] is not None]
        words = f"{len(self.rows)} demonstrations, {made} pictures, {rejected} rejected, {failed} fields failed"
        return words + (f", held-out views {np.mean(known):.1f} dB" if known else "")


#: ``render(episode, poses of the camera [M, 4, 4]) -> pictures [M, h, w, 3] uint8``, and notes on how.
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
        of :class:`Report`.

    Raises:
        UserError: Observations without picture, pose or remaining time; poses that are not rigid.
    """
    began = time.process_time()
    noise = noise or Noise()
    observations = episode.observations
    for key in ("rgb", "pose", "remaining"):
        if not isinstance(observations, Mapping) or key not in observations:
            found = sorted(observations) if isinstance(observations, Mapping) else type(observations).__name__
            raise UserError(f"a demonstration of seed {episode.seed} observes {found}; {key!r} is needed")
    steps = approach(episode)
    hands = se3.check(observations["pose"][:steps], f"the hand's pose in the demonstration of seed {episode.seed}")
    errors = noise.draw(generator("spartn", seed, int(episode.seed or 0)), steps, number)
    erred = hands @ errors
    kept = erred[..., 2, 3] >= noise.lowest
    labels = eye.action(se3.inverse(errors) @ eye.motion(episode.actions[:steps]))
    row = {"seed": episode.seed, "views": steps, "psnr": None, "made": 0, "rejected": 0, "clipped": 0.0, "failed": None}
    try:
        pictures, notes = render(episode, (erred @ eye.hand_eye)[kept])
    except UserError as error:
        return [], {**row, "failed": str(error), "cpu_seconds": round(time.process_time() - began, 2)}
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
        later = np.append(mine, mine[-1])
        seen = {key: values[np.append(step, step[-1])] for key, values in observations.items() if key != "rgb"}
        seen |= {"rgb": pictures[later], "pose": erred[index, np.append(step, step[-1])]}
        actions = np.clip(labels[index, step], -1.0, 1.0).astype(np.float32)
        made.append(_steps(episode, {key: seen[key] for key in observations if key in seen}, actions, step))
    row |= {"made": int(kept.sum()), "rejected": int((~kept).sum()), "clipped": float(beyond[kept].mean())}
    return made, {**row, **notes, "cpu_seconds": round(time.process_time() - began, 2)}


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

    Args:
        fit: ``fit(captures, centre=, **options)`` gives fields with ``render(poses)``, such as
            ``functools.partial(fleetgym.envs.fields.fit, "voxel")``.
        capture: ``capture(images, poses, masks)`` makes a capture of one scene.
        eye: The camera.
        left_out: Views that a second fit leaves out, evenly over the approach, to measure quality on: it doubles the
            cost. 0 measures nothing.
        grasp: Where the fingers close, in the hand's frame [3], metres. The field's centre is there at the pose that
            the last action of the approach commands, as there the object is. (What is observed after it comes too
            late: the hand has lifted the object by then.)
        **options: Of ``fit``.
    """

    def views(episode: Episode, at: np.ndarray) -> Any:
        poses = episode.observations["pose"][at] @ eye.hand_eye
        masks = np.broadcast_to(~eye.gripper, (len(at), *eye.gripper.shape))
        return capture(episode.observations["rgb"][at], poses, masks)

    def fitted(episode: Episode, at: np.ndarray) -> Any:
        steps = approach(episode)
        last = episode.observations["pose"][steps - 1] @ eye.motion(episode.actions[steps - 1])
        return fit([views(episode, at)], centre=last[:3, :3] @ np.asarray(grasp) + last[:3, 3], **options)

    def render(episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        steps = approach(episode)
        notes: dict[str, Any] = {}
        if left_out:
            out = np.linspace(1, steps - 2, left_out).round().astype(int)
            rest = np.setdiff1d(np.arange(steps), out)
            seen = fitted(episode, rest).render(episode.observations["pose"][out] @ eye.hand_eye)[0]
            notes["psnr"] = psnr(seen, episode.observations["rgb"][out], ~eye.gripper)
        return fitted(episode, np.arange(steps)).render(poses)[0], notes

    return render


def psnr(pictures: np.ndarray, wanted: np.ndarray, mask: np.ndarray | None = None) -> float:
    """Peak signal to noise ratio, dB, of pictures [M, h, w, 3] uint8 over the pixels of ``mask`` [h, w] or all."""
    error = ((pictures.astype(np.float64) - wanted) / 255.0) ** 2
    mean = error.mean() if mask is None else error[:, mask].mean()
    return float(-10.0 * np.log10(max(mean, 1e-12)))


def spartn(
    demonstrations: Demonstrations,
    eye: EyeInHand,
    render: Renderer,
    *,
    number: int = 6,
    noise: Noise | None = None,
    seed: int = 0,
    report: Callable[[int, int, str], None] | None = None,
) -> tuple[Demonstrations, Report]:
    """Demonstrations -> corrective demonstrations. A field that cannot be fitted costs its own demonstration only.

    Args:
        demonstrations: See :func:`augment`.
        eye: The camera.
        render: See :func:`field_renderer`.
        number: Pictures beside each step.
        noise: Where from.
        seed: Seed of the noise.
        report: Called with (done, of how many, words) after each demonstration.

    Returns:
        The corrective demonstrations alone, and what became of each.

    Raises:
        UserError: See :func:`augment`; or not one field could be fitted.
    """
    episodes: list[Episode] = []
    found = Report()
    for done, episode in enumerate(demonstrations, start=1):
        made, row = augment(episode, eye, render, number=number, noise=noise, seed=seed)
        episodes += made
        found.rows.append(row)
        if report is not None:
            report(done, len(demonstrations), str(found))
    return gathered(episodes, demonstrations, found), found


def gathered(episodes: Sequence[Episode], like: Demonstrations, found: Report) -> Demonstrations:
    """Corrective episodes as demonstrations with the spaces of those that they were made of.

    Raises:
        UserError: There are none; the message says why the first field failed.
    """
    if not episodes:
        reasons = [row["failed"] for row in found.rows if row["failed"]]
        raise UserError(f"none of {len(found.rows)} demonstrations gave corrective pictures; the first: {reasons[:1]}")
    spaces = {"observation_space": like.observation_space, "action_space": like.action_space}
    return Demonstrations(list(episodes), **spaces, info={"augmented": True, "made_of": len(found.rows)})


def homography_renderer(eye: EyeInHand, focal: float) -> Renderer:
    """A renderer without geometry: it turns the demonstrated pictures about the camera, and nothing else.

    Only the rotation of the nearest demonstrated view's camera to the wanted one is shown, by the homography
    ``K R K^-1``; what lies outside of the picture repeats its border. Translations are not seen at all, so use
    it with errors that turn the camera about itself: :func:`about_the_eye`.

    Args:
        eye: The camera.
        focal: Focal length, pixels; the principal point is the middle of the picture.
    """

    def render(episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        steps = approach(episode)
        own = episode.observations["pose"][:steps] @ eye.hand_eye
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

    return render


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
