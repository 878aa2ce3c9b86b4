"""The comparison of corrective views, small: every row, what it writes, bad input."""

import contextlib
import dataclasses
import json
import shutil
from concurrent.futures import Future

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("pybullet")

from fleetgym.agents.spartn import collides  # noqa: E402
from fleetgym.agents.visual import VisualPolicy  # noqa: E402
from fleetgym.benchmarks import spartn as bench  # noqa: E402
from fleetgym.benchmarks.spartn_film import PAUSE, film, load_policy, make  # noqa: E402
from fleetgym.benchmarks.spartn_views import Judged  # noqa: E402
from fleetgym.core import Checkpoint, UserError, se3  # noqa: E402
from fleetgym.core.files import write_json  # noqa: E402

TINY = bench.Preset(
    task="Named", demonstrations=2, image_size=24, number=1, iterations=3, steps=4, batch_size=8, width=4, rounds=1,
    episodes=1, measured="clean:train disturbed:train",
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spartn")
    bench.collect_demonstrations(TINY, str(folder), 0)
    return folder


class Here:
    """Workers that are this process."""

    def submit(self, work, *arguments):
        future = Future()
        future.set_result(work(*arguments))
        return future

    def drain(self, futures):
        return [future.result() for future in futures]

    def progress(self, *words):
        pass


def test_the_oracle_draws_what_the_eye_saw(folder):
    own = bench.collect_demonstrations(TINY, str(folder), 0)
    eye = bench.eye(TINY)
    episode = own[1]
    pictures, _ = bench.Oracle(TINY)(episode, episode.observations["pose"][:3] @ eye.hand_eye)
    seen = episode.observations["rgb"][:3]
    outside = ~eye.gripper
    assert outside.mean() > 0.6
    assert np.abs(pictures[:, outside].astype(int) - seen[:, outside]).max() <= 2


def test_the_oracle_knows_what_the_hand_would_hit(folder, monkeypatch):
    own = bench.collect_demonstrations(TINY, str(folder), 0)
    eye, episode, found = bench.eye(TINY), own[1], []
    monkeypatch.setattr(bench, "collides", lambda *given: found.append(given) or collides(*given))
    hands = np.stack([episode.observations["pose"][0], se3.pose([0.5, 0.0, 0.08], [np.pi, 0, 0])])
    _, notes = bench.Oracle(TINY, eye)(episode, hands @ eye.hand_eye)
    # The second hand points down, its fingers' tips below the table.
    assert notes["collides"].tolist() == [False, True]
    np.testing.assert_allclose(found[0][0], hands, atol=1e-9)
    heights = found[0][2][:, 2]
    assert heights.min() > -0.005 and (np.abs(heights) < 0.005).mean() > 0.5 and heights.max() > 0.02


def test_the_oracle_has_the_poses_of_the_fields_and_other_pictures(folder):
    own = bench.collect_demonstrations(TINY, str(folder), 0)
    views = {}
    for method in ("spartn", "oracle"):
        views[method], report, _ = bench.corrective(bench.Job(method, 0, TINY, str(folder)), own)
    for ours, true in zip(views["spartn"], views["oracle"]):
        np.testing.assert_array_equal(ours.observations["pose"], true.observations["pose"])
        np.testing.assert_array_equal(ours.actions, true.actions)
        assert (ours.observations["rgb"] != true.observations["rgb"]).any()


def test_views_are_measured_against_the_simulator(folder):
    own = bench.collect_demonstrations(TINY, str(folder), 0)
    oracle, camera = bench.Oracle(TINY), bench.eye(TINY)
    poses = own[0].observations["pose"][:6] @ camera.hand_eye
    _, notes = Judged(oracle, oracle.views, camera.gripper)(own[0], poses)
    assert notes["views_psnr"] == notes["views_psnr_object"] == 120  # equal pictures

    def off(episode, poses):
        """Wrong where the object is, and under the gripper, where it does not count."""
        pictures, shown = oracle.views(episode.seed, poses)
        pictures[shown] = 255 - pictures[shown]
        pictures[:, camera.gripper] = 0
        return pictures, {"mine": 1}

    _, notes = Judged(off, oracle.views, camera.gripper)(own[0], poses)
    truth, shown = oracle.views(own[0].seed, poses)
    error = (truth[shown & ~camera.gripper] / 127.5 - 1) ** 2
    assert notes["views_psnr_object"] == pytest.approx(-10 * np.log10(error.mean()))
    everywhere = error.sum() / (6 * (~camera.gripper).sum() * 3)
    assert notes["views_psnr"] == pytest.approx(-10 * np.log10(everywhere)) and notes["mine"] == 1


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
    assert "| spartn |" in (folder / "leaderboard.md").read_text()
    assert rows["spartn"]["views_psnr"] == pytest.approx(np.mean([row["views_psnr"] for row in report]))
    assert (
        rows["spartn"]["views_psnr"] > 8 and rows["spartn"]["fit_seconds"] > 0 and rows["oracle"]["fit_seconds"] is None
    )
    sheet = np.asarray(Image.open(folder / "views" / "spartn-0.png").convert("RGB"))
    # A head, and two rows for each of two demonstrations; in the second column the gripper is that of the first.
    assert sheet.shape == (20 + 4 * 144 + 3 * 4, 4 * 144 + 3 * 4, 3)
    assert "data:image/png;base64," in (folder / "index.html").read_text()


def test_ablations(folder, tmp_path, monkeypatch):
    monkeypatch.setitem(bench.PRESETS, "quick", TINY)
    monkeypatch.setattr(bench, "worker_processes", lambda number: contextlib.nullcontext(Here()))
    out = tmp_path / "out"
    shutil.copytree(folder / "training", out / "training")  # demonstrations are there already
    write_json(out / "config.json", {"schema": 1, "name": "spartn", "config": {"benchmark": "spartn", "name": "quick",
               "preset": dataclasses.asdict(TINY)}})  # fmt: skip
    words = [
        "--methods",
        "bc",
        "spartn",
        "--ablate",
        "iterations=2,3",
        "demonstrations=1,2",
        "--out",
        str(out),
        "--resume",
    ]
    assert bench.main(words) == 0
    entries = json.loads((out / "ablations" / "ablations.json").read_text())
    assert [(e["field"], e["value"], e["method"]) for e in entries] == [
        (field, value, method)
        for field, values in (("iterations", (2, 3)), ("demonstrations", (1, 2)))
        for value in values
        for method in ("bc", "spartn")
    ]
    # What the preset has already, or what changes nothing, is not trained again.
    made = sorted(str(path.relative_to(out)) for path in out.rglob("rows/*.json"))
    assert made == [
        "ablations/demonstrations=1/rows/bc-0.json",
        "ablations/demonstrations=1/rows/spartn-0.json",
        "ablations/iterations=2/rows/spartn-0.json",
        "rows/bc-0.json",
        "rows/spartn-0.json",
    ]
    few, own = (
        json.loads((out / at / "rows" / "spartn-0.json").read_text()) for at in (made[1].split("/rows")[0], ".")
    )
    assert few["pictures"] < own["pictures"] and few["preset"]["demonstrations"] == 1
    assert [(r["protocol"], r["split"]) for r in few["results"]] == [("disturbed", "train")]
    blurred = json.loads((out / made[2]).read_text())
    assert blurred["views_psnr"] != own["views_psnr"]
    page = (out / "index.html").read_text()
    assert "against-iterations" in page and "--ablate iterations=2,3 demonstrations=1,2" in page
    assert "## Ablations" in (out / "leaderboard.md").read_text()
    (out / made[2]).unlink()
    trained = []

    def trains(*arguments, run, **options):
        trained.append(run.path.parts[-4:])
        return [{"cpu_seconds": 0.0}]

    monkeypatch.setattr(bench, "train_visual", trains)
    assert bench.main(words) == 0
    assert trained == [("iterations=2", "training", "seed0", "spartn")]


@pytest.mark.parametrize("splits", [("train", "ycb"), ("train", "held_out", "ycb")])
def test_the_first_column_is_what_ablations_measure(splits):
    kinds = [(protocol, split) for protocol in bench.PROTOCOLS for split in splits]
    row = {"results": [{"protocol": protocol, "split": split} for protocol, split in kinds]}
    assert bench._columns([row])[0] == sorted(kinds, key=bench._rank)[0] == ("disturbed", splits[1])


def test_a_film_of_a_policy_that_is_pushed(folder, tmp_path, monkeypatch):
    small = {"observation": ("rgb", "depth"), "image_size": 24, "horizon": 8}
    expert, options = load_policy("expert", "Named")
    frames, lifted = film(expert, make("Named", ("cube",), **{**options, **small}), 1, views=6, iterations=2)
    assert {frame.shape for frame in frames} == {(240, 440, 3)} and isinstance(lifted, bool)
    rims = [bool((frame[0] == [200, 30, 30]).all()) for frame in frames]
    # It stops at the start, at both knocks (after steps 3 and 7) and at the end.
    assert rims == [False] * (PAUSE + 2) + [True] * PAUSE + [False] * 3 + [True] * PAUSE + [False] * PAUSE
    assert np.abs(frames[0].astype(int) - frames[PAUSE]).max() > 20
    Checkpoint.save(tmp_path / "policy", VisualPolicy(24, depth=True, width=4))
    policy, options = load_policy(tmp_path / "policy", "Named")
    assert options == {"observation": ("rgb", "depth"), "image_size": 24}
    seen, _ = film(policy, make("Named", ("cube",), **small), 1, views=6, iterations=2)
    np.testing.assert_array_equal(seen[0], frames[0])
    with pytest.raises(UserError, match="nowhere"):
        load_policy(tmp_path / "nowhere", "Named")

    bench.run_job(bench.Job("bc", 0, TINY, str(folder)))
    calls = []
    monkeypatch.setattr(bench, "film", lambda *words: calls.append(words) or (frames, True))
    out = tmp_path / "out"
    shutil.copytree(folder / "rows", out / "rows")
    assert bench.main(["--film", str(tmp_path / "policy"), "--film-seed", "7", "--out", str(out)]) == 0
    assert calls[0][2] == 7 and (out / "film.gif").stat().st_size > 10_000
    assert "data:image/gif;base64," in (out / "index.html").read_text()


@pytest.mark.slow
def test_online_methods(folder):
    for method in ("bc", "dart", "dagger"):
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
        (["--override", "task=YCB"], "held out"),
        (["--override", "measured=clean:trian"], "train"),
        (["--override", "measured=clear:train"], "clean"),
        (["--override", "field=vxel"], "voxel"),
        (["--override", "task=Named", "measured=clean:held_out"], "no such objects here"),
        (["--ablate", "demonstrations"], "FIELD=VALUE"),
        (["--ablate", "demonstrations=6,06"], "value is given twice"),
        (["--ablate", "iterations=1", "--methods", "bc"], "changes nothing for bc"),
        (["--ablate", "steps=9", "--override", "steps=8"], "steps is given twice"),
        (["--ablate", "views=9"], "unknown preset field"),
    ],
)
def test_bad_input(arguments, words, tmp_path):
    with pytest.raises(UserError, match=words):
        bench.main([*arguments, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
