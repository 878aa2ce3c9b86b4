"""The suite of the OfficeNav variants."""

from __future__ import annotations

from fleetgym.envs.office_nav.layout import HORIZON
from fleetgym.envs.suite import EnvSuite, Task

_TEXT = "Find a blue office; the sign says in words where one is."
INSTRUCTIONS = {
    "OfficeNav-v0": _TEXT,
    "OfficeNav-Symbolic-v0": _TEXT,
    "OfficeNav-SingleGoal-v0": "Find the one blue office; the sign says in words where it is.",
    "OfficeNav-Tall-v0": _TEXT,
    "OfficeNav-TallSkinny-v0": _TEXT,
    "OfficeNav-Map-v0": "Find a blue office; the sign is a drawn floor plan.",
    "OfficeNav-Released-v0": _TEXT,
}

OFFICE_NAV = EnvSuite(
    name="office_nav",
    entries=tuple(Task(name, name, sentence, HORIZON) for name, sentence in INSTRUCTIONS.items()),
    splits={"all": tuple(INSTRUCTIONS), "quick": ("OfficeNav-Symbolic-v0",)},
    paper="Liu et al., Simple Embodied Language Learning as a Byproduct of Meta-Reinforcement Learning, ICML 2023",
    vector_function="fleetgym.envs.office_nav.vector:suite_vec",
    goals=("all",),
)
