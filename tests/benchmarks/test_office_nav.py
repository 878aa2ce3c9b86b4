import json
from typing import ClassVar

import numpy as np
import pytest
import torch

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.cli import main
from fleetgym.core import Checkpoint, EvalRecord
from fleetgym.core.checkpoint import MODULES
from fleetgym.core.optional import EXTRAS, Extra, installed
from fleetgym.core.records import wilson_interval


class Forward(torch.nn.Module):
    """Always goes forward."""

    architecture = "always_forward"
    config: ClassVar = {}

    def __init__(self):
        super().__init__()
        self.preference = torch.nn.Parameter(torch.tensor([0.0, 0.0, 1.0, 0.0]))

    def predict(self, observation, state=None, episode_start=None, deterministic=False):
        return np.full(len(observation["image"]), int(self.preference.argmax())), None


@pytest.fixture
def forward(tmp_path, monkeypatch):
    monkeypatch.setitem(MODULES._items, "always_forward", Forward)
    Checkpoint.save(tmp_path / "forward", Forward())
    return tmp_path / "forward"


def test_reference_scores_and_reading(tmp_path, capsys):
    words = ["bench", "office_nav", "--variants", "OfficeNav-Symbolic-v0", "--trials", "20", "--out", str(tmp_path)]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "| OfficeNav-Symbolic-v0 | oracle | 0.4366 | 1.0000 |" in out
    assert (tmp_path / "office_nav.md").read_text(encoding="utf-8") in out
    assert (tmp_path / "office_nav.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "office_nav.json").read_text())["results"]["OfficeNav-Symbolic-v0"]
    assert found["exact"]["non_reader"]["mean_return"] == pytest.approx(0.2957, abs=1e-4)
    assert found["exact"]["random"]["mean_return"] == pytest.approx(-1.49907, abs=1e-5)
    rows = {(row["policy"], row["sign"]): row for row in found["played"]}
    assert len(rows) == 9 and rows["oracle", "true"]["success_interval"] == list(wilson_interval(20, 20))
    assert rows["oracle", "true"]["return_error"] > 0
    assert rows["oracle", "true"]["first_goal"] == 1 and rows["oracle", "swapped"]["first_named"] == 1
    assert rows["non_reader", "blank"]["return"] == rows["non_reader", "true"]["return"]
    record = EvalRecord.load(tmp_path / "records" / "OfficeNav-Symbolic-v0-oracle-true.json")
    assert record.success == 1 and len(record.seeds) == 20


def test_a_trained_policy_is_measured_beside_the_others(tmp_path, capsys, forward):
    words = ["--variants", "OfficeNav-v0", "--trials", "5", "--policies", "oracle", "--policy", str(forward)]
    assert main(["bench", "office_nav", *words, "--signs", "true", "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "office_nav.json").read_text())["results"]["OfficeNav-v0"]["played"]
    assert [(row["policy"], row["return"]) for row in found][1] == ("trained", pytest.approx(-1.5))
    assert found[0]["success"] == 1 and found[1]["success"] == found[1]["first_named"] == 0
    capsys.readouterr()
    Checkpoint.save(tmp_path / "arm", RecurrentPolicy(39, 4, hidden=4))
    assert main(["bench", "office_nav", "--policy", str(tmp_path / "arm"), "--out", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert "cannot play OfficeNav-Symbolic-v0" in error and error.count("\n") == 1 and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "OfficeNav-v9"], "unknown variant 'OfficeNav-v9'"),
        (["--policies", "expert"], "unknown reference policy 'expert'"),
        (["--signs", "upside_down"], "unknown choice of sign"),
        (["--trials", "0"], "--trials 0"),
        (["--policies"], "--policies: name at least one"),
        (["--policy", "nowhere"], "nowhere does not exist"),
        (["--split", "style"], "split 'style'"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    assert main(["bench", "office_nav", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(not installed("bench"), reason="the peers are not installed")
def test_speed_beside_minigrid():
    from fleetgym.benchmarks.speed import compare, office_nav

    rows = office_nav(batch=256, tensor_batch=64, copied=1 << 20)
    assert len({row.about for row in rows}) == len(rows) == 11
    row = compare(rows[0], 1)
    assert row["ratio"] > 20 and row["ours_per_cpu_second"] > row["peer_per_cpu_second"]


def test_speed_says_how_to_install_minigrid(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "bench", Extra(("no_such_module",), "peers"))
    assert main(["bench", "speed", "--only", "office_nav"]) == 2
    assert "pip install 'fleetgym[bench]'" in capsys.readouterr().err
