"""fleetgym.envs."""

if __name__ == "envs":
    raise ImportError("import 'fleetgym.envs', not 'envs'")


def register_envs() -> None:
    """Registers every environment with Gymnasium (strings only: nothing heavy is imported)."""
