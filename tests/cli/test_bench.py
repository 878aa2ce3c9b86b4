"""``fleetgym bench``: names, and the comparison of speeds."""

import json

import pytest

from fleetgym.benchmarks.fleet_merge import PRESETS
from fleetgym.benchmarks.speed import COMPARISONS, compare
from fleetgym.cli import main
from fleetgym.core import EvalRecord
from fleetgym.core.optional import EXTRAS, Extra


def test_names(capsys):
    assert main(["bench", "--help"]) == 0
    assert "fleet_merge" in capsys.readouterr().out
    assert main(["bench"]) == 2
    assert main(["bench", "fleet_merg"]) == 2
    assert "unknown benchmark 'fleet_merg'; nearest: 'fleet_merge'" in capsys.readouterr().err
    assert main(["bench", "fleet_merge", "--methods", "averag_rounds"]) == 2
    assert "nearest: 'average_rounds'" in capsys.readouterr().err


@pytest.mark.parametrize(("preset", "tasks"), [("quick", 5), ("mt10", 10), ("mt50", 50)])
def test_presets(preset, tasks):
    assert len(PRESETS[preset].task_names) == tasks


def test_speed(tmp_path, capsys):
    assert main(["bench", "speed", "--only", "fleet_training", "--repeat", "1", "--out", str(tmp_path / "s.json")]) == 0
    assert "times as fast" in capsys.readouterr().out
    assert json.loads((tmp_path / "s.json").read_text())["results"]["fleet_training"]["ratio"] > 0
    assert main(["bench", "speed", "--only", "warp"]) == 2


def test_speed_of_matching_beside_its_peers():
    from fleetgym.benchmarks.speed import compare, line, matching

    rows = matching(cells=(16,), width=24, channels=4)
    assert len({row.about for row in rows}) == len(rows) == 3
    _, ours, sinkhorn = rows[0].results
    assert 0 < ours() <= 1.001 * sinkhorn()
    for row in rows[1:]:
        found = compare(row, 1)
        assert 0 < found["ours_result"] <= 1.001 * found["peer_result"], row.about
        assert "squared distance" in line(row, found) and found["pairs"] == 1


def test_speed_without_the_peers(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "bench", Extra(("rebasinn",), "peers"))
    assert main(["bench", "speed", "--only", "matching"]) == 2
    assert "rebasinn is missing (peers); install it with: pip install 'fleetgym[bench]'" in capsys.readouterr().err
    done = []
    for name in COMPARISONS:
        monkeypatch.setitem(COMPARISONS, name, lambda *device, name=name: done.append(name) or [])
    assert main(["bench", "speed"]) == 0
    assert done == ["fields", "meta_world", "fleet_tools", "fleet_training", "sirens"]
    assert "matching is left out: pip install 'fleetgym[bench]'" in capsys.readouterr().out


def test_speed_of_radiance_fields(monkeypatch, capsys):
    pytest.importorskip("pybullet")
    from fleetgym.benchmarks.speed import line, radiance_fields

    monkeypatch.setitem(EXTRAS, "nerfstudio", Extra(("no_such_module",), "models"))
    hashing = dict(iterations=10, batch=128, levels=4, table=1 << 10, samples=(8, 6), hidden=16)
    options = {"hash": hashing, "voxel": {"iterations": 10, "batch": 128}}
    fits, views = radiance_fields(size=16, scenes=2, distinct=1, views=2, options=options)
    assert "nerfstudio, the peer, is missing here: pip install" in capsys.readouterr().out
    found = compare(fits, 1)
    assert (fits.count, views.count, found["unit"]) == (2, 4, "scenes")
    assert found["ours_result"] > 8 and found["peer_result"] > 8
    assert "scenes a CPU-minute, voxel" in line(fits, found)
    assert "views a CPU-second" in line(views, compare(views, 1))


def test_speed_of_sirens():
    found = compare(COMPARISONS["sirens"](), 1)
    assert found["ours_result"] > 38 and found["peer_result"] > 38


def test_experts(tmp_path, capsys):
    words = ["bench", "experts", "--tasks", "reach-v3", "door-close-v3", "--episodes", "2", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "2 tasks, 4 episodes" in capsys.readouterr().out
    record = EvalRecord.load(tmp_path / "record.json")
    assert record.per_task() == {"reach-v3": (2, 2), "door-close-v3": (2, 2)} and record.metrics["mean_success"] == 1
    assert main(["bench", "experts", "--tasks", "reach-v4"]) == 2
    assert "nearest: 'reach-v3'" in capsys.readouterr().err


def test_experts_with_tools(tmp_path, capsys):
    words = ["bench", "experts", "--suite", "fleet_tools", "--episodes", "2", "--tasks", "Hammer", "--arms", "hand"]
    assert main([*words, "--out", str(tmp_path)]) == 0
    assert "| deepest, mm | force, median, N | largest, N |" in capsys.readouterr().out
    record = EvalRecord.load(tmp_path / "record.json")
    assert record.per_task() == {"Hammer-Hand, train": (2, 2), "Hammer-Hand, held_out": (2, 2)}
    touch = record.metrics["touch"]["Hammer-Hand, train"]
    assert len(touch["force"]) == 2 and all(10 < force < 300 for force in touch["force"])
    assert max(touch["depth"]) < 0.003
    row = (tmp_path / "table.md").read_text().splitlines()[2].split("|")
    assert float(row[-2]) == pytest.approx(max(touch["force"]), abs=0.5)
    assert main([*words[:4], "--episodes", "0"]) == 2 and main([*words, "--splits"]) == 2
    assert main(["bench", "experts", "--suite", "fleet_tools", "--tasks", "Hamer"]) == 2
    assert "'Hammer'" in capsys.readouterr().err


def test_matching(tmp_path, capsys):
    words = ["--matchers", "frank_wolfe", "lap", "--cells", "rnn", "--hidden", "16", "--noise", "0.5", "--seeds", "2"]
    assert main(["bench", "matching", *words, "--out", str(tmp_path)]) == 0
    assert "2 pairs of each" in capsys.readouterr().out
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    drop = {row["matcher"]: row["drop"] for row in rows if row["kind"] == "independent"}
    assert drop["frank_wolfe"] >= drop["lap"] > 0.05
    assert [row["units_right"] for row in rows if row["kind"] == "planted"] == [1.0, 1.0]
    assert main(["bench", "matching", "--matchers", "lapp"]) == 2
