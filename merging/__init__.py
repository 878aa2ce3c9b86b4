"""fleetgym.merging."""

if __name__ == "merging":
    raise ImportError("import 'fleetgym.merging', not 'merging'")
