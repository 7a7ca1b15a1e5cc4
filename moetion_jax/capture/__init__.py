"""From the device into a snapshot, and from snapshots back into a state."""
