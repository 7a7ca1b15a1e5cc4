"""The agent of a run: starts workers, decides on failures, writes files."""
