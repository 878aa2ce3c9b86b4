"""fleetgym.assets."""

if __name__ == "assets":
    raise ImportError("import 'fleetgym.assets', not 'assets'")
