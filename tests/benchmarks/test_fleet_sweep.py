"""Sweeps of the fleet-merging benchmark: the combinations, what is trained once, the table, and going on."""

import json

import pytest

from fleetgym.benchmarks import fleet_merge, fleet_sweep
from fleetgym.benchmarks.fleet_sweep import combinations
from fleetgym.core import UserError

TINY = (
    "tasks=reach-v3,door-close-v3 robots_per_task=1 demonstrations=2 hidden=8 warmup=2 steps=6 episodes=1"
    " max_steps=10 curve_points=1 curve_episodes=1 line_points=2"
).split()


def test_combinations():
    methods = ("alone_own", "average_rounds", "joint")
    points = combinations("quick", ["hidden=8"], ["local_steps=1,5", "steps=120,220", "cell=gru,mlp"], methods)
    assert len(points) == 8
    assert points[1].values == {"local_steps": "1", "steps": "120", "cell": "mlp"}
    assert points[1].folder == "local_steps=1,steps=120,cell=mlp"
    assert [(point.preset.steps, point.preset.rounds) for point in points[::2]] == [
        (120, 100), (220, 200), (120, 20), (220, 40),
    ]  # fmt: skip
    # What has no rounds is trained for the first of those that have as many steps.
    assert [point.methods for point in points] == [methods] * 4 + [("average_rounds",)] * 4
    assert len(combinations("quick", [], ["local_steps=1,5", "steps=120"], ("joint",))) == 1


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        (["local_steps"], "FIELD=VALUE,VALUE is wanted"),
        (["local_steps=1,,2"], "FIELD=VALUE,VALUE is wanted"),
        (["local_steps=1,1"], "a value is given twice"),
        (["hidden=8,16"], "hidden is given twice"),
        (["local_step=1,2"], "unknown preset field 'local_step'; nearest: 'local_steps'"),
        (["local_steps=1,x"], "local_steps takes a int"),
        (["tasks_per_robot=1,6"], "there are 5 tasks"),
        (["optimizer=robot,server"], "use local_steps=1"),
    ],
)
def test_bad_axes(axes, words, tmp_path):
    with pytest.raises(UserError, match=words):
        fleet_merge.main(["--out", str(tmp_path / "out"), "--override", "hidden=4", "--sweep", *axes])
    assert not (tmp_path / "out").exists()


def test_a_sweep_from_the_command_line_and_again(tmp_path, capsys, monkeypatch):
    words = ["--out", str(tmp_path), "--workers", "1", "--methods", "average_rounds", "joint"]
    words += ["--override", *TINY, "--sweep", "local_steps=1,4"]
    real, calls = fleet_sweep.run, []

    def stop(*arguments, **options):
        if calls:
            raise KeyboardInterrupt
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(fleet_sweep, "run", stop)
    with pytest.raises(KeyboardInterrupt):
        fleet_merge.main(words)
    assert not (tmp_path / "sweep.json").exists()
    monkeypatch.undo()
    with pytest.raises(UserError, match="--resume"):
        fleet_merge.main(words)
    kept = tmp_path / "local_steps=1" / "records" / "joint-seed0.json"
    before = kept.stat().st_mtime_ns
    assert fleet_merge.main([*words, "--resume"]) == 0
    assert kept.stat().st_mtime_ns == before
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["method"], row["values"]["local_steps"]) for row in rows] == [
        ("average_rounds", "1"), ("joint", "1"), ("average_rounds", "4"),
    ]  # fmt: skip
    assert all(row["gradient_steps"] == 6 for row in rows)
    # Four rounds after the first, or one.
    statistics = 8 * (2 * (39 + 2 + 9) + 1)
    often, seldom = (row["bytes_sent"] - statistics for row in rows[::2])
    assert often == 5 / 2 * seldom
    text = (tmp_path / "sweep.md").read_text()
    assert text in capsys.readouterr().out and "--sweep local_steps=1,4" in text
    assert "| Joint training on everybody's data | – | 6 |" in text
    page = (tmp_path / "sweep.html").read_text()
    assert 'class="swept"' in page and "#0d0e" not in page and "local_steps" in page
    demonstrations = [tmp_path / f"local_steps={n}" / "training" / "seed0" / "demonstrations" for n in (1, 4)]
    assert demonstrations[0].resolve() == demonstrations[1].resolve()
    with pytest.raises(UserError, match="another config"):
        fleet_merge.main([*words[:-1], "local_steps=1,2", "--resume"])


def test_the_plot_joins_equal_steps():
    def row(method, local_steps, steps, cell, success, sent, slot):
        values = {"local_steps": str(local_steps), "cell": cell}
        bounds = {"low": success - 0.1, "high": success + 0.1}
        return {"method": method, "label": method, "slot": slot, "values": values, "gradient_steps": steps,
                "success": success, "bytes_sent": sent, **bounds}  # fmt: skip

    found = [row("average_rounds", n, 100, cell, 0.5, 1e6 / n, 2) for cell in ("gru", "mlp") for n in (1, 5, 20)]
    found.append(row("joint", 1, 100, "gru", 0.9, 1e5, 5))
    svg = fleet_sweep.plot(found)
    label = svg.partition('aria-label="')[2].partition('"')[0]
    assert "cell=gru: average_rounds, 5: 200 kB, 50%" in label and "cell=gru: joint: 90%" in label
    assert fleet_sweep.plot(found[-1:]) is None
