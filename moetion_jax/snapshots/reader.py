"""Reads a stage's snapshot from its stored shares."""

from __future__ import annotations

import os
from collections.abc import Iterable

from moetion_jax.snapshots import file as snapshot_file, snapshot
from moetion_jax.state import layout as layout_lib


def load(
  layout: layout_lib.Layout, directories: Iterable[str | os.PathLike[str]]
) -> snapshot.Snapshot:
  """Loads a snapshot, verified; its arrays hold the leases of the files.

  Args:
    layout: layout of the stage's state.
    directories: directories of the shares that make it, at least one.

  Raises:
    SnapshotCorruptError: a share is damaged.
    StoreError: a share is of another model.
  """
  shares = []
  for directory in directories:
    stored = snapshot_file.open_snapshot(directory, verify=True)
    shares.append(snapshot.from_arrays(layout, stored.metadata, stored.arrays))
  return snapshot.merge(shares)
