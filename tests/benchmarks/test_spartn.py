"""The comparison of corrective views, small: every row, what it writes, bad input."""

import json

import numpy as np
import pytest

pytest.importorskip("pybullet")

from fleetgym.benchmarks import spartn as bench  # noqa: E402
from fleetgym.core import UserError  # noqa: E402

TINY = bench.Preset(
    task="Named", demonstrations=2, image_size=24, number=1, iterations=3, steps=4, batch_size=8, width=4, rounds=1,
    episodes=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spartn")
    bench.collect_demonstrations(TINY, str(folder), 0)
    return folder


@pytest.fixture(autouse=True)
def one_split(monkeypatch):
    """Named objects have no held-out ones; procedural ones take longer to find."""
    monkeypatch.setattr(bench, "SPLITS", ("train",))
    monkeypatch.setattr(bench, "_COLUMNS", (("disturbed", "train"), ("clean", "train")))


def test_the_oracle_draws_what_the_eye_saw(folder):
    own = bench.collect_demonstrations(TINY, str(folder), 0)
    eye = bench.eye(TINY)
    episode = own[1]
    pictures, _ = bench.oracle_renderer(TINY)(episode, episode.observations["pose"][:3] @ eye.hand_eye)
    seen = episode.observations["rgb"][:3]
    outside = ~eye.gripper
    assert outside.mean() > 0.6
    assert np.abs(pictures[:, outside].astype(int) - seen[:, outside]).max() <= 2


def test_rows_and_pages(folder):
    for method in ("bc", "bc_rgbd", "homography", "spartn", "oracle"):
        bench.run_job(bench.Job(method, 0, TINY, str(folder)))
    bench.publish(folder, "quick", [0])
    entries = json.loads((folder / "leaderboard.json").read_text())
    assert {(entry["method"], entry["protocol"]) for entry in entries} == {
        (method, protocol)
        for method in ("bc", "bc_rgbd", "homography", "spartn", "oracle")
        for protocol in ("clean", "disturbed")
    }
    assert all({"split", "success", "low", "high", "success_by_seed"} <= set(entry) for entry in entries)
    rows = {row["method"]: row for row in bench.load(folder)}
    report = json.loads((folder / "reports" / "spartn-0.json").read_text())
    assert [row["failed"] for row in report] == [None, None]
    assert rows["spartn"]["pictures"] == rows["bc"]["pictures"] + sum(row["made"] for row in report)
    assert rows["bc"]["views"] is None and "2 demonstrations" in rows["spartn"]["views"]
    assert (folder / "index.html").exists() and "| spartn |" in (folder / "leaderboard.md").read_text()


@pytest.mark.slow
def test_online_methods(folder):
    for method in ("dart", "dagger"):
        bench.run_job(bench.Job(method, 0, TINY, str(folder)))
    rows = {row["method"]: row for row in bench.load(folder)}
    assert rows["dagger"]["pictures"] > rows["bc"]["pictures"] < rows["dart"]["pictures"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "quik"], "quick"),
        (["--methods", "bcc"], "bc"),
        (["--override", "demonstrations=0"], "demonstrations=0"),
        (["--override", "images=3"], "image_size"),
        (["--override", "task=Nmed"], "Named"),
        (["--override", "steps=many"], "takes a int"),
    ],
)
def test_bad_input(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        bench.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
