"""The agent of a run: it starts workers, decides on failures, writes the files."""
