"""Sparse checkpoints for a user's own training loop, without `launch`."""

from moetion_jax.loop.checkpointer import NotExactError, SparseCheckpointer
from moetion_jax.loop.settings import LoopSettings
from moetion_jax.state.model import Group

__all__ = ['Group', 'LoopSettings', 'NotExactError', 'SparseCheckpointer']
