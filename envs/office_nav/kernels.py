"""OfficeNav's dynamics and views for a batch of environments, compiled by numba.

The state of B environments is int64 [16, B]; ``STATE`` names its rows. Codes say what is built in a cell: wall, floor,
sign, door ``k``, office ``k``; they are the same for all buildings of a layout.

What is seen depends on the pose and on which of the doors within the 7 x 7 cells ahead are open, up to the colours of
offices. ``views`` works out all cases once, with MiniGrid's ``process_vis`` done a view row at a time by a table over
(cells seen, cells that let light through). Only some hundreds differ; each is kept as the finished picture, and a step
copies one and paints the offices that are seen in it.
"""

from __future__ import annotations

import functools
import hashlib
from typing import NamedTuple

import numba
import numpy as np

from fleetgym.envs.office_nav import rng, tiles
from fleetgym.envs.office_nav.layout import COLOURS, DIRECTIONS, GOAL, LAYOUTS, Layout
from fleetgym.envs.office_nav.variants import MAX_OFFICES, Tables

#: Rows of the state; the first six are what ``info`` tells. ``SEED`` is the seed's 64 bits; ``DOORS`` has a bit for
#: each open door; ``SERIAL`` counts episodes and tells whether a sign has been drawn already; ``DONE`` is not 0
#: between an episode's last step and the reset.
STATE = ("TRIAL", "EPISODE", "TASK", "SHOWN", "OFFICE", "SUCCESS", "X", "Y", "DIR", "STEP", "LAYOUT", "SPLIT", "SERIAL")
STATE = (*STATE, "SEED", "DONE", "DOORS")
TRIAL, EPISODE, TASK, SHOWN, OFFICE, SUCCESS, X, Y, DIR, STEP, LAYOUT, SPLIT, SERIAL, SEED, DONE, DOORS = range(16)
#: The names of those six in ``info``.
INFO = ("trial", "episode_index", "task_id", "phrase_id", "goal", "success")

VIEW = 7
CODE_WALL, CODE_EMPTY, CODE_SIGN, CODE_DOOR, CODE_OFFICE = 0, 1, 2, 3, 3 + MAX_OFFICES
CODES = CODE_OFFICE + MAX_OFFICES
#: Words of 8 bytes in a row of tiles, and in a sign.
BAND = VIEW * 8 * 3
SIGN_WORDS = 84 * 84 * 3 // 8
LEFT, RIGHT, FORWARD, TOGGLE = 0, 1, 2, 3
#: What is returned for a batch with an action that does not exist, or with a finished row: less this, less the row.
BAD_ACTION, BAD_DONE = -1, -(1 << 40)
SAME_STEP, NEXT_STEP, DISABLED = 0, 1, 2
STEP_REWARD, GOAL_REWARD = -0.05, 1.0

_G, _A, _B = np.uint64(rng.GOLDEN), np.uint64(rng.MIX_A), np.uint64(rng.MIX_B)
_ONE, _30, _27, _31, _32, _8 = (np.uint64(n) for n in (1, 30, 27, 31, 32, 8))
_FLOOR, _AGENT = tiles.FLOOR, tiles.AGENT
_TASK_DRAW, _SIGN_DRAW = rng.TASK, rng.SIGN
_DX, _DY = DIRECTIONS[:, 0].copy(), DIRECTIONS[:, 1].copy()
_TURN = np.array([3, 1, 0, 0, 0])  # by effect
_DOOR_BIT = np.zeros(CODES, np.int64)  # by code
_DOOR_BIT[CODE_DOOR:CODE_OFFICE] = 1 << np.arange(MAX_OFFICES)


def _jit(function):
    """Compiles on the first call, and keeps the result on disk where there is a place for it.

    Numba takes the kept result for as long as this file stays as it is, but the numbers and arrays that a function
    finds in this module are compiled in with it, and some of them come from other files. They and those of the
    functions called are therefore a part of the name under which the result is kept: see ``__qualname__``.
    """
    digest = hashlib.sha256()
    for name in sorted(function.__code__.co_names):
        value = function.__globals__.get(name)
        if isinstance(value, (int, float, tuple, np.generic, np.ndarray)):
            digest.update(f"{name} {np.asarray(value).dtype} {np.asarray(value).tolist()}\n".encode())
        elif hasattr(value, "py_func"):
            digest.update(f"{value.py_func.__qualname__}\n".encode())
    function.__qualname__ += f"_{digest.hexdigest()[:12]}"
    try:
        return numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # no folder that could be written: compile anew in each process
        return numba.njit(nogil=True)(function)


class Rules(NamedTuple):
    """What moves and resets look up; see ``Tables`` and ``world``."""

    cells: np.ndarray  # uint8 [L, cells]: the code of each cell, y * width + x
    widths: np.ndarray  # int64 [L]
    starts: np.ndarray  # int64 [L, 3]
    actions: np.ndarray  # int64 [number of actions]: left, right, forward, toggle, or 4 for no effect
    colours: np.ndarray
    goals: np.ndarray
    layout_of: np.ndarray
    pools: np.ndarray
    pool_start: np.ndarray
    cumulative: np.ndarray
    style_pools: np.ndarray
    style_start: np.ndarray
    limits: np.ndarray  # int64: horizon, episodes, whether signs are text


class Sights(NamedTuple):
    """What views and signs look up; apart from ``Rules``, as every array that is passed takes its time."""

    cells: np.ndarray
    widths: np.ndarray
    colours: np.ndarray
    first: np.ndarray  # int64 [L, cells * 4]: a pose's first case; the others follow, one for each set of open doors
    near: np.ndarray  # int8 [L, cells * 4, doors]: the doors that count, -1 after the last
    which: np.ndarray  # int16 [cases]: the picture of a case
    symbols: np.ndarray  # uint8 [pictures, 147]
    bands: np.ndarray  # int16 [pictures, 7]: their rows of tiles
    pixels: np.ndarray  # uint64 [rows of tiles, 168]
    slots: np.ndarray  # int8 [pictures, offices, 2]: where offices are seen (row * 7 + column) and which, -1 at the end
    paint: np.ndarray  # uint8 [kinds, 3]: the symbols of a tile
    atlas: np.ndarray  # uint64 [kinds, 24]: its pixels
    text: np.ndarray  # uint64 [phrases of all layouts, 2646]; no rows for pictures
    text_start: np.ndarray  # int64 [L]
    base: np.ndarray  # uint8 [L, styles, 84 * 84, 3]; no styles for text
    region: np.ndarray  # int8 [L, styles, 84 * 84]
    palette: np.ndarray  # uint8 [L, styles, 6, 3]
    shade: np.ndarray  # uint8 [L, styles, 84 * 84]


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


class Views(NamedTuple):
    """All that can be seen in a layout, ``P = height * width * 4`` poses ``(y * width + x) * 4 + direction``.

    Attributes:
        first: The number of a pose's first case, int64 [P]. Case ``first + i`` has open the doors
            ``near[pose, bit]`` of the bits that are set in ``i``.
        near: The doors among the 49 cells ahead, int8 [P, doors], -1 after the last.
        which: The picture of each case, int64 [cases].
        cells: The pictures, uint8 [pictures, 49], row by row: a tile kind, or ``OFFICE + k`` for office ``k``; in the
            agent's cell ``AGENT_BIT`` more.
    """

    first: np.ndarray
    near: np.ndarray
    which: np.ndarray
    cells: np.ndarray


#: Numbers in ``Views.cells``.
SEEN_OFFICE, AGENT_BIT = 32, 64


@functools.cache
def views(name: str) -> Views:
    """Works out everything that can be seen in a layout."""
    layout = LAYOUTS[name]
    windows = view_codes(layout).reshape(-1, VIEW * VIEW)
    near = np.full((len(windows), layout.offices), -1, np.int8)
    first = np.zeros(len(windows), np.int64)
    codes, opened, count = [], [], 0
    for pose in np.flatnonzero(np.repeat(~layout.walls.ravel(), 4)):
        window = windows[pose]
        is_door = (window >= CODE_DOOR) & (window < CODE_OFFICE)
        doors = np.unique(window[is_door]) - CODE_DOOR
        near[pose, : len(doors)] = doors
        first[pose] = count
        sets = (np.arange(1 << len(doors))[:, None] >> np.arange(len(doors)) & 1).astype(bool)
        cases = np.zeros((len(sets), VIEW * VIEW), bool)
        cases[:, is_door] = sets[:, np.searchsorted(doors, window[is_door] - CODE_DOOR)]
        codes.append(np.broadcast_to(window, cases.shape))
        opened.append(cases)
        count += len(sets)
    code, is_open = np.concatenate(codes), np.concatenate(opened)
    kinds = np.array([tiles.WALL, tiles.EMPTY, tiles.SIGN, *[tiles.CLOSED] * MAX_OFFICES, *range(32, 32 + MAX_OFFICES)])
    cells = kinds[code].astype(np.uint8)
    cells[is_open] = tiles.OPEN
    clear = ((cells != tiles.WALL) & (cells != tiles.CLOSED)).reshape(-1, VIEW, VIEW) @ (1 << np.arange(VIEW))
    mask = np.full(len(cells), 1 << (VIEW // 2))
    grid = cells.reshape(-1, VIEW, VIEW)
    for row in range(VIEW - 1, -1, -1):
        spread = light_table()[mask << 7 | clear[:, row]].astype(np.int64)
        grid[:, row][(spread[:, None] >> np.arange(VIEW) & 1) == 0] = tiles.UNSEEN
        mask = spread >> 7
    cells[:, VIEW * VIEW - 1 - VIEW // 2] += AGENT_BIT
    pictures, which = np.unique(cells, axis=0, return_inverse=True)
    most = max(1, int((near >= 0).sum(1).max()))
    return Views(first, near[:, :most].copy(), which.reshape(-1), pictures)


@functools.lru_cache(maxsize=16)
def world(tables: Tables) -> tuple[Rules, Sights]:
    """The arrays of a variant's tables, padded and stacked for the kernels."""
    plans = tables.layouts
    most = max(plan.width * plan.height for plan in plans)
    found = [views(plan.name) for plan in plans]
    cells = np.zeros((len(plans), most), np.uint8)
    first = np.zeros((len(plans), most * 4), np.int64)
    near = np.full((len(plans), most * 4, max(view.near.shape[1] for view in found)), -1, np.int8)
    which, seen = [], []
    for index, (plan, view) in enumerate(zip(plans, found)):
        size = plan.width * plan.height
        cells[index, :size] = cell_codes(plan).ravel()
        first[index, : size * 4] = view.first + sum(map(len, which))
        near[index, : size * 4, : view.near.shape[1]] = view.near
        which.append(view.which + sum(map(len, seen)))
        seen.append(view.cells)
    pictures = np.concatenate(seen)
    agent, plain = pictures & AGENT_BIT != 0, pictures & (AGENT_BIT - 1)
    office = plain >= SEEN_OFFICE
    kind = np.where(office, tiles.UNSEEN, plain) + tiles.AGENT * agent
    symbols = tiles.SYMBOLS[kind].reshape(-1, VIEW, VIEW, 3).swapaxes(1, 2)  # MiniGrid's image has x first
    # Pictures share their rows of tiles: a thousand rows of 1344 bytes stay in the cache, the pictures would not.
    rows, bands = np.unique(kind.reshape(-1, VIEW), axis=0, return_inverse=True)
    drawn = np.ascontiguousarray(tiles.atlas()[rows].swapaxes(1, 2))
    slots = np.full((len(pictures), int(office.sum(1).max()) + 1, 2), -1, np.int8)
    for picture in np.flatnonzero(office.any(1)):
        places = np.flatnonzero(office[picture])
        slots[picture, : len(places)] = np.stack([places, plain[picture, places] - SEEN_OFFICE], 1)
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
    widths = np.array([plan.width for plan in plans])
    rules = Rules(
        cells=cells,
        widths=widths,
        starts=np.array([plan.start for plan in plans]),
        actions=actions,
        colours=tables.colours,
        goals=tables.goals,
        layout_of=tables.layout_of,
        pools=tables.pools,
        pool_start=tables.pool_start,
        cumulative=tables.cumulative,
        style_pools=tables.style_pools,
        style_start=tables.style_start,
        limits=np.array([tables.variant.horizon, tables.variant.episodes, int(tables.variant.sign == "text")]),
    )
    sights = Sights(
        cells=cells,
        widths=widths,
        colours=tables.colours,
        first=first,
        near=near,
        which=np.concatenate(which).astype(np.int16),
        symbols=symbols.reshape(len(pictures), -1),
        bands=bands.reshape(-1, VIEW).astype(np.int16),
        pixels=drawn.reshape(len(rows), -1).view(np.uint64),
        slots=slots,
        paint=tiles.SYMBOLS,
        atlas=tiles.atlas().reshape(2 * tiles.KINDS, -1).copy().view(np.uint64),
        text=text,
        text_start=starts,
        base=base,
        region=region,
        palette=palette,
        shade=shade,
    )
    # Plain copies are of one type whatever their source, so that all variants share one compilation.
    return Rules(*(np.array(a, order="C") for a in rules)), Sights(*(np.array(a, order="C") for a in sights))


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
def _begin_trial(w, state, row, task):
    """Begins the trial whose number stands in the state; a negative task is drawn."""
    split = state[SPLIT, row]
    layout = w.layout_of[split]
    if task < 0:
        first = w.pool_start[split]
        drawn = _pick(_bits(state[SEED, row], state[TRIAL, row], 0, _TASK_DRAW), w.pool_start[split + 1] - first)
        task = w.pools[first + drawn]
    state[TASK, row], state[LAYOUT, row], state[OFFICE, row] = task, layout, w.goals[layout, task]
    state[EPISODE, row] = 0


@_jit
def _begin_episode(w, state, row):
    state[EPISODE, row] += 1
    state[SERIAL, row] += 1
    layout, split = state[LAYOUT, row], state[SPLIT, row]
    state[X, row], state[Y, row], state[DIR, row] = w.starts[layout, 0], w.starts[layout, 1], w.starts[layout, 2]
    state[STEP, row] = state[DONE, row] = state[SUCCESS, row] = state[DOORS, row] = 0
    bits = _bits(state[SEED, row], state[TRIAL, row], state[EPISODE, row], _SIGN_DRAW)
    if w.limits[2]:
        low, high, top, office = 0, w.cumulative.shape[2], np.int64(bits >> _8), state[OFFICE, row]
        while low < high:  # the first whose cumulative value exceeds the drawn one
            middle = (low + high) // 2
            if w.cumulative[split, office, middle] > top:
                high = middle
            else:
                low = middle + 1
        state[SHOWN, row] = low
    else:
        first = w.style_start[split]
        state[SHOWN, row] = w.style_pools[first + _pick(bits, w.style_start[split + 1] - first)]


@_jit
def _next_episode(w, state, row):
    """What a reset without arguments does: the trial's next episode, or the next trial's first."""
    if state[EPISODE, row] >= w.limits[1]:
        state[TRIAL, row] += 1
        _begin_trial(w, state, row, -1)
    _begin_episode(w, state, row)


@_jit
def draw_sign(w, layout, shown, task, sign):
    """Draws a sign into 2646 words: a phrase of the layout, or the task's building in a style."""
    if w.text.shape[0] > 0:
        sign[:] = w.text[w.text_start[layout] + shown]
        return
    pixels, colours = sign.view(np.uint8), w.colours[layout, task]
    for pixel in range(84 * 84):
        office = w.region[layout, shown, pixel]
        for channel in range(3):
            if office < 0:
                pixels[3 * pixel + channel] = w.base[layout, shown, pixel, channel]
            else:
                paint = np.int64(w.palette[layout, shown, colours[office], channel])
                shade = np.int64(w.shade[layout, shown, pixel])
                pixels[3 * pixel + channel] = np.uint8((paint * shade + 127) // 255)


@_jit
def _look(w, state, rows, image, words, rgb, on_sign):
    """Writes what the environments ``rows`` see, one after the other, and whether they stand on the sign."""
    cells, first, near, which, slots, paint = w.cells, w.first, w.near, w.which, w.slots, w.paint
    symbols, bands, pixels, atlas, colours, widths = w.symbols, w.bands, w.pixels, w.atlas, w.colours, w.widths
    most = near.shape[2]
    for out, row in enumerate(rows):
        layout, doors = state[LAYOUT, row], state[DOORS, row]
        cell = state[Y, row] * widths[layout] + state[X, row]
        pose = cell * 4 + state[DIR, row]
        case = first[layout, pose]
        if doors:
            for bit in range(most):
                door = near[layout, pose, bit]
                if door < 0:
                    break
                case += (doors >> door & 1) << bit
        picture = which[case]
        if rgb:
            for line in range(VIEW):
                band = bands[picture, line]
                for word in range(BAND):
                    words[out, line * BAND + word] = pixels[band, word]
        else:
            for byte in range(VIEW * VIEW * 3):
                image[out, byte] = symbols[picture, byte]
        slot = 0
        while slots[picture, slot, 0] >= 0:
            place = np.int64(slots[picture, slot, 0])
            kind = np.int64(_FLOOR + colours[layout, state[TASK, row], slots[picture, slot, 1]])
            slot += 1
            y, x = place // VIEW, place % VIEW
            if place == VIEW * VIEW - 1 - VIEW // 2:
                kind += _AGENT
            if rgb:
                for line in range(8):
                    for word in range(3):
                        words[out, (y * 8 + line) * 21 + x * 3 + word] = atlas[kind, line * 3 + word]
            else:
                for channel in range(3):
                    image[out, (x * VIEW + y) * 3 + channel] = paint[kind, channel]
        on_sign[out] = cells[layout, cell] == CODE_SIGN


@_jit
def observe(sights, state, image, words, rgb, sign, drawn, on_sign):
    """Writes the observations of all environments.

    Args:
        sights: The sights.
        state: int64 [16, B].
        image: uint8 [B, 147], or anything 2D for pixels.
        words: uint64 [B, 1176], or anything 2D for symbols.
        rgb: Whether pixels are wanted.
        sign: uint64 [B, 2646]; or no rows, where signs are not wanted.
        drawn: int64 [B]: what ``sign`` holds, an episode's serial or -1 for zeros.
        on_sign: int64 [B].
    """
    _look(sights, state, range(state.shape[1]), image, words, rgb, on_sign)
    for row in range(len(sign)):
        serial = state[SERIAL, row] if on_sign[row] else -1
        if drawn[row] != serial:
            drawn[row] = serial
            if on_sign[row]:
                draw_sign(sights, state[LAYOUT, row], state[SHOWN, row], state[TASK, row], sign[row])
            else:
                sign[row] = 0


@_jit
def step(w, state, actions, mode, rewards, terminated, truncated):
    """Moves every environment.

    Args:
        w: The rules.
        state: int64 [16, B].
        actions: int64 [B].
        mode: ``SAME_STEP``, ``NEXT_STEP`` or ``DISABLED``; in ``NEXT_STEP`` a finished environment is reset instead.
        rewards: float64 [B].
        terminated: bool [B].
        truncated: bool [B].

    Returns:
        How many episodes ended; ``BAD_ACTION - i`` or ``BAD_DONE - i`` if nothing was done, for environment ``i``'s
        sake.
    """
    number, kinds = state.shape[1], len(w.actions)
    for row in range(number):
        if actions[row] < 0 or actions[row] >= kinds:
            return BAD_ACTION - row
        if mode != NEXT_STEP and state[DONE, row]:
            return BAD_DONE - row
    effects, cells, widths, colours, horizon = w.actions, w.cells, w.widths, w.colours, w.limits[0]
    ended = 0
    for row in range(number):
        if state[DONE, row]:
            _next_episode(w, state, row)
            rewards[row], terminated[row], truncated[row] = 0.0, False, False
            continue
        # Without branches, as nobody foresees which action comes next: what an action does not do, it does by 0.
        effect, layout, doors = effects[actions[row]], state[LAYOUT, row], state[DOORS, row]
        direction = (state[DIR, row] + _TURN[effect]) & 3
        dx, dy = _DX[direction], _DY[direction]
        code = np.int64(cells[layout, (state[Y, row] + dy) * widths[layout] + state[X, row] + dx])
        door = _DOOR_BIT[code]
        goes = (effect == FORWARD) & (code != CODE_WALL) & (door & ~doors == 0)
        state[STEP, row] += 1
        state[DIR, row] = direction
        state[X, row] += goes * dx
        state[Y, row] += goes * dy
        state[DOORS, row] = doors ^ door * (effect == TOGGLE)
        reward, done = STEP_REWARD, 0
        if goes & (code >= CODE_OFFICE) and colours[layout, state[TASK, row], code - CODE_OFFICE] == GOAL:
            reward, done = GOAL_REWARD, 1
            state[SUCCESS, row] = 1
        if done == 0 and state[STEP, row] >= horizon:
            done = 2
        state[DONE, row] = done
        rewards[row], terminated[row], truncated[row] = reward, done == 1, done == 2
        ended += done != 0
    return ended


@_jit
def _finish(w, sights, state, ended, rgb, spread):
    """What is seen and told last of the ``ended`` environments that are done, which then are reset.

    Returns:
        Which they are, int64 [ended]; their images, uint8 [ended, bytes]; whether they stand on the sign, int64
        [ended]; the signs of those who do, uint64 [on, 2646]; and their ``info``, int64 [6, ended], or with ``spread``
        that of all environments, int64 [6, B], zeros but for theirs.
    """
    which, on_sign = np.empty(ended, np.int64), np.empty(ended, np.int64)
    place = 0
    for row in range(state.shape[1] if ended else 0):
        if state[DONE, row]:
            which[place] = row
            place += 1
    info = np.zeros((len(INFO), state.shape[1] if spread and ended else ended), np.int64)
    image = np.empty((ended if not rgb else 0, VIEW * VIEW * 3), np.uint8)
    words = np.empty((ended if rgb else 0, VIEW * BAND), np.uint64)
    _look(sights, state, which, image, words, rgb, on_sign)
    signs = np.empty((on_sign.sum(), SIGN_WORDS), np.uint64)
    place = 0
    for out, row in enumerate(which):
        if on_sign[out]:
            draw_sign(sights, state[LAYOUT, row], state[SHOWN, row], state[TASK, row], signs[place])
            place += 1
        for entry in range(len(INFO)):
            info[entry, row if spread else out] = state[entry, row] - (entry == EPISODE)  # an index, from 0
        _next_episode(w, state, row)
    return which, words.view(np.uint8) if rgb else image, on_sign, signs, info


@_jit
def advance(
    w, sights, state, actions, mode, spread, rewards, terminated, truncated, image, words, rgb, sign, drawn, on_sign
):
    """``step``, in ``SAME_STEP`` the reset of what has ended, and ``observe``, whose arguments these are.

    Returns:
        What ``step`` returns; and, of the environments that ended, what ``_finish`` returns (no rows in other modes).
    """
    ended = step(w, state, actions, mode, rewards, terminated, truncated)
    last = _finish(w, sights, state, ended if mode == SAME_STEP and ended > 0 else 0, rgb, spread)
    if ended >= 0:
        observe(sights, state, image, words, rgb, sign, drawn, on_sign)
    return ended, last


@_jit
def reset(w, state, mask, fresh, split, task):
    """Resets environments.

    Args:
        w: The rules.
        state: int64 [16, B].
        mask: bool [B]: which.
        fresh: int64 [B]: 0 goes on with the trial, 1 begins the next one, 2 begins trial 0 (a new seed is in place).
        split: int64 [B]: the split of a trial that begins; negative keeps the present one.
        task: int64 [B]: its task id; negative draws one.
    """
    for row in range(state.shape[1]):
        if not mask[row]:
            continue
        if split[row] >= 0:
            state[SPLIT, row] = split[row]
        if fresh[row]:
            state[TRIAL, row] = 0 if fresh[row] == 2 else state[TRIAL, row] + 1
            _begin_trial(w, state, row, task[row])
            _begin_episode(w, state, row)
        else:
            _next_episode(w, state, row)
