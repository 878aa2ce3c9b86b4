"""OfficeNav as tensors: every environment's state and observation lie on one device."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding

from fleetgym.core.errors import UserError, unknown
from fleetgym.envs.office_nav import kernels
from fleetgym.envs.office_nav.torch_tensors import TensorRows
from fleetgym.envs.office_nav.variants import Variant, resolve_variant, tables
from fleetgym.envs.office_nav.vector import (
    Resets,
    Rows,
    refuse,
    resolve_actions,
    resolve_mask,
    resolve_number,
    resolve_options,
    resolve_reset,
    resolve_seeds,
)

Tensor = torch.Tensor
_MODES = {"same_step": kernels.SAME_STEP, "next_step": kernels.NEXT_STEP, "disabled": kernels.DISABLED}


class _KernelRows:
    """What ``TensorRows`` is, on the CPU: the kernels of the vector environment, in the memory of tensors."""

    def __init__(self, rows: Rows, sign: str, mode: str, final_obs: bool):
        number = len(rows.started)
        self.rows, self.mode, self.final_obs, self.index = rows, _MODES[mode], final_obs, sign == "index"
        self._rgb = rows.variant.view == "rgb"
        # NumPy's zeros, unlike those of torch, lie in large pages of memory, and take it up only where it is written.
        self._image = torch.from_numpy(np.zeros((number, *rows.variant.image_shape), np.uint8))
        # The signs of observations and of last observations; ``_drawn`` and ``_last_drawn`` tell which are not black.
        signs = [np.zeros((0 if self.index else number, 84, 84, 3), np.uint8) for _ in range(2)]
        self._sign, self._last_sign = map(torch.from_numpy, signs)
        self._last_drawn = np.zeros(0, np.int64)
        self._drawn, self._nothing = np.full(number, -1), np.zeros((1, 1), np.uint64)
        if rows.variant.sign == "text":
            text = rows.sights.text.view(np.uint8).reshape(-1, 84, 84, 3)
            self.sign_pixels = torch.from_numpy(np.concatenate([np.zeros_like(text[:1]), text]))

    @property
    def episode(self) -> Tensor:
        """The episode's number in its trial, int64 [B]."""
        return torch.from_numpy(self.rows.state[kernels.EPISODE])

    def __getstate__(self) -> dict[str, Any]:
        # They are other views of the tensors' memory, which pickling would part.
        return {key: value for key, value in self.__dict__.items() if key != "_arrays"}

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, bool, np.ndarray, np.ndarray]:
        """Where the kernels write: image, words, whether these are wanted, sign and what it holds."""
        image, sign = self._image.numpy().reshape(len(self._image), -1), self._sign.numpy()
        words = image.view(np.uint64) if self._rgb else self._nothing
        return image, words, self._rgb, sign.reshape(len(sign), 84 * 84 * 3).view(np.uint64), self._drawn

    def reset(self, resets: Resets, draw_seed: Callable[[], int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """See ``TensorRows.reset``."""
        self.rows.apply(resets, draw_seed)
        on_sign = np.empty(len(self._image), np.int64)
        kernels.observe(self.rows.sights, self.rows.state, *self._arrays, on_sign)
        return self._seen(on_sign), self._info(self.rows.info())

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """See ``TensorRows.step``."""
        rows, number = self.rows, len(self._image)
        rewards, on_sign = np.empty(number), np.empty(number, np.int64)
        terminated, truncated = np.empty(number, bool), np.empty(number, bool)
        ended, last = kernels.advance(
            rows.rules,
            rows.sights,
            rows.state,
            actions.numpy(),
            self.mode,
            False,
            rewards,
            terminated,
            truncated,
            *self._arrays,
            on_sign,
        )
        if ended < 0:
            refuse(rows.variant, ended, actions.numpy())
        info: dict[str, Any] = self._info(rows.info())
        if self.mode == kernels.SAME_STEP and self.final_obs:
            info |= self._last(*last)
        reward, ends = torch.from_numpy(rewards).float(), (torch.from_numpy(terminated), torch.from_numpy(truncated))
        return self._seen(on_sign), reward, *ends, info

    def _last(
        self, which: np.ndarray, image: np.ndarray, on_sign: np.ndarray, signs: np.ndarray, info: np.ndarray
    ) -> dict[str, Any]:
        observation = {"image": image.reshape(len(which), *self._image.shape[1:]), "on_sign": on_sign}
        if self.index:
            # The layout is still that of the episode that ended, as only a reset with options changes it.
            layout = self.rows.state[kernels.LAYOUT, which]
            observation["sign_index"] = self._sign_index(on_sign, layout, info[kernels.SHOWN])
        else:
            last = self._last_sign.numpy()
            last[self._last_drawn] = 0
            self._last_drawn = np.flatnonzero(on_sign)
            last[self._last_drawn] = signs.view(np.uint8).reshape(-1, 84, 84, 3)
            observation["sign"] = last[: len(which)]
        tensors = {key: torch.from_numpy(value) for key, value in observation.items()}
        return {"final_rows": torch.from_numpy(which), "final_obs": tensors, "final_info": self._info(info)}

    def _sign_index(self, on_sign: np.ndarray, layout: np.ndarray, shown: np.ndarray) -> np.ndarray:
        return np.where(on_sign, self.rows.sights.text_start[layout] + shown + 1, 0)

    def _seen(self, on_sign: np.ndarray) -> dict[str, Tensor]:
        observation = {"image": self._image, "on_sign": torch.from_numpy(on_sign)}
        if not self.index:
            return observation | {"sign": self._sign}
        state = self.rows.state
        index = self._sign_index(on_sign, state[kernels.LAYOUT], state[kernels.SHOWN])
        return observation | {"sign_index": torch.from_numpy(index)}

    def _info(self, info: np.ndarray) -> dict[str, Tensor]:
        tensors = dict(zip(kernels.INFO, torch.from_numpy(info).unbind()))
        tensors["success"] = torch.from_numpy(info[-1] != 0)
        return tensors


class TorchOfficeNav:
    """Many OfficeNav environments as tensors on one device, with the trajectories of the vector environment.

    With the same seeds and actions, observations, rewards and ends equal those of ``gym.make_vec`` to the bit. On a CPU
    the kernels of the vector environment run in the memory of the tensors; elsewhere a step is some two hundred
    operations on tensors, with no loop over environments. Such a step waits for the device once where signs are pixels
    (which are new?) and, in ``"same_step"`` with ``final_obs``, to learn which episodes ended; with ``sign="index"``
    and ``final_obs=False`` it never does.

    Args:
        num_envs: How many environments.
        device: ``"cpu"``, ``"cuda"``, ...
        variant: An id such as ``"OfficeNav-Symbolic-v0"``, its short form ``"Symbolic"``, or a ``Variant``.
        autoreset: ``"same_step"``: an episode's last step resets that environment and returns the next episode's first
            observation (the last one is in ``info``); ``"next_step"``: the step after it does, whose action is
            ignored; ``"disabled"``: call ``reset(options={"reset_mask": mask})``.
        sign: ``"pixels"``: observations have ``sign``, uint8 ``[B, 84, 84, 3]``, as the other environments have;
            ``"index"``: they have ``sign_index`` instead, int64 ``[B]``, a row of ``sign_pixels``. That saves 21 kB an
            environment, and a network can embed each different sign once.
        split: Where trials come from until ``reset`` names another split.
        final_obs: Whether, in ``"same_step"``, info has the last observations and infos of episodes that ended.
        backend: ``"kernels"`` (on a CPU only), ``"tensors"``, or None: the kernels on a CPU, tensors elsewhere.
        check: Whether a step on tensors looks for actions that do not exist and for episodes that have ended (kernels
            always do). None: on a CPU only, as looking waits for the device. Unchecked actions count as the nearest
            that exists, and what a finished episode goes on to do means nothing.
        **changes: Attributes of the variant to change, such as ``view="symbolic"``.

    Attributes:
        num_envs: How many environments.
        device: Where they are.
        backend: ``"kernels"`` or ``"tensors"``.
        variant: The variant.
        tables: Its tables.

    Raises:
        UserError: ``num_envs`` below 1, an unknown variant, split or choice, or a device that this machine lacks.
    """

    def __init__(
        self,
        num_envs: int,
        device: str | torch.device = "cpu",
        variant: str | Variant = "OfficeNav-v0",
        *,
        autoreset: str = "same_step",
        sign: str = "pixels",
        split: str = "train",
        final_obs: bool = True,
        backend: str | None = None,
        check: bool | None = None,
        **changes: Any,
    ) -> None:
        self.num_envs = resolve_number(num_envs)
        if autoreset not in _MODES:
            raise unknown("autoreset", autoreset, _MODES)
        if sign not in ("pixels", "index"):
            raise unknown("form of signs", sign, ("pixels", "index"))
        if backend not in (None, "kernels", "tensors"):
            raise unknown("backend", backend, ("kernels", "tensors"))
        try:
            self.device = torch.device(device)
            torch.zeros(1, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"device {str(device)!r} cannot be used here: {str(error).splitlines()[0]}") from None
        on_cpu = self.device.type == "cpu"
        self.backend = backend or ("kernels" if on_cpu else "tensors")
        if self.backend == "kernels" and not on_cpu:
            raise UserError(
                f"backend 'kernels' works on the CPU, not on {self.device}; leave it out, or take 'tensors'"
            )
        self.autoreset, self.sign = autoreset, sign
        self.variant = resolve_variant(variant, changes)
        if sign == "index" and self.variant.sign != "text":
            raise UserError("sign 'index' is for signs of text; a picture shows the building, so take sign='pixels'")
        self.tables = tables(self.variant)
        self._default = self.tables.split(split)
        if self.backend == "kernels":
            rows = Rows(self.variant, split, self.num_envs)
            self._rows: _KernelRows | TensorRows = _KernelRows(rows, sign, autoreset, final_obs)
        else:
            check = on_cpu if check is None else check
            self._rows = TensorRows(
                self.tables, self._default, self.num_envs, self.device, sign, autoreset, final_obs, check
            )
        self._started = np.zeros(self.num_envs, bool)
        self._random, _ = seeding.np_random()

    @property
    def sign_pixels(self) -> Tensor:
        """All signs of text, uint8 ``[N, 84, 84, 3]``; row 0 is the black one that is seen off the sign's cell.

        Raises:
            UserError: Signs are pictures.
        """
        if self.variant.sign != "text":
            raise UserError(f"sign_pixels: {self.variant.id} has pictures, each of a building of its own")
        return self._rows.sign_pixels

    def reset(
        self, seed: int | list[int | None] | None = None, *, options: Mapping[str, Any] | None = None
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Resets all environments, or those of ``options["reset_mask"]`` (bool ``[B]``).

        Args:
            seed: An integer (environment ``i`` gets ``seed + i``), one for each environment, or None.
            options: See ``OfficeNavVectorEnv.reset``; tensors are as good as arrays.

        Returns:
            Observation and info, as ``step``.

        Raises:
            UserError: See ``OfficeNavVectorEnv.reset``. Nothing has been reset then.
        """
        options = {
            key: value.cpu().numpy() if isinstance(value, Tensor) else value
            for key, value in resolve_options(options).items()
        }
        seeds = resolve_seeds(seed, self.num_envs)
        mask = resolve_mask(options.pop("reset_mask", None), self._started)
        resets = resolve_reset(
            self.tables, self._default, seeds, options, mask, self._started, lambda: self._rows.episode.cpu().numpy()
        )
        given = next((value for value in seeds if value is not None), None)
        if given is not None:
            self._random, _ = seeding.np_random(int(given))
        self._started |= mask
        return self._rows.reset(resets, lambda: int(self._random.integers(1 << 63)))

    def step(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, Tensor, dict[str, Any]]:
        """One step of every environment.

        Args:
            actions: Integers ``[B]``: 0 left, 1 right, 2 forward, 3 toggle (of the released variant: its seven).

        Returns:
            Observation, reward (float32 ``[B]``), terminated and truncated (bool ``[B]``), info. The tensors ``image``
            and ``sign``, those of ``final_obs`` too, are written again by the next step: clone what you keep. Info has
            ``trial``, ``episode_index``, ``task_id``, ``phrase_id``, ``goal`` and ``success``, ``[B]``; with
            ``"same_step"`` and ``final_obs`` also ``final_rows`` (int64 ``[ended]``), ``final_obs`` and ``final_info``
            of those rows.

        Raises:
            UserError: Before the first reset, actions of another shape, kind or (see ``check``) range, or an episode
                that has ended. Nothing has moved then.
        """
        if not self._started.all():
            raise UserError("step before reset: call reset(seed) first")
        if not isinstance(actions, Tensor):
            actions = torch.from_numpy(resolve_actions(actions, self.num_envs, self.variant.actions))
        if actions.shape != (self.num_envs,) or actions.is_floating_point() or actions.dtype == torch.bool:
            raise UserError(
                f"actions of shape {tuple(actions.shape)} and type {actions.dtype}: they are integers [{self.num_envs}]"
            )
        return self._rows.step(actions.to(self.device, torch.int64).contiguous())
