"""MoEtion in JAX: sparse checkpointing for Mixture-of-Experts training."""
