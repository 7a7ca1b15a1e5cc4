"""What benchmarks share: runs, baselines, summaries, profiles."""
