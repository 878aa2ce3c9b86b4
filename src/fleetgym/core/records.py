"""The record of an evaluation: every episode's outcome, and where the numbers come from."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetgym.core.errors import UserError
from fleetgym.core.files import jsonable, read_json, write_json

SCHEMA = 1
# What can change a result: the physics, the arithmetic, the tasks.
_PACKAGES = ("fleetgym", "gymnasium", "metaworld", "minari", "mujoco", "numpy", "scipy", "stable-baselines3", "torch")


def wilson_interval(k: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a success rate.

    Unlike the normal approximation it stays within [0, 1] and is not empty at 0 or n successes.
    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927).

    Args:
        k: Successes.
        n: Trials; with none the interval is (0, 1).
        z: Quantile of the normal distribution; 1.96 gives 95%.

    Returns:
        The lower and the upper bound.

    Raises:
        UserError: ``k`` is not within 0..n.
    """
    if not 0 <= k <= n:
        raise UserError(f"{k} successes of {n} trials is impossible; pass 0 <= k <= n")
    if n == 0:
        return 0.0, 1.0
    rate, square = k / n, z * z
    centre = (rate + square / (2 * n)) / (1 + square / n)
    half = z / (1 + square / n) * math.sqrt(rate * (1 - rate) / n + square / (4 * n * n))
    # At k = 0 and k = n the bound is 0 and 1 exactly; rounding leaves 1e-17.
    return 0.0 if k == 0 else max(0.0, centre - half), 1.0 if k == n else min(1.0, centre + half)


@functools.cache
def _git() -> tuple[str | None, bool | None]:
    """Commit of the checkout that fleetgym runs from, and whether tracked files differ from it."""
    root = Path(__file__).resolve().parents[3]
    if not (root / "pyproject.toml").is_file() or not (root / ".git").exists():
        return None, None
    # Inside a git hook GIT_DIR and its like point at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}

    def run(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(root), *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout.strip()

    try:
        return run("rev-parse", "HEAD"), bool(run("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):
        return None, None


@functools.cache
def _versions() -> dict[str, str]:
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _device() -> str:
    # Asking for the device must not be what imports torch.
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"cpu, {os.cpu_count()} cores, {_cpu()}"


def command_line() -> list[str]:
    """The command of this process, without the parts that only name a place on this machine.

    A path below the working directory is made relative; of any other absolute path the last part stays.
    """

    def clean(word: str) -> str:
        name, equals, value = word.partition("=")
        if equals and name.startswith("-"):
            return f"{name}={clean(value)}"
        if not os.path.isabs(word):
            return word
        path, here = Path(word), Path.cwd()
        return path.relative_to(here).as_posix() if path.is_relative_to(here) else path.name

    program, *words = sys.argv or [""]
    path = Path(program)
    # `python -m package` has the path of the package's __main__.py here.
    return [path.parent.name if path.name == "__main__.py" else path.name, *map(clean, words)]


def provenance(**extra: Any) -> dict[str, Any]:
    """Where a result comes from.

    Neither the machine's name nor its folders are in it, so that a record can be published as it is.

    Args:
        **extra: Further facts to keep, such as ``checkpoint_sha256``.

    Returns:
        Git commit and whether the checkout differs from it (None outside a checkout), package versions, Python,
        platform, device, command and date, all of JSON types.
    """
    commit, dirty = _git()
    return {
        "commit": commit,
        "dirty": dirty,
        "versions": dict(_versions()),
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "device": _device(),
        "command": command_line(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **jsonable(extra),
    }


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation: a system on a task, episode by episode.

    Attributes:
        system: What was evaluated, such as ``"fleet_merge_rounds"``.
        task: Where, such as ``"reach-v3"``.
        seeds: The seed of each episode.
        successes: Whether the episode succeeded at any of its steps.
        returns: Sum of the rewards of each episode.
        lengths: Steps of each episode.
        metrics: Further numbers by name.
        provenance: See ``provenance``.
        schema: Version of the file format.
        tasks: The task of each episode; empty when all are of ``task``.

    Raises:
        UserError: No episode, or the sequences differ in length.
    """

    system: str
    task: str
    seeds: Sequence[int]
    successes: Sequence[bool]
    returns: Sequence[float]
    lengths: Sequence[int]
    metrics: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=provenance)
    schema: int = SCHEMA
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        sizes = {name: len(getattr(self, name)) for name in ("seeds", "successes", "returns", "lengths")}
        where = f"record of {self.system!r} on {self.task!r}"
        if len(set(sizes.values())) != 1:
            raise UserError(f"{where}: seeds, successes, returns and lengths must be equally long, got {sizes}")
        if not self.seeds:
            raise UserError(f"{where} has no episode; evaluate at least one seed")
        if isinstance(self.tasks, str) or (self.tasks and len(self.tasks) != len(self.seeds)):
            got = repr(self.tasks) if isinstance(self.tasks, str) else f"{len(self.tasks)} names"
            raise UserError(
                f"{where}: tasks must be empty or name one task for each of {sizes['seeds']} episodes, got {got}"
            )
        object.__setattr__(self, "tasks", tuple(map(str, self.tasks)))
        for name, kind in (("seeds", int), ("successes", bool), ("returns", float), ("lengths", int)):
            object.__setattr__(self, name, tuple(kind(value) for value in getattr(self, name)))

    @property
    def success(self) -> float:
        """Share of episodes that succeeded."""
        return sum(self.successes) / len(self.successes)

    def interval(self, z: float = 1.96) -> tuple[float, float]:
        """Wilson interval of ``success``."""
        return wilson_interval(sum(self.successes), len(self.successes), z)

    def per_task(self) -> dict[str, tuple[int, int]]:
        """Successes and episodes of each task, in the order in which the tasks first appear."""
        counts: dict[str, tuple[int, int]] = {}
        for task, success in zip(self.tasks or (self.task,) * len(self.seeds), self.successes):
            k, n = counts.get(task, (0, 0))
            counts[task] = k + success, n + 1
        return counts

    @classmethod
    def concatenate(cls, records: Iterable[EvalRecord], task: str = "meta_world/quick", **metrics: Any) -> EvalRecord:
        """Joins the evaluations of one system on several tasks.

        Args:
            records: Evaluations of the same system.
            task: Name of the whole, such as the set of tasks; each episode keeps the name of its own in ``tasks``.
            **metrics: Metrics of the whole. Those of the parts are dropped: whether to add them up or to average
                them is for the caller to know.

        Returns:
            A record of all episodes, in order, with the provenance of the first part.

        Raises:
            UserError: No record, or records of different systems.
        """
        records = list(records)
        systems = sorted({record.system for record in records})
        if len(systems) != 1:
            raise UserError(
                f"cannot join {len(records)} records of {', '.join(map(repr, systems)) or 'no system'}; "
                "pass at least one, all of the same system"
            )
        joined = {
            name: [value for record in records for value in getattr(record, name)]
            for name in ("seeds", "successes", "returns", "lengths")
        }
        tasks = [name for record in records for name in record.tasks or (record.task,) * len(record.seeds)]
        return cls(
            system=systems[0], task=task, **joined, metrics=metrics, provenance=records[0].provenance, tasks=tasks
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types; a return that is not finite becomes None."""
        return jsonable(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "record") -> EvalRecord:
        """Rebuilds a record from ``to_dict``.

        Args:
            values: What ``to_dict`` gave.
            source: Where it was read, for error messages.

        Raises:
            UserError: A newer schema, or missing, unknown or malformed fields.
        """
        if not isinstance(values, Mapping) or not isinstance(values.get("schema"), int):
            raise UserError(f"{source} is not an evaluation record: it has no integer 'schema'")
        if values["schema"] > SCHEMA:
            raise UserError(
                f"{source} has schema {values['schema']}, this fleetgym reads up to {SCHEMA}: upgrade fleetgym"
            )
        known = {item.name for item in dataclasses.fields(cls)}
        if wrong := sorted(known.symmetric_difference(values) - ({"tasks"} - values.keys())):
            raise UserError(f"{source} is not an evaluation record: missing or unknown fields {', '.join(wrong)}")
        try:
            returns = [math.nan if value is None else value for value in values["returns"]]
            return cls(**{**values, "returns": returns})
        except UserError as error:
            raise UserError(f"{source}: {error}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{source} is not an evaluation record: {error}") from error

    def save(self, path: str | os.PathLike) -> Path:
        """Writes the record as JSON, atomically, and returns the path."""
        write_json(path, self.to_dict())
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> EvalRecord:
        """Reads a record.

        Raises:
            UserError: The file is missing, is not JSON, is of a newer schema or is not a record; the message names it.
        """
        return cls.from_dict(read_json(path), str(path))
