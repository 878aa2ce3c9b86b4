"""One run's folder: its configuration, its command, its numbers, its state and its records.

Whatever ends a run (Ctrl-C, a kill, a full disk), the folder is left so that ``Run.open(..., resume=True)`` goes on
from the last saved state.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_write, current_folder, jsonable, read_json, write_json
from fleetgym.core.records import EvalRecord, command_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fleetgym.core.checkpoint import Checkpoint

SCHEMA = 1
CONFIG, COMMAND, METRICS, STATE = "config.json", "command.txt", "metrics.jsonl", "state.safetensors"
T = TypeVar("T")


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if isinstance(value, Mapping) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(_flatten(item, f"{prefix}.{key}" if prefix else str(key)))
        return flat
    return {prefix: value}


def _differences(saved: Mapping[str, Any], now: Mapping[str, Any], volatile: Sequence[str]) -> list[str]:
    """One text for each key that differs, with both values."""
    old, new = _flatten(saved), _flatten(now)

    def show(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]) if key in values else "absent"

    return [
        f"{key} (folder: {show(old, key)}, now: {show(new, key)})"
        for key in {**old, **new}
        if key and key not in volatile and (key in old, old.get(key)) != (key in new, new.get(key))
    ]


def _lock(path: Path) -> Any:
    """Takes the folder for this process; the system lets go of it however the process ends.

    Returns:
        The open lock file, or None where there are no such locks.

    Raises:
        UserError: Another process has it.
    """
    try:
        import fcntl
    except ImportError:
        return None
    file = open(path / ".lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"{path} is in use by another process; wait for it or choose another --out") from None
    except OSError:  # a file system without locks
        file.close()
        return None
    return file


class Run:
    """The folder of one run. Make it with ``Run.open`` and use it as a context manager.

    Attributes:
        path: The folder.
        name: What the run is called.
        config: The configuration, as JSON types.
        resumed_step: The step of the saved state that a resumed run goes on from, or None.
    """

    def __init__(self, path: Path, name: str, config: dict[str, Any], *, tensorboard: bool = True) -> None:
        self.path, self.name, self.config = path, name, config
        self.resumed_step: int | None = None
        self._purge_step: int | None = None
        self._tensorboard = tensorboard
        self._writer: Any = None
        self._metrics: Any = None
        self._bars: Any = None
        self._lock_file: Any = None

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        config: Any,
        *,
        resume: bool = False,
        name: str = "",
        volatile: Sequence[str] = (),
        tensorboard: bool = True,
    ) -> Run:
        """Makes a run's folder, or goes on in it.

        Args:
            folder: Where. With ``resume`` a folder that is not there yet is made.
            config: What defines the result: a dict or a dataclass of JSON-like values.
            resume: Go on in an existing folder. Metrics later than the saved state are dropped, since those steps will
                be done again.
            name: What to call the run; the folder's name by default.
            volatile: Dotted config keys that may differ on resume because they change no result, such as
                ``"num_envs"``.
            tensorboard: Also write TensorBoard files, below ``tensorboard/``.

        Returns:
            The open run.

        Raises:
            UserError: The folder exists and ``resume`` is off; it is not a run's; it belongs to another config (the
                keys that differ are listed with both values); another process uses it.
        """
        folder = Path(folder)
        values = jsonable(config)
        if not isinstance(values, dict):
            raise UserError(f"the config of a run must be a dict or a dataclass, got {type(config).__name__}")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is a file; choose another --out")
        # A run killed in its first moment leaves only hidden files: that folder counts as empty.
        contents = [item for item in folder.iterdir() if not item.name.startswith(".")] if folder.is_dir() else []
        if contents and not (folder / CONFIG).is_file():
            raise UserError(f"{folder} is not empty and not a run's folder (no {CONFIG}); choose another --out")
        if contents and not resume:
            raise UserError(f"{folder} exists already; go on in it with --resume, or choose another --out")
        saved = None
        if contents:
            saved = read_json(folder / CONFIG)
            if not isinstance(saved, dict) or not isinstance(saved.get("config"), dict) or "schema" not in saved:
                raise UserError(f"{folder / CONFIG} is not that of a run; choose another --out")
            if saved["schema"] > SCHEMA:
                raise UserError(
                    f"{folder / CONFIG} has schema {saved['schema']}, this fleetgym reads up to {SCHEMA}: "
                    "upgrade fleetgym"
                )
            if different := _differences(saved["config"], values, volatile):
                raise UserError(
                    f"{folder} belongs to a run with another config: {'; '.join(different)}. Use its values, or choose "
                    "another --out"
                )
        folder.mkdir(parents=True, exist_ok=True)
        run = cls(folder, name or (saved or {}).get("name") or folder.name, values, tensorboard=tensorboard)
        run._lock_file = _lock(folder)
        try:
            if saved is None:
                write_json(folder / CONFIG, {"schema": SCHEMA, "name": run.name, "config": values})
            else:
                state = run.load_state()
                run.resumed_step = state[0] if state else None
                run._purge_step = state[0] + 1 if state else 0
                run._truncate_metrics()
            with open(folder / COMMAND, "a", encoding="utf-8") as file:
                file.write(shlex.join(command_line()) + "\n")
        except BaseException:
            run.close()
            raise
        return run

    def _truncate_metrics(self) -> None:
        """Drops the metrics of steps that will be done again, and half a line left by a kill."""
        path = self.path / METRICS
        if not path.is_file():
            return
        first = self._purge_step or 0
        old = path.read_bytes()
        new = b"".join(line + b"\n" for line in old.split(b"\n") if (row := _row(line)) and row["step"] < first)
        if new != old:
            with atomic_write(path) as temporary:
                temporary.write_bytes(new)

    def log(self, step: int, **metrics: float) -> None:
        """Adds a row of numbers to ``metrics.jsonl`` and to TensorBoard.

        Log a step before its state is saved: a resume keeps the rows up to and including the saved step.

        Args:
            step: Not negative, not decreasing.
            **metrics: Numbers by name; one that is not finite is written as null.

        Raises:
            OSError: The disk is full; the file then ends with the last complete row.
        """
        if self._metrics is None:
            self._metrics = open(self.path / METRICS, "ab", buffering=0)
        values = {name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()}
        line = (json.dumps({"step": int(step), **jsonable(values)}) + "\n").encode()
        end = os.fstat(self._metrics.fileno()).st_size
        try:
            written = 0
            while written < len(line):
                written += self._metrics.write(line[written:])
        except BaseException:
            os.ftruncate(self._metrics.fileno(), end)
            raise
        if self._tensorboard:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(self.path / "tensorboard", purge_step=self._purge_step)
            for key, value in values.items():
                if isinstance(value, (int, float)):
                    self._writer.add_scalar(key, value, step)

    def metrics(self) -> list[dict[str, Any]]:
        """The rows logged up to now, oldest first."""
        path = self.path / METRICS
        lines = path.read_bytes().split(b"\n") if path.is_file() else []
        return [row for line in lines if (row := _row(line))]

    def track(
        self, items: Iterable[T] | int, description: str = "", *, total: int | None = None, start: int = 0
    ) -> Any:
        """Goes through items with a progress bar on standard error; see ``track``."""
        return track(items, description or self.name, total=total, start=start)

    def save_state(self, step: int, tensors: Mapping[str, Tensor], meta: Mapping[str, Any] | None = None) -> None:
        """Replaces the saved training state, atomically.

        Args:
            step: The last step that is done.
            tensors: What the next step needs: weights, moments of the optimizer, state of a random generator.
            meta: JSON-like values that belong to it.

        Raises:
            OSError: The disk is full; the state saved before is intact.
        """
        from fleetgym.core.checkpoint import save_tensors

        header = json.dumps({"schema": SCHEMA, "step": int(step), "meta": jsonable(dict(meta or {}))})
        # One file, so that one rename replaces tensors and meta together.
        with atomic_write(self.path / STATE) as temporary:
            save_tensors(temporary, tensors, {"fleetgym_state": header})

    def load_state(self) -> tuple[int, dict[str, Tensor], dict[str, Any]] | None:
        """The saved training state: step, tensors (on the CPU) and meta; None when none was saved.

        Raises:
            UserError: The file is truncated or of a newer schema.
        """
        path = self.path / STATE
        if not path.exists():
            return None
        import safetensors

        from fleetgym.core.checkpoint import load_tensors

        tensors = load_tensors(path)
        with safetensors.safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get("fleetgym_state")
        header = json.loads(text) if text else {}
        if "step" not in header:
            raise UserError(f"{path} is not a run's state; remove it to start from the beginning")
        if header["schema"] > SCHEMA:
            raise UserError(
                f"{path} has schema {header['schema']}, this fleetgym reads up to {SCHEMA}: upgrade fleetgym"
            )
        return header["step"], tensors, header["meta"]

    def save_checkpoint(self, name: str | int, module: nn.Module, **options: Any) -> Checkpoint:
        """Saves ``checkpoints/<name>`` and notes it as the last one; options as in ``Checkpoint.save``."""
        from fleetgym.core.checkpoint import Checkpoint

        checkpoint = Checkpoint.save(self.path / "checkpoints" / str(name), module, **options)
        with atomic_write(self.path / "checkpoints" / "last.txt") as temporary:
            temporary.write_text(f"{name}\n", encoding="utf-8")
        return checkpoint

    def record(self, record: EvalRecord, name: str | None = None) -> Path:
        """Writes an evaluation to ``records/<name>.json``.

        Args:
            record: The evaluation.
            name: File name without suffix; ``<system>__<task>`` by default, which must then be unique in the run.

        Returns:
            The file.
        """
        name = name or f"{record.system}__{record.task}"
        return record.save(self.path / "records" / (re.sub(r"[^\w.,=+-]+", "-", name) + ".json"))

    def records(self) -> list[EvalRecord]:
        """All records of the run, in the order of their file names."""
        return [EvalRecord.load(path) for path in sorted((self.path / "records").glob("[!.]*.json"))]

    def close(self) -> None:
        """Flushes and closes the files. Calling it twice does no harm."""
        writer, metrics, lock = self._writer, self._metrics, self._lock_file
        self._writer = self._metrics = self._lock_file = None
        try:
            if writer is not None:
                writer.close()
        finally:
            if metrics is not None:
                metrics.close()
            if lock is not None:
                lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:  # what went wrong matters more than that closing goes wrong too, as it does on a full disk
            with contextlib.suppress(Exception):
                self.close()


def _row(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl, or None for half a line."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def find_checkpoint(path: str | os.PathLike) -> Path:
    """The checkpoint folder that a path stands for.

    Args:
        path: A checkpoint folder, or a run's folder, which stands for its last checkpoint.

    Returns:
        The checkpoint folder.

    Raises:
        UserError: The path does not exist or holds no checkpoint.
    """
    path = Path(path)
    folder = current_folder(path)
    if not folder.is_dir():
        raise UserError(f"{path} does not exist or is not a folder; pass a checkpoint's or a run's folder")
    if (folder / "model.safetensors").is_file():
        return path
    if (
        (folder / CONFIG).is_file()
        and "class" in (document := read_json(folder / CONFIG))
        and isinstance(document, dict)
    ):
        return path  # a checkpoint that lost its weights: loading it says so
    parent = folder / "checkpoints"
    last = parent / "last.txt"
    if last.is_file():
        return parent / last.read_text(encoding="utf-8").strip()
    found = [item.parent for item in parent.glob("[!.]*/config.json")]
    if not found:
        raise UserError(f"{path} holds no checkpoint: neither model.safetensors nor checkpoints/<name>/")
    return max(found, key=lambda item: (item.name.isdigit(), int(item.name) if item.name.isdigit() else 0, item.name))


_live: Any = None  # the one rich display of this process; rich draws several bars in one display
_LINE_SECONDS = 30.0


def track(items: Iterable[T] | int, description: str = "", *, total: int | None = None, start: int = 0) -> Iterator[T]:
    """Goes through items with a progress bar on standard error.

    On a terminal it is a bar, and nested ones share the display. Elsewhere (a log file, CI) it is a plain line at most
    every half minute, and nothing for work that ends sooner.

    Args:
        items: What to go through, or a number n for ``range(start, n)``.
        description: What is being done.
        total: How many items there are, where they have no length.
        start: How many were done before, on resume.

    Yields:
        The items.
    """
    if isinstance(items, int):
        items, total = range(start, items), items
    elif total is None and hasattr(items, "__len__"):
        total = start + len(items)
    return (_track_bar if sys.stderr.isatty() else _track_lines)(items, description, total, start)


def _track_bar(items: Iterable[T], description: str, total: int | None, start: int) -> Iterator[T]:
    global _live
    from rich import progress
    from rich.console import Console

    outermost = _live is None
    if outermost:
        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
        )
        _live = progress.Progress(*columns, console=Console(stderr=True))
        _live.start()
    task = _live.add_task(description, total=total, completed=start)
    try:
        for item in items:
            yield item
            _live.advance(task)
    finally:
        if outermost:
            _live.stop()
            _live = None
        elif _live is not None:
            _live.remove_task(task)


def _track_lines(items: Iterable[T], description: str, total: int | None, start: int) -> Iterator[T]:
    began = printed = time.monotonic()
    of = f"/{total}" if total is not None else ""
    done = start
    for item in items:
        yield item
        done += 1
        now = time.monotonic()
        if now - printed >= _LINE_SECONDS or (printed != began and done == total):
            printed = now
            print(f"{description}: {done}{of} ({now - began:.0f} s)", file=sys.stderr, flush=True)
