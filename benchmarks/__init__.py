"""fleetgym.benchmarks."""

if __name__ == "benchmarks":
    raise ImportError("import 'fleetgym.benchmarks', not 'benchmarks'")
