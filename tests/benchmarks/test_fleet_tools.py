"""Fleets whose robots have a tool each: who has which, what policies are told, what is measured besides."""

import json

import numpy as np
import pytest

from fleetgym.benchmarks import fleet_merge, leaderboard
from fleetgym.benchmarks.fleet_jobs import FURTHER
from fleetgym.benchmarks.fleet_merge import Fleet, Job, Preset, preset_from
from fleetgym.benchmarks.fleet_tools import main
from fleetgym.benchmarks.fleet_worlds import Place
from fleetgym.core import Demonstrations, EvalRecord, UserError
from fleetgym.core.render import choose_gl

TINY = Preset(
    suite="fleet_tools", tasks="Hammer,Knife", robots_per_task=2, demonstrations=2, noise=0.02, hidden=8, warmup=2,
    local_steps=2, rounds=2, episodes=2, max_steps=8, curve_points=1, curve_episodes=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tools")
    for data in TINY.world.datasets(TINY):
        fleet_merge.collect_task(TINY, str(folder), 0, data.name)
    return folder


def silent(*_):
    pass


def test_each_robot_has_a_tool_of_its_own(folder):
    fleet = Fleet(TINY, folder, 0)
    assert fleet.robots == [("Hammer",), ("Hammer",), ("Knife",), ("Knife",)]
    assert [fleet.own(robot) for robot in range(4)] == [
        [Place(task, task, task, (("tool", tool),))] for task in ("Hammer", "Knife") for tool in (0, 1)
    ]
    # The opening of the fingers tells the tools apart, and is the same throughout a robot's data.
    openings = [batch.observations[..., 13][batch.mask].unique() for batch in fleet.data]
    assert all(len(opening) == 1 for opening in openings) and openings[0] != openings[1]
    assert fleet.data[2].observations[..., 27:][fleet.data[2].mask].unique(dim=0).tolist() == [[0, 1]]
    first = [Demonstrations.load(folder / "training/seed0/demonstrations" / f"Hammer-tool{tool}")[0] for tool in (0, 1)]
    assert first[0].seed != first[1].seed


def test_rows_and_what_no_robot_has_met(folder):
    for kind in ("alone", "average_rounds", "fleet_merge_rounds", "joint"):
        fleet_merge.run_job(Job(kind, 0, TINY, str(folder)), silent)
    fleet_merge.publish(folder, TINY, "tools_quick", [0], make_film=False)
    rows = {row["method"]: row for row in json.loads((folder / "leaderboard.json").read_text())}
    assert set(rows) == set(fleet_merge.METHODS)
    assert set(rows["joint"]["per_task"]) == {"Hammer", "Knife"}
    further = {row["method"]: row for row in leaderboard.build(folder / FURTHER)}
    assert set(further) == set(rows) - {"alone_own"}
    cross = {place.made for place in TINY.world.further(TINY)} - {"Hammer", "Knife"}
    assert {"WrenchForHammer", "SpatulaForHammer"} <= cross
    assert set(further["joint"]["per_task"]) == {"Hammer, new tools", "Knife, new tools", *cross}
    assert "fleetgym bench fleet_tools --preset quick" in (folder / "leaderboard.md").read_text()
    record = EvalRecord.load(fleet_merge.record_path(folder, "joint", 0))
    assert record.task == "fleet_tools/Hammer,Knife" and len(record.seeds) == 4


def test_what_a_policy_is_told_on_a_cross_task():
    place = next(place for place in TINY.world.further(TINY) if place.made == "WrenchForHammer")
    assert place.task == "Hammer"
    env = TINY.world.evaluation(TINY, place)
    observation, _ = env.reset(seed=0)
    assert env.unwrapped.tool_kind == "wrench" and env.observation_space.contains(observation)
    np.testing.assert_array_equal(observation[27:], [1, 0])
    new = TINY.world.further(TINY)[0]
    env = TINY.world.evaluation(TINY, new)
    assert all(env.reset(seed=seed)[1]["tool"] >= 6 for seed in range(4))


def test_policies_may_see_points():
    preset = preset_from("tools_quick", ["observation=points", "points=32"])
    env = preset.world.evaluation(preset, preset.world.places(preset, ["Knife"])[0])
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation)
    assert observation["points"].shape == (4, 32) and observation["state"].shape == (15 + 2,)
    assert sorted(np.unique(observation["points"][3], return_counts=True)[1].tolist()) == [16, 16]


@pytest.mark.skipif(choose_gl() == "disable", reason="no OpenGL here")
def test_policies_may_see_pictures():
    preset = preset_from("tools_quick", ["observation=image", "image_size=24"])
    env = preset.world.evaluation(preset, preset.world.places(preset, ["Knife"])[0])
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation) and set(observation) == {"state", "pixels"}
    assert observation["pixels"].shape == (24, 24, 3) and observation["pixels"].std() > 5
    env.close()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        (["observation=imag"], "nearest: 'image'"),
        (["robots_per_task=7"], "a tool of its own, and 6 are for training"),
        (["tasks=Hamer"], "Hammer"),
        (["suite=fleet_tool"], "fleet_tools"),
        (["points=0"], "points=0"),
    ],
)
def test_bad_input(override, words):
    with pytest.raises(UserError, match=words):
        preset_from("tools_quick", override).check()


def test_unknown_presets_name_the_commands_own():
    with pytest.raises(UserError, match="unknown preset 'mt50'") as raised:
        main(["--preset", "mt50"])
    assert "quick" in str(raised.value) and "tools_" not in str(raised.value)
