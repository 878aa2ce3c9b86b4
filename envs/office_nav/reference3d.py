"""Policies that bound what an agent can reach in the 3D office, and how many steps reading and walking take there.

- ``OracleReader3D`` goes to where the sign can be read, reads it from the pixels, and goes to the office that it names;
  in the trial's other episodes straight there. It is what a perfect reader reaches.
- ``NonReader3D`` never looks at the sign: it looks into one office after the other for the blue box and remembers in
  the second episode what it saw in the first.
- ``RandomPolicy3D``: every action alike.

An episode starts at a random place, so the first two have to be told where they are: ``attach(env)`` gives them the
environment that they play in, single or vector, and they read pose, doors and floor plan from it. What the sign says
and where the blue box stands they take from the observation alone. Of the reward nothing is used.

``reach`` measures how many steps are needed; ``metrics3d.reading3d`` (here as well) plays whole trials.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.envs.office_nav import env3d, raycast
from fleetgym.envs.office_nav.metrics3d import LEGIBLE, reading3d
from fleetgym.envs.office_nav.raycast import LEFT, OFFICES, TO_BOX, TO_SIGHT, TO_SIGN

__all__ = ["NonReader3D", "OracleReader3D", "RandomPolicy3D", "Reach", "reach", "reading3d", "scores_page"]

#: Actions of the longest way that is looked for.
LONGEST = 60
_DOOR_OF_SIGN = 1 << OFFICES
_OFFICE_DOORS = _DOOR_OF_SIGN - 1


class Ways:
    """Shortest ways in the 3D office, from the states of its environments."""

    def __init__(self) -> None:
        self._visited = np.zeros(raycast.VISITED, np.int32)
        self._stamp = 0

    def find(self, one: np.ndarray, seek: int, which: int = 0, least: int = LEGIBLE) -> tuple[np.ndarray, np.ndarray]:
        """The actions of a shortest way and the pose at its end.

        Args:
            one: [1] of ``env3d.STATE``.
            seek: ``raycast.TO_BOX`` (of office ``which``), ``TO_SIGN`` (where its contrast is ``least``) or
                ``TO_SIGHT`` (of a box of the offices whose bits ``which`` has).
            which: See ``seek``.
            least: See ``seek``.

        Returns:
            Actions [steps], int64, and pose [3]; without a way, no actions and the pose of ``one``.
        """
        self._stamp += 1
        here = env3d.world()
        layout = int(one["layout"][0])
        actions = np.full(LONGEST, LEFT, np.int64)
        pose = np.array([one["x"][0], one["z"][0], one["heading"][0]])
        relevant = {TO_BOX: 1 << which, TO_SIGHT: which & _OFFICE_DOORS, TO_SIGN: _DOOR_OF_SIGN}[seek]
        length = raycast.way(
            actions,
            pose,
            here.scenes[layout],
            one.copy(),
            seek,
            which,
            relevant,
            least,
            self._visited,
            self._stamp,
            _memo(layout),
            (here.textures, here.signs, here.looks, here.crates),
            env3d.MEANINGS,
        )
        return actions[: max(length, 0)], pose


@functools.cache
def _memo(layout: int) -> np.ndarray:
    """The contrasts of the sign by place, known so far: they are the same for everybody."""
    return np.full(raycast.MEMO, -1, np.int16)


@functools.cache
def _ways() -> Ways:
    return Ways()


def read(trials: env3d.Trials, row: int, frame: np.ndarray) -> int | None:
    """What the sign in a frame means, told from its pixels.

    The frame is compared with the eleven that would be seen from this pose with each of the texts on the sign, at those
    pixels in which they differ: it says what comes nearest.

    Args:
        trials: Of the environment; pose, doors and look of ``row`` are used, not its phrase.
        row: Which environment.
        frame: Its observation, uint8 [60, 80, 3].

    Returns:
        The office, -1 for a blank sign; None where the sign cannot be read, see ``LEGIBLE``.
    """
    one = trials.state[row]
    if not raycast.may_see_sign(float(one["x"]), float(one["heading"]), int(one["doors"])):
        return None
    views = trials.sign_views(row)
    if raycast.contrast(views, env3d.MEANINGS) < LEGIBLE:
        return None
    differ = (views != views[0]).any((0, 3))
    away = np.abs(views[:, differ].astype(np.int64) - frame[differ].astype(np.int64)).sum((1, 2))
    return int(env3d.MEANINGS[away.argmin()])


def blue_office(trials: env3d.Trials, row: int, frame: np.ndarray) -> int:
    """The office in which a frame shows something blue, -1 if none: by the direction of its blue pixels.

    Args:
        trials: Of the environment; the pose of ``row`` is used.
        row: Which environment.
        frame: Its observation, uint8 [60, 80, 3].
    """
    pixels = frame.astype(np.int64)
    blue = (pixels[..., 2] > 2 * pixels[..., 0]) & (pixels[..., 2] > 2 * pixels[..., 1]) & (pixels[..., 2] > 60)
    if blue.sum() < 4:
        return -1
    one = trials.state[row]
    column = np.flatnonzero(blue.any(0)).mean()
    pitch = raycast.HALF_VIEW / (0.5 * raycast.HEIGHT)
    towards = float(one["heading"]) - math.atan((column - (raycast.WIDTH - 1) / 2) * pitch)
    off = []
    for office in range(OFFICES):
        x, z = env3d.office_centre(office)
        angle = math.atan2(float(one["z"]) - z, x - float(one["x"]))
        off.append(abs((angle - towards + math.pi) % (2 * math.pi) - math.pi))
    return int(np.argmin(off))


class _Guided:
    """What reader and non-reader share: the environment, the memory of a trial, and walking on a planned way."""

    def __init__(self, episodes: int = env3d.EPISODES) -> None:
        if isinstance(episodes, bool) or not isinstance(episodes, (int, np.integer)) or episodes < 1:
            raise UserError(f"episodes {episodes!r}: a trial has at least 1")
        self.episodes = int(episodes)
        self._trials: env3d.Trials | None = None

    def attach(self, env: Any) -> None:
        """Says which environment is played in.

        Args:
            env: ``OfficeNav3DEnv`` or ``OfficeNav3DVectorEnv``, wrapped or not.

        Raises:
            UserError: Another environment.
        """
        base = getattr(env, "unwrapped", env)
        if not isinstance(base, (env3d.OfficeNav3DEnv, env3d.OfficeNav3DVectorEnv)):
            raise UserError(f"{type(self).__name__} plays in OfficeNav3D-v0, not in {type(base).__name__}")
        self._trials = base.trials

    def predict(
        self,
        observation: np.ndarray,
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[Any, tuple[np.ndarray, ...]]:
        """The next actions, as ``Policy.predict``; the observation has to be the attached environment's present one.

        Raises:
            UserError: ``attach`` was not called, or the observations are not as many as the environments.
        """
        if self._trials is None:
            raise UserError(f"{type(self).__name__} has to know where it is: call attach(env) first")
        frames = np.asarray(observation)
        single = frames.ndim == 3
        frames = frames[None] if single else frames
        number = len(frames)
        if number != len(self._trials.state):
            raise UserError(f"{number} observations, but the attached environment has {len(self._trials.state)}")
        if state is None:
            plans = np.full((number, LONGEST), LEFT, np.int64)
            state = (np.full(number, -1), np.full(number, -1), np.zeros(number, np.int64), plans)
            state = (*state, np.zeros(number, np.int64), np.zeros(number, np.int64))
            episode_start = np.ones(number, bool)
        episode, known, seen, plans, at, length = (part.copy() for part in state)
        if episode_start is not None:
            new = np.broadcast_to(np.asarray(episode_start, bool), (number,))
            episode[new] = (episode[new] + 1) % self.episodes
            fresh = new & (episode == 0)
            known[fresh], seen[fresh] = -1, 0
            at[new] = length[new] = 0
        actions = np.full(number, LEFT, np.int64)
        for row in range(number):
            if not self._trials.state["running"][row]:
                continue  # the next step begins an episode, whatever the action
            known[row], seen[row], plan = self._think(row, frames[row], known[row], seen[row], at[row] >= length[row])
            if plan is not None:
                plans[row, : len(plan)], at[row], length[row] = plan, 0, len(plan)
            if at[row] < length[row]:
                actions[row] = plans[row, at[row]]
            at[row] += 1
        return (int(actions[0]) if single else actions), (episode, known, seen, plans, at, length)

    def _think(
        self, row: int, frame: np.ndarray, known: int, seen: int, idle: bool
    ) -> tuple[int, int, np.ndarray | None]:
        """What is known and seen after a frame, and a new plan, if it is time for one."""
        raise AssertionError("a subclass thinks")

    def _way(self, row: int, *what: int) -> np.ndarray:
        return _ways().find(self._trials.state[row : row + 1], *what)[0]


class OracleReader3D(_Guided):
    """Goes to where the sign can be read, reads its pixels, goes to the office; knows the way in later episodes.

    Where it comes to the office and nothing ends, and where the sign is blank, it turns on the spot.

    Args:
        episodes: Episodes of a trial, after which what was read is forgotten.
    """

    def _think(
        self, row: int, frame: np.ndarray, known: int, seen: int, idle: bool
    ) -> tuple[int, int, np.ndarray | None]:
        # ``seen`` is 1 once a sign was read, with words or without.
        if not seen:
            meaning = read(self._trials, row, frame)
            if meaning is not None:
                return meaning, 1, self._way(row, TO_BOX, meaning) if meaning >= 0 else np.empty(0, np.int64)
            if not idle:
                return known, seen, None
            plan = self._way(row, TO_SIGN)
            # A pose that is off by a rounding error may show a pixel less than expected, so look for more.
            return known, seen, plan if len(plan) else self._way(row, TO_SIGN, 0, 2 * LEGIBLE)
        return known, seen, self._way(row, TO_BOX, known) if idle and known >= 0 else None


class NonReader3D(_Guided):
    """Looks into the offices, the one seen soonest first, and goes to the blue box; it never looks at the sign.

    In later episodes of a trial it goes straight to the box if it saw it, or looks into the offices that are left.

    Args:
        episodes: Episodes of a trial, after which what was seen is forgotten.
    """

    def _think(
        self, row: int, frame: np.ndarray, known: int, seen: int, idle: bool
    ) -> tuple[int, int, np.ndarray | None]:
        if known >= 0:
            return known, seen, self._way(row, TO_BOX, known) if idle else None
        found = blue_office(self._trials, row, frame)
        if found >= 0:
            return found, seen, self._way(row, TO_BOX, found)
        one = self._trials.state[row]
        scene = env3d.world().scenes[one["layout"]]
        pose = float(one["x"]), float(one["z"]), float(one["heading"]), int(one["doors"])
        for office in range(OFFICES):
            seen |= int(raycast.sees_box(scene, *pose, office)) << office
        if not idle:
            return known, seen, None
        return known, seen, self._way(row, TO_SIGHT, _OFFICE_DOORS & ~seen or _OFFICE_DOORS)


class RandomPolicy3D:
    """Every action alike.

    Args:
        seed: Of its own generator.
    """

    def __init__(self, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)

    def predict(
        self,
        observation: np.ndarray,
        state: Any = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = True,
    ) -> tuple[Any, None]:
        """The next actions, as ``Policy.predict``."""
        shape = np.shape(observation)
        action = self._rng.integers(len(env3d.ACTIONS), size=shape[0] if len(shape) == 4 else 1)
        return (action if len(shape) == 4 else int(action[0])), None


# ------------------------------------------------------------------------------------------------------------- steps


@dataclass(frozen=True, eq=False)
class Reach:
    """Steps of shortest ways in the first episodes of some trials, int64 [trials]; ``LONGEST`` + 1 where none is.

    Attributes:
        read: From the start to where the sign can be read.
        after: From there to the blue box.
        direct: From the start to the blue box.
    """

    read: np.ndarray
    after: np.ndarray
    direct: np.ndarray

    def summary(self, horizon: int = env3d.HORIZON) -> dict[str, float]:
        """Shares of starts from which the sign can be read, the box be reached after reading, and be reached directly.

        The second is what a perfect reader can at most reach in the first episode, the third in later ones; and the
        means of the steps.
        """
        return {
            "read": float((self.read <= horizon).mean()),
            "read_and_reached": float((self.read + self.after <= horizon).mean()),
            "reached": float((self.direct <= horizon).mean()),
            "read_steps": float(self.read.mean()),
            "read_and_reached_steps": float((self.read + self.after).mean()),
            "reached_steps": float(self.direct.mean()),
        }


def reach(trials: int = 500, split: str = "test", seed: int = 0) -> Reach:
    """Finds shortest ways from the starts of trials; see ``Reach``.

    Args:
        trials: How many; trial ``i`` has the seed ``seed + i``.
        split: Whose trials.
        seed: The first seed.

    Raises:
        UserError: Unknown split, or fewer than one trial.
    """
    env = env3d.OfficeNav3DVectorEnv(trials, split=split)
    env.reset(seed=seed)
    steps = np.full((3, trials), LONGEST + 1)
    for row in range(trials):
        one = env.trials.state[row : row + 1].copy()
        goal = int(one["goal"][0])
        direct, _ = _ways().find(one, TO_BOX, goal)
        read_, pose = _ways().find(one, TO_SIGN)
        one["x"], one["z"], one["heading"] = pose
        one["doors"] |= _DOOR_OF_SIGN  # it has been opened: else the sign could not be seen
        after, _ = _ways().find(one, TO_BOX, goal)
        for place, found in enumerate((read_, after, direct)):
            if len(found):
                steps[place, row] = len(found)
    return Reach(*steps)


def scores_page(trials: int = 500, seed: int = 0) -> list[str]:
    """Measured scores of the reference policies on every split but ``style`` as lines of Markdown; takes minutes.

    Args:
        trials: Trials of each split and policy.
        seed: Seed of the first trial.
    """
    lines = [
        "| split | policy | 1st episode | 2nd episode | steps in the 2nd | first office is the sign's |",
        "|---|---|---|---|---|---|",
    ]
    for split in env3d.SPLITS[:4]:
        for name, policy in (
            ("oracle", OracleReader3D()),
            ("non-reader", NonReader3D()),
            ("random", RandomPolicy3D(seed)),
        ):
            found = reading3d(policy, trials=trials, split=split, seed=seed).summary()
            lines.append(
                f"| {split} | {name} | {found['first_episode_return']:.3f} | {found['return']:.3f} "
                f"| {found['length']:.1f} | {found['first_named']:.3f} |"
            )
    return lines
