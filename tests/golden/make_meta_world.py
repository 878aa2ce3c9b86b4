"""Writes meta_world.json anew: ``python tests/golden/make_meta_world.py``.

A trace may change only together with a new version of the environments' ids.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "envs"))

from test_meta_world import GOLDEN, play  # noqa: E402

from fleetgym.core.files import atomic_write  # noqa: E402
from fleetgym.envs.meta_world.env import MetaWorldEnv  # noqa: E402
from fleetgym.envs.meta_world.tasks import TASKS  # noqa: E402


def trace(task):
    env = MetaWorldEnv(task)
    observations, rewards = play(env, 7, 30)
    return {
        "random_vector": env.random_vector.tolist(),
        "return": round(float(rewards.sum()), 9),
        "observations": observations[[0, 10, 30]].round(9).tolist(),
    }


if __name__ == "__main__":
    import json

    # One line a task keeps the file small and its changes readable.
    lines = [f"{json.dumps(task)}: {json.dumps(trace(task))}" for task in TASKS]
    with atomic_write(GOLDEN) as temporary:
        temporary.write_text("{\n" + ",\n".join(lines) + "\n}\n")
