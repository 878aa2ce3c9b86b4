import json

import pytest

from fleetgym.agents.networks import RecurrentPolicy
from fleetgym.cli import main
from fleetgym.core.checkpoint import Checkpoint
from fleetgym.core.records import EvalRecord
from fleetgym.core.run import Run


def call(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def facts(capsys, *words):
    code, out, err = call(capsys, "info", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_list_everything(capsys):
    code, out, _ = call(capsys, "list")
    assert code == 0
    for name in ("MetaWorld/reach-v3", "meta_world", "recurrent_policy", "fleet_merge", "average"):
        assert f"  {name}\n" in out
    found = json.loads(call(capsys, "list", "--json")[1])
    assert list(found) == ["envs", "suites", "agents", "mergers", "benchmarks"]
    assert len([name for name in found["envs"] if name.startswith("MetaWorld/") and name.endswith("-v3")]) == 50


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("envs", "MetaWorld/MT10"),
        ("suites", "meta_world"),
        ("agents", "recurrent_policy"),
        ("mergers", "average"),
        ("benchmarks", "fleet_merge"),
    ],
)
def test_list_one_kind(capsys, kind, name):
    code, out, _ = call(capsys, "list", kind)
    assert code == 0 and name in out.splitlines()


def test_list_of_an_unknown_kind(capsys):
    code, _, err = call(capsys, "list", "agentz")
    assert code == 2 and err.startswith("error: unknown kind 'agentz'; nearest: 'agents', ") and err.count("\n") == 1


def test_info_of_an_environment(capsys):
    found = facts(capsys, "MetaWorld/reach-v3")
    assert found["kind"] == "environment" and found["observation"] == "Box(39,), float64, -10 to 10"
    assert found["action"] == "Box(4,), float32, -1 to 1"
    assert found["max steps"] == 500 and "rgb_array" in found["render modes"]
    code, out, _ = call(capsys, "info", "MetaWorld/reach-v3")
    assert code == 0 and "gymnasium.make('MetaWorld/reach-v3')" in out


def test_info_of_a_vector_environment(capsys):
    assert facts(capsys, "MetaWorld/MT10")["make"] == "gymnasium.make_vec('MetaWorld/MT10')"


def test_info_of_names(capsys):
    suite = facts(capsys, "meta_world")
    assert suite["kind"] == "suite" and len(suite["tasks"]) == 50 and suite["splits"]["mt10"] == 10
    task = facts(capsys, "reach-v3")
    assert task["kind"] == "task" and task["suite"] == "meta_world" and task["environment"] == "MetaWorld/reach-v3"
    assert task["instruction"] and task["horizon"] > 0 and "mt10" in task["splits"]
    assert facts(capsys, "recurrent_policy")["signature"].startswith("recurrent_policy(observation_size, ")
    merger = facts(capsys, "fleet_merge")
    assert merger["kind"] == "merger" and "matcher='frank_wolfe'" in merger["signature"]
    assert merger["also"] == ["benchmarks/fleet_merge"]
    assert facts(capsys, "benchmarks/fleet_merge")["kind"] == "benchmark"
    assert facts(capsys, "speed")["kind"] == "benchmark"


def test_info_of_a_checkpoint(capsys, tmp_path):
    path = tmp_path / "policy"
    Checkpoint.save(path, RecurrentPolicy(5, 2, hidden=8), info={"metrics": {"success": 0.5}})
    found = facts(capsys, path)
    assert found["kind"] == "checkpoint" and found["config.hidden"] == 8 and found["metrics"] == {"success": 0.5}
    assert found["finite"] == "yes" and found["provenance"]["python"]
    code, out, _ = call(capsys, "info", path)
    assert code == 0 and "recurrent_policy" in out and "success=0.5" in out


def test_info_of_a_run_and_a_record(capsys, tmp_path):
    with Run.open(tmp_path / "run", {"lr": 0.1}, tensorboard=False) as run:
        run.log(7, loss=0.25)
        record = run.record(EvalRecord("joint", "reach-v3", [1, 2], [True, False], [1.0, 2.0], [3, 4]))
        assert facts(capsys, run.path)["checkpoint"] == "none"
        run.save_checkpoint(7, RecurrentPolicy(5, 2, hidden=8))
    before = sorted(path.name for path in run.path.iterdir())
    found = facts(capsys, run.path)
    assert found["kind"] == "run" and found["config.lr"] == 0.1 and found["last metrics"] == {"step": 7, "loss": 0.25}
    assert found["checkpoint"].endswith("run/checkpoints/7")
    assert found["joint on reach-v3"].startswith("0.500 [")
    assert sorted(path.name for path in run.path.iterdir()) == before
    assert facts(capsys, record)["success"].endswith("of 2 episodes")


def test_info_of_nothing(capsys, tmp_path):
    code, out, err = call(capsys, "info", "reech-v3")
    assert (code, out) == (2, "") and err.count("\n") == 1 and "'reach-v3'" in err and err.count("'") == 8
    code, _, err = call(capsys, "info", "mergers/fleetmerge")
    assert code == 2 and err.startswith("error: unknown merger 'fleetmerge'; nearest: 'fleet_merge'")
    code, _, err = call(capsys, "info", tmp_path)
    assert code == 2 and "neither a checkpoint's nor a run's folder" in err and err.count("\n") == 1
    (tmp_path / "a.json").write_text("{}")
    code, _, err = call(capsys, "info", tmp_path / "a.json")
    assert code == 2 and "not an evaluation record" in err and err.count("\n") == 1
    (tmp_path / "config.json").write_text("{")
    code, _, err = call(capsys, "info", tmp_path)
    assert code == 2 and "config.json is not valid JSON" in err and err.count("\n") == 1


def test_words_that_do_not_fit(capsys):
    for words in (["info"], ["info", "a", "b"], ["list", "--nonsense"]):
        code, out, err = call(capsys, *words)
        assert code == 2 and out == "" and f"fleetgym {words[0]}" in err
