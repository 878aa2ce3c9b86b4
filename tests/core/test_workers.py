"""Worker processes: one thread each, deaf to Ctrl-C, and an error when one dies."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fleetgym.core.errors import UserError
from fleetgym.core.workers import worker_pool


def look(_):
    return os.environ["OMP_NUM_THREADS"], signal.getsignal(signal.SIGINT) == signal.SIG_IGN, os.getpid()


def greet(path):
    with open(path, "a") as file:
        file.write("hello\n")


def die(_):
    os._exit(3)


def test_workers(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    with worker_pool(2, initializer=greet, arguments=(str(tmp_path / "greetings"),)) as pool:
        seen = list(pool.map(look, range(4)))
    assert {(threads, deaf) for threads, deaf, _ in seen} == {("1", True)}
    assert all(process != os.getpid() for *_, process in seen)
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert 1 <= (tmp_path / "greetings").read_text().count("hello") <= 2


def test_a_dead_worker_is_said(monkeypatch):
    with pytest.raises(UserError, match="a worker process died"), worker_pool(1) as pool:
        pool.submit(die, 0).result()


def test_workers_end_with_their_parent():
    """A killed parent leaves no worker behind that goes on working."""
    program = (
        "import os, time\n"
        "from fleetgym.core.workers import worker_pool\n"
        "if __name__ == '__main__':\n"
        "    with worker_pool(1) as pool:\n"
        "        print(pool.submit(os.getpid).result(), flush=True)\n"
        "        pool.submit(time.sleep, 600).result()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    worker = int(parent.stdout.readline())
    time.sleep(0.5)  # it is asleep in its second piece of work
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 30
    while _alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(worker)


def _alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_bad_number():
    with pytest.raises(UserError, match="0 workers"), worker_pool(0):
        pass
