import json

import pytest

from fleetgym.cli import main
from fleetgym.core import EvalRecord
from fleetgym.core.optional import EXTRAS, Extra, installed


def test_reference_scores_and_reading(tmp_path, capsys):
    words = ["bench", "office_nav", "--variants", "OfficeNav-Symbolic-v0", "--trials", "20", "--out", str(tmp_path)]
    assert main(words) == 0
    assert "| OfficeNav-Symbolic-v0 | oracle, exact | true | 0.437 | 1.000 |" in capsys.readouterr().out
    found = json.loads((tmp_path / "office_nav.json").read_text())["results"]["OfficeNav-Symbolic-v0"]
    assert found["exact"]["non_reader"]["mean_return"] == pytest.approx(0.2957, abs=1e-4)
    rows = {(row["policy"], row["sign"]): row for row in found["played"]}
    assert rows["oracle", "true"]["first_goal"] == 1 and rows["oracle", "swapped"]["first_named"] == 1
    assert rows["non_reader", "blank"]["return"] == rows["non_reader", "true"]["return"]
    record = EvalRecord.load(tmp_path / "records" / "OfficeNav-Symbolic-v0-oracle-true.json")
    assert record.success == 1 and len(record.seeds) == 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--variants", "OfficeNav-v9"], "unknown variant 'OfficeNav-v9'"),
        (["--policies", "expert"], "unknown reference policy 'expert'"),
        (["--signs", "upside_down"], "unknown choice of sign"),
        (["--trials", "0"], "--trials 0"),
        (["--split", "style"], "split 'style'"),
    ],
)
def test_bad_input(tmp_path, capsys, words, message):
    assert main(["bench", "office_nav", *words, "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.skipif(not installed("bench"), reason="minigrid is not installed")
def test_speed_beside_minigrid():
    from fleetgym.benchmarks.speed import compare, office_nav

    rows = office_nav()
    assert len({row.about for row in rows}) == len(rows) == 8
    row = compare(rows[0], 1)
    assert row["ratio"] > 20 and row["ours_per_cpu_second"] > row["peer_per_cpu_second"]


def test_speed_says_how_to_install_minigrid(monkeypatch, capsys):
    monkeypatch.setitem(EXTRAS, "bench", Extra(("no_such_module",), "peers"))
    assert main(["bench", "speed", "--only", "office_nav"]) == 2
    assert "pip install 'fleetgym[bench]'" in capsys.readouterr().err
