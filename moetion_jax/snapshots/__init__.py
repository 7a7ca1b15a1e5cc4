"""The format of snapshots, and the stores that hold them."""
