"""The suite of Meta-World's tasks."""

from __future__ import annotations

from fleetgym.envs.meta_world.tasks import HORIZON, INSTRUCTIONS, SPLITS
from fleetgym.envs.suite import EnvSuite, Task

META_WORLD = EnvSuite(
    name="meta_world",
    entries=tuple(Task(name, f"MetaWorld/{name}", sentence, HORIZON) for name, sentence in INSTRUCTIONS.items()),
    splits=SPLITS,
    paper="Yu et al., Meta-World: A Benchmark and Evaluation for Multi-Task and Meta Reinforcement Learning, CoRL 2019",
    expert_function="fleetgym.envs.meta_world.experts:expert",
    vector_function="fleetgym.envs.meta_world.vector:make_vec",
)
