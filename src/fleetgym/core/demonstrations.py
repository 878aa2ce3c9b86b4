"""Demonstrations: episodes in Minari's format on disk, and as padded sequence batches in memory.

A dataset is a folder with ``data/main_data.hdf5`` and ``data/metadata.json``, laid out by Minari's own storage classes
(https://minari.farama.org/main/content/dataset_standards/), so ``minari.load_dataset`` reads what is written here and
any Minari dataset is read by :meth:`Demonstrations.load`. What Minari has no word for lies under the key ``fleetgym``
of the metadata (``Demonstrations.info``), and in the episode attribute ``success``.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from fleetgym.core.errors import UserError
from fleetgym.core.rollout import Episode

if TYPE_CHECKING:
    import torch

SCHEMA = 1
_KEY = "fleetgym"
_PREFIX = "minari:"


@dataclass(frozen=True)
class SequenceBatch:
    """Sequences of equal length; the places beyond an episode's end hold zeros.

    Attributes:
        observations: [B, T, ...] float32: what the policy saw (the last observation of an episode is not acted on and
            is not here).
        actions: [B, T, Da] float32; int64 for discrete actions.
        mask: [B, T] bool, True where there is data.
    """

    observations: torch.Tensor
    actions: torch.Tensor
    mask: torch.Tensor

    def __len__(self) -> int:
        return len(self.mask)

    @classmethod
    def concatenate(cls, batches: Sequence[SequenceBatch]) -> SequenceBatch:
        """All sequences of several batches, padded to the longest.

        Raises:
            UserError: No batches, or batches of different sizes of observation or action.
        """
        import torch

        if not batches:
            raise UserError("concatenating nothing: pass at least one batch")
        sizes = {(tuple(batch.observations.shape[2:]), tuple(batch.actions.shape[2:])) for batch in batches}
        if len(sizes) > 1:
            raise UserError(f"batches of different observation and action shapes {sorted(sizes)} do not concatenate")
        longest = max(batch.mask.shape[1] for batch in batches)

        def joined(name: str) -> torch.Tensor:
            parts = []
            for batch in batches:
                tensor = getattr(batch, name)
                room = tensor.new_zeros(len(tensor), longest - tensor.shape[1], *tensor.shape[2:])
                parts.append(torch.cat([tensor, room], dim=1))
            return torch.cat(parts)

        return cls(joined("observations"), joined("actions"), joined("mask"))

    def to(self, device: Any) -> SequenceBatch:
        """The batch on another device."""
        return SequenceBatch(self.observations.to(device), self.actions.to(device), self.mask.to(device))


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation of each dimension, in float64, that pool exactly.

    Attributes:
        mean: [...]
        variance: [...], of the population (divided by ``count``).
        count: Number of samples.
        floor: See :attr:`std`.
    """

    mean: np.ndarray
    variance: np.ndarray
    count: int
    floor: float = 1e-4

    @property
    def std(self) -> np.ndarray:
        """[...] standard deviation, 1 where it is tiny: below ``floor``, or below a millionth of the mean.

        A dimension that did not vary carries nothing to learn from, and dividing by its rounding noise would turn the
        first other value met at test time into a huge input. With 1 it is centred and left in its own unit.
        """
        std = np.sqrt(self.variance)
        return np.where(std < np.maximum(self.floor, 1e-6 * np.abs(self.mean)), 1.0, std)

    @classmethod
    def of(cls, values: Any, floor: float = 1e-4) -> Statistics:
        """Statistics of ``values`` [n, ...], over the first axis.

        Raises:
            UserError: No values.
        """
        values = np.asarray(values, dtype=np.float64)
        if len(values) == 0:
            raise UserError("statistics of nothing: there is no sample")
        return cls(values.mean(axis=0), values.var(axis=0), len(values), floor)

    @classmethod
    def pool(cls, parts: Iterable[Statistics]) -> Statistics:
        """The statistics of all the parts' samples together, from their moments alone.

        Source: T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for computing the sample variance" (1983).

        Raises:
            UserError: No parts, or parts of different shapes.
        """
        parts = list(parts)
        if not parts:
            raise UserError("pooling the statistics of nothing: pass at least one part")
        shapes = [part.mean.shape for part in parts]
        if len(set(shapes)) > 1:
            raise UserError(f"statistics of different shapes {shapes} do not pool")
        count = sum(part.count for part in parts)
        weights = [part.count / count for part in parts]
        mean = sum(weight * part.mean for weight, part in zip(weights, parts))
        variance = sum(weight * (part.variance + (part.mean - mean) ** 2) for weight, part in zip(weights, parts))
        return cls(np.asarray(mean), np.asarray(variance), count, min(part.floor for part in parts))

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """Tensors for a checkpoint: float64 ``mean`` and ``variance``, int64 ``count``, float64 ``floor``."""
        import torch

        return {
            "mean": torch.from_numpy(np.array(self.mean, dtype=np.float64)),
            "variance": torch.from_numpy(np.array(self.variance, dtype=np.float64)),
            "count": torch.tensor(self.count, dtype=torch.int64),
            "floor": torch.tensor(self.floor, dtype=torch.float64),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, torch.Tensor]) -> Statistics:
        """The inverse of :meth:`to_tensors`.

        Raises:
            UserError: A tensor is missing.
        """
        missing = {"mean", "variance", "count", "floor"} - set(tensors)
        if missing:
            raise UserError(f"normaliser lacks {sorted(missing)}; it has {sorted(tensors)}")
        array = {name: tensors[name].detach().cpu().numpy() for name in ("mean", "variance")}
        return cls(array["mean"], array["variance"], int(tensors["count"]), float(tensors["floor"]))


class Demonstrations(Sequence):
    """Episodes in memory (at least one), with what is known of their origin.

    Args:
        episodes: With observations and actions recorded.
        observation_space: By default an unbounded Box of the first episode's shape.
        action_space: Likewise.
        env_spec: Gymnasium's spec of the environment, so that Minari can recover it.
        info: JSON-able facts: ``env_id``, ``task``, ``instruction``, ``expert``, ...
        path: Where the dataset lies, for messages.

    Raises:
        UserError: No episodes, or an episode whose arrays do not fit each other.
    """

    def __init__(
        self,
        episodes: Iterable[Episode],
        *,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        env_spec: gym.envs.registration.EnvSpec | None = None,
        info: Mapping[str, Any] | None = None,
        path: str | os.PathLike | None = None,
    ) -> None:
        self._episodes = list(episodes)
        self.path = None if path is None else Path(path)
        if not self._episodes:
            raise UserError(f"{self._where} is empty: at least one episode is needed")
        self.info: dict[str, Any] = dict(info or {})
        self.env_spec = env_spec
        first = self._episodes[0]
        for i, episode in enumerate(self._episodes):
            self._check(i, episode)
        self.observation_space = observation_space or _space_of(first.observations)
        self.action_space = action_space or _space_of(first.actions)
        self._joined: tuple[np.ndarray, np.ndarray] | None = None
        self._lengths = np.array([episode.length for episode in self._episodes])
        self._offsets = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])

    @property
    def _where(self) -> str:
        return "the dataset" if self.path is None else f"dataset {self.path}"

    def _check(self, i: int, episode: Episode) -> None:
        if episode.observations is None or episode.actions is None:
            raise UserError(f"episode {i} of {self._where} has no observations or actions: roll out with record=True")
        steps = episode.length
        observations, actions = _length(episode.observations), _length(episode.actions)
        if steps < 1 or actions != steps or observations not in (steps, steps + 1):
            raise UserError(
                f"episode {i} of {self._where} has {observations} observations, {actions} actions and {steps} rewards; "
                "T+1, T and T with T >= 1 belong together"
            )

    # -- as a collection -------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._episodes)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self._like(self._episodes[index])
        return self._episodes[index]

    def __repr__(self) -> str:
        solved = sum(episode.success for episode in self._episodes)
        name = self.info.get("task") or self.info.get("env_id") or "?"
        return f"Demonstrations({name}: {len(self)} episodes, {self.steps} steps, {solved} solved)"

    def episodes(self) -> list[Episode]:
        """The episodes, in order."""
        return list(self._episodes)

    @property
    def steps(self) -> int:
        """Total number of steps."""
        return int(self._lengths.sum())

    def _like(self, episodes: Iterable[Episode]) -> Demonstrations:
        return Demonstrations(
            episodes,
            observation_space=self.observation_space,
            action_space=self.action_space,
            env_spec=self.env_spec,
            info=self.info,
        )

    def filter(self, keep: Callable[[Episode], bool]) -> Demonstrations:
        """The episodes for which ``keep`` is true.

        Raises:
            UserError: None is.
        """
        kept = [episode for episode in self._episodes if keep(episode)]
        if not kept:
            raise UserError(f"the filter keeps none of the {len(self)} episodes of {self._where}")
        return self._like(kept)

    def map(
        self, function: Callable[[Episode, np.random.Generator], Episode | Iterable[Episode]], seed: int = 0
    ) -> Demonstrations:
        """Applies ``function(episode, rng)`` to each episode; it gives one episode or several, such as augmentations.

        Args:
            function: Must not change the episode that it is given.
            seed: Episode ``i`` gets ``np.random.default_rng([seed, i])``, whatever the others do with theirs.
        """
        out: list[Episode] = []
        for i, episode in enumerate(self._episodes):
            made = function(episode, np.random.default_rng([seed, i]))
            out.extend([made] if isinstance(made, Episode) else made)
        if not out:
            raise UserError(f"map: the function gave no episode for any of the {len(self)} of {self._where}")
        # New episodes may have other shapes than the old spaces say.
        same = _space_of(out[0].observations).shape == self.observation_space.shape
        return Demonstrations(
            out,
            observation_space=self.observation_space if same else None,
            action_space=self.action_space if out[0].actions.shape[1:] == self.action_space.shape else None,
            env_spec=self.env_spec,
            info=self.info,
        )

    @classmethod
    def concatenate(cls, parts: Sequence[Demonstrations]) -> Demonstrations:
        """All episodes of several datasets, in order; ``info["parts"]`` keeps what was known of each.

        Raises:
            UserError: No parts, or parts whose observations or actions differ in shape.
        """
        parts = list(parts)
        if not parts:
            raise UserError("concatenating nothing: pass at least one dataset")
        first = parts[0]
        for i, part in enumerate(parts[1:], start=1):
            for kind in ("observation", "action"):
                ours, theirs = getattr(first, f"{kind}_space"), getattr(part, f"{kind}_space")
                if ours.shape != theirs.shape or type(ours) is not type(theirs):
                    raise UserError(
                        f"dataset {i} has the {kind} space {theirs}, dataset 0 has {ours}: they do not concatenate"
                    )
        specs = [part.env_spec for part in parts]
        return cls(
            [episode for part in parts for episode in part.episodes()],
            observation_space=first.observation_space,
            action_space=first.action_space,
            env_spec=specs[0] if all(spec == specs[0] for spec in specs) else None,
            info={"parts": [part.info for part in parts]},
        )

    def expect(self, observation_size: int | None = None, action_size: int | None = None) -> Demonstrations:
        """Checks the layout before work starts.

        Args:
            observation_size: Do that the caller needs; None for any.
            action_size: Da of continuous actions that the caller needs; None for any.

        Returns:
            These demonstrations.

        Raises:
            UserError: Another size, or a space that is not a vector of numbers.
        """
        for kind, size in (("observation", observation_size), ("action", action_size)):
            space = getattr(self, f"{kind}_space")
            if size is not None and not (isinstance(space, spaces.Box) and space.shape == (size,)):
                raise UserError(
                    f"{self._where} has the {kind} space {space}, but {kind}s of size {size} are needed: "
                    "use a dataset of the same environment as the policy"
                )
        return self

    # -- as batches ------------------------------------------------------------------------------------------------

    def _flat(self) -> tuple[np.ndarray, np.ndarray]:
        """All observations acted on and all actions, one after the other: [steps, ...] each."""
        if self._joined is None:
            for name, space in (("observation", self.observation_space), ("action", self.action_space)):
                if isinstance(space, (spaces.Dict, spaces.Tuple, spaces.Text)):
                    raise UserError(
                        f"{self._where} has the {name} space {space}: flatten it with map() before batching"
                    )
            observations = np.concatenate([episode.observations[: episode.length] for episode in self._episodes])
            actions = np.concatenate([episode.actions for episode in self._episodes])
            for name, array in (("observation", observations), ("action", actions)):
                if array.dtype.kind == "f" and not np.isfinite(array).all():
                    step = int(np.flatnonzero(~np.isfinite(array.reshape(len(array), -1)).all(axis=1))[0])
                    episode = int(np.searchsorted(self._offsets, step, side="right")) - 1
                    raise UserError(f"episode {episode} of {self._where} holds an {name} that is not finite; remove it")
            if observations.dtype == np.float64:
                observations = observations.astype(np.float32)
            if actions.dtype.kind == "f":
                actions = actions.astype(np.float32, copy=False)
            elif actions.dtype.kind in "iu":
                actions = actions.astype(np.int64, copy=False)
            self._joined = observations, actions
        return self._joined

    def statistics(
        self, of: str = "observations", transform: Callable[[np.ndarray], Any] | None = None, floor: float = 1e-4
    ) -> Statistics:
        """Statistics over all steps, for normalising.

        Args:
            of: ``observations`` (those acted on, so not an episode's last) or ``actions``.
            transform: Applied to the array [steps, ...] first, such as a policy's features.
            floor: See :attr:`Statistics.std`.
        """
        if of not in ("observations", "actions"):
            raise UserError(f"statistics of {of!r}: choose 'observations' or 'actions'")
        self._flat()  # checks the spaces and for NaN
        # From the arrays as they were recorded: float64 ones keep their precision here.
        key = {"observations": lambda e: e.observations[: e.length], "actions": lambda e: e.actions}[of]
        values = np.concatenate([key(episode) for episode in self._episodes])
        return Statistics.of(values if transform is None else transform(values), floor)

    def _gather(self, starts: np.ndarray, lengths: np.ndarray, width: int) -> SequenceBatch:
        import torch

        observations, actions = self._flat()
        time = np.arange(width)
        mask = time < lengths[:, None]
        index = np.where(mask, starts[:, None] + time, 0)
        out = []
        for array in (observations, actions):
            rows = array[index]
            rows[~mask] = 0
            out.append(torch.from_numpy(rows))
        return SequenceBatch(out[0].float(), out[1], torch.from_numpy(mask))

    def padded(self) -> SequenceBatch:
        """All episodes as one batch, padded to the longest."""
        return self._gather(self._offsets, self._lengths, int(self._lengths.max()))

    def batches(
        self,
        batch_size: int,
        length: int | None = None,
        rng: np.random.Generator | int = 0,
        *,
        epochs: int | None = None,
        drop_last: bool = False,
    ) -> Iterator[SequenceBatch]:
        """Random batches.

        Args:
            batch_size: Sequences in a batch.
            length: None takes whole episodes, each once an epoch, padded to the longest of the batch. A number takes
                windows of so many steps: the episode is drawn in proportion to its steps, the beginning uniformly; an
                episode shorter than the window is padded. An epoch is then as many windows as the data fills.
            rng: A numpy Generator, or a seed for one. Equal generators give equal batches.
            epochs: How many passes; None goes on for ever.
            drop_last: Leaves out the last batch of an epoch if it is smaller than ``batch_size``.

        Yields:
            The batches.

        Raises:
            UserError: A size below one, or ``drop_last`` that would leave nothing.
        """
        for name, value in (("batch_size", batch_size), ("length", length), ("epochs", epochs)):
            if value is not None and value < 1:
                raise UserError(f"{name}={value}: it must be at least 1")
        rng = np.random.default_rng(rng)
        total = len(self) if length is None else max(1, -(-self.steps // length))
        if drop_last and total < batch_size:
            raise UserError(
                f"drop_last with batch_size={batch_size} leaves nothing of {total} sequences: use a smaller batch"
            )
        self._flat()
        # A generator of its own, so that the checks above run when batches() is called and not at the first next().
        return self._batches(batch_size, length, rng, epochs, total - total % batch_size if drop_last else total)

    def _batches(
        self, batch_size: int, length: int | None, rng: np.random.Generator, epochs: int | None, total: int
    ) -> Iterator[SequenceBatch]:
        shares = self._lengths / self._lengths.sum()
        done = 0
        while epochs is None or done < epochs:
            order = rng.permutation(len(self))[:total] if length is None else None
            for begin in range(0, total, batch_size):
                if order is not None:
                    chosen = order[begin : begin + batch_size]
                    lengths = self._lengths[chosen]
                    yield self._gather(self._offsets[chosen], lengths, int(lengths.max()))
                else:
                    size = min(batch_size, total - begin)
                    chosen = rng.choice(len(self), size=size, p=shares)
                    slack = np.maximum(self._lengths[chosen] - length, 0)
                    starts = self._offsets[chosen] + rng.integers(0, slack + 1)
                    yield self._gather(starts, np.minimum(self._lengths[chosen], length), length)
            done += 1

    # -- on disk ---------------------------------------------------------------------------------------------------

    @staticmethod
    def target(dataset: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """The folder that a dataset would be written to, checked before any work is done for it.

        Args:
            dataset: A folder, or ``minari:<id>`` for a place in Minari's own folder (``MINARI_DATASETS_PATH``).
            overwrite: Whether a dataset may be there already.

        Raises:
            UserError: It exists, is not a folder, holds something else, or the id is malformed.
        """
        if isinstance(dataset, str) and dataset.startswith(_PREFIX):
            root = _minari_root() / _parse_id(dataset[len(_PREFIX) :])
        else:
            root = Path(dataset).expanduser()
        if root.exists() and not root.is_dir():
            raise UserError(f"{root} is a file; a dataset is a folder: choose another name")
        if (root / "data").exists():
            if not (root / "data" / "metadata.json").is_file():
                raise UserError(f"{root / 'data'} exists and is no dataset; choose another folder")
            if not overwrite:
                raise UserError(
                    f"dataset {root} exists already; pass overwrite=True (--overwrite) or choose another name"
                )
        return root

    @classmethod
    def create(
        cls,
        dataset: str | os.PathLike,
        episodes: Iterable[Episode],
        env_id: str | None = None,
        *,
        observation_space: spaces.Space | None = None,
        action_space: spaces.Space | None = None,
        env_spec: gym.envs.registration.EnvSpec | None = None,
        info: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> Demonstrations:
        """Writes episodes as a dataset.

        Args:
            dataset: See :meth:`target`.
            episodes: See :class:`Demonstrations`.
            env_id: Id of their environment, from which spaces and spec are taken where they are not given.
            observation_space: See :class:`Demonstrations`.
            action_space: See :class:`Demonstrations`.
            env_spec: See :class:`Demonstrations`.
            info: See :class:`Demonstrations`.
            overwrite: See :meth:`target`.

        Returns:
            The demonstrations, with ``path`` set.

        Raises:
            UserError: See :meth:`target` and :class:`Demonstrations`.
        """
        root = cls.target(dataset, overwrite=overwrite)
        info = dict(info or {})
        if env_id is not None:
            from fleetgym.core.rollout import _make, _resolve

            env = _make(_resolve(env_id), 0)
            observation_space = observation_space or env.observation_space
            action_space = action_space or env.action_space
            env_spec = env_spec or env.spec
            info.setdefault("env_id", env_id)
            env.close()
        made = cls(
            episodes, observation_space=observation_space, action_space=action_space, env_spec=env_spec, info=info
        )
        made.save(root, overwrite=overwrite)
        return made

    def save(self, dataset: str | os.PathLike, *, overwrite: bool = False) -> Path:
        """Writes the dataset; it is there whole or not at all.

        Args:
            dataset: See :meth:`target`.
            overwrite: See :meth:`target`.

        Returns:
            Its folder.

        Raises:
            UserError: See :meth:`target`; or ``info`` is not JSON.
        """
        from minari.data_collector.episode_buffer import EpisodeBuffer
        from minari.dataset.minari_storage import MinariStorage

        root = self.target(dataset, overwrite=overwrite)
        try:
            json.dumps(self.info, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise UserError(f"info={self.info!r} cannot be written as JSON ({error}); use plain values") from error
        metadata: dict[str, Any] = {
            "dataset_id": _dataset_id(root),
            "minari_version": _minari_version(),
            _KEY: {**self.info, "schema": SCHEMA},
        }
        for key, source in (("algorithm_name", "expert"), ("description", "instruction")):
            if isinstance(self.info.get(source), str) and self.info[source]:
                metadata[key] = self.info[source]
        made = not root.exists()
        root.mkdir(parents=True, exist_ok=True)
        # Absolute: the storage joins its path twice.
        temporary = Path(tempfile.mkdtemp(prefix=".data-", dir=root.resolve()))
        # JPEG loses information; a dataset gives back what was put in. Minari has the switch since 0.5.4, which needs
        # Python 3.11.
        has_switch = "jpeg_encoding" in inspect.signature(MinariStorage.new).parameters
        lossless = {"jpeg_encoding": False} if has_switch else {}
        try:
            storage = MinariStorage.new(
                temporary,
                observation_space=self.observation_space,
                action_space=self.action_space,
                env_spec=_portable(self.env_spec),
                **lossless,
            )
            storage.update_metadata(metadata)
            storage.update_episodes(
                EpisodeBuffer(
                    seed=episode.seed,
                    observations=episode.observations,
                    actions=episode.actions,
                    rewards=episode.rewards,
                    terminations=episode.terminations,
                    truncations=episode.truncations,
                    infos=_infos_out(episode.infos),
                )
                for episode in self._episodes
            )
            storage.update_episode_metadata([{"success": bool(episode.success)} for episode in self._episodes])
            for file in temporary.iterdir():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
            mask = os.umask(0)
            os.umask(mask)
            temporary.chmod(0o777 & ~mask)  # mkdtemp makes it private
            final, old = root / "data", root / f".old{temporary.name}"
            if final.exists():
                os.rename(final, old)
            os.rename(temporary, final)
            shutil.rmtree(old, ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if made:
                with contextlib.suppress(OSError):
                    root.rmdir()  # succeeds only if nothing was written
        self.path = root
        return root

    @classmethod
    def load(cls, dataset: str | os.PathLike, *, dtype: Any = None) -> Demonstrations:
        """Reads a whole dataset into memory.

        Args:
            dataset: A folder, or the id of a dataset in Minari's own folder (``minari:<id>`` says so expressly).
            dtype: Observations and actions of floats are cast to it, such as ``"float32"``; None keeps them.

        Raises:
            UserError: Not there, empty, truncated, or not a dataset; the message names it.
        """
        root = _locate(dataset)
        data = root / "data" if (root / "data").is_dir() else root
        if not (data / "metadata.json").is_file():
            raise UserError(f"{root} is no dataset: it lacks data/metadata.json")
        try:
            from minari.dataset.minari_storage import MinariStorage

            metadata = MinariStorage.read_raw_metadata(data)
            extra = metadata.get(_KEY) or {}
            if extra.get("schema", SCHEMA) > SCHEMA:
                raise UserError(f"dataset {root} has schema {extra['schema']}, newer than {SCHEMA}: update fleetgym")
            storage = MinariStorage.read(data)
            indices = range(int(metadata["total_episodes"]))
            if not indices:
                raise UserError(f"dataset {root} is empty: at least one episode is needed")
            attributes = list(storage.get_episode_metadata(indices))
            episodes = [
                _episode(record, attribute, dtype)
                for record, attribute in zip(storage.get_episodes(indices), attributes)
            ]
        except UserError:
            raise
        except Exception as error:  # h5py, json and Minari raise a dozen types for a broken file
            raise UserError(
                f"dataset {root} cannot be read ({type(error).__name__}: {error}); it may be truncated or of another "
                "format: collect it again"
            ) from error
        return cls(
            episodes,
            observation_space=storage.observation_space,
            action_space=storage.action_space,
            env_spec=_spec_of(metadata.get("env_spec")),
            info={key: value for key, value in extra.items() if key != "schema"},
            path=root,
        )


def _length(value: Any) -> int:
    if isinstance(value, Mapping):
        return _length(next(iter(value.values())))
    if isinstance(value, tuple):
        return _length(value[0])
    return len(value)


def _space_of(value: Any) -> spaces.Space:
    """An unbounded space for arrays [T, ...] of which nothing else is known."""
    if isinstance(value, Mapping):
        return spaces.Dict({key: _space_of(inner) for key, inner in value.items()})
    if isinstance(value, tuple):
        return spaces.Tuple([_space_of(inner) for inner in value])
    value = np.asarray(value)
    if value.dtype.kind == "f":
        return spaces.Box(-np.inf, np.inf, value.shape[1:], value.dtype)
    if value.dtype.kind in "iu":
        limits = np.iinfo(value.dtype)
        return spaces.Box(limits.min, limits.max, value.shape[1:], value.dtype)
    raise UserError(f"the space of values of type {value.dtype} cannot be told; pass it")


def _cast(value: Any, dtype: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _cast(inner, dtype) for key, inner in value.items()}
    if dtype is not None and isinstance(value, np.ndarray) and value.dtype.kind == "f":
        return value.astype(dtype, copy=False)
    return value


def _episode(record: Mapping[str, Any], attributes: Mapping[str, Any], dtype: Any) -> Episode:
    steps = len(record["rewards"])
    infos = {}
    for key, value in (record["infos"] or {}).items():
        # Minari's infos begin with that of reset(); ours with that of the first step.
        if isinstance(value, np.ndarray) and value.ndim:
            infos[key] = value[1:] if len(value) == steps + 1 else value
    success = attributes.get("success")
    if success is None:
        reported = infos.get("success", infos.get("is_success"))
        success = reported is not None and bool(np.any(reported))
    return Episode(
        seed=attributes.get("seed"),
        observations=_cast(record["observations"], dtype),
        actions=_cast(record["actions"], dtype),
        rewards=np.asarray(record["rewards"], dtype=np.float64),
        terminations=np.asarray(record["terminations"], dtype=bool),
        truncations=np.asarray(record["truncations"], dtype=bool),
        success=bool(success),
        infos=infos,
    )


def _infos_out(infos: Mapping[str, np.ndarray]) -> dict[str, np.ndarray] | None:
    """Infos with a zero for reset(), as Minari has T+1 of them."""
    return {key: np.concatenate([np.zeros_like(value[:1]), value]) for key, value in infos.items()} or None


def _portable(spec: gym.envs.registration.EnvSpec | None) -> gym.envs.registration.EnvSpec | None:
    """The spec if it survives JSON; an environment made of lambdas or odd wrappers does not."""
    if spec is None:
        return None
    try:
        gym.envs.registration.EnvSpec.from_json(spec.to_json())
    except Exception:
        return None
    return spec


def _spec_of(text: str | None) -> gym.envs.registration.EnvSpec | None:
    if not text:
        return None
    try:
        return gym.envs.registration.EnvSpec.from_json(text)
    except Exception:  # written by another version of Gymnasium; the data does not depend on it
        return None


def _minari_version() -> str:
    from importlib.metadata import version

    return version("minari")


def _minari_root() -> Path:
    from minari.storage.datasets_root_dir import get_dataset_path

    return Path(get_dataset_path())


def _parse_id(text: str) -> str:
    from minari.dataset.minari_dataset import DATASET_ID_RE

    match = DATASET_ID_RE.fullmatch(text)
    if match is None or match.group("version") is None:
        raise UserError(f"{text!r} is no Minari dataset id; it looks like namespace/name-v0")
    return text


def _dataset_id(root: Path) -> str:
    """The id by which Minari lists a dataset in its own folder, or one made of the folder's name."""
    place = os.environ.get("MINARI_DATASETS_PATH") or os.path.join("~", ".minari", "datasets")
    with contextlib.suppress(ValueError, UserError):
        return _parse_id(root.resolve().relative_to(Path(place).expanduser().resolve()).as_posix())
    name = re.sub(r"[^\w-]+", "-", root.resolve().name).strip("-") or "dataset"
    return name if re.search(r"-v\d+$", name) else f"{name}-v0"


def _locate(dataset: str | os.PathLike) -> Path:
    if isinstance(dataset, str) and dataset.startswith(_PREFIX):
        root = _minari_root() / _parse_id(dataset[len(_PREFIX) :])
        if not root.is_dir():
            raise UserError(f"dataset {dataset}: there is no {root}")
        return root
    root = Path(dataset).expanduser()
    if root.is_dir():
        return root
    if root.exists():
        raise UserError(f"{root} is a file; a dataset is a folder with data/metadata.json in it")
    with contextlib.suppress(UserError):
        own = _minari_root() / _parse_id(str(dataset))
        if own.is_dir():
            return own
    raise UserError(f"dataset {dataset}: neither a folder nor the id of a dataset in Minari's folder")
