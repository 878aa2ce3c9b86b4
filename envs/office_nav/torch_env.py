"""OfficeNav as tensors: every environment's state lies on one device, and a step is a few gathers.

A view depends on the pose and on the doors within sight alone, up to the colours of the offices that an open door
shows. ``_views`` enumerates all of them once for a layout (some thousands, of which only some hundreds differ); a step
copies the environment's view and paints the colours of the offices seen.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav import rng, tiles
from fleetgym.envs.office_nav.layout import DIRECTIONS, GOAL, LAYOUTS, Layout
from fleetgym.envs.office_nav.variants import MAX_OFFICES, Variant, resolve_variant, tables

Tensor = torch.Tensor
#: A cell of a view holds a tile kind, or ``OFFICE + k`` where the office ``k`` is seen, whatever its colour.
OFFICE = 2 * tiles.KINDS
SIZE, AGENT_CELL = 7, 6 * 7 + 3  # cells of a view are numbered row * 7 + column, the agent is at the bottom
TURN_LEFT, TURN_RIGHT, FORWARD, TOGGLE, NOTHING = range(5)
_RELEASED = (TURN_LEFT, TURN_RIGHT, FORWARD, NOTHING, NOTHING, TOGGLE, NOTHING)


# -- Tables -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Views:
    """All that is seen and all that moves in a layout, ``P = height * width * 4`` poses ``(y * width + x) * 4 + dir``.

    Attributes:
        following: The pose after left, right, forward (all doors open) and two actions that do not move, int64 [P, 5].
        door: The bit of the door ahead, or 0, int64 [P].
        office: The bit of the office in which the pose is, or 0, int64 [P].
        first: The number of a pose's first view, int64 [P].
        part: What 6 doors each (bits 0-5, 6-11, 12-17) add to that number, int64 [3, P, 64].
        view: The different view that a numbered view is, int64 [V].
        kinds: Tile kinds of each different view, offices in the colour 0, int64 [U, 49].
        slots: The cells that show offices, -1 at the end, int64 [U, S].
        offices: Which offices those are, int64 [U, S].
    """

    following: np.ndarray
    door: np.ndarray
    office: np.ndarray
    first: np.ndarray
    part: np.ndarray
    view: np.ndarray
    kinds: np.ndarray
    slots: np.ndarray
    offices: np.ndarray


def _visible(transparent: np.ndarray) -> np.ndarray:
    """Which cells are seen, bool ``[V, 7 rows, 7 columns]``, by MiniGrid's rule (``Grid.process_vis``)."""
    seen = np.zeros(transparent.shape, bool)
    seen[:, SIZE - 1, SIZE // 2] = True
    for row in reversed(range(SIZE)):
        for columns, step in ((range(SIZE - 1), 1), (range(SIZE - 1, 0, -1), -1)):
            for column in columns:
                light = seen[:, row, column] & transparent[:, row, column]
                seen[:, row, column + step] |= light
                if row:
                    seen[:, row - 1, column + step] |= light
                    seen[:, row - 1, column] |= light
    return seen


@functools.lru_cache(maxsize=4)
def _views(name: str) -> Views:
    layout = LAYOUTS[name]
    height, width = layout.height, layout.width
    cells = np.full((height + 14, width + 14), tiles.WALL)  # a margin of walls, as MiniGrid has it outside of the grid
    inner = cells[7:-7, 7:-7]
    inner[~layout.walls] = tiles.EMPTY
    inner[layout.sign_xy[1], layout.sign_xy[0]] = tiles.SIGN
    inner[layout.office_xy[:, 1], layout.office_xy[:, 0]] = OFFICE + np.arange(layout.offices)
    doors = np.full(cells.shape, -1)
    doors[7 + layout.door_xy[:, 1], 7 + layout.door_xy[:, 0]] = np.arange(layout.offices)

    poses = height * width * 4
    following = np.tile(np.arange(poses)[:, None], (1, 5))
    door, office = np.zeros(poses, np.int64), np.zeros(poses, np.int64)
    first, part = np.zeros(poses, np.int64), np.zeros((3, poses, 64), np.int64)
    subset = np.arange(64)
    rows, columns = np.mgrid[0:SIZE, 0:SIZE]
    codes, number = [], 0
    for y, x in np.argwhere(~layout.walls):
        for direction in range(4):
            pose = (y * width + x) * 4 + direction
            forward = DIRECTIONS[direction]
            right = DIRECTIONS[(direction + 1) % 4]
            following[pose, TURN_LEFT] = pose - direction + (direction - 1) % 4
            following[pose, TURN_RIGHT] = pose - direction + (direction + 1) % 4
            ahead_x, ahead_y = x + forward[0], y + forward[1]
            if not layout.walls[ahead_y, ahead_x]:
                following[pose, FORWARD] = (ahead_y * width + ahead_x) * 4 + direction
            if doors[7 + ahead_y, 7 + ahead_x] >= 0:
                door[pose] = 1 << doors[7 + ahead_y, 7 + ahead_x]
            if cells[7 + y, 7 + x] >= OFFICE:
                office[pose] = 1 << (cells[7 + y, 7 + x] - OFFICE)
            at_x = 7 + x + forward[0] * (6 - rows) + right[0] * (columns - 3)
            at_y = 7 + y + forward[1] * (6 - rows) + right[1] * (columns - 3)
            code, which = cells[at_y, at_x].copy(), doors[at_y, at_x].copy()
            if which[6, 3] >= 0:  # nobody stands in a door that is closed
                code[6, 3] = tiles.OPEN
            which[6, 3] = -1
            near = np.unique(which[which >= 0])
            for bit, k in enumerate(near):
                part[k // 6, pose] += ((subset >> (k % 6)) & 1) << bit
            first[pose], count = number, 1 << len(near)
            number += count
            stack = np.repeat(code[None], count, 0)
            for bit, k in enumerate(near):
                stack[:, which == k] = np.where((np.arange(count) >> bit) & 1, tiles.OPEN, tiles.CLOSED)[:, None]
            codes.append(stack)
    codes = np.concatenate(codes)
    codes[~_visible((codes != tiles.WALL) & (codes != tiles.CLOSED))] = tiles.UNSEEN
    different, view = np.unique(codes.reshape(-1, SIZE * SIZE), axis=0, return_inverse=True)
    shows = different >= OFFICE
    slots = np.full((len(different), max(1, int(shows.sum(1).max()))), -1)
    for row, shown in enumerate(shows):
        found = np.flatnonzero(shown)
        slots[row, : len(found)] = found
    offices = np.take_along_axis(different, np.maximum(slots, 0), 1) - OFFICE
    kinds = np.where(shows, tiles.FLOOR, different)
    kinds[:, AGENT_CELL] += tiles.AGENT
    return Views(following, door, office, first, part, view.reshape(-1), kinds, slots, offices)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift(value: Tensor, by: int) -> Tensor:
    """A logical shift to the right of 64-bit integers, which torch only has with the sign."""
    return (value >> by) & ((1 << (64 - by)) - 1)


def bits(seed: Tensor, trial: Tensor, episode: Tensor | int, draw: int) -> Tensor:
    """``rng.bits`` on int64 tensors; the sums and products wrap around as those of uint64 do."""
    mixed = torch.zeros_like(seed)
    for key in (seed, trial, episode, draw):
        golden = (key + 1) * (rng.GOLDEN if isinstance(key, int) else _signed(rng.GOLDEN))
        mixed = mixed + (_signed(golden % (1 << 64)) if isinstance(key, int) else golden)
        mixed = (mixed ^ _shift(mixed, 30)) * _signed(rng.MIX_A)
        mixed = (mixed ^ _shift(mixed, 27)) * _signed(rng.MIX_B)
        mixed = mixed ^ _shift(mixed, 31)
    return _shift(mixed, 32)


# -- Environment ------------------------------------------------------------------------------------------------------


class TorchOfficeNav:
    """Many OfficeNav environments as tensors on one device, with the trajectories of the vector environment.

    With the same seeds and actions, observations, rewards and ends equal those of ``gym.make_vec`` to the bit. A step
    waits for the device several times (it asks which rows end an episode, see an office or stand on a sign), and has no
    loop over environments.

    Args:
        num_envs: How many environments.
        device: ``"cpu"``, ``"cuda"``, ...
        variant: An id such as ``"OfficeNav-Symbolic-v0"``, its short form ``"Symbolic"``, or a ``Variant``.
        autoreset: ``"same_step"``: an episode's last step resets that environment and returns the next episode's first
            observation (the last one is in ``info``); ``"next_step"``: the step after it does, whose action is
            ignored; ``"disabled"``: call ``reset(options={"reset_mask": mask})``.
        sign: ``"pixels"``: observations have ``sign``, uint8 ``[B, 84, 84, 3]``, as the other environments have;
            ``"index"``: they have ``sign_index`` instead, int64 ``[B]``, a row of ``sign_pixels``. That saves 21 kB an
            environment, and a network can embed each different sign once.
        split: Where trials come from until ``reset`` names another split.
        **changes: Attributes of the variant to change, such as ``view="symbolic"``.

    Attributes:
        num_envs: How many environments.
        device: Where they are.
        sign_pixels: All signs, uint8 ``[N, 84, 84, 3]``; row 0 is the black one that is seen off the sign's cell.

    Raises:
        UserError: ``num_envs`` below 1, an unknown variant, split or choice, or a device that this machine lacks.
    """

    def __init__(
        self,
        num_envs: int,
        device: str | torch.device = "cpu",
        variant: str | Variant = "OfficeNav-v0",
        *,
        autoreset: str = "same_step",
        sign: str = "pixels",
        split: str = "train",
        **changes: Any,
    ) -> None:
        if isinstance(num_envs, bool) or not isinstance(num_envs, (int, np.integer)) or num_envs < 1:
            raise UserError(f"num_envs {num_envs!r}: it is an integer of at least 1")
        if autoreset not in ("next_step", "same_step", "disabled"):
            raise unknown("autoreset", autoreset, ("next_step", "same_step", "disabled"))
        if sign not in ("pixels", "index"):
            raise unknown("form of signs", sign, ("pixels", "index"))
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
        self.num_envs, self.autoreset, self.sign = int(num_envs), autoreset, sign
        self.variant = resolve_variant(variant, changes)
        self.tables = tables(self.variant)
        self._split = self._default = self.tables.split(split)
        self._rgb = self.variant.view == "rgb"

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(self.num_envs, *shape, dtype=dtype, device=self.device)

        self._seed, self._trial, self._episode = zeros(), zeros(), zeros()
        self._pose, self._doors, self._time = zeros(), zeros(), zeros()
        self._task_id, self._goal, self._shown = zeros(), zeros(), zeros()
        self._blue, self._colours = zeros(), zeros(MAX_OFFICES)
        self._done, self._begun = zeros(dtype=torch.bool), False
        self._sign_now = zeros()
        self._image = zeros(56, 56, 3, dtype=torch.uint8) if self._rgb else zeros(7, 7, 3, dtype=torch.uint8)
        self._sign_image = zeros(84, 84, 3, dtype=torch.uint8) if sign == "pixels" else None
        self._actions = self._on(_RELEASED if self.variant.released else range(4))
        self._layout = self._loaded = -1
        self._enter(int(self.tables.layout_of[self._split]))

    # -- Tables on the device

    def _on(self, array: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.array(array), dtype=dtype, device=self.device)

    def _words_of(self, rows: np.ndarray) -> Tensor:
        return torch.as_tensor(np.array(rows, order="C").view(np.int64), device=self.device)

    def _enter(self, layout: int) -> None:
        """Puts the tables of a layout on the device."""
        if layout == self._layout:
            return
        self._layout, plan = layout, self.tables.layouts[layout]
        self._sign_now = torch.full_like(self._sign_now, -1)
        views = _views(plan.name)
        self._start = (plan.start[1] * plan.width + plan.start[0]) * 4 + plan.start[2]
        self._sign_cell = plan.sign_xy[1] * plan.width + plan.sign_xy[0]
        self._following = self._on(views.following).flatten()
        self._door, self._office = self._on(views.door), self._on(views.office)
        self._first, self._view = self._on(views.first), self._on(views.view)
        parts = (plan.offices + 5) // 6
        self._part = [self._on(part).flatten() for part in views.part[:parts]]
        self._slots = self._on(views.slots)
        self._slot_office = self._on(np.maximum(views.offices, 0))
        if self._rgb:
            # Rows of eight bytes: three of them are one row of a tile.
            self._tiles = self._words_of(tiles.atlas().reshape(2 * tiles.KINDS, 192))
            pictures = tiles.atlas()[views.kinds].reshape(-1, 7, 7, 8, 8, 3).transpose(0, 1, 3, 2, 4, 5)
            self._pictures = self._words_of(pictures.reshape(len(views.kinds), -1))
            row, column = np.divmod(np.arange(49), 7)
            words = (row[:, None, None] * 8 + np.arange(8)[:, None]) * 21 + column[:, None, None] * 3 + np.arange(3)
            self._words = self._on(words.reshape(49, 24))
        else:
            # MiniGrid's arrays are indexed by column first.
            order = np.arange(49).reshape(7, 7).T.ravel()
            symbols = tiles.SYMBOLS[views.kinds][:, order].reshape(len(views.kinds), -1)
            self._pictures = self._on(symbols, torch.uint8)
            self._colour_at = self._on((np.arange(49) % 7 * 7 + np.arange(49) // 7) * 3 + 1)
            self._colour_number = self._on(tiles.SYMBOLS[:, 1], torch.uint8)
        colours = self.tables.colours[layout].astype(np.int64)
        self._colour_table = self._on(colours)
        self._blue_table = self._on(((colours == GOAL) << np.arange(MAX_OFFICES)).sum(1))
        self._goal_table = self._on(self.tables.goals[layout])
        self._load_signs(plan)

    def _load_signs(self, plan: Layout) -> None:
        from fleetgym.envs.office_nav import signs

        if self.variant.sign == "text":
            pixels = signs.text_signs(self.tables.phrases[self._layout])
            self.sign_pixels = torch.as_tensor(np.concatenate([np.zeros_like(pixels[:1]), pixels]), device=self.device)
            return
        if self.sign == "index":
            raise UserError("sign 'index' is for signs of text; a picture shows the building, so take sign='pixels'")
        styles = signs.picture_styles(plan)
        self._base = torch.as_tensor(np.array(styles.base), device=self.device)
        self._region = self._on(styles.region)
        self._palette, self._shade = self._on(styles.palette), self._on(styles.shade)

    def _load_split(self) -> None:
        self._loaded = split = self._split
        self._enter(int(self.tables.layout_of[split]))
        self._pool = self._on(self.tables.pool(split))
        if self.variant.sign == "text":
            self._cumulative = self._on(self.tables.cumulative[split])
        else:
            self._style_pool = self._on(self.tables.styles(split))

    # -- What users call

    def reset(
        self, seed: int | list[int] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Begins a trial (with a seed, at first, or with ``new_trial``) or the trial's next episode everywhere.

        Args:
            seed: Environment ``i`` has the seed ``seed + i``, or ``seed[i]``.
            options: ``task_id``, ``split``, ``new_trial`` as of the other environments, for all at once;
                ``reset_mask``, bool ``[B]``, resets only those.

        Returns:
            Observation and info, as ``step``.

        Raises:
            UserError: Unknown options, splits or tasks, or as many seeds as there are not environments.
        """
        options = dict(options or {})
        for key in options:
            if key not in ("task_id", "split", "new_trial", "reset_mask"):
                raise unknown("option of reset", key, ("task_id", "split", "new_trial", "reset_mask"))
        mask = options.get("reset_mask")
        rows = torch.arange(self.num_envs, device=self.device)
        if mask is not None:
            mask = torch.as_tensor(mask, dtype=torch.bool, device=self.device)
            if mask.shape != (self.num_envs,) or not bool(mask.any()):
                raise UserError(f"reset_mask: it is bool [{self.num_envs}] with at least one True")
            rows = rows[mask]
        new = bool(options.get("new_trial", False)) or seed is not None or not self._begun
        split, task = options.get("split"), options.get("task_id")
        if task is not None or split is not None:
            if mask is not None:
                raise UserError("reset: reset_mask goes with neither split nor task_id, which are for all")
            if task is not None:
                task, self._split = self.tables.check_task(task, split)
            else:
                self._split = self.tables.split(split)
            new = True
        if seed is not None or not self._begun:
            self._set_seeds(seed, rows)
        if seed is not None and split is None and task is None and mask is None:
            self._split = self._default
        if self._loaded != self._split:
            self._load_split()
        fresh = not self._begun or seed is not None
        self._begun = True
        if fresh:
            self._trial[rows] = -1
        self._episode[rows] = self.variant.episodes if new else self._episode[rows]
        self._next_episode(rows, task)
        self._done[rows] = False
        return self._observe(), self._info(torch.zeros_like(self._done))

    def _set_seeds(self, seed: int | list[int] | None, rows: Tensor) -> None:
        if seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0])
        if isinstance(seed, (int, np.integer)) and not isinstance(seed, bool):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = [int(s) for s in seed]
            if len(seeds) != self.num_envs:
                raise UserError(f"{len(seeds)} seeds for {self.num_envs} environments: give one each, or one number")
        if min(seeds) < 0:
            raise UserError(f"seed {min(seeds)}: it is an integer of at least 0")
        self._seed[rows] = self._on([_signed(s % (1 << 64)) for s in seeds])[rows]

    def _next_episode(self, rows: Tensor, task: int | None = None) -> None:
        """Sets rows to the start of the trial's next episode or of the next trial, whose building may be given."""
        seed, episode = self._seed[rows], self._episode[rows] + 1
        new = episode > self.variant.episodes
        trial = self._trial[rows] + new
        episode = torch.where(new, 1, episode)
        drawn = self._pool[(bits(seed, trial, torch.zeros_like(trial), rng.TASK) * len(self._pool)) >> 32]
        task = torch.where(new, drawn if task is None else torch.full_like(trial, task), self._task_id[rows])
        goal = self._goal_table[task]
        drawn = bits(seed, trial, episode, rng.SIGN)
        if self.variant.sign == "text":
            shown = torch.searchsorted(self._cumulative[goal], (drawn >> 8)[:, None], right=True)[:, 0]
        else:
            shown = self._style_pool[(drawn * len(self._style_pool)) >> 32]
        self._trial[rows], self._episode[rows], self._task_id[rows], self._goal[rows] = trial, episode, task, goal
        self._shown[rows] = shown
        self._colours[rows], self._blue[rows] = self._colour_table[task], self._blue_table[task]
        self._pose[rows], self._doors[rows], self._time[rows] = self._start, 0, 0

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Tensor]]:
        """One step of every environment.

        Args:
            actions: Integers ``[B]``: 0 left, 1 right, 2 forward, 3 toggle (of the released variant: its seven).

        Returns:
            Observation, reward (float32 ``[B]``), terminated and truncated (bool ``[B]``), info. The tensors ``image``
            and ``sign`` are written again by the next step: clone what you keep. Info has ``trial``, ``episode``,
            ``task_id``, ``phrase_id``, ``goal`` and ``success``, ``[B]``; with ``"same_step"`` also ``final_rows``
            (int64 ``[ended]``), ``final_obs`` and ``final_info`` of those rows.

        Raises:
            UserError: Before the first reset, or actions of another shape, kind or range.
        """
        if not self._begun:
            raise UserError("step before reset: call reset(seed) first")
        actions = torch.as_tensor(actions, device=self.device)
        if actions.shape != (self.num_envs,) or actions.is_floating_point() or actions.dtype == torch.bool:
            raise UserError(
                f"actions of shape {tuple(actions.shape)} and type {actions.dtype}: they are integers [{self.num_envs}]"
            )
        actions = actions.long()
        number = len(self._actions)
        if self.device.type == "cpu" and bool(((actions < 0) | (actions >= number)).any()):
            raise UserError(f"actions from {int(actions.min())} to {int(actions.max())}: they are 0 to {number - 1}")
        actions = actions.clamp(0, number - 1)
        if self.autoreset == "disabled" and bool(self._done.any()):
            raise UserError(
                f"environment {int(self._done.nonzero()[0])}: its episode has ended; "
                "call reset(options={'reset_mask': terminated | truncated}) first"
            )
        if self.variant.released:
            actions = self._actions[actions]
        pose, doors = self._pose, self._doors
        door = self._door[pose]
        shut = (door & ~doors) != 0
        moved = self._following[pose * 5 + torch.where(shut & (actions == FORWARD), NOTHING, actions.clamp(max=4))]
        return self._after(moved, doors ^ torch.where(actions == TOGGLE, door, 0))

    def _after(self, pose: Tensor, doors: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        ended = self._done
        self._pose, self._doors = pose, doors
        self._time = self._time + 1
        terminated = (self._office[pose] & self._blue) != 0
        truncated = (self._time >= self.variant.horizon) & ~terminated
        reward = torch.where(terminated, 1.0, -0.05)
        if self.autoreset == "next_step":
            terminated, truncated = terminated & ~ended, truncated & ~ended
            reward = torch.where(ended, 0.0, reward)
            self._next_episode(ended.nonzero()[:, 0])
        self._done = terminated | truncated
        if self.autoreset == "same_step":
            rows = self._done.nonzero()[:, 0]
            final = {"final_rows": rows, "final_obs": self._look(rows), "final_info": self._info(terminated, rows)}
            self._next_episode(rows)
            self._done = torch.zeros_like(self._done)
            return self._observe(), reward, terminated, truncated, self._info(self._done) | final
        return self._observe(), reward, terminated, truncated, self._info(terminated)

    def _info(self, success: Tensor, rows: Tensor | None = None) -> dict[str, Any]:
        """Trial and so on as they are now; of some rows, or of all."""
        parts = {
            "trial": self._trial,
            "episode": self._episode,
            "task_id": self._task_id,
            "phrase_id": self._shown,
            "goal": self._goal,
            "success": success,
        }
        return {key: value.clone() if rows is None else value[rows] for key, value in parts.items()}

    # -- What is seen

    def _images(self, pose: Tensor, doors: Tensor, colours: Tensor, image: Tensor) -> None:
        """Writes what is seen from poses into ``image``, ``[N, 56, 56, 3]`` or ``[N, 7, 7, 3]``."""
        number = self._first[pose]
        for index, part in enumerate(self._part):
            number = number + part[pose * 64 + ((doors >> (6 * index)) & 63)]
        view = self._view[number]
        target = image.view(len(pose), -1)
        target = target.view(torch.int64) if self._rgb else target
        torch.index_select(self._pictures, 0, view, out=target)
        # The offices that are seen, all in a row: one question to the device.
        rows, slot = (self._slots[view] >= 0).nonzero(as_tuple=True)
        where = view[rows]
        cell = self._slots[where, slot]
        kind = colours[rows, self._slot_office[where, slot]] + tiles.FLOOR
        kind = torch.where(cell == AGENT_CELL, kind + tiles.AGENT, kind)
        if self._rgb:
            target.view(-1)[rows[:, None] * 1176 + self._words[cell]] = self._tiles[kind]
        else:
            target.view(-1)[rows * 147 + self._colour_at[cell]] = self._colour_number[kind]

    def _on_sign(self, pose: Tensor) -> Tensor:
        return (pose >> 2) == self._sign_cell

    def _look(self, rows: Tensor) -> dict[str, Tensor]:
        """The observation of some rows, as new tensors."""
        pose = self._pose[rows]
        image = torch.empty(len(rows), *self._image.shape[1:], dtype=torch.uint8, device=self.device)
        if len(rows):
            self._images(pose, self._doors[rows], self._colours[rows], image)
        on_sign = self._on_sign(pose)
        observation = {"image": image, "on_sign": on_sign.long()}
        if self.sign == "index":
            return observation | {"sign_index": torch.where(on_sign, self._shown[rows] + 1, 0)}
        return observation | {"sign": self._paint(rows, on_sign)}

    def _observe(self) -> dict[str, Tensor]:
        self._images(self._pose, self._doors, self._colours, self._image)
        on_sign = self._on_sign(self._pose)
        observation = {"image": self._image, "on_sign": on_sign.long()}
        if self.sign == "index":
            return observation | {"sign_index": torch.where(on_sign, self._shown + 1, 0)}
        # Painted where something else hangs there than before: another sign, or the picture of another building.
        index = torch.where(on_sign, (self._shown + 1) * self.tables.tasks + self._task_id, 0)
        rows = (index != self._sign_now).nonzero()[:, 0]
        if len(rows):
            self._sign_now = index
            self._sign_image[rows] = self._paint(rows, on_sign[rows])
        return observation | {"sign": self._sign_image}

    def _paint(self, rows: Tensor, on_sign: Tensor) -> Tensor:
        """What ``sign`` holds for some rows, uint8 ``[rows, 84, 84, 3]``."""
        shape = (len(rows), 84, 84, 3)
        if self.device.type == "cpu":
            image = torch.from_numpy(np.zeros(shape, np.uint8))  # unlike torch.zeros, it touches no page before its use
        else:
            image = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        there = on_sign.nonzero()[:, 0]
        shown = self._shown[rows[there]]
        if self.variant.sign == "text":
            image[there] = self.sign_pixels[shown + 1]
        elif len(there):
            style = shown
            region = self._region[style]
            colour = torch.gather(self._colours[rows[there]], 1, region.clamp(min=0).flatten(1))
            paint = self._palette[style[:, None], colour].view(*region.shape, 3)
            paint = ((paint * self._shade[style][..., None] + 127) // 255).to(torch.uint8)
            image[there] = torch.where(region[..., None] >= 0, paint, self._base[style])
        return image
