"""Ablations of ``fleetgym bench spartn``: one field of the preset takes other values, all else stays as it is."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fleetgym.core.errors import UserError
from fleetgym.core.files import read_json
from fleetgym.core.records import wilson_interval

#: Field -> the methods that it changes anything for; all, for those that are not here.
CHANGES = {
    "number": ("homography", "spartn", "oracle"),
    "translation": ("spartn", "oracle"),
    "rotation": ("homography", "spartn", "oracle"),
    "field": ("spartn",),
    "iterations": ("spartn",),
    "left_out": ("spartn",),
    "rounds": ("dagger",),
}


@dataclass(frozen=True)
class Point:
    """A value of a field, and a method.

    Attributes:
        field: The preset's field.
        value: Its value.
        method: The row.
        preset: The preset with that value.
        place: Where its rows lie below the benchmark's folder: ``"."`` where they are those of the benchmark itself,
            since the value is the preset's own or changes nothing for the method.
    """

    field: str
    value: Any
    method: str
    preset: Any
    place: str


def points(
    preset: Any, change: Callable[[str], Any], axes: Sequence[str], methods: Sequence[str], fixed: Sequence[str] = ()
) -> list[Point]:
    """What ablations ask for.

    Args:
        preset: The benchmark's.
        change: ``change("field=value")`` gives the preset with that value, or raises.
        axes: Texts ``field=value,value,...``.
        methods: Rows.
        fixed: Fields that are set for the whole benchmark.

    Raises:
        UserError: A text that is none; a field or a value that is given twice, or that is also overridden; what
            ``change`` raises; or an axis that changes none of the methods.
    """
    found: list[Point] = []
    seen: set[str] = set()
    for text in axes:
        field, equals, words = text.partition("=")
        values = words.split(",")
        if not equals or "" in values:
            raise UserError(f"--ablate {text}: FIELD=VALUE,VALUE is wanted, such as demonstrations=6,12,24")
        if field in seen or field in fixed:
            raise UserError(f"--ablate {text}: {field} is given twice; leave one out")
        seen.add(field)
        presets = [change(f"{field}={value}") for value in values]
        if len(set(presets)) < len(presets):
            raise UserError(f"--ablate {text}: a value is given twice; leave one out")
        changed = [method for method in methods if method in CHANGES.get(field, methods)]
        if not changed:
            raise UserError(
                f"--ablate {text}: {field} changes nothing for {', '.join(methods)}; add one of "
                f"{', '.join(CHANGES[field])} to --methods"
            )
        for value, other in zip(values, presets):
            folder = f"ablations/{field}={re.sub(r'[^A-Za-z0-9_.+-]+', '_', value)}"
            for method in methods:
                own = other == preset or method not in changed
                found.append(Point(field, getattr(other, field), method, other, "." if own else folder))
    return found


def table(folder: Path, found: Sequence[Point], seeds: Sequence[int], column: tuple[str, str]) -> list[dict[str, Any]]:
    """What was measured at each point.

    Args:
        folder: The benchmark's.
        found: See :func:`points`.
        seeds: Training seeds.
        column: Protocol and split.

    Returns:
        For each ``field``, ``value``, ``method``, ``success`` with Wilson's interval ``low``, ``high``, ``episodes``,
        ``success_by_seed`` and ``views_psnr``.

    Raises:
        UserError: A row is missing.
    """
    out = []
    for point in found:
        rows = [read_json(folder / point.place / "rows" / f"{point.method}-{seed}.json") for seed in seeds]
        parts = {
            str(row["seed"]): result["successes"]
            for row in rows
            for result in row["results"]
            if (result["protocol"], result["split"]) == column
        }
        done, all_ = sum(map(sum, parts.values())), sum(map(len, parts.values()))
        low, high = wilson_interval(done, all_)
        entry = {"field": point.field, "value": point.value, "method": point.method, "success": done / all_}
        known = [row["views_psnr"] for row in rows if row["views_psnr"] is not None]
        entry |= {"low": low, "high": high, "episodes": all_, "views_psnr": float(np.mean(known)) if known else None}
        out.append({**entry, "success_by_seed": {seed: sum(s) / len(s) for seed, s in parts.items()}})
    return out


HEADS = ("field", "value", "method", "success", "views, dB")


def lines(entries: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The cells of :func:`table`."""
    return [
        [
            entry["field"],
            f"{entry['value']:g}" if isinstance(entry["value"], (int, float)) else str(entry["value"]),
            entry["method"],
            f"{entry['success']:.2f} [{entry['low']:.2f}, {entry['high']:.2f}]",
            "" if entry["views_psnr"] is None else f"{entry['views_psnr']:.1f}",
        ]
        for entry in entries
    ]
