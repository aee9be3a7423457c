"""Benchmark suites: each file offers `run(repeats) -> list[Measurement]`."""
