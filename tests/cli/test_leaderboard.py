import json

import pytest

from fleetgym.cli import main
from fleetgym.core.records import EvalRecord


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "fleet_merge" / "quick"
    for method, successes in (("average_rounds", [1, 0, 0, 1]), ("joint", [1, 1, 1, 0])):
        tasks = ["reach-v3", "reach-v3", "push-v3", "push-v3"]
        record = EvalRecord(
            method,
            "meta_world/quick",
            range(4),
            successes,
            [0] * 4,
            [9] * 4,
            {"seed": 0, "bytes_sent": 2000},
            tasks=tasks,
        )
        record.save(folder / "records" / f"{method}.json")
    return folder


def test_prints_the_page_and_the_table(folder, capsys):
    assert main(["leaderboard", str(folder)]) == 0
    out = capsys.readouterr().out
    assert str(folder / "leaderboard.html") in out
    assert "0.50 [0.15, 0.85]" in out and "2 kB" in out
    assert {row["method"] for row in json.loads((folder / "leaderboard.json").read_text())} == {
        "average_rounds",
        "joint",
    }


def test_readme(folder, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- leaderboard:fleet_merge/quick -->\n<!-- /leaderboard -->\nb\n")
    assert main(["leaderboard", str(folder), "--readme", str(readme)]) == 0
    table = capsys.readouterr().out.partition("\n\n")[2]
    assert table in readme.read_text()
    assert main(["leaderboard", str(folder), "--readme", str(readme), "--marker", "other"]) == 2
    assert "leaderboard:other" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["absent"], ["absent", "--marker", "x"]])
def test_errors_are_one_line(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["leaderboard", *words]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())
