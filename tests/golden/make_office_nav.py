"""Writes ``office_nav.json``: a hash of everything that each variant returns over a hundred steps of four rows."""

import importlib.util
import json
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location("test_office_nav", HERE.parent / "envs" / "test_office_nav.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    traces = {name: module.golden_run(name) for name in module.VARIANTS}
    (HERE / "office_nav.json").write_text(json.dumps(traces, indent=1) + "\n")
