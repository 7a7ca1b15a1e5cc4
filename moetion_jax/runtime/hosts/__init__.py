"""The agent's view of a run's processes and stores, on all its hosts."""
