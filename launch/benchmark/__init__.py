"""Benchmarks: `python -m launch.benchmark SUBCOMMAND`."""
