"""Puts a state together from checkpoints none of which holds everything."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moetion_jax import errors, keys
from moetion_jax.snapshots import folders, reader, registry, snapshot
from moetion_jax.state import layout as layout_lib, partition


def load(
  root: str | os.PathLike[str],
  stage: int,
  start: int,
  layout: layout_lib.Layout,
  initial: Callable[[], partition.State],
) -> snapshot.Snapshot:
  """Loads every operator's newest version up to the start (PEC's restore).

  Args:
    root: folder that holds the snapshot folders of the stage's workers.
    stage: the stage.
    start: iteration of the snapshot from which all but the experts comes.
    layout: layout of the state.
    initial: makes the initial state, for experts that were never saved.

  Returns:
    The operators as a whole snapshot of the start, without digests and scalars,
    which are of a state that no longer exists.

  Raises:
    StoreError: a snapshot is missing or damaged.
  """
  iterations = {
    iteration
    for folder in folders.snapshots_folders(root, stage)
    for iteration in registry.stored(folder).iterations()
  }
  state: dict[keys.OperatorId, Any] = {}
  newest: snapshot.Snapshot | None = None
  for iteration in sorted(iterations, reverse=True):
    if iteration > start or len(state) == len(layout.operators):
      continue
    stores = folders.find_shares(root, stage, iteration)
    if not stores:
      continue
    merged = reader.load(layout, iteration, stores)
    newest = newest or merged
    if newest.metadata['iteration'] != start:
      raise errors.StoreError(f'{root}: stage {stage} has no snapshot {start}')
    for operator, rows in merged.state.items():
      if merged is newest or operator.expert >= 0:
        state.setdefault(operator, rows)
  if newest is None:
    raise errors.StoreError(f'{root}: stage {stage} has no snapshot {start}')
  missing = frozenset(layout.operators) - frozenset(state)
  if lost := sorted(o for o in missing if o.expert < 0):
    raise errors.StoreError(
      f'{root}: snapshot {start} of stage {stage} lacks {lost[0]}, which every '
      'checkpoint holds: it is of another model, or its manifest is damaged'
    )
  if missing:
    state |= _rows(layout, initial(), missing)
  return dataclasses.replace(
    newest, state=state, compute={}, gradients={}, extras={}
  )


def _rows(
  layout: layout_lib.Layout,
  state: partition.State,
  wanted: frozenset[keys.OperatorId],
) -> dict[keys.OperatorId, dict[str, np.ndarray]]:
  """Returns operators of a state in the form that a snapshot has."""
  found: dict[keys.OperatorId, dict[str, np.ndarray]] = {o: {} for o in wanted}
  for leaf, value in zip(layout.leaves, jax.tree.leaves(state), strict=True):
    of_group = wanted & frozenset(
      layout.partition.operators_of(leaf.group.name)
    )
    if of_group:
      host = np.array(value)
      for operator in of_group:
        row = host[operator.expert] if leaf.group.stacked else host
        found[operator][leaf.path] = row
  return found
