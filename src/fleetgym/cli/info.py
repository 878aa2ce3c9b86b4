"""``fleetgym info``: all about one thing."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from fleetgym.cli.options import parse, print_json, print_pairs
from fleetgym.core.errors import UserError, unknown


@dataclass
class Options:
    """Say all about a thing that has a name, or about a checkpoint's folder, a run's folder or a record's file."""

    id: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """A name that `fleetgym list` prints, or a path."""

    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str]) -> int:
    """Prints what is known."""
    options = parse(Options, argv, "info")
    facts = describe(options.id)
    if options.json:
        print_json(facts)
        return 0
    text = facts.pop("text", "")
    print_pairs([(name, _show(value)) for name, value in facts.items()])
    if text:
        print(f"\n{text}")
    return 0


def describe(name: str) -> dict[str, Any]:
    """Facts about the thing behind a name or a path; ``kind`` says what it is and ``text`` is prose.

    Raises:
        UserError: There is no such name or path, or what is there cannot be read.
    """
    from fleetgym.cli.catalogue import KINDS

    path = Path(name)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return _record(path)
    describers: dict[str, Callable[[str], dict[str, Any]]] = {
        "envs": _env,
        "suites": _suite,
        "agents": _agent,
        "mergers": _merger,
        "benchmarks": _benchmark,
    }
    asked, slash, rest = name.partition("/")
    if slash and asked in KINDS:  # benchmarks/fleet_merge, beside the merger of that name
        if rest not in KINDS[asked]():
            raise unknown(asked.removesuffix("s"), rest, KINDS[asked]())
        return describers[asked](rest)
    known: list[str] = []
    for kind, names in KINDS.items():
        found = names()
        if name in found:
            facts = describers[kind](name)
            others = [
                f"{other}/{name}" for other in ("mergers", "benchmarks") if other != kind and name in KINDS[other]()
            ]
            return {**facts, "also": others} if others else facts
        known += found
        if kind == "suites":
            tasks = _tasks(found)
            if name in tasks:
                return _task(tasks[name], name)
            known += tasks
    raise unknown("name or path", name, known)


def _show(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={_show(item)}" for key, item in value.items()) or "-"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_show, value)) or "-"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _folder(path: Path) -> dict[str, Any]:
    from fleetgym.core.checkpoint import Checkpoint
    from fleetgym.core.files import read_json
    from fleetgym.core.run import Run, find_checkpoint

    config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
    if isinstance(config, dict) and isinstance(config.get("config"), dict) and "class" not in config:
        run = Run(path, str(config.get("name", "")), config["config"])  # not opened: reading must not touch it
        rows = run.metrics()
        facts = {"kind": "run", "path": path.as_posix(), "name": run.name, **_prefix("config", run.config)}
        facts["last metrics"] = rows[-1] if rows else {}
        for record in run.records():
            facts[f"{record.system} on {record.task}"] = _interval(record)
        try:
            facts["checkpoint"] = find_checkpoint(path).as_posix()
        except UserError:
            facts["checkpoint"] = "none"
        return facts
    if not isinstance(config, dict) or "class" not in config:
        raise UserError(f"{path} is neither a checkpoint's nor a run's folder")
    checkpoint = Checkpoint.load(path)
    bad = [key for key, tensor in checkpoint.weights.items() if not bool(tensor.isfinite().all())]
    return {
        "kind": "checkpoint",
        "path": path.as_posix(),
        "architecture": checkpoint.architecture,
        **_prefix("config", checkpoint.config),
        "weights": f"{sum(t.numel() for t in checkpoint.weights.values()):,} in {len(checkpoint.weights)} tensors",
        "finite": "yes" if not bad else f"no: {', '.join(bad)}",
        "training state": "yes" if checkpoint.load_state() is not None else "no",
        **checkpoint.info,
        "sha256": checkpoint.weights_sha256,
    }


def _record(path: Path) -> dict[str, Any]:
    from fleetgym.core.records import EvalRecord

    record = EvalRecord.load(path)
    return {
        "kind": "record",
        "path": path.as_posix(),
        "system": record.system,
        "task": record.task,
        "success": _interval(record),
        "mean return": sum(record.returns) / len(record.returns),
        "mean length": sum(record.lengths) / len(record.lengths),
        "metrics": dict(record.metrics),
        "provenance": dict(record.provenance),
    }


def _interval(record: Any) -> str:
    low, high = record.interval()
    return f"{record.success:.3f} [{low:.3f}, {high:.3f}] of {len(record.seeds)} episodes"


def _prefix(word: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{word}.{key}": value for key, value in values.items()}


def _env(name: str) -> dict[str, Any]:
    import gymnasium

    spec = gymnasium.spec(name)
    if spec.entry_point is None:
        return {"kind": "vector environment", "id": name, "make": f"gymnasium.make_vec({name!r})"}
    env = gymnasium.make(name)
    try:
        return {
            "kind": "environment",
            "id": name,
            "make": f"gymnasium.make({name!r})",
            "observation": _space(env.observation_space),
            "action": _space(env.action_space),
            "max steps": spec.max_episode_steps,
            "render modes": list(env.metadata.get("render_modes", [])),
            "arguments": dict(spec.kwargs),
            "text": inspect.getdoc(type(env.unwrapped)) or "",
        }
    finally:
        env.close()


def _space(space: Any) -> str:
    import gymnasium

    if not isinstance(space, gymnasium.spaces.Box):
        return str(space)
    # Gymnasium prints every bound of every entry.
    return f"Box{space.shape}, {space.dtype}, {space.low.min():g} to {space.high.max():g}"


def _signature(thing: Callable[..., Any]) -> inspect.Signature:
    """Names and defaults; the types are in the text."""
    signature = inspect.signature(thing)
    bare = [parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values()]
    return signature.replace(parameters=bare, return_annotation=signature.empty)


def _suite(name: str) -> dict[str, Any]:
    from fleetgym.envs import suite

    found = suite(name)
    splits = {split: len(tasks) for split, tasks in found.splits.items()}
    return {
        "kind": "suite",
        "name": name,
        "tasks": list(found.tasks),
        "splits": splits,
        "paper": found.paper,
    }


def _tasks(suites: Sequence[str]) -> dict[str, str]:
    """The suite of each task."""
    from fleetgym.envs import suite

    return {task: name for name in suites for task in suite(name).tasks}


def _task(suite_name: str, name: str) -> dict[str, Any]:
    from fleetgym.envs import suite

    found = suite(suite_name)
    task = found.task(name)
    splits = [split for split, tasks in found.splits.items() if name in tasks]
    return {
        "kind": "task",
        "name": name,
        "suite": suite_name,
        "environment": task.env_id,
        "instruction": task.instruction,
        "horizon": task.horizon,
        "splits": splits,
        "make": f"fleetgym.envs.suite({suite_name!r}).make({name!r})",
    }


def _callable(kind: str, name: str, thing: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "defined": f"{thing.__module__}.{thing.__qualname__}" if hasattr(thing, "__qualname__") else repr(thing),
        "signature": f"{name}{_signature(thing)}" if callable(thing) else "",
        "text": inspect.getdoc(thing) or "",
    }


def _agent(name: str) -> dict[str, Any]:
    from fleetgym.core.checkpoint import MODULES

    return _callable("architecture", name, MODULES.get(name))


def _merger(name: str) -> dict[str, Any]:
    from fleetgym.merging import MERGERS

    return _callable("merger", name, MERGERS.get(name))


def _benchmark(name: str) -> dict[str, Any]:
    from fleetgym.benchmarks import BENCHMARKS

    return _callable("benchmark", name, BENCHMARKS.get(name))
