"""The worker process: one stage of a run."""
