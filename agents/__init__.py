"""fleetgym.agents."""

if __name__ == "agents":
    raise ImportError("import 'fleetgym.agents', not 'agents'")
