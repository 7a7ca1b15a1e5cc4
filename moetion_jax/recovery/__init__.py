"""Who goes back to where after a failure."""
