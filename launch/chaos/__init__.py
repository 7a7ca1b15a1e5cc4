"""Random faults against the running program: `python -m launch.chaos`."""
