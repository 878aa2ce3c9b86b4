"""Policies that bound what an agent can reach in OfficeNav, and their exact scores.

- *Oracle*: knows the goal and takes a shortest path. It is what a perfect reader reaches in the second episode.
- *Non-reader*: opens doors in the first episode, goes in the second to the nearest goal that it saw, or searches the
  doors that it did not open. ``non_reader.best_non_reader`` shows that nothing better is possible without the sign.
- *Random*: every action alike.

``oracle_score`` and ``non_reader_score`` are exact: sums over all buildings of shortest paths, no sampling.
``random_score`` is a sum over all that a random walk can do.
``OracleReader`` and ``NonReader`` are the same policies as something that plays, from observations alone.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav.layout import COLOURS, DIRECTIONS, HORIZON, Layout
from fleetgym.envs.office_nav.layout import layout as named

LEFT, RIGHT, FORWARD, TOGGLE = range(4)
STEP_REWARD = -0.05
Pose = tuple[int, int, int]


def episode_return(steps: int | None, horizon: int = HORIZON) -> float:
    """The return of an episode that enters the goal with its ``steps``-th action; None or too many: it never does."""
    if steps is None or steps > horizon:
        return STEP_REWARD * horizon
    return 1.0 + STEP_REWARD * (steps - 1)


# ------------------------------------------------------------------------------------------------------------- paths


def _free(layout: Layout, x: int, y: int) -> bool:
    return 0 <= x < layout.width and 0 <= y < layout.height and not layout.walls[y, x]


def shortest(
    layout: Layout, pose: Pose, reached: Callable[[Pose, frozenset[int]], bool], opened: frozenset[int] = frozenset()
) -> list[int] | None:
    """The shortest sequence of actions from a pose to a state, among equals the first by action number.

    Args:
        layout: The building's geometry.
        pose: x, y, direction (0 east, 1 south, 2 west, 3 north).
        reached: Whether pose and open doors are the goal.
        opened: Doors that are open already.

    Returns:
        Actions (0 left, 1 right, 2 forward, 3 toggle); None if the goal cannot be reached by opening at most one door.
    """
    doors = {(int(x), int(y)): k for k, (x, y) in enumerate(layout.door_xy)}
    first = (pose, opened)
    came: dict[Any, Any] = {first: None}
    queue = deque([first])
    while queue:
        node = queue.popleft()
        (x, y, direction), open_now = node
        if reached(node[0], open_now):
            actions = []
            while came[node] is not None:
                node, action = came[node]
                actions.append(action)
            return actions[::-1]
        ahead = (x + int(DIRECTIONS[direction, 0]), y + int(DIRECTIONS[direction, 1]))
        door = doors.get(ahead)
        following: list[tuple[int, Any]] = [
            (LEFT, ((x, y, (direction - 1) % 4), open_now)),
            (RIGHT, ((x, y, (direction + 1) % 4), open_now)),
        ]
        if _free(layout, *ahead) and (door is None or door in open_now):
            following.append((FORWARD, ((*ahead, direction), open_now)))
        if door is not None and door not in open_now and len(open_now) == len(opened):
            following.append((TOGGLE, ((x, y, direction), open_now | {door})))
        for action, after in following:
            if after not in came:
                came[after] = (node, action)
                queue.append(after)
    return None


@functools.lru_cache(maxsize=1024)
def _office_path(name: str, office: int, pose: Pose | None) -> tuple[int, ...]:
    place = named(name)
    goal = tuple(int(v) for v in place.office_xy[office])
    start = tuple(int(v) for v in place.start) if pose is None else pose
    found = shortest(place, start, lambda at, _: at[:2] == goal)
    assert found is not None
    return tuple(found)


def path_to_office(layout: Layout, office: int, pose: Pose | None = None) -> tuple[int, ...]:
    """The shortest path into an office.

    Args:
        layout: The geometry.
        office: Which office, row by row.
        pose: From where; the start by default. All doors are closed.

    Raises:
        UserError: No such office.
    """
    if not 0 <= office < layout.offices:
        raise UserError(f"office {office}: the {layout.name} layout has offices 0 to {layout.offices - 1}")
    return _office_path(layout.name, int(office), pose)


@functools.lru_cache(maxsize=16)
def _sign_path(name: str) -> tuple[int, ...]:
    place = named(name)
    goal = tuple(int(v) for v in place.sign_xy)
    found = shortest(place, tuple(int(v) for v in place.start), lambda at, _: at[:2] == goal)
    assert found is not None
    return tuple(found)


def path_to_sign(layout: Layout) -> tuple[int, ...]:
    """The shortest path from the start to the sign; 8 actions in the standard layout."""
    return _sign_path(layout.name)


def walk(layout: Layout, pose: Pose, actions: Iterable[int], opened: frozenset[int] = frozenset()) -> Pose:
    """The pose after actions."""
    doors = {(int(x), int(y)): k for k, (x, y) in enumerate(layout.door_xy)}
    x, y, direction = (int(v) for v in pose)
    open_now = set(opened)
    for action in actions:
        ahead = (x + int(DIRECTIONS[direction, 0]), y + int(DIRECTIONS[direction, 1]))
        door = doors.get(ahead)
        if action in (LEFT, RIGHT):
            direction = (direction + (1 if action == RIGHT else -1)) % 4
        elif action == FORWARD and _free(layout, *ahead) and (door is None or door in open_now):
            x, y = ahead
        elif action == TOGGLE and door is not None:
            open_now ^= {door}
    return x, y, direction


@dataclass(frozen=True)
class Search:
    """A walk that opens doors one after the other and never enters an office.

    Attributes:
        actions: All of it, at most ``HORIZON`` actions.
        doors: The doors in the order in which they are opened.
        times: Actions done when each is open, so that what is behind it is seen.
    """

    actions: tuple[int, ...]
    doors: tuple[int, ...]
    times: tuple[int, ...]


@functools.lru_cache(maxsize=256)
def _search(name: str, skip: frozenset[int]) -> Search:
    place = named(name)
    pose: Pose = tuple(int(v) for v in place.start)
    actions: list[int] = []
    doors: list[int] = []
    times: list[int] = []
    left = [k for k in range(len(place.door_xy)) if k not in skip]
    while left:
        ways = []
        for k in left:
            opened = frozenset(doors)
            way = shortest(place, pose, lambda _, open_now, k=k: k in open_now, opened)
            if way is not None:
                ways.append((len(way), k, way))
        if not ways:
            break
        length, k, way = min(ways)
        if len(actions) + length > HORIZON:
            break
        pose = walk(place, pose, way, frozenset(doors))
        actions += way
        doors.append(k)
        times.append(len(actions))
        left.remove(k)
    return Search(tuple(actions), tuple(doors), tuple(times))


def search(layout: Layout, skip: Iterable[int] = ()) -> Search:
    """The walk from the start that opens always the door that is opened soonest, while an episode lasts.

    Args:
        layout: The geometry.
        skip: Doors that are left alone.
    """
    return _search(layout.name, frozenset(int(k) for k in skip))


@functools.lru_cache(maxsize=16)
def _exploration(name: str, single_goal: bool) -> Search:
    place = named(name)
    hallways = place.columns // 2
    best = None
    for count in range(hallways):
        for left_out in itertools.combinations(range(hallways), count):
            plan = search(place, [k for k in range(place.offices) if k % place.columns // 2 in left_out])
            score = _score_of(non_reader_order(place, plan), place, single_goal).mean_return
            if best is None or score > best[0] + 1e-9:
                best = score, plan
    assert best is not None
    return best[1]


def exploration(layout: Layout, single_goal: bool = False) -> Search:
    """How the non-reader spends the first episode: the walk of ``search`` in those hallways that prove best.

    Where many offices are blue it opens the nearest doors, for a near one is probably among them. A single one is
    sought in the far hallway of the standard layout, since the near one can still be searched in the second episode.

    Args:
        layout: The geometry.
        single_goal: Whether exactly one office is the goal.
    """
    return _exploration(layout.name, bool(single_goal))


# ------------------------------------------------------------------------------------------------------------ scores


@dataclass(frozen=True)
class Score:
    """What a policy reaches in the second episode.

    Attributes:
        mean_return: Mean return.
        success: Share of episodes that enter a goal office.
        length: Mean number of actions, episodes that fail counted with ``HORIZON``.
    """

    mean_return: float
    success: float
    length: float


def goal_numbers(layout: Layout, single_goal: bool) -> list[float]:
    """The chances that a building has 0, 1, 2, ... goal offices; any of that many are alike.

    Every colour stands once, the other offices have any of the colours, and all are shuffled; so there is one goal
    and a binomial number of others.

    Args:
        layout: The geometry.
        single_goal: Whether exactly one office is the goal.
    """
    n, colours = layout.offices, len(COLOURS)
    if single_goal:
        return [0.0, 1.0]
    others = n - colours
    more = (math.comb(others, k) * (colours - 1) ** (others - k) / colours**others for k in range(others + 1))
    return [0.0, *more]


def first_goal(layout: Layout, single_goal: bool) -> list[float]:
    """The chances that in a list of all offices the first, the second, ... is the first goal; they add up to 1."""
    n = layout.offices
    numbers = goal_numbers(layout, single_goal)
    return [
        math.fsum(
            chance * math.comb(n - 1 - k, goals - 1) / math.comb(n, goals)
            for goals, chance in enumerate(numbers)
            if goals
        )
        for k in range(n)
    ]


def oracle_order(layout: Layout) -> list[tuple[int, int | None]]:
    """Offices with the actions of the shortest paths to them; the oracle goes to the first that is a goal."""
    return sorted(enumerate(layout.distances.tolist()), key=lambda row: row[1])


def non_reader_order(layout: Layout, first: Search | None) -> list[tuple[int, int | None]]:
    """Offices with the actions that the non-reader needs in the second episode if that is the first goal of the list.

    Args:
        layout: The geometry.
        first: What it did in the first episode; None if nothing, so that it searches in the second.

    Returns:
        All offices; None for those that it does not reach in time.
    """
    seen = () if first is None else first.doors
    plan = search(layout, seen)
    order = [row for row in oracle_order(layout) if row[0] in seen]
    order += [(door, time + 2 if time + 2 <= HORIZON else None) for door, time in zip(plan.doors, plan.times)]
    return order + [(k, None) for k in range(layout.offices) if k not in {door for door, _ in order}]


def _score(rows: Iterable[tuple[int | None, float]]) -> Score:
    rows = [(steps if steps is not None and steps <= HORIZON else None, weight) for steps, weight in rows]
    total = math.fsum(weight for _, weight in rows)
    return Score(
        math.fsum(weight * episode_return(steps) for steps, weight in rows) / total,
        math.fsum(weight for steps, weight in rows if steps is not None) / total,
        math.fsum(weight * (HORIZON if steps is None else steps) for steps, weight in rows) / total,
    )


def _score_of(
    order: Sequence[tuple[int, int | None]],
    layout: Layout,
    single_goal: bool,
    goals: Iterable[Sequence[int]] | None = None,
) -> Score:
    if goals is None:
        return _score((steps, chance) for (_, steps), chance in zip(order, first_goal(layout, single_goal)))
    buildings = [{int(k) for k in building} for building in goals]
    return _score((next((steps for k, steps in order if k in building), None), 1.0) for building in buildings)


def oracle_score(layout: Layout, single_goal: bool = False, goals: Iterable[Sequence[int]] | None = None) -> Score:
    """The exact score of shortest paths.

    Args:
        layout: The geometry.
        single_goal: Whether exactly one office is the goal.
        goals: The goal offices of each building, to score given buildings instead of all.
    """
    return _score_of(oracle_order(layout), layout, single_goal, goals)


def non_reader_score(
    layout: Layout, single_goal: bool = False, goals: Iterable[Sequence[int]] | None = None, explore: bool = True
) -> Score:
    """The exact score of the non-reader.

    Args:
        layout: The geometry.
        single_goal: Whether exactly one office is the goal.
        goals: The goal offices of each building, to score given buildings instead of all.
        explore: Whether it uses the first episode; without, it searches in the second.
    """
    first = exploration(layout, single_goal) if explore else None
    return _score_of(non_reader_order(layout, first), layout, single_goal, goals)


@functools.lru_cache(maxsize=16)
def _wandering(name: str, actions: int) -> tuple[np.ndarray, np.ndarray]:
    """Chances that a random walk enters its first, and its second other office with each action, ``[HORIZON + 1]``."""
    place = named(name)
    doors = {(int(x), int(y)): k for k, (x, y) in enumerate(place.door_xy)}
    offices = {(int(x), int(y)): k for k, (x, y) in enumerate(place.office_xy)}
    cells = [(x, y) for y in range(place.height) for x in range(place.width) if not place.walls[y, x]]
    number = {(x, y, d): 4 * i + d for i, (x, y) in enumerate(cells) for d in range(4)}
    size = len(number)
    ahead, door, office = (np.full(size, -1) for _ in range(3))
    for (x, y, d), i in number.items():
        front = (x + int(DIRECTIONS[d, 0]), y + int(DIRECTIONS[d, 1]))
        ahead[i] = number.get((*front, d), i)
        door[i] = doors.get(front, -1)
        office[i] = offices.get((x, y), -1)
    turned = np.arange(size) // 4 * 4 + (np.arange(size) + np.array([[3], [1]])) % 4

    def spread(
        sources: list[tuple[np.ndarray, np.ndarray]], home: int
    ) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]:
        # States are open doors * size + pose. ``sources[t]``: states and chances that join after t actions.
        arrived, entering = np.zeros(HORIZON + 1), []
        states, chances = np.empty(0, np.int64), np.empty(0)
        for time in range(HORIZON + 1):
            joined, place_of = np.unique(np.concatenate([states, sources[time][0]]), return_inverse=True)
            chances = np.bincount(place_of, np.concatenate([chances, sources[time][1]]), len(joined))
            opened, pose = np.divmod(joined, size)
            end = (office[pose] >= 0) & (office[pose] != home)
            arrived[time] = chances[end].sum()
            entering.append((joined[end], chances[end]))
            opened, pose, chances = opened[~end], pose[~end], chances[~end] / actions
            facing = door[pose] >= 0
            bit = np.where(facing, np.int64(1) << np.maximum(door[pose], 0), 0)
            forward = np.where(facing & (opened & bit == 0), pose, ahead[pose])
            following = [(opened, turned[0][pose]), (opened, turned[1][pose]), (opened, forward), (opened ^ bit, pose)]
            states = np.concatenate([doors_open * size + at for doors_open, at in following])
            chances = np.tile(chances, 4)
            if actions > 4:  # the others leave everything as it is
                states = np.concatenate([states, opened * size + pose])
                chances = np.concatenate([chances, chances[: len(pose)] * (actions - 4)])
        return arrived, entering

    nothing = (np.empty(0, np.int64), np.empty(0))
    start = number[tuple(int(v) for v in place.start)]
    first, entering = spread([(np.array([start]), np.ones(1))] + [nothing] * HORIZON, -1)
    second = np.zeros(HORIZON + 1)
    for k in range(place.offices):
        sources = []
        for states, chances in entering:
            own = office[states % size] == k
            sources.append((states[own], chances[own]))
        second += spread(sources, k)[0]
    return first, second


def random_score(layout: Layout, single_goal: bool = False, actions: int = 4) -> Score:
    """The score of a policy that takes every action alike.

    A sum over all walks up to the second office that is entered; a third one is left out, which one walk in ten million
    sees at most.

    Args:
        layout: The geometry.
        single_goal: Whether exactly one office is the goal.
        actions: 4, or 7 with the released actions, three of which do nothing.
    """
    if actions < 4:
        raise UserError(f"actions {actions}: there are 4, or 7 as released")
    blue, then_blue = first_goal(layout, single_goal)[:2]
    first, second = _wandering(layout.name, actions)
    arrives = blue * first + then_blue * second
    rows: list[tuple[int | None, float]] = [(time, float(chance)) for time, chance in enumerate(arrives) if chance]
    return _score([*rows, (None, 1 - math.fsum(chance for _, chance in rows))])


# ---------------------------------------------------------------------------------------------------------- policies


class Tracker:
    """Where agents are, from their actions alone: dead reckoning in a building whose geometry is known.

    Attributes:
        pose: int64 ``[B, 3]``: x, y, direction.
        opened: bool ``[B, offices]``: doors that are open.
        doors: int64 ``[B]``: different doors opened in this episode.
        entered: int64 ``[B]``: the office that was entered first in this episode, -1 before.
    """

    def __init__(self, layout: Layout, num_envs: int) -> None:
        self.layout = layout
        n = layout.offices
        self._cell = np.full((layout.height, layout.width), -1)
        self._office = np.full((layout.height, layout.width), -1)
        self._cell[layout.door_xy[:, 1], layout.door_xy[:, 0]] = np.arange(n)
        self._office[layout.office_xy[:, 1], layout.office_xy[:, 0]] = np.arange(n)
        self._walls = np.asarray(layout.walls, bool)
        self._rows = np.arange(num_envs)
        self.pose = np.zeros((num_envs, 3), np.int64)
        self.opened = np.zeros((num_envs, n), bool)
        self._touched = np.zeros((num_envs, n), bool)
        self.entered = np.full(num_envs, -1)
        self.reset(np.ones(num_envs, bool))

    @property
    def doors(self) -> np.ndarray:
        """Different doors opened in this episode, int64 ``[B]``."""
        return self._touched.sum(1)

    def reset(self, which: np.ndarray) -> None:
        """A new episode for the rows that ``which`` (bool ``[B]``) marks."""
        self.pose[which] = self.layout.start
        self.opened[which] = self._touched[which] = False
        self.entered[which] = -1

    def step(self, actions: np.ndarray) -> None:
        """One action of every row; actions other than the four do nothing."""
        actions = np.asarray(actions)
        moves = DIRECTIONS[self.pose[:, 2]]
        ahead = self.pose[:, :2] + moves
        door = self._cell[ahead[:, 1], ahead[:, 0]]
        shut = (door >= 0) & ~self.opened[self._rows, door]
        go = (actions == FORWARD) & ~self._walls[ahead[:, 1], ahead[:, 0]] & ~shut
        turn = (actions == TOGGLE) & (door >= 0)
        self.pose[:, 2] = (self.pose[:, 2] + (actions == RIGHT) - (actions == LEFT)) % 4
        self.pose[go, :2] = ahead[go]
        self.opened[self._rows[turn], door[turn]] ^= True
        self._touched |= self.opened
        office = self._office[self.pose[:, 1], self.pose[:, 0]]
        self.entered = np.where(self.entered < 0, office, self.entered)


def _plan(actions: Sequence[int]) -> np.ndarray:
    row = np.full(HORIZON + 1, LEFT, np.int64)
    row[: min(len(actions), HORIZON)] = actions[:HORIZON]
    return row


def _batch(observation: dict[str, Any]) -> tuple[dict[str, np.ndarray], bool]:
    single = np.ndim(observation["image"]) == 3
    batch = {key: np.asarray(value) for key, value in observation.items()}
    return ({key: value[None] for key, value in batch.items()} if single else batch), single


class Reader:
    """Tells from the pixels of a sign which office it names.

    Args:
        layout: The geometry.
        released: Whether the signs may hold the phrases of the released code.
    """

    def __init__(self, layout: Layout, released: bool = False) -> None:
        from fleetgym.envs.office_nav import language, signs

        self.layout = layout
        offices = layout.offices
        strings = language.phrase_table(offices)[0]
        cells = [language.resolve(phrase, offices) for phrase in strings]
        if released:
            more = language.released_phrase_table()[0]
            strings, cells = (*strings, *more), cells + [language.resolve(p, offices, released=True) for p in more]
        self._cells = {sign.tobytes(): cell for sign, cell in zip(signs.text_signs(strings), cells)}

    @functools.cached_property
    def _styles(self) -> Any:
        from fleetgym.envs.office_nav import signs

        return signs.picture_styles(self.layout)

    def cell(self, sign: np.ndarray) -> int:
        """The office that a sign names: by its words, or the nearest blue office of a picture plan; -1 if unreadable.

        Args:
            sign: uint8 ``[84, 84, 3]``.
        """
        key = np.ascontiguousarray(sign).tobytes()
        known = self._cells.get(key)
        if known is None:
            known = self._picture(sign)
            if known < 0:  # it is shown again as long as the agent stands there
                self._cells[key] = known
        return known

    def _picture(self, sign: np.ndarray) -> int:
        styles = self._styles
        for style in range(len(styles.base)):
            region, shade = styles.region[style], styles.shade[style].astype(np.int64)[..., None]
            if not np.array_equal(sign[region < 0], styles.base[style][region < 0]):
                continue
            blue = (styles.palette[style][0].astype(np.int64) * shade + 127) // 255
            same = (sign == blue).all(-1)
            offices = [k for k in range(len(self.layout.office_xy)) if same[region == k].all()]
            if offices:
                return min(offices, key=lambda k: len(path_to_office(self.layout, k)))
        return -1


class Scripted(abc.ABC):
    """A policy that follows plans, row by row, in trials of some episodes; the base of those below.

    Its state is, for each row: actions done in the episode, the episode's index in the trial (-1 before the first), the
    goal office if that is known (else -1), and the plan that it follows.

    Args:
        layout: The geometry.
        episodes: Episodes of a trial, after which what was learnt is forgotten. With 1 each ``episode_start`` begins a
            trial.
        released: Whether phrases and actions are those of the released code.
    """

    #: Actions by plan and time, int64 ``[plans, HORIZON + 1]``, with the numbers of this module.
    plans: np.ndarray

    def __init__(self, layout: Layout, episodes: int = 2, released: bool = False) -> None:
        if episodes < 1:
            raise UserError(f"episodes {episodes}: a trial has at least 1")
        self.layout, self.episodes = layout, episodes
        self._number = np.array([0, 1, 2, 5 if released else 3])

    @abc.abstractmethod
    def begin(self, known: np.ndarray, episode: np.ndarray) -> np.ndarray:
        """The plans of rows ``[n]`` whose episode begins."""

    @abc.abstractmethod
    def learn(
        self, batch: dict[str, np.ndarray], time: np.ndarray, known: np.ndarray, plan: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """``known`` and ``plan``, ``[B]`` each, after the observations ``batch``."""

    def predict(
        self,
        observation: dict[str, Any],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """The next actions, as ``Policy.predict``; ``episode_start`` marks the first step of every episode."""
        batch, single = _batch(observation)
        number = len(batch["image"])
        if state is None:
            state = tuple(np.full(number, value) for value in (0, -1, -1, 0))
            episode_start = np.ones(number, bool)
        time, episode, known, plan = (part.copy() for part in state)
        if episode_start is not None:
            new = np.broadcast_to(np.asarray(episode_start, bool), (number,))
            episode[new] = (episode[new] + 1) % self.episodes
            known[new & (episode == 0)] = -1
            time[new] = 0
            plan[new] = self.begin(known[new], episode[new])
        known, plan = self.learn(batch, time, known, plan)
        action = self._number[self.plans[plan, np.minimum(time, HORIZON)]]
        return (action[0] if single else action), (time + 1, episode, known, plan)


class OracleReader(Scripted):
    """Walks to the sign, reads it, walks to the office; knows the way in the trial's other episodes.

    Arguments as of ``Scripted``.
    """

    def __init__(self, layout: Layout, episodes: int = 2, released: bool = False) -> None:
        super().__init__(layout, episodes, released)
        self.reader = Reader(layout, released)
        self._offices = n = layout.offices
        there = path_to_sign(layout)
        at = walk(layout, layout.start, there)
        self.plans = np.stack(
            [_plan(there)]
            + [_plan(path_to_office(layout, k)) for k in range(n)]
            + [_plan([*there, *path_to_office(layout, k, at)]) for k in range(n)]
        )

    def begin(self, known: np.ndarray, episode: np.ndarray) -> np.ndarray:
        """To the sign, or to the office where it is known."""
        return np.where(known < 0, 0, 1 + known)

    def learn(
        self, batch: dict[str, np.ndarray], time: np.ndarray, known: np.ndarray, plan: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Reads the sign where it stands before it."""
        for row in np.flatnonzero((batch["on_sign"].reshape(len(known)) == 1) & (known < 0)):
            known[row] = self.reader.cell(batch["sign"][row])
            if known[row] >= 0:
                plan[row] = 1 + self._offices + known[row]
        return known, plan


class NonReader(Scripted):
    """Opens doors in the first episode and goes in the second to the nearest goal that it saw, or searches on.

    It never looks at the sign.

    Args:
        layout: The geometry.
        episodes: Episodes of a trial.
        released: Whether the actions are those of the released code.
        single_goal: Whether exactly one office is blue; it is then sought in another order.
    """

    def __init__(self, layout: Layout, episodes: int = 2, released: bool = False, single_goal: bool = False) -> None:
        super().__init__(layout, episodes, released)
        n = layout.offices
        first = exploration(layout, single_goal)
        second = search(layout, first.doors)
        self._door = np.full((2, HORIZON + 2), -1)
        for row, plan in enumerate((first, second)):
            self._door[row, list(plan.times)] = plan.doors
        self.plans = np.stack(
            [_plan(first.actions), _plan(second.actions), _plan([FORWARD] * HORIZON)]
            + [_plan(path_to_office(layout, k)) for k in range(n)]
        )
        self._length = np.array([len(path_to_office(layout, k)) for k in range(n)])

    @staticmethod
    def _sees_goal(image: np.ndarray) -> np.ndarray:
        """Whether the cell behind the open door ahead is blue, bool ``[B]``, from symbols or pixels."""
        if image.shape[1] == 7:
            return (image[:, 3, 4, 0] == 3) & (image[:, 3, 4, 1] == 2)
        tile = image[:, 33:39, 25:31].astype(np.int64).sum((1, 2))
        return (tile[:, 2] > 2 * tile[:, 0]) & (tile[:, 2] > 2 * tile[:, 1]) & (tile[:, 2] > 0)

    def begin(self, known: np.ndarray, episode: np.ndarray) -> np.ndarray:
        """The first search, the second one, or to the office where a goal was seen."""
        return np.where(episode == 0, 0, np.where(known < 0, 1, 3 + known))

    def learn(
        self, batch: dict[str, np.ndarray], time: np.ndarray, known: np.ndarray, plan: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Looks through the door just opened."""
        door = np.where(plan < 2, self._door[np.minimum(plan, 1), np.minimum(time, HORIZON + 1)], -1)
        found = (door >= 0) & self._sees_goal(batch["image"])
        nearer = found & ((known < 0) | (self._length[door] < self._length[known]))
        # Where it searches in the second episode, two steps ahead lies the goal.
        return np.where(nearer, door, known), np.where(found & (plan == 1), 2, plan)


class RandomPolicy:
    """Every action alike.

    Args:
        actions: How many actions there are.
        seed: Of its own generator.
    """

    def __init__(self, actions: int = 4, seed: int = 0) -> None:
        self.actions, self._rng = actions, np.random.default_rng(seed)

    def predict(
        self,
        observation: dict[str, Any],
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[np.ndarray, None]:
        """The next actions, as ``Policy.predict``."""
        batch, single = _batch(observation)
        action = self._rng.integers(self.actions, size=len(batch["image"]))
        return (action[0] if single else action), None
