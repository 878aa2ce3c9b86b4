import json
import time

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from gymnasium import spaces

from fleetgym.core.demonstrations import Demonstrations, Statistics
from fleetgym.core.errors import UserError
from fleetgym.core.policy import FunctionPolicy
from fleetgym.core.rollout import Episode, collect, rollout

SWING = FunctionPolicy(lambda o: np.array([-3.0 * o[1] - o[2]]), spaces.Box(-2.0, 2.0, (1,), np.float32))


def episode(length, seed=0, size=3, actions=2, success=True):
    rng = np.random.default_rng([seed, length])
    end = np.zeros(length, bool)
    end[-1] = True
    return Episode(
        seed=seed,
        observations=rng.normal(size=(length + 1, size)),
        actions=rng.normal(size=(length, actions)).astype(np.float32),
        rewards=rng.normal(size=length),
        terminations=np.zeros(length, bool),
        truncations=end,
        success=success,
        infos={"success": end & success},
    )


@pytest.fixture
def demos():
    return Demonstrations([episode(5, 0), episode(9, 1, success=False), episode(2, 2)], info={"task": "toy"})


@pytest.fixture
def minari_root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


def equal(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
            assert getattr(x, name).dtype == getattr(y, name).dtype
        assert (x.seed, x.success) == (y.seed, y.success)
        np.testing.assert_array_equal(x.infos["success"], y.infos["success"])


# -- on disk -----------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path, demos):
    assert demos.save(tmp_path / "toy") == tmp_path / "toy"
    again = Demonstrations.load(tmp_path / "toy")
    equal(demos, again)
    assert again.info == {"task": "toy"} and again.observation_space == demos.observation_space
    assert Demonstrations.load(str(tmp_path / "toy"), dtype="float32")[0].observations.dtype == np.float32
    assert sorted(p.name for p in tmp_path.joinpath("toy").iterdir()) == ["data"]
    assert sorted(p.name for p in tmp_path.joinpath("toy/data").iterdir()) == ["main_data.hdf5", "metadata.json"]


@pytest.mark.filterwarnings("error")
def test_minari_reads_what_is_written(minari_root):
    made = collect(
        SWING,
        "Pendulum-v1",
        [4, 8],
        dataset="minari:fleet/pendulum/expert-v0",
        keep="all",
        max_steps=20,
        instruction="swing up",
        expert="damping",
    )
    assert made.path == minari_root / "fleet" / "pendulum" / "expert-v0"
    assert list(minari.list_local_datasets()) == ["fleet/pendulum/expert-v0"]
    dataset = minari.load_dataset("fleet/pendulum/expert-v0")
    assert dataset.total_episodes == 2 and dataset.total_steps == 40 and dataset.spec.namespace == "fleet/pendulum"
    for ours, theirs in zip(made, dataset.iterate_episodes()):
        for name in ("observations", "actions", "rewards", "terminations", "truncations"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    attributes = list(dataset.storage.get_episode_metadata([0, 1]))
    assert [a["seed"] for a in attributes] == [4, 8] and not attributes[0]["success"]
    assert dataset.storage.metadata["algorithm_name"] == "damping"
    env = dataset.recover_environment()
    observation, _ = env.reset(seed=8)
    np.testing.assert_array_equal(observation, made[1].observations[0])
    np.testing.assert_array_equal(env.step(made[1].actions[0])[0], made[1].observations[1])
    env.close()
    equal_to = Demonstrations.load("fleet/pendulum/expert-v0")
    assert equal_to.env_spec.id == "Pendulum-v1" and equal_to.info["instruction"] == "swing up"


def test_a_folder_is_a_minari_dataset_wherever_it_lies(tmp_path, demos):
    demos.save(tmp_path / "my demos")
    dataset = minari.MinariDataset(tmp_path / "my demos" / "data")
    assert dataset.id == "my-demos-v0" and len(dataset) == 3
    np.testing.assert_array_equal(dataset[1].infos["success"], [False] * 10)  # T+1: one for reset()


def test_a_dataset_of_minari_itself_loads(minari_root):
    with pytest.warns(UserWarning):
        minari.create_dataset_from_buffers(
            "other/cart-v0",
            [
                minari.data_collector.EpisodeBuffer(
                    seed=3,
                    observations=np.zeros((4, 4), np.float32),
                    actions=np.array([0, 1, 1]),
                    rewards=[1.0, 1.0, 1.0],
                    terminations=[False, False, True],
                    truncations=[False, False, False],
                    infos={"is_success": np.array([False, True, False, False])},
                )
            ],
            env="CartPole-v1",
        )
    demos = Demonstrations.load("other/cart-v0")
    assert demos[0].seed == 3 and demos[0].success and demos.env_spec.id == "CartPole-v1"
    assert demos.padded().actions.dtype == torch.int64
    with pytest.raises(UserError, match=r"cart-v0.*Discrete\(2\).*size 4"):
        demos.expect(4, 4)
    with pytest.raises(UserError, match="size 39"):
        demos.expect(39)
    assert demos.expect(4) is demos


def test_dict_observations_and_texts_survive(tmp_path):
    one = episode(3)
    one.observations = {"x": np.arange(8.0).reshape(4, 2), "word": np.array(list("abcd"), dtype=object)}
    space = spaces.Dict({"x": spaces.Box(-9, 9, (2,), np.float64), "word": spaces.Text(5)})
    Demonstrations([one], observation_space=space).save(tmp_path / "dicts")
    again = Demonstrations.load(tmp_path / "dicts")
    np.testing.assert_array_equal(again[0].observations["x"], one.observations["x"])
    assert list(again[0].observations["word"]) == list("abcd")
    with pytest.raises(UserError, match="flatten"):
        again.padded()


def test_pictures_come_back_bit_for_bit(tmp_path):
    one = episode(3)
    one.observations = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)
    Demonstrations([one], observation_space=spaces.Box(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "pictures")
    np.testing.assert_array_equal(Demonstrations.load(tmp_path / "pictures")[0].observations, one.observations)


def test_overwriting_is_asked_for_and_spares_what_else_lies_there(tmp_path, demos):
    demos.save(tmp_path / "toy")
    (tmp_path / "toy" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        demos.save(tmp_path / "toy")
    demos[:1].save(tmp_path / "toy", overwrite=True)
    assert len(Demonstrations.load(tmp_path / "toy")) == 1
    assert sorted(p.name for p in tmp_path.joinpath("toy").iterdir()) == ["data", "notes.txt"]
    (tmp_path / "foreign" / "data").mkdir(parents=True)
    with pytest.raises(UserError, match="no dataset"):
        demos.save(tmp_path / "foreign", overwrite=True)


def test_a_failed_write_leaves_the_old_dataset(tmp_path, demos, monkeypatch):
    from minari.dataset._storages.hdf5_storage import HDF5Storage

    demos.save(tmp_path / "toy")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HDF5Storage, "update_episode_metadata", full)
    for name in ("toy", "new"):
        with pytest.raises(OSError, match="No space"):
            demos[:1].save(tmp_path / name, overwrite=True)
    assert len(Demonstrations.load(tmp_path / "toy")) == 3 and not (tmp_path / "new").exists()
    assert [p.name for p in (tmp_path / "toy").iterdir()] == ["data"]


def test_broken_datasets_are_named(tmp_path, demos, minari_root):
    with pytest.raises(UserError, match="nowhere.*neither"):
        Demonstrations.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no dataset"):
        Demonstrations.load(tmp_path)
    with pytest.raises(UserError, match="looks like"):
        demos.save("minari:no version")
    with pytest.raises(UserError, match="gone-v0"):
        Demonstrations.load("minari:gone-v0")
    demos.save(tmp_path / "toy")
    data = tmp_path / "toy" / "data"
    whole = (data / "main_data.hdf5").read_bytes()
    for size in (0, 100, len(whole) // 2, len(whole) - 1):
        (data / "main_data.hdf5").write_bytes(whole[:size])
        with pytest.raises(UserError, match="toy.*truncated"):
            Demonstrations.load(tmp_path / "toy")
    (data / "main_data.hdf5").write_bytes(whole)
    metadata = json.loads((data / "metadata.json").read_text())
    for change, message in [
        ({"total_episodes": 0}, "toy is empty"),
        ({"total_episodes": 4}, "toy.*cannot be read"),
        ({"data_format": "parchment"}, "toy.*cannot be read"),
        ({"fleetgym": {"schema": 99}}, "toy.*schema 99"),
    ]:
        (data / "metadata.json").write_text(json.dumps({**metadata, **change}))
        with pytest.raises(UserError, match=message):
            Demonstrations.load(tmp_path / "toy")
    (data / "metadata.json").write_text("{")
    with pytest.raises(UserError, match="toy.*cannot be read"):
        Demonstrations.load(tmp_path / "toy")


def test_bad_episodes_are_named():
    with pytest.raises(UserError, match="empty"):
        Demonstrations([])
    wrong = episode(4)
    wrong.actions = wrong.actions[:3]
    with pytest.raises(UserError, match="episode 1.*5 observations, 3 actions and 4 rewards"):
        Demonstrations([episode(4), wrong])
    bare = episode(4)
    bare.observations = None
    with pytest.raises(UserError, match="record=True"):
        Demonstrations([bare])
    holed = episode(4)
    holed.observations[2, 1] = np.nan
    with pytest.raises(UserError, match="episode 1.*observation that is not finite"):
        Demonstrations([episode(4), holed]).padded()
    with pytest.raises(UserError, match="JSON"):
        Demonstrations([episode(4)], info={"x": object()}).save("never")


def test_a_thousand_episodes_in_seconds(tmp_path):
    many = Demonstrations([episode(100, seed, size=39, actions=4) for seed in range(1000)])
    begin = time.process_time()
    many.save(tmp_path / "many")
    again = Demonstrations.load(tmp_path / "many", dtype="float32")
    assert again.padded().observations.shape == (1000, 100, 39)
    assert time.process_time() - begin < 15  # measured: 3


# -- statistics --------------------------------------------------------------------------------------------------------


def test_statistics_are_of_the_observations_acted_on(demos):
    seen = np.concatenate([e.observations[:-1] for e in demos])
    statistics = demos.statistics()
    np.testing.assert_allclose(statistics.mean, seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, seen.std(0), rtol=1e-12)
    assert statistics.count == 16
    assert demos.statistics("actions").mean.shape == (2,)
    assert demos.statistics(transform=lambda x: x[:, :1] - x[:, 1:2]).mean.shape == (1,)


def test_pooling_is_exact():
    rng = np.random.default_rng(0)
    parts = [rng.normal(100.0 * i, 0.01 + i, size=(7 + 50 * i, 4)) for i in range(5)]
    pooled, whole = Statistics.pool(map(Statistics.of, parts)), Statistics.of(np.concatenate(parts))
    np.testing.assert_allclose(pooled.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(pooled.variance, whole.variance, rtol=1e-12)
    assert pooled.count == whole.count
    with pytest.raises(UserError, match="shapes"):
        Statistics.pool([Statistics.of(np.zeros((2, 3))), Statistics.of(np.zeros((2, 4)))])
    with pytest.raises(UserError, match="at least one"):
        Statistics.pool([])


def test_a_dimension_that_hardly_varies_keeps_its_unit():
    values = np.stack([np.full(10, 0.3), np.full(10, 1e6) + np.arange(10) * 1e-2, np.arange(10.0)], axis=1)
    std = Statistics.of(values).std
    assert std[0] == 1.0 and std[1] == 1.0 and std[2] == pytest.approx(np.arange(10.0).std())
    # Constant in each part, but not over all: pooling sees it because the parts keep their true variance.
    pooled = Statistics.pool([Statistics.of(np.full((5, 1), x)) for x in (0.0, 2.0)])
    assert pooled.std[0] == 1.0 and pooled.variance[0] == 1.0


def test_statistics_travel_as_tensors(demos, tmp_path):
    from safetensors.torch import load_file, save_file

    statistics = demos.statistics()
    save_file(statistics.to_tensors(), tmp_path / "normaliser.safetensors")
    again = Statistics.from_tensors(load_file(tmp_path / "normaliser.safetensors"))
    np.testing.assert_array_equal(again.mean, statistics.mean)
    np.testing.assert_array_equal(again.std, statistics.std)
    assert again.count == statistics.count
    with pytest.raises(UserError, match="variance"):
        Statistics.from_tensors({"mean": torch.zeros(3), "count": torch.tensor(1), "floor": torch.tensor(0.1)})


# -- batches -----------------------------------------------------------------------------------------------------------


def test_padded_holds_every_episode(demos):
    batch = demos.padded()
    assert batch.observations.shape == (3, 9, 3) and batch.actions.shape == (3, 9, 2)
    assert batch.observations.dtype == batch.actions.dtype == torch.float32 and batch.mask.dtype == torch.bool
    assert batch.mask.sum(1).tolist() == [5, 9, 2]
    for row, one in enumerate(demos):
        np.testing.assert_array_equal(batch.observations[row, : len(one)], one.observations[:-1].astype(np.float32))
        np.testing.assert_array_equal(batch.actions[row, : len(one)], one.actions)
        assert not batch.observations[row, len(one) :].any() and not batch.actions[row, len(one) :].any()


def test_whole_episodes_once_an_epoch(demos):
    batches = list(demos.batches(2, rng=0, epochs=2))
    assert [len(b) for b in batches] == [2, 1, 2, 1]
    for epoch in (batches[:2], batches[2:]):
        assert sorted(n for b in epoch for n in b.mask.sum(1).tolist()) == [2, 5, 9]
        assert all(b.mask.shape[1] == b.mask.sum(1).max() for b in epoch)
    assert [len(b) for b in demos.batches(2, epochs=1, drop_last=True)] == [2]


def test_windows_are_pieces_of_episodes(demos):
    batches = demos.batches(4, length=3, rng=1)
    seen = set()
    for _ in range(100):
        batch = next(batches)
        assert batch.mask.shape[1] == 3 and batch.observations.shape[1:] == (3, 3)
        for observations, actions, mask in zip(batch.observations, batch.actions, batch.mask):
            n = int(mask.sum())
            matches = [
                (i, t)
                for i, one in enumerate(demos)
                for t in range(len(one) - n + 1)
                if np.array_equal(one.actions[t : t + n], actions[:n])
                and np.array_equal(one.observations[t : t + n].astype(np.float32), observations[:n])
            ]
            assert len(matches) == 1 and n == min(3, len(demos[matches[0][0]]))
            assert not actions[n:].any()
            seen.add(matches[0])
    assert seen == {(0, t) for t in range(3)} | {(1, t) for t in range(7)} | {(2, 0)}
    assert sum(len(b) for b in demos.batches(4, length=3, epochs=1)) == 6  # 16 steps fill 6 windows


def test_batches_follow_their_generator(demos):
    def first(rng, length):
        stream = demos.batches(2, length, rng)
        return torch.cat([next(stream).observations.flatten() for _ in range(5)])

    for length in (None, 4):
        assert torch.equal(first(3, length), first(np.random.default_rng(3), length))
        assert not torch.equal(first(3, 4), first(4, 4))


def test_batches_refuse_nonsense_at_once(demos):
    for options, message in [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 2, "length": 0}, "length=0"),
        ({"batch_size": 4, "drop_last": True}, "leaves nothing"),
    ]:
        with pytest.raises(UserError, match=message):
            demos.batches(**options)


# -- as a collection ---------------------------------------------------------------------------------------------------


def test_filter_slice_concatenate(demos):
    solved = demos.filter(lambda e: e.success)
    assert [e.seed for e in solved] == [0, 2] and solved.info == demos.info
    both = Demonstrations.concatenate([demos[1:], solved])
    assert [e.seed for e in both] == [1, 2, 0, 2] and both.info["parts"][0] == {"task": "toy"}
    assert both.steps == 9 + 2 + 5 + 2 and "4 episodes" in repr(both)
    with pytest.raises(UserError, match="keeps none"):
        demos.filter(lambda e: False)
    with pytest.raises(UserError, match="dataset 1 has the observation space"):
        Demonstrations.concatenate([demos, Demonstrations([episode(3, size=4)])])


def test_map_gives_each_episode_its_own_generator(demos):
    def jitter(one, rng):
        for _ in range(2):
            noise = rng.normal(size=one.observations.shape)
            yield Episode(one.seed, one.observations + noise, *_rest(one))

    twice = demos.map(jitter, seed=5)
    assert len(twice) == 6 and twice.info == demos.info
    again = demos.map(jitter, seed=5)
    np.testing.assert_array_equal(twice[4].observations, again[4].observations)
    noise = np.random.default_rng([5, 2]).normal(size=(3, 3))
    np.testing.assert_array_equal(twice[4].observations, demos[2].observations + noise)
    wider = demos.map(lambda one, rng: Episode(one.seed, np.tile(one.observations, 2), *_rest(one)))
    assert wider.observation_space.shape == (6,)


def _rest(one):
    return one.actions, one.rewards, one.terminations, one.truncations, one.success, one.infos


def test_create_takes_spaces_from_the_environment(tmp_path):
    env = gym.make("Pendulum-v1")
    made = Demonstrations.create(tmp_path / "p", [episode(3, size=3, actions=1)], "Pendulum-v1")
    assert made.action_space == env.action_space and made.info["env_id"] == "Pendulum-v1"
    assert Demonstrations.load(tmp_path / "p").action_space == env.action_space


def test_relative_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    episode = rollout(FunctionPolicy(lambda obs: np.zeros(1, np.float32)), "Pendulum-v1", [0], max_steps=3)
    Demonstrations(episode).save("some/where")
    assert Demonstrations.load("some/where").steps == 3
