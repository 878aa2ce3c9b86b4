"""``fleetgym doctor``: what works on this machine, and the line that makes more work."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from fleetgym.cli.options import parse, print_json, print_pairs

_PACKAGES = (
    "gymnasium",
    "mujoco",
    "metaworld",
    "torch",
    "numpy",
    "scipy",
    "numba",
    "minari",
    "stable-baselines3",
    "sb3-contrib",
    "pybullet",
    "safetensors",
    "moviepy",
)


@dataclass
class Options:
    """Say what works on this machine: versions, processor, GPU, rendering (by drawing a frame), films, extras."""

    json: bool = False
    """Print JSON."""


def main(argv: Sequence[str]) -> int:
    """Prints the findings; the exit code is 0 whatever they are."""
    options = parse(Options, argv, "doctor")
    found = examine()
    if options.json:
        print_json(found)
        return 0
    gl, gpu = found["gl"], found["gpu"]
    print_pairs(
        [
            ("fleetgym", found["fleetgym"] + (f" (commit {found['commit'][:10]})" if found["commit"] else "")),
            ("python", f"{found['python']} on {found['platform']}"),
            ("processor", f"{found['cpu']}, {found['cores']} cores usable"),
            ("GPU", ", ".join(gpu["names"]) if gpu["names"] else f"none ({gpu['reason']})"),
            *((name, version or "not installed") for name, version in found["packages"].items()),
            *((f"GL {name}", ("" if ok["works"] else "no: ") + ok["message"]) for name, ok in gl["tried"].items()),
            ("rendering", gl["chosen"] or "the system's own OpenGL" if gl["works"] else f"off: {gl['advice']}"),
            ("films", found["ffmpeg"]["version"] if found["ffmpeg"]["works"] else f"no: {found['ffmpeg']['reason']}"),
            *(
                (f"extra {name}", f"{extra['purpose']}: " + ("installed" if extra["installed"] else extra["install"]))
                for name, extra in found["extras"].items()
            ),
        ]
    )
    return 0


def examine() -> dict[str, Any]:
    """What works, as JSON types."""
    from fleetgym.core.optional import EXTRAS, install_line, installed
    from fleetgym.core.records import provenance

    gl = _gl()  # before torch is imported: the frames are drawn by other processes meanwhile
    facts = provenance()
    return {
        "fleetgym": _version("fleetgym"),
        "commit": facts["commit"],
        "python": facts["python"],
        "platform": facts["platform"],
        "cpu": facts["device"].rpartition(", ")[2],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "gpu": _gpu(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gl": gl,
        "ffmpeg": _ffmpeg(),
        "extras": {
            name: {"purpose": extra.purpose, "installed": installed(name), "install": install_line(name)}
            for name, extra in EXTRAS.items()
        },
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return {"names": [], "reason": f"torch does not import: {error}"}
    if torch.cuda.is_available():
        return {"names": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())], "reason": ""}
    if torch.version.cuda is None:
        return {"names": [], "reason": "this torch is a CPU build"}
    return {"names": [], "reason": f"torch for CUDA {torch.version.cuda} sees no device"}


def _gl() -> dict[str, Any]:
    from fleetgym.core.render import BACKENDS, NO_GL_HELP, choose_gl, probe_gl

    if not sys.platform.startswith("linux"):
        return {"tried": {}, "chosen": "", "works": True, "advice": ""}  # the system brings its own OpenGL
    backends = (*BACKENDS, "glfw")
    with ThreadPoolExecutor(len(backends)) as pool:
        tried = {
            name: {"works": bool(ok), "message": " ".join(str(message).removeprefix(f"{name}: ").split())}
            for name, (ok, message) in zip(backends, pool.map(probe_gl, backends), strict=True)
        }
    chosen = choose_gl()
    working = [name for name, outcome in tried.items() if outcome["works"]]
    works = chosen in working
    advice = "" if works else f"set MUJOCO_GL={working[0]}" if working else NO_GL_HELP
    return {"tried": tried, "chosen": chosen, "works": works, "advice": advice}


def _ffmpeg() -> dict[str, Any]:
    try:
        import imageio_ffmpeg

        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-version"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (ImportError, OSError, RuntimeError, subprocess.SubprocessError) as error:
        return {"works": False, "version": None, "reason": f"{error}; pip install imageio-ffmpeg brings one"}
    return {"works": True, "version": " ".join(done.stdout.split()[:3]), "reason": ""}
