"""Work of a benchmark in worker processes, and how far it is."""

from __future__ import annotations

import contextlib
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from typing import Any

from fleetgym.core.workers import CONTEXT, worker_pool

_reports: Any = None  # in a worker: where it says how far it is


def _begin_worker(reports: Any) -> None:
    import torch

    global _reports
    _reports = reports
    torch.set_num_threads(1)


def report(name: str, done: int, total: int, words: str = "") -> None:
    """Says in a worker how far a job is; elsewhere nothing happens.

    Args:
        name: Of the job.
        done: Steps done.
        total: Steps in all.
        words: What else is to be seen beside the bar.
    """
    if _reports is not None:
        _reports.put((name, done, total, words))


class Progress:
    """A bar for each job on a terminal; elsewhere a line now and then. Called like :func:`report`."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        self.console = Console(stderr=True)
        self.bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}"), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.ids: dict[str, Any] = {}
        self.printed: dict[str, float] = {}

    def __call__(self, name: str, done: int, total: int, words: str = "") -> None:
        """Shows how far something is."""
        if name not in self.ids:
            self.ids[name] = self.bars.add_task(name, total=total, words=words)
        self.bars.update(self.ids[name], completed=done, words=words)
        now = time.monotonic()
        if self.bars.disable and (done >= total or now - self.printed.get(name, now - 60) > 30):
            self.printed[name] = now
            self.console.print(f"{name}: {done}/{total} {words}", highlight=False)


class Workers:
    """Processes that jobs are handed to. Made by :func:`workers`.

    Attributes:
        progress: Shows how far something is that the parent does itself.
    """

    def __init__(self, pool: Executor, reports: Any, progress: Progress) -> None:
        self._pool, self._reports, self.progress = pool, reports, progress

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        """Hands over a call; all of it must pickle."""
        return self._pool.submit(work, *arguments)

    def drain(self, futures: Sequence[Future]) -> None:
        """Shows reports until every future has ended; an error of one ends the waiting at once."""
        pending = set(futures)
        while pending:
            with contextlib.suppress(queue.Empty):
                self.progress(*self._reports.get(timeout=0.5))
            for future in [future for future in pending if future.done()]:
                pending.remove(future)
                future.result()
        while not self._reports.empty():
            self.progress(*self._reports.get())


@contextlib.contextmanager
def workers(number: int) -> Iterator[Workers]:
    """Worker processes that report, one thread each. On Ctrl-C they are ended at once: jobs save their state.

    Args:
        number: How many.

    Raises:
        UserError: Fewer than one, or a worker died.
    """
    reports, progress = CONTEXT.Queue(), Progress()
    with worker_pool(number, initializer=_begin_worker, arguments=(reports,), wait=False) as pool, progress.bars:
        yield Workers(pool, reports, progress)
