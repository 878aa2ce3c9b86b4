import subprocess
import sys
import types

import pytest

import fleetgym
from fleetgym import cli
from fleetgym.cli import VERBS, main
from fleetgym.core.errors import UserError


@pytest.fixture
def verb(monkeypatch):
    """Puts a function in the place of the verb `list`."""

    def put(function):
        monkeypatch.setitem(sys.modules, "fleetgym.cli.list", types.SimpleNamespace(main=function))

    return put


@pytest.mark.parametrize("words", [[], ["-h"], ["--help"], ["help"]])
def test_help_has_a_line_for_each_verb(capsys, words):
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, line in VERBS.items():
        assert f"  {name} " in out and line in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fleetgym {fleetgym.__version__}\n"


def test_unknown_verb(capsys):
    assert main(["mrege", "a", "b"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: unknown verb 'mrege'; nearest: 'merge', ") and captured.err.count("\n") == 1
    assert captured.err.count("'") == 8 and captured.out == ""


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("no such\n  task"), 2, "error: no such task\n"),
        (OSError(28, "No space left on device", "runs/a"), 1, "error: [Errno 28] No space left on device: 'runs/a'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (SystemExit(2), 2, ""),
        (SystemExit(), 0, ""),
        (SystemExit("why"), 1, ""),
    ],
)
def test_how_a_verb_may_end(verb, capsys, error, code, text):
    def fail(argv):
        raise error

    verb(fail)
    assert main(["list"]) == code
    assert capsys.readouterr().err == text


def test_words_and_code_are_passed_on(verb):
    seen = []
    verb(lambda argv: seen.append(argv) or 5)
    assert main(["list", "a", "--b"]) == 5 and seen == [["a", "--b"]]
    verb(lambda argv: None)
    assert main(["list"]) == 0


def test_a_bug_keeps_its_traceback(verb):
    def fail(argv):
        raise ZeroDivisionError

    verb(fail)
    with pytest.raises(ZeroDivisionError):
        main(["list"])


def test_main_twice_in_a_process():
    """The verb `list` becomes an attribute of the package and must not hide the builtin from it."""
    assert main(["list", "agents"]) == 0
    assert main(["list", "agents"]) == 0
    assert isinstance(cli.list, types.ModuleType)


def test_a_closed_pipe_is_quiet():
    process = subprocess.Popen(
        [sys.executable, "-m", "fleetgym", "list", "agents"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.wait(60) == 1 and process.stderr.read() == ""
    process.stderr.close()


def test_python_m_and_the_command_are_the_same():
    done = subprocess.run([sys.executable, "-m", "fleetgym", "--version"], capture_output=True, text=True)
    assert done.stdout == f"fleetgym {fleetgym.__version__}\n" and done.returncode == 0
    from importlib.metadata import distribution

    (point,) = [point for point in distribution("fleetgym").entry_points if point.group == "console_scripts"]
    assert point.load() is main
