"""OfficeNav's dynamics and views for a batch of rows, compiled by numba.

A row is one environment. Its state is one row of integers (``STATE`` names the columns) and one row of tile kinds, one
for each code of a cell. Codes say what is built in a cell: wall, floor, sign, door ``k``, office ``k``; the same for
all buildings of a layout. So the view is one look-up of 49 codes in a table over layout, place and direction, another
of their kinds in the row's tiles, and MiniGrid's ``process_vis`` done a view row at a time by a table over (cells seen,
cells that let light through).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numba
import numpy as np

from fleetgym.envs.office_nav import rng, tiles
from fleetgym.envs.office_nav.layout import COLOURS, DIRECTIONS, GOAL, Layout
from fleetgym.envs.office_nav.variants import MAX_OFFICES, Tables

#: Columns of the state. ``SEED`` is the seed's 64 bits; ``SERIAL`` counts the row's episodes and tells whether a sign
#: has been drawn already; ``DONE`` is set between an episode's last step and the reset.
STATE = ("X", "Y", "DIR", "STEP", "LAYOUT", "SPLIT", "TRIAL", "EPISODE", "TASK", "SHOWN", "OFFICE", "SERIAL", "SEED")
STATE = (*STATE, "DONE", "SUCCESS")
X, Y, DIR, STEP, LAYOUT, SPLIT, TRIAL, EPISODE, TASK, SHOWN, OFFICE, SERIAL, SEED, DONE, SUCCESS = range(len(STATE))
#: Rows of the info block, in this order.
INFO = ("trial", "episode", "task_id", "phrase_id", "goal", "success")

VIEW = 7
CODE_WALL, CODE_EMPTY, CODE_SIGN, CODE_DOOR, CODE_OFFICE = 0, 1, 2, 3, 3 + MAX_OFFICES
CODES = CODE_OFFICE + MAX_OFFICES
SIGN_WORDS = 84 * 84 * 3 // 8
LEFT, RIGHT, FORWARD, TOGGLE = 0, 1, 2, 3
#: What is returned for a batch with an action that does not exist, or with a finished row: less this, less the row.
BAD_ACTION, BAD_DONE = -1, -(1 << 40)
SAME_STEP, NEXT_STEP, DISABLED = 0, 1, 2
STEP_REWARD, GOAL_REWARD = -0.05, 1.0

_G, _A, _B = np.uint64(rng.GOLDEN), np.uint64(rng.MIX_A), np.uint64(rng.MIX_B)
_ONE, _30, _27, _31, _32, _8 = (np.uint64(n) for n in (1, 30, 27, 31, 32, 8))
_UNSEEN, _EMPTY, _WALL, _CLOSED, _OPEN, _FLOOR, _SIGN = (
    tiles.UNSEEN,
    tiles.EMPTY,
    tiles.WALL,
    tiles.CLOSED,
    tiles.OPEN,
    tiles.FLOOR,
    tiles.SIGN,
)
_AGENT = tiles.AGENT
_TASK_DRAW, _SIGN_DRAW = rng.TASK, rng.SIGN
_DX, _DY = DIRECTIONS[:, 0].copy(), DIRECTIONS[:, 1].copy()


def _jit(function):
    """Compiles on the first call, and keeps the result on disk where there is a place for it."""
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that could be written: compile anew in each process
        return numba.njit(nogil=True)(function)


class World(NamedTuple):
    """The tables of a variant as the kernels want them; see ``Tables`` and ``world``."""

    cells: np.ndarray  # uint8 [L, cells]: the code of each cell, y * width + x
    views: np.ndarray  # uint8 [L, cells * 4, 49]: the codes seen, bottom row last, left column first
    widths: np.ndarray  # int64 [L]
    starts: np.ndarray  # int64 [L, 3]
    light: np.ndarray  # uint16 [128 * 128]
    symbols: np.ndarray  # uint8 [kinds, 3]
    atlas: np.ndarray  # uint64 [kinds, 24]
    actions: np.ndarray  # int64 [number of actions]: left, right, forward, toggle, or 4 for no effect
    colours: np.ndarray
    goals: np.ndarray
    layout_of: np.ndarray
    pools: np.ndarray
    pool_start: np.ndarray
    cumulative: np.ndarray
    style_pools: np.ndarray
    style_start: np.ndarray
    text: np.ndarray  # uint64 [phrases of all layouts, 2646]; no rows for pictures
    text_start: np.ndarray  # int64 [L]
    base: np.ndarray  # uint8 [L, styles, 84 * 84, 3]; no styles for text
    region: np.ndarray  # int8 [L, styles, 84 * 84]
    palette: np.ndarray  # uint8 [L, styles, 6, 3]
    shade: np.ndarray  # uint8 [L, styles, 84 * 84]
    limits: np.ndarray  # int64: horizon, episodes


def cell_codes(layout: Layout) -> np.ndarray:
    """What is built in each cell, uint8 [height, width]."""
    codes = np.where(layout.walls, CODE_WALL, CODE_EMPTY).astype(np.uint8)
    for k in range(layout.offices):
        codes[layout.door_xy[k, 1], layout.door_xy[k, 0]] = CODE_DOOR + k
        codes[layout.office_xy[k, 1], layout.office_xy[k, 0]] = CODE_OFFICE + k
    codes[layout.sign_xy[1], layout.sign_xy[0]] = CODE_SIGN
    return codes


def view_codes(layout: Layout) -> np.ndarray:
    """What is built in the 7 x 7 cells in front of every place, uint8 [height, width, 4, 7 (far to near), 7]."""
    codes = cell_codes(layout)
    margin = VIEW  # whatever lies outside is wall, as in MiniGrid
    padded = np.pad(codes, margin, constant_values=CODE_WALL)
    views = np.empty((*codes.shape, 4, VIEW, VIEW), np.uint8)
    y, x = np.indices(codes.shape) + margin
    for direction in range(4):
        ahead, right = DIRECTIONS[direction], DIRECTIONS[(direction + 1) % 4]
        for row in range(VIEW):
            for column in range(VIEW):
                dx, dy = (VIEW - 1 - row) * ahead + (column - VIEW // 2) * right
                views[:, :, direction, row, column] = padded[y + dy, x + dx]
    return views


@functools.cache
def light_table() -> np.ndarray:
    """How sight spreads along a row of the view and to the one beyond: MiniGrid's ``process_vis`` for every case.

    Returns:
        uint16 [128 * 128], index ``seen * 128 + clear`` (bit ``i`` is column ``i``): the cells then seen, plus 128
        times the cells seen in the row beyond.
    """
    table = np.zeros((128, 128), np.uint16)
    for seen in range(128):
        for clear in range(128):
            row, beyond = seen, 0
            for column in range(VIEW - 1):
                if row >> column & clear >> column & 1:
                    row |= 1 << (column + 1)
                    beyond |= 3 << column
            for column in range(VIEW - 1, 0, -1):
                if row >> column & clear >> column & 1:
                    row |= 1 << (column - 1)
                    beyond |= 3 << (column - 1)
            table[seen, clear] = row | beyond << 7
    return table.ravel()


@functools.lru_cache(maxsize=16)
def world(tables: Tables) -> World:
    """The arrays of a variant's tables, padded and stacked for the kernels."""
    plans = tables.layouts
    most = max(plan.width * plan.height for plan in plans)
    cells = np.zeros((len(plans), most), np.uint8)
    views = np.zeros((len(plans), most * 4, VIEW * VIEW), np.uint8)
    for index, plan in enumerate(plans):
        size = plan.width * plan.height
        cells[index, :size] = cell_codes(plan).ravel()
        views[index, : size * 4] = view_codes(plan).reshape(size * 4, -1)
    names = ("left", "right", "forward", "toggle")
    actions = np.array([names.index(name) if name in names else 4 for name in tables.variant.actions])

    from fleetgym.envs.office_nav import signs

    pixels, colours = 84 * 84, len(COLOURS)
    base, region = np.zeros((len(plans), 0, pixels, 3), np.uint8), np.zeros((len(plans), 0, pixels), np.int8)
    palette, shade = np.zeros((len(plans), 0, colours, 3), np.uint8), np.zeros((len(plans), 0, pixels), np.uint8)
    text, starts = np.zeros((0, SIGN_WORDS), np.uint64), np.zeros(len(plans), np.int64)
    if tables.variant.sign == "text":
        images = [signs.text_signs(strings).reshape(len(strings), -1).view(np.uint64) for strings in tables.phrases]
        starts = np.cumsum([0, *map(len, images[:-1])])
        text = np.concatenate(images)
    else:
        styles = [signs.picture_styles(plan.name) for plan in plans]
        base = np.stack([style.base for style in styles]).reshape(len(plans), -1, pixels, 3)
        region = np.stack([style.region for style in styles]).reshape(len(plans), -1, pixels)
        palette = np.stack([style.palette for style in styles])
        shade = np.stack([style.shade for style in styles]).reshape(len(plans), -1, pixels)
    arrays = World(
        cells=cells,
        views=views,
        widths=np.array([plan.width for plan in plans]),
        starts=np.array([plan.start for plan in plans]),
        light=light_table(),
        symbols=tiles.SYMBOLS,
        atlas=tiles.atlas().reshape(2 * tiles.KINDS, -1).copy().view(np.uint64),
        actions=actions,
        colours=tables.colours,
        goals=tables.goals,
        layout_of=tables.layout_of,
        pools=tables.pools,
        pool_start=tables.pool_start,
        cumulative=tables.cumulative,
        style_pools=tables.style_pools,
        style_start=tables.style_start,
        text=text,
        text_start=starts,
        base=base,
        region=region,
        palette=palette,
        shade=shade,
        limits=np.array([tables.variant.horizon, tables.variant.episodes]),
    )
    # One type whatever their source, so that all variants share one compilation.
    copies = [np.array(array, order="C") for array in arrays]
    return World(*copies)


@_jit
def _mix(state, key):
    state = state + _G * (key + _ONE)
    state = (state ^ (state >> _30)) * _A
    state = (state ^ (state >> _27)) * _B
    return state ^ (state >> _31)


@_jit
def _bits(seed, trial, episode, draw):
    state = _mix(np.uint64(0), np.uint64(seed))
    state = _mix(state, np.uint64(trial))
    state = _mix(state, np.uint64(episode))
    state = _mix(state, np.uint64(draw))
    return state >> _32


@_jit
def _pick(bits, size):
    return np.int64((bits * np.uint64(size)) >> _32)


@_jit
def _begin_trial(w, s, kinds, task):
    """Begins the trial whose number stands in the row; a negative task is drawn."""
    layout = w.layout_of[s[SPLIT]]
    if task < 0:
        first = w.pool_start[s[SPLIT]]
        drawn = _pick(_bits(s[SEED], s[TRIAL], 0, _TASK_DRAW), w.pool_start[s[SPLIT] + 1] - first)
        task = w.pools[first + drawn]
    s[TASK], s[LAYOUT], s[OFFICE], s[EPISODE] = task, layout, w.goals[layout, task], 0
    kinds[CODE_WALL], kinds[CODE_EMPTY], kinds[CODE_SIGN] = _WALL, _EMPTY, _SIGN
    for k in range(MAX_OFFICES):
        kinds[CODE_OFFICE + k] = _FLOOR + max(0, w.colours[layout, task, k])


@_jit
def _begin_episode(w, s, kinds):
    s[EPISODE] += 1
    s[SERIAL] += 1
    layout = s[LAYOUT]
    s[X], s[Y], s[DIR] = w.starts[layout, 0], w.starts[layout, 1], w.starts[layout, 2]
    s[STEP] = s[DONE] = s[SUCCESS] = 0
    for k in range(MAX_OFFICES):
        kinds[CODE_DOOR + k] = _CLOSED
    split = s[SPLIT]
    bits = _bits(s[SEED], s[TRIAL], s[EPISODE], _SIGN_DRAW)
    if w.text.shape[0] > 0:
        low, high, top = 0, w.cumulative.shape[2], np.int64(bits >> _8)
        while low < high:  # the first whose cumulative value exceeds the drawn one
            middle = (low + high) // 2
            if w.cumulative[split, s[OFFICE], middle] > top:
                high = middle
            else:
                low = middle + 1
        s[SHOWN] = low
    else:
        first = w.style_start[split]
        s[SHOWN] = w.style_pools[first + _pick(bits, w.style_start[split + 1] - first)]


@_jit
def _next_episode(w, s, kinds):
    """What a reset without arguments does: the trial's next episode, or the next trial's first."""
    if s[EPISODE] >= w.limits[1]:
        s[TRIAL] += 1
        _begin_trial(w, s, kinds, -1)
    _begin_episode(w, s, kinds)


@_jit
def _move(w, s, kinds, action):
    """One step of one row; returns the reward. Sets ``DONE`` to 1 (the goal) or 2 (the horizon)."""
    effect = w.actions[action]
    s[STEP] += 1
    reward = STEP_REWARD
    if effect == LEFT:
        s[DIR] = (s[DIR] + 3) & 3
    elif effect == RIGHT:
        s[DIR] = (s[DIR] + 1) & 3
    elif effect == FORWARD or effect == TOGGLE:
        layout = s[LAYOUT]
        x, y = s[X] + _DX[s[DIR]], s[Y] + _DY[s[DIR]]
        code = w.cells[layout, y * w.widths[layout] + x]
        kind = kinds[code]
        if effect == TOGGLE:
            if kind == _CLOSED:
                kinds[code] = _OPEN
            elif kind == _OPEN:
                kinds[code] = _CLOSED
        elif kind != _WALL and kind != _CLOSED:
            s[X], s[Y] = x, y
            if kind == _FLOOR + GOAL:
                s[DONE] = s[SUCCESS] = 1
                return GOAL_REWARD
    if s[STEP] >= w.limits[0]:
        s[DONE] = 2
    return reward


@_jit
def draw_sign(w, s, sign):
    """Draws the row's sign into 2646 words."""
    if w.text.shape[0] > 0:
        which = w.text_start[s[LAYOUT]] + s[SHOWN]
        for word in range(SIGN_WORDS):
            sign[word] = w.text[which, word]
        return
    layout, style, task = s[LAYOUT], s[SHOWN], s[TASK]
    pixels = sign.view(np.uint8)
    for pixel in range(84 * 84):
        office = w.region[layout, style, pixel]
        for channel in range(3):
            if office < 0:
                pixels[3 * pixel + channel] = w.base[layout, style, pixel, channel]
            else:
                paint = np.int64(w.palette[layout, style, w.colours[layout, task, office], channel])
                shade = np.int64(w.shade[layout, style, pixel])
                pixels[3 * pixel + channel] = np.uint8((paint * shade + 127) // 255)


@_jit
def _look(w, s, kinds, seen, image, words, rgb):
    """Writes what a row sees: 147 bytes of symbols into ``image``, or 1176 words of pixels into ``words``."""
    place = (s[Y] * w.widths[s[LAYOUT]] + s[X]) * 4 + s[DIR]
    codes = w.views[s[LAYOUT], place]
    mask = np.int64(1 << (VIEW // 2))
    for row in range(VIEW - 1, -1, -1):
        clear = 0
        for column in range(VIEW):
            kind = kinds[codes[row * VIEW + column]]
            seen[row * VIEW + column] = kind
            clear |= np.int64(kind != _WALL and kind != _CLOSED) << column
        spread = np.int64(w.light[mask << 7 | clear])
        for column in range(VIEW):
            if not spread >> column & 1:
                seen[row * VIEW + column] = _UNSEEN
        mask = spread >> 7
    seen[VIEW * VIEW - 1 - VIEW // 2] += _AGENT
    if rgb:
        for row in range(VIEW):
            for line in range(8):
                begin = (row * 8 + line) * 21
                for column in range(VIEW):
                    kind = seen[row * VIEW + column]
                    words[begin + 3 * column] = w.atlas[kind, 3 * line]
                    words[begin + 3 * column + 1] = w.atlas[kind, 3 * line + 1]
                    words[begin + 3 * column + 2] = w.atlas[kind, 3 * line + 2]
    else:
        for row in range(VIEW):
            for column in range(VIEW):
                kind = seen[row * VIEW + column]
                place = (column * VIEW + row) * 3  # MiniGrid's image has x first
                image[place] = w.symbols[kind, 0]
                image[place + 1] = w.symbols[kind, 1]
                image[place + 2] = w.symbols[kind, 2]


@_jit
def _show(w, s, kinds, sign, drawn, row):
    """Brings the row's sign up to date; ``drawn`` says what is there: an episode's serial, or -1 for black."""
    on = kinds[w.cells[s[LAYOUT], s[Y] * w.widths[s[LAYOUT]] + s[X]]] == _SIGN
    wanted = s[SERIAL] if on else -1
    if drawn[row] != wanted:
        drawn[row] = wanted
        if on:
            draw_sign(w, s, sign[row])
        else:
            sign[row] = 0
    return on


@_jit
def observe(w, state, kinds, image, words, rgb, sign, drawn, on_sign, info):
    """Writes the observation and info of every row.

    Args:
        w: The world.
        state: int64 [B, columns].
        kinds: uint8 [B, CODES].
        image: uint8 [B, 147], or anything 2D for pixels.
        words: uint64 [B, 1176], or anything 2D for symbols.
        rgb: Whether pixels are wanted.
        sign: uint64 [B, 2646].
        drawn: int64 [B], what ``sign`` holds.
        on_sign: int64 [B].
        info: int64 [6, B].
    """
    seen = np.empty(VIEW * VIEW, np.uint8)
    for row in range(len(state)):
        s = state[row]
        place = row if rgb else 0
        _look(w, s, kinds[row], seen, image[row if not rgb else 0], words[place], rgb)
        on_sign[row] = _show(w, s, kinds[row], sign, drawn, row)
        info[0, row], info[1, row], info[2, row] = s[TRIAL], s[EPISODE], s[TASK]
        info[3, row], info[4, row], info[5, row] = s[SHOWN], s[OFFICE], s[SUCCESS]


@_jit
def step(w, state, kinds, actions, mode, rewards, terminated, truncated):
    """Moves every row.

    Args:
        w: The world.
        state: int64 [B, columns].
        kinds: uint8 [B, CODES].
        actions: int64 [B].
        mode: ``SAME_STEP``, ``NEXT_STEP`` or ``DISABLED``; in ``NEXT_STEP`` a finished row is reset instead.
        rewards: float64 [B].
        terminated: bool [B].
        truncated: bool [B].

    Returns:
        How many rows' episodes ended; ``BAD_ACTION - row`` or ``BAD_DONE - row`` if nothing was done for that row's
        sake.
    """
    for row in range(len(state)):
        if actions[row] < 0 or actions[row] >= len(w.actions):
            return BAD_ACTION - row
        if mode != NEXT_STEP and state[row, DONE]:
            return BAD_DONE - row
    ended = 0
    for row in range(len(state)):
        s = state[row]
        if s[DONE]:
            _next_episode(w, s, kinds[row])
            rewards[row] = 0.0
        else:
            rewards[row] = _move(w, s, kinds[row], actions[row])
        terminated[row] = s[DONE] == 1
        truncated[row] = s[DONE] == 2
        ended += s[DONE] != 0
    return ended


@_jit
def finish(w, state, kinds, image, words, rgb, sign, on_sign, info, which):
    """Writes the last observation and info of the rows that ended, one after the other, and resets those rows.

    Args:
        w: The world.
        state: int64 [B, columns].
        kinds: uint8 [B, CODES].
        image: uint8 [ended, 147], or anything 2D for pixels.
        words: uint64 [ended, 1176], or anything 2D for symbols.
        rgb: Whether pixels are wanted.
        sign: uint64 [ended, 2646], zeros.
        on_sign: int64 [ended].
        info: int64 [6, ended].
        which: int64 [ended], set to the rows.
    """
    seen = np.empty(VIEW * VIEW, np.uint8)
    blank = np.full(len(which), -1)
    place = 0
    for row in range(len(state)):
        s = state[row]
        if not s[DONE]:
            continue
        which[place] = row
        _look(w, s, kinds[row], seen, image[place if not rgb else 0], words[place if rgb else 0], rgb)
        on_sign[place] = _show(w, s, kinds[row], sign, blank, place)
        info[0, place], info[1, place], info[2, place] = s[TRIAL], s[EPISODE], s[TASK]
        info[3, place], info[4, place], info[5, place] = s[SHOWN], s[OFFICE], s[SUCCESS]
        place += 1
        _next_episode(w, s, kinds[row])


@_jit
def reset(w, state, kinds, mask, fresh, split, task):
    """Resets rows.

    Args:
        w: The world.
        state: int64 [B, columns].
        kinds: uint8 [B, CODES].
        mask: bool [B]: the rows to reset.
        fresh: int64 [B]: 0 goes on with the trial, 1 begins the next one, 2 begins trial 0 (a new seed is in place).
        split: int64 [B]: the split of a trial that begins; negative keeps the row's.
        task: int64 [B]: its task id; negative draws one.
    """
    for row in range(len(state)):
        if not mask[row]:
            continue
        s = state[row]
        if split[row] >= 0:
            s[SPLIT] = split[row]
        if fresh[row]:
            s[TRIAL] = 0 if fresh[row] == 2 else s[TRIAL] + 1
            _begin_trial(w, s, kinds[row], task[row])
            _begin_episode(w, s, kinds[row])
        else:
            _next_episode(w, s, kinds[row])
