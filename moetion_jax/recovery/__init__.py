"""Recovery: who goes back after a failure, and to which state."""
