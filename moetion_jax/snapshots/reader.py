"""Reads a stage's snapshot from its stored shares."""

from __future__ import annotations

from collections.abc import Iterable

from moetion_jax.snapshots import interface, snapshot
from moetion_jax.state import layout as layout_lib


def load(
  layout: layout_lib.Layout,
  iteration: int,
  stores: Iterable[interface.StoredSnapshots],
) -> snapshot.Snapshot:
  """Loads a snapshot, verified; its arrays hold the leases of the files.

  Args:
    layout: layout of the stage's state.
    iteration: iteration of the snapshot.
    stores: those that have the shares that make it, at least one.

  Raises:
    SnapshotCorruptError: a share is damaged.
    StoreError: a share is of another model.
  """
  shares = []
  for store in stores:
    stored = store.open(iteration, verify=True)
    shares.append(snapshot.from_arrays(layout, stored.metadata, stored.arrays))
  return snapshot.merge(shares)
