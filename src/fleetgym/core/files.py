"""Writing files so that a crash, a full disk or Ctrl-C never leaves half of one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fleetgym.core.errors import UserError


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary path beside ``path`` to write to, and renames it to ``path`` at the end.

    On any exception the temporary file is removed and ``path`` stays as it was.

    Args:
        path: The file to (over)write; missing parent folders are made.

    Yields:
        The temporary path, with the suffix of ``path`` (some writers choose the format by it).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private (0600); give it the mode that open() would have given.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _previous(path: Path) -> Path:
    """Where the old contents of a folder wait while the new ones take its place."""
    return path.with_name(f".{path.name}.previous")


def current_folder(path: str | os.PathLike) -> Path:
    """The folder that holds the contents of ``path``.

    That is ``path`` itself, except when a process was killed between the two renames of ``atomic_folder``: then
    ``path`` is missing and its last complete contents still have their waiting name.
    """
    path = Path(path)
    return _previous(path) if not path.exists() and _previous(path).is_dir() else path


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a temporary folder beside ``path`` to fill, and puts it in the place of ``path`` at the end.

    On any exception ``path`` keeps its old contents. Read such folders through ``current_folder``.

    Args:
        path: The folder to make or replace as a whole; missing parents are made.

    Yields:
        The temporary folder.
    """
    path = Path(path)
    previous = _previous(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if current_folder(path) == previous:
        os.rename(previous, path)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with open(file, "rb+") as handle:
                    os.fsync(handle.fileno())
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o777 & ~mask)
        shutil.rmtree(previous, ignore_errors=True)
        # A folder that is not empty cannot be renamed over, hence two steps.
        if path.exists():
            os.rename(path, previous)
        os.rename(temporary, path)
    finally:
        if current_folder(path) == previous:
            os.rename(previous, path)
        shutil.rmtree(previous, ignore_errors=True)
        shutil.rmtree(temporary, ignore_errors=True)


def jsonable(value: Any) -> Any:
    """Turns dataclasses, paths, tuples, and NumPy or torch values into what JSON knows.

    NaN and infinity, which JSON has not, become None.

    Raises:
        UserError: A value has no JSON form.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: jsonable(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(item) for item in value)
    if isinstance(value, os.PathLike):
        return Path(value).as_posix()
    if hasattr(value, "tolist"):  # NumPy scalars and arrays, torch tensors
        return jsonable(value.tolist())
    raise UserError(f"{value!r} of type {type(value).__name__} has no JSON form; use numbers, strings, lists and dicts")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes ``value`` as indented JSON, atomically. NaN and infinity are refused (they are not JSON)."""
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        UserError: The file is missing or is not JSON; the message names it.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}); it may be truncated: restore or remake it") from error
