import importlib.metadata

import pytest

from fleetgym.core import registry as module
from fleetgym.core.errors import UserError
from fleetgym.core.registry import Registry


def test_lazy_names_and_objects():
    found = Registry("thing")
    found.register("joiner", "os.path:join")
    found.register("broken", "fleetgym.no_such_module:x")  # not imported until asked for

    @found.register("mine")
    def mine():
        return 1

    assert found.names() == ["broken", "joiner", "mine"] and "mine" in found and "other" not in found
    assert found.get("joiner")("a", "b") == "a/b" and found.get("mine") is mine


def test_unknown_name_gives_the_three_nearest():
    found = Registry("task")
    for name in ("reach-v3", "push-v3", "door-open-v3", "drawer-open-v3"):
        found.register(name, "os:getcwd")
    with pytest.raises(UserError, match=r"unknown task 'reech-v3'; nearest: 'reach-v3', '.*', '.*'$"):
        found.get("reech-v3")
    with pytest.raises(UserError, match="none is registered"):
        Registry("task").get("x")


def test_a_name_is_taken_once():
    found = Registry("thing")
    found.register("a", "os:getcwd")
    found.register("a", "os:getcwd")  # the same again, as when a module is reloaded
    with pytest.raises(UserError, match="'a' is registered already"):
        found.register("a", "os:listdir")


def test_plug_ins_by_entry_point(monkeypatch):
    points = [
        importlib.metadata.EntryPoint("foreign", "os:getcwd", "fleetgym.things"),
        importlib.metadata.EntryPoint("bad", "no_such_package:x", "fleetgym.things"),
        importlib.metadata.EntryPoint("ours", "os:listdir", "fleetgym.things"),
    ]
    monkeypatch.setattr(module, "entry_points", lambda group: points if group == "fleetgym.things" else [])
    found = Registry("thing", "fleetgym.things")
    found.register("ours", "os:getcwd")
    import os

    assert found.names() == ["bad", "foreign", "ours"]
    assert found.get("foreign") is os.getcwd and found.get("ours") is os.getcwd
    with pytest.raises(UserError, match="plug-in 'no_such_package:x' does not load"):
        found.get("bad")
