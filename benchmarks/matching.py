"""``fleetgym bench matching``: how near the matchers bring two networks, and what it costs.

Two questions, each for several seeds:

- *independent*: two policies with unrelated random weights; by how much does the squared distance fall?
- *planted*: a policy and a copy of it, moved by a random group element and disturbed by noise of ``noise`` times the
  standard deviation of each tensor; which share of the units goes back to its place, with its sign?
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fleetgym.agents.networks import META_WORLD_DIFFERENCES, RecurrentPolicy
from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, write_json
from fleetgym.core.records import provenance
from fleetgym.core.run import track
from fleetgym.core.seeding import generator, torch_generator
from fleetgym.core.weights import WeightSpec
from fleetgym.merging import MATCHERS
from fleetgym.merging.matching import MatchResult, match


def policy(cell: str, hidden: int, seed: int) -> RecurrentPolicy:
    """A policy of the fleet benchmark's form (39 numbers, 5 tasks, 4 actions) with random weights."""
    torch.manual_seed(seed)
    return RecurrentPolicy(44, 4, cell=cell, hidden=hidden, differences=META_WORLD_DIFFERENCES)


def independent(matcher: str, cell: str, hidden: int, seed: int) -> MatchResult:
    """Matches two policies with unrelated weights."""
    first, second = policy(cell, hidden, 2 * seed), policy(cell, hidden, 2 * seed + 1)
    return match(WeightSpec.from_module(first), first.state_dict(), second.state_dict(), matcher)


def planted(matcher: str, cell: str, hidden: int, noise: float, seed: int) -> tuple[float, MatchResult]:
    """Matches a policy to a moved and disturbed copy of itself.

    Returns:
        The share of units (over all groups) that went back to their place with their sign, and the match.
    """
    first = policy(cell, hidden, seed)
    spec, state = WeightSpec.from_module(first), first.state_dict()
    # Not the seed of the weights: torch's uniform and normal draws from one seed are not independent.
    draws = torch_generator("planted", cell, hidden, seed)
    disturbed = {
        key: value + noise * value.std() * torch.randn(value.shape, generator=draws) if key in spec.cost_keys else value
        for key, value in state.items()
    }
    moved = spec.random(generator("planted", cell, hidden, seed))
    result = match(spec, state, spec.apply(disturbed, moved), matcher)
    back = result.element @ moved  # the identity where the unit is back
    right = [
        (perm == torch.arange(len(perm))) & (back.signs[group] == 1 if spec.signed[group] else torch.tensor(True))
        for group, perm in back.perms.items()
    ]
    return float(torch.cat(right).double().mean()), result


@dataclass
class Args:
    """Measure the matchers on networks that have nothing to do with each other, and on planted alignments."""

    matchers: tuple[str, ...] = ("frank_wolfe", "lap", "sinkhorn")
    """Matchers to compare."""
    cells: tuple[str, ...] = ("gru", "rnn", "lstm", "mlp")
    """Cores of the policies."""
    hidden: tuple[int, ...] = (64, 128)
    """Widths."""
    noise: tuple[float, ...] = (1.0, 2.0, 3.0)
    """Noise of the planted cases, in standard deviations of each tensor (GRU only)."""
    seeds: int = 4
    """Pairs of each kind."""
    out: Path | None = None
    """Folder to write results.json and table.md to."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench matching``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench matching")
    for matcher in args.matchers:
        if matcher not in MATCHERS:
            raise unknown("matcher", matcher, MATCHERS.names())
    if args.seeds < 1:
        raise UserError(f"--seeds {args.seeds}: it must be at least 1")
    torch.set_num_threads(1)
    work = [
        *(("independent", m, c, h, 0.0) for c in args.cells for h in args.hidden for m in args.matchers),
        *(("planted", m, "gru", h, n) for h in args.hidden for n in args.noise for m in args.matchers),
    ]
    rows: list[dict[str, Any]] = []
    for kind, matcher, cell, hidden, noise in track(work, "matching"):
        if kind == "independent":
            results = [independent(matcher, cell, hidden, seed) for seed in range(args.seeds)]
            measured = {"drop": statistics.mean(1 - r.distance_after / r.distance_before for r in results)}
        else:
            pairs = [planted(matcher, cell, hidden, noise, seed) for seed in range(args.seeds)]
            results = [result for _, result in pairs]
            measured = {"noise": noise, "units_right": statistics.mean(share for share, _ in pairs)}
        seconds = [result.seconds for result in results]
        row = {"kind": kind, "cell": cell, "hidden": hidden, "matcher": matcher, "pairs": args.seeds, **measured}
        rows.append({**row, "cpu_seconds": statistics.median(seconds), "cpu_seconds_max": max(seconds)})
    lines = ["| case | matcher | result | CPU-seconds (median, most) |", "|---|---|---|---|"]
    for row in rows:
        name = f"{row['kind']} {row['cell'].upper()}-{row['hidden']}"
        if row["kind"] == "independent":
            result = f"distance falls by {row['drop']:.1%}"
        else:
            name += f", noise {row['noise']:g}"
            result = f"{row['units_right']:.1%} of the units right"
        lines.append(
            f"| {name} | {row['matcher']} | {result} | {row['cpu_seconds']:.2f}, {row['cpu_seconds_max']:.2f} |"
        )
    text = "\n".join([*lines, "", f"{args.seeds} pairs of each.", ""])
    if args.out is not None:
        write_json(args.out / "results.json", {"rows": rows, "provenance": provenance()})
        with atomic_write(args.out / "table.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    print(text)
    return 0
