"""OfficeNav's dynamics and views as tensors, for accelerators: a step is a few gathers for the whole batch.

Nothing here loops over environments, and all shapes are fixed: what a row does not do is done and not taken. So the
host need not wait for the device to learn which rows an episode ends in, or where an office is seen, except for last
observations and for signs as pixels, which are too large to be written everywhere.

A pose is ``(cell * 4 + direction)`` of a layout, and those of the layouts follow one another, so that rows of different
splits stand side by side. What is seen from where is taken from ``kernels.world``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fleetgym.envs.office_nav import kernels, rng, tiles
from fleetgym.envs.office_nav.layout import COLOURS, DIRECTIONS, GOAL
from fleetgym.envs.office_nav.variants import MAX_OFFICES, Tables
from fleetgym.envs.office_nav.vector import Resets, refuse

Tensor = torch.Tensor
NOTHING = 4  # the effect of an action that has none
AGENT_CELL = 6 * 7 + 3  # cells of a view are numbered row * 7 + column, the agent is at the bottom


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


def _moves(tables: Tables, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """What poses lead to, of layouts whose cells are ``codes`` [L, cells].

    Returns:
        The pose after left, right, forward (all doors open) and two effects that do not move, int64 [L * P, 5]; the
        bit of the door ahead or 0, int64 [L * P]; the bit of the office in which the pose is or 0, int64 [L * P]; and
        whether it is on the sign, bool [L * P].
    """
    layouts, cells = codes.shape
    cell, direction = np.divmod(np.arange(cells * 4), 4)
    here = codes[:, cell].astype(np.int64)
    widths = np.array([plan.width for plan in tables.layouts])[:, None]
    # Nobody stands in an outer wall, beyond which it would lead.
    beyond = np.clip(cell + DIRECTIONS[direction, 0] + DIRECTIONS[direction, 1] * widths, 0, cells - 1)
    ahead = np.take_along_axis(codes, beyond, 1).astype(np.int64)
    stay = np.broadcast_to(cell * 4 + direction, here.shape)
    following = np.stack(
        [
            stay - direction + (direction + 3) % 4,
            stay - direction + (direction + 1) % 4,
            np.where(ahead == kernels.CODE_WALL, stay, beyond * 4 + direction),
            stay,
            stay,
        ],
        2,
    )
    following += (np.arange(layouts) * cells * 4)[:, None, None]
    is_door = (ahead >= kernels.CODE_DOOR) & (ahead < kernels.CODE_OFFICE)
    door = np.where(is_door, 1 << np.maximum(ahead - kernels.CODE_DOOR, 0), 0)
    office = np.where(here >= kernels.CODE_OFFICE, 1 << np.maximum(here - kernels.CODE_OFFICE, 0), 0)
    return following.reshape(-1, 5), door.ravel(), office.ravel(), (here == kernels.CODE_SIGN).ravel()


def _paint_slots(pictures: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where each picture is painted, in as many slots for all: cells, offices and fixed kinds, int64 [pictures, most].

    Slots that are left over repeat the last office. Where none is seen, all repeat what the cell 0 shows anyway: the
    office is -1 then, and the kind is the fixed one.
    """
    plain, agent = pictures & (kernels.AGENT_BIT - 1), pictures & kernels.AGENT_BIT != 0
    kinds = np.where(plain >= kernels.SEEN_OFFICE, 0, plain).astype(np.int64) + tiles.AGENT * agent
    cell, office = np.zeros((len(pictures), most), np.int64), np.full((len(pictures), most), -1)
    for number, picture in enumerate(plain):
        places = np.flatnonzero(picture >= kernels.SEEN_OFFICE)
        if len(places):
            cell[number] = np.pad(places, (0, most - len(places)), mode="edge")
            office[number] = picture[cell[number]] - kernels.SEEN_OFFICE
    return cell, office, np.repeat(kinds[:, :1], most, 1)


class TensorRows:
    """The state of ``number`` environments of a variant as int64 tensors on one device, and how they move.

    Args:
        tables: The variant's tables.
        split: The number of the split that trials come from after a seed.
        number: How many environments.
        device: Where they are.
        sign: ``"pixels"`` or ``"index"``.
        mode: ``"same_step"``, ``"next_step"`` or ``"disabled"``.
        final_obs: Whether, in ``"same_step"``, info has the last observations.
        check: Whether a step looks for what ``kernels.step`` refuses.
    """

    def __init__(
        self,
        tables: Tables,
        split: int,
        number: int,
        device: torch.device,
        sign: str,
        mode: str,
        final_obs: bool,
        check: bool,
    ):
        """Puts the tables on the device; nothing has been reset then."""
        self.tables, self.device, self.number = tables, device, number
        self.mode, self.final_obs, self.index, self.check = mode, final_obs, sign == "index", check
        variant = tables.variant
        self._rgb, self._text = variant.view == "rgb", variant.sign == "text"
        self._load()

        def full(value: int = 0) -> Tensor:
            return torch.full((number,), value, dtype=torch.int64, device=device)

        self.seed, self.trial, self.episode, self.task = full(), full(), full(), full()
        self.split, self.building, self.goal, self.shown = full(split), full(), full(), full()
        self.pose, self.doors, self.time = full(), full(), full()
        self.done, self.success = full().bool(), full().bool()
        self._image = torch.zeros(number, *variant.image_shape, dtype=torch.uint8, device=device)
        self._sign = torch.zeros(0 if self.index else number, 84, 84, 3, dtype=torch.uint8, device=device)
        self._hangs = full()

    # -- Tables on the device

    def _on(self, array: Any, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.as_tensor(np.array(array), dtype=dtype, device=self.device)

    def _load(self) -> None:
        tables, (rules, sights) = self.tables, kernels.world(self.tables)
        layouts, cells = rules.cells.shape
        following, door, office, on_sign = _moves(tables, rules.cells)
        self._following, self._door, self._office = self._on(following).flatten(), self._on(door), self._on(office)
        self._is_sign = self._on(on_sign, torch.bool)
        self._effects = self._on(rules.actions)
        x, y, direction = rules.starts.T
        self._start = self._on((np.arange(layouts) * cells + y * rules.widths + x) * 4 + direction)
        # A door's number, or 63 where there is none: nobody opens the door 63.
        near = sights.near.reshape(layouts * cells * 4, -1).astype(np.int64)
        self._near, self._first = self._on(np.where(near < 0, 63, near)), self._on(sights.first.ravel())
        self._bit = torch.arange(near.shape[1], device=self.device)
        self._picture = self._on(sights.which)
        pictures = np.concatenate([kernels.views(plan.name).cells for plan in tables.layouts])
        slots = _paint_slots(pictures, max(1, sights.slots.shape[1] - 1))
        self._slot_cell, self._slot_office, self._slot_kind = map(self._on, slots)
        if self._rgb:
            words = sights.pixels[sights.bands].reshape(
                len(pictures), -1
            )  # rows of eight bytes: three are a tile's row
            self._pictures, self._tiles = self._on(words.view(np.int64)), self._on(sights.atlas.view(np.int64))
            row, column = np.divmod(np.arange(49), 7)
            words = (row[:, None, None] * 8 + np.arange(8)[:, None]) * 21 + column[:, None, None] * 3 + np.arange(3)
            self._places = self._on(words.reshape(49, 24))
        else:
            # MiniGrid's arrays are indexed by column first.
            self._pictures, self._tiles = self._on(sights.symbols, torch.uint8), self._on(sights.paint, torch.uint8)
            self._places = self._on(((np.arange(49) % 7 * 7 + np.arange(49) // 7) * 3)[:, None] + np.arange(3))
        blue = (tables.colours == GOAL).astype(np.int64) << np.arange(MAX_OFFICES)
        self._blue, self._goals = self._on(blue.sum(2).ravel()), self._on(tables.goals.ravel())
        self._colours = self._on(np.maximum(tables.colours, 0).ravel())
        self._layout_of, self._pools = self._on(tables.layout_of), self._on(tables.pools)
        self._pool_start, self._pool_size = self._on(tables.pool_start[:-1]), self._on(np.diff(tables.pool_start))
        if self._text:
            # One increasing row of all distributions, so that one search serves rows of different splits and goals.
            self._phrases = tables.cumulative.shape[2]
            flat = tables.cumulative.reshape(-1, self._phrases)
            self._cumulative = self._on(flat + (np.arange(len(flat)) * 2 * rng.UNIT)[:, None]).flatten()
            self._text_start = self._on(sights.text_start)
            text = sights.text.view(np.uint8).reshape(-1, 84, 84, 3)
            self.sign_pixels = self._on(np.concatenate([np.zeros_like(text[:1]), text]), torch.uint8)
        else:
            self._styles, self._style_start = self._on(tables.style_pools), self._on(tables.style_start[:-1])
            self._style_size = self._on(np.diff(tables.style_start))
            self._drawn_styles = sights.base.shape[1]
            self._base = self._on(sights.base.reshape(-1, 84 * 84, 3), torch.uint8)
            self._region = self._on(sights.region.reshape(-1, 84 * 84))
            self._palette = self._on(sights.palette.reshape(-1, len(COLOURS), 3))
            self._shade = self._on(sights.shade.reshape(-1, 84 * 84))

    # -- Trials

    def reset(self, resets: Resets, draw_seed: Callable[[], int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Resets as resolved; ``draw_seed`` gives the seeds of rows that never had one."""
        mask, fresh, split = self._on(resets.mask, torch.bool), self._on(resets.fresh), self._on(resets.split)
        seeds = resets.drawn_seeds(draw_seed)
        if len(seeds):
            spread = np.zeros(self.number, np.int64)
            spread[resets.mask & (resets.fresh == 2)] = seeds
            self.seed = torch.where(mask & (fresh == 2), self._on(spread), self.seed)
        self.split = torch.where(mask & (split >= 0), split, self.split)
        self._restart(mask, fresh, self._on(resets.task))
        return self._observe(), self._info()

    def _restart(self, mask: Tensor, fresh: Tensor | None = None, given: Tensor | None = None) -> None:
        """Sets the rows of a mask to the start of the trial's next episode or of the next trial."""
        begins = self.episode >= self.tables.variant.episodes
        if fresh is not None:
            begins = begins | (fresh > 0)
        trial = self.trial + begins
        if fresh is not None:
            trial = torch.where(fresh == 2, 0, trial)
        episode = torch.where(begins, 1, self.episode + 1)
        layout = self._layout_of[self.split]
        # The building's draw is of episode 0, the sign's of this one; both have the number 0 there.
        of_task, of_sign = bits(self.seed, trial, torch.stack([torch.zeros_like(episode), episode]), rng.TASK)
        drawn = self._pools[self._pool_start[self.split] + ((of_task * self._pool_size[self.split]) >> 32)]
        if given is not None:
            drawn = torch.where(given >= 0, given, drawn)
        task = torch.where(begins, drawn, self.task)
        building = layout * self.tables.tasks + task
        goal = self._goals[building]
        if self._text:
            row = self.split * MAX_OFFICES + goal
            sought = (of_sign >> 8) + row * 2 * rng.UNIT
            shown = torch.searchsorted(self._cumulative, sought, right=True) - row * self._phrases
        else:
            shown = self._styles[self._style_start[self.split] + ((of_sign * self._style_size[self.split]) >> 32)]
        for name, value in (
            ("trial", trial),
            ("episode", episode),
            ("task", task),
            ("building", building),
            ("goal", goal),
            ("shown", shown),
            ("pose", self._start[layout]),
            ("doors", torch.zeros_like(trial)),
            ("time", torch.zeros_like(trial)),
            ("done", torch.zeros_like(mask)),
            ("success", torch.zeros_like(mask)),
        ):
            setattr(self, name, torch.where(mask, value, getattr(self, name)))

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment; actions are int64 [number].

        Raises:
            UserError: With ``check``, an action does not exist or an episode has ended. Nothing has moved then.
        """
        if self.check:
            self._refuse(actions)
        actions = actions.clamp(0, len(self._effects) - 1)
        effects, door, ended = self._effects[actions], self._door[self.pose], self.done
        shut = (door & ~self.doors) != 0
        effects = torch.where(shut & (effects == kernels.FORWARD), NOTHING, effects)
        self.pose = self._following[self.pose * 5 + effects]
        self.doors = self.doors ^ torch.where(effects == kernels.TOGGLE, door, 0)
        self.time = self.time + 1
        terminated = (self._office[self.pose] & self._blue[self.building]) != 0
        truncated = (self.time >= self.tables.variant.horizon) & ~terminated
        reward = torch.where(terminated, kernels.GOAL_REWARD, kernels.STEP_REWARD)
        if self.mode == "next_step":
            terminated, truncated = terminated & ~ended, truncated & ~ended
            reward = torch.where(ended, 0.0, reward)
        self.success, self.done = terminated, terminated | truncated
        last: dict[str, Any] = {}
        if self.mode == "same_step":
            ended = self.done
            if self.final_obs:
                rows = ended.nonzero()[:, 0]
                last = {"final_rows": rows, "final_obs": self._look(rows), "final_info": self._info(rows)}
        if self.mode != "disabled":
            self._restart(ended)
        return self._observe(), reward, terminated, truncated, self._info() | last

    def _refuse(self, actions: Tensor) -> None:
        wrong = (actions < 0) | (actions >= len(self._effects))
        over = self.done & (self.mode == "disabled")
        if bool((wrong | over).any()):
            row = int((wrong | over).nonzero()[0])
            code = kernels.BAD_ACTION if bool(wrong[row]) else kernels.BAD_DONE
            refuse(self.tables.variant, code - row, actions.cpu().numpy())

    def _info(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Trial and so on as they are now; of some rows, or of all."""
        values = (self.trial, self.episode - 1, self.task, self.shown, self.goal, self.success)
        return {key: value.clone() if rows is None else value[rows] for key, value in zip(kernels.INFO, values)}

    # -- What is seen

    def _images(self, pose: Tensor, doors: Tensor, building: Tensor, image: Tensor) -> None:
        """Writes what is seen from poses into ``image``, ``[N, 56, 56, 3]`` or ``[N, 7, 7, 3]``."""
        opened = (doors[:, None] >> self._near[pose] & 1) << self._bit
        picture = self._picture[self._first[pose] + opened.sum(1)]
        target = image.view(len(pose), -1)
        target = target.view(torch.int64) if self._rgb else target
        torch.index_select(self._pictures, 0, picture, out=target)
        cell, office = self._slot_cell[picture], self._slot_office[picture]
        kind = tiles.FLOOR + self._colours[building[:, None] * MAX_OFFICES + office.clamp(min=0)]
        kind = torch.where(cell == AGENT_CELL, kind + tiles.AGENT, kind)
        kind = torch.where(office < 0, self._slot_kind[picture], kind)
        target.scatter_(1, self._places[cell].flatten(1), self._tiles[kind].flatten(1))

    def _sign_index(self, on_sign: Tensor, building: Tensor, shown: Tensor) -> Tensor:
        """Which sign is seen: a row of ``sign_pixels``, for pictures a number of their own; 0 for none."""
        if self._text:
            return torch.where(on_sign, self._text_start[building // self.tables.tasks] + shown + 1, 0)
        return torch.where(on_sign, building * self._drawn_styles + shown + 1, 0)

    def _look(self, rows: Tensor) -> dict[str, Tensor]:
        """The observation of some rows, as new tensors."""
        pose, building = self.pose[rows], self.building[rows]
        image = torch.empty(len(rows), *self._image.shape[1:], dtype=torch.uint8, device=self.device)
        if len(rows):
            self._images(pose, self.doors[rows], building, image)
        on_sign = self._is_sign[pose]
        observation = {"image": image, "on_sign": on_sign.long()}
        index = self._sign_index(on_sign, building, self.shown[rows])
        return observation | ({"sign_index": index} if self.index else {"sign": self._paint(index)})

    def _observe(self) -> dict[str, Tensor]:
        self._images(self.pose, self.doors, self.building, self._image)
        on_sign = self._is_sign[self.pose]
        observation = {"image": self._image, "on_sign": on_sign.long()}
        index = self._sign_index(on_sign, self.building, self.shown)
        if self.index:
            return observation | {"sign_index": index}
        rows = (index != self._hangs).nonzero()[:, 0]  # those before whom something else hangs than before
        if len(rows):
            self._sign[rows] = self._paint(index[rows])
        self._hangs = index
        return observation | {"sign": self._sign}

    def _paint(self, index: Tensor) -> Tensor:
        """The pixels of signs by their index, uint8 ``[N, 84, 84, 3]``."""
        if self._text:
            return self.sign_pixels[index]
        image = torch.zeros(len(index), 84 * 84, 3, dtype=torch.uint8, device=self.device)
        there = index.nonzero()[:, 0]
        number = index[there] - 1
        building, shown = number // self._drawn_styles, number % self._drawn_styles
        style = building // self.tables.tasks * self._drawn_styles + shown
        region = self._region[style]
        colour = self._colours[building[:, None] * MAX_OFFICES + region.clamp(min=0)]
        paint = (self._palette[style[:, None], colour] * self._shade[style][..., None] + 127) // 255
        image[there] = torch.where(region[..., None] >= 0, paint.to(torch.uint8), self._base[style])
        return image.view(-1, 84, 84, 3)
