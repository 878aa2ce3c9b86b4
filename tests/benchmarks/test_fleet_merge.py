"""The fleet-merging protocol, small: what it writes, that a stopped run goes on to the same result, bad input."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fleetgym.benchmarks import fleet_merge, leaderboard
from fleetgym.benchmarks.fleet_jobs import barrier
from fleetgym.benchmarks.fleet_merge import METHODS, PRESETS, Job, Preset, partition, preset_from
from fleetgym.core import Checkpoint, EvalRecord, UserError

TINY = Preset(
    tasks="reach-v3,door-close-v3", robots_per_task=2, demonstrations=2, hidden=8, warmup=2, local_steps=2, rounds=4,
    episodes=2, max_steps=15, curve_points=2, curve_episodes=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def demonstrations(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    for task in TINY.task_names:
        fleet_merge.collect_task(TINY, str(folder), 0, task)
    return folder


@pytest.fixture
def folder(demonstrations, tmp_path):
    """A fresh benchmark folder with the demonstrations of the others."""
    part = "training/seed0"
    (tmp_path / part).mkdir(parents=True)
    (tmp_path / part / "demonstrations").symlink_to(demonstrations / part / "demonstrations")
    return tmp_path


def silent(*_):
    pass


def outcome(folder, method):
    record = EvalRecord.load(fleet_merge.record_path(folder, method, 0))
    metrics = {key: value for key, value in record.metrics.items() if key != "cpu_seconds"}
    return {**dataclasses.asdict(record), "metrics": metrics, "provenance": None}


def test_every_row_and_the_pages(folder):
    for kind in ("alone", "average_rounds", "fleet_merge_rounds", "joint"):
        fleet_merge.run_job(Job(kind, 0, TINY, str(folder)), silent)
    fleet_merge.publish(folder, TINY, "quick", [0], make_film=False)
    rows = {row["method"]: row for row in json.loads((folder / "leaderboard.json").read_text())}
    assert set(rows) == set(METHODS)
    keys = {"method", "success", "low", "high", "worst_task", "bytes_sent", "cpu_seconds", "seeds"}
    assert all(keys <= set(row) for row in rows.values())
    parameters = sum(p.numel() for p in fleet_merge.Fleet(TINY, folder, 0).policy(0).parameters())
    statistics = 8 * (2 * (39 + 2 + 9) + 1)
    assert rows["average_rounds"]["bytes_sent"] == statistics + 4 * parameters * (TINY.rounds + 1)
    assert rows["fleet_merge_once"]["bytes_sent"] == statistics + 4 * parameters
    assert rows["alone_own"]["bytes_sent"] == statistics
    extras = json.loads((folder / "extras.json").read_text())
    assert "--override tasks=reach-v3,door-close-v3 robots_per_task=2" in extras["command"]
    assert extras["interpolation"]["robots"] == extras["interpolation"]["tasks"] == ["reach-v3", "door-close-v3"]
    for series in extras["interpolation"]["series"]:
        assert len(series["loss"]) == 11 and sum(value is not None for value in series["success"]) == TINY.line_points
        assert series["loss_barrier"] >= 0 and series["success_barrier"] >= 0
    assert (folder / "leaderboard.html").stat().st_size > 10_000
    merged = EvalRecord.load(fleet_merge.record_path(folder, "fleet_merge_rounds", 0))
    first, *later = merged.metrics["merges"]
    assert first["distance_after"] < first["distance_before"]
    assert first["norm_factor"] > 1.1 and all(note["norm_factor"] == 1 for note in later)
    assert leaderboard.build(folder)


class Stop(Exception):
    pass


SERVER = dataclasses.replace(TINY, optimizer="server", local_steps=1, rounds=6)


@pytest.mark.parametrize(
    ("kind", "preset"), [("fleet_merge_rounds", TINY), ("joint", TINY), ("fleet_merge_rounds", SERVER)]
)
def test_a_stopped_job_goes_on_to_the_same_result(folder, tmp_path, kind, preset):
    job = Job(kind, 0, preset, str(folder), save_every=0.0)
    fleet_merge.run_job(job, silent)
    whole = outcome(folder, kind)
    fleet_merge.record_path(folder, kind, 0).unlink()
    (folder / "training" / "seed0" / kind).rename(tmp_path / "first")

    def stop(name, done, total, words):
        if done >= preset.warmup + preset.local_steps:
            raise Stop

    with pytest.raises(Stop):
        fleet_merge.run_job(job, stop)
    assert not fleet_merge.record_path(folder, kind, 0).exists()
    seen = []
    fleet_merge.run_job(job, lambda name, done, total, words: seen.append(done))
    assert seen[0] > preset.warmup  # it did not begin again
    assert outcome(folder, kind) == whole
    weights = [
        path / "checkpoints" / "last" / "model.safetensors"
        for path in (tmp_path / "first", folder / "training" / "seed0" / kind)
    ]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_with_the_optimiser_at_the_server_only_the_first_merge_differs(folder):
    for kind in ("average_rounds", "fleet_merge_rounds", "fedavg_rounds"):
        fleet_merge.run_job(Job(kind, 0, SERVER, str(folder)), silent)
    records = {
        kind: EvalRecord.load(fleet_merge.record_path(folder, kind, 0)).metrics
        for kind in ("average_rounds", "fleet_merge_rounds", "fedavg_rounds")
    }
    assert len({metrics["bytes_sent"] for metrics in records.values()}) == 1
    (first,) = records["fleet_merge_rounds"]["merges"]
    assert first["round"] == 0 and first["norm_factor"] > 1.1
    assert not records["average_rounds"]["merges"]

    def final(kind):
        path = folder / "training" / "seed0" / kind / "checkpoints" / "last"
        return torch.cat([p.detach().flatten() for p in Checkpoint.load(path).module().parameters()])

    weights = {kind: final(kind) for kind in records}
    # Unrelated initialisations cancel in a plain mean, whoever steps afterwards.
    assert weights["fleet_merge_rounds"].norm() > 1.2 * weights["average_rounds"].norm()
    assert not torch.equal(weights["average_rounds"], weights["fedavg_rounds"])


def test_from_the_same_weights_alignment_changes_nothing(folder):
    preset = dataclasses.replace(SERVER, initial="same", rounds=1, curve_points=1)
    weights = []
    for kind in ("average_rounds", "fleet_merge_rounds"):
        fleet_merge.run_job(Job(kind, 0, preset, str(folder)), silent)
        path = folder / "training" / "seed0" / kind / "checkpoints" / "last" / "model.safetensors"
        weights.append(path.read_bytes())
    assert weights[0] == weights[1]


def test_robots_share_neither_data_nor_initial_weights(folder):
    fleet = fleet_merge.Fleet(TINY, folder, 0)
    assert fleet.robots == [("reach-v3",), ("reach-v3",), ("door-close-v3",), ("door-close-v3",)]
    assert not torch.equal(fleet.data[0].observations[0, 0], fleet.data[1].observations[0, 0])
    assert fleet.data[0].observations[..., 39:][fleet.data[0].mask].unique(dim=0).tolist() == [[1, 0]]
    first, second = fleet.policy(0), fleet.policy(1)
    assert not torch.equal(first.encoder.weight, second.encoder.weight)
    assert torch.equal(first.normaliser.mean, second.normaliser.mean)


def weights_of(folder, kind):
    path = folder / "training" / "seed0" / kind / "checkpoints" / "last" / "model.safetensors"
    return path.read_bytes()


def test_fedprox_holds_robots_near_what_they_received(folder, tmp_path):
    weights = {}
    for kind, proximal in (("fedavg_rounds", 0.5), ("fedprox_rounds", 0.0), ("fedprox_rounds", 0.5)):
        place = tmp_path / f"{kind}{proximal}"
        (place / "training").mkdir(parents=True)
        (place / "training" / "seed0").mkdir()
        (place / "training" / "seed0" / "demonstrations").symlink_to(folder / "training" / "seed0" / "demonstrations")
        preset = dataclasses.replace(TINY, proximal=proximal, rounds=2, curve_points=1, episodes=1)
        fleet_merge.run_job(Job(kind, 0, preset, str(place)), silent)
        weights[kind, proximal] = weights_of(place, kind)
    assert weights["fedprox_rounds", 0.0] == weights["fedavg_rounds", 0.5]
    assert weights["fedprox_rounds", 0.5] != weights["fedavg_rounds", 0.5]


@pytest.mark.parametrize(("tasks", "per_task", "each"), [(50, 3, 5), (10, 6, 4), (5, 4, 2), (5, 3, 5), (4, 2, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_every_task_is_dealt_to_as_many_robots(tasks, per_task, each, seed):
    names = ",".join(PRESETS["mt50"].task_names[:tasks])
    preset = dataclasses.replace(TINY, tasks=names, robots_per_task=per_task, tasks_per_robot=each)
    hands = partition(preset, seed)
    assert len(hands) == preset.robots == tasks * per_task // each
    assert all(len(hand) == len(set(hand)) == each for hand in hands)
    assert [sum(task in hand for hand in hands) for task in range(tasks)] == [per_task] * tasks
    assert hands == partition(preset, seed)
    assert (hands != partition(preset, seed + 1)) == (1 < each < tasks)


SEVERAL = dataclasses.replace(
    TINY, tasks="reach-v3,door-close-v3,window-close-v3", tasks_per_robot=2, rounds=1, curve_points=1, episodes=2
)


@pytest.fixture(scope="module")
def three_tasks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("several")
    for task in SEVERAL.task_names:
        fleet_merge.collect_task(SEVERAL, str(folder), 0, task)
    return folder


@pytest.mark.parametrize("each", [2, "all"])
def test_robots_with_several_tasks(three_tasks, tmp_path, each):
    preset = dataclasses.replace(SEVERAL, tasks_per_robot=each)
    number = preset.tasks_each
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "seed0").mkdir()
    (tmp_path / "training" / "seed0" / "demonstrations").symlink_to(three_tasks / "training/seed0/demonstrations")
    fleet = fleet_merge.Fleet(preset, tmp_path, 0)
    assert len(fleet.robots) == len(fleet.data) == preset.robots == {2: 3, "all": 2}[each]
    one_task_each = fleet_merge.Fleet(dataclasses.replace(preset, tasks_per_robot=1), tmp_path, 0)

    def episodes(batches):
        return sorted(
            tuple(episode[mask].flatten().tolist())
            for batch in batches
            for episode, mask in zip(batch.observations, batch.mask)
        )

    # Another partition deals the same demonstrations, none twice.
    found = episodes(fleet.data)
    assert found == episodes(one_task_each.data) and len(set(found)) == len(found)
    for tasks, batch in zip(fleet.robots, fleet.data):
        shown = batch.observations[..., 39:][batch.mask].unique(dim=0)
        assert sorted(fleet.tasks[int(row.argmax())] for row in shown) == sorted(tasks) and len(tasks) == number
    for kind in ("alone", "fleet_merge_rounds", "joint"):
        fleet_merge.run_job(Job(kind, 0, preset, str(tmp_path)), silent)
    fleet_merge.publish(tmp_path, preset, "quick", [0], make_film=False)
    rows = {row["method"]: row for row in json.loads((tmp_path / "leaderboard.json").read_text())}
    assert rows["alone_own"]["label"] == "Each robot alone, own tasks"
    for name, row in rows.items():
        # Three robots share two episodes of every task: one each.
        wanted = 3 if (name, each) == ("alone_all", 2) else 2
        assert {task: one["episodes"] for task, one in row["per_task"].items()} == dict.fromkeys(fleet.tasks, wanted)
    extras = json.loads((tmp_path / "extras.json").read_text())
    words = {2: "each of 2 tasks dealt at random", "all": "of its own of every task"}
    assert words[each] in extras["description"] and f"tasks_per_robot={each}" in extras["command"]
    assert extras["command"].count("--methods") == 1  # average_rounds was left out
    alone = [EvalRecord.load(fleet_merge.record_path(tmp_path, f"alone_{whom}", 0)) for whom in ("own", "all")]
    assert (alone[0].tasks == alone[1].tasks and alone[0].returns == alone[1].returns) == (each == "all")
    checkpoints = tmp_path / "training" / "seed0" / "alone" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} >= {f"robot{k}" for k in range(preset.robots)}
    assert extras["interpolation"]["robots"] == ["robot 0", "robot 1"] and len(extras["interpolation"]["tasks"]) == 2


@pytest.mark.parametrize("cell", ["lstm", "rnn", "mlp"])
def test_any_cell_from_equal_weights(folder, cell):
    preset = dataclasses.replace(TINY, cell=cell, initial="same", rounds=1, curve_points=1, tasks_per_robot="all")
    fleet_merge.run_job(Job("fleet_merge_rounds", 0, preset, str(folder)), silent)
    record = EvalRecord.load(fleet_merge.record_path(folder, "fleet_merge_rounds", 0))
    assert record.metrics["preset"]["cell"] == cell and len(record.seeds) == 4
    fleet = fleet_merge.Fleet(preset, folder, 0)
    assert torch.equal(fleet.policy(0).encoder.weight, fleet.policy(1).encoder.weight)


def test_barrier():
    places = [0, 0.25, 0.5, 1]
    assert barrier(places, [1.0, None, 0.0, 0.5], -1) == 0.75
    assert barrier(places, [1.0, 0.9, 0.7, 0.5], -1) == pytest.approx(0.05)
    assert barrier(places, [0.2, 0.1, 0.1, 0.2], 1) == 0
    assert barrier(places, [0.2, 0.5, None, 0.2], 1) == pytest.approx(0.3)


def test_gradient_steps_set_the_rounds():
    assert preset_from("quick", ["local_steps=5", "steps=520"]).rounds == 100
    with pytest.raises(UserError, match="steps=521.*use 520"):
        preset_from("quick", ["steps=521", "local_steps=5"])
    with pytest.raises(UserError, match="steps set the rounds"):
        preset_from("quick", ["steps=520", "rounds=5"])
    with pytest.raises(UserError, match="hidden is given twice"):
        preset_from("quick", ["hidden=5", "hidden=6"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["tasks_per_robot=many"], "tasks_per_robot takes a int or all"),
        (["tasks_per_robot=0"], "tasks_per_robot=0: a number of tasks, at least 1, or all"),
        (["tasks_per_robot=6"], "there are 5 tasks in 'quick'; use 5 at most"),
        (["tasks_per_robot=3"], r"20 places, which do not divide by 3; tasks_per_robot may be 1, 2, 4, 5"),
        (["tasks_per_robot=all", "robots_per_task=1"], "that is one robot.*use robots_per_task=2"),
        (["tasks=reach-v3", "robots_per_task=1"], "that is one robot"),
        (["cell=gruu"], "unknown cell 'gruu'; nearest: 'gru'"),
        (["matcher=lapp"], "unknown matcher 'lapp'; nearest: 'lap'"),
        (["demonstrations=0"], "demonstrations=0: it must be at least 1"),
        (["proximal=-1"], "proximal=-1.0: it must be at least 0"),
        (["line_points=12"], "line_points=12"),
    ],
)
def test_presets_that_cannot_be(override, words):
    with pytest.raises(UserError, match=words):
        fleet_merge.main(["--override", *override])


def test_bad_input():
    with pytest.raises(UserError, match="unknown preset 'quik'; nearest: 'quick'"):
        fleet_merge.main(["--preset", "quik"])
    with pytest.raises(UserError, match="unknown preset field 'round'; nearest: 'rounds'"):
        fleet_merge.main(["--override", "round=3"])
    with pytest.raises(UserError, match="rounds takes a int"):
        fleet_merge.main(["--override", "rounds=many"])
    with pytest.raises(UserError, match="unknown optimizer 'sever'; nearest: 'server'"):
        fleet_merge.main(["--override", "optimizer=sever"])
    with pytest.raises(UserError, match="unknown initial 'equal'"):
        fleet_merge.main(["--override", "initial=equal"])
    with pytest.raises(UserError, match="use local_steps=1"):
        fleet_merge.main(["--override", "optimizer=server", "local_steps=5"])
    with pytest.raises(UserError, match="nearest: 'reach-v3'"):
        fleet_merge.main(["--override", "tasks=reach-v4,push-v3"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            fleet_merge.main(["--device", "cuda"])


def test_folder_of_another_preset(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"schema": 1, "name": "x", "config": {"preset": {"rounds": 1}}}))
    with pytest.raises(UserError, match="another config"):
        fleet_merge.main(["--out", str(tmp_path), "--resume"])


@pytest.mark.slow
def test_killed_and_resumed_from_the_command_line(tmp_path):
    overrides = [f"{field.name}={getattr(TINY, field.name)}" for field in dataclasses.fields(Preset)]
    command = [sys.executable, "-m", "fleetgym", "bench", "fleet_merge", "--no-film", "--save-every", "0"]
    command += ["--override", *overrides]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def leaderboard_of(folder):
        rows = json.loads((folder / "leaderboard.json").read_text())
        return [{key: value for key, value in row.items() if key != "cpu_seconds"} for row in rows]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run([*command, "--out", str(whole)], check=True, env=environment)
    process = subprocess.Popen([*command, "--out", str(killed)], env=environment, start_new_session=True)
    while not list(killed.glob("training/seed0/*/state.safetensors")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "leaderboard.json").exists()
    subprocess.run([*command, "--out", str(killed), "--resume"], check=True, env=environment)
    assert leaderboard_of(killed) == leaderboard_of(whole)
