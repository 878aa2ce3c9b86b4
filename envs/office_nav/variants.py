"""The registered variants of OfficeNav, and the tables that every implementation of one works from.

``tables(variant)`` holds all that is drawn or looked up: buildings, splits, phrases or picture styles. The single, the
vector and the torch environment read the same tables with the random bits of ``rng``, and so agree to the bit.

A trial with seed ``s``, number ``t`` and split ``p`` is made thus (``T`` the tables, ``rng`` for the numbering)::

    own  = T.layout_of[p]                                    # index into T.layouts
    task = T.pool(p)[pick(bits(s, t, 0, TASK), len(T.pool(p)))]
    goal = T.goals[own, task]                                # the office that the sign names
    # and in its episode e = 1, 2:
    b = bits(s, t, e, SIGN)
    sign = first i with T.cumulative[p, goal, i] > top24(b)                  # text: index into T.phrases[own]
    sign = T.styles(p)[pick(b, len(T.styles(p)))]                            # picture: index of the style
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import language
from fleetgym.envs.office_nav.buildings import buildings, sign_goals
from fleetgym.envs.office_nav.layout import HORIZON, LAYOUTS, Layout

#: All splits by number. Text variants have no ``style``, picture variants no ``phrases``, the released one only two.
SPLITS = ("train", "test", "phrases", "layout", "style")
#: The most offices a layout has; tables over offices are padded to it.
MAX_OFFICES = max(plan.offices for plan in LAYOUTS.values())
#: Names of the actions; the released environment has the others of MiniGrid as well.
ACTIONS = ("left", "right", "forward", "toggle")
RELEASED_ACTIONS = ("left", "right", "forward", "pickup", "drop", "toggle", "done")


@dataclass(frozen=True)
class Variant:
    """What is different between the registered ids.

    Attributes:
        id: The Gymnasium id.
        view: ``"rgb"``: 56x56x3 pixels; ``"symbolic"``: 7x7x3 numbers of MiniGrid's encoding.
        layout: The floor plan's name.
        sign: ``"text"`` or ``"picture"``.
        single_goal: Whether exactly one office is blue; else one or more are, and any of them counts.
        released: Whether grammar, tasks, splits and actions are those of the released code, with its mistakes.
        train_tasks: The task ids below this are for training.
        test_tasks: As many ids after those are held out.
        horizon: Steps after which an episode is truncated.
        episodes: Episodes in a trial.

    Raises:
        UserError: An impossible value; the message names what is allowed.
    """

    id: str
    view: str = "rgb"
    layout: str = "standard"
    sign: str = "text"
    single_goal: bool = False
    released: bool = False
    train_tasks: int = 1000
    test_tasks: int = 200
    horizon: int = HORIZON
    episodes: int = 2

    def __post_init__(self) -> None:
        changed = [key for key, value in _RELEASED.items() if self.released and getattr(self, key) != value]
        if changed:
            raise UserError(f"{self.id} is as released: {', '.join(changed)} cannot be changed")
        for key, choices in _CHOICES.items():
            if getattr(self, key) not in choices:
                raise UserError(f"{key} {getattr(self, key)!r}: it is one of {', '.join(map(str, choices))}")
        for key, most in _NUMBERS.items():
            value = getattr(self, key)
            least = int(not (self.released and key == "test_tasks"))
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not least <= value <= most:
                raise UserError(f"{key} {value!r}: it is an integer of at least {least} and at most {most}")

    @property
    def actions(self) -> tuple[str, ...]:
        """The names of the actions, by number."""
        return RELEASED_ACTIONS if self.released else ACTIONS

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of the observation ``image``."""
        return (56, 56, 3) if self.view == "rgb" else (7, 7, 3)


_CHOICES = {
    "view": ("rgb", "symbolic"),
    "layout": tuple(LAYOUTS),
    "sign": ("text", "picture"),
    "single_goal": (False, True),
}
_RELEASED = {"layout": "standard", "sign": "text", "single_goal": False, "train_tasks": 200, "test_tasks": 0}
# Buildings stand in tables, so that there is a limit to their number.
_NUMBERS = {"train_tasks": 10**6, "test_tasks": 10**6, "horizon": 10**9, "episodes": 10**9}

#: The variants of the 2D office by id.
VARIANTS: dict[str, Variant] = {
    variant.id: variant
    for variant in (
        Variant("OfficeNav-v0"),
        Variant("OfficeNav-Symbolic-v0", view="symbolic"),
        Variant("OfficeNav-SingleGoal-v0", single_goal=True),
        Variant("OfficeNav-Tall-v0", layout="tall"),
        Variant("OfficeNav-TallSkinny-v0", layout="tall_skinny"),
        Variant("OfficeNav-Map-v0", sign="picture"),
        Variant("OfficeNav-Released-v0", view="symbolic", released=True, **_RELEASED),
    )
}


def resolve_variant(variant: str | Variant = "OfficeNav-v0", changes: Mapping[str, Any] | None = None) -> Variant:
    """A variant by its id (or itself), with some of its attributes changed.

    Args:
        variant: An id of ``VARIANTS``; ``"Symbolic"`` is short for ``"OfficeNav-Symbolic-v0"``.
        changes: Attributes of ``Variant`` to set.

    Raises:
        UserError: Unknown id or attribute, or an impossible value; the message names what is allowed.
    """
    if not isinstance(variant, Variant):
        name = str(variant) if str(variant) in VARIANTS else f"OfficeNav-{variant}-v0"
        if name not in VARIANTS:
            raise UserError(f"unknown variant {variant!r}; the variants are {', '.join(VARIANTS)}")
        variant = VARIANTS[name]
    changes = dict(changes or {})
    for key in changes:
        if key not in _CHOICES and key not in _NUMBERS:
            raise UserError(f"unknown option {key!r} of OfficeNav; the options are {', '.join([*_CHOICES, *_NUMBERS])}")
    return replace(variant, **changes)


@dataclass(frozen=True, eq=False)
class Tables:
    """All that an implementation of a variant looks up. Arrays are read-only.

    ``L`` layouts, ``S`` splits (``len(SPLITS)``; those not in ``splits`` are empty), ``K`` = ``MAX_OFFICES``.

    Attributes:
        variant: The variant.
        layouts: Its own layout and, where it has the split ``layout``, the one held out.
        splits: The names of its splits.
        layout_of: The index of each split's layout, int64 [S].
        colours: The offices' colours, int8 [L, tasks, K], -1 where a layout has fewer offices.
        goals: The office that the sign names, int64 [L, tasks].
        pools: The task ids of all splits one after the other, int64.
        pool_start: Where a split's begin, int64 [S + 1].
        phrases: The phrases of each layout by number; empty tuples for pictures.
        cumulative: Their distribution by split and goal in units of 2^-24, int64 [S, K, P]. Numbers beyond a layout's
            phrases hold its last value; a goal that the split does not have has zeros.
        style_pools: The picture styles of all splits one after the other, int64; empty for text.
        style_start: Where a split's begin, int64 [S + 1].
    """

    variant: Variant
    layouts: tuple[Layout, ...]
    splits: tuple[str, ...]
    layout_of: np.ndarray
    colours: np.ndarray
    goals: np.ndarray
    pools: np.ndarray
    pool_start: np.ndarray
    phrases: tuple[tuple[str, ...], ...]
    cumulative: np.ndarray
    style_pools: np.ndarray
    style_start: np.ndarray

    @property
    def tasks(self) -> int:
        """How many task ids there are."""
        return self.colours.shape[1]

    def split(self, name: str) -> int:
        """The number of a split.

        Raises:
            UserError: The variant has no such split; the message names those that it has.
        """
        if name not in self.splits:
            raise UserError(
                f"split {name!r}: {self.variant.id} with {self.variant.sign} signs has {', '.join(self.splits)}"
            )
        return SPLITS.index(name)

    def pool(self, split: int | str) -> np.ndarray:
        """The task ids of a split, increasing."""
        index = self.split(split) if isinstance(split, str) else split
        return self.pools[self.pool_start[index] : self.pool_start[index + 1]]

    def styles(self, split: int | str) -> np.ndarray:
        """The picture styles of a split; empty for text."""
        index = self.split(split) if isinstance(split, str) else split
        return self.style_pools[self.style_start[index] : self.style_start[index + 1]]

    def check_task(self, task_id: Any, split: str | None = None) -> tuple[int, int]:
        """The task id and the number of its split.

        Args:
            task_id: What a caller asks for.
            split: The split asked for; None takes ``train`` or ``test``, whichever has the id.

        Raises:
            UserError: There is no such task, or it is not in that split; the message names the ids.
        """
        if isinstance(task_id, bool) or not isinstance(task_id, (int, np.integer)) or not 0 <= task_id < self.tasks:
            ranges = f"train has 0 to {self.variant.train_tasks - 1}"
            if self.variant.test_tasks:
                ranges += f", test {self.variant.train_tasks} to {self.tasks - 1}"
            raise UserError(f"task_id {task_id!r}: it is an integer from 0 to {self.tasks - 1} ({ranges})")
        if split is None:
            split = "train" if task_id < self.variant.train_tasks else "test"
        pool = self.pool(split)
        if task_id not in pool:
            some = ", ".join(map(str, pool[:4]))
            raise UserError(
                f"task_id {int(task_id)} is not in split {split!r}, whose {len(pool)} ids are {some}, ..., {pool[-1]}"
            )
        return int(task_id), SPLITS.index(split)


def _fixed(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


@functools.lru_cache(maxsize=16)
def tables(variant: Variant) -> Tables:
    """The tables of a variant, built once.

    Splits: ``train`` and ``test`` differ in their buildings; ``phrases``, ``layout`` and ``style`` have the test
    buildings (in ``phrases`` those whose goal such a phrase can name) and change one thing each: signs say only the
    held-out phrases, the layout is one that is not trained on (``tall_skinny``; ``standard`` where that is the
    variant's own), or the plan is drawn in a held-out style.
    """
    released, text = variant.released, variant.sign == "text"
    plans = [variant.layout]
    if released:
        splits = ("train", "test")
    else:
        splits = ("train", "test", "phrases", "layout") if text else ("train", "test", "layout", "style")
        plans.append("standard" if variant.layout == "tall_skinny" else "tall_skinny")
    layouts = tuple(LAYOUTS[name] for name in plans)
    number = variant.train_tasks + variant.test_tasks

    colours = np.full((len(layouts), number, MAX_OFFICES), -1, np.int8)
    goals = np.zeros((len(layouts), number), np.int64)
    for index, plan in enumerate(layouts):
        colours[index, :, : plan.offices] = buildings(number, plan.name, variant.single_goal, not released)
        goals[index] = sign_goals(colours[index, :, : plan.offices], plan)

    train, test = np.arange(variant.train_tasks), np.arange(variant.train_tasks, number)
    if released:
        test = train  # as released: the same ids
    layout_of = np.zeros(len(SPLITS), np.int64)
    pools: list[np.ndarray] = [np.zeros(0, np.int64)] * len(SPLITS)
    pools[0], pools[1] = train, test
    if not released:
        layout_of[SPLITS.index("layout")] = 1
        pools[SPLITS.index("layout")] = test
        if text:
            sayable = np.isin(goals[0, test], language.goals(layouts[0].offices, "phrases"))
            pools[SPLITS.index("phrases")] = test[sayable]
            if not sayable.any():
                raise UserError(f"test_tasks {variant.test_tasks}: none has a goal for split 'phrases'; take more")
        else:
            pools[SPLITS.index("style")] = test

    phrases: tuple[tuple[str, ...], ...] = ((),) * len(layouts)
    cumulative = np.zeros((len(SPLITS), MAX_OFFICES, 1), np.int64)
    styles: list[np.ndarray] = [np.zeros(0, np.int64)] * len(SPLITS)
    if text:
        found = {}
        for name in splits:
            index = SPLITS.index(name)
            offices = layouts[layout_of[index]].offices
            if released:
                found[index] = language.released_phrase_table()
            else:
                found[index] = language.phrase_table(offices, "phrases" if name == "phrases" else "train")
        by_layout = {int(layout_of[index]): strings for index, (strings, _) in found.items()}
        phrases = tuple(by_layout[index] for index in range(len(layouts)))
        cumulative = np.zeros((len(SPLITS), MAX_OFFICES, max(map(len, phrases))), np.int64)
        for index, (strings, table) in found.items():
            cumulative[index, : len(table), : len(strings)] = table
            cumulative[index, : len(table), len(strings) :] = table[:, -1:]
    else:
        from fleetgym.envs.office_nav import signs

        for name in splits:
            drawn = signs.picture_styles(layouts[layout_of[SPLITS.index(name)]].name)
            styles[SPLITS.index(name)] = drawn.indices("style" if name == "style" else "train").astype(np.int64)
    return Tables(
        variant=variant,
        layouts=layouts,
        splits=splits,
        layout_of=_fixed(layout_of),
        colours=_fixed(colours),
        goals=_fixed(goals),
        pools=_fixed(np.concatenate(pools).astype(np.int64)),
        pool_start=_fixed(np.cumsum([0, *map(len, pools)])),
        phrases=phrases,
        cumulative=_fixed(cumulative),
        style_pools=_fixed(np.concatenate(styles)),
        style_start=_fixed(np.cumsum([0, *map(len, styles)])),
    )
