"""Fleet merging on pictures: demonstrations, the rows, that a stopped run goes on to the same result, no OpenGL."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from fleetgym.agents.networks import ImagePolicy
from fleetgym.benchmarks import fleet_merge
from fleetgym.benchmarks.fleet_merge import Job, Preset, preset_from
from fleetgym.benchmarks.fleet_worlds import PROPRIOCEPTION, Place
from fleetgym.core import Checkpoint, Demonstrations, EvalRecord, UserError
from fleetgym.core.render import BACKENDS, choose_gl
from fleetgym.envs import suite

TINY = Preset(
    observation="image", image_size=20, tasks="reach-v3,door-close-v3", robots_per_task=1, demonstrations=2, hidden=8,
    warmup=2, local_steps=1, rounds=2, episodes=1, max_steps=5, curve_points=1, curve_episodes=1, line_points=2,
)  # fmt: skip

draws = pytest.mark.skipif(choose_gl() not in BACKENDS, reason="no OpenGL here that renders without a screen")


def silent(*_):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fleet")
    for task in TINY.task_names:
        fleet_merge.collect_task(TINY, str(folder), 0, task)
    return folder


@draws
def test_demonstrations_are_those_of_the_state_case_with_their_pictures(folder, tmp_path):
    plain = dataclasses.replace(TINY, observation="state")
    fleet_merge.collect_task(plain, str(tmp_path), 0, "reach-v3")
    blind, seen = (
        Demonstrations.load(fleet_merge.demonstrations_path(place, 0, "reach-v3")) for place in (tmp_path, folder)
    )
    assert len(blind) == len(seen) >= 2
    for one, other in zip(blind, seen):
        np.testing.assert_array_equal(one.observations, other.observations["state"])
        np.testing.assert_array_equal(one.actions, other.actions)
    # The first picture is that of the environment, drawn again.
    env = suite("meta_world").make("reach-v3", "rgb_array", goals="train", render_size=(20, 20), camera_name="table")
    env.reset(seed=seen[0].seed)
    frames = seen[0].observations["pixels"]
    np.testing.assert_array_equal(env.render(), frames[0])
    assert frames.dtype == np.uint8 and frames.std() > 10 and (frames[0] != frames[-1]).any()
    env.close()


@draws
def test_what_a_policy_sees(folder):
    fleet = fleet_merge.Fleet(TINY, folder, 0)
    batch = fleet.data[1]
    assert batch.sights.shape[2:] == (20, 20, 3) and batch.sights.dtype == torch.uint8
    assert batch.observations.shape[-1] == PROPRIOCEPTION + 2  # nothing of objects or goals
    assert batch.observations[..., PROPRIOCEPTION:][batch.mask].unique(dim=0).tolist() == [[0, 1]]
    assert len(fleet.statistics.mean) == PROPRIOCEPTION + 2
    env = TINY.world.evaluation(TINY, Place("door", "door-close-v3", "door-close-v3"))
    observation, _ = env.reset(seed=3)
    assert env.observation_space.contains(observation)
    whole = env.unwrapped.simulation._get_curr_obs_combined_no_goal()
    np.testing.assert_array_equal(observation["state"], [*whole[:PROPRIOCEPTION], 0, 1])
    env.close()
    steps = sum(int(one.mask.sum()) for one in fleet.data) / 2
    assert fleet.data_bytes == round(steps * (4 * (PROPRIOCEPTION + 4) + 20 * 20 * 3))


class Stop(Exception):
    pass


@draws
def test_rows_and_a_stopped_job_goes_on_to_the_same_result(folder):
    results = {}
    fleet_merge.run_job(Job("alone", 0, TINY, str(folder)), silent)
    for attempt in range(2):

        def report(name, done, total, words, stopping=attempt == 1):
            if stopping and done > TINY.warmup:
                raise Stop

        job = Job("fleet_merge_rounds", 0, TINY, str(folder), save_every=0.0)
        if attempt:
            with pytest.raises(Stop):
                fleet_merge.run_job(job, report)
        fleet_merge.run_job(job, silent)
        path = fleet_merge.record_path(folder, "fleet_merge_rounds", 0)
        record = EvalRecord.load(path)
        weights = folder / "training" / "seed0" / "fleet_merge_rounds"
        results[attempt] = ((weights / "checkpoints/last/model.safetensors").read_bytes(), record.returns)
        if not attempt:
            path.unlink()
            weights.rename(folder / "first")
    assert results[0] == results[1]
    first, *_ = record.metrics["merges"]
    assert first["distance_after"] < first["distance_before"] and first["norm_factor"] > 1.1
    merged = Checkpoint.load(weights / "checkpoints" / "last").module()
    assert isinstance(merged, ImagePolicy) and merged.config["image_size"] == 20
    parameters = sum(p.numel() for p in merged.parameters())
    assert record.metrics["bytes_sent"] == 8 * (2 * (PROPRIOCEPTION + 2) + 1) + 4 * parameters * (TINY.rounds + 1)
    fleet_merge.publish(folder, TINY, "quick_image", [0], make_film=False)
    assert "picture of 20 x 20 pixels" in (folder / "leaderboard.md").read_text() + (folder / "extras.json").read_text()


def test_presets_that_cannot_be():
    with pytest.raises(UserError, match="unknown observation 'images'; nearest: 'image'"):
        preset_from("quick", ["observation=images"])
    with pytest.raises(UserError, match="image_size=8: the convolutions need"):
        preset_from("quick_image", ["image_size=8"])


def test_without_opengl_it_is_said_before_any_work(tmp_path):
    command = [sys.executable, "-m", "fleetgym", "bench", "fleet_merge", "--preset", "quick_image"]
    environment = {**os.environ, "MUJOCO_GL": "disable", "OMP_NUM_THREADS": "1"}
    environment.pop("PYOPENGL_PLATFORM", None)
    result = subprocess.run(
        [*command, "--out", str(tmp_path / "out")], env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 2 and not (tmp_path / "out").exists()
    words = " ".join(result.stderr.split())
    assert "observation=image: cannot draw pictures" in words and "use observation=state" in words
