"""Whether an agent reads in the 3D office: ``metrics.reading`` for ``OfficeNav3D-v0``.

What counts as what:

- *enters* an office: comes as near to its box as ends the episode at the blue one;
- *doors*: those of offices that are open, without the sign room's;
- *saw the sign*: it was in a frame so large that any two phrases that name different offices differ there by
  ``LEGIBLE`` pixels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav import env3d, raycast
from fleetgym.envs.office_nav.metrics import SIGNS, Reading
from fleetgym.envs.office_nav.rng import UNIT

#: Pixels by which two phrases of different meaning differ at least (``raycast.contrast``) where a sign counts as
#: legible. Straight before the middle of the sign they are 120 from six metres, 92 from 6.6 m and 46 from 9.4 m, the
#: farthest place from which one can open the door.
LEGIBLE = 84


def _swapped(goal: np.ndarray, seed: int) -> tuple[np.ndarray, list[str]]:
    """Another office for each trial, and a phrase for it, drawn as the environment draws them."""
    rng = np.random.default_rng([seed, 0x51C7])
    named = (goal + rng.integers(1, env3d.OFFICES, size=len(goal))) % env3d.OFFICES
    drawn = rng.integers(UNIT, size=len(goal))
    # Of the split "phrases" the only phrase names one office, so all splits have the phrases of "train" here.
    shown = (env3d.phrase_table("train")[named] > drawn[:, None]).argmax(1)
    return named, [env3d.TEXTS[phrase] for phrase in shown]


def reading3d(policy: Any, *, trials: int = 500, sign: str = "true", split: str = "test", seed: int = 0) -> Reading:
    """Plays trials and notes what tells a reader from others.

    All trials are played side by side: ``policy.predict`` sees one batch of observations ``[trials, 60, 80, 3]`` a
    step, with ``episode_start`` set where an episode begins. A trial's episodes follow each other without ``state``
    being lost. A policy with ``attach`` is given the environment before.

    Args:
        policy: A ``Policy``.
        trials: How many; trial ``i`` has the seed ``seed + i``.
        sign: ``"true"``, ``"swapped"`` (in both episodes it names the same other office) or ``"blank"``.
        split: Whose buildings and signs.
        seed: The first seed.

    Returns:
        What happened, with ``blue`` true for the goal alone.

    Raises:
        UserError: Unknown split or choice of sign, an impossible seed, or fewer than one trial.
    """
    if sign not in SIGNS:
        raise unknown("choice of sign", sign, SIGNS)
    if isinstance(trials, bool) or not isinstance(trials, (int, np.integer)) or trials < 1:
        raise UserError(f"trials {trials!r}: there must be at least 1")
    env = env3d.OfficeNav3DVectorEnv(trials, autoreset_mode="next_step", split=split)
    observation, infos = env.reset(seed=seed)
    goal = infos["goal"].copy()
    named = goal.copy()
    if sign == "swapped":
        named, phrases = _swapped(goal, seed)
        observation, _ = env.reset(seed=seed, options={"phrase": phrases})
    elif sign == "blank":
        named = np.full(trials, -1)
        observation, _ = env.reset(seed=seed, options={"phrase": ""})
    if hasattr(policy, "attach"):
        policy.attach(env)
    centres = np.array([env3d.office_centre(office) for office in range(env3d.OFFICES)])

    shape, every = (trials, env3d.EPISODES), np.arange(trials)
    result = {name: np.zeros(shape, dtype) for name, dtype in (("returns", float), ("success", bool), ("length", int))}
    result |= {"doors": np.zeros(shape, int), "saw_sign": np.zeros(shape, bool), "entered": np.full(shape, -1)}
    episode, ended = np.zeros(trials, int), np.zeros(trials, bool)
    start, state = np.ones(trials, bool), None
    while (episode < env3d.EPISODES).any():
        action, state = policy.predict(observation, state, start, True)
        at = np.minimum(episode, env3d.EPISODES - 1)
        playing = (episode < env3d.EPISODES) & ~ended
        result["saw_sign"][every, at] |= env.trials.contrasts(playing & ~result["saw_sign"][every, at]) >= LEGIBLE
        observation, reward, terminated, truncated, _ = env.step(np.asarray(action))
        apart = np.hypot(*(env.pose[:, None, :2] - centres).transpose(2, 0, 1))
        entered = np.where(apart.min(1) < raycast.NEAR, apart.argmin(1), -1)
        doors = (env.trials.state["doors"][:, None] >> np.arange(env3d.OFFICES) & 1).sum(1)
        result["returns"][every, at] += np.where(playing, reward, 0.0)
        result["length"][every, at] += playing
        result["doors"][every, at] = np.where(playing, doors, result["doors"][every, at])
        first = playing & (result["entered"][every, at] < 0)
        result["entered"][every, at] = np.where(first, entered, result["entered"][every, at])
        result["success"][every, at] |= playing & terminated
        start, ended = ended, terminated | truncated
        episode += playing & ended
    env.close()
    blue = goal[:, None] == np.arange(env3d.OFFICES)
    return Reading(sign=sign, named=named, blue=blue, trial_seeds=seed + every, **result)
