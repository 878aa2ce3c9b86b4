import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from fleetgym.core.errors import UserError
from fleetgym.core.files import atomic_folder, atomic_write, current_folder, jsonable, read_json, write_json


def only(folder):
    return sorted(path.name for path in folder.iterdir())


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    file = tmp_path / "deep" / "a.json"
    write_json(file, {"x": 1})
    with pytest.raises(RuntimeError), atomic_write(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert read_json(file) == {"x": 1}
    assert only(file.parent) == ["a.json"]
    assert file.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_atomic_write_keeps_the_suffix(tmp_path):
    with atomic_write(tmp_path / "film.mp4") as temporary:
        assert temporary.suffix == ".mp4"
        temporary.write_bytes(b"x")


def test_json_has_no_nan(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "a.json", float("nan"))
    assert only(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), (b'{"a": 1', "truncated"), (b"\xff", "valid")]
)
def test_read_json_names_the_file(tmp_path, content, message):
    file = tmp_path / "a.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_json(file)
    assert str(file) in str(caught.value)


def test_atomic_folder_replaces_as_a_whole(tmp_path):
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "f") as folder:
            (folder / text).write_text(text)
    assert only(tmp_path) == ["f"] and only(tmp_path / "f") == ["two"]
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o777 & ~_umask()


@pytest.mark.parametrize("failing", ["body", "first rename", "second rename"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_atomic_folder_keeps_the_old_contents(tmp_path, monkeypatch, failing, error):
    with atomic_folder(tmp_path / "f") as folder:
        (folder / "old").write_text("old")
    real, calls = os.rename, []

    def rename(source, target):
        calls.append(source)
        if len(calls) == {"body": 0, "first rename": 1, "second rename": 2}[failing]:
            raise error
        real(source, target)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(type(error)), atomic_folder(tmp_path / "f") as folder:
        (folder / "new").write_text("new")
        if failing == "body":
            raise error
    assert only(tmp_path) == ["f"] and only(tmp_path / "f") == ["old"]


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    (tmp_path / ".f.previous").mkdir()
    (tmp_path / ".f.previous" / "old").write_text("old")
    assert only(current_folder(tmp_path / "f")) == ["old"]
    with pytest.raises(RuntimeError), atomic_folder(tmp_path / "f"):
        raise RuntimeError
    assert only(tmp_path) == ["f"] and only(tmp_path / "f") == ["old"]


def test_jsonable():
    @dataclass
    class Point:
        x: float
        label: str

    value = {1: (Point(np.float32(0.5), "a"),), "p": Path("a/b"), "n": float("nan"), "t": torch.ones(2), "s": {2, 1}}
    assert jsonable(value) == {"1": [{"x": 0.5, "label": "a"}], "p": "a/b", "n": None, "t": [1.0, 1.0], "s": [1, 2]}
    assert jsonable(np.array([np.inf, 1])) == [None, 1.0]
    json.dumps(jsonable(value), allow_nan=False)
    with pytest.raises(UserError, match="object"):
        jsonable({"a": object()})
