"""The plots of a leaderboard page, as inline SVG that takes its colours and its font from the page's CSS.

Matplotlib draws with colours that stand for CSS variables (``ink``, ``m0``..), which are put in afterwards: so one
drawing serves the light and the dark scheme. Nothing here touches pyplot or leaves a global setting changed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SLOTS = 12
"""Number of colours for methods; the page defines ``--m0`` to ``--m11`` in both schemes."""

_NAMES = ("ink", "muted", "grid", "surface", "accent", "warm", *(f"m{i}" for i in range(SLOTS)))
# Colours that nobody would choose, one for each CSS variable.
_COLOURS = {name: f"#0d0e{16 + i:02x}" for i, name in enumerate(_NAMES)}
_MARKERS = "osD^vPX*<>ph"
_LABEL_LENGTH = 19
_STYLE = {
    "axes.edgecolor": _COLOURS["muted"],
    "axes.labelcolor": _COLOURS["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "font.size": 10,
    "grid.color": _COLOURS["grid"],
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.labelcolor": _COLOURS["ink"],
    "svg.fonttype": "none",
    "text.color": _COLOURS["ink"],
    "text.parse_math": False,  # a "$" in a label is a dollar
    "xtick.color": _COLOURS["muted"],
    "ytick.color": _COLOURS["muted"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}


def human_bytes(count: float | None) -> str:
    """Formats a number of bytes in decimal units, such as ``1.2 MB``; None gives a dash."""
    if count is None:
        return "–"
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g} B"


def _svg(draw: Callable[[Figure], None], size: tuple[float, float], name: str, alt: str) -> str:
    """Draws on a new figure and returns it as an ``<svg>`` element for a page.

    Args:
        draw: Fills the figure.
        size: Width and height in inches.
        name: Makes the ids of this drawing different from those of others on the page.
        alt: What the drawing shows, for those who cannot see it.
    """
    import html
    import io

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # not the user's matplotlibrc: the same records give the same page everywhere
        matplotlib.rcParams.update({**_STYLE, "svg.hashsalt": name})
        figure = Figure(figsize=size)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'\b(id="|href="#)', rf"\g<1>{name}-", text).replace("url(#", f"url(#{name}-")
    text = re.sub(r"font: ([^;\"]*?)([\d.]+)px [^;\"]*", r"font-size: \2px", text)
    text = re.sub(r"font-family: [^;\"]*;?", "", text)
    # The page's CSS holds for the whole document; the drawing's own rule sheet would as well.
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    for variable, colour in _COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    opening = text[: text.index(">") + 1]
    box = re.search(r'viewBox="[^"]*"', opening).group()
    label = html.escape(alt, quote=True)
    head = f'<svg {box} xmlns:xlink="http://www.w3.org/1999/xlink" role="img" aria-label="{label}" class="{name}">'
    return head + text[len(opening) :].strip()


def colour(row: Mapping[str, Any]) -> str:
    """The CSS colour of a method."""
    return f"var(--m{row['slot']})"


def _short(label: str, lines: int = 1) -> str:
    """Breaks a label into as many lines at most, and cuts what is too long."""
    import textwrap

    parts = textwrap.wrap(label, _LABEL_LENGTH) or [""]
    if len(parts) > lines:
        parts = [*parts[: lines - 1], " ".join(parts[lines - 1 :])[: _LABEL_LENGTH - 1].rstrip() + "…"]
    return "\n".join(parts)


def _places(axes: Axes, heights: Sequence[float], labels: Sequence[str]) -> tuple[list[float], list[str], float]:
    """Heights, texts and a font size for labels beside the right edge, clear of one another."""
    points = axes.get_position().height * axes.figure.get_size_inches()[1] * 72
    low, high = axes.get_ylim()
    lines = 2 if 26 * len(labels) <= points else 1
    texts = [_short(label, lines) for label in labels]
    gap = min(13.0 * max((text.count("\n") + 1 for text in texts), default=1), points / max(1, len(labels)))
    margin = gap / 2 / points * (high - low)
    places = _spread(heights, gap / points * (high - low), low + margin, high - margin)
    return places, texts, min(9.5, gap * 0.85)


def _spread(heights: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Moves heights apart by at least ``gap``, within ``low``..``high`` as far as there is room."""
    if not heights:
        return []
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    gap = min(gap, (high - low) / max(1, len(heights) - 1))
    places = [max(low, heights[i]) for i in order]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + gap)
    places[-1] = min(places[-1], high)
    for i in range(len(places) - 2, -1, -1):
        places[i] = min(places[i], places[i + 1] - gap)
    result = [0.0] * len(heights)
    for place, i in zip(places, order):
        result[i] = place
    return result


def _rate_axis(axes: Axes, label: str = "Success over all tasks") -> None:
    axes.set_ylim(-0.03, 1.03)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "100%"])
    axes.set_ylabel(label)


def _margin_labels(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes names beside the right edge, at the heights of what they name but clear of one another."""
    places, texts, size = _places(axes, [y for y, _, _ in ends], [label for _, label, _ in ends])
    for (y, _, paint), text, place in zip(ends, texts, places):
        axes.annotate(
            text,
            xy=(1.0, y),
            xycoords=("axes fraction", "data"),
            xytext=(1.045, place),
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=size,
            color=paint,
            annotation_clip=False,
            # relpos: the leader ends beside the text, not in the middle of it
            arrowprops={
                "arrowstyle": "-",
                "color": paint,
                "linewidth": 0.7,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
        )


def _steps_of_rounds(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float] | None:
    """Gradient steps before round 0 ends and in each later round, where they are the same for all points."""
    points = sorted({(p["round"], p["gradient_steps"]) for row in rows for p in row["curve"] if "gradient_steps" in p})
    known = sum("gradient_steps" in p for row in rows for p in row["curve"])
    if known != sum(len(row["curve"]) for row in rows) or len(points) < 2 or points[0][0] == points[-1][0]:
        return None
    (first, start), (last, end) = points[0], points[-1]
    slope = (end - start) / (last - first)
    begin = start - slope * first
    fits = all(abs(begin + slope * number - steps) < 1e-6 * max(1.0, end) for number, steps in points)
    return (begin, slope) if fits and slope > 0 else None


def learning_curve(rows: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """Success by round: a line and a band (least to most over training seeds) where there is a curve.

    Joint training, robots alone and methods without a curve are horizontal lines at their final success. Where every
    round has as many gradient steps they stand at the upper edge.

    Args:
        rows: Rows of the leaderboard.
        lines: Further horizontal lines, each with ``label`` and ``success``.

    Returns:
        An SVG element, or None when no method has a curve.
    """
    curved = [row for row in rows if row["curve"] and row["kind"] == "merged"]
    if not curved:
        return None
    # Methods without rounds, such as one trained for a number of steps only, are compared by gradient steps.
    axis = next((key for key in ("round", "gradient_steps") if all(key in p for r in curved for p in r["curve"])), None)
    if axis is None:
        return None
    name = {"round": "Round", "gradient_steps": "Gradient steps"}[axis]
    steps = _steps_of_rounds(curved) if axis == "round" else None

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.125, 0.125, 0.585, 0.845 if steps is None else 0.735))
        _rate_axis(axes)
        ends = []
        for row in rows:
            paint = _COLOURS[f"m{row['slot']}"]
            if row not in curved:
                axes.axhline(row["success"], color=paint, linewidth=1.5, linestyle=(0, (5, 3)))
                ends.append((row["success"], row["label"], paint))
                continue
            x = [point[axis] for point in row["curve"]]
            y = [point["success"] for point in row["curve"]]
            if row["seeds"] > 1:
                low, high = ([point[key] for point in row["curve"]] for key in ("low", "high"))
                axes.fill_between(x, low, high, color=paint, alpha=0.16, linewidth=0)
            axes.plot(
                x,
                y,
                color=paint,
                linewidth=2.6 if row["best_merged"] else 1.8,
                marker=_MARKERS[row["slot"]],
                markersize=5,
                markeredgecolor=_COLOURS["surface"],
                zorder=4 if row["best_merged"] else 3,
                clip_on=False,
            )
            ends.append((y[-1], row["label"], paint))
        for line in lines:
            axes.axhline(line["success"], color=_COLOURS["muted"], linewidth=1, linestyle=(0, (1, 2)))
            ends.append((line["success"], line["label"], _COLOURS["muted"]))
        last = max(point[axis] for row in curved for point in row["curve"])
        first = min(point[axis] for row in curved for point in row["curve"])
        axes.set_xlim(min(0, first), last if last > min(0, first) else last + 1)
        axes.set_xlabel(name)
        axes.grid(axis="x", visible=False)
        if steps is not None:
            begin, slope = steps
            upper = axes.secondary_xaxis("top", (lambda x: begin + slope * x, lambda x: (x - begin) / slope))
            upper.set_xlabel("Gradient steps")
            upper.spines["top"].set_visible(False)
        _margin_labels(axes, ends)

    parts = [f"{row['label']} ends at {row['curve'][-1]['success']:.0%}" for row in curved]
    parts += [f"{row['label']} is at {row['success']:.0%}" for row in rows if row not in curved]
    return _svg(draw, (6.0, 3.8), "curve", f"Line plot of success by {name.lower()}. {'; '.join(parts)}.")


def _byte_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 5), (1, 3), (1,)):
        ticks = [step * 10.0**k for k in decades for step in steps if low <= step * 10.0**k <= high]
        if len(ticks) <= 5:
            break
    stride = math.ceil(len(ticks) / 6)
    return ticks[::stride] or [low]


def communication(rows: Sequence[Mapping[str, Any]]) -> str | None:
    """Success against the bytes that each robot sent, on a logarithmic axis with a place of its own for nothing.

    Returns:
        An SVG element, or None when no method sent anything.
    """
    sent = [row for row in rows if row["bytes_sent"] is not None]
    if not any(row["bytes_sent"] for row in sent):
        return None
    trails = {
        row["method"]: [(p["bytes_sent"], p["success"]) for p in row["curve"] if p.get("bytes_sent")]
        for row in sent
        if row["bytes_sent"]
    }
    values = [row["bytes_sent"] for row in sent if row["bytes_sent"]]
    values += [x for trail in trails.values() for x, _ in trail]
    low, high = min(values) / 1.6, max(values) * 1.6
    silent = any(row["bytes_sent"] == 0 for row in sent)
    # A logarithmic axis has no zero: those who sent nothing stand left of a gap of a fixed share of the width.
    zero = low / (high / low) ** 0.14

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.125, 0.125, 0.585, 0.845))
        _rate_axis(axes)
        axes.set_xscale("log")
        axes.set_xlim(zero / (high / low) ** 0.06 if silent else low, high)
        axes.xaxis.set_minor_locator(_null_locator())
        ticks = _byte_ticks(low, high)
        names = [human_bytes(tick) for tick in ticks]
        axes.set_xticks([zero, *ticks] if silent else ticks, ["nothing", *names] if silent else names)
        if silent:
            edge = low / (high / low) ** 0.05
            axes.axvline(edge, color=_COLOURS["muted"], linewidth=0.8, linestyle=(0, (1, 2)))
        axes.set_xlabel("Sent by each robot in total")
        ends = []
        for row in sent:
            paint, marker = _COLOURS[f"m{row['slot']}"], _MARKERS[row["slot"]]
            x = row["bytes_sent"] or zero
            trail = trails.get(row["method"], [])
            if len(trail) > 1:
                if row["seeds"] > 1:
                    bounds = [(p["bytes_sent"], p["low"], p["high"]) for p in row["curve"] if p.get("bytes_sent")]
                    axes.fill_between(*zip(*bounds), color=paint, alpha=0.12, linewidth=0)
                axes.plot(*zip(*trail), color=paint, linewidth=1.6, alpha=0.75, zorder=3)
            error = [[max(0.0, row["success"] - row["low"])], [max(0.0, row["high"] - row["success"])]]
            axes.errorbar(
                x,
                row["success"],
                yerr=error,
                color=paint,
                marker=marker,
                markersize=9 if row["best_merged"] else 7.5,
                markeredgecolor=_COLOURS["surface"],
                elinewidth=1.6,
                zorder=5,
            )
            ends.append((row["success"], f"{row['label']}", paint, marker))
        _marker_labels(axes, ends)

    parts = [f"{row['label']}: {human_bytes(row['bytes_sent'])}, {row['success']:.0%}" for row in sent]
    return _svg(draw, (6.0, 3.8), "sent", f"Success against bytes sent by each robot. {'; '.join(parts)}.")


def _null_locator() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _marker_labels(axes: Axes, ends: Sequence[tuple[float, str, str, str]]) -> None:
    """A key at the right edge: markers and names, in the order of the heights they stand at."""
    places, texts, size = _places(axes, [end[0] for end in ends], [end[1] for end in ends])
    blend = axes.get_yaxis_transform()
    for (_, _, paint, marker), text, place in zip(ends, texts, places):
        axes.plot(1.05, place, marker=marker, color=paint, markersize=6, transform=blend, clip_on=False, linestyle="")
        axes.text(1.085, place, text, color=paint, fontsize=size, va="center", transform=blend)


def interpolation(data: Mapping[str, Any]) -> str | None:
    """Loss, and success if given, along the straight line between two policies' weights.

    Args:
        data: ``lambda`` (positions in 0..1), ``series`` (each with ``name`` and ``loss`` and/or ``success``, one value
            or None for each position), and optionally ``robots`` (names of the two ends).

    Returns:
        An SVG element, or None when there is no value.
    """
    position, series = data["lambda"], data["series"]

    def known(one: Mapping[str, Any], key: str) -> list[tuple[float, float]]:
        # Success costs rollouts, so it may be known at some positions only.
        return [(x, y) for x, y in zip(position, one.get(key) or ()) if y is not None]

    shown = [key for key in ("success", "loss") if any(known(one, key) for one in series)]
    if not shown:
        return None
    ends = [str(name) for name in (data.get("robots") or ("first robot", "second robot"))]

    def draw(figure: Figure) -> None:
        paints = [_COLOURS["warm"], _COLOURS["accent"], *(_COLOURS[f"m{i}"] for i in range(6, SLOTS))]
        for i, key in enumerate(shown):
            left, width = ((0.105, 0.84), (0.1, 0.375))[len(shown) > 1]
            axes = figure.add_axes((left + i * 0.505, 0.15, width, 0.72))
            handles = []
            for j, one in enumerate(series):
                if points := known(one, key):
                    handles += axes.plot(
                        *zip(*points),
                        color=paints[j % len(paints)],
                        marker="os^D"[j % 4],
                        markersize=4.5,
                        markeredgecolor=_COLOURS["surface"],
                        linewidth=2.2,
                        linestyle=("-", (0, (5, 2)))[j % 2 == 0 and len(series) > 1],
                        label=one["name"],
                    )
            if key == "success":
                _rate_axis(axes, "Success on both tasks")
            else:
                values = [y for one in series for _, y in known(one, key)]
                if min(values) > 0 and max(values) / min(values) > 30:
                    axes.set_yscale("log")
                else:
                    axes.set_ylim(min(0, min(values)), 1.06 * max(values) if max(values) > 0 else 1)
                axes.set_ylabel("Imitation loss on both tasks")
            axes.set_xlim(-0.02, 1.02)
            axes.set_xticks([0, 0.5, 1], [_short(ends[0]), "", _short(ends[-1])])
            for tick, side in zip(axes.get_xticklabels(), ("left", "center", "right")):
                tick.set_horizontalalignment(side)
            axes.set_xlabel("Weights, from one robot's to the other's")
            axes.grid(axis="x", visible=False)
            if i == 0:
                figure.legend(handles=handles, loc="upper center", ncols=len(handles), bbox_to_anchor=(0.5, 1.0))

    parts = []
    for one in series:
        if one.get("success_barrier") is not None:
            parts.append(f"{one['name']}: barrier {one['success_barrier']:.2f} of success")
        for key in shown:
            if points := known(one, key):
                x, y = min(points, key=lambda point: abs(point[0] - 0.5))
                parts.append(f"{one['name']}: {key} {y:.3g} at {x:.2g}")
    alt = f"Along the line between the weights of {ends[0]} and {ends[-1]}. {'; '.join(parts)}."
    return _svg(draw, (7.6, 3.5), "interpolation", alt)


def swept(groups: Sequence[Mapping[str, Any]], lines: Sequence[Mapping[str, Any]] = ()) -> str | None:
    """Success against the bytes that a robot sent, over the points of a sweep.

    Args:
        groups: Points that belong together, joined by a line: each group has ``label``, ``slot`` (its colour),
            ``style`` (a number; its kind of line) and ``points``, each with ``bytes_sent``, ``success``, ``low``,
            ``high`` and ``text``, written beside it.
        lines: Horizontal lines, each with ``label``, ``slot`` and ``success``.

    Returns:
        An SVG element, or None when nothing was sent.
    """
    groups = [{**group, "points": [p for p in group["points"] if p["bytes_sent"]]} for group in groups]
    groups = [group for group in groups if group["points"]]
    if not groups:
        return None
    values = [point["bytes_sent"] for group in groups for point in group["points"]]
    low, high = min(values) / 1.5, max(values) * 1.5
    dashes = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.085, 0.11, 0.66, 0.86))
        _rate_axis(axes)
        axes.set_xscale("log")
        axes.set_xlim(low, high)
        axes.xaxis.set_minor_locator(_null_locator())
        ticks = _byte_ticks(low, high)
        axes.set_xticks(ticks, [human_bytes(tick) for tick in ticks])
        axes.set_xlabel("Sent by each robot in total")
        ends = []
        for group in groups:
            paint, style = _COLOURS[f"m{group['slot']}"], group["style"]
            points = sorted(group["points"], key=lambda point: point["bytes_sent"])
            x, y = ([point[key] for point in points] for key in ("bytes_sent", "success"))
            below = [max(0.0, point["success"] - point["low"]) for point in points]
            above = [max(0.0, point["high"] - point["success"]) for point in points]
            axes.errorbar(
                x,
                y,
                yerr=[below, above],
                color=paint,
                marker=_MARKERS[group["slot"]],
                markersize=7,
                markeredgecolor=_COLOURS["surface"],
                linewidth=1.8,
                elinewidth=1.2,
                linestyle=dashes[style % len(dashes)],
                zorder=4,
            )
            for point in points:
                axes.annotate(
                    point["text"],
                    (point["bytes_sent"], point["success"]),
                    xytext=(5, -11),
                    textcoords="offset points",
                    fontsize=7.5,
                    color=paint,
                )
            ends.append((y[-1], group["label"], paint))
        for line in lines:
            paint = _COLOURS[f"m{line['slot']}"]
            axes.axhline(line["success"], color=paint, linewidth=1.3, linestyle=(0, (1, 2)))
            ends.append((line["success"], line["label"], paint))
        _margin_labels(axes, ends)

    parts = [
        f"{group['label']}, {point['text']}: {human_bytes(point['bytes_sent'])}, {point['success']:.0%}"
        for group in groups
        for point in group["points"]
    ]
    parts += [f"{line['label']}: {line['success']:.0%}" for line in lines]
    return _svg(draw, (8.6, 4.6), "swept", f"Success against bytes sent by each robot. {'; '.join(parts)}.")


def dots(scores: Mapping[str, Sequence[float | None]], label: str, name: str) -> str | None:
    """Scores of methods, a dot for each seed and a line at their mean.

    Args:
        scores: For each method those of its seeds; None where there is none (a training diverged).
        label: What a score is.
        name: Of the drawing; see above.

    Returns:
        An SVG element, or None where no method has a score.
    """
    known = {method: [value for value in values if value is not None] for method, values in scores.items()}
    if not any(known.values()):
        return None
    values = [value for found in known.values() for value in found]
    wide = min(values) > 0 and max(values) > 30 * min(values)

    height = 0.9 + 0.32 * len(known)

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.2, 0.55 / height, 0.76, 1 - 0.6 / height))
        for place, (found, slot) in enumerate(zip(known.values(), range(len(known)))):
            paint = _COLOURS[f"m{slot % SLOTS}"]
            axes.plot(found, [place] * len(found), "o", color=paint, markersize=7, alpha=0.75, zorder=4)
            if found:
                axes.plot([math.fsum(found) / len(found)] * 2, [place - 0.3, place + 0.3], color=paint, linewidth=2)
        axes.set_yticks(range(len(known)), list(known))
        axes.set_ylim(len(known) - 0.5, -0.5)
        if wide:
            axes.set_xscale("log")
        axes.set_xlabel(label)

    parts = [f"{method}: {', '.join(f'{value:.3g}' for value in found)}" for method, found in known.items()]
    return _svg(draw, (7.6, height), f"dots-{name}", f"{label} by method. {'; '.join(parts)}.")


def against(groups: Sequence[Mapping[str, Any]], label: str, name: str, rate: str = "Success") -> str | None:
    """Success against a setting, a line for each method.

    Args:
        groups: Each with ``label``, ``slot`` (its colour) and ``points``, each of which has ``value``, ``success``,
            ``low`` and ``high``.
        label: What is set.
        name: Of the drawing; see above.
        rate: What the success is.

    Returns:
        An SVG element, or None where there is no point. The axis is logarithmic where values are positive and the
        largest is at least four times the smallest.
    """
    groups = [{**group, "points": sorted(group["points"], key=lambda point: point["value"])} for group in groups]
    groups = [group for group in groups if group["points"]]
    if not groups:
        return None
    values = sorted({point["value"] for group in groups for point in group["points"]})

    def draw(figure: Figure) -> None:
        axes = figure.add_axes((0.125, 0.145, 0.65, 0.825))
        _rate_axis(axes, rate)
        if values[0] > 0 and values[-1] >= 4 * values[0]:
            axes.set_xscale("log")
            axes.xaxis.set_minor_locator(_null_locator())
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.set_xlabel(label)
        ends = []
        for group in groups:
            paint, points = _COLOURS[f"m{group['slot'] % SLOTS}"], group["points"]
            x, y = ([point[key] for point in points] for key in ("value", "success"))
            error = [
                [max(0.0, point["success"] - point["low"]) for point in points],
                [max(0.0, point["high"] - point["success"]) for point in points],
            ]
            axes.errorbar(
                x, y, yerr=error, color=paint, marker=_MARKERS[group["slot"] % SLOTS], markersize=7, linewidth=1.8,
                markeredgecolor=_COLOURS["surface"], elinewidth=1.2, zorder=4,
            )  # fmt: skip
            ends.append((y[-1], group["label"], paint))
        _margin_labels(axes, ends)

    parts = [
        f"{group['label']} at {point['value']:g}: {point['success']:.0%}"
        for group in groups
        for point in group["points"]
    ]
    return _svg(draw, (6.0, 3.4), f"against-{name}", f"{rate} against {label}. {'; '.join(parts)}.")
