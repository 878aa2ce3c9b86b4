import json
import math
import platform
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fleetgym.core import records
from fleetgym.core.errors import UserError
from fleetgym.core.records import EvalRecord, command_line, provenance, wilson_interval


def example(**changes):
    values = dict(system="joint", task="reach-v3", seeds=[1, 2, 3], successes=[True, False, True])
    values |= dict(returns=[1.5, -2.0, 3.25], lengths=[10, 500, 20], metrics={"bytes": 7})
    return EvalRecord(**{**values, **changes})


@pytest.mark.parametrize(
    ("k", "n", "low", "high"),
    # R: binom::binom.wilson, or prop.test(k, n, correct=FALSE)
    [(0, 10, 0.0, 0.2775328), (10, 10, 0.7224672, 1.0), (8, 10, 0.4901625, 0.9433178), (50, 100, 0.4038315, 0.5961685)],
)
def test_wilson_interval(k, n, low, high):
    assert wilson_interval(k, n, z=1.959964) == pytest.approx((low, high), abs=1e-6)


def test_wilson_interval_at_the_edges():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    for k, n in ((-1, 3), (4, 3)):
        with pytest.raises(UserError, match=f"{k} successes of {n}"):
            wilson_interval(k, n)


def test_a_record_survives_its_file(tmp_path):
    record = example()
    again = EvalRecord.load(record.save(tmp_path / "r.json"))
    assert again == record
    assert again.success == pytest.approx(2 / 3)
    assert again.interval() == wilson_interval(2, 3)
    assert json.loads((tmp_path / "r.json").read_text())["successes"] == [True, False, True]


def test_a_diverged_return_is_kept_as_null(tmp_path):
    again = EvalRecord.load(example(returns=[1.0, math.nan, math.inf]).save(tmp_path / "r.json"))
    assert again.returns[0] == 1.0 and all(map(math.isnan, again.returns[1:]))


@pytest.mark.parametrize("name", ["seeds", "successes", "returns", "lengths"])
def test_unequal_lengths(name):
    with pytest.raises(UserError, match=f"'joint' on 'reach-v3'.*'{name}': 2"):
        example(**{name: [1, 0]})


def test_no_episode():
    with pytest.raises(UserError, match="no episode"):
        example(seeds=[], successes=[], returns=[], lengths=[])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99.*upgrade"),
        ({"schema": "1"}, "integer 'schema'"),
        ({"surprise": 1}, "surprise"),
        ({"seeds": [1, 2]}, "equally long"),
        ({"seeds": 3}, "not an evaluation record"),
        ({"lengths": ["a", "b", "c"]}, "not an evaluation record"),
    ],
)
def test_bad_files_are_named(tmp_path, change, message):
    file = tmp_path / "bad.json"
    file.write_text(json.dumps({**example().to_dict(), **change}))
    with pytest.raises(UserError, match=message) as caught:
        EvalRecord.load(file)
    assert str(file) in str(caught.value)


def test_other_json_is_no_record(tmp_path):
    file = tmp_path / "bad.json"
    for text, message in (("[]", "not an evaluation record"), ("{", "truncated"), ('{"schema": 1}', "fields")):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            EvalRecord.load(file)
    with pytest.raises(UserError, match="does not exist"):
        EvalRecord.load(tmp_path / "none.json")


def test_provenance_has_what_reproduces_and_nothing_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    words = [str(tmp_path / "bin" / "fleetgym"), "eval", str(tmp_path / "runs" / "a"), "--out=/else/where/b", "7"]
    monkeypatch.setattr(sys, "argv", words)
    facts = provenance(checkpoint="x")
    assert facts["command"] == ["fleetgym", "eval", "runs/a", "--out=b", "7"]
    assert facts["versions"]["fleetgym"] and facts["versions"]["torch"]
    assert facts["python"] == platform.python_version() and facts["checkpoint"] == "x"
    text = json.dumps(facts)
    assert str(tmp_path) not in text and str(Path.home()) not in text
    assert socket.gethostname() not in [facts["platform"], facts["device"], *facts["command"]]
    monkeypatch.setattr(sys, "argv", ["/x/fleetgym/__main__.py", "list"])
    assert command_line() == ["fleetgym", "list"]


def test_commit_of_the_checkout(monkeypatch):
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():  # an unpacked sdist: no commit is known, and that is said
        assert provenance()["commit"] is None
        return
    head = subprocess.run(["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    monkeypatch.setenv("GIT_DIR", "/elsewhere")  # as git sets it inside a hook
    records._git.cache_clear()
    try:
        assert provenance()["commit"] == head
        assert provenance()["dirty"] in (True, False)
        monkeypatch.setenv("PATH", "")
        records._git.cache_clear()
        assert provenance()["commit"] is None
    finally:
        records._git.cache_clear()


def test_provenance_does_not_import_torch():
    code = "import sys; from fleetgym.core.records import provenance; provenance(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
