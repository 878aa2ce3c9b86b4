"""The best that any policy can reach in OfficeNav without reading the sign: an exact search over what it can know.

Such a policy learns of an office only by opening its door, so what it knows is which doors it has opened and what was
behind them. Before an office is opened its colour is drawn from what the drawing of buildings and the colours seen so
far leave possible. All that it can do is choose, at each moment, which door to open next; in the second episode it may
walk to a blue office that it knows instead. The best choices are found by dynamic programming over

- the time, and the door at which the agent stands;
- for each pair of opposite offices, how many are unknown and whether a blue one is known (the two are mirror images);
- how many offices of each colour were seen, the colours other than blue in any order.

Entering offices in the first episode gains nothing, and neither does ending it early, so both are left out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from fleetgym.envs.office_nav.layout import COLOURS, DIRECTIONS, HORIZON, Layout
from fleetgym.envs.office_nav.layout import layout as named
from fleetgym.envs.office_nav.reference import Pose, episode_return, shortest

#: Actions from where a door is faced into its office: open, forward, forward.
ENTER = 3
Counts = tuple[int, ...]


def weight(seen: Sequence[int], unseen: int) -> int:
    """How likely offices with these colours are, times a constant of the building.

    A building has each colour once and draws the others uniformly, all shuffled. So the chance of one sequence of ``n``
    offices with ``n_i`` of colour ``i`` is proportional to the product of the ``n_i``, and that of what was seen to the
    sum of it over what was not: ``r! [z^r] exp(C z) prod_i (seen_i + z)`` with ``C`` colours and ``r`` unseen offices.

    Args:
        seen: Offices seen of each colour.
        unseen: How many offices were not seen.
    """
    polynomial = [1]
    for count in seen:
        # Times (count + z), the lowest power first.
        polynomial = [count * a + b for a, b in zip([*polynomial, 0], [0, *polynomial])]
    total, falling = 0, 1
    for power, coefficient in enumerate(polynomial[: unseen + 1]):
        total += coefficient * falling * len(seen) ** (unseen - power)
        falling *= unseen - power
    return total


class _Search:
    """The two programmes, one for each episode, for one layout."""

    def __init__(self, layout: Layout, single_goal: bool) -> None:
        self.single_goal = single_goal
        self.offices, self.columns = layout.offices, layout.columns
        self.pairs = layout.offices // 2
        faced = [_faced(layout, 2 * pair) for pair in range(self.pairs)]
        start: Pose = tuple(int(v) for v in layout.start)
        #: Actions from facing a door of a pair (the last row: from the start) to facing one of another pair.
        self.way = [
            [_distance(layout, pose, goal) if pose != goal else 2 for goal in faced] for pose in (*faced, start)
        ]
        self.first = functools.lru_cache(maxsize=None)(self._first)
        self.second = functools.lru_cache(maxsize=None)(self._second)
        self.next_colours = functools.lru_cache(maxsize=None)(self._next_colours)

    def value(self) -> float:
        nothing = (0,) * (len(COLOURS) - 1)
        return self.first(0, self.pairs, (2,) * self.pairs, 0, 0, nothing)

    def _next_colours(self, unknown: int, blue: int, others: Counts) -> tuple[float, tuple[tuple[float, Counts], ...]]:
        """The chance that the next office is blue, and those of the other outcomes with what was seen then."""
        if self.single_goal:
            chance = 0.0 if blue else 1 / unknown
            return chance, ((1 - chance, others),) if chance < 1 else ()
        whole = weight((blue, *others), unknown)
        outcomes: dict[Counts, float] = {}
        for place, count in enumerate(others):
            after = tuple(sorted((*others[:place], count + 1, *others[place + 1 :])))
            if likely := weight((blue, *after), unknown - 1) / whole:
                outcomes[after] = outcomes.get(after, 0.0) + likely
        return weight((blue + 1, *others), unknown - 1) / whole, tuple((p, after) for after, p in outcomes.items())

    def _first(self, time: int, at: int, unknown: Counts, known: int, blue: int, others: Counts) -> float:
        """The value of the second episode, from a moment of the first; ``known`` has a bit for each pair."""
        best, left = None, sum(unknown)
        for pair, closed in enumerate(unknown):
            after = time + self.way[at][pair] + 1
            if not closed or after > HORIZON:
                continue
            rest = (*unknown[:pair], closed - 1, *unknown[pair + 1 :])
            chance, outcomes = self.next_colours(left, blue, others)
            value = chance * self.first(after, pair, rest, known | 1 << pair, blue + 1, others) if chance else 0.0
            for likely, seen in outcomes:
                value += likely * self.first(after, pair, rest, known, blue, seen)
            best = value if best is None else max(best, value)
        return self.second(0, self.pairs, unknown, known, blue, others) if best is None else best

    def _second(self, time: int, at: int, unknown: Counts, known: int, blue: int, others: Counts) -> float:
        """The value of a moment of the second episode; pairs with a known blue office are not opened for the other."""
        go = [time + self.way[at][pair] + ENTER for pair in range(self.pairs) if known >> pair & 1]
        best, left = episode_return(min(go, default=None)), sum(unknown)
        for pair, closed in enumerate(unknown):
            after = time + self.way[at][pair] + 1
            entered = after + ENTER - 1
            if not closed or known >> pair & 1 or entered > HORIZON or (go and entered >= min(go)):
                continue
            rest = (*unknown[:pair], closed - 1, *unknown[pair + 1 :])
            chance, outcomes = self.next_colours(left, blue, others)
            value = chance * episode_return(entered)
            for likely, seen in outcomes:
                value += likely * self.second(after, pair, rest, known, blue, seen)
            best = max(best, value)
        return best


def _faced(layout: Layout, door: int) -> Pose:
    (x, y), (office_x, _) = layout.door_xy[door].tolist(), layout.office_xy[door].tolist()
    direction = 2 if office_x < x else 0
    return x - int(DIRECTIONS[direction, 0]), y, direction


def _distance(layout: Layout, pose: Pose, goal: Pose) -> int:
    way = shortest(layout, pose, lambda at, _: at == goal)
    assert way is not None
    return len(way)


@functools.lru_cache(maxsize=16)
def _best(name: str, single_goal: bool) -> float:
    return _Search(named(name), single_goal).value()


def best_non_reader(layout: Layout, single_goal: bool = False) -> float:
    """The greatest mean return in a trial's second episode of all policies that do not read the sign; exact.

    Args:
        layout: The geometry.
        single_goal: Whether exactly one office is the goal.
    """
    return _best(layout.name, bool(single_goal))
