"""Shared parts of the benchmarks: runs, baselines, summaries, profiles."""
