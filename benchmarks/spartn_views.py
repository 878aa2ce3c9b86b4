"""How good corrective views are: beside what the simulator draws from the same poses, in numbers and in pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetgym.agents.spartn import EyeInHand, Renderer
from fleetgym.core.pictures import psnr
from fleetgym.core.rollout import Episode

JUDGED = 20
"""Views of a demonstration that are compared, at most."""
_MOST = 120.0  # dB of equal pictures
COLUMNS = ("demonstrated", "rendered", "simulator", "difference")
"""Of a contact sheet."""

#: ``views(seed, poses of the camera [M, 4, 4])``: pictures [M, S, S, 3] uint8 without the gripper, and where they show
#: the object [M, S, S] bool.
Views = Callable[[int, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Judged:
    """A renderer that compares some of its pictures with those of the simulator.

    Notes: ``views_psnr`` over all pixels outside of the gripper and ``views_psnr_object`` over those of the object, dB
    (None where no view shows it), and ``aside_seconds``, what the comparison took.

    Attributes:
        render: Whose pictures.
        views: The simulator's.
        gripper: [S, S] bool.
    """

    render: Renderer
    views: Views
    gripper: np.ndarray

    def __call__(self, episode: Episode, poses: np.ndarray) -> tuple[np.ndarray, Mapping[str, Any]]:
        """See :data:`fleetgym.agents.spartn.Renderer`."""
        pictures, notes = self.render(episode, poses)
        began = time.process_time()
        at = np.unique(np.linspace(0, len(poses) - 1, JUDGED).round().astype(int))
        wanted, shown = self.views(episode.seed, poses[at])
        found = {"views_psnr": psnr(pictures[at], wanted, ~self.gripper, _MOST), "views_psnr_object": None}
        shown = shown & ~self.gripper
        if shown.any():
            found["views_psnr_object"] = psnr(pictures[at][shown][None, :], wanted[shown][None, :], most=_MOST)
        return pictures, {**notes, **found, "aside_seconds": time.process_time() - began}


def mean(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """The mean of a note over the rows of a report that have it; None if none has."""
    known = [row[name] for row in rows if row.get(name) is not None]
    return float(np.mean(known)) if known else None


def sheet(
    own: Sequence[Episode],
    corrections: Sequence[Episode],
    eye: EyeInHand,
    views: Views,
    *,
    demonstrations: int = 4,
    each: int = 2,
    pixels: int = 144,
) -> np.ndarray:
    """A contact sheet: what was demonstrated, and what is seen from beside it.

    A row for each of some corrective steps: the demonstrated picture; the rendered one from the erring pose, with the
    gripper pasted; what the simulator draws from there, pasted likewise; the absolute difference of the last two, three
    times as bright.

    Args:
        own: Demonstrations.
        corrections: Their corrective steps.
        eye: The camera.
        views: The simulator's pictures.
        demonstrations: How many to show, evenly spread over those that have corrective steps.
        each: Rows for each, evenly spread over the approach.
        pixels: Least side of a picture on the sheet.

    Returns:
        [h, w, 3] uint8, with the names of the columns above.
    """
    from PIL import Image, ImageDraw

    from fleetgym.core.render import grid

    of_seed: dict[Any, list[Episode]] = {}
    for one in corrections:
        of_seed.setdefault(one.seed, []).append(one)
    with_some = [episode for episode in own if episode.seed in of_seed]
    chosen = np.unique(np.linspace(0, len(with_some) - 1, demonstrations).round().astype(int))
    cells: list[np.ndarray] = []
    for number in chosen:
        episode = with_some[number]
        for row in range(each):
            one = of_seed[episode.seed][row % len(of_seed[episode.seed])]
            at = round((row + 0.5) / each * (one.length - 1))
            step = int(one.infos["step"][at])
            before, rendered = episode.observations["rgb"][step], one.observations["rgb"][at]
            drawn = views(episode.seed, (one.observations["pose"][at] @ eye.hand_eye)[None])[0][0]
            wanted = np.where(eye.gripper[..., None], before, drawn)
            off = np.minimum(3 * np.abs(rendered.astype(int) - wanted), 255).astype(np.uint8)
            cells += [before, rendered, wanted, off]
    times = -(-pixels // cells[0].shape[0])
    pictures = grid([cell.repeat(times, 0).repeat(times, 1) for cell in cells], len(COLUMNS), margin=4)
    head = Image.new("RGB", (pictures.shape[1], 20), (255, 255, 255))
    draw = ImageDraw.Draw(head)
    for column, name in enumerate(COLUMNS):
        draw.text((column * (times * cells[0].shape[1] + 4) + 4, 4), name, fill=(40, 40, 40))
    return np.concatenate([np.asarray(head), pictures])
