"""Renews constraints.txt from the environment that it runs in.

    .venv/bin/python scripts/freeze.py

Pins every package that fleetgym and its extras need, directly or not, to the installed version; one that is not
installed keeps its line. Python 3.10 and 3.11 have their own versions of some packages: the lines of the other Python
stay as they are, so run it once with each.
Local suffixes are dropped (``2.13.0+cpu`` exists only beside a CPU-only wheel; ``2.13.0`` takes either build).
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# The versions that the tests ran with. `make venv` installs exactly these; scripts/freeze.py renews them.
"""
MARKERS = {"3.10": 'python_version < "3.11"', "3.11": 'python_version >= "3.11"'}


def needed(package: str, extras: set[str], known: dict[str, str]) -> dict[str, str]:
    """Name and version of all that a package needs with these extras, itself left out.

    What is not installed has the version of ``known``, if any: an extra that needs an environment of its own, such as
    nerfstudio's, is pinned by hand, and some markers hold elsewhere only, such as a CUDA library's.
    """
    versions: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [(package, extra) for extra in ("", *extras)]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            distribution = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            if name in known:
                versions[name] = known[name]
            continue
        versions[canonicalize_name(name)] = distribution.version.partition("+")[0]
        for text in distribution.requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(requirement.name), item) for item in ("", *requirement.extras)]
    versions.pop(package)
    # torch pins CUDA libraries itself, and which there are depends on the build.
    return {name: v for name, v in versions.items() if not re.match(r"nvidia-|cuda-|triton$|setuptools$", name)}


def main() -> int:
    """Rewrites constraints.txt beside the pyproject.toml."""
    file = Path(__file__).resolve().parents[1] / "constraints.txt"
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here not in MARKERS:
        print(f"error: run it with Python {' or '.join(MARKERS)}, this is {here}", file=sys.stderr)
        return 2
    pins: dict[str, dict[str, str]] = {python: {} for python in MARKERS}
    for line in file.read_text().splitlines() if file.exists() else []:
        if match := re.match(r"([\w.-]+)==([^\s;]+)(?:\s*;\s*(.*))?", line):
            for python, marker in MARKERS.items():
                if match[3] in (None, marker):
                    pins[python][match[1]] = match[2]
    extras = importlib.metadata.metadata("fleetgym").get_all("Provides-Extra")
    pins[here] = needed("fleetgym", set(extras), pins[here])
    lines = []
    for name in sorted({name for versions in pins.values() for name in versions}):
        found = {python: versions[name] for python, versions in pins.items() if name in versions}
        if len(found) == len(MARKERS) and len(set(found.values())) == 1:
            lines.append(f"{name}=={found[here]}\n")
        else:
            lines += [f"{name}=={version} ; {MARKERS[python]}\n" for python, version in found.items()]
    file.write_text(HEADER + "".join(lines))
    print(f"{file.name}: {len(pins[here])} packages for Python {here}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
