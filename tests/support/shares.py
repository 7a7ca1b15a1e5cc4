"""Shares of a stage of three operators."""

from __future__ import annotations

from moetion_jax import keys
from moetion_jax.snapshots import coverage

OPERATORS = tuple(keys.OperatorId('a', i) for i in range(3))


def rolling_share(iteration, state=None, *, replica=0, replicas=1):
  """A rolling one: by default operator iteration % 3 is in the slot."""
  slot = frozenset(
    OPERATORS[i] for i in ([iteration % 3] if state is None else state)
  )
  return coverage.Share(
    iteration=iteration,
    replica=replica,
    replicas=replicas,
    state=slot,
    compute=frozenset(OPERATORS) - slot,
  )
