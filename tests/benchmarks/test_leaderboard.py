import base64
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from fleetgym.benchmarks import leaderboard, page, plots
from fleetgym.core.errors import UserError
from fleetgym.core.files import write_json
from fleetgym.core.records import EvalRecord, wilson_interval

TASKS = ("reach-v3", "drawer-open-v3", "button-press-v3", "window-close-v3", "door-open-v3")
LEVELS = {
    "alone_all": 0.2,
    "alone_own": 0.93,
    "average_rounds": 0.62,
    "fleet_merge_once": 0.05,
    "fleet_merge_rounds": 0.87,
    "joint": 0.88,
}
PROVENANCE = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "dirty": False,
    "versions": {"fleetgym": "0.1.0", "torch": "2.13.0", "mujoco": "3.3.0"},
    "python": "3.11.7",
    "platform": "Linux x86_64",
    "device": "cpu, 2 cores",
    "command": ["fleetgym", "bench", "fleet_merge", "--preset", "quick"],
    "date": "2026-11-02T10:00:00+00:00",
}


def sample(method, seed=0, tasks=TASKS, episodes=20, curve=True, **metrics):
    """A record with the statistics of a real one: some tasks are harder, and curves rise to where they end."""
    rng = np.random.default_rng([seed, sorted(LEVELS).index(method) if method in LEVELS else 9])
    level = LEVELS.get(method, 0.5)
    odds = np.clip(level + 0.25 * rng.uniform(-1, 1, len(tasks)) * min(1, 4 * level * (1.1 - level)), 0, 1)
    names = [task for task in tasks for _ in range(episodes)]
    success = [bool(rng.random() < odds[tasks.index(task)]) for task in names]
    rounds = method.endswith("_rounds")
    final = sum(success) / len(success)
    points = [
        {
            "round": r,
            "gradient_steps": 20 + 20 * r,
            "bytes_sent": 170_000 * (r + 1),
            "success": round(final * (1 - math.exp(-r / 15)) * (1 + 0.05 * float(rng.normal())), 3),
            "episodes": 25,
        }
        for r in (0, 12, 24, 36, 48, 60)
    ]
    values = {
        "seed": seed,
        "bytes_sent": 10_370_000 if rounds else {"fleet_merge_once": 170_000, "joint": 1_340_000}.get(method, 0),
        "cpu_seconds": 150.0 + 10 * seed + 40 * rounds,
        "gradient_steps": 1220,
        **({"curve": points} if curve and rounds else {}),
        **metrics,
    }
    n = len(names)
    return EvalRecord(
        method, "meta_world/quick", range(n), success, [1.0] * n, [90] * n, values, {**PROVENANCE}, tasks=names
    )


def interpolation():
    x = np.linspace(0, 1, 11)
    hill = 4 * x * (1 - x)
    ends = {0: 0.5, 5: None, 10: 0.5}
    return {
        "lambda": x.tolist(),
        "series": [
            {
                "name": "before alignment",
                "loss": (0.12 + 0.55 * hill).tolist(),
                "success": [{**ends, 5: 0.0}.get(i) for i in range(11)],
            },
            {
                "name": "after alignment",
                "loss": (0.12 + 0.16 * hill).tolist(),
                "success": [{**ends, 5: 0.3}.get(i) for i in range(11)],
            },
        ],
        "robots": ["reach-v3", "drawer-open-v3"],
    }


def fill(folder, methods=tuple(LEVELS), seeds=(0, 1, 2), extras=None, **fields):
    for method in methods:
        for seed in seeds:
            sample(method, seed, **fields).save(folder / "records" / f"{method}-seed{seed}.json")
    if extras:
        write_json(folder / "extras.json", extras)
    return folder


def full_extras(**more):
    return {
        "title": "Fleet merging on Meta-World: quick",
        "description": "Five robots each learned one task from their own 20 demonstrations, which they never shared. "
        "Their policies were merged into one, which is tried here on all five tasks, with goals it never saw.",
        "command": "fleetgym bench fleet_merge --preset quick --seeds 0 1 2",
        "interpolation": interpolation(),
        **more,
    }


class Page(HTMLParser):
    """Collects what a browser would fetch, the ids, and whether every tag is closed."""

    void = {"meta", "img", "br", "link", "input", "hr", "source"}

    def __init__(self, text):
        super().__init__()
        self.fetched, self.ids, self.open, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes, closed=False):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        names = ["src", "poster", "data", "srcset"] + ["href"] * (tag not in ("a", "use"))
        self.fetched += [attributes[name] for name in names if attributes.get(name)]
        if tag not in self.void and not closed:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes, closed=True)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, (tag, self.open[-3:])
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)


def read_page(folder):
    return (folder / "leaderboard.html").read_text(encoding="utf-8")


def test_rows(tmp_path):
    rows = leaderboard.build(fill(tmp_path))
    assert [row["method"] for row in rows] == list(leaderboard.LABELS)
    named = {row["method"]: row for row in rows}
    merged = named["fleet_merge_rounds"]
    records = [EvalRecord.load(tmp_path / "records" / f"fleet_merge_rounds-seed{seed}.json") for seed in range(3)]
    k = sum(sum(record.successes) for record in records)
    assert merged["episodes"] == 300 and merged["success"] == k / 300
    assert (merged["low"], merged["high"]) == wilson_interval(k, 300)
    assert merged["success_by_seed"] == {str(seed): record.success for seed, record in enumerate(records)}
    worst = merged["worst_task_name"]
    by_task = {task: sum(record.per_task()[task][0] for record in records) / 60 for task in TASKS}
    assert merged["worst_task"] == by_task[worst] == min(by_task.values())
    assert {task: one["success"] for task, one in merged["per_task"].items()} == by_task
    assert list(merged["per_task"]) == list(TASKS)
    assert merged["seeds"] == 3 and merged["cpu_seconds"] == pytest.approx(200) and merged["bytes_sent"] == 10_370_000
    assert merged["share_of_joint"] == merged["success"] / named["joint"]["success"]
    assert [row["method"] for row in rows if row["best_merged"]] == ["fleet_merge_rounds"]
    assert named["alone_own"]["success"] > merged["success"], "a reference outranks it and is still not the best merged"
    assert [point["round"] for point in merged["curve"]] == [0, 12, 24, 36, 48, 60]
    last = [record.metrics["curve"][-1]["success"] for record in records]
    assert merged["curve"][-1]["success"] == pytest.approx(np.mean(last))
    assert (merged["curve"][-1]["low"], merged["curve"][-1]["high"]) == (min(last), max(last))


def test_order_and_foreign_methods(tmp_path):
    fill(tmp_path, ("joint", "average_rounds", "mine", "fleet_merge_rounds"), (0,))
    assert [row["method"] for row in leaderboard.build(tmp_path, order=("mine", "absent", "joint"))] == [
        "mine",
        "joint",
        "average_rounds",
        "fleet_merge_rounds",
    ]
    assert len({row["slot"] for row in leaderboard.build(tmp_path)}) == 4


def test_many_foreign_methods_have_colours(tmp_path):
    for i in range(20):
        sample(f"other{i:02d}").save(tmp_path / "records" / f"{i}.json")
    rows = leaderboard.build(tmp_path)
    assert all(6 <= row["slot"] < plots.SLOTS for row in rows)
    leaderboard.write(tmp_path)


def test_a_record_for_each_task_is_pooled(tmp_path):
    for task, successes in (("reach-v3", [1, 1]), ("push-v3", [0, 1])):
        record = EvalRecord("joint", task, (0, 1), successes, (0, 0), (5, 5), {"seed": 0, "bytes_sent": 8})
        record.save(tmp_path / "records" / f"{task}.json")
    (row,) = leaderboard.build(tmp_path)
    assert row["success"] == 0.75 and row["worst_task_name"] == "push-v3" and row["worst_task"] == 0.5
    assert row["seeds"] == 1 and row["bytes_sent"] == 8 and row["cpu_seconds"] is None


def test_written_files(tmp_path):
    fill(tmp_path, extras=full_extras(hardware="2 cores of a server"))
    assert leaderboard.write(tmp_path) == tmp_path / "leaderboard.html"
    rows = json.loads((tmp_path / "leaderboard.json").read_text())
    assert rows == leaderboard.build(tmp_path)
    needed = {"method", "success", "low", "high", "worst_task", "bytes_sent", "cpu_seconds", "seeds"}
    assert all(needed <= row.keys() for row in rows)
    text = (tmp_path / "leaderboard.md").read_text()
    row = next(row for row in rows if row["best_merged"])
    assert f"**{row['success']:.2f} [{row['low']:.2f}, {row['high']:.2f}]**" in text
    assert "10.4 MB" in text and "fleetgym bench fleet_merge --preset quick" in text and "1 run" not in text
    page = Page(read_page(tmp_path))
    assert page.fetched == []
    assert len(page.ids) == len(set(page.ids))
    assert [attributes["class"] for tag, attributes in page.tags if tag == "svg"] == ["curve", "sent", "interpolation"]
    assert all(attributes["aria-label"] for tag, attributes in page.tags if tag == "svg")
    words = " ".join(page.words)
    for part in ("Five robots each learned", "2 cores of a server", "0123456789ab", "torch 2.13.0", "best merged"):
        assert part in words
    assert "#0d0e" not in read_page(tmp_path), "a colour that stands for a variable was left"


def test_references_inside_the_drawings_resolve(tmp_path):
    leaderboard.write(fill(tmp_path, extras=full_extras()))
    text = read_page(tmp_path)
    used = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert used and used <= set(Page(text).ids)
    variables = set(re.findall(r"var\(--([\w-]+)\)", text)) - {"v"}
    light, dark = (text[text.index(start) :].partition("}")[0] for start in (":root{", ":root{--"))
    assert all(f"--{name}:" in light and f"--{name}:" in dark for name in variables)


def test_same_records_same_bytes(tmp_path):
    import matplotlib

    fill(tmp_path / "a", extras=full_extras())
    fill(tmp_path / "b", extras=full_extras())
    leaderboard.write(tmp_path / "a")
    before = dict(matplotlib.rcParams)
    matplotlib.rcParams["font.size"] = 30  # a user's own settings change nothing
    try:
        leaderboard.write(tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 30
    finally:
        matplotlib.rcParams["font.size"] = before["font.size"]
    for name in ("leaderboard.json", "leaderboard.md", "leaderboard.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    "methods", [("joint",), ("alone_all",), ("fleet_merge_rounds",), ("mine",), ("average_rounds", "joint")]
)
@pytest.mark.parametrize("curve", [True, False])
def test_some_methods_one_seed(tmp_path, methods, curve):
    leaderboard.write(fill(tmp_path, methods, (4,), curve=curve))
    page = Page(read_page(tmp_path))
    assert page.fetched == []
    curves = [attributes for tag, attributes in page.tags if tag == "svg" and attributes["class"] == "curve"]
    assert bool(curves) == (curve and any(method.endswith("_rounds") for method in methods))
    assert "1 run" in (tmp_path / "leaderboard.md").read_text()
    (row, *_) = json.loads((tmp_path / "leaderboard.json").read_text())
    assert row["seeds"] == 1 and row["success_by_seed"].keys() == {"4"}


def test_fifty_tasks_have_no_numbers_in_the_map(tmp_path):
    tasks = tuple(f"task-number-{i}-v3" for i in range(50))
    leaderboard.write(fill(tmp_path, seeds=(0,), tasks=tasks, episodes=4))
    assert 'class="heat many"' in read_page(tmp_path)
    leaderboard.write(fill(tmp_path / "few", seeds=(0,), tasks=tasks[:15]))
    assert 'class="heat"' in read_page(tmp_path / "few")


def test_text_is_escaped(tmp_path):
    evil = '<script>alert("x")</script> & $\\frac{1}{2}$ | pipe'
    extras = full_extras(title=evil, description=evil, command=evil, hardware=evil, film="absent.mp4")
    extras["interpolation"]["robots"] = [evil, evil]
    extras["interpolation"]["series"][0]["name"] = evil
    extras["reference_lines"] = [{"label": evil, "success": 0.5}]
    fill(tmp_path, extras=extras)
    tasks = (evil, "reach-v3")
    record = sample("average_rounds", 9, tasks, label=evil, note=evil)
    record.save(tmp_path / "records" / "average_rounds-seed0.json")
    leaderboard.write(tmp_path)
    page = Page(read_page(tmp_path))
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert page.fetched == []
    header, rule, *lines = [line for line in (tmp_path / "leaderboard.md").read_text().splitlines() if line[:1] == "|"]
    assert len(lines) == 6 and all(len(re.findall(r"(?<!\\)\|", line)) == header.count("|") for line in lines)


def test_film_small_large_and_gif(tmp_path):
    fill(tmp_path, ("joint",), (0,))
    (tmp_path / "film.mp4").write_bytes(b"film" * 100)
    leaderboard.write(tmp_path)
    data = base64.b64encode(b"film" * 100).decode()
    assert f"data:video/mp4;base64,{data}" in read_page(tmp_path)
    (tmp_path / "film.mp4").write_bytes(bytes(page.FILM_LIMIT + 1))
    leaderboard.write(tmp_path)
    assert '<a href="film.mp4">' in read_page(tmp_path) and "<video" not in read_page(tmp_path)
    (tmp_path / "film.gif").write_bytes(b"GIF89a")
    leaderboard.write(tmp_path)
    assert '<img src="data:image/gif;base64,' in read_page(tmp_path)


def test_interpolation_needs_matching_lengths(tmp_path):
    extras = full_extras()
    extras["interpolation"]["series"][1]["loss"].pop()
    fill(tmp_path, ("joint",), (0,), extras=extras)
    with pytest.raises(UserError, match=r"11 values of lambda.*'after alignment' has 10 values of loss"):
        leaderboard.write(tmp_path)
    assert not (tmp_path / "leaderboard.json").exists()


@pytest.mark.parametrize(
    "extras, words",
    [
        ([1], "object"),
        ({"interpolation": {"series": []}}, "lambda"),
        ({"reference_lines": [{"label": "x"}]}, "success"),
    ],
)
def test_extras_that_cannot_be_shown(tmp_path, extras, words):
    fill(tmp_path, ("joint",), (0,), extras=extras)
    with pytest.raises(UserError, match=words) as caught:
        leaderboard.write(tmp_path)
    assert "extras.json" in str(caught.value)


def test_no_records_and_foreign_files(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=re.escape(str(folder))):
            leaderboard.build(folder)
    write_json(tmp_path / "records" / "other.json", {"loss": 1})
    with pytest.raises(UserError, match=r"other\.json is not an evaluation record"):
        leaderboard.build(tmp_path)


def test_records_that_would_count_twice_or_do_not_belong_together(tmp_path):
    fill(tmp_path, ("joint",), (0,))
    sample("joint", 0).save(tmp_path / "records" / "again.json")
    with pytest.raises(UserError, match=r"again\.json and joint-seed0\.json.*count twice"):
        leaderboard.build(tmp_path)
    (tmp_path / "records" / "again.json").unlink()
    other = sample("average_rounds")
    EvalRecord(**{**other.__dict__, "task": "meta_world/mt10"}).save(tmp_path / "records" / "other.json")
    with pytest.raises(UserError, match="mixes benchmarks"):
        leaderboard.build(tmp_path)


@pytest.mark.parametrize("metrics", [{"bytes_sent": "many"}, {"cpu_seconds": -1}, {"curve": [{"round": 1}]}])
def test_metrics_of_the_wrong_kind(tmp_path, metrics):
    sample("average_rounds", **{"curve": False}).save(tmp_path / "records" / "a.json")
    values = json.loads((tmp_path / "records" / "a.json").read_text())
    values["metrics"].update(metrics)
    write_json(tmp_path / "records" / "a.json", values)
    with pytest.raises(UserError, match=next(iter(metrics))):
        leaderboard.build(tmp_path)


def test_readme(tmp_path):
    folder = fill(tmp_path / "fleet_merge" / "quick")
    readme = tmp_path / "README.md"
    before, after = "# Title\r\n\r\n", "\r\n\r\nrest <!-- leaderboard:other/x -->\r\nkept\r\n<!-- /leaderboard -->\r\n"
    text = f"{before}<!-- leaderboard:fleet_merge/quick -->\r\nold\r\n<!-- /leaderboard -->{after}"
    readme.write_bytes(text.encode())
    leaderboard.update_readme(readme, folder)
    once = readme.read_bytes().decode()
    assert once.startswith(before) and once.endswith(after) and "old" not in once and "| Method |" in once
    assert "\n" not in once.replace("\r\n", "")
    leaderboard.update_readme(readme, folder, "fleet_merge/quick")
    assert readme.read_bytes().decode() == once
    with pytest.raises(UserError, match="leaderboard:fleet_merge/mt10"):
        leaderboard.update_readme(readme, folder, "fleet_merge/mt10")
    with pytest.raises(UserError, match="absent.md does not exist"):
        leaderboard.update_readme(tmp_path / "absent.md", folder)
    readme.write_text("<!-- leaderboard:fleet_merge/quick -->\n<!-- leaderboard:b -->\nkept\n<!-- /leaderboard -->")
    with pytest.raises(UserError, match="lacks the lines"):
        leaderboard.update_readme(readme, folder)
    assert "kept" in readme.read_text()


@pytest.mark.parametrize(
    "count, text", [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (10_370_000, "10.4 MB"), (2.5e9, "2.5 GB"), (None, "–")]
)
def test_human_bytes(count, text):
    assert plots.human_bytes(count) == text


@pytest.mark.parametrize(
    "seconds, text", [(0.25, "0.2 s"), (38, "38 s"), (720, "12 min"), (5040, "84 min"), (7200, "2.0 h")]
)
def test_human_seconds(seconds, text):
    assert leaderboard.human_seconds(seconds) == text


def test_curves_of_seeds_meet_at_the_rounds_they_share(tmp_path):
    for seed, rounds in enumerate(((0, 1, 2), (0, 2, 4))):
        curve = [{"round": r, "success": 0.1 * r + 0.2 * seed} for r in rounds]
        sample("average_rounds", seed, curve=False).save(tmp_path / "records" / f"{seed}.json")
        values = json.loads((tmp_path / "records" / f"{seed}.json").read_text())
        values["metrics"]["curve"] = curve
        write_json(tmp_path / "records" / f"{seed}.json", values)
    (row,) = leaderboard.build(tmp_path)
    assert [point["round"] for point in row["curve"]] == [0, 2]
    assert row["curve"][1] == {
        "round": 2,
        "success": pytest.approx(0.3),
        "low": pytest.approx(0.2),
        "high": pytest.approx(0.4),
    }


@pytest.mark.parametrize("count", [1, 6, 40])
def test_labels_beside_a_plot_keep_apart_and_inside(count):
    places = plots._spread([0.5] * count, 0.05, 0.0, 1.0)
    assert all(-1e-9 <= place <= 1 + 1e-9 for place in places)
    gaps = np.diff(sorted(places))
    assert np.all(gaps >= min(0.05, 1 / max(1, count - 1)) - 1e-9)
