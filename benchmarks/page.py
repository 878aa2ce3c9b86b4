"""The leaderboard as one HTML file that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fleetgym.benchmarks import plots
from fleetgym.benchmarks.leaderboard import human_seconds, runs, summary
from fleetgym.core.records import EvalRecord

FILM_LIMIT = 4_000_000
"""Bytes up to which a film is put into the page itself."""

ANNOTATED = 15
"""Tasks up to which the heat map writes its numbers."""

_MEANING = {
    "alone_all": "Each robot learns from its own demonstrations only, and is then tried on the tasks of all robots.",
    "alone_own": "The same robots, each tried on what it learned only: what specialists can do.",
    "average_rounds": "In rounds: what the robots send is averaged as it is and sent back.",
    "fleet_merge_once": "Robots train alone to the end; then their hidden units are aligned and averaged, once.",
    "fleet_merge_rounds": "In rounds: the robots' hidden units are aligned, then what they send is averaged.",
    "average_norms_rounds": "In rounds: the plain average, stretched to the norms of what it is the average of.",
    "align_rounds": "In rounds: the robots' hidden units are aligned, and the average is left as short as it is.",
    "fedprox_rounds": "In rounds: an Adam of its own for each robot, which is held near to the last average (FedProx).",
    "fedavg_rounds": "In rounds: each robot steps with its own Adam, and the weights are averaged as they are.",
    "joint": "One policy trained on everybody's demonstrations, which a fleet that shares no data cannot do.",
}

_LIGHT = {
    "page": "#f4f6f9",
    "surface": "#ffffff",
    "ink": "#17212b",
    "muted": "#566270",
    "grid": "#e2e7ec",
    "accent": "#0b62bd",
    "warm": "#b85c00",
    "best": "#eaf3fd",
    "heat": "11 98 189",
    "heat-ink": "#ffffff",
    "m": ("#6b7682", "#876a34", "#b85c00", "#7d4fd0", "#0b62bd", "#0d7a55")
    + ("#c2185b", "#007a87", "#5f6b00", "#c62828", "#4754d1", "#7a4a2b"),
}
_DARK = {
    "page": "#0f141a",
    "surface": "#182029",
    "ink": "#e8edf2",
    "muted": "#9dabb9",
    "grid": "#2c3742",
    "accent": "#62b2ff",
    "warm": "#ffa24d",
    "best": "#152c43",
    "heat": "98 178 255",
    "heat-ink": "#0b1219",
    "m": ("#9aa7b5", "#d0ad70", "#ffa24d", "#bb9fff", "#62b2ff", "#4fd1a1")
    + ("#ff7eb0", "#4dd0e1", "#c5d34f", "#ff8a80", "#a3abff", "#dbae92"),
}

_CSS = """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:72rem;margin:0 auto;padding:2.5rem 1.25rem 4rem}
h1{font-size:clamp(1.7rem,4.5vw,2.5rem);line-height:1.15;letter-spacing:-.02em;margin:0 0 .8rem;text-wrap:balance}
h2{font-size:1.2rem;letter-spacing:-.01em;margin:0 0 .3rem}
p{margin:0 0 .8rem}
a{color:var(--accent)}
.lead{font-size:1.08rem;max-width:62ch;color:var(--ink)}
.quiet{color:var(--muted);font-size:.92rem;max-width:80ch}
section{background:var(--surface);border:1px solid var(--grid);border-radius:14px;padding:1.35rem 1.5rem;
margin-top:1.25rem}
.top{display:grid;gap:1.5rem 2rem;align-items:center}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.75rem;margin:1.2rem 0 0;padding:0}
.tile{border-left:3px solid var(--accent);padding:.1rem 0 .1rem .85rem}
.tile dt{font-size:.84rem;color:var(--muted);line-height:1.3}
.tile dd{margin:0;font-size:1.7rem;font-weight:650;letter-spacing:-.02em;line-height:1.25;
font-variant-numeric:tabular-nums}
.tile dd small{font-size:.84rem;font-weight:400;color:var(--muted);letter-spacing:0}
figure{margin:0;min-width:0}
figcaption{color:var(--muted);font-size:.9rem;margin-top:.5rem}
.film video,.film img{display:block;width:100%;height:auto;border-radius:12px;border:1px solid var(--grid);
background:#000}
.plots{display:grid;gap:1.25rem;margin-top:1.25rem}
.plots section{margin:0;min-width:0}
.wide{overflow-x:auto}
.wide:focus-visible{outline:2px solid var(--accent);outline-offset:2px}
svg{display:block;width:100%;height:auto;font-family:inherit}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:.6rem .7rem;vertical-align:middle}
thead th{font-size:.82rem;font-weight:600;color:var(--muted);border-bottom:1px solid var(--grid)}
.board tbody th{font-weight:600;min-width:13rem}
.board tbody tr+tr>*{border-top:1px solid var(--grid)}
.board .num{white-space:nowrap}
.board .name{display:flex;align-items:baseline;overflow-wrap:anywhere}
.board .name small,.board .pair small,.rate-cell small{display:block}
.board small,.quiet small{color:var(--muted);font-weight:400;font-size:.82rem}
.board tr.best>*{background:var(--best)}
.badge{display:inline-block;font-size:.72rem;font-weight:600;padding:.05rem .5rem;border-radius:99px;
background:var(--accent);color:var(--surface);white-space:nowrap;vertical-align:.08em}
.dot{display:inline-block;width:.7rem;height:.7rem;border-radius:50%;margin-right:.55rem;flex:none}
.rate{display:flex;align-items:center;gap:.75rem}
.rate b{min-width:3ch}
.bar{position:relative;flex:1;min-width:7rem;height:1rem;background:var(--grid);border-radius:4px;overflow:hidden}
.bar i{position:absolute;inset:0 auto 0 0}
.bar u{position:absolute;top:calc(50% - 1px);height:2px;background:var(--ink);box-shadow:0 0 0 1px var(--surface)}
.heat{border-collapse:separate;border-spacing:2px;width:auto;min-width:60%}
.heat th{font-weight:500;font-size:.86rem;border:0;padding:.3rem .45rem}
.heat tbody th{white-space:nowrap;position:sticky;left:0;background:var(--surface);z-index:1}
.heat td{text-align:center;padding:.45rem .4rem;min-width:4.4rem;border-radius:5px;font-size:.92rem;
background:rgb(var(--heat)/calc(.05 + .95*var(--v)))}
.heat td.hi{color:var(--heat-ink)}
.heat td.none{background:none;color:var(--muted)}
.heat.many{border-spacing:1px;width:100%}
.heat.many thead th{padding:.2rem 0;vertical-align:bottom}
.heat.many thead span{writing-mode:vertical-rl;line-height:1.05;transform:rotate(180deg);font-size:.74rem;
white-space:nowrap;display:inline-block}
.heat.many td{min-width:.75rem;height:1.5rem;padding:0;border-radius:2px}
.heat.many tbody th{max-width:14rem;overflow:hidden;text-overflow:ellipsis}
.plain th,.plain td{padding:.4rem .6rem;font-size:.92rem}
.plain tbody th{font-weight:600;min-width:11rem}
.plain tbody tr+tr>*{border-top:1px solid var(--grid)}
.scale{display:flex;align-items:center;gap:.6rem;font-size:.84rem;color:var(--muted);margin-top:.7rem}
.scale i{width:9rem;height:.7rem;border-radius:4px;
background:linear-gradient(90deg,rgb(var(--heat)/.05),rgb(var(--heat)))}
pre{background:var(--page);border:1px solid var(--grid);border-radius:10px;padding:.8rem 1rem;overflow-x:auto;
margin:.6rem 0 0;font:.92rem/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:.3rem 1.2rem;margin:.6rem 0 0;font-size:.93rem}
dl.facts dt{color:var(--muted)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
ul.methods{list-style:none;margin:.6rem 0 0;padding:0;font-size:.95rem}
ul.methods li{display:flex;align-items:baseline;padding:.22rem 0}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
@media(min-width:58rem){.top.filmed{grid-template-columns:minmax(0,1.1fr) minmax(0,1fr)}
.plots{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}.plots .full{grid-column:1/-1}
.plots .full .wide{max-width:46rem;margin:0 auto}}
@media(max-width:46rem){main{padding:1.5rem .8rem 3rem}section{padding:1.1rem 1rem}
.plots svg{min-width:27rem}
.heat tbody th{white-space:normal;width:7.5rem;min-width:7.5rem;line-height:1.25}.heat td{min-width:3.6rem}
.board,.board tbody,.board tr,.board th,.board td{display:block;width:100%}
.board thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.board tbody tr{border:1px solid var(--grid);border-radius:10px;margin-top:.7rem;overflow:hidden}
.board tbody tr.best{border-color:var(--accent)}
.board tbody tr>*{border:0!important;padding:.3rem .8rem}
.board tbody th{padding-top:.7rem}.board tbody td:last-child{padding-bottom:.7rem}
.board td{display:flex;justify-content:space-between;gap:1rem}
.board td>span{text-align:right}
.board td::before{content:attr(data-name);color:var(--muted);font-size:.9rem;flex:none}
.board td.rate-cell{display:block}.board td.rate-cell::before{display:block}
dl.facts{grid-template-columns:1fr;gap:0}dl.facts dd{margin-bottom:.5rem}}
@media print{section{break-inside:avoid}}
"""


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _scheme(colours: Mapping[str, Any]) -> str:
    named = [f"--{name}:{value}" for name, value in colours.items() if name != "m"]
    return ";".join(named + [f"--m{i}:{value}" for i, value in enumerate(colours["m"])])


def title_of(extras: Mapping[str, Any], records: Sequence[EvalRecord]) -> str:
    """The title given, or one made of the task that most records are of."""
    if extras.get("title"):
        return str(extras["title"])
    tasks = [record.task for record in records]
    return f"Leaderboard: {max(dict.fromkeys(tasks), key=tasks.count)}"


def _description(extras: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> str:
    if extras.get("description"):
        return str(extras["description"])
    tasks = len({task for row in rows for task in row["per_task"]})
    if any(row["method"] in _MEANING and row["kind"] == "merged" for row in rows):
        return (
            "Each robot of a fleet learns from its own demonstrations, which never leave it, and the robots' policies "
            f"are merged into one. The merged policy is tried here on {tasks} tasks, beside robots that learn alone "
            "and a policy trained on everybody's data."
        )
    return f"{len(rows)} methods, each tried on the same {tasks} tasks. Success is the share of episodes that succeed."


def _film(extras: Mapping[str, Any], folder: Path, title: str) -> str:
    named = [extras["film"]] if extras.get("film") else []
    found = [name for name in dict.fromkeys([*map(str, named), "film.mp4", "film.gif"]) if (folder / name).is_file()]
    if not found:
        return ""
    # Rather a small picture on the page than a large film beside it.
    name = next((name for name in found if (folder / name).stat().st_size <= FILM_LIMIT), found[0])
    path = folder / name
    alt = _text(extras.get("film_alt") or f"Film: {title}")
    caption = _text(extras.get("film_caption") or "One merged policy, doing several of the tasks.")
    if path.stat().st_size > FILM_LIMIT:
        link = _text(quote(Path(name).as_posix()))
        size = plots.human_bytes(path.stat().st_size)
        return f'<p class="film"><a href="{link}">The film, in a file of its own</a> ({size}). {caption}</p>'
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    if path.suffix.lower() == ".gif":
        media = f'<img src="data:image/gif;base64,{data}" alt="{alt}">'
    else:
        kind = {".webm": "video/webm"}.get(path.suffix.lower(), "video/mp4")
        source = f'src="data:{kind};base64,{data}"'
        media = f'<video controls autoplay loop muted playsinline aria-label="{alt}" {source}></video>'
    return f'<figure class="film">{media}<figcaption>{caption}</figcaption></figure>'


def _tiles(rows: Sequence[Mapping[str, Any]]) -> str:
    best = next((row for row in rows if row["best_merged"]), None)
    if best is None:
        return ""
    tiles = [
        (
            f"{best['label']}, success over all tasks",
            f"{best['success']:.0%}",
            f"{best['low']:.0%} to {best['high']:.0%}",
        )
    ]
    if best["share_of_joint"] is not None:
        tiles.append(("Of what joint training on everybody's data reaches", f"{best['share_of_joint']:.0%}", ""))
    naive = next((row for row in rows if row["method"] == "average_rounds" and row is not best), None)
    if naive:
        tiles.append((f"{naive['label']}", f"{naive['success']:.0%}", f"{naive['low']:.0%} to {naive['high']:.0%}"))
    if best["bytes_sent"] is not None:
        tiles.append(("Sent by each robot, in total", plots.human_bytes(best["bytes_sent"]), ""))
    items = [
        f'<div class="tile"><dt>{_text(name)}</dt><dd>{_text(value)}{f" <small>{_text(more)}</small>" if more else ""}'
        "</dd></div>"
        for name, value, more in tiles
    ]
    return f'<dl class="tiles">{"".join(items)}</dl>'


def _dot(row: Mapping[str, Any]) -> str:
    return f'<i class="dot" style="background:{plots.colour(row)}"></i>'


def _rate(row: Mapping[str, Any]) -> str:
    low, high = 100 * row["low"], 100 * row["high"]
    return (
        f'<div class="rate"><b>{row["success"]:.2f}</b><span class="bar" aria-hidden="true">'
        f'<i style="width:{100 * row["success"]:.2f}%;background:{plots.colour(row)}"></i>'
        f'<u style="left:{low:.2f}%;width:{high - low:.2f}%"></u></span></div>'
        f"<small>[{row['low']:.2f}, {row['high']:.2f}]</small>"
    )


def _board(rows: Sequence[Mapping[str, Any]]) -> str:
    all_tasks = {task for row in rows for task in row["per_task"]}
    heads = ("Method", "Success", "Worst task", "Of joint", "Sent by each robot", "CPU time", "Seeds")
    body = []
    for row in rows:
        badge = ' <span class="badge">best merged</span>' if row["best_merged"] else ""
        rates = row["success_by_seed"].values()
        spread = f" <small>{min(rates):.2f} to {max(rates):.2f}</small>" if row["seeds"] > 1 else ""
        notes = [row["note"]] if row["note"] else []
        if len(row["per_task"]) < len(all_tasks):
            notes.append(f"measured on {len(row['per_task'])} of {len(all_tasks)} tasks")
        small = f"<small>{_text('; '.join(notes))}</small>" if notes else ""
        share = "–" if row["share_of_joint"] is None else f"{row['share_of_joint']:.0%}"
        cells = [
            ("rate-cell", heads[1], _rate(row)),
            (
                "num pair",
                heads[2],
                f"<span>{row['worst_task']:.2f} <small>{_text(row['worst_task_name'])}</small></span>",
            ),
            ("num", heads[3], share),
            ("num", heads[4], _text(plots.human_bytes(row["bytes_sent"]))),
            ("num", heads[5], _text(human_seconds(row["cpu_seconds"]))),
            ("num pair", heads[6], f"<span>{_text(runs(row))}{spread}</span>"),
        ]
        tds = "".join(f'<td role="cell" class="{kind}" data-name="{name}">{cell}</td>' for kind, name, cell in cells)
        head = (
            f'<th role="rowheader" scope="row"><span class="name">{_dot(row)}<span>{_text(row["label"])}{badge}{small}'
        )
        head += "</span></span></th>"
        body.append(f'<tr role="row"{" class=best" if row["best_merged"] else ""}>{head}{tds}</tr>')
    names = "".join(f'<th role="columnheader" scope="col">{name}</th>' for name in heads)
    # The roles are said aloud because a phone shows the rows as cards, which takes a table's own roles away.
    return (
        '<table class="board" role="table"><caption class="hidden">Methods and what they reach</caption>'
        f'<thead role="rowgroup"><tr role="row">{names}</tr></thead>'
        f'<tbody role="rowgroup">{"".join(body)}</tbody></table>'
    )


def _heat_map(rows: Sequence[Mapping[str, Any]]) -> str:
    whole = max(rows, key=lambda row: len(row["per_task"]))
    tasks = dict.fromkeys([*whole["per_task"], *(task for row in rows for task in row["per_task"])])
    many = len(tasks) > ANNOTATED
    # A line may break at the hyphens of a name, not within its words.
    heads = "".join(f'<th scope="col"><span>{_text(task)}</span></th>' for task in tasks)
    body = []
    for row in rows:
        cells = []
        for task in tasks:
            if task not in row["per_task"]:
                cells.append('<td class="none"><span class="hidden">not measured</span></td>')
                continue
            one = row["per_task"][task]
            rate = one["success"]
            tip = f"{row['label']}, {task}: {one['successes']} of {one['episodes']}"
            number = f'<span class="hidden">{rate:.2f}</span>' if many else f"{rate:.2f}"
            high = ' class="hi"' if rate > 0.55 else ""
            cells.append(f'<td{high} style="--v:{rate:.3f}" title="{_text(tip)}">{number}</td>')
        body.append(f'<tr><th scope="row">{_text(row["label"])}</th>{"".join(cells)}</tr>')
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="Success by method and task">'
        f'<table class="heat{" many" if many else ""}"><caption class="hidden">Success by method and task</caption>'
        f"<thead><tr><td class=none></td>{heads}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
        '<div class="scale" aria-hidden="true">0%<i></i>100%</div>'
    )


def _unique(values: Iterable[Any]) -> str:
    return ", ".join(dict.fromkeys(str(value) for value in values if value not in (None, "")))


def _facts(records: Sequence[EvalRecord], extras: Mapping[str, Any]) -> str:
    sources = [record.provenance for record in records]
    commits = [
        f"{str(one['commit'])[:12]}{' with local changes' if one.get('dirty') else ''}"
        for one in sources
        if one.get("commit")
    ]
    versions: dict[str, dict[str, None]] = {}
    for one in sources:
        for name, version in (one.get("versions") or {}).items():
            versions.setdefault(str(name), {})[str(version)] = None
    days = sorted({str(one["date"])[:10] for one in sources if one.get("date")})
    seeds = sorted({record.metrics["seed"] for record in records if record.metrics.get("seed") is not None})
    facts = [
        ("Measured", " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""),
        ("Commit", _unique(commits)),
        ("Versions", ", ".join(f"{name} {' / '.join(versions[name])}" for name in sorted(versions))),
        ("Python", _unique(one.get("python") for one in sources)),
        ("System", _unique(one.get("platform") for one in sources)),
        ("Hardware", extras.get("hardware") or _unique(one.get("device") for one in sources)),
        ("Training seeds", ", ".join(f"{seed:g}" for seed in seeds)),
        ("Records", f"{len(records)} files, {sum(len(record.seeds) for record in records):,} episodes"),
    ]
    items = [f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts if value]
    return f'<dl class="facts">{"".join(items)}</dl>'


def _command(records: Sequence[EvalRecord], extras: Mapping[str, Any]) -> str:
    if extras.get("command"):
        return str(extras["command"])
    commands = [record.provenance.get("command") for record in records]
    lines = [shlex.join(map(str, command)) for command in commands if isinstance(command, (list, tuple)) and command]
    return "\n".join(dict.fromkeys(lines))


def _barriers(data: Mapping[str, Any] | None) -> str:
    """One sentence on the barriers of an interpolation; nothing where they are not known."""
    parts = [
        f"{one['success_barrier']:.2f} {one['name']}"
        for one in (data or {}).get("series", ())
        if one.get("success_barrier") is not None
    ]
    return f" Success falls below the line between its ends by at most {', '.join(parts)}." if parts else ""


def plot_section(title: str, words: str, svg: str | None) -> str:
    """A section with a plot and the words above it; nothing without a plot."""
    if not svg:
        return ""
    return (
        f'<section><h2>{_text(title)}</h2><p class="quiet">{_text(words)}</p>'
        f'<div class="wide" tabindex="0" role="region" aria-label="{_text(title)}, plot">{svg}</div></section>'
    )


def picture_section(title: str, path: Path) -> str:
    """A section with a picture, put into the page itself.

    Args:
        title: What it shows.
        path: A .png file.
    """
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    # Pictures are drawn on white.
    return (
        f'<section><h2>{_text(title)}, in pictures</h2><div class="wide" tabindex="0" role="region" '
        f'aria-label="{_text(title)}, picture"><img src="data:image/png;base64,{data}" alt="{_text(title)}" '
        'style="max-width:100%;background:#fff"></div></section>'
    )


def film_section(title: str, words: str, folder: Path) -> str:
    """A section with the film of a folder, ``film.mp4`` or ``film.gif``; nothing where there is none."""
    figure = _film({"film_alt": title, "film_caption": words}, folder, title)
    return f"<section><h2>{_text(title)}</h2>{figure}</section>" if figure else ""


def header(title: str) -> str:
    """The top of a page that has a title only."""
    return f'<header class="top"><div><h1>{_text(title)}</h1></div></header>'


def table_section(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A section with a plain table of texts; the first of each line heads it."""
    top = "".join(f'<th scope="col">{_text(head)}</th>' for head in heads)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>{"".join(f"<td>{_text(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in lines
    )
    return (
        f'<section><h2>{_text(title)}</h2><div class="wide" tabindex="0" role="region" aria-label="{_text(title)}">'
        f'<table class="plain"><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div></section>'
    )


def command_section(command: str) -> str:
    """A section with the command that makes the results; nothing without one."""
    return f"<section><h2>Reproduce</h2><pre><code>{_text(command)}</code></pre></section>" if command else ""


def page(
    rows: Sequence[Mapping[str, Any]], records: Sequence[EvalRecord], extras: Mapping[str, Any], folder: Path
) -> str:
    """Makes the page.

    Args:
        rows: What ``leaderboard.build`` gave.
        records: What it was given.
        extras: What ``leaderboard.read_extras`` gave.
        folder: Where the film lies.

    Returns:
        HTML. It loads nothing; its policy forbids the browser to.
    """
    title = title_of(extras, records)
    film = _film(extras, folder, title)
    drawn = [
        plot_section(
            "Success by round",
            "Line: mean over training seeds. Band: from the worst seed to the best. Dashed: methods without rounds, "
            "at the end of their training.",
            plots.learning_curve(rows, extras.get("reference_lines") or ()),
        ),
        plot_section(
            "Success for what was sent",
            "Marker: the final policy, with its 95% interval. Line: on the way there, with a band from the worst seed "
            "to the best. The scale of bytes is logarithmic.",
            plots.communication(rows),
        ),
    ]
    path = plots.interpolation(extras["interpolation"]) if extras.get("interpolation") else None
    drawn.append(
        plot_section(
            "Between two robots",
            "Policies on the straight line between two robots' weights. Alignment renumbers the hidden units of one "
            "robot, which changes nothing that it does, so that its units stand where the other's do."
            f"{_barriers(extras.get('interpolation'))}",
            path,
        )
    )
    drawn = [part for part in drawn if part]
    if len(drawn) % 2:  # the odd one has the width of two
        drawn[-1] = drawn[-1].replace("<section>", '<section class="full">', 1)
    command = _command(records, extras)
    meanings = "".join(
        f"<li>{_dot(row)}<span><b>{_text(row['label'])}.</b> {_text(_MEANING[row['method']])}</span></li>"
        for row in rows
        if row["method"] in _MEANING
    )
    meanings = f'<ul class="methods">{meanings}</ul>' if meanings else ""
    words = (
        f"{summary(rows)} Success is the share of all episodes that reach their goal, in brackets with Wilson's 95% "
        "interval (the thin line on the bar). The interval speaks of the episodes drawn, not of another training; for "
        "that, the column of seeds has the worst and the best."
    )
    if any(row["seeds"] == 1 for row in rows):
        words += ' A method marked "1 run" was trained once: luck is not ruled out.'
    parts = [
        f'<header class="top{" filmed" if film else ""}"><div><h1>{_text(title)}</h1>'
        f'<p class="lead">{_text(_description(extras, rows))}</p>{_tiles(rows)}</div>{film}</header>',
        f'<section><h2>Leaderboard</h2><p class="quiet">{_text(words)}</p>{_board(rows)}</section>',
        f'<div class="plots">{"".join(drawn)}</div>' if drawn else "",
        '<section><h2>Task by task</h2><p class="quiet">Share of successful episodes of each method on each task.</p>'
        f"{_heat_map(rows)}</section>",
        f"<section><h2>What the methods are</h2>{meanings}</section>" if meanings else "",
        command_section(command),
        f"<section><h2>Provenance</h2>{_facts(records, extras)}</section>",
    ]
    return document(title, parts)


def document(title: str, parts: Sequence[str]) -> str:
    """A whole page of its parts, with the styles and colours of all our pages.

    Args:
        title: Plain text.
        parts: HTML; empty ones are left out.

    Returns:
        HTML. It loads nothing; its policy forbids the browser to.
    """
    body = "\n".join(part for part in parts if part)
    style = f":root{{color-scheme:light dark;{_scheme(_LIGHT)}}}\n"
    style += f"@media(prefers-color-scheme:dark){{:root{{{_scheme(_DARK)}}}}}{_CSS}"
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n<title>{_text(title)}</title>\n'
        f"<style>{style}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )
