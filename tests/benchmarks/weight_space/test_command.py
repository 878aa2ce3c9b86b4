"""The harness of ``fleetgym bench nfn``, ``nft`` and ``unf``: settings, jobs, rows, what is written."""

import json

import pytest

from fleetgym.benchmarks.weight_space import BENCHES, TASKS, command
from fleetgym.benchmarks.weight_space.task import PRESETS, Job, settings
from fleetgym.core.errors import UserError

SMALL = ("policy.policies=60", "policy.steps=4", "policy.channels=4", "policy.width=8", "policy.probes=4")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLEETGYM_CACHE", str(tmp_path / "cache"))


def _words(out, *more):
    return ["--tasks", "policy", "--workers", "1", "--out", str(out), "--override", *SMALL, *more]


@pytest.mark.parametrize("name", TASKS.names())
@pytest.mark.parametrize("preset", PRESETS)
def test_every_task_has_settings_and_rows(name, preset):
    kind = TASKS.get(name)
    task = settings(kind, preset)
    assert kind.name == name and kind.title and kind.metric and isinstance(kind.higher, bool)
    assert len(set(task.methods())) == len(task.methods()) >= 3
    assert any(name in tasks for tasks in BENCHES.values()), "no command has it"
    with pytest.raises(UserError, match=r"unknown method 'nonsense'|nonsense"):
        task.run(Job(name, "nonsense", 0, "cpu", None))


def test_a_run_writes_all_and_goes_on(tmp_path, capsys):
    out = tmp_path / "out"
    methods = ["--methods", "statnn", "probes"]
    assert command.nfn(_words(out, *methods)) == 0
    printed = capsys.readouterr().out
    assert "| `statnn` |" in printed and "| `probes` |" in printed
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["statnn", "probes"]
    for row in rows:
        assert -1 <= row["score"] <= 1 and row["networks"] == {"train": 40, "val": 8, "test": 12}
        assert row["settings"]["steps"] == 4 and row["provenance"]["versions"]
    page = (out / "index.html").read_text()
    assert "<svg" in page and "fleetgym bench nfn --preset quick --tasks policy --seeds 0" in page
    assert not list((out / "jobs").iterdir()), "a finished job leaves its folder behind"

    with pytest.raises(UserError, match="--resume"):
        command.nfn(_words(out, *methods))
    before = (out / "rows" / "policy-statnn-0.json").read_bytes()
    assert command.nfn([*_words(out, "--methods", "statnn", "mlp"), "--resume"]) == 0
    assert (out / "rows" / "policy-statnn-0.json").read_bytes() == before, "a row that was there was made again"
    found = json.loads((out / "results.json").read_text())["rows"]
    assert [row["method"] for row in found] == ["mlp", "statnn", "probes"], "not in the order of the task's methods"
    with pytest.raises(UserError, match=r"other settings: steps 4 there and 5 now; choose another --out"):
        words = [word.replace("steps=4", "steps=5") for word in _words(out, "--methods", "statnn")]
        command.nfn([*words, "--resume"])


def test_a_seed_gives_the_same_row_again(tmp_path):
    task = settings(TASKS.get("policy"), "quick", SMALL)
    rows = [task.run(Job("policy", "nfn_hnp", 3, "cpu", tmp_path / str(i))) for i in range(2)]
    for row in rows:
        row.pop("cpu_seconds")
    assert rows[0] == rows[1]
    other = task.run(Job("policy", "nfn_hnp", 4, "cpu", tmp_path / "other"))
    assert other["loss"] != rows[0]["loss"]


def test_a_killed_job_ends_at_the_same_row(tmp_path, monkeypatch):
    from fleetgym.core.run import Run

    task = settings(TASKS.get("policy"), "quick", (*SMALL[:1], "policy.steps=20", *SMALL[2:]))
    whole = task.run(Job("policy", "probes", 0, "cpu", tmp_path / "whole"))
    saved, states = Run.save_state, []

    def dies(self, step, *arguments):
        saved(self, step, *arguments)
        states.append(step)
        if len(states) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save_state", dies)
    with pytest.raises(KeyboardInterrupt):
        task.run(Job("policy", "probes", 0, "cpu", tmp_path / "cut"))
    again = task.run(Job("policy", "probes", 0, "cpu", tmp_path / "cut"))
    assert states[3] > states[2], "it began anew"
    for row in (whole, again):
        row.pop("cpu_seconds")
    assert whole == again


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "polcy"], "unknown weight-space task 'polcy'; nearest: 'policy'"),
        (["--preset", "huge"], "unknown preset 'huge'"),
        (["--methods", "nfm_np"], "unknown method 'nfm_np'; nearest: 'nfn_np'"),
        (["--override", "policy.stepz=3"], "unknown setting of the task 'policy' 'stepz'; nearest: 'steps'"),
        (["--override", "policy.steps"], "policy.FIELD=VALUE is wanted, such as policy.steps="),
        (["--override", "policy.steps=many"], "policy.steps=many: steps takes a int"),
        (["--override", "policy.steps=0"], "policy.steps=0: it must be at least 1"),
        (["--override", "policy.signs=some"], "unknown setting of policy.signs 'some'"),
        (["--override", "policy.policies=3"], "at least 30"),
        (["--override", "rnn.steps=3"], "unknown task in --override rnn.steps=3"),
        (["--seeds"], "--seeds is empty"),
        (["--workers", "-1"], "--workers -1: 0 (one for each core) or more"),
    ],
)
def test_bad_words_are_errors_before_work(tmp_path, words, message):
    base = [] if "--tasks" in words else ["--tasks", "policy"]
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        command.nfn([*base, "--out", str(tmp_path / "out"), *words])
    assert not (tmp_path / "cache").exists(), "a zoo was made before the words were checked"


def test_a_diverged_row_is_said(tmp_path):
    rows = tmp_path / "rows"
    rows.mkdir()
    base = {"task": "optimizer_mlp", "settings": {}, "parameters": 2}
    for seed, score in enumerate((0.5, None)):
        row = {**base, "method": "sgdm", "seed": seed, "score": score}
        (rows / f"optimizer_mlp-sgdm-{seed}.json").write_text(json.dumps(row))
    text = command.table(command.load(tmp_path))
    assert "| `sgdm` |  | 0.500, diverged |" in text
    with pytest.raises(UserError, match="holds no rows"):
        command.load(tmp_path / "rows")
