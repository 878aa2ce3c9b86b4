"""What the page of OfficeNav says beside the docstrings: all that is computed."""

from __future__ import annotations

from dataclasses import fields

from fleetgym.envs.office_nav.language import phrases
from fleetgym.envs.office_nav.layout import LAYOUTS
from fleetgym.envs.office_nav.reference import Score, non_reader_score, oracle_score, random_score
from fleetgym.envs.office_nav.variants import VARIANTS, Variant, tables


def lines() -> list[str]:
    """Sections on the registered configurations, the reference scores and the metrics of reading, in Markdown."""
    return [*_configurations(), "", *_scores(), "", *_reading()]


def _configurations() -> list[str]:
    rows = [
        "## Registered configurations",
        "",
        "| id | differs in | offices | signs | splits |",
        "|---|---|---|---|---|",
    ]
    usual = {field.name: field.default for field in fields(Variant)}
    for variant in VARIANTS.values():
        values = {name: getattr(variant, name) for name in usual if name != "id"}
        differs = [f"`{name}={value!r}`" for name, value in values.items() if value != usual[name]]
        worlds = tables(variant)
        offices = worlds.layouts[0].offices
        if variant.released:
            signs = f"{len(worlds.phrases[0])} phrases"
        elif variant.sign == "text":
            signs = f"{len(phrases(offices))} phrases"
        else:
            signs = f"{len(set(worlds.style_pools.tolist()))} styles of drawing"
        splits = ", ".join(f"`{name}`" for name in worlds.splits)
        rows.append(f"| `{variant.id}` | {', '.join(differs) or '-'} | {offices} | {signs} | {splits} |")
    rows += [
        "| `OfficeNav3D-v0` | first-person RGB, another building: see below | 4 | 10 phrases | as text |",
        "",
        "The released variant has the grammar of the released code with its mistakes (it names offices that do not",
        'exist, and never says "lower"), its 200 buildings for training and testing alike, and its seven actions.',
    ]
    return rows


def _cell(score: Score) -> str:
    return f"{score.mean_return:.3f} ({100 * score.success:.1f}%)"


def _scores() -> list[str]:
    rows = [
        "## Reference scores",
        "",
        "Exact means over all buildings, second episode of a trial: return, and share of episodes that reach a goal.",
        "",
        "- *Oracle*: the shortest path to the nearest goal, which is what a perfect reader walks.",
        "- *Best non-reader*: opens doors in the first episode, and goes in the second to the nearest goal that it saw",
        "  or searches the rest. No policy has a greater mean return that neither reads the sign nor knows buildings",
        "  by heart: a search over all that it can do (`fleetgym.envs.office_nav.non_reader`) finds the same number.",
        "- *Search*: the same without a first episode.",
        "- *Random*: every action alike.",
        "",
        "| layout | goals | oracle | best non-reader | search | random |",
        "|---|---|---|---|---|---|",
    ]
    for plan in LAYOUTS.values():
        for single in (False, True):
            unread = (non_reader_score(plan, single, explore=explore) for explore in (True, False))
            scores = (oracle_score(plan, single), *unread)
            wandering = random_score(plan, single)
            cells = [*map(_cell, scores), f"{wandering.mean_return:.4f} ({100 * wandering.success:.3f}%)"]
            rows.append(f"| {plan.name} | {'one' if single else 'any blue office'} | {' | '.join(cells)} |")
    released = random_score(LAYOUTS["standard"], actions=7)
    rows += [
        "",
        "With the released seven actions, of which three do nothing, random play in the standard layout with any blue",
        f"office gets {released.mean_return:.4f} ({100 * released.success:.3f}%). One that never arrives gets -1.5.",
    ]
    return rows


def _reading() -> list[str]:
    return [
        "## Reading metrics",
        "",
        "Where any blue office counts, a policy that never reads comes close to one that does. So whole trials are",
        "played with changed signs, by `fleetgym.envs.office_nav.metrics.reading` and `fleetgym bench office_nav`:",
        "",
        "| signs | what they say | a reader | a non-reader |",
        "|---|---|---|---|",
        "| `true` | where a blue office is | goes there first | finds some blue office |",
        "| `swapped` | the name of an office that is not blue | goes there first | plays as before |",
        "| `blank` | nothing | is lost | plays as before |",
        "",
        "Measured are the return, the share of trials whose first office entered in the second episode is the one",
        "that the sign names (`first_named`), or is blue (`first_goal`), and the doors opened before the goal (one by",
        "a reader). `fleetgym bench office_nav --policy CHECKPOINT` measures a trained policy beside these.",
    ]
