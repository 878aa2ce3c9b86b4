"""Writes ``nerf_grasping.json``: an expert's episode with knocks, seen through a field."""

import importlib.util
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    path = HERE.parent / "envs" / "test_nerf_grasping.py"
    spec = importlib.util.spec_from_file_location("test_nerf_grasping", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (HERE / "nerf_grasping.json").write_text(json.dumps(module.golden_run(), indent=1) + "\n")
