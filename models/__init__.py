"""The models that `launch` trains; they know nothing of checkpoints."""
