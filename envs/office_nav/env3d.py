"""``OfficeNav3D-v0``: the office that must be read, seen with one's own eyes.

Geometry, actions, horizon and reward follow the released 3D office (``envs/miniworld/office.py`` of
``ezliu/emergent_language``), which does not run any more: it needs a deprecated OpenGL package and meshes that never
were published. Pictures are made by ``raycast`` instead.
"""

from __future__ import annotations

import functools
import math
import operator
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav import glyphs, raycast
from fleetgym.envs.office_nav.raycast import CRATE, OFFICES, RADIUS
from fleetgym.envs.office_nav.rng import SIGN, TASK, UNIT, bits, pick, top24
from fleetgym.envs.office_nav.tiles import ANSI_AGENT
from fleetgym.envs.office_nav.vector import (
    resolve_autoreset_mode,
    resolve_mask,
    resolve_number,
    resolve_options,
    resolve_reset,
    resolve_seeds,
)

HORIZON = 30
EPISODES = 2
ACTIONS = ("left", "right", "forward", "open")
SPLITS = ("train", "test", "phrases", "layout", "style")
#: Interiors: of the training buildings, of the held-out buildings, and of the held-out style.
TRAIN_LOOKS, TEST_LOOKS, STYLE_LOOKS = 50, 10, 10
TRAIN_TASKS, TEST_TASKS = OFFICES * TRAIN_LOOKS, OFFICES * TEST_LOOKS
RELEASED_TASKS = 3
ORDINALS = ("first", "second", "third", "fourth")
#: All phrases, and the index of the office that each means.
PHRASES = (
    *((f"{ordinal} room", index) for index, ordinal in enumerate(ORDINALS)),
    *((f"left of {ORDINALS[index + 1]} room", index) for index in range(OFFICES - 1)),
    *((f"right of {ORDINALS[index - 1]} room", index) for index in range(1, OFFICES)),
)
HELD_OUT = "right of second room"
COLOURS = ("blue", "green", "grey", "purple", "red", "yellow")
_RGB = {
    "blue": (40, 70, 235),
    "green": (40, 190, 60),
    "grey": (150, 150, 150),
    "purple": (150, 50, 200),
    "red": (225, 35, 35),
    "yellow": (235, 215, 50),
}

STATE = np.dtype(
    [
        *((name, np.uint64) for name in ("seed",)),
        *((name, np.int64) for name in ("trial", "episode", "split", "task", "goal", "look", "layout", "phrase")),
        *((name, np.int64) for name in ("doors", "steps", "running")),
        *((name, np.float64) for name in ("x", "z", "heading")),
        ("turns", np.float64, (OFFICES,)),
    ]
)


#: What signs can say, by their number: ``PHRASES``, then nothing.
BLANK = len(PHRASES)
TEXTS = (*(phrase for phrase, _ in PHRASES), "")
#: The office that each sign names, -1 for the blank one.
MEANINGS = np.array([*(office for _, office in PHRASES), -1])
MEANINGS.flags.writeable = False


def resolve(phrase: str) -> int:
    """The office that a phrase means: 0 is the first, leftmost as one faces them.

    Raises:
        UserError: Not one of ``PHRASES``.
    """
    meanings = dict(PHRASES)
    if phrase not in meanings:
        raise unknown("phrase", phrase, meanings)
    return meanings[phrase]


def phrase_number(phrase: str | None) -> int:
    """The number of what a sign is to say: an index into ``TEXTS``, -1 for None.

    Raises:
        UserError: Not a phrase, nor ``""``.
    """
    if phrase is None:
        return -1
    if phrase:
        resolve(phrase)
    return TEXTS.index(phrase)


# ---------------------------------------------------------------------------------------------------- the building


def _scene(shifted: bool, desk: int, couch: int, chair: int) -> raycast.Scene:
    """The released floor plan; ``shifted`` is the held-out one, its sign door and furniture elsewhere."""
    door, board = ((4.0, 8.0), 6.0) if not shifted else ((5.9, 9.9), 7.6)
    rects = [(3.6, 9.6, 0.0, 12.0, 0), (9.6, 10.8, *door, 0), (10.8, 18.6, 0.0, 12.0, 2)]
    links = [(0, 1, 1, *door, -1), (1, 2, 1, *door, OFFICES)]
    half = 0.5 * (door[1] - door[0])
    leaves = [(2, 0, door[0], door[0] - half, OFFICES), (2, 0, door[1], door[1] + half, OFFICES)]
    for office in range(OFFICES):
        centre, opening = office_centre(office)[1], 2.4 * 3 / 7
        low, high, first = centre - opening, centre + opening, len(rects)
        rects += [(3.4, 3.6, low, high, 0), (2.4, 3.4, low, high, 1), (0.0, 2.4, centre - 1.2, centre + 1.2, 1)]
        links += [(0, first, 0, low, high, -1), (first, first + 1, 0, low, high, office)]
        links += [(first + 1, first + 2, 0, low, high, -1)]
        leaves += [(first + 1, side, 3.4, 2.4, office) for side in (2, 3)]
    pieces = [
        ((8.2, 11.2), 1.0, 0.45, 0.62, 0.78, desk),
        ((7.35, 11.2), 0.08, 0.4, 0.0, 0.62, desk),
        ((9.05, 11.2), 0.08, 0.4, 0.0, 0.62, desk),
        ((8.2, 10.05), 0.3, 0.3, 0.0, 0.5, chair),
        ((8.2, 9.75), 0.3, 0.06, 0.5, 1.15, chair),
        ((8.6, 1.3), 0.9, 0.4, 0.0, 0.45, couch),
        ((8.6, 0.85), 0.9, 0.12, 0.45, 1.0, couch),
    ]
    if shifted:
        pieces = [((x, 12.0 - z), *rest) for (x, z), *rest in pieces]
    furniture = [(*at, half_x, half_z, low, high, 0, texture) for at, half_x, half_z, low, high, texture in pieces]
    return raycast.build_scene(rects, links, leaves, furniture, (2, board - 4.2, board + 4.2, 0.05, 2.69))


def office_centre(office: int) -> tuple[float, float]:
    """Where an office's box stands, (x, z) in metres; the first office has the greatest z."""
    return 1.2, 3.0 * (OFFICES - 1 - office) + 1.2


def sign_bitmap(phrase: str) -> np.ndarray:
    """A sign's pixels [22, 70], uint8: the phrase, wrapped at 12 characters, black on white in a frame."""
    bitmap = np.full((22, 70), 255, np.uint8)
    bitmap[[0, -1]] = 60
    bitmap[:, [0, -1]] = 60
    lines = textwrap.wrap(phrase, 12, break_long_words=False)
    top = (22 - glyphs.LINE * len(lines)) // 2 + 1
    for index, line in enumerate(lines):
        ink = glyphs.line_bitmap(line)
        y, x = top + glyphs.LINE * index, (71 - ink.shape[1]) // 2
        bitmap[y : y + ink.shape[0], x : x + ink.shape[1]][ink] = 0
    return bitmap


@dataclass(frozen=True, eq=False)
class World:
    """All that is looked up: the same for all environments.

    Attributes:
        scenes: The released floor plan and the held-out one.
        textures: See ``raycast.pyramid``.
        signs: See ``raycast.sign_tables``; a sign a phrase.
        looks: [looks, 6] textures of the middle room, offices, sign room, floor, ceiling and doors.
        crates: [looks, 4] textures of the goal's box and of the three others.
        starts: [2, 4] x from, to, z from, to of the start on each floor plan.
        names: The names of the textures.
    """

    scenes: tuple[raycast.Scene, raycast.Scene]
    textures: np.ndarray
    signs: np.ndarray
    looks: np.ndarray
    crates: np.ndarray
    starts: np.ndarray
    names: tuple[str, ...]


@functools.cache
def world() -> World:
    """The world, built once a process."""
    pictures: dict[str, np.ndarray] = {}
    groups: dict[str, list[int]] = {}

    def add(group: str, kind: Any, tints: dict[str, tuple[float, float, float]]) -> None:
        for name, tint in tints.items():
            groups.setdefault(group, []).append(len(pictures))
            pictures[f"{name} {kind.__name__}"] = kind(tint)

    add(
        "wall",
        raycast.plaster,
        {
            "green": (150, 190, 140),
            "sand": (222, 202, 160),
            "white": (232, 230, 224),
            "sky": (160, 194, 216),
            "rose": (220, 172, 166),
        },
    )
    add("wall", raycast.brick, {"red": (176, 84, 62), "brown": (140, 104, 80), "pale": (206, 176, 140)})
    add("wall", raycast.planks, {"oak": (186, 142, 94), "walnut": (118, 82, 56)})
    add("style wall", raycast.stripes, {"teal": (96, 170, 170), "violet": (178, 150, 206), "lemon": (228, 220, 130)})
    add("floor", raycast.floor_boards, {"pine": (200, 160, 108), "mahogany": (150, 96, 66), "ash": (176, 166, 150)})
    add("floor", raycast.carpet, {"slate": (96, 108, 124), "moss": (98, 120, 84)})
    add("style floor", raycast.carpet, {"wine": (130, 60, 76), "navy": (60, 72, 130)})
    add("ceiling", raycast.ceiling_tiles, {"white": (214, 214, 208), "cream": (212, 204, 184)})
    add("door", raycast.door_leaf, {"brown": (140, 90, 52), "dark": (96, 66, 48), "light": (196, 156, 108)})
    add("crate", raycast.painted, _RGB)
    add("desk", raycast.planks, {"desk": (170, 112, 66)})
    add("couch", raycast.carpet, {"couch": (70, 96, 150)})
    add("chair", raycast.carpet, {"chair": (64, 64, 70)})

    names = list(pictures)
    crate = {name: names.index(f"{name} painted") for name in COLOURS}
    look = [names.index(f"{name}") for name in ("green plaster", "red brick", "green plaster")]
    look += [groups["floor"][0], groups["ceiling"][0], groups["door"][0]]
    looks, boxes = [tuple(look)], [(crate["blue"], *[crate["red"]] * 3)]
    seen = {looks[0] + boxes[0]}
    number = 0
    while len(looks) < TRAIN_LOOKS + TEST_LOOKS + STYLE_LOOKS:
        random, style = np.random.RandomState(number), len(looks) >= TRAIN_LOOKS + TEST_LOOKS
        number += 1
        of = {"wall": "style wall", "floor": "style floor"} if style else {}
        look = tuple(
            int(random.choice(groups[of.get(group, group)]))
            for group in ("wall", "wall", "wall", "floor", "ceiling", "door")
        )
        box = (crate["blue"], *(crate[COLOURS[random.randint(1, len(COLOURS))]] for _ in range(OFFICES - 1)))
        if look + box not in seen:
            seen.add(look + box)
            looks.append(look)
            boxes.append(box)
    pieces = (groups["desk"][0], groups["couch"][0], groups["chair"][0])
    return World(
        scenes=(_scene(False, *pieces), _scene(True, *pieces)),
        textures=raycast.pyramid(list(pictures.values())),
        signs=raycast.sign_tables(np.stack([sign_bitmap(text) for text in TEXTS])),
        looks=np.array(looks, np.int64),
        crates=np.array(boxes, np.int64),
        starts=np.array([[6.0, 9.0, 4.0, 6.0], [6.0, 9.0, 6.0, 8.0]]),
        names=tuple(names),
    )


@functools.cache
def phrase_table(split: str = "train") -> np.ndarray:
    """How likely each phrase is, by goal: cumulative, [4, phrases], units of 2^-24.

    Half of the draws are direct, half name a neighbour (either as likely), as released; conditioned on the split:
    ``"phrases"`` has only ``HELD_OUT``, ``"all"`` has everything (the released rule), the others all but ``HELD_OUT``.
    """
    weights = np.zeros((OFFICES, len(PHRASES)))
    for index, (phrase, goal) in enumerate(PHRASES):
        neighbours = 1 if goal in (0, OFFICES - 1) else 2
        weight = 0.5 if index < OFFICES else 0.5 / neighbours
        if split == "all" or (phrase == HELD_OUT) == (split == "phrases"):
            weights[goal, index] = weight
    total = weights.sum(1, keepdims=True)
    return np.rint(UNIT * np.cumsum(weights, 1) / np.where(total > 0, total, 1)).astype(np.int64)


# ---------------------------------------------------------------------------------------------------- the rules


@dataclass(frozen=True)
class _Rule:
    """What ``resolve_reset`` asks of a variant."""

    episodes: int = EPISODES


class _Tasks:
    """Task ids and splits; what ``resolve_reset`` asks of tables."""

    variant = _Rule()

    def __init__(self, released: bool) -> None:
        self.released = bool(released)

    def split(self, name: Any) -> int:
        """The number of a split.

        Raises:
            UserError: Unknown split; the message names all.
        """
        allowed = SPLITS[:2] if self.released else SPLITS
        if name not in allowed:
            raise UserError(f"unknown split {name!r}; the splits are {', '.join(allowed)}")
        return SPLITS.index(name)

    def pool(self, split: int) -> np.ndarray:
        """The task ids of a split."""
        if self.released:
            return np.arange(RELEASED_TASKS)
        if SPLITS[split] == "train":
            return np.arange(TRAIN_TASKS)
        held_out = np.arange(TRAIN_TASKS, TRAIN_TASKS + TEST_TASKS)
        return held_out[held_out % OFFICES == resolve(HELD_OUT)] if SPLITS[split] == "phrases" else held_out

    def check_task(self, task: Any, split: Any) -> tuple[int, int]:
        """A task id and the number of its split, which is ``train`` or ``test`` by the id unless named.

        Raises:
            UserError: An impossible task id, an unknown split, or a task id that the split does not have.
        """
        number = None if split is None else self.split(split)
        total = RELEASED_TASKS if self.released else TRAIN_TASKS + TEST_TASKS
        if isinstance(task, (bool, np.bool_)) or not isinstance(task, (int, np.integer)) or not 0 <= task < total:
            raise UserError(f"task_id is {task!r}; it is an integer from 0 to {total - 1}")
        if number is None:
            number = 0 if task in self.pool(0) else 1
        if task not in (pool := self.pool(number)):
            raise UserError(f"task_id {task} is not in split {SPLITS[number]!r}, which has {_ranges(pool)}")
        return int(task), number


class Trials:
    """The states of n environments and all that happens to them; the single environment is n = 1 of the same code.

    Attributes:
        state: [n] of ``STATE``.
        seeded: Which have been reset, bool [n].
        said: What the signs say, whatever is true: index into ``PHRASES`` or ``BLANK``, -1 for the truth; [n].
    """

    def __init__(self, num_envs: int, split: str, released: bool, horizon: int, phrase: str | None) -> None:
        if isinstance(horizon, bool) or not isinstance(horizon, (int, np.integer)) or horizon < 1:
            raise UserError(f"horizon is {horizon!r}; an episode has at least one step")
        self.tasks, self.horizon = _Tasks(released), int(horizon)
        self._fixed = phrase_number(phrase)
        self.state = np.zeros(num_envs, STATE)
        self.state["split"] = self.default = self.tasks.split(split)
        self.seeded = np.zeros(num_envs, bool)
        self.said = np.full(num_envs, self._fixed)
        self._use(world())

    def _use(self, here: World) -> None:
        self.tables = (here.scenes, here.textures, here.signs, here.looks, here.crates)

    def reset(
        self,
        which: np.ndarray,
        seeds: Sequence[int | None],
        options: dict[str, Any] | None,
        draw_seed: Callable[[], int],
    ) -> None:
        """``reset`` of the environments of a mask.

        Args:
            which: bool [n].
            seeds: One an environment; None goes on without one.
            options: ``task_id``, ``split`` and ``phrase`` (one, or one an environment) and ``new_trial``.
            draw_seed: Gives the seed of an environment that never had one.

        Raises:
            UserError: Unknown option, split or phrase, an impossible task id or seed, or options that contradict each
                other. Nothing has been reset then.
        """
        state, options = self.state, dict(options or {})
        phrases = options.pop("phrase", None)
        if phrases is None or isinstance(phrases, str):
            phrases = [phrases] * len(state)
        elif not isinstance(phrases, (list, tuple)) or len(phrases) != len(state):
            raise UserError(f"phrase {phrases!r}: give one, or {len(state)}, one for each environment")
        said = np.array([phrase_number(phrase) for phrase in phrases])
        resets = resolve_reset(self.tasks, self.default, seeds, options, which, self.seeded, lambda: state["episode"])
        begun = which & (resets.fresh == 2)
        state["seed"][begun] = resets.drawn_seeds(draw_seed).view(np.uint64)
        state["trial"][begun], state["episode"][begun] = -1, EPISODES
        self.seeded |= begun
        state["split"] = np.where(resets.split >= 0, resets.split, state["split"])
        self.said[begun] = self._fixed
        self.said = np.where(which & (said >= 0), said, self.said)
        self.begin(which, resets.fresh > 0, resets.task)

    def begin(self, which: np.ndarray, fresh: np.ndarray | None = None, task: np.ndarray | None = None) -> None:
        """Begins the next episode of the environments of a mask: of their trial if it has one left, else of the next.

        Args:
            which: bool [n].
            fresh: bool [n]; a new trial in any case.
            task: [n]; the task id of a new trial, -1 to draw it.
        """
        state, index = self.state, np.flatnonzero(which)
        over = state["episode"][index] >= EPISODES
        if fresh is not None:
            over |= fresh[index]
        made = index[over]
        state["trial"][made] += 1
        state["episode"][made] = 0
        for number in np.unique(state["split"][made]):
            of = made[state["split"][made] == number]
            pool = self.tasks.pool(int(number))
            state["task"][of] = pool[pick(self._bits(of, 0, TASK), len(pool))]
        if task is not None:
            state["task"][made] = np.where(task[made] >= 0, task[made], state["task"][made])
        state["goal"][made] = state["task"][made] % OFFICES
        look = state["task"][made] // OFFICES
        styled = state["split"][made] == SPLITS.index("style")
        state["look"][made] = np.where(styled, TRAIN_LOOKS + TEST_LOOKS + look % STYLE_LOOKS, look)
        state["layout"][made] = state["split"][made] == SPLITS.index("layout")

        state["episode"][index] += 1
        episode = state["episode"][index].astype(np.uint64)
        drawn = top24(self._bits(index, episode, SIGN))
        for number in np.unique(state["split"][index]):
            of = state["split"][index] == number
            table = phrase_table("all" if self.tasks.released else SPLITS[number])[state["goal"][index[of]]]
            state["phrase"][index[of]] = (table > drawn[of, None]).argmax(1)
        state["phrase"][index] = np.where(self.said[index] >= 0, self.said[index], state["phrase"][index])
        starts = world().starts[state["layout"][index]]
        unit = [self._bits(index, episode, SIGN + 1 + place) / 2.0**32 for place in range(3 + OFFICES)]
        state["x"][index] = starts[:, 0] + unit[0] * (starts[:, 1] - starts[:, 0])
        state["z"][index] = starts[:, 2] + unit[1] * (starts[:, 3] - starts[:, 2])
        state["heading"][index] = 2.0 * math.pi * unit[2]
        state["turns"][index] = 2.0 * math.pi * np.stack(unit[3:], 1)
        state["doors"][index], state["steps"][index], state["running"][index] = 0, 0, 1

    def _bits(self, index: np.ndarray, episode: Any, place: int) -> np.ndarray:
        return bits(self.state["seed"][index], self.state["trial"][index], episode, place)

    def draw(self, frames: np.ndarray, which: np.ndarray) -> None:
        """Draws the frames [n, height, width, 3] of those for which ``which`` is true."""
        raycast.pictures(frames, self.state, which, *self.tables)

    def advance(self, frames: np.ndarray, actions: np.ndarray, stepping: np.ndarray) -> tuple[np.ndarray, ...]:
        """Steps those for which ``stepping`` is true and draws all; reward, terminated, truncated."""
        size = len(self.state)
        ends = np.empty(size), np.empty(size, bool), np.empty(size, bool)
        raycast.advance(frames, self.state, actions, stepping, *self.tables, self.horizon, *ends)
        return ends

    def overview(self, index: int, scale: int = 16) -> np.ndarray:
        """The building from above with the agent, RGB [12 * scale, 18.6 * scale, 3]."""
        one = self.state[index]
        scene = world().scenes[one["layout"]]
        height, width = 12 * scale, int(18.6 * scale)
        picture = np.full((height, width, 3), 60, np.uint8)

        def fill(x0: float, x1: float, z0: float, z1: float, colour: tuple[int, int, int]) -> None:
            rows = slice(max(0, round(z0 * scale)), round(z1 * scale))
            picture[rows, max(0, round(x0 * scale)) : round(x1 * scale)] = colour

        for rect in scene.rects:
            fill(*rect, (214, 202, 178))
        for piece in scene.furniture:
            fill(piece[0] - piece[2], piece[0] + piece[2], piece[1] - piece[3], piece[1] + piece[3], (120, 100, 84))
        fill(18.45, 18.6, scene.sign[1], scene.sign[2], (255, 255, 255))
        for door, (x0, z0, x1, z1) in enumerate(scene.doors):
            if not (one["doors"] >> door) & 1:
                fill(x0 - 0.1, x1 + 0.1, z0, z1, (140, 90, 52))
        names, boxes = iter(world().crates[one["look"], 1:]), {}
        for office in range(OFFICES):
            texture = world().crates[one["look"], 0] if office == one["goal"] else next(names)
            boxes[office] = world().textures[texture, -1:].view(np.uint8)[:3]
            x, z = office_centre(office)
            fill(x - CRATE, x + CRATE, z - CRATE, z + CRATE, tuple(boxes[office]))
        z, x = (np.indices((height, width)) + 0.5) / scale
        ahead = (x - one["x"]) * math.cos(one["heading"]) - (z - one["z"]) * math.sin(one["heading"])
        aside = (x - one["x"]) * math.sin(one["heading"]) + (z - one["z"]) * math.cos(one["heading"])
        picture[(ahead > -RADIUS) & (ahead < RADIUS) & (np.abs(aside) < 0.5 * (RADIUS - ahead))] = (220, 30, 30)
        return picture

    def text(self, index: int) -> str:
        """The building from above in characters of 0.3 m by 0.6 m, and below it where the trial stands.

        ``#`` wall, ``D`` closed and ``/`` open door, ``%`` furniture, ``S`` the sign, ``> v < ^`` the agent, and boxes
        by the first letter of their colour (``a`` for grey). The floor plan has x to the right and z downwards: the
        first office is at the bottom.
        """
        one = self.state[index]
        scene = world().scenes[one["layout"]]
        z, x = np.indices((22, 65)).astype(float)
        x, z = 0.3 * x - 0.45, 0.6 * z - 0.3  # the middles of the characters; one of wall all round
        characters = np.full(x.shape, "#")
        for x0, x1, z0, z1 in scene.rects:
            characters[(x > x0) & (x < x1) & (z > z0) & (z < z1)] = " "
        for at_x, at_z, half_x, half_z, *_ in scene.furniture:
            characters[(abs(x - at_x) < half_x + 0.1) & (abs(z - at_z) < half_z + 0.2) & (characters == " ")] = "%"
        characters[(abs(x - 18.75) < 0.2) & (z > scene.sign[1]) & (z < scene.sign[2])] = "S"
        for door, (x0, z0, _, z1) in enumerate(scene.doors):
            there = (abs(x - x0) < 0.15 + 1e-6) & (z > z0) & (z < z1)
            characters[there & (characters == " ")] = "/" if (one["doors"] >> door) & 1 else "D"
        for office, name in enumerate(self.box_colours(index)):
            self._place(characters, *office_centre(office), name[0] if name != "grey" else "a")
        quarter = round(-float(one["heading"]) / (math.pi / 2)) % 4
        self._place(characters, float(one["x"]), float(one["z"]), ANSI_AGENT[quarter])
        degrees = round(math.degrees(float(one["heading"]))) % 360
        return "\n".join(
            [
                *("".join(line) for line in characters),
                f"trial {one['trial']}, episode {one['episode']} of {EPISODES}, step {one['steps']} of {self.horizon}, "
                f"task {one['task']}, at ({one['x']:.1f}, {one['z']:.1f}) looking {degrees} degrees left of east",
                f"sign: {TEXTS[one['phrase']]}",
            ]
        )

    @staticmethod
    def _place(characters: np.ndarray, x: float, z: float, letter: str) -> None:
        characters[round((z + 0.3) / 0.6), round((x + 0.45) / 0.3)] = letter

    def box_colours(self, index: int) -> list[str]:
        """The colours of the boxes of an environment, by office."""
        one = self.state[index]
        others = iter(world().crates[one["look"], 1:])
        first = world().crates[one["look"], 0]
        textures = [first if office == one["goal"] else next(others) for office in range(OFFICES)]
        return [world().names[texture].split()[0] for texture in textures]

    def contrasts(self, which: np.ndarray) -> np.ndarray:
        """How legible the sign is in the frames of a mask: see ``raycast.contrast``; 0 for the others, int64 [n]."""
        counts = np.zeros(len(self.state), np.int64)
        raycast.contrasts(counts, self.state, which, *self.tables, MEANINGS)
        return counts

    def sign_views(self, index: int) -> np.ndarray:
        """An environment's frame with each of ``TEXTS`` on the sign, uint8 [11, 60, 80, 3]."""
        frames = np.empty((len(TEXTS), raycast.HEIGHT, raycast.WIDTH, 3), np.uint8)
        one = self.state[index : index + 1].copy()
        raycast.sign_views(frames, one[0], self.tables[0][int(one["layout"][0])], *self.tables[1:])
        return frames

    def render(self, index: int) -> np.ndarray:
        """The view four times as fine beside the building from above, RGB [240, 692, 3]."""
        frame = np.zeros((1, 4 * raycast.HEIGHT, 4 * raycast.WIDTH, 3), np.uint8)
        raycast.pictures(frame, self.state[index : index + 1], np.ones(1, bool), *self.tables)
        return np.concatenate([frame[0], self.overview(index, 20)], 1)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "tables"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._use(world())


def _ranges(pool: np.ndarray) -> str:
    if pool[-1] - pool[0] == len(pool) - 1:
        return f"{pool[0]} to {pool[-1]}"
    return ", ".join(map(str, pool))


def _wrong_action(action: Any) -> UserError:
    names = ", ".join(f"{index} {name}" for index, name in enumerate(ACTIONS))
    return UserError(f"the action is {action!r}; it is one of {names}")


class OfficeNav3DEnv(gym.Env):
    """Four offices, a blue box in one of them, and a sign in the next room that says in which.

    ## Task

    A trial is two episodes in the same building. The agent stands in the middle room. On its left (west) are the doors
    of four offices, the first on the left as one faces them; in the east a door leads to the sign room, on whose far
    wall hangs a sign with large letters. The blue box stands in one office, boxes of other colours in the others.

    ## Observation

    `Box(0, 255, (60, 80, 3), uint8)`: what the agent sees, RGB, 60 degrees high. The sign is part of the picture and
    can be read from about six metres.

    ## Action

    `Discrete(4)`: 0 turn left by 30 degrees, 1 turn right by 30 degrees, 2 go forward by 0.7 m (not at all where the
    agent, 0.4 m in radius, would touch something), 3 open all doors within 1.6 m.

    ## Reward

    1 when the agent comes within 1.74 m of the middle of the blue box, else 0. Other boxes do nothing.

    ## Termination and truncation

    `terminated` at the blue box, `truncated` at step `horizon` (30).

    ## Trial

    `reset()` goes on with the second episode of the trial, in the same building with doors closed, a start and a phrase
    drawn anew; after that it begins a new trial. `reset(seed=...)` begins trial 0 of that seed, in the split that the
    environment was made with. `options` may have `task_id` (begins a trial in that building; its split is `train` or
    `test` by the id unless `split` says otherwise), `split` (begins a trial of that split, and later ones come from it
    as well, until a seed or another split is given), `new_trial` (True begins a trial, False insists on going on with
    the present one and is an error where that cannot be) and `phrase`: what the sign says from this episode on,
    whatever is true, until a seed or another phrase is given; `""` leaves it blank.

    `info` has `trial` and `episode_index` (both from 0), `task_id`, `phrase`, `phrase_id` (its place among
    `env3d.TEXTS`), `goal` (the office, from 0) and `success`.

    ## Tasks and splits

    A task id is `4 * look + goal`. A look is the material of walls, floor and ceiling and the colours of the other
    boxes; look 0 is the released one (green plaster, brick offices, red boxes).

    | split | buildings | what else |
    |---|---|---|
    | `train` | 0 to 199 | all phrases but "right of second room" |
    | `test` | 200 to 239 | the same phrases |
    | `phrases` | those of `test` with goal 2 | only "right of second room" |
    | `layout` | 200 to 239 | the sign room's door, the sign, the furniture and the start elsewhere |
    | `style` | 200 to 239 | wallpaper and carpets that no other split has |

    `released=True` has the task ids 0 to 2 in `train` and `test` alike, and all phrases: the released code never uses
    the fourth office.

    ## Arguments

    - `render_mode`: None, `"rgb_array"` (the view, four times as fine, beside the building from above) or `"ansi"` (the
      building from above in characters, and what the sign says).
    - `split`: the split to begin with.
    - `released`: tasks and phrases as released.
    - `horizon`: steps after which an episode is truncated.
    - `phrase`: what the sign says, whatever is true; `""` leaves it blank. For tests of whether an agent reads;
      `reset` has an option for one that changes.

    ## Reference scores

    Measured with `reference3d.scores_page(200)`, 200 trials of each split (standard error at most 0.035): mean return
    of the first and of the second episode, and steps of the second. The oracle reads the sign from the pixels and then
    takes the shortest way; the non-reader looks into the offices for the blue box.

    | split | oracle | non-reader | random |
    |---|---|---|---|
    | `train` | 0.520, 1.000 (13.3 steps) | 0.730, 0.995 (13.6 steps) | 0.000, 0.020 |
    | `test` | 0.520, 1.000 (13.1 steps) | 0.750, 0.995 (13.5 steps) | 0.000, 0.020 |
    | `phrases` | 0.605, 1.000 (11.4 steps) | 0.970, 1.000 (11.4 steps) | 0.005, 0.030 |
    | `layout` | 0.405, 1.000 (13.5 steps) | 0.595, 0.995 (14.0 steps) | 0.000, 0.010 |

    Of 500 starts in `test` (`reference3d.reach`) 30 steps are enough to read the sign from all (9.9 steps on average),
    to read it and then go to the box, as in a first episode, from 51.6% (30.4), and to go straight to the box, as in a
    second one, from all (13.3). Under the released reward, then, return does not tell a reader from one who looks into
    the offices. What does is `metrics3d.reading3d`: where the sign names another office the oracle goes there first in
    all of 200 trials, the non-reader in none.

    ## Differences from the released code

    The sign hangs on the wall (x = 18.6) instead of in the air (x = 18); it is drawn with our own letters. Doors and
    furniture are our own models, at the same places; doors are opened by their distance. Phrases and starts come from
    the seed. The look 0 is like the released one; the others are ours.

    ## Version history

    - v0: first version.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 5}

    def __init__(
        self,
        *,
        render_mode: str | None = None,
        split: str = "train",
        released: bool = False,
        horizon: int = HORIZON,
        phrase: str | None = None,
    ) -> None:
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise unknown("render mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.trials = Trials(1, split, released, horizon, phrase)
        self._action, self._one = np.zeros(1, np.int64), np.ones(1, bool)
        self.observation_space = spaces.Box(0, 255, (raycast.HEIGHT, raycast.WIDTH, 3), np.uint8)
        self.action_space = spaces.Discrete(len(ACTIONS))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins the next episode; see the class for which.

        Args:
            seed: Begins a new trial, the first of this seed.
            options: ``task_id``, ``split``, ``new_trial`` and ``phrase``, all optional.

        Raises:
            UserError: Unknown option, task id, split or phrase, or ``new_trial=False`` where no trial can go on.
                Nothing has been reset then.
        """
        self.trials.reset(self._one, [seed], options, lambda: int(self.np_random.integers(1 << 63)))
        if seed is not None:  # known to be good by now
            super().reset(seed=int(seed))
        frame = np.empty((1, *self.observation_space.shape), np.uint8)
        self.trials.draw(frame, self._one)
        return frame[0], self._info(False)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Makes one step.

        Raises:
            UserError: Not an action, no reset before, or the episode has ended. Nothing has moved then.
        """
        try:
            self._action[0] = number = operator.index(action)
        except (TypeError, OverflowError):
            raise _wrong_action(action) from None
        if not 0 <= number < len(ACTIONS) or isinstance(action, bool):
            raise _wrong_action(action)
        if not self.trials.seeded[0]:
            raise UserError("step before reset; call reset() first")
        if not self.trials.state["running"][0]:
            raise UserError("the episode has ended; call reset() before the next step")
        frame = np.empty((1, raycast.HEIGHT, raycast.WIDTH, 3), np.uint8)
        reward, terminated, truncated = self.trials.advance(frame, self._action, self._one)
        done = bool(terminated[0])
        return frame[0], float(reward[0]), done, bool(truncated[0]), self._info(done)

    def _info(self, success: bool) -> dict[str, Any]:
        one = self.trials.state[0]
        return {
            "trial": int(one["trial"]),
            "episode_index": int(one["episode"]) - 1,
            "task_id": int(one["task"]),
            "phrase": TEXTS[one["phrase"]],
            "phrase_id": int(one["phrase"]),
            "goal": int(one["goal"]),
            "success": success,
        }

    @property
    def pose(self) -> tuple[float, float, float]:
        """Where the agent is: x, z (metres) and heading (radians, 0 along +x, growing to the left)."""
        return tuple(float(self.trials.state[name][0]) for name in ("x", "z", "heading"))

    def render(self) -> np.ndarray | str | None:
        """The view beside the building from above, RGB [240, 692, 3], or the building from above in characters.

        Raises:
            UserError: Not reset yet.
        """
        if self.render_mode is None:
            gym.logger.warn("render() without a render_mode; make it with render_mode='rgb_array' or 'ansi'")
            return None
        if not self.trials.seeded[0]:
            raise UserError("render before reset; call reset() first")
        return self.trials.render(0) if self.render_mode == "rgb_array" else self.trials.text(0)

    def sign(self) -> np.ndarray:
        """What hangs at the sign's place in this episode, wherever the agent is; uint8 [88, 280, 3].

        Raises:
            UserError: Not reset yet.
        """
        if not self.trials.seeded[0]:
            raise UserError("sign before reset; call reset() first")
        bitmap = sign_bitmap(TEXTS[self.trials.state["phrase"][0]])
        return np.repeat(bitmap.repeat(4, 0).repeat(4, 1)[..., None], 3, 2)


class OfficeNav3DVectorEnv(VectorEnv):
    """Many ``OfficeNav3DEnv`` in one process; environment ``i`` plays what a single one with its seed would.

    ``infos`` have the same entries as arrays [num_envs], but not ``phrase``. All three autoreset modes are there: after
    an episode's end the next one begins in the same step (the default; ``final_obs`` and ``final_info`` tell how the
    last one ended), in the next step (its action is ignored), or by ``reset(options={"reset_mask": mask})``.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 5}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        render_mode: str | None = None,
        split: str = "train",
        released: bool = False,
        horizon: int = HORIZON,
        phrase: str | None = None,
        max_episode_steps: int | None = None,
    ) -> None:
        self.num_envs = resolve_number(num_envs)
        if max_episode_steps is not None:  # what gym.make_vec calls the horizon
            horizon = max_episode_steps
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise unknown("render mode", render_mode, self.metadata["render_modes"])
        self.render_mode = render_mode
        self.autoreset_mode = resolve_autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.trials = Trials(self.num_envs, split, released, horizon, phrase)
        self._over = np.zeros(self.num_envs, bool)
        self.single_observation_space = spaces.Box(0, 255, (raycast.HEIGHT, raycast.WIDTH, 3), np.uint8)
        self.single_action_space = spaces.Discrete(len(ACTIONS))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._frames = np.zeros(self.observation_space.shape, np.uint8)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins the next episode in all environments, or in those of a mask.

        Args:
            seed: Environment ``i`` gets ``seed + i``, or the ``i``-th of a sequence.
            options: As for the single environment, ``task_id``, ``split`` and ``phrase`` one or one an environment; and
                ``reset_mask``, bool [num_envs], which to reset.

        Raises:
            UserError: As for the single environment; or not one seed or mask entry an environment.
        """
        options = resolve_options(options)
        mask = resolve_mask(options.pop("reset_mask", None), self.trials.seeded)
        seeds = resolve_seeds(seed, self.num_envs)
        self.trials.reset(mask, seeds, options, lambda: int(self.np_random.integers(1 << 63)))
        given = next((int(one) for one in seeds if one is not None), None)
        if given is not None:  # known to be good by now
            super().reset(seed=given)
        self._over[mask] = False
        self._frames = self._frames.copy()  # the caller may still hold the last ones
        self.trials.draw(self._frames, mask)
        return self._frames.copy(), self._infos(mask, np.zeros(self.num_envs, bool))

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Makes one step in all environments.

        Raises:
            UserError: Not as many actions as environments, one that is none, no reset before, or an episode that has
                ended while autoreset is disabled. Nothing has moved then.
        """
        actions = np.asarray(actions)
        if actions.shape != (self.num_envs,) or actions.dtype.kind not in "iu":
            raise UserError(
                f"the actions have shape {actions.shape} and type {actions.dtype}; [{self.num_envs}] integers are due"
            )
        if ((actions < 0) | (actions >= len(ACTIONS))).any():
            raise _wrong_action(int(actions[(actions < 0) | (actions >= len(ACTIONS))][0]))
        again = self._over
        if not self.trials.seeded.all():
            raise UserError("step before reset; call reset() first")
        if self.autoreset_mode == AutoresetMode.DISABLED and again.any():
            raise UserError(
                f"environment {int(again.argmax())}: its episode has ended; "
                f"call reset(options={{'reset_mask': terminated | truncated}}) first"
            )
        everyone = np.ones(self.num_envs, bool)
        if again.any():
            self.trials.begin(again)
        frames = np.empty_like(self._frames)
        reward, terminated, truncated = self.trials.advance(frames, actions.astype(np.int64), ~again)
        self._over = terminated | truncated
        infos: dict[str, Any] = {}
        success = terminated.copy()
        if self.autoreset_mode == AutoresetMode.SAME_STEP and self._over.any():
            final = np.full(self.num_envs, None, object)
            for index in np.flatnonzero(self._over):
                final[index] = frames[index].copy()
            infos = {"final_obs": final, "_final_obs": self._over.copy()}
            infos |= {"final_info": self._infos(self._over, success), "_final_info": self._over.copy()}
            self.trials.begin(self._over)
            self.trials.draw(frames, self._over)
            success[self._over] = False
            self._over = np.zeros(self.num_envs, bool)
        infos |= self._infos(everyone, success)
        self._frames = frames
        return (
            frames.copy() if self.autoreset_mode == AutoresetMode.DISABLED else frames,
            reward,
            terminated,
            truncated,
            infos,
        )

    def _infos(self, which: np.ndarray, success: np.ndarray) -> dict[str, Any]:
        state, infos = self.trials.state, {}
        for name, entry in _INFO.items():
            infos[name] = np.where(which, state[entry] - (entry == "episode"), 0)  # an index, from 0
            infos[f"_{name}"] = which.copy()
        return infos | {"success": success & which, "_success": which.copy()}

    @property
    def pose(self) -> np.ndarray:
        """Where the agents are, float64 [num_envs, 3]: x, z (metres) and heading (radians); a new array."""
        return np.stack([self.trials.state[name] for name in ("x", "z", "heading")], 1)

    def render(self) -> tuple[np.ndarray | str, ...]:
        """A picture or text an environment, as the single environment's ``render``.

        Raises:
            UserError: Made without ``render_mode``, or not reset.
        """
        if self.render_mode is None:
            raise UserError(f"no render_mode; make it with one of {', '.join(self.metadata['render_modes'])}")
        if not self.trials.seeded.all():
            raise UserError("render before reset; call reset() first")
        draw = self.trials.render if self.render_mode == "rgb_array" else self.trials.text
        return tuple(draw(index) for index in range(self.num_envs))


_INFO = {"trial": "trial", "episode_index": "episode", "task_id": "task", "phrase_id": "phrase", "goal": "goal"}
