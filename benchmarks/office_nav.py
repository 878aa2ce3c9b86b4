"""``fleetgym bench office_nav``: what can be reached in OfficeNav, and which policy reads.

For each variant the exact scores of the oracle, of the best policy that never looks at the sign, and of random play;
then policies played in whole trials: their second episodes with the true signs, with signs that name another office,
and with blank signs. ``--policy`` measures a trained policy beside the reference policies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError, unknown
from fleetgym.core.files import atomic_write, write_json
from fleetgym.core.records import EvalRecord, provenance, wilson_interval
from fleetgym.envs.office_nav.layout import GOAL
from fleetgym.envs.office_nav.metrics import SIGNS, Reading, reading
from fleetgym.envs.office_nav.reference import (
    NonReader,
    OracleReader,
    RandomPolicy,
    non_reader_score,
    oracle_score,
    random_score,
)
from fleetgym.envs.office_nav.suite import ID_3D
from fleetgym.envs.office_nav.variants import VARIANTS, resolve_variant, tables

POLICIES = ("oracle", "non_reader", "random")


def exact(variant: str) -> dict[str, dict[str, float]]:
    """The exact scores of a variant's second episode: over all buildings, and over the buildings that it has.

    Returns:
        ``"oracle"``, ``"non_reader"``, ``"search"`` (a non-reader that does not use the first episode), the first three
        with ``" (its buildings)"`` as well, and ``"random"``, each a ``Score`` as a dict. Empty for the 3D office.
    """
    if variant == ID_3D:
        return {}
    worlds = tables(resolve_variant(variant))
    plan, single = worlds.layouts[0], worlds.variant.single_goal
    own = [np.flatnonzero(colours[: plan.offices] == GOAL).tolist() for colours in worlds.colours[0]]
    rows = {}
    for goals, name in ((None, ""), (own, " (its buildings)")):
        rows[f"oracle{name}"] = asdict(oracle_score(plan, single, goals))
        rows[f"non_reader{name}"] = asdict(non_reader_score(plan, single, goals))
        rows[f"search{name}"] = asdict(non_reader_score(plan, single, goals, explore=False))
    rows["random"] = asdict(random_score(plan, single, len(worlds.variant.actions)))
    return rows


def policy_named(name: str, variant: str, split: str, seed: int = 0) -> Any:
    """A reference policy for a variant.

    Raises:
        UserError: Unknown name, variant or split.
    """
    if name not in POLICIES:
        raise unknown("reference policy", name, POLICIES)
    if variant == ID_3D:
        return _policy_3d(name, seed)
    worlds = tables(resolve_variant(variant))
    plan = worlds.layouts[int(worlds.layout_of[worlds.split(split)])]
    kind = worlds.variant
    if name == "oracle":
        return OracleReader(plan, kind.episodes, kind.released)
    if name == "non_reader":
        return NonReader(plan, kind.episodes, kind.released, kind.single_goal)
    return RandomPolicy(len(kind.actions), seed)


def _policy_3d(name: str, seed: int) -> Any:
    from fleetgym.envs.office_nav import reference3d

    if name == "random":
        return reference3d.RandomPolicy3D(seed=seed)
    return reference3d.OracleReader3D() if name == "oracle" else reference3d.NonReader3D()


def trained_policy(path: Path, variants: Sequence[str]) -> Any:
    """The policy of a checkpoint, or of a run's last checkpoint.

    Args:
        path: The folder of a checkpoint or of a run.
        variants: Where it will play: it must take their observations.

    Raises:
        UserError: There is no checkpoint, its weights are not finite, or it is no policy for these variants.
    """
    import gymnasium as gym

    from fleetgym.core.checkpoint import Checkpoint
    from fleetgym.core.run import find_checkpoint

    checkpoint = Checkpoint.load(find_checkpoint(path))
    checkpoint.check_finite()
    policy = checkpoint.module()
    if not callable(getattr(policy, "predict", None)):
        raise UserError(f"--policy {path} holds a {checkpoint.architecture}, which is no policy: it has no predict()")
    for variant in variants:
        env = gym.make_vec(variant, num_envs=2)
        try:
            action, _ = policy.predict(env.reset(seed=0)[0], None, np.ones(2, bool), True)
        except Exception as error:  # whatever a network says to a picture of a wrong size
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"--policy {path} cannot play {variant}: {reason}; name others by --variants") from error
        finally:
            env.close()
        if np.shape(action) != (2,) or np.asarray(action).dtype.kind not in "iu":
            raise UserError(f"--policy {path} cannot play {variant}: its actions are no integers, one an environment")
    return policy


def play(policy: Any, variant: str, **options: Any) -> Reading:
    """``metrics.reading`` of a 2D variant, or its like of the 3D office.

    Args:
        policy: A ``Policy``.
        variant: An id of OfficeNav.
        **options: ``trials``, ``sign``, ``split`` and ``seed``.
    """
    if variant == ID_3D:
        from fleetgym.envs.office_nav.reference3d import reading3d

        return reading3d(policy, **options)
    return reading(policy, variant, **options)


def summary(played: Reading) -> dict[str, Any]:
    """``played.summary()`` with 95% intervals (Wilson) of its shares and the standard error of its return."""
    found = played.summary()
    trials = found["trials"]
    for key in ("success", "first_named", "first_goal", "saw_sign"):
        found[f"{key}_interval"] = list(wilson_interval(round(found[key] * trials), trials))
    returns = played.returns[:, -1]
    found["return_error"] = float(returns.std(ddof=1) / np.sqrt(trials)) if trials > 1 else None
    return found


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


def _share(row: Mapping[str, Any], key: str) -> str:
    low, high = row[f"{key}_interval"]
    return f"{row[key]:.3f} [{low:.3f}, {high:.3f}]"


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown: the exact scores, then what was played with 95% intervals."""
    lines = ["Exact scores, second episode of a trial:", ""]
    lines += ["| variant | policy | return | success | steps |", "|---|---|---|---|---|"]
    for variant, found in results.items():
        for name, score in found["exact"].items():
            values = f"{score['mean_return']:.4f} | {score['success']:.4f} | {score['length']:.2f}"
            lines.append(f"| {variant} | {name} | {values} |")
    lines += ["", "Played, second episodes; in brackets 95% intervals (Wilson):", ""]
    lines += ["| variant | policy | sign | return | success | first office is the sign's | first office is the goal |"]
    lines[-1] += " doors before the goal | saw the sign |"
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for variant, found in results.items():
        for row in found["played"]:
            doors = "" if row["doors_before_goal"] is None else f"{row['doors_before_goal']:.2f}"
            error = "" if row["return_error"] is None else f" ± {row['return_error']:.3f}"
            lines.append(
                f"| {variant} | {row['policy']} | {row['sign']} "
                f"| {row['return']:.3f}{error} | {_share(row, 'success')} "
                f"| {_share(row, 'first_named')} | {_share(row, 'first_goal')} | {doors} | {row['saw_sign']:.3f} |"
            )
    return "\n".join(lines) + "\n"


def plot(results: Mapping[str, Any], path: Path) -> Path:
    """Draws return, and share of trials whose first office is the sign's, by policy and sign; one row a variant.

    Args:
        results: As in ``office_nav.json``.
        path: A .png or .svg file.
    """
    import matplotlib
    from matplotlib.figure import Figure

    colours = {"true": "#3366cc", "swapped": "#dd8833", "blank": "#999999"}
    panels = (("return", "return"), ("first_named", "first office is the sign's"))
    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc: the same results give the same plot everywhere
        matplotlib.rcParams.update({"svg.hashsalt": "office_nav", "font.size": 9})
        figure = Figure(figsize=(9, 0.6 + 2.1 * len(results)), layout="constrained")
        grid = figure.subplots(len(results), 2, squeeze=False)
        for axes_row, (variant, found) in zip(grid, results.items()):
            policies = list(dict.fromkeys(row["policy"] for row in found["played"]))
            signs = list(dict.fromkeys(row["sign"] for row in found["played"]))
            width = 0.8 / len(signs)
            for axes, (key, title) in zip(axes_row, panels):
                for row in found["played"]:
                    index = signs.index(row["sign"])
                    x = policies.index(row["policy"]) + (index - (len(signs) - 1) / 2) * width
                    if key == "return":
                        reach = 1.96 * (row["return_error"] or 0.0)
                        error = [[reach], [reach]]
                    else:
                        low, high = row[f"{key}_interval"]
                        error = [[max(0.0, row[key] - low)], [max(0.0, high - row[key])]]
                    label = f"{row['sign']} sign" if row["policy"] == policies[0] else None
                    axes.bar(x, row[key], width, yerr=error, color=colours[row["sign"]], capsize=2, label=label)
                axes.set_xticks(range(len(policies)), policies)
                axes.set_title(f"{variant}: {title}")
                axes.spines[["top", "right"]].set_visible(False)
                axes.axhline(0, color="black", linewidth=0.6)
                if key != "return":
                    axes.set_ylim(0, 1.05)
        grid[0][1].legend(frameon=False)
        with atomic_write(path) as temporary:
            kind = path.suffix[1:]
            figure.savefig(temporary, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return path


@dataclass
class Args:
    """Reference scores of OfficeNav and the metrics that tell a reader from others."""

    variants: tuple[str, ...] = (
        "OfficeNav-Symbolic-v0",
        "OfficeNav-SingleGoal-v0",
        "OfficeNav-Map-v0",
        "OfficeNav-Released-v0",
        "OfficeNav3D-v0",
    )
    """Ids of OfficeNav."""
    policies: tuple[str, ...] = POLICIES
    """Reference policies: oracle, non_reader, random."""
    policy: Path | None = None
    """A checkpoint or run to measure as well, as "trained"; it must take the observations of all variants."""
    signs: tuple[str, ...] = SIGNS
    """What the signs say: true, swapped, blank."""
    trials: int = 1000
    """Trials of each."""
    split: str = "test"
    """Whose buildings and signs."""
    seed: int = 0
    """Seed of the first trial."""
    out: Path = Path("runs/office_nav")
    """Folder for office_nav.json, office_nav.md, office_nav.png and the records."""


def _check(args: Args) -> None:
    for name in args.variants:
        if name != ID_3D and name not in VARIANTS:
            raise unknown("variant", name, (*VARIANTS, ID_3D))
        if name != ID_3D:
            tables(VARIANTS[name]).split(args.split)
    if ID_3D in args.variants:
        from fleetgym.envs.office_nav.env3d import SPLITS

        if args.split not in SPLITS:
            raise unknown("split", args.split, SPLITS)
    for name in args.policies:
        if name not in POLICIES:
            raise unknown("reference policy", name, POLICIES)
    for name in args.signs:
        if name not in SIGNS:
            raise unknown("choice of sign", name, SIGNS)
    if args.trials < 1:
        raise UserError(f"--trials {args.trials}: it must be at least 1")
    for option in ("variants", "signs"):
        if not getattr(args, option):
            raise UserError(f"--{option}: name at least one")
    if not args.policies and args.policy is None:
        raise UserError("--policies: name at least one, or pass --policy CHECKPOINT")


def main(argv: Sequence[str]) -> int:
    """``fleetgym bench office_nav``."""
    import tyro

    from fleetgym.core.run import track

    args = tyro.cli(Args, args=list(argv), prog="fleetgym bench office_nav")
    _check(args)
    trained = None if args.policy is None else trained_policy(args.policy, args.variants)
    names = [*args.policies, *(["trained"] if trained is not None else [])]
    jobs = [(variant, name, sign) for variant in args.variants for name in names for sign in args.signs]
    results: dict[str, Any] = {variant: {"exact": exact(variant), "played": []} for variant in args.variants}
    for job in track(len(jobs), "bench office_nav"):
        variant, name, sign = jobs[job]
        policy = trained if name == "trained" else policy_named(name, variant, args.split, args.seed)
        played = play(policy, variant, trials=args.trials, sign=sign, split=args.split, seed=args.seed)
        results[variant]["played"].append({"policy": name, **summary(played)})
        made = record(played, f"{name}, {sign} signs", variant, split=args.split)
        made.save(args.out / "records" / f"{variant}-{name}-{sign}.json")
    facts = {"split": args.split, "trials": args.trials, "seed": args.seed}
    write_json(args.out / "office_nav.json", {"results": results, **facts, "provenance": provenance()})
    plot(results, args.out / "office_nav.png")
    text = table(results)
    with atomic_write(args.out / "office_nav.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text, end="")
    print(f"{len(args.variants)} variants, {args.trials} trials of each policy and sign: {args.out}")
    return 0
