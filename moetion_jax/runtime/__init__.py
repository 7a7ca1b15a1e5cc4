"""The multi-process system: agents, hosts, workers, and what a run leaves."""
