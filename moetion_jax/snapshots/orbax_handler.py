"""The Orbax side of snapshots: a `CheckpointHandler` and its arguments.

Any Orbax checkpointer takes them: `ocp.AsyncCheckpointer(SnapshotHandler())`
saves `SnapshotSave`, and `ocp.Checkpointer(SnapshotHandler()).restore(path)`
reads a snapshot back. `checkpointer` makes the checkpointer that
`memory_store.SnapshotStore` drives.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
from collections.abc import Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.future import Future

from moetion_jax.hostmem import private
from moetion_jax.snapshots import file as snapshot_file, manifest

TEMPORARY_SUFFIX = ocp.path.atomicity.TMP_DIR_SUFFIX


class SnapshotHandler(ocp.AsyncCheckpointHandler):
  """Writes and reads one snapshot; see `SnapshotSave`.

  Each process saves on its own: nothing here waits for another process.
  """

  async def async_save(
    self, directory: epath.Path, args: SnapshotSave
  ) -> list[Future]:
    """Starts copies from devices; the rest runs in Orbax's thread."""
    for buffer in args.buffers:
      for piece in buffer.pieces:
        if isinstance(piece, jax.Array):
          piece.copy_to_host_async()
    return [_Write(directory, args)]

  def save(self, directory: epath.Path, args: SnapshotSave) -> None:
    """Writes the two files of a snapshot."""
    snapshot_file.write(directory, args.buffers, args.metadata, args.data_file)

  def restore(
    self, directory: epath.Path, args: SnapshotRestore | None = None
  ) -> dict[str, Any]:
    """Returns {'metadata': ..., 'arrays': {name: copy}}, verified.

    Raises:
      SnapshotCorruptError: the files are not what was written.
    """
    del args
    with snapshot_file.open_snapshot(directory, verify=True) as snapshot:
      return {
        'metadata': snapshot.metadata,
        'arrays': {
          name: array.copy() for name, array in snapshot.arrays.items()
        },
      }

  def metadata(self, directory: epath.Path) -> dict[str, Any]:
    """Returns the JSON object that was saved."""
    return snapshot_file.read_manifest(directory).metadata


@ocp.args.register_with_handler(SnapshotHandler, for_save=True)
@dataclasses.dataclass
class SnapshotSave(ocp.args.CheckpointArgs):
  """The contents of a snapshot to save.

  Attributes:
    metadata: any JSON object.
    buffers: the snapshot's arrays; pieces may be JAX arrays, which must not be
      donated before the save ends.
    data_file: an open file whose pages are reused; None makes a new file.
  """

  metadata: dict[str, Any]
  buffers: Sequence[manifest.Buffer]
  data_file: snapshot_file.DataFile | None = None


@ocp.args.register_with_handler(SnapshotHandler, for_restore=True)
@dataclasses.dataclass
class SnapshotRestore(ocp.args.CheckpointArgs):
  """The arguments of a restore: none, but Orbax wants a class of them."""


class _Write(Future):
  """The write of one snapshot, done by the Orbax thread that waits for it.

  Orbax's own `CommitFuture` takes one more thread and two event loops a save.
  """

  def __init__(self, directory: epath.Path, args: SnapshotSave):
    self._directory = directory
    self._args = args
    self._lock = threading.Lock()
    self._is_done = False

  def result(self, timeout: float | None = None) -> None:
    """Writes the snapshot at the first call; later calls do nothing."""
    del timeout
    with self._lock:
      if not self._is_done:
        args = self._args
        snapshot_file.write(
          self._directory, args.buffers, args.metadata, args.data_file
        )
        self._is_done = True

  def cancel(self) -> None:
    """Does nothing: a write is not interrupted."""


class _Rename(ocp.path.atomicity.AtomicRenameTemporaryPath):
  """Orbax's atomic rename without the files it adds (5.1 -> 1.7 ms a save)."""

  async def create(self) -> epath.Path:
    """Makes the temporary directory."""
    path = self.get()
    private.make_folder(path)
    return path

  async def finalize(self) -> None:
    """Commits with a rename, the one step that makes the snapshot exist."""
    os.rename(self.get(), self.get_final())


class _NoMetadata(ocp.metadata.MetadataStore):
  """A metadata store that writes no file: the manifest says more."""

  def is_blocking_writer(self) -> bool:
    return True

  def write(self, file_path: Any, metadata: Any) -> None:
    del file_path, metadata

  def read(self, file_path: Any) -> None:
    del file_path

  def update(self, file_path: Any, **kwargs: Any) -> None:
    del file_path, kwargs

  def wait_until_finished(self) -> None:
    pass

  def close(self) -> None:
    pass


class QuietOrbax(logging.Filter):
  """Drops Orbax's INFO messages about a save while one of ours runs."""

  is_on = False

  def filter(self, record: logging.LogRecord) -> bool:
    """Returns True if the record is to be logged."""
    return not (
      self.is_on
      and record.levelno <= logging.INFO
      and f'{os.sep}orbax{os.sep}' in record.pathname
    )


def alone(name: str) -> ocp.options.MultiprocessingOptions:
  """Makes options that let checkpointer `name` save for this process alone."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me,
    active_processes={me},
    barrier_sync_key_prefix=f'{name}-{me}',
  )


def checkpointer() -> ocp.AsyncCheckpointer:
  """Makes a checkpointer that saves for this process alone, with no barrier."""
  return ocp.AsyncCheckpointer(
    SnapshotHandler(),
    async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    multiprocessing_options=alone('moetion'),
    checkpoint_metadata_store=_NoMetadata(),
    temporary_path_class=_Rename,
  )
