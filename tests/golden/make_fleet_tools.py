"""Writes fleet_tools.json anew: ``python tests/golden/make_fleet_tools.py``.

A trace may change only together with a new version of the environments' ids.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))

from test_fleet_tools import GOLDEN, IDS, play  # noqa: E402

from fleetgym.core.files import atomic_write  # noqa: E402
from fleetgym.envs.fleet_tools.env import FleetToolsEnv  # noqa: E402
from fleetgym.envs.fleet_tools.names import env_id  # noqa: E402


def trace(task, arm):
    env = FleetToolsEnv(task, arm=arm)
    observations, rewards = play(env, 7, 20)
    return {
        "instances": [env.tool, env.thing],
        "pose": env.pose.tolist(),
        "return": round(float(rewards.sum()), 9),
        "observations": observations[[0, 10, 20], :27].round(9).tolist(),
    }


if __name__ == "__main__":
    import json

    # One line an id keeps the file small and its changes readable.
    lines = [f"{json.dumps(env_id(*pair))}: {json.dumps(trace(*pair))}" for pair in IDS]
    with atomic_write(GOLDEN) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
