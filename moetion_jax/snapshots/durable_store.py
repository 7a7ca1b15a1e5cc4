"""Snapshots in two phases: into memory first, then into storage.

Only the second phase counts: a snapshot exists when its files and their
directory are on disk, committed by a rename. The copy in memory is only on its
way; nobody reads it again (CheckFreq, FAST 2021: snapshot and persist).
"""

from __future__ import annotations

import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

from moetion_jax import disk, errors
from moetion_jax.hostmem import private
from moetion_jax.snapshots import (
  file as snapshot_file,
  interface,
  manifest as manifest_lib,
)

_TEMPORARY_SUFFIX = '.tmp'
_OLD_SUFFIX = '.old'  # as earlier versions named one that was replaced
_UNFINISHED = re.compile(
  rf'\d+({re.escape(_TEMPORARY_SUFFIX)}|{re.escape(_OLD_SUFFIX)})'
)
_PIECE_BYTES = 1 << 22
_ALL = 1 << 62  # nothing in memory is kept: no iteration is this late


class InterruptedStoreError(errors.StoreError):
  """Raised when a snapshot is given up on its way to storage."""


class DurableStore(interface.Store):
  """The snapshots of one worker, on disk."""

  def __init__(
    self,
    memory: interface.Store,
    folder: str | os.PathLike[str],
  ):
    """Stores the arguments.

    Args:
      memory: the store that snapshots go into first, not started, with at
        least one file.
      folder: folder of this worker alone, on disk; created if it does not
        exist.
    """
    self.folder = pathlib.Path(folder)
    self._memory = memory
    self._first_iteration = 0
    self._is_interrupted = False

  def start(self) -> None:
    """See `interface.Store`."""
    missing = [self.folder, *self.folder.parents]
    missing = [path for path in missing if not path.exists()]
    try:
      for path in reversed(missing):
        private.make_folder(path, exist_ok=True)
        # Else its contents reach the disk without it.
        disk.sync_folder(path.parent)
      private.make_folder(self.folder, exist_ok=True)  # it may be a file
    except OSError as error:
      errors.check_limits(error, self.folder)
      raise errors.StoreError(f'{self.folder}: {error.strerror}') from error
    for path in self.folder.iterdir():
      if _UNFINISHED.fullmatch(path.name):
        shutil.rmtree(path, ignore_errors=True)
    for iteration, path in self.paths().items():
      final = self.folder / str(iteration)
      if path != final:  # killed while it was replaced
        shutil.rmtree(final, ignore_errors=True)
        path.rename(final)
      shutil.rmtree(_replaced(final), ignore_errors=True)
    self._memory.start()
    self._memory.retain(_ALL)

  def close(self) -> None:
    """See `interface.Store`."""
    self._memory.close()

  def interrupt(self) -> None:
    """See `interface.Store`."""
    self._is_interrupted = True

  def retain(self, first_iteration: int) -> None:
    """See `interface.Store`."""
    self._first_iteration = max(self._first_iteration, first_iteration)

  def enlarge(self, size_bytes: int) -> None:
    """See `interface.Store`."""
    self._memory.enlarge(size_bytes)

  def save(
    self,
    iteration: int,
    metadata: dict[str, Any],
    buffers: Sequence[manifest_lib.Buffer],
    *,
    replace: bool = False,
  ) -> int:
    """See `interface.Store`; when this returns, the snapshot is on disk."""
    if iteration in self.iterations() and self._keeps(
      iteration, metadata, buffers, replace
    ):
      return 0
    # What memory still has of that iteration never counted.
    self._memory.save(iteration, metadata, buffers, replace=True)
    try:
      self._persist(iteration)
    except FileNotFoundError as error:  # of memory: this one makes its own
      raise errors.StoreError(f'{error.filename}: {error.strerror}') from error
    except OSError as error:
      errors.check_limits(error)
      raise errors.StoreError(
        f'{self.folder}: snapshot {iteration}: {error.strerror}; make room, or '
        'name another --durable_dir'
      ) from error
    for old, path in snapshot_file.list_snapshots(self.folder).items():
      if old < self._first_iteration:
        shutil.rmtree(path, ignore_errors=True)
    return sum(buffer.nbytes for buffer in buffers)

  def _persist(self, iteration: int) -> None:
    """Copies a snapshot from memory to disk: the second phase."""
    source = self._memory.folder / str(iteration)
    final = self.folder / str(iteration)
    temporary = final.with_name(final.name + _TEMPORARY_SUFFIX)
    used_bytes = snapshot_file.read_manifest(source).used_bytes
    shutil.rmtree(temporary, ignore_errors=True)
    private.make_folder(temporary)
    self._copy(source, temporary, snapshot_file.DATA_NAME, used_bytes)
    manifest = snapshot_file.MANIFEST_NAME
    self._copy(source, temporary, manifest, (source / manifest).stat().st_size)
    disk.sync_folder(temporary)
    # The old one may be damaged, or was taken again; it counts until then.
    if not final.exists():
      temporary.rename(final)
    elif not disk.exchange(temporary, final):
      final.rename(_replaced(final))
      temporary.rename(final)
    disk.sync_folder(self.folder)
    for old in (temporary, _replaced(final)):
      shutil.rmtree(old, ignore_errors=True)

  def _copy(
    self,
    source: pathlib.Path,
    target: pathlib.Path,
    name: str,
    size_bytes: int,
  ) -> None:
    with (
      open(source / name, 'rb') as old,
      open(private.create(target / name), 'wb') as new,
    ):
      offset = 0
      while offset < size_bytes:
        if self._is_interrupted:
          raise InterruptedStoreError(f'{target}: given up')
        count = min(_PIECE_BYTES, size_bytes - offset)
        sent = os.sendfile(new.fileno(), old.fileno(), offset, count)
        if not sent:
          raise errors.StoreError(f'{source / name}: was cut meanwhile')
        offset += sent
      os.fsync(new.fileno())


def _replaced(final: pathlib.Path) -> pathlib.Path:
  """Returns the place of a snapshot that makes way for its successor."""
  return final.with_name(final.name + snapshot_file.REPLACED_SUFFIX)
