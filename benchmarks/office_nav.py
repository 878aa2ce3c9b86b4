"""``fleetgym bench office_nav``: what can be reached in OfficeNav, and who of the reference policies reads.

For each variant the exact scores of the oracle and of the best known policy that never looks at the sign, then the
reference policies played in whole trials: their second episodes with the true signs, with signs that name another
office, and with blank signs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, write_json
from fleetgym.core.records import EvalRecord, provenance
from fleetgym.envs.office_nav.layout import GOAL
from fleetgym.envs.office_nav.metrics import SIGNS, Reading, reading
from fleetgym.envs.office_nav.reference import (
    NonReader,
    OracleReader,
    RandomPolicy,
    non_reader_score,
    oracle_score,
)
from fleetgym.envs.office_nav.variants import VARIANTS, resolve_variant, tables

POLICIES = ("oracle", "non_reader", "random")


def exact(variant: str) -> dict[str, dict[str, float]]:
    """The exact scores of a variant's second episode: over all buildings, and over the buildings that it has.

    Returns:
        ``"oracle"``, ``"non_reader"`` and ``"search"`` (a non-reader that does not use the first episode), and the
        same with ``" (its buildings)"``, each a ``Score`` as a dict.
    """
    worlds = tables(resolve_variant(variant))
    plan, single = worlds.layouts[0], worlds.variant.single_goal
    own = [np.flatnonzero(colours[: plan.offices] == GOAL).tolist() for colours in worlds.colours[0]]
    rows = {}
    for goals, name in ((None, ""), (own, " (its buildings)")):
        rows[f"oracle{name}"] = asdict(oracle_score(plan, single, goals))
        rows[f"non_reader{name}"] = asdict(non_reader_score(plan, single, goals))
        rows[f"search{name}"] = asdict(non_reader_score(plan, single, goals, explore=False))
    return rows


def policy_named(name: str, variant: str, split: str, seed: int = 0) -> Any:
    """A reference policy for a variant.

    Raises:
        UserError: Unknown name, variant or split.
    """
    worlds = tables(resolve_variant(variant))
    plan = worlds.layouts[int(worlds.layout_of[worlds.split(split)])]
    released = worlds.variant.released
    if name == "oracle":
        return OracleReader(plan, worlds.variant.episodes, released)
    if name == "non_reader":
        return NonReader(plan, worlds.variant.episodes, released)
    if name == "random":
        return RandomPolicy(len(worlds.variant.actions), seed)
    raise unknown("reference policy", name, POLICIES)


def record(played: Reading, system: str, task: str, **metrics: Any) -> EvalRecord:
    """The trials' last episodes as a record."""
    return EvalRecord(
        system=system,
        task=task,
        seeds=played.trial_seeds.tolist(),
        successes=played.success[:, -1].tolist(),
        returns=played.returns[:, -1].tolist(),
        lengths=played.length[:, -1].tolist(),
        metrics={**played.summary(), **metrics},
        provenance=provenance(),
    )


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    lines = ["| variant | policy | sign | return | success | first office is the sign's | doors before the goal |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for variant, found in results.items():
        for name, score in found["exact"].items():
            lines.append(
                f"| {variant} | {name}, exact | true | {score['mean_return']:.3f} | {score['success']:.3f} | | |"
            )
        for row in found["played"]:
            doors = "" if row["doors_before_goal"] is None else f"{row['doors_before_goal']:.2f}"
            lines.append(
                f"| {variant} | {row['policy']} | {row['sign']} | {row['return']:.3f} | {row['success']:.3f} "
                f"| {row['first_named']:.3f} | {doors} |"
            )
    return "\n".join(lines) + "\n"


@dataclass
class Args:
    """Reference scores of OfficeNav and the metrics that tell a reader from others."""

    variants: tuple[str, ...] = ("OfficeNav-Symbolic-v0", "OfficeNav-SingleGoal-v0", "OfficeNav-Released-v0")
    """Ids of OfficeNav (2D)."""
    policies: tuple[str, ...] = POLICIES
    """Reference policies: oracle, non_reader, random."""
    signs: tuple[str, ...] = SIGNS
    """What the signs say: true, swapped, blank."""
    trials: int = 1000
    """Trials of each."""
    split: str = "test"
    """Whose buildings and signs."""
    seed: int = 0
    """Seed of the first trial."""
    out: Path = Path("runs/office_nav")
    """Folder for office_nav.json, the table and the records."""


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench office_nav``."""
    import tyro

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench office_nav")
    for name in args.variants:
        if name not in VARIANTS:
            raise unknown("variant", name, VARIANTS)
        tables(VARIANTS[name]).split(args.split)
    for name in args.policies:
        if name not in POLICIES:
            raise unknown("reference policy", name, POLICIES)
    for name in args.signs:
        if name not in SIGNS:
            raise unknown("choice of sign", name, SIGNS)
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: it must be at least 1")
    results: dict[str, Any] = {}
    for variant in args.variants:
        found = results[variant] = {"exact": exact(variant), "played": []}
        for name in args.policies:
            for sign in args.signs:
                policy = policy_named(name, variant, args.split, args.seed)
                played = reading(policy, variant, trials=args.trials, sign=sign, split=args.split, seed=args.seed)
                found["played"].append({"policy": name, **played.summary()})
                made = record(played, f"{name}, {sign} signs", variant, split=args.split)
                made.save(args.out / "records" / f"{variant}-{name}-{sign}.json")
    write_json(args.out / "office_nav.json", {"results": results, "provenance": provenance()})
    text = table(results)
    with atomic_write(args.out / "office_nav.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"{len(args.variants)} variants, {args.trials} trials of each policy and sign: {args.out}")
    return 0
