"""Everything that trains a policy. ``SYSTEMS`` names what ``fleetgym train`` can train."""

if __name__ == "agents":
    raise ImportError("import 'fleetgym.agents', not 'agents'")

from typing import Any

from fleetgym.core.registry import Registry

SYSTEMS: Registry[Any] = Registry("training system", group="fleetgym.agents")
"""Name -> ``main(argv) -> int``."""

SYSTEMS.register("bc", "fleetgym.agents.bc:main")
