"""The record of a zoo, N trained networks of one architecture with what is known of each, and its cache on disk."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fleetgym.core.checkpoint import MODULES, check_keys, load_tensors, save_tensors
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_folder, atomic_write, current_folder, jsonable, read_json, write_json
from fleetgym.core.records import provenance
from fleetgym.core.run import track
from fleetgym.core.seeding import generator
from fleetgym.core.weights import WeightSpec

SCHEMA = 1
CONFIG, TENSORS = "zoo.json", "zoo.safetensors"
SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class Zoo:
    """N networks of one architecture, and what is known of each.

    Attributes:
        name: What it is called: the maker's name, or that of a published zoo.
        architecture: The networks' class, a name in ``core.checkpoint.MODULES``.
        network: Keyword arguments of that class.
        weights: Stacked state dict, tensors [N, ...].
        targets: What is known of each network, tensors [N] or [N, ...]: ``success``, ``label``, ``test_accuracy``, and
            the settings that it was trained with.
        splits: ``train``, ``val`` and ``test``: indices int64 [n], each network in at most one.
        groups: int64 [N]; networks of one group (copies of one image) are in one split.
        config: What it was made with.
        info: Free facts, such as provenance.
    """

    name: str
    architecture: str
    network: dict[str, Any]
    weights: dict[str, Tensor]
    targets: dict[str, Tensor]
    splits: dict[str, Tensor]
    groups: Tensor
    config: dict[str, Any] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        number = len(self.groups)
        template = self.module().state_dict()
        expected = {key: value.new_empty((number, *value.shape), device="meta") for key, value in template.items()}
        check_keys(expected, self.weights, f"zoo {self.name!r}")
        # In the order of the architecture's state dict, which a file does not keep.
        object.__setattr__(self, "weights", {key: self.weights[key] for key in template})
        for key, value in self.weights.items():
            if value.is_floating_point() and not torch.isfinite(value).all():
                bad = int(torch.nonzero(~torch.isfinite(value.flatten(1)).all(1))[0])
                raise UserError(f"zoo {self.name!r}: {key!r} of network {bad} is not finite; leave such networks out")
        for key, value in self.targets.items():
            if value.dim() < 1 or len(value) != number:
                raise UserError(f"zoo {self.name!r}: target {key!r} has shape {list(value.shape)}, wanted [{number}]")
        home = torch.full((number,), -1)
        for k, (name, rows) in enumerate(self.splits.items()):
            if name not in SPLITS:
                raise unknown("split", name, SPLITS)
            if len(rows) and not 0 <= int(rows.min()) <= int(rows.max()) < number:
                raise UserError(f"zoo {self.name!r}: split {name!r} has indices outside 0..{number - 1}")
            if bool((home[rows] >= 0).any()) or len(rows.unique()) != len(rows):
                raise UserError(f"zoo {self.name!r}: a network of split {name!r} is in a split already")
            home[rows] = k
        inside = home >= 0
        pairs = torch.stack([self.groups[inside], home[inside]], 1).unique(dim=0)
        if len(pairs) != len(pairs[:, 0].unique()):
            raise UserError(f"zoo {self.name!r}: networks of one group are in two splits; split by groups")

    def __len__(self) -> int:
        return len(self.groups)

    def module(self, n: int | None = None) -> nn.Module:
        """Network ``n`` in evaluation mode (a copy), or one with weights of its own."""
        module = MODULES.get(self.architecture)(**self.network)
        if n is not None:
            module.load_state_dict(self.state_dict(n))
        return module.eval()

    def state_dict(self, n: int) -> dict[str, Tensor]:
        """The weights of network ``n`` (views)."""
        return {key: value[n] for key, value in self.weights.items()}

    @functools.cached_property
    def spec(self) -> WeightSpec:
        """The symmetry of the architecture."""
        module = self.module()
        example = module.example_input() if hasattr(module, "example_input") else None
        return WeightSpec.from_module(module, example)

    def part(self, split: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Weights and targets of a split, tensors [n, ...].

        Raises:
            UserError: Unknown split.
        """
        if split not in self.splits:
            raise unknown("split", split, self.splits)
        rows = self.splits[split]
        return ({k: v[rows] for k, v in self.weights.items()}, {k: v[rows] for k, v in self.targets.items()})

    def save(self, path: str | os.PathLike) -> None:
        """Writes the zoo as a folder, ``zoo.json`` and ``zoo.safetensors``; complete or not at all.

        Raises:
            UserError: The path is taken by something that is not a zoo.
        """
        path = Path(path)
        if path.exists() and not (path / CONFIG).is_file() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path} exists and is not a zoo; choose another folder")
        tensors = {f"weights/{key}": value for key, value in self.weights.items()}
        tensors |= {f"targets/{key}": value for key, value in self.targets.items()}
        tensors |= {f"splits/{key}": value for key, value in self.splits.items()}
        tensors["groups"] = self.groups
        document = {
            "schema": SCHEMA,
            "name": self.name,
            "networks": len(self),
            "targets": list(self.targets),
            "architecture": self.architecture,
            "network": jsonable(self.network),
            "config": jsonable(self.config),
            "info": jsonable({**self.info, "provenance": self.info.get("provenance") or provenance()}),
        }
        with atomic_folder(path) as folder:
            document["sha256"] = save_tensors(folder / TENSORS, tensors)
            write_json(folder / CONFIG, document)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Zoo:
        """Reads a zoo.

        Raises:
            UserError: The folder or a file of it is missing, damaged or of a newer schema, or what it holds is no zoo.
        """
        folder = current_folder(path)
        if not (folder / CONFIG).is_file():
            what = "has no zoo.json" if folder.exists() else "does not exist"
            raise UserError(f"{path} is not the folder of a zoo: it {what}")
        document = read_json(folder / CONFIG)
        kinds = {"schema": int, "name": str, "architecture": str, "network": dict, "config": dict, "info": dict}
        kinds |= {"targets": list, "sha256": str}
        for key, kind in kinds.items():
            if not isinstance(document, dict) or not isinstance(document.get(key), kind):
                raise UserError(f"{folder / CONFIG} is not that of a zoo: {key!r} is missing or no {kind.__name__}")
        if document["schema"] > SCHEMA:
            raise UserError(f"{folder / CONFIG} has schema {document['schema']}, this fleetgym reads up to {SCHEMA}")
        tensors = load_tensors(folder / TENSORS, document["sha256"])
        targets = _under("targets", tensors)
        if "groups" not in tensors or targets.keys() != set(document["targets"]):
            raise UserError(f"{folder / TENSORS} is not that of a zoo: it lacks 'groups' or a target")
        return cls(
            name=document["name"],
            architecture=document["architecture"],
            network=document["network"],
            weights=_under("weights", tensors),
            targets={key: targets[key] for key in document["targets"]},
            splits={key: value for key, value in sorted(_under("splits", tensors).items(), key=_place)},
            groups=tensors["groups"],
            config=document["config"],
            info=document["info"],
        )


def _place(split: tuple[str, Tensor]) -> int:
    return SPLITS.index(split[0]) if split[0] in SPLITS else len(SPLITS)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{prefix}/")}


def split_groups(groups: Tensor, shares: Sequence[float], seed: int) -> dict[str, Tensor]:
    """Draws the splits of a zoo; whole groups go to one split.

    Args:
        groups: int64 [N].
        shares: Of train, val and test, in groups; they sum to 1.
        seed: Of the draw.

    Returns:
        Rising indices of each split.

    Raises:
        UserError: Shares that are not three, not positive or do not sum to 1, or fewer than three groups.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UserError(f"shares {tuple(shares)}: give three positive numbers that sum to 1, for train, val and test")
    names, index = groups.unique(return_inverse=True)
    if len(names) < 3:
        raise UserError(f"{len(names)} groups of networks: train, val and test need one each, so at least 3")
    order = torch.from_numpy(generator("zoo", "splits", seed).permutation(len(names)))
    val, test = (max(1, round(share * len(names))) for share in shares[1:])
    val = min(val, len(names) - 2)
    test = min(test, len(names) - 1 - val)
    home = torch.zeros(len(names), dtype=torch.int64)
    home[order[:val]], home[order[val : val + test]] = 1, 2
    return {name: torch.nonzero(home[index] == k).flatten() for k, name in enumerate(SPLITS)}


@dataclass(frozen=True)
class Part:
    """Some of a zoo's networks: weights and targets [n, ...], groups [n] (None: each network is a group of its own)."""

    weights: dict[str, Tensor]
    targets: dict[str, Tensor]
    groups: Tensor | None = None


class Maker(Protocol):
    """How a zoo is made; a frozen dataclass whose fields are the settings, with ``seed`` and ``shares`` among them.

    A part depends on the settings and its number alone, so a zoo that is killed goes on with the parts it lacks.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    """Goes up when equal settings begin to give other networks."""
    seed: int
    shares: tuple[float, float, float]

    def network(self) -> tuple[str, dict[str, Any]]:
        """Architecture (a name in ``core.checkpoint.MODULES``) and its keyword arguments."""
        ...

    def parts(self) -> int:
        """How many parts it is made in."""
        ...

    def part(self, number: int, device: str) -> Part:
        """Makes part ``number``."""
        ...


def cache_folder() -> Path:
    """Where zoos are kept: ``$FLEETGYM_CACHE/zoos``, or else ``fleetgym/zoos`` in the user's cache folder."""
    if root := os.environ.get("FLEETGYM_CACHE"):
        return Path(root) / "zoos"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fleetgym" / "zoos"


def zoo_path(maker: Maker, folder: str | os.PathLike | None = None) -> Path:
    """Where the zoo of these settings lies: named by the maker and a hash of its version and settings."""
    settings = {"name": maker.name, "version": maker.version, **jsonable(maker)}
    key = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=6).hexdigest()
    return Path(folder if folder is not None else cache_folder()) / f"{maker.name}-{key}"


def make(maker: Maker, *, folder: str | os.PathLike | None = None, device: str = "cpu", progress: bool = True) -> Zoo:
    """The zoo of these settings: from the cache, or made and put there.

    Parts that are finished are kept beside it until all are; a call after a kill goes on with those that are missing.

    Args:
        maker: The settings.
        folder: Of the cache; by default :func:`cache_folder`.
        device: Where the networks are trained. The zoo's tensors are on the CPU.
        progress: Whether to show a progress bar.

    Returns:
        The zoo.

    Raises:
        UserError: Settings that cannot be, or a cached zoo that is damaged (the message says to remove it).
    """
    path = zoo_path(maker, folder)
    if current_folder(path).exists():
        try:
            return Zoo.load(path)
        except UserError as error:
            raise UserError(f"the cached zoo does not load: {error}; remove {path} to have it made again") from error
    kept = path.with_name(f"{path.name}.parts")
    numbers = range(maker.parts())
    parts = [_part(maker, k, kept, device) for k in (track(numbers, f"zoo {maker.name}") if progress else numbers)]
    weights = {key: torch.cat([part.weights[key] for part in parts]) for key in parts[0].weights}
    targets = {key: torch.cat([part.targets[key] for part in parts]) for key in parts[0].targets}
    number = sum(len(next(iter(part.weights.values()))) for part in parts)
    groups = torch.arange(number) if parts[0].groups is None else torch.cat([part.groups for part in parts])
    architecture, network = maker.network()
    zoo = Zoo(
        name=maker.name,
        architecture=architecture,
        network=jsonable(network),
        weights=weights,
        targets=targets,
        splits=split_groups(groups, maker.shares, maker.seed),
        groups=groups,
        config={"version": maker.version, **jsonable(maker)},
    )
    zoo.save(path)
    shutil.rmtree(kept, ignore_errors=True)
    return zoo


def _part(maker: Maker, number: int, folder: Path, device: str) -> Part:
    """Part ``number``, from its file if there is a sound one."""
    file = folder / f"part-{number:04d}.safetensors"
    if file.exists():
        try:
            tensors = load_tensors(file)
            return Part(_under("weights", tensors), _under("targets", tensors), tensors.get("groups"))
        except UserError:
            pass  # damaged: make it again
    part = maker.part(number, device)
    part = Part(
        {key: value.detach().cpu() for key, value in part.weights.items()},
        {key: value.detach().cpu() for key, value in part.targets.items()},
        part.groups,
    )
    tensors = {f"weights/{key}": value for key, value in part.weights.items()}
    tensors |= {f"targets/{key}": value for key, value in part.targets.items()}
    if part.groups is not None:
        tensors["groups"] = part.groups
    with atomic_write(file) as temporary:
        save_tensors(temporary, tensors)
    return part


def chunk(number: int, size: int, k: int) -> range:
    """The indices of part ``k`` where ``number`` networks are made ``size`` at a time."""
    return range(k * size, min((k + 1) * size, number))
