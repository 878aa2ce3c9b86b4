"""Writes ``grasping.json``: an expert's episode with knocks, of the families that need no extra."""

import importlib.util
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("test_grasping", HERE.parent / "envs" / "test_grasping.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    traces = {family: module.golden_run(family) for family in ("Procedural", "Named")}
    (HERE / "grasping.json").write_text(json.dumps(traces, indent=1) + "\n")
