"""The suite of grasping from the palm."""

from __future__ import annotations

from fleetgym.envs.grasping.names import HORIZON, INSTRUCTIONS, SPLITS, env_id
from fleetgym.envs.suite import EnvSuite, Task

GRASPING = EnvSuite(
    name="grasping",
    entries=tuple(Task(name, env_id(name), sentence, HORIZON) for name, sentence in INSTRUCTIONS.items()),
    splits=SPLITS,
    paper="Zhou et al., NeRF in the Palm of Your Hand, CVPR 2023; Wang et al., GA-DDPG, CoRL 2021",
    expert_function="fleetgym.envs.grasping.expert:expert",
    vector_function="fleetgym.envs.grasping.vector:make_vec",
    goals=("all",),
    opengl=False,
)
