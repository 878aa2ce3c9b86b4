"""Whether an agent reads: what its return alone does not tell.

Under the rule that any blue office counts, a policy that never looks at the sign comes close to one that reads. So
``reading`` plays whole trials and changes the sign:

- ``"true"``: the sign as it is;
- ``"swapped"``: it names another office, one that is not blue. A reader goes there, ``first_named``;
- ``"blank"``: an empty sheet. What is left of the score was not read.

It also counts the doors opened before the goal: a reader opens one.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav import language
from fleetgym.envs.office_nav.layout import GOAL
from fleetgym.envs.office_nav.reference import Tracker
from fleetgym.envs.office_nav.variants import Tables, Variant, resolve_variant, tables

SIGNS = ("true", "swapped", "blank")


@dataclass(frozen=True, eq=False)
class Reading:
    """What happened in some trials; arrays are ``[trials, episodes]``.

    Attributes:
        sign: Which signs the agent saw.
        returns: Return of each episode, float64.
        success: Whether it entered a goal office.
        length: Its actions.
        doors: Different doors opened in it.
        saw_sign: Whether the agent stood before the sign.
        entered: The office entered first, -1 if none.
        named: The office that the sign names, int64 ``[trials]``; -1 for blank signs.
        blue: Which offices are blue, bool ``[trials, offices]``.
        trial_seeds: The seed of each trial.
    """

    sign: str
    returns: np.ndarray
    success: np.ndarray
    length: np.ndarray
    doors: np.ndarray
    saw_sign: np.ndarray
    entered: np.ndarray
    named: np.ndarray
    blue: np.ndarray
    trial_seeds: np.ndarray

    def summary(self) -> dict[str, Any]:
        """Means over the trials' last episodes; JSON.

        ``first_named``: the first office entered is the one that the sign names; ``first_goal``: it is blue;
        ``doors_before_goal``: doors opened in episodes that reach the goal, None without such; ``saw_sign``: the agent
        stood before the sign in any episode of the trial.
        """
        entered, solved = self.entered[:, -1], self.success[:, -1]
        reached = np.flatnonzero(entered >= 0)
        blue = np.zeros(len(entered), bool)
        blue[reached] = self.blue[reached, entered[reached]]
        return {
            "sign": self.sign,
            "trials": len(solved),
            "return": float(self.returns[:, -1].mean()),
            "success": float(solved.mean()),
            "length": float(self.length[:, -1].mean()),
            "first_named": float(((entered >= 0) & (entered == self.named)).mean()),
            "first_goal": float(blue.mean()),
            "doors_before_goal": float(self.doors[:, -1][solved].mean()) if solved.any() else None,
            "saw_sign": float(self.saw_sign.any(1).mean()),
            "first_episode_return": float(self.returns[:, 0].mean()),
        }


class _Signs:
    """The signs that the agent sees instead of the true ones."""

    def __init__(self, kind: str, worlds: Tables, split: str, task: np.ndarray, goal: np.ndarray, seed: int) -> None:
        layout = int(worlds.layout_of[worlds.split(split)])
        self._plan, self._kind = worlds.layouts[layout], kind
        colours = worlds.colours[layout, task, : self._plan.offices]
        self.blue = colours == GOAL
        self.named = goal.copy() if kind == "true" else np.full(len(task), -1)
        if kind != "swapped":
            return
        rng = np.random.default_rng([seed, 0x51C7])
        self.named = (rng.random(colours.shape) - 2 * self.blue).argmax(1)  # any office that is not blue
        rows = np.arange(len(task))
        if worlds.variant.sign == "text":
            split_number = worlds.split(split)
            draws = rng.integers(language.UNIT, size=len(task))
            cumulative = worlds.cumulative[split_number]
            if split == "phrases":  # this split has no phrases for most offices
                cumulative = language.phrase_table(self._plan.offices)[1]
            self._shown = np.array([language.draw(cumulative, k, b) for k, b in zip(self.named, draws)])
            self._phrases = worlds.phrases[layout]
        else:
            # The named office is blue on the plan, and those that are take its colour.
            self._colours = np.where(self.blue, colours[rows, self.named][:, None], colours)
            self._colours[rows, self.named] = GOAL
            self._style = rng.choice(worlds.styles(split), size=len(task))

    @functools.cached_property
    def _text(self) -> np.ndarray:
        from fleetgym.envs.office_nav import signs

        return signs.text_signs(self._phrases)

    def put(self, observation: dict[str, Any]) -> dict[str, Any]:
        """The observation with the changed signs; a copy where anything is changed."""
        rows = np.flatnonzero(np.asarray(observation["on_sign"]).reshape(-1) == 1)
        if self._kind == "true" or not len(rows):
            return observation
        from fleetgym.envs.office_nav import signs

        sign = np.array(observation["sign"])
        if self._kind == "blank":
            sign[rows] = 255
        elif hasattr(self, "_shown"):
            sign[rows] = self._text[self._shown[rows]]
        else:
            styles = signs.picture_styles(self._plan)
            for row in rows:
                sign[row] = signs.compose(styles, self._style[row], self._colours[row])
        return {**observation, "sign": sign}


def reading(
    policy: Any,
    variant: str | Variant = "OfficeNav-v0",
    *,
    trials: int = 500,
    sign: str = "true",
    split: str = "test",
    seed: int = 0,
) -> Reading:
    """Plays trials and notes what tells a reader from others.

    All trials are played side by side: ``policy.predict`` sees one batch of observations ``[trials, ...]`` a step, with
    ``episode_start`` set where an episode begins. A trial's episodes follow each other without ``state`` being lost.

    Args:
        policy: A ``Policy``.
        variant: An id of OfficeNav, or a ``Variant``.
        trials: How many; trial ``i`` has the seed ``seed + i``.
        sign: ``"true"``, ``"swapped"`` or ``"blank"``.
        split: Whose buildings and signs.
        seed: The first seed.

    Raises:
        UserError: Unknown variant, split or choice of sign; or fewer than one trial.
    """
    from fleetgym.envs.office_nav.vector import OfficeNavVectorEnv

    if sign not in SIGNS:
        raise unknown("choice of sign", sign, SIGNS)
    if trials < 1:
        raise UserError(f"trials {trials}: there must be at least 1")
    kind = resolve_variant(variant)
    worlds = tables(kind)
    plan = worlds.layouts[int(worlds.layout_of[worlds.split(split)])]
    env = OfficeNavVectorEnv(trials, variant=kind, autoreset_mode="next_step")
    observation, info = env.reset(seed=seed, options={"split": split})
    shown = _Signs(sign, worlds, split, np.array(info["task_id"]), np.array(info["goal"]), seed)
    tracker = Tracker(plan, trials)
    effect = np.array([{"left": 0, "right": 1, "forward": 2, "toggle": 3}.get(name, 4) for name in kind.actions])

    shape = (trials, kind.episodes)
    result = {name: np.zeros(shape, dtype) for name, dtype in (("returns", float), ("success", bool), ("length", int))}
    result |= {"doors": np.zeros(shape, int), "saw_sign": np.zeros(shape, bool), "entered": np.full(shape, -1)}
    episode, ended = np.zeros(trials, int), np.zeros(trials, bool)
    start, state, every = np.ones(trials, bool), None, np.arange(trials)
    while (episode < kind.episodes).any():
        action, state = policy.predict(shown.put(observation), state, start, True)
        at = np.minimum(episode, kind.episodes - 1)
        playing = (episode < kind.episodes) & ~ended
        result["saw_sign"][every, at] |= playing & (np.asarray(observation["on_sign"]).reshape(-1) == 1)
        observation, reward, terminated, truncated, _ = env.step(np.asarray(action))
        tracker.step(effect[np.asarray(action)])
        tracker.reset(ended)
        result["returns"][every, at] += np.where(playing, reward, 0.0)
        result["length"][every, at] += playing
        for name, value in (("doors", tracker.doors), ("entered", tracker.entered)):
            result[name][every, at] = np.where(playing, value, result[name][every, at])
        result["success"][every, at] |= playing & terminated
        start, ended = ended, terminated | truncated
        episode += playing & ended
    env.close()
    return Reading(sign=sign, named=shown.named, blue=shown.blue, trial_seeds=seed + every, **result)
