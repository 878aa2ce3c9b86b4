"""``fleetgym merge``: several checkpoints of one architecture become one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fleetgym.cli.options import parse
from fleetgym.core.errors import UserError

if TYPE_CHECKING:
    from fleetgym.core.checkpoint import Checkpoint


@dataclass
class Options:
    """Merge checkpoints of one architecture into one, and say how far apart they were before and after alignment."""

    method: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="METHOD")]
    """A merger that `fleetgym list mergers` prints, such as average or fleet_merge."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN RUN ...")]
    """Folders of checkpoints, or of runs (their last checkpoint is taken), or .safetensors files of plain state dicts
    (with --spec); at least two."""

    out: Path
    """The folder to write the merged checkpoint to; a .safetensors file where state dicts are merged."""

    overwrite: bool = False
    """Replace a checkpoint at --out."""

    matcher: str | None = None
    """How to align: frank_wolfe, lap, git_rebasin or sinkhorn; the merger's own choice by default."""

    signs: bool = True
    """Whether the alignment may flip signs of units, where the network allows it."""

    max_passes: int | None = None
    """At most so many passes over all models."""

    coefficients: tuple[float, ...] | None = None
    """The weight of each model in the average, one a model."""

    spec: Path | None = None
    """For plain state dicts: the JSON file of their WeightSpec (its to_dict())."""

    statistics: tuple[Path, ...] = ()
    """What each robot sent beside its weights, one .safetensors file a model (fisher, regmean, distill)."""

    base: Path | None = None
    """The checkpoint (or .safetensors file) that training began from (task_arithmetic, ties, dare)."""


def main(argv: Sequence[str]) -> int:
    """Merges and writes the checkpoint."""
    options = parse(Options, argv, "merge")
    if len(options.runs) < 2:
        raise UserError(f"merging needs at least two checkpoints, got {len(options.runs)}: name two or more folders")
    if options.coefficients is not None and len(options.coefficients) != len(options.runs):
        raise UserError(
            f"--coefficients has {len(options.coefficients)} numbers for {len(options.runs)} checkpoints; give one each"
        )
    if options.out.exists() and not options.overwrite:
        raise UserError(f"{options.out} exists already; choose another --out, or replace it with --overwrite")

    from fleetgym.merging import MERGERS

    MERGERS.get(options.method)  # an unknown method is said before anything is read
    if options.statistics and len(options.statistics) != len(options.runs):
        raise UserError(
            f"--statistics has {len(options.statistics)} files for {len(options.runs)} models; give one each"
        )
    for path in options.runs:
        if path.suffix == ".zip":
            raise UserError(
                f"{path} looks like a model of Stable-Baselines3; such files hold pickles, which fleetgym never opens. "
                "Export it with save_tensors(path, actor(model).state_dict()) where the model is loaded: "
                "docs/merging.md has the lines"
            )
    if all(path.suffix == ".safetensors" for path in options.runs):
        return _state_dicts(options)
    if options.spec is not None:
        raise UserError(f"--spec {options.spec} is for .safetensors files; a checkpoint says itself what it is")

    from fleetgym.core.checkpoint import Checkpoint
    from fleetgym.core.run import find_checkpoint
    from fleetgym.merging import merge
    from fleetgym.merging.streaming import METHODS, merge_files

    paths = [find_checkpoint(path) for path in options.runs]
    first = Checkpoint.load(paths[0])
    sums = []
    for path in paths:  # one at a time: there may be more of them than memory holds
        checkpoint = Checkpoint.load(path)
        check_same(first, checkpoint)
        checkpoint.check_finite()
        sums.append(checkpoint.weights_sha256)
    chosen = _chosen(options)
    if options.method in METHODS:
        result: Any = merge_files(paths, method=options.method, **chosen)
    else:
        result = merge(options.method, [str(path) for path in paths], **chosen, **_files(options))

    module = first.module()
    module.load_state_dict(result.weights)
    facts: dict[str, Any] = {
        "metrics": {"distance_before": float(result.distance_before), "distance_after": float(result.distance_after)},
        "merged": {
            "method": options.method,
            "options": chosen,
            "from": [path.name for path in options.runs],
            "weights_sha256": sums,
        },
    }
    saved = Checkpoint.save(options.out, module, normaliser=first.normaliser, info=facts)
    _tell(options.method, f"{len(paths)} checkpoints of {first.architecture}", result, saved.path)
    return 0


def _chosen(options: Options) -> dict[str, Any]:
    """Only what was asked for: a merger need not know every option."""
    names = ("matcher", "max_passes", "coefficients")
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return chosen if options.signs else {**chosen, "signs": False}


def _files(options: Options) -> dict[str, Any]:
    """The files that some mergers take."""
    from fleetgym.core.checkpoint import load_tensors
    from fleetgym.merging import load_statistics

    out: dict[str, Any] = {}
    if options.statistics:
        out["statistics"] = [load_statistics(path) for path in options.statistics]
    if options.base is not None:
        plain = options.base.suffix == ".safetensors"
        out["base"] = load_tensors(options.base) if plain else str(options.base)
    return out


def _state_dicts(options: Options) -> int:
    """Merges plain state dicts whose symmetry a file declares."""
    from fleetgym.core.checkpoint import load_tensors, save_tensors
    from fleetgym.core.files import atomic_write, read_json
    from fleetgym.core.weights import WeightSpec
    from fleetgym.merging import merge
    from fleetgym.merging.streaming import METHODS, merge_files

    if options.spec is None:
        raise UserError(
            "plain state dicts do not say what network they are of: give --spec, the JSON file of its WeightSpec, "
            "written by write_json(path, WeightSpec.from_module(network).to_dict())"
        )
    if options.out.suffix != ".safetensors":
        raise UserError(f"--out {options.out}: merged state dicts are written to a .safetensors file")
    try:
        spec = WeightSpec.from_dict(read_json(options.spec))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{options.spec} does not hold a WeightSpec ({error!r}); write its to_dict() as JSON"
        ) from error
    chosen = _chosen(options)
    if options.method in METHODS:
        result: Any = merge_files(options.runs, method=options.method, spec=spec, **chosen)
    else:
        states = [load_tensors(path) for path in options.runs]
        result = merge(options.method, (spec, states), **chosen, **_files(options))
    with atomic_write(options.out) as temporary:
        save_tensors(temporary, result.weights)
    _tell(options.method, f"{len(options.runs)} state dicts", result, options.out)
    return 0


def _tell(method: str, what: str, result: Any, path: Path) -> None:
    before, after = float(result.distance_before), float(result.distance_after)
    change = f" ({(after - before) / before:+.1%})" if before > 0 else ""
    print(f"{method} of {what}")
    print(f"squared weight distance {before:.6g} -> {after:.6g}{change}")
    print(f"written to {path}")


def check_same(first: Checkpoint, other: Checkpoint) -> None:
    """Checks that two checkpoints can be merged.

    Raises:
        UserError: They differ in architecture, config, shapes or in the statistics beside the weights; the message
            names both folders and what differs.
    """
    from fleetgym.core.checkpoint import WEIGHTS, check_keys

    if other.architecture != first.architecture:
        raise UserError(
            f"{other.path} is a {other.architecture} and {first.path} a {first.architecture}; only checkpoints of one "
            "architecture can be merged"
        )
    keys = [key for key in {**first.config, **other.config} if first.config.get(key) != other.config.get(key)]
    if keys:
        parts = [f"{key} is {other.config.get(key)!r}, not {first.config.get(key)!r}" for key in keys]
        raise UserError(
            f"{other.path} differs from {first.path}: {'; '.join(parts)}; only equal networks can be merged"
        )
    check_keys(first.weights, other.weights, str(other.path / WEIGHTS))
    same = first.normaliser.keys() == other.normaliser.keys() and all(
        value.equal(other.normaliser[key]) for key, value in first.normaliser.items()
    )
    if not same:
        raise UserError(
            f"{other.path} and {first.path} have different normaliser.safetensors; train with one normaliser"
        )
