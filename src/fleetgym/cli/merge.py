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
    """Folders of checkpoints, or of runs (their last checkpoint is taken); at least two."""

    out: Path
    """The folder to write the merged checkpoint to."""

    overwrite: bool = False
    """Replace a checkpoint at --out."""

    matcher: str | None = None
    """How to align: lap, frank_wolfe or sinkhorn; the merger's own choice by default."""

    signs: bool = True
    """Whether the alignment may flip signs of units, where the network allows it."""

    max_passes: int | None = None
    """At most so many passes over all models."""

    coefficients: tuple[float, ...] | None = None
    """The weight of each model in the average, one a model."""


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

    from fleetgym.core.checkpoint import Checkpoint
    from fleetgym.core.run import find_checkpoint
    from fleetgym.merging import merge

    checkpoints = [Checkpoint.load(find_checkpoint(path)) for path in options.runs]
    for checkpoint in checkpoints:
        check_same(checkpoints[0], checkpoint)
        checkpoint.check_finite()
    names = ("matcher", "max_passes", "coefficients")
    # Only what was asked for: a merger need not know every option.
    chosen: dict[str, Any] = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    if not options.signs:
        chosen["signs"] = False
    result = merge(options.method, checkpoints, **chosen)

    module = checkpoints[0].module()
    module.load_state_dict(result.weights)
    facts: dict[str, Any] = {
        "metrics": {"distance_before": float(result.distance_before), "distance_after": float(result.distance_after)},
        "merged": {
            "method": options.method,
            "options": chosen,
            "from": [path.name for path in options.runs],
            "weights_sha256": [checkpoint.weights_sha256 for checkpoint in checkpoints],
        },
    }
    saved = Checkpoint.save(options.out, module, normaliser=checkpoints[0].normaliser, info=facts)
    before, after = float(result.distance_before), float(result.distance_after)
    change = f" ({(after - before) / before:+.1%})" if before > 0 else ""
    print(f"{options.method} of {len(checkpoints)} checkpoints of {checkpoints[0].architecture}")
    print(f"squared weight distance {before:.6g} -> {after:.6g}{change}")
    print(f"written to {saved.path}")
    return 0


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
