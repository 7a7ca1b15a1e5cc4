"""The entries that a stage publishes, and those it needs for a replay."""

from __future__ import annotations

from collections.abc import Iterator

from moetion_jax import config as config_lib, keys

REPLICA = 0  # the replica that evaluates, and whose scalars are read


def published_entries(
  train: config_lib.TrainConfig, stage: int, iteration: int
) -> Iterator[keys.EntryKey]:
  """Yields the keys that a stage's replicas publish in an iteration."""
  for replica in range(train.replicas):
    kinds = [(keys.EntryKind.SCALARS, 1)]
    if stage < train.stages - 1:
      kinds.append((keys.EntryKind.ACTIVATION, train.microbatches))
      if train.evaluates(iteration) and replica == REPLICA:
        kinds.append((keys.EntryKind.EVALUATION, train.eval_microbatches))
    if stage:
      kinds.append((keys.EntryKind.GRADIENT, train.microbatches))
    for kind, number in kinds:
      for m in range(number):
        yield keys.EntryKey(iteration, stage, replica, kind, m)


def needed_entries(
  train: config_lib.TrainConfig, stage: int, iteration: int, *, scalars: bool
) -> Iterator[keys.EntryKey]:
  """Yields the keys a stage needs to replay an iteration of all replicas.

  Args:
    train: the run's settings.
    stage: the stage's number.
    iteration: the iteration to replay, without an evaluation.
    scalars: whether other stages' scalars are needed: no snapshot has them.
  """
  for other in range(train.stages):
    wanted = set()
    if other == stage - 1:
      wanted.add(keys.EntryKind.ACTIVATION)
    if other == stage + 1:
      wanted.add(keys.EntryKind.GRADIENT)
    if scalars and other != stage:
      wanted.add(keys.EntryKind.SCALARS)
    for key in published_entries(train, other, iteration):
      # All replicas have the same scalars.
      is_copy = key.kind is keys.EntryKind.SCALARS and key.replica != REPLICA
      if key.kind in wanted and not is_copy:
        yield key
