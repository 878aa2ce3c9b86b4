"""fleetgym.envs: worlds. Importing it imports no simulator; ``register_envs`` names them to Gymnasium."""

if __name__ == "envs":
    raise ImportError("import 'fleetgym.envs', not 'envs'")

from fleetgym.envs.suite import SUITES, EnvSuite, Task, suite

__all__ = ["SUITES", "EnvSuite", "Task", "register_envs", "suite"]


SUITES.register("fleet_tools", "fleetgym.envs.fleet_tools.suite:FLEET_TOOLS")
SUITES.register("grasping", "fleetgym.envs.grasping.suite:GRASPING")
SUITES.register("office_nav", "fleetgym.envs.office_nav.suite:OFFICE_NAV")


def register_envs() -> None:
    """Registers every environment with Gymnasium: strings only, nothing heavy is imported. May be called twice."""
    from gymnasium.envs.registration import register, registry

    from fleetgym.envs.meta_world.tasks import HORIZON, TASKS

    for task in TASKS:
        if f"MetaWorld/{task}" not in registry:
            register(
                f"MetaWorld/{task}",
                entry_point="fleetgym.envs.meta_world.env:MetaWorldEnv",
                max_episode_steps=HORIZON,
                kwargs={"task": task},
            )
    for name in ("MT10", "MT50"):
        if f"MetaWorld/{name}" not in registry:
            register(f"MetaWorld/{name}", vector_entry_point=f"fleetgym.envs.meta_world.vector:{name.lower()}")

    from fleetgym.envs.fleet_tools import names

    for task in names.TASKS:
        for arm in names.ARMS:
            if names.env_id(task, arm) not in registry:
                register(
                    names.env_id(task, arm),
                    entry_point="fleetgym.envs.fleet_tools.env:FleetToolsEnv",
                    max_episode_steps=names.HORIZON,
                    kwargs={"task": task, "arm": arm},
                )

    from fleetgym.envs.grasping import names as grasping

    for family in grasping.FAMILIES:
        if grasping.env_id(family) not in registry:
            register(
                grasping.env_id(family),
                entry_point="fleetgym.envs.grasping.env:GraspingEnv",
                kwargs={"family": family},
            )
    if "NerfGrasping-v0" not in registry:
        register("NerfGrasping-v0", entry_point="fleetgym.envs.grasping.nerf:NerfGraspingEnv")

    from fleetgym.envs.office_nav.suite import INSTRUCTIONS

    for name in INSTRUCTIONS:
        if name not in registry:
            register(
                name,
                entry_point="fleetgym.envs.office_nav.env:OfficeNavEnv",
                vector_entry_point="fleetgym.envs.office_nav.vector:make_vec",
                kwargs={"variant": name},
            )
    if "OfficeNav3D-v0" not in registry:
        register(
            "OfficeNav3D-v0",
            entry_point="fleetgym.envs.office_nav.env3d:OfficeNav3DEnv",
            vector_entry_point="fleetgym.envs.office_nav.env3d:OfficeNav3DVectorEnv",
        )
