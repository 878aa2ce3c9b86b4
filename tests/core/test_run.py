import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest
import torch

from fleetgym.core import run as module
from fleetgym.core.errors import UserError
from fleetgym.core.records import EvalRecord
from fleetgym.core.run import Run, find_checkpoint, track

CONFIG = {"lr": 0.001, "net": {"hidden": 64, "cell": "gru"}, "tasks": ["a", "b"]}


def open_run(folder, config=CONFIG, **options):
    return Run.open(folder, config, tensorboard=False, **options)


def test_a_new_run(tmp_path):
    with open_run(tmp_path / "deep" / "run") as run:
        assert run.path.is_dir() and run.name == "run" and run.load_state() is None and run.resumed_step is None
    saved = json.loads((run.path / "config.json").read_text())
    assert saved == {"schema": 1, "name": "run", "config": CONFIG}
    assert (run.path / "command.txt").read_text().count("\n") == 1


def test_the_config_may_be_a_dataclass(tmp_path):
    @dataclass
    class Config:
        lr: float = 0.001
        tasks: tuple[str, ...] = ("a", "b")
        net: dict = field(default_factory=lambda: {"hidden": 64, "cell": "gru"})

    open_run(tmp_path / "run", Config()).close()
    open_run(tmp_path / "run", CONFIG, resume=True).close()  # the same values
    with pytest.raises(UserError, match="dict or a dataclass, got int"):
        open_run(tmp_path / "other", 3)


def test_an_existing_folder(tmp_path):
    open_run(tmp_path / "run").close()
    with pytest.raises(UserError, match="--resume.*--out"):
        open_run(tmp_path / "run")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("x")
    (tmp_path / "file").write_text("x")
    for name, message in (("thesis", "not a run's folder"), ("file", "is a file")):
        for resume in (False, True):
            with pytest.raises(UserError, match=message):
                open_run(tmp_path / name, resume=resume)
    (tmp_path / "empty").mkdir()
    open_run(tmp_path / "empty").close()
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / ".config-abc.json").write_text("{")  # killed while it wrote the first file
    open_run(tmp_path / "killed", resume=True).close()


def test_another_config_is_listed_key_by_key(tmp_path):
    open_run(tmp_path / "run").close()
    other = {"lr": 0.01, "net": {"hidden": 64, "depth": 2}, "tasks": ["a"]}
    with pytest.raises(UserError) as caught:
        open_run(tmp_path / "run", other, resume=True)
    message = str(caught.value)
    for part in (
        "lr (folder: 0.001, now: 0.01)",
        'net.cell (folder: "gru", now: absent)',
        "net.depth (folder: absent, now: 2)",
        'tasks (folder: ["a", "b"], now: ["a"])',
        str(tmp_path / "run"),
    ):
        assert part in message
    assert "hidden" not in message
    open_run(tmp_path / "run", {**CONFIG, "lr": 9}, resume=True, volatile=("lr",)).close()


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "truncated"), ("[]", "not that of a run"), ('{"schema": 7, "config": {}}', "schema 7"), ("{}", "not that")],
)
def test_a_damaged_config(tmp_path, text, message):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_run(tmp_path / "run", resume=True)
    assert "config.json" in str(caught.value)


def test_one_process_a_folder(tmp_path):
    pytest.importorskip("fcntl")
    code = (
        "import sys\nfrom fleetgym.core.run import Run\nfrom fleetgym.core.errors import UserError\n"
        "try:\n    Run.open(sys.argv[1], {}, resume=True)\nexcept UserError as error:\n    sys.exit(str(error))"
    )
    command = [sys.executable, "-c", code, tmp_path / "run"]
    with open_run(tmp_path / "run", {}):
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and "in use by another process" in done.stderr
    assert subprocess.run(command, timeout=60).returncode == 0


def test_metrics(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log(1, loss=0.5, rate=torch.tensor(0.25))
        run.log(2, loss=float("nan"))
        assert run.metrics() == [{"step": 1, "loss": 0.5, "rate": 0.25}, {"step": 2, "loss": None}]


def test_resume_drops_what_is_done_again_and_half_a_line(tmp_path):
    with open_run(tmp_path / "run") as run:
        for step in range(6):
            run.log(step, loss=float(step))
            if step == 3:
                run.save_state(3, {"w": torch.arange(3.0)}, {"rng": [1, 2]})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [row["step"] for row in run.metrics()] == [0, 1, 2, 3, 4, 5]
    with open_run(tmp_path / "run", resume=True) as run:
        assert run.resumed_step == 3
        step, tensors, meta = run.load_state()
        assert (step, meta) == (3, {"rng": [1, 2]}) and torch.equal(tensors["w"], torch.arange(3.0))
        run.log(4, loss=-4.0)
    lines = (run.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["loss"] for line in lines] == [0.0, 1.0, 2.0, 3.0, -4.0]
    assert (run.path / "command.txt").read_text().count("\n") == 2


def test_resume_without_a_state_starts_again(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.log(0, loss=1.0)
    with open_run(tmp_path / "run", resume=True) as run:
        assert run.resumed_step is None and run.load_state() is None and run.metrics() == []


def test_tensorboard_is_restarted_at_the_resumed_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resume in (False, True):
        with Run.open(tmp_path / "run", {}, resume=resume) as run:
            for step in range(run.resumed_step + 1 if resume else 0, 6):
                run.log(step, loss=step + 100.0 * resume)
                if not resume and step == 2:
                    run.save_state(2, {"w": torch.ones(1)})
        time.sleep(1.1)  # event files are ordered by the second in their names
    events = EventAccumulator(str(run.path / "tensorboard"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert found == [(0, 0.0), (1, 1.0), (2, 2.0), (3, 103.0), (4, 104.0), (5, 105.0)]


def test_a_damaged_state(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.save_state(3, {"w": torch.ones(2)})
    file = run.path / "state.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-3])
    with pytest.raises(UserError, match="state.safetensors is truncated"):
        open_run(tmp_path / "run", resume=True)
    from fleetgym.core.checkpoint import save_tensors

    save_tensors(file, {"w": torch.ones(2)})
    with pytest.raises(UserError, match="state.safetensors is not a run's state"):
        open_run(tmp_path / "run", resume=True)
    file.write_bytes(data.replace(b'schema\\": 1', b'schema\\": 8'))
    with pytest.raises(UserError, match="state.safetensors has schema 8"):
        open_run(tmp_path / "run", resume=True)


@pytest.mark.parametrize("call", ["os.replace", "os.fsync", "pathlib.Path.write_bytes"])
def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch, call):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with open_run(tmp_path / "run") as run:
        run.save_state(1, {"w": torch.ones(2)})
        with monkeypatch.context() as patch:
            patch.setattr(call, full)
            with pytest.raises(OSError, match="No space left"):
                run.save_state(2, {"w": torch.zeros(2)})
        step, tensors, _ = run.load_state()
        assert step == 1 and tensors["w"].tolist() == [1, 1]
        assert not [path for path in run.path.iterdir() if path.name.startswith(".state")]


def test_a_full_disk_leaves_whole_rows(tmp_path):
    resource = pytest.importorskip("resource")
    code = (
        "import sys\nfrom fleetgym.core.run import Run\n"
        "with Run.open(sys.argv[1], {}, tensorboard=False) as run:\n"
        "    for step in range(1000):\n        run.log(step, loss=0.123456789)\n"
    )

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))

    command = [sys.executable, "-c", code, tmp_path / "run"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "OSError" in done.stderr
    data = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert data.endswith(b"}\n") and 1_900 < len(data) <= 2_000
    assert [json.loads(line)["step"] for line in data.splitlines()] == list(range(data.count(b"\n")))


TRAINING = """
import sys, torch
from fleetgym.core.run import Run
from fleetgym.core.seeding import torch_generator

torch.set_num_threads(1)
with Run.open(sys.argv[1], {"steps": 400}, resume=True, tensorboard=False) as run:
    weights, first = torch.zeros(20), 0
    if state := run.load_state():
        first, weights = state[0] + 1, state[1]["weights"]
    print("begin", first, flush=True)
    for step in range(first, 400):
        weights = weights * 0.9 + torch.randn(20, generator=torch_generator("noise", step))
        run.log(step, norm=float(weights.norm()))
        if step % 5 == 0 or step == 399:
            run.save_state(step, {"weights": weights}, {})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped, beside its program."""
    folder = tmp_path_factory.mktemp("training")
    (folder / "train.py").write_text(TRAINING)
    subprocess.run(
        [sys.executable, folder / "train.py", folder / "whole"], check=True, timeout=120, capture_output=True
    )
    return folder / "whole"


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes_to_the_same_result(tmp_path, whole, stop):
    program = whole.parent / "train.py"
    process = subprocess.Popen(
        [sys.executable, program, tmp_path / "stopped"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not metrics.exists() or metrics.stat().st_size < 2_000:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.002)
    process.send_signal(stop)
    assert process.wait(60) != 0
    process.stdout.close()
    done = subprocess.run(
        [sys.executable, program, tmp_path / "stopped"], check=True, timeout=120, capture_output=True, text=True
    )
    assert 0 < int(done.stdout.split()[1]) < 400  # it was in the middle
    assert metrics.read_bytes() == (whole / "metrics.jsonl").read_bytes()
    assert (tmp_path / "stopped" / "state.safetensors").read_bytes() == (whole / "state.safetensors").read_bytes()


def test_records(tmp_path):
    with open_run(tmp_path / "run") as run:
        record = EvalRecord("fleet_merge", "MetaWorld/reach-v3", [1], [True], [2.0], [3])
        assert run.record(record).name == "fleet_merge__MetaWorld-reach-v3.json"
        assert run.record(record, "joint seed=1").name == "joint-seed=1.json"
        assert run.records() == [record, record]


class TestFindCheckpoint:
    @staticmethod
    def policy(hidden=4):
        from fleetgym.agents.networks import RecurrentPolicy

        return RecurrentPolicy(3, 2, hidden=hidden)

    def test_last_of_a_run(self, tmp_path):
        with open_run(tmp_path / "run") as run:
            with pytest.raises(UserError, match="holds no checkpoint"):
                find_checkpoint(run.path)
            for step in (20, 100, 3):
                run.save_checkpoint(step, self.policy())
        assert find_checkpoint(run.path) == run.path / "checkpoints" / "3"
        (run.path / "checkpoints" / "last.txt").unlink()
        assert find_checkpoint(run.path).name == "100"
        assert find_checkpoint(run.path / "checkpoints" / "20").name == "20"

    def test_one_that_lost_its_weights_is_still_meant(self, tmp_path):
        with open_run(tmp_path / "run") as run:
            path = run.save_checkpoint("final", self.policy()).path
        (path / "model.safetensors").unlink()
        assert find_checkpoint(path) == path

    def test_no_checkpoint(self, tmp_path):
        for path in (tmp_path / "nowhere", tmp_path):
            with pytest.raises(UserError, match=path.name):
                find_checkpoint(path)


class TestTrack:
    def test_items_pass_through(self, capsys):
        assert list(track("abc")) == ["a", "b", "c"]
        assert list(track(3)) == [0, 1, 2]
        assert list(track(5, start=3)) == [3, 4]
        assert list(track(iter([1, 2]), "x", total=2)) == [1, 2]
        assert capsys.readouterr().err == ""  # short work off a terminal says nothing

    def test_lines_in_a_log_are_rare(self, capsys, monkeypatch):
        clock = iter(range(0, 10_000, 7))
        monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
        assert len(list(track(22, "work"))) == 22
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 5 and lines[0] == "work: 5/22 (35 s)" and lines[-1].startswith("work: 22/22")

    def test_bars_on_a_terminal_nest_and_end(self, monkeypatch):
        class Terminal(io.StringIO):
            def isatty(self):
                return True

        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        seen = [(a, b) for a in track(2, "robots") for b in track(2, "steps")]
        assert seen == [(0, 0), (0, 1), (1, 0), (1, 1)] and module._live is None
        assert "robots" in terminal.getvalue() and "2/2" in terminal.getvalue()
        with pytest.raises(KeyboardInterrupt):
            for _ in track(2, "robots"):
                raise KeyboardInterrupt
        assert list(track(1)) == [0]


def test_closing_hides_no_error(tmp_path):
    with pytest.raises(KeyboardInterrupt), open_run(tmp_path / "run") as run:
        run.log(0, loss=1.0)
        raise KeyboardInterrupt
    assert len(run.metrics()) == 1
    run.close()
    assert os.listdir(run.path)
