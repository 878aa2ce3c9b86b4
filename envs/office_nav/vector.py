"""Many OfficeNav environments in one, stepped by compiled kernels: ``gym.make_vec("OfficeNav-v0", num_envs=N)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav import drawing, kernels, tiles
from fleetgym.envs.office_nav.variants import Tables, Variant, resolve_variant, tables

_MODES = {
    AutoresetMode.SAME_STEP: kernels.SAME_STEP,
    AutoresetMode.NEXT_STEP: kernels.NEXT_STEP,
    AutoresetMode.DISABLED: kernels.DISABLED,
}
_OPTIONS = ("task_id", "split", "new_trial")


def observation_space(variant: Variant) -> spaces.Dict:
    """What one environment of a variant observes."""
    # Symbols end where they end: what goes up to 255 is taken for a photograph by Stable-Baselines3.
    most = 255 if variant.view == "rgb" else int(tiles.SYMBOLS.max())
    return spaces.Dict(
        {
            "image": spaces.Box(0, most, variant.image_shape, np.uint8),
            "sign": spaces.Box(0, 255, (84, 84, 3), np.uint8),
            "on_sign": spaces.Discrete(2),
        }
    )


def resolve_autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode by itself, its name or its value.

    Raises:
        UserError: Unknown mode.
    """
    if isinstance(mode, AutoresetMode):
        return mode
    modes = {key: mode for mode in AutoresetMode for key in (mode.name.lower(), mode.value.lower())}
    if str(mode).lower() not in modes:
        raise unknown("autoreset mode", mode, [mode.name.lower() for mode in AutoresetMode])
    return modes[str(mode).lower()]


def resolve_number(num_envs: Any) -> int:
    """How many environments.

    Raises:
        UserError: Not an integer, below 1 or beyond what an array can hold.
    """
    if isinstance(num_envs, bool) or not isinstance(num_envs, (int, np.integer)) or not 1 <= num_envs < 1 << 31:
        raise UserError(f"num_envs is {num_envs!r}; it is an integer from 1 to {(1 << 31) - 1}")
    return int(num_envs)


def resolve_options(options: Any) -> dict[str, Any]:
    """The options of a reset as a new dict.

    Raises:
        UserError: Not a mapping.
    """
    if options is not None and not isinstance(options, Mapping):
        raise UserError(f"options {options!r}: give a dict with any of {', '.join(_OPTIONS)}")
    return dict(options or {})


@dataclass(frozen=True)
class Resets:
    """What a call of ``reset`` comes to for each row; arrays [number].

    Attributes:
        mask: Which rows are reset, bool.
        fresh: 0 goes on with the trial, 1 begins the next one, 2 begins trial 0 of a seed, int64.
        split: The number of the split from now on, or -1 for the present one, int64.
        task: The task id of the trial that begins, or -1 for one that is drawn, int64.
        seeds: One a row or None.
    """

    mask: np.ndarray
    fresh: np.ndarray
    split: np.ndarray
    task: np.ndarray
    seeds: Sequence[int | None]

    def drawn_seeds(self, draw_seed: Callable[[], int]) -> np.ndarray:
        """The 64 bits of the seeds of the rows with ``fresh`` 2, int64; those that have none are drawn."""
        given = (self.seeds[row] for row in np.flatnonzero(self.mask & (self.fresh == 2)))
        seeds = [int(seed if seed is not None else draw_seed()) % (1 << 64) for seed in given]
        return np.array(seeds, np.uint64).view(np.int64)


def resolve_seeds(seed: Any, number: int) -> list[Any]:
    """One seed for each of a number of environments: of an integer, ``seed + i``.

    Raises:
        UserError: As many seeds as there are not environments.
    """
    if seed is None or isinstance(seed, (int, np.integer)):
        plain = seed is None or seed < 0 or isinstance(seed, bool)  # what is no seed is refused later on
        return [seed if plain else int(seed) + i for i in range(number)]
    if np.ndim(seed) != 1 or isinstance(seed, (str, bytes)):
        return [seed] * number  # refused as well
    seeds = list(seed)
    if len(seeds) != number:
        raise UserError(f"{len(seeds)} seeds for {number} environments; give one each, or one integer")
    return seeds


def resolve_actions(actions: Any, number: int, names: Sequence[str]) -> np.ndarray:
    """Actions as contiguous int64 [number]; whether they exist is not looked at.

    Raises:
        UserError: They are no integers, or not as many as environments.
    """
    try:
        array = np.asarray(actions)
    except ValueError:  # rows of different lengths
        array = np.empty(0, object)
    if array.shape != (number,) or array.dtype.kind not in "iu":
        raise UserError(
            f"actions are {array.dtype} of shape {array.shape}; give {number} integers from 0 to {len(names) - 1} "
            f"({', '.join(names)})"
        )
    return np.ascontiguousarray(array, np.int64)


def resolve_mask(mask: Any, started: np.ndarray) -> np.ndarray:
    """Which environments are reset, bool [number]; None means all.

    Raises:
        UserError: A mask of another shape or type, without a True, or before the first reset of all.
    """
    if mask is None:
        return np.ones(len(started), bool)
    mask = np.asarray(mask)
    if mask.shape != started.shape or mask.dtype != bool or not mask.any():
        raise UserError(
            f"reset_mask: it is a bool array of shape {started.shape} with a True in it, "
            f"not {mask.dtype} of shape {mask.shape}"
        )
    if not (mask | started).all():
        raise UserError("reset_mask: the first reset is of all environments")
    return mask


def resolve_reset(
    tables: Tables,
    default: int,
    seeds: Sequence[Any],
    options: Mapping[str, Any] | None,
    mask: np.ndarray,
    started: np.ndarray,
    episodes: Callable[[], np.ndarray],
) -> Resets:
    """What ``reset`` is to do, checked.

    Args:
        tables: The variant's tables.
        default: The number of the split of trials that a seed begins.
        seeds: One a row; None goes on without one.
        options: ``task_id`` (an integer or one a row), ``split`` (a name or one a row) and ``new_trial``.
        mask: Which rows are reset, bool [number].
        started: Which rows have been seeded, bool [number].
        episodes: Called for the present episode of each row's trial, [number], if that matters.

    Raises:
        UserError: Unknown option or split, an impossible task id or seed, or options that contradict each other.
    """
    number = len(mask)
    options = resolve_options(options)
    for key in options:
        if key not in _OPTIONS:
            raise UserError(f"reset option {key!r}: the options are {', '.join(_OPTIONS)}")
    names = _each("split", options.get("split"), str, number)
    ids = _each("task_id", options.get("task_id"), (int, np.integer), number)
    new = options.get("new_trial")
    if new is not None and not isinstance(new, (bool, np.bool_)):
        raise UserError(f"new_trial {new!r}: it is True or False")
    task, split = np.full(number, -1), np.full(number, -1)
    fresh = np.zeros(number, np.int64)
    told = any(value is not None for value in (*options.values(), *seeds))
    for row in np.flatnonzero(mask if told else mask & ~started):
        seed, name, task_id = seeds[row], names[row], ids[row]
        if seed is not None and (isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or seed < 0):
            raise UserError(f"seed {seed!r}: it is a non-negative integer")
        if task_id is not None:
            task[row], split[row] = tables.check_task(task_id, name)
        elif name is not None:
            split[row] = tables.split(name)
        elif seed is not None:
            split[row] = default
        begins = seed is not None or not started[row]
        if new is not None and not new:
            if begins or name is not None or task_id is not None:
                what = "task_id" if task_id is not None else "split" if name is not None else "a seed"
                what = what if name is not None or task_id is not None or seed is not None else "the first reset"
                raise UserError(f"new_trial=False goes on with a trial, but {what} begins one; leave one of them out")
            if episodes()[row] >= tables.variant.episodes:
                raise UserError(
                    f"new_trial=False: the trial is finished ({tables.variant.episodes} of {tables.variant.episodes} "
                    f"episodes); reset() or new_trial=True begins the next one"
                )
        fresh[row] = 2 if begins else int(bool(new) or name is not None or task_id is not None)
    return Resets(mask, fresh, split, task, seeds)


def refuse(variant: Variant, code: int, actions: np.ndarray) -> None:
    """Says what ``kernels.step`` found wrong.

    Raises:
        UserError: Always.
    """
    if code > kernels.BAD_DONE:
        row = kernels.BAD_ACTION - code
        allowed = ", ".join(f"{index} {name}" for index, name in enumerate(variant.actions))
        raise UserError(f"action {int(actions[row])} of environment {row} does not exist; the actions are {allowed}")
    raise UserError(
        f"environment {kernels.BAD_DONE - code}: its episode has ended; "
        f"call reset(options={{'reset_mask': terminated | truncated}}) first"
    )


def _each(key: str, value: Any, types: Any, number: int) -> Sequence[Any]:
    if value is None or isinstance(value, types):
        return [value] * number
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if key == "task_id" and isinstance(value, (bool, float, str, dict)):
        return [value] * number  # refused with the ids that exist
    if not isinstance(value, (list, tuple)) or len(value) != number:
        raise UserError(f"{key} {value!r}: give one value, or {number}, one for each environment")
    return value


class Rows:
    """The state of ``number`` environments of a variant and how they are reset: what the single and the vector share.

    Attributes:
        variant: The variant.
        tables: Its tables.
        rules: The tables as the kernels take them, for moves and resets.
        sights: The same for views and signs.
        default: The number of the split that trials come from after a seed.
        state: int64 [16, number], see ``kernels.STATE``.
        started: Which rows have been seeded, bool [number].
    """

    def __init__(self, variant: Variant, split: str, number: int):
        """Builds rows that have not been reset."""
        self.variant, self.tables = variant, tables(variant)
        self.rules, self.sights = kernels.world(self.tables)
        self.default = self.tables.split(split)
        self.state = np.zeros((len(kernels.STATE), number), np.int64)
        self.state[kernels.SPLIT] = self.default
        self.started = np.zeros(number, bool)

    def __getstate__(self) -> dict[str, Any]:
        # The tables are built anew from the variant: they are large, and shared within a process.
        return {key: value for key, value in self.__dict__.items() if key not in ("tables", "rules", "sights")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.tables = tables(self.variant)
        self.rules, self.sights = kernels.world(self.tables)

    def reset(
        self,
        seeds: Sequence[int | None],
        options: Mapping[str, Any] | None,
        draw_seed: Callable[[], int],
        mask: np.ndarray | None = None,
    ) -> None:
        """Resets the rows of ``mask`` (all by default).

        Args:
            seeds: One a row; None goes on without one.
            options: ``task_id`` (an integer or one a row), ``split`` (a name or one a row) and ``new_trial``.
            draw_seed: Called without arguments for the seed of a row that never had one.
            mask: bool [number].

        Raises:
            UserError: See ``resolve_reset``. Nothing has been reset then.
        """
        mask = np.ones(len(self.started), bool) if mask is None else mask
        resets = resolve_reset(
            self.tables, self.default, seeds, options, mask, self.started, lambda: self.state[kernels.EPISODE]
        )
        self.apply(resets, draw_seed)

    def apply(self, resets: Resets, draw_seed: Callable[[], int]) -> None:
        """Resets as resolved; arguments as of ``reset``."""
        fresh = resets.mask & (resets.fresh == 2)
        self.state[kernels.SEED, fresh] = resets.drawn_seeds(draw_seed)
        kernels.reset(self.rules, self.state, resets.mask, resets.fresh, resets.split, resets.task)
        self.started |= resets.mask

    def info(self) -> np.ndarray:
        """What ``kernels.INFO`` names, of every row, int64 [6, number]; a new array."""
        info = self.state[: len(kernels.INFO)].copy()
        info[kernels.EPISODE] -= 1  # the state counts the trial's episodes, the info has an index
        return info

    def phrase(self, row: int) -> str:
        """What the row's sign says; for a picture, its style."""
        s = self.state[:, row]
        if self.variant.sign == "text":
            return self.tables.phrases[s[kernels.LAYOUT]][s[kernels.SHOWN]]
        from fleetgym.envs.office_nav import signs

        return signs.picture_styles(self.tables.layouts[s[kernels.LAYOUT]].name).names[s[kernels.SHOWN]]

    def sign(self, row: int) -> np.ndarray:
        """What hangs at the sign's place now, uint8 [84, 84, 3]; a new array."""
        words = np.empty(kernels.SIGN_WORDS, np.uint64)
        s = self.state
        kernels.draw_sign(self.sights, s[kernels.LAYOUT, row], s[kernels.SHOWN, row], s[kernels.TASK, row], words)
        return words.view(np.uint8).reshape(84, 84, 3)

    def frame(self, row: int) -> np.ndarray:
        """The whole building from above and, on the sign, what it shows; uint8 [height, width, 3]."""
        return drawing.frame(self, row)

    def text(self, row: int) -> str:
        """The whole building in characters."""
        return drawing.text(self, row)


class OfficeNavVectorEnv(VectorEnv):
    """``num_envs`` independent OfficeNav environments; row ``i`` is what ``OfficeNavEnv`` is with seed ``seed + i``.

    Observations, rewards, trials, ``reset`` and its options are those of ``OfficeNavEnv``; there, an option may also be
    a sequence with one value for each environment. Infos are arrays over environments: ``trial``, ``episode_index``,
    ``task_id``, ``phrase_id`` (the number of the phrase in ``phrases`` or of the style), ``goal`` and ``success``.

    ``image`` and ``sign`` are written in place, in two sets of arrays in turn: what ``step`` returns stays as it is
    until the step after the next. Copy what you keep, or ask for ``copy=True``.

    All three autoreset modes are there. In ``SAME_STEP`` the observations and infos of episodes that ended are in
    ``infos["final_obs"]`` and ``infos["final_info"]``, as Gymnasium has them; signs that are not seen are there one
    array of zeros that cannot be written.
    """

    metadata = {"render_modes": ["rgb_array", "ansi"], "render_fps": 10}

    def __init__(
        self,
        num_envs: int = 1,
        *,
        variant: str | Variant = "OfficeNav-v0",
        split: str = "train",
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        copy: bool = False,
        max_episode_steps: int | None = None,
        **changes: Any,
    ):
        """Builds the environments.

        Args:
            num_envs: How many.
            variant: An id of ``VARIANTS``.
            split: Where trials come from, unless ``reset`` is told otherwise.
            render_mode: None, ``"rgb_array"`` or ``"ansi"``; ``render`` returns one frame for each environment.
            autoreset_mode: What happens after an episode's last step.
            copy: Return new arrays from every call.
            max_episode_steps: Another name for ``horizon``.
            **changes: Attributes of ``Variant`` to change, such as ``horizon``.

        Raises:
            UserError: Anything of that is unknown or impossible; the message names what is allowed.
        """
        self.num_envs = resolve_number(num_envs)
        if render_mode is not None and render_mode not in self.metadata["render_modes"]:
            raise UserError(f"render_mode {render_mode!r}: it is None, {', '.join(self.metadata['render_modes'])}")
        if max_episode_steps is not None:
            changes["horizon"] = max_episode_steps
        self.variant = resolve_variant(variant, changes)
        self.autoreset_mode = resolve_autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.render_mode, self.copy = render_mode, copy
        self.single_observation_space = observation_space(self.variant)
        self.single_action_space = spaces.Discrete(len(self.variant.actions))
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self._rows = Rows(self.variant, split, self.num_envs)
        self._mode = _MODES[self.autoreset_mode]
        self._rgb = self.variant.view == "rgb"
        self._blank = np.zeros((84, 84, 3), np.uint8)
        self._all = np.ones(self.num_envs, bool)
        self._blank.flags.writeable = self._all.flags.writeable = False
        self._make_buffers()

    def _make_buffers(self) -> None:
        self._buffers = [self._arrays(self.num_envs) for _ in range(2)]
        self._drawn = [np.full(self.num_envs, -1) for _ in range(2)]
        self._turn = 0

    def __getstate__(self) -> dict[str, Any]:
        # The buffers hold two views of the same memory, which pickling would part; all is written anew by a step.
        return {key: value for key, value in self.__dict__.items() if key not in ("_buffers", "_drawn", "_turn")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._blank.flags.writeable = self._all.flags.writeable = False
        self._make_buffers()

    def _arrays(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Image and sign for a number of rows, and both as the kernels want them: (image, sign, words, sign words)."""
        image = np.zeros((number, *self.variant.image_shape), np.uint8)
        sign = np.zeros((number, 84, 84, 3), np.uint8)
        words = image.reshape(number, -1).view(np.uint64) if self._rgb else np.zeros((1, 1), np.uint64)
        return image, sign, words, sign.reshape(number, -1).view(np.uint64)

    @property
    def phrases(self) -> tuple[str, ...]:
        """The phrases by ``phrase_id`` in the variant's own layout; empty for pictures."""
        return self._rows.tables.phrases[0]

    def _turned(self) -> tuple[np.ndarray, ...]:
        """The other set of arrays, which is to be written now: image, words, sign words and what the signs hold."""
        self._turn ^= 1
        image, _, words, sign_words = self._buffers[self._turn]
        return image.reshape(self.num_envs, -1), words, sign_words, self._drawn[self._turn]

    def _seen(self, on_sign: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Observation and infos out of the arrays that were written last."""
        image, sign, _, _ = self._buffers[self._turn]
        if self.copy:
            image, sign = image.copy(), sign.copy()
        return {"image": image, "sign": sign, "on_sign": on_sign}, self._infos(self._rows.info(), self._all)

    def _infos(self, info: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
        infos: dict[str, Any] = {}
        for name, values in zip(kernels.INFO, info):
            infos[name], infos[f"_{name}"] = values, mask
        infos["success"] = info[-1] != 0
        return infos

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Resets all environments, or those of ``options["reset_mask"]`` (bool [num_envs]).

        Args:
            seed: An integer (environment ``i`` gets ``seed + i``), one for each environment, or None.
            options: See ``OfficeNavEnv.reset``.

        Raises:
            UserError: See ``OfficeNavEnv.reset``; or seeds or a mask of the wrong size.
        """
        rows, options = self._rows, resolve_options(options)
        seeds = resolve_seeds(seed, self.num_envs)
        mask = resolve_mask(options.pop("reset_mask", None), rows.started)
        resets = resolve_reset(
            rows.tables, rows.default, seeds, options, mask, rows.started, lambda: rows.state[kernels.EPISODE]
        )
        given = next((value for value in seeds if value is not None), None)
        if given is not None:
            super().reset(seed=int(given))
        rows.apply(resets, lambda: int(self.np_random.integers(1 << 63)))
        image, words, sign, drawn = self._turned()
        on_sign = np.empty(self.num_envs, np.int64)
        kernels.observe(rows.sights, rows.state, image, words, self._rgb, sign, drawn, on_sign)
        return self._seen(on_sign)

    def step(
        self, actions: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Moves every environment.

        Args:
            actions: Integers [num_envs].

        Raises:
            UserError: Actions of another shape or that do not exist, no reset before, or (``DISABLED``) an environment
                whose episode has ended. Nothing has moved then.
        """
        rows, number = self._rows, self.num_envs
        actions = resolve_actions(actions, number, self.variant.actions)
        if not rows.started.all():
            raise UserError("step before reset; call reset() first")
        rewards, on_sign = np.empty(number), np.empty(number, np.int64)
        terminated, truncated = np.empty(number, bool), np.empty(number, bool)
        image, words, sign, drawn = self._turned()
        ended, (which, last_image, last_on, signs, last_info) = kernels.advance(
            rows.rules,
            rows.sights,
            rows.state,
            actions,
            self._mode,
            True,
            rewards,
            terminated,
            truncated,
            image,
            words,
            self._rgb,
            sign,
            drawn,
            on_sign,
        )
        if ended < 0:
            self._turn ^= 1
            refuse(self.variant, ended, actions)
        observation, infos = self._seen(on_sign)
        if len(which):
            final, done = np.full(number, None, object), terminated | truncated
            last_image = last_image.reshape(ended, *self.variant.image_shape)
            blank = self._blank
            final[which] = [{"image": seen, "sign": blank, "on_sign": on} for seen, on in zip(last_image, last_on)]
            for row, hangs in zip(which[last_on != 0], signs.view(np.uint8).reshape(-1, 84, 84, 3)):
                final[row]["sign"] = hangs
            infos["final_obs"], infos["_final_obs"] = final, done
            infos["final_info"], infos["_final_info"] = self._infos(last_info, done), done
        return observation, rewards, terminated, truncated, infos

    def render(self) -> tuple[Any, ...]:
        """One frame (uint8 [height, width, 3]) or text for each environment.

        Raises:
            UserError: Made without ``render_mode``, or not reset.
        """
        if self.render_mode is None:
            raise UserError(f"no render_mode; make it with one of {', '.join(self.metadata['render_modes'])}")
        if not self._rows.started.all():
            raise UserError("render before reset; call reset() first")
        draw = self._rows.frame if self.render_mode == "rgb_array" else self._rows.text
        return tuple(draw(row) for row in range(self.num_envs))


def make_vec(variant: str, num_envs: int = 1, **kwargs: Any) -> OfficeNavVectorEnv:
    """The vector environment of a variant; arguments as of ``OfficeNavVectorEnv``."""
    return OfficeNavVectorEnv(num_envs, variant=variant, **kwargs)
