"""The suite of tool-use tasks."""

from __future__ import annotations

from fleetgym.envs.fleet_tools.names import HORIZON, INSTRUCTIONS, SPLITS, env_id
from fleetgym.envs.suite import EnvSuite, Task

FLEET_TOOLS = EnvSuite(
    name="fleet_tools",
    entries=tuple(Task(name, env_id(name), sentence, HORIZON) for name, sentence in INSTRUCTIONS.items()),
    splits=SPLITS,
    paper="Wang et al., Robot Fleet Learning via Policy Merging, ICLR 2024",
    expert_function="fleetgym.envs.fleet_tools.expert:expert",
    vector_function="fleetgym.envs.fleet_tools.vector:make_vec",
)
