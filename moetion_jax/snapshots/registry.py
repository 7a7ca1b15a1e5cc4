"""The store of snapshots in use; nothing else names it.

Whoever saves snapshots calls `make`, whoever lists or reads them `stored`: both
must be of one format.
"""

from __future__ import annotations

import os

from moetion_jax.snapshots import interface


def make(
  folder: str | os.PathLike[str],
  size_bytes: int,
  files: int,
  durable_folder: str | os.PathLike[str] | None = None,
) -> interface.Store:
  """Makes the store that a worker saves into, not started.

  Args:
    folder: folder of this worker alone, in host memory.
    size_bytes: size of a snapshot, see `manifest.data_bytes`.
    files: largest number of snapshots, the one being written included.
    durable_folder: folder of this worker alone, on disk, where the snapshots
      are then; None: they are in `folder`.
  """
  # Here: the stores need JAX, and most of those who read do without.
  from moetion_jax.snapshots import durable_store, memory_store

  store = memory_store.SnapshotStore(folder, size_bytes, files)
  if durable_folder is None:
    return store
  return durable_store.DurableStore(store, durable_folder)


def stored(folder: str | os.PathLike[str]) -> interface.StoredSnapshots:
  """Returns the snapshots that a worker's store has in a folder, to read."""
  return interface.StoredSnapshots(folder)
