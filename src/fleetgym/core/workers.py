"""Worker processes: one way to start them, to stop them, and to say that one has died."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import Any

from fleetgym.core.errors import UserError

#: Started by spawn: a fork would copy the locks of torch's and OpenGL's threads in whatever state they are.
CONTEXT = get_context("spawn")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "LP_NUM_THREADS")


def _begin(initializer: Callable[..., Any] | None, arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches the whole group: workers leave it to the parent, which knows what is finished.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if initializer is not None:
        initializer(*arguments)


def _end_with_parent() -> None:
    # A killed parent cannot end its workers: they would go on for hours and hold the locks of their runs.
    parent_process().join()
    os._exit(1)


def check_picklable(things: Any, name: str, instead: str) -> None:
    """Refuses what cannot go to worker processes, before any has begun.

    Args:
        things: What would be sent.
        name: What it is, for the message.
        instead: What to do without processes, for the message.

    Raises:
        UserError: It does not pickle.
    """
    try:
        pickle.dumps(things)
    except Exception as error:
        raise UserError(
            f"{name} must be picklable to go to worker processes ({error}); use functions defined at the top of a "
            f"module, or {instead}"
        ) from error


@contextlib.contextmanager
def worker_pool(
    workers: int, *, initializer: Callable[..., Any] | None = None, arguments: tuple[Any, ...] = (), wait: bool = True
) -> Iterator[Executor]:
    """A pool of worker processes, each with one thread for linear algebra.

    Args:
        workers: How many.
        initializer: Called in each worker when it starts; must pickle by name.
        arguments: Of ``initializer``.
        wait: On an error or Ctrl-C: whether work under way is waited for, or ended at once.

    Yields:
        The executor.

    Raises:
        UserError: ``workers`` is below one, or a worker died (killed, or out of memory).
    """
    if workers < 1:
        raise UserError(f"{workers} workers: at least 1 is needed")
    # Children read these when they start; more threads than cores only get into each other's way.
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    pool = ProcessPoolExecutor(workers, mp_context=CONTEXT, initializer=_begin, initargs=(initializer, arguments))
    try:
        yield pool
    except BaseException as error:
        if not wait:
            for process in list((getattr(pool, "_processes", None) or {}).values()):
                process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process died (killed, or out of memory): finished work is kept; go on with --resume where "
                "there is one, perhaps with fewer --workers"
            ) from error
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
