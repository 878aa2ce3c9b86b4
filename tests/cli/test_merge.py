import json

import numpy as np
import pytest
import torch

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.cli import main
from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.run import Run
from fleetgym.core.weights import WeightSpec


@pytest.fixture
def call(capsys):
    def call(*words):
        code = main(["merge", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def save(path, seed=0, **config):
    torch.manual_seed(seed)
    return Checkpoint.save(path, RecurrentPolicy(5, 2, **{"hidden": 12, **config})).path


@pytest.fixture
def pair(tmp_path):
    return save(tmp_path / "a", 0), save(tmp_path / "b", 1)


def refused(result, *parts):
    code, out, err = result
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert str(part) in err, err


def test_a_permuted_copy_merges_into_the_policy_itself(call, tmp_path):
    torch.manual_seed(3)
    policy = RecurrentPolicy(5, 2, hidden=12)
    spec = WeightSpec.from_module(policy)
    twin = RecurrentPolicy(5, 2, hidden=12)
    twin.load_state_dict(spec.apply(policy.state_dict(), spec.random(0)))
    a, b = Checkpoint.save(tmp_path / "a", policy).path, Checkpoint.save(tmp_path / "b", twin).path
    code, out, err = call("fleet_merge", a, b, "--out", tmp_path / "m", "--matcher", "frank_wolfe")
    assert code == 0, err
    assert "fleet_merge of 2 checkpoints of recurrent_policy" in out and "(-100.0%)" in out
    merged = Checkpoint.load(tmp_path / "m")
    observation = np.linspace(-1, 1, 5, dtype=np.float32)
    assert merged.module().predict(observation)[0] == pytest.approx(policy.predict(observation)[0], abs=1e-4)
    assert merged.info["merged"]["from"] == ["a", "b"] and merged.info["merged"]["options"] == {
        "matcher": "frank_wolfe"
    }
    assert merged.info["metrics"]["distance_after"] < 1e-6 < merged.info["metrics"]["distance_before"]
    assert str(tmp_path) not in (tmp_path / "m" / "config.json").read_text()


def test_average_of_three_and_of_a_run(call, tmp_path, pair):
    with Run.open(tmp_path / "run", {}, tensorboard=False) as run:
        torch.manual_seed(2)
        run.save_checkpoint(10, RecurrentPolicy(5, 2, hidden=12))
    code, out, err = call("average", *pair, run.path, "--out", tmp_path / "m")
    assert code == 0, err
    parts = [Checkpoint.load(path).weights["encoder.weight"] for path in (*pair, run.path / "checkpoints" / "10")]
    merged = Checkpoint.load(tmp_path / "m").weights["encoder.weight"]
    torch.testing.assert_close(merged, sum(parts) / 3)


def test_coefficients_and_no_signs(call, tmp_path, pair):
    code, _, err = call("average", *pair, "--out", tmp_path / "m", "--coefficients", "0.75", "0.25")
    assert code == 0, err
    a, b = (Checkpoint.load(path).weights["encoder.weight"] for path in pair)
    torch.testing.assert_close(Checkpoint.load(tmp_path / "m").weights["encoder.weight"], 0.75 * a + 0.25 * b)
    code, out, err = call("fleet_merge", *pair, "--out", tmp_path / "n", "--no-signs", "--matcher", "lap")
    assert code == 0, err
    assert Checkpoint.load(tmp_path / "n").info["merged"]["options"] == {"matcher": "lap", "signs": False}


def test_out_is_overwritten_on_request_only(call, tmp_path, pair):
    out = save(tmp_path / "m", 5)
    before = (out / "model.safetensors").read_bytes()
    refused(call("average", *pair, "--out", out), out, "--overwrite")
    assert (out / "model.safetensors").read_bytes() == before
    assert call("average", *pair, "--out", out, "--overwrite")[0] == 0
    assert (out / "model.safetensors").read_bytes() != before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    refused(call("average", *pair, "--out", tmp_path / "thesis", "--overwrite"), "not a checkpoint")
    assert (tmp_path / "thesis" / "a.tex").exists()


def test_one_may_be_overwritten_by_the_merge(call, tmp_path, pair):
    assert call("average", *pair, "--out", pair[0], "--overwrite")[0] == 0
    assert Checkpoint.load(pair[0]).info["merged"]["from"] == ["a", "b"]


def test_unknown_names(call, tmp_path, pair):
    refused(call("fleet_marge", *pair, "--out", tmp_path / "m"), "'fleet_marge'", "nearest: 'fleet_merge'")
    refused(
        call("fleet_merge", *pair, "--out", tmp_path / "m", "--matcher", "frankwolf"), "'frankwolf'", "'frank_wolfe'"
    )
    assert not (tmp_path / "m").exists()


def test_too_few(call, tmp_path, pair):
    refused(call("average", pair[0], "--out", tmp_path / "m"), "at least two", "got 1")
    refused(call("average", *pair, "--out", tmp_path / "m", "--coefficients", "1"), "1 numbers for 2")


@pytest.mark.parametrize(
    ("config", "part"), [({"hidden": 16}, "hidden is 16, not 12"), ({"cell": "lstm"}, "cell is 'lstm', not 'gru'")]
)
def test_other_networks_are_refused_by_name(call, tmp_path, pair, config, part):
    other = save(tmp_path / "other", **config)
    refused(call("average", *pair, other, "--out", tmp_path / "m"), other, pair[0], part)
    assert not (tmp_path / "m").exists()


def test_another_observation_layout(call, tmp_path, pair):
    other = Checkpoint.save(tmp_path / "other", RecurrentPolicy(7, 2, hidden=12)).path
    refused(call("average", pair[0], other, "--out", tmp_path / "m"), other, "observation_size is 7, not 5")


def test_another_architecture(call, tmp_path, pair):
    document = json.loads((pair[1] / "config.json").read_text())
    (pair[1] / "config.json").write_text(json.dumps({**document, "class": "transformer"}))
    refused(call("average", *pair, "--out", tmp_path / "m"), pair[1], "transformer", "recurrent_policy")


def test_other_shapes_than_the_config_says(call, tmp_path, pair):
    big = save(tmp_path / "big", hidden=16)
    document = json.loads((pair[0] / "config.json").read_text())
    digest = json.loads((big / "config.json").read_text())["weights_sha256"]
    (big / "config.json").write_text(json.dumps({**document, "weights_sha256": digest}))
    refused(call("average", pair[0], big, "--out", tmp_path / "m"), big / "model.safetensors", "[16", "[12")


def test_nan_weights(call, tmp_path, pair):
    policy = Checkpoint.load(pair[1]).module()
    with torch.no_grad():
        policy.encoder.weight[0, 0] = float("nan")
    Checkpoint.save(pair[1], policy)
    refused(call("average", *pair, "--out", tmp_path / "m"), pair[1], "'encoder.weight'", "NaN")


def test_truncated_and_missing(call, tmp_path, pair):
    refused(call("average", pair[0], tmp_path / "nowhere", "--out", tmp_path / "m"), "nowhere", "does not exist")
    refused(call("average", pair[0], tmp_path, "--out", tmp_path / "m"), tmp_path, "holds no checkpoint")
    file = pair[1] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    refused(call("average", *pair, "--out", tmp_path / "m"), file, "truncated")


def test_other_statistics_beside_the_weights(call, tmp_path, pair):
    module = Checkpoint.load(pair[1]).module()
    Checkpoint.save(pair[1], module, normaliser={"mean": torch.ones(5)})
    refused(call("average", *pair, "--out", tmp_path / "m"), pair[1], "normaliser.safetensors")


def test_a_full_disk(call, tmp_path, pair, monkeypatch):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    code, out, err = call("average", *pair, "--out", tmp_path / "m")
    assert code == 1 and err == "error: [Errno 28] No space left on device\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_word_that_does_not_fit(call, pair):
    code, out, err = call("average", *pair)
    assert code == 2 and "--out" in err and out == ""
