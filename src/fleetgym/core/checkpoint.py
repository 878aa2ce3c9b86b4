"""A trained network in a folder: safetensors, JSON and a model card; no pickle.

A checkpoint names its architecture by a registered name and never by a module path, so that loading one runs only code
that is installed, and reading one cannot run anything.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_folder, current_folder, jsonable, read_json, write_json
from fleetgym.core.records import provenance
from fleetgym.core.registry import Registry

SCHEMA = 1
CONFIG, WEIGHTS, NORMALISER = "config.json", "model.safetensors", "normaliser.safetensors"
STATE, STATE_META, CARD = "state.safetensors", "state.json", "README.md"

MODULES: Registry[type[nn.Module]] = Registry("architecture", "fleetgym.architectures")
"""Architectures by the name that checkpoints carry; each is a class with ``architecture: str`` and ``config: dict``."""
MODULES.register("image_policy", "fleetgym.agents.networks:ImagePolicy")
MODULES.register("point_policy", "fleetgym.agents.networks:PointPolicy")
MODULES.register("visual_policy", "fleetgym.agents.visual:VisualPolicy")
MODULES.register("inr2array", "fleetgym.merging.inr2array:Inr2Array")
MODULES.register("learned_optimizer", "fleetgym.merging.learned_optimizer:LearnedOptimizer")
MODULES.register("mlp", "fleetgym.benchmarks.zoos.networks:MLP")
MODULES.register("recurrent_policy", "fleetgym.agents.networks:RecurrentPolicy")
MODULES.register("sequence_gru", "fleetgym.benchmarks.zoos.networks:SequenceGRU")
MODULES.register("siren", "fleetgym.envs.fields.siren:Siren")
MODULES.register("small_cnn", "fleetgym.benchmarks.zoos.networks:SmallCNN")


def save_tensors(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> str:
    """Writes tensors of any device and layout as safetensors.

    It is not atomic: write to a temporary path (``core.files``).

    Args:
        path: The file.
        tensors: Tensors by name; those that share memory are stored apart.
        metadata: Strings to keep in the file's header.

    Returns:
        The SHA-256 of the file, in hexadecimal.
    """
    # Serialised in memory and written by Python, so that a full disk is an OSError like everywhere else.
    plain = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(plain, metadata=dict(metadata) if metadata else None)
    Path(path).write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def load_tensors(path: str | os.PathLike, sha256: str | None = None) -> dict[str, Tensor]:
    """Reads a safetensors file onto the CPU.

    Args:
        path: The file.
        sha256: What the file must hash to, or None.

    Returns:
        Tensors by name.

    Raises:
        UserError: The file is missing, truncated, not safetensors or does not hash to ``sha256``; the message names it.
    """
    try:
        data = Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(f"{path} does not exist or is not a file") from error
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}); restore it or train the model again"
        ) from error
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise UserError(
            f"{path} is damaged or was exchanged: its SHA-256 is {found[:12]}..., {CONFIG} says {str(sha256)[:12]}..."
        )
    return tensors


def _some(names: list[str], limit: int = 4) -> str:
    return ", ".join(map(repr, names[:limit])) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def check_keys(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor], source: str) -> None:
    """Checks that weights fit a network: the same keys, each of the same shape.

    Args:
        expected: State dict of the network.
        weights: The weights to put in.
        source: Where they come from, for the message.

    Raises:
        UserError: A missing key, an unexpected key, or another shape; the message has the source, the key and both
            shapes.
    """
    problems = []
    if absent := [key for key in expected if key not in weights]:
        problems.append(f"missing key {_some(absent)}")
    if foreign := [key for key in weights if key not in expected]:
        problems.append(f"unexpected key {_some(foreign)}")
    for key, value in expected.items():
        if key in weights and value.shape != weights[key].shape:
            problems.append(f"key {key!r} has shape {list(weights[key].shape)}, the network wants {list(value.shape)}")
    if problems:
        more = f"; and {len(problems) - 4} more problems" if len(problems) > 4 else ""
        raise UserError(f"{source} does not fit the network: {'; '.join(problems[:4])}{more}")


def load_weights(module: nn.Module, file: str | os.PathLike) -> None:
    """Puts the tensors of a safetensors file into a module; all keys and shapes must agree.

    Raises:
        UserError: The file is missing, truncated or does not fit; the message has the file, the key and both shapes.
            The module is then unchanged.
    """
    weights = load_tensors(file)
    check_keys(module.state_dict(), weights, str(file))
    module.load_state_dict(weights)


@dataclass(frozen=True)
class Checkpoint:
    """A network in a folder, as ``Checkpoint.load`` gives it.

    The folder holds ``model.safetensors``, ``config.json``, ``README.md`` (the model card) and, when they were given,
    ``normaliser.safetensors`` and the training state (``state.safetensors``, ``state.json``).

    Attributes:
        path: The folder.
        architecture: Registered name of the network's class.
        config: Keyword arguments of that class.
        weights: State dict, on the CPU.
        normaliser: Statistics that belong to the policy but not to its state dict; empty when it has none.
        info: Free facts: ``metrics``, ``provenance`` and what the writer added.
        weights_sha256: SHA-256 of ``model.safetensors``.
    """

    path: Path
    architecture: str
    config: dict[str, Any]
    weights: dict[str, Tensor]
    normaliser: dict[str, Tensor] = field(default_factory=dict)
    info: dict[str, Any] = field(default_factory=dict)
    weights_sha256: str = ""

    @staticmethod
    def save(
        path: str | os.PathLike,
        module: nn.Module,
        *,
        normaliser: Mapping[str, Tensor] | None = None,
        state: tuple[Mapping[str, Tensor], Mapping[str, Any]] | None = None,
        info: Mapping[str, Any] | None = None,
    ) -> Checkpoint:
        """Writes a checkpoint; the folder appears complete or not at all, and an older one there stays until then.

        Args:
            path: The folder; an existing checkpoint is replaced.
            module: A network whose class has ``architecture`` (its name in ``MODULES``) and which has ``config`` (the
                keyword arguments that rebuild it).
            normaliser: Statistics to keep beside the weights.
            state: Training state: tensors by name, and a dict of JSON values.
            info: Facts for ``config.json`` and the model card. ``metrics`` is shown as a table; ``provenance`` is
                filled in where it is missing.

        Returns:
            What ``load`` would give.

        Raises:
            UserError: The module has no architecture or config, the path is taken by something that is not a
                checkpoint, or ``info`` has no JSON form.
            OSError: The disk is full or cannot be written; what was there before is intact.
        """
        path = Path(path)
        architecture, config = getattr(module, "architecture", None), getattr(module, "config", None)
        if not isinstance(architecture, str) or not isinstance(config, Mapping):
            raise UserError(
                f"{type(module).__name__} cannot be saved as a checkpoint: it needs the attributes `architecture` (a "
                "name in fleetgym.core.checkpoint.MODULES) and `config` (the keyword arguments that rebuild it)"
            )
        if architecture not in MODULES:
            raise UserError(
                f"architecture {architecture!r} of {type(module).__name__} is not registered, so it could not be "
                f"loaded again: MODULES.register({architecture!r}, 'module:Class')"
            )
        # A run's folder has a config.json too: only a folder with weights is one to replace.
        if path.is_dir():
            foreign = any(path.iterdir()) and not ((path / CONFIG).is_file() and (path / WEIGHTS).is_file())
        else:
            foreign = path.exists()
        if foreign:
            raise UserError(f"{path} exists and is not a checkpoint; choose another folder")
        facts = jsonable(dict(info or {}))
        facts.setdefault("provenance", provenance())
        document = {
            "schema": SCHEMA,
            "class": architecture,
            "config": jsonable(config),
            "info": facts,
            "parameters": sum(parameter.numel() for parameter in module.parameters()),
        }
        with atomic_folder(path) as folder:
            document["weights_sha256"] = save_tensors(folder / WEIGHTS, module.state_dict())
            if normaliser:
                document["normaliser_sha256"] = save_tensors(folder / NORMALISER, normaliser)
            if state is not None:
                tensors, meta = state
                document["state_sha256"] = save_tensors(folder / STATE, tensors)
                write_json(folder / STATE_META, jsonable(meta))
            write_json(folder / CONFIG, document)
            card = _model_card(path.name, document, (folder / WEIGHTS).stat().st_size)
            (folder / CARD).write_text(card, encoding="utf-8")
        return Checkpoint.load(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Checkpoint:
        """Reads a checkpoint folder.

        Raises:
            UserError: The folder or one of its files is missing, truncated, damaged or of a newer schema; the message
                names the file.
        """
        folder = current_folder(path)
        file = folder / CONFIG
        if not file.is_file():
            what = "has no config.json" if folder.exists() else "does not exist"
            raise UserError(f"{path} is not a checkpoint folder: it {what}")
        document = _read_document(file)
        weights = load_tensors(folder / WEIGHTS, document.get("weights_sha256"))
        normaliser = {}
        if "normaliser_sha256" in document:
            normaliser = load_tensors(folder / NORMALISER, document["normaliser_sha256"])
        return cls(
            path=Path(path),
            architecture=document["class"],
            config=document["config"],
            weights=weights,
            normaliser=normaliser,
            info=document["info"],
            weights_sha256=document.get("weights_sha256", ""),
        )

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The training state as it was saved: tensors by name, and a dict; None when there is none.

        Raises:
            UserError: A file of it is missing, truncated or damaged.
        """
        folder = current_folder(self.path)
        document = _read_document(folder / CONFIG)
        if "state_sha256" not in document:
            return None
        return load_tensors(folder / STATE, document["state_sha256"]), read_json(folder / STATE_META)

    def module(self, device: str | torch.device = "cpu") -> nn.Module:
        """Builds the network and puts the weights in, in evaluation mode.

        Args:
            device: Where it shall live.

        Returns:
            The network; its floating point type is that of the weights.

        Raises:
            UserError: The architecture is not registered, its class refuses the config, or the weights do not fit; the
                message has the file, the key and both shapes.
        """
        file = Path(self.path) / CONFIG
        try:
            kind = MODULES.get(self.architecture)
        except UserError as error:
            raise UserError(f"{file}: {error}") from error
        try:
            module = kind(**self.config)
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}: {self.architecture} cannot be built from its config: {error}") from error
        check_keys(module.state_dict(), self.weights, str(Path(self.path) / WEIGHTS))
        types = {tensor.dtype for tensor in self.weights.values() if tensor.is_floating_point()}
        if len(types) == 1:
            module = module.to(types.pop())
        module.load_state_dict(self.weights)
        return module.to(device).eval()

    def check_finite(self) -> None:
        """Checks that no weight is NaN or infinite.

        Raises:
            UserError: One is; the message has the file, the key and how many.
        """
        check_finite(self.weights, str(Path(self.path) / WEIGHTS))


def check_finite(weights: Mapping[str, Tensor], name: str) -> None:
    """Checks that no weight is NaN or infinite.

    Args:
        weights: A state dict.
        name: Whose, for the message.

    Raises:
        UserError: A weight is; the message names the first such tensor and says how many of its entries are.
    """
    for key, tensor in weights.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise UserError(
                f"{name}: {key!r} has {bad} NaN or infinite entries of {tensor.numel()}; the training diverged, use an "
                "earlier checkpoint or train it anew"
            )


def _read_document(file: Path) -> dict[str, Any]:
    document = read_json(file)
    if not isinstance(document, dict) or not isinstance(document.get("schema"), int):
        raise UserError(f"{file} is not that of a checkpoint: it has no integer 'schema'")
    if document["schema"] > SCHEMA:
        raise UserError(f"{file} has schema {document['schema']}, this fleetgym reads up to {SCHEMA}: upgrade fleetgym")
    for key, kind in (("class", str), ("config", dict), ("info", dict)):
        if not isinstance(document.get(key), kind):
            raise UserError(f"{file} is not that of a checkpoint: key {key!r} is missing or not a {kind.__name__}")
    return document


def _model_card(name: str, document: Mapping[str, Any], size: int) -> str:
    """The README.md of a checkpoint."""
    info = document["info"]
    origin = info["provenance"]

    def table(values: Mapping[str, Any]) -> list[str]:
        rows = [f"| `{key}` | {_cell(value)} |" for key, value in values.items()]
        return ["| name | value |", "|---|---|", *rows] if rows else ["None recorded."]

    others = {key: value for key, value in info.items() if key not in ("metrics", "provenance")}
    metrics = info.get("metrics")
    lines = [
        f"# {name}",
        "",
        f"A network of architecture `{document['class']}` with {document['parameters']:,} parameters "
        f"({size:,} bytes of weights), saved by fleetgym.",
        "",
        "## Loading",
        "",
        "```python",
        "from fleetgym.core import Checkpoint",
        "",
        f'policy = Checkpoint.load("{name}").module()',
        "```",
        "",
        "## Architecture",
        "",
        *table(document["config"]),
        "",
        "## Metrics",
        "",
        *table(metrics if isinstance(metrics, Mapping) else {}),
        "",
        *(["## More", "", *table(others), ""] if others else []),
        "## Provenance",
        "",
        *table(origin if isinstance(origin, Mapping) else {}),
        "",
        f"SHA-256 of `{WEIGHTS}`: `{document['weights_sha256']}`",
        "",
    ]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_cell(item)}" for key, item in value.items())
    if isinstance(value, list):
        text = " ".join(map(_cell, value[:40])) + (" ..." if len(value) > 40 else "")
    else:
        text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("\n", " ")
