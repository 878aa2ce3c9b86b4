"""The command line: one module a verb, imported only when that verb is asked for.

A verb is a module ``fleetgym.cli.<verb>`` with ``main(argv) -> int | None``, and a line in ``VERBS``.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from fleetgym.core.errors import UserError, unknown

VERBS = {
    "demo": "film the expert or a trained policy of an environment",
    "play": "play OfficeNav on the keyboard",
    "collect": "record demonstrations of an expert or a policy",
    "train": "train a policy from demonstrations",
    "eval": "evaluate a checkpoint, with an interval",
    "merge": "merge checkpoints of one architecture into one",
    "fleet": "merge the policies of robots on many machines, in rounds",
    "bench": "run a benchmark: train, merge, evaluate, compare",
    "leaderboard": "make the table, the page and the plots from records",
    "list": "what there is: environments, suites, agents, mergers, benchmarks",
    "info": "all about one environment, suite, task, merger, checkpoint, run or record",
    "doctor": "what works on this machine, and what would make more work",
}


def usage() -> str:
    """The text of ``fleetgym --help``."""
    width = max(map(len, VERBS))
    return "\n".join(
        [
            "usage: fleetgym VERB [options]",
            "",
            "Environments, agents, policy merging and benchmarks for robot learning.",
            "",
            *(f"  {verb:<{width}}  {line}" for verb, line in VERBS.items()),
            "",
            "fleetgym VERB --help   the options of a verb",
            "fleetgym --version     the version",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Args:
        argv: The words after ``fleetgym``; those of this process by default.

    Returns:
        The exit code: 0, 1 for a failure of the machine (such as a full disk), 2 for bad input, 130 for Ctrl-C. Errors
        of these kinds are one line on standard error; any other exception is a bug and keeps its traceback.
    """
    # Not list(...): once the verb `list` was imported, that name in this package is the verb's module.
    words = [*(sys.argv[1:] if argv is None else argv)]
    try:
        if not words or words[0] in ("-h", "--help", "help"):
            print(usage())
            return 0
        if words[0] in ("-V", "--version"):
            from fleetgym import __version__

            print(f"fleetgym {__version__}")
            return 0
        if words[0] not in VERBS:
            raise unknown("verb", words[0], VERBS)
        code = importlib.import_module(f"fleetgym.cli.{words[0]}").main(words[1:])
        sys.stdout.flush()
        return code or 0
    except SystemExit as stop:  # the option parser has said what is wrong, or has printed the help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except UserError as error:
        return _fail(2, error)
    except BrokenPipeError:  # `fleetgym list | head`; the interpreter's own flush at exit must not complain again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _fail(1, error)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _fail(code: int, error: Exception) -> int:
    print("error: " + " ".join(str(error).split()), file=sys.stderr)
    return code
