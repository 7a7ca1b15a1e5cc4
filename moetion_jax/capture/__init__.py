"""Copies from the device into a snapshot, and from snapshots into a state."""
