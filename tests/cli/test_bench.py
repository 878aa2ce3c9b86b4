"""``fleetgym bench``: names, and the comparison of speeds."""

import json

import pytest

from fleetgym.benchmarks.fleet_merge import PRESETS
from fleetgym.cli import main


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
