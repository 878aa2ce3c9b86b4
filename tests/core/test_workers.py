"""Worker processes: one thread each, deaf to Ctrl-C, and an error when one dies."""

import os
import signal

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


def test_bad_number():
    with pytest.raises(UserError, match="0 workers"), worker_pool(0):
        pass
