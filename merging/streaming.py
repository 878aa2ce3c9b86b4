"""Merging many policies that lie in files, one at a time: memory does not grow with their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fleetgym.core.checkpoint import CONFIG, WEIGHTS, Checkpoint, check_finite, load_tensors, save_tensors
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, current_folder, read_json
from fleetgym.core.weights import Element, StateDict, WeightSpec
from fleetgym.merging import MATCHERS
from fleetgym.merging.fleet_merge import align_one_by_one
from fleetgym.merging.matching import check_options
from fleetgym.merging.mergers import MEAN, STD, normalised, pooled, scale_to

METHODS = ("average", "fleet_merge")
"""Mergers that need no more than one policy and the mean at a time."""


@dataclass(frozen=True)
class MergedFiles:
    """What :func:`merge_files` made.

    Attributes:
        weights: The merged state dict.
        elements: For each policy the element that moved it.
        distance_before: Mean squared distance between the weights of two policies, over all pairs.
        distance_after: The same after alignment.
        history: A dict a pass.
        path: Where it was written, or None.
    """

    weights: dict[str, Tensor]
    elements: list[Element]
    distance_before: float
    distance_after: float
    history: list[dict[str, Any]]
    path: Path | None


@torch.no_grad()
def merge_files(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    *,
    method: str = "fleet_merge",
    spec: WeightSpec | None = None,
    coefficients: Sequence[float] | None = None,
    norms: bool | str | None = None,
    info: dict[str, Any] | None = None,
    **options: Any,
) -> MergedFiles:
    """Merges checkpoints, or safetensors files of plain state dicts, reading one at a time.

    The result is that of ``merge(method, policies)``. At any moment there are at most three sets of weights: the mean
    (in float64), the policy at hand, and its moved copy or what it is matched to; unequal coefficients keep a second
    mean, and the matcher works on top of that. Each pass reads every file once, or twice where the policy moves.

    Args:
        paths: Checkpoint folders, or ``.safetensors`` files (then ``spec`` is needed).
        out: Where to write: a checkpoint folder, or a ``.safetensors`` file; None writes nothing.
        method: ``average`` or ``fleet_merge``.
        spec: The symmetry; derived from the first checkpoint if None.
        coefficients: Weights of the policies.
        norms: As for the merger; its own default if None (``"auto"`` for ``fleet_merge``, False for ``average``).
        info: Facts for the checkpoint's ``config.json``; a ``.safetensors`` file has no place for them.
        options: Options of :func:`fleetgym.merging.fleet_merge.align` and of the matcher.

    Returns:
        The merged weights and how they came about.

    Raises:
        UserError: Fewer than two paths, a file that does not fit the first (named), NaN weights, unknown options, an
            ``out`` of the other kind than the files.
    """
    if method not in METHODS:
        raise unknown("merger that works one policy at a time", method, METHODS)
    if isinstance(paths, (str, os.PathLike)) or len(paths) < 2:
        raise UserError("merging takes a list of at least two paths")
    norms = (method == "fleet_merge" and "auto") if norms is None else norms
    if norms not in (True, False, "auto"):
        raise UserError(f"norms={norms!r}: True, False or 'auto' is wanted")
    shares = normalised(coefficients, len(paths))
    if method == "fleet_merge":
        own = ("signs", "max_passes", "reference", "tolerance", "device", "seed", "matcher")
        name = options.get("matcher", "frank_wolfe")
        rest = {key: value for key, value in options.items() if key not in own}
        check_options(f"matcher {name!r}", MATCHERS.get(name), rest, skip=("problem", "generator"))
    elif options:
        raise unknown("option of merger 'average'", next(iter(options)), ["coefficients", "norms"])
    files = [Path(path) for path in paths]
    plain = [file.suffix == ".safetensors" for file in files]
    if any(plain) and not all(plain):
        raise UserError(
            f"{files[plain.index(False)]} is a checkpoint and {files[plain.index(True)]} a plain file; mix none"
        )
    if plain[0] and spec is None:
        raise UserError("plain state dicts need spec=..., the WeightSpec of their network")
    if out is not None and (Path(out).suffix == ".safetensors") != plain[0]:
        kind = "a file that ends in .safetensors" if plain[0] else "a folder, whose name does not end in .safetensors"
        raise UserError(f"out={str(out)!r}: such policies are merged into {kind}")

    first = None if plain[0] else Checkpoint.load(files[0])
    if spec is None and first is not None:
        spec = WeightSpec.from_module(first.module())
    if first is not None:  # of its weights only the statistics: it is read again like the others
        first = replace(first, weights={key: first.weights[key] for key in (MEAN, STD) if key in first.weights})
    read = _reader(files, first, spec, shares)
    if method == "average":
        options["max_passes"] = 0
    done = align_one_by_one(spec, read, coefficients=coefficients, **options)
    weights = done.mean
    if norms is True or norms == "auto" and not done.agree:
        weights, done.history[-1]["norm_factor"] = scale_to(weights, done.norms)

    path = None
    if out is not None:
        path = Path(out)
        if first is not None:
            module = replace(first, weights=weights).module()
            Checkpoint.save(path, module, normaliser=first.normaliser, info=info)
        else:
            with atomic_write(path) as temporary:
                save_tensors(temporary, weights)
    return MergedFiles(weights, done.elements, done.history[0]["distance"], done.distance, done.history, path)


def _reader(
    files: Sequence[Path], first: Checkpoint | None, spec: WeightSpec, shares: Sequence[float]
) -> list[Callable[[], StateDict]]:
    """For each file a function that reads, checks and, where needed, renormalises its policy."""
    if first is None:
        return [lambda file=file: _checked(load_tensors(file), str(file), spec) for file in files]
    means, stds = [], []
    for file in files:
        document = read_json(current_folder(file) / CONFIG)
        for key, wanted in (("class", first.architecture), ("config", first.config)):
            if document.get(key) != wanted:
                raise UserError(
                    f"{file} cannot be merged with {files[0]}: its {key} is {document.get(key)!r}, not {wanted!r}; "
                    "merge policies of one kind"
                )
        if MEAN in first.weights and STD in first.weights:
            tensors = load_tensors(current_folder(file) / WEIGHTS)
            means.append(tensors[MEAN])
            stds.append(tensors[STD])
            del tensors
    differ = any(not torch.equal(x, values[0]) for values in (means, stds) for x in values)
    mean, std = pooled(means, stds, shares) if differ else (None, None)

    def checkpoint(file: Path) -> StateDict:
        loaded = Checkpoint.load(file)
        state = loaded.weights
        if differ:
            module = loaded.module()
            if not callable(getattr(module, "renormalise", None)):
                raise UserError(
                    f"{file} normalises observations by other statistics than others, and has no renormalise(mean, std)"
                )
            module.renormalise(mean.to(state[MEAN]), std.to(state[STD]))
            state = {key: value.detach() for key, value in module.state_dict().items()}
        return _checked(state, str(file), spec)

    return [lambda file=file: checkpoint(file) for file in files]


def _checked(state: StateDict, name: str, spec: WeightSpec) -> StateDict:
    spec.validate(state, name=name)
    check_finite(state, name)
    return state
