"""Saves snapshots into tmpfs through Orbax, in pages that are used again.

Orbax drives (`AsyncCheckpointer`) and commits (a temporary directory, renamed);
our `CheckpointHandler` writes the files that `file` describes. Any Orbax
`Checkpointer(SnapshotHandler())` reads them back.

A store owns a fixed number of data files of one size. Each of them lies in a
snapshot, in a temporary directory or in the pool, wherever the process is
killed, so a folder's host memory is what was reserved at its start. When
snapshots become larger and fewer, the same memory is cut into other files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Sequence
from typing import Any

import orbax.checkpoint as ocp

from moetion_jax import errors
from moetion_jax.hostmem import (
  memory_limits,
  private,
  raw_bytes,
  store_folder,
)
from moetion_jax.snapshots import (
  file as snapshot_file,
  interface,
  manifest,
  orbax_handler,
)

_POOL_PREFIX = 'free-'
_RETIRED_PREFIX = 'retired-'
# Whatever has another name is somebody else's.
_POOL_NAME = re.compile(rf'{_POOL_PREFIX}\d+')
_RETIRED_NAME = re.compile(rf'{_RETIRED_PREFIX}\d+')
_TEMPORARY_NAME = re.compile(
  rf'\d+.*{re.escape(orbax_handler.TEMPORARY_SUFFIX)}.*'
)


class SnapshotStore(interface.Store):
  """The snapshots of one worker, in tmpfs; use it in a with block."""

  def __init__(
    self, folder: str | os.PathLike[str], size_bytes: int, files: int
  ):
    """Stores the settings.

    Args:
      folder: folder of this worker alone; created if it does not exist.
      size_bytes: size of a data file, see `manifest.data_bytes`.
      files: largest number of snapshots, the one being written included.
    """
    self.folder = pathlib.Path(folder)
    self._size_bytes = raw_bytes.whole_pages(max(size_bytes, 1))
    self._files = files
    self._reserved_bytes = self._size_bytes * files
    self._is_cut_anew = False
    self._first_iteration = 0
    self._lock_fd = -1
    self._checkpointer: ocp.AsyncCheckpointer | None = None
    self._quiet = orbax_handler.QuietOrbax()
    self._names = 0
    # Every data file of the folder is in one of these three; a value is None
    # while the file is not mapped.
    self._free: list[snapshot_file.DataFile] = []
    self._snapshots: dict[int, snapshot_file.DataFile | None] = {}
    self._leftovers: dict[pathlib.Path, snapshot_file.DataFile | None] = {}

  def start(self) -> None:
    """See `interface.Store`: adopts what is there, and reserves the pool.

    Data files of temporary directories are kept if they have the size that is
    asked for now.

    Raises:
      StoreError: a living process uses the folder, the folder is not private,
        or there is no room; what was reserved is given back then.
    """
    try:
      private.make_folder(self.folder, exist_ok=True)
    except OSError as error:
      errors.check_limits(error, self.folder)
      raise errors.StoreError(f'{self.folder}: {error.strerror}') from error
    store_folder.check_private(self.folder)
    self._lock_fd = os.open(
      self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    )
    try:
      try:
        fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        raise errors.StoreError(
          f'{self.folder}: another living process writes snapshots here'
        ) from error
      self._adopt()
      self._balance()
      self._checkpointer = orbax_handler.checkpointer()
    except BaseException:
      self.close()
      raise
    logging.getLogger('absl').addFilter(self._quiet)

  def close(self) -> None:
    """See `interface.Store`."""
    if self._checkpointer is not None:
      self._checkpointer.close()
      self._checkpointer = None
      logging.getLogger('absl').removeFilter(self._quiet)
    for data in (
      *self._free,
      *self._snapshots.values(),
      *self._leftovers.values(),
    ):
      if data is not None:
        data.close()
    self._free, self._snapshots, self._leftovers = [], {}, {}
    if self._lock_fd >= 0:
      os.close(self._lock_fd)
      self._lock_fd = -1

  def __enter__(self) -> SnapshotStore:
    self.start()
    return self

  def __exit__(self, *_: object) -> None:
    self.close()

  def retain(self, first_iteration: int) -> None:
    """See `interface.Store`."""
    self._first_iteration = max(self._first_iteration, first_iteration)

  def enlarge(self, size_bytes: int) -> None:
    """See `interface.Store`: cuts what was reserved into larger data files.

    Snapshots keep the files that they have. Other files make way; larger ones
    are made one by one, when they are needed and there are bytes for them. May
    be called before `start`; does nothing if the files are large enough.
    """
    size_bytes = raw_bytes.whole_pages(size_bytes)
    if size_bytes <= self._size_bytes:
      return
    if size_bytes > self._reserved_bytes:
      raise errors.StoreError(
        f'{self.folder}: a data file of '
        f'{memory_limits.format_bytes(size_bytes)} does not fit into '
        f'{memory_limits.format_bytes(self._reserved_bytes)}'
      )
    self._size_bytes = size_bytes
    self._files = self._reserved_bytes // size_bytes
    self._is_cut_anew = True
    for data in self._free:
      data.remove()
    self._free = []

  def save(
    self,
    iteration: int,
    metadata: dict[str, Any],
    buffers: Sequence[manifest.Buffer],
    *,
    replace: bool = False,
  ) -> int:
    """See `interface.Store`."""
    if self._checkpointer is None:
      raise errors.StoreError(f'{self.folder}: not started')
    json.dumps(metadata)  # raises TypeError before anything is done
    manifest.check(buffers)
    if iteration in self._snapshots and self._keeps(
      iteration, metadata, buffers, replace
    ):
      return 0
    need_bytes = manifest.data_bytes(b.nbytes for b in buffers)
    if need_bytes > self._size_bytes:
      raise errors.StoreError(
        f'{self.folder}: snapshot {iteration} needs '
        f'{memory_limits.format_bytes(need_bytes)}, but data files of '
        f'{memory_limits.format_bytes(self._size_bytes)} were reserved'
      )
    data = self._take()
    if self._path(iteration).exists():
      self._path(iteration).rename(self._aside(iteration))
    error = None
    try:
      self._quiet.is_on = True
      self._checkpointer.save(
        self._path(iteration),
        args=orbax_handler.SnapshotSave(metadata, buffers, data),
      )
      self._checkpointer.wait_until_finished()
    except Exception as caught:
      error = caught
    self._quiet.is_on = False
    self._settle(iteration, data)
    if error is not None:
      raise error
    return sum(buffer.nbytes for buffer in buffers)

  def _settle(self, iteration: int, data: snapshot_file.DataFile) -> None:
    """Tidies up after a save, failed or not: the folder says what counts."""
    final, aside = self._path(iteration), self._aside(iteration)
    if final.exists():
      data.path = final / snapshot_file.DATA_NAME
      if iteration in self._snapshots:
        self._leftovers[self._retire(aside)] = self._snapshots[iteration]
      self._snapshots[iteration] = data
      self._recycle_leftovers()
      return
    data.move(self._unused_path(_POOL_PREFIX))
    self._free.append(data)
    shutil.rmtree(
      final.with_name(final.name + orbax_handler.TEMPORARY_SUFFIX),
      ignore_errors=True,
    )
    if aside.exists():
      aside.rename(final)

  # --- Data files ---

  def _path(self, iteration: int) -> pathlib.Path:
    return self.folder / str(iteration)

  def _aside(self, iteration: int) -> pathlib.Path:
    """Path where a snapshot waits, still committed, to be replaced."""
    return self.folder / f'{iteration}{snapshot_file.REPLACED_SUFFIX}'

  def _unused_path(self, prefix: str) -> pathlib.Path:
    while True:
      path = self.folder / f'{prefix}{self._names}'
      self._names += 1
      if not path.exists():
        return path

  def _retire(self, path: pathlib.Path) -> pathlib.Path:
    """Frees the name of a directory that is no longer a snapshot."""
    target = self._unused_path(_RETIRED_PREFIX)
    if path.exists():
      path.rename(target)
    return target

  def _take(self) -> snapshot_file.DataFile:
    """Returns a file to write to; retires the oldest snapshots that may go."""
    for data in [data for data in self._free if not data.is_reserved]:
      self._free.remove(data)
      data.remove()
      self._balance()
    self._recycle_leftovers()
    for iteration in sorted(self._snapshots):
      if self._free or iteration >= self._first_iteration:
        break
      if self._recycle(self._path(iteration), self._snapshots[iteration]):
        del self._snapshots[iteration]
        self._balance()
    if self._is_cut_anew:
      self._make_one()  # last: reserving a file takes longer than filling it
    if self._free:
      return self._free.pop()
    oldest = min(self._snapshots, default=0)
    if oldest >= self._first_iteration:
      raise interface.SnapshotFullError(
        f'{self.folder}: all {self._files} data files hold snapshots since '
        f'iteration {oldest}, which must be kept; give more host memory or '
        'keep fewer windows'
      )
    raise interface.SnapshotFullError(
      f'{self.folder}: readers hold snapshots that could be retired'
    )

  def _recycle_leftovers(self) -> None:
    for path, data in list(self._leftovers.items()):
      if self._recycle(path, data):
        del self._leftovers[path]
        self._balance()

  def _recycle(
    self, path: pathlib.Path, data: snapshot_file.DataFile | None
  ) -> bool:
    """Removes a directory and pools its data file; False if leased."""
    try:
      found = snapshot_file.try_recycle(
        path, self._unused_path(_POOL_PREFIX), data
      )
    except (OSError, ValueError):  # damaged from outside: nothing to reuse
      if data is not None:
        data.close()
      shutil.rmtree(path, ignore_errors=True)
      return True
    if found is not None:
      self._pool(found)
    return found is not None

  def _pool(self, data: snapshot_file.DataFile) -> None:
    """Keeps a data file for the next save if it has the current size."""
    if data.size_bytes == self._size_bytes and data.is_reserved:
      self._free.append(data)
    else:
      data.remove()

  def _adopt(self) -> None:
    """Sorts the folder's contents into free, committed and left over."""
    found = snapshot_file.list_snapshots(self.folder)
    for path in sorted(self.folder.iterdir()):
      if path in found.values():
        iteration = int(path.name.removesuffix(snapshot_file.REPLACED_SUFFIX))
        if path != self._path(iteration):  # killed while it was replaced
          shutil.rmtree(self._path(iteration), ignore_errors=True)
          path.rename(self._path(iteration))
        self._snapshots[iteration] = None
      elif _POOL_NAME.fullmatch(path.name) and path.is_file():
        try:
          self._pool(snapshot_file.DataFile.open(path))
        except (OSError, ValueError):  # killed while it was reserved
          path.unlink()
      elif (
        snapshot_file.is_snapshot_name(path.name)
        or _RETIRED_NAME.fullmatch(path.name)
        or _TEMPORARY_NAME.fullmatch(path.name)
      ):
        self._leftovers[self._retire(path)] = None
    self._recycle_leftovers()

  def _balance(self) -> None:
    """Reserves or gives back data files until their number is right."""
    if self._is_cut_anew:
      self._make_one()
      return
    missing = self._files - sum(
      map(len, (self._free, self._snapshots, self._leftovers))
    )
    for _ in range(min(-missing, len(self._free))):
      self._free.pop().remove()
    created: list[snapshot_file.DataFile] = []
    try:
      if missing > 0:
        memory_limits.check_room(
          missing * self._size_bytes, memory_limits.read_room(self.folder)
        )
      for _ in range(missing):
        created.append(
          snapshot_file.DataFile.create(
            self._unused_path(_POOL_PREFIX), self._size_bytes
          )
        )
    except errors.StoreError as error:
      for data in created:
        data.remove()
      raise errors.StoreError(
        f'{self._files} snapshot data files of '
        f'{memory_limits.format_bytes(self._size_bytes)} each: {error} '
        'A longer window or fewer kept windows need less.'
      ) from error
    self._free.extend(created)

  def _make_one(self) -> None:
    """Puts a data file into the empty pool if enough is reserved for it."""
    left_bytes = self._reserved_bytes - self._held_bytes()
    if self._free or left_bytes < self._size_bytes:
      return
    try:
      memory_limits.check_room(
        self._size_bytes, memory_limits.read_room(self.folder)
      )
      data = snapshot_file.DataFile.create(
        self._unused_path(_POOL_PREFIX), self._size_bytes
      )
    except errors.StoreError as error:
      if self._checkpointer is None:
        return  # at the start; a save asks again, and whoever saves can wait
      raise OSError(errno.ENOSPC, str(error)) from error
    self._free.append(data)

  def _held_bytes(self) -> int:
    """Returns the bytes of all data files, of whatever size."""
    held = [data.size_bytes for data in self._free]
    in_directories = [
      *((self._path(i), data) for i, data in self._snapshots.items()),
      *self._leftovers.items(),
    ]
    for path, data in in_directories:
      if data is not None:
        held.append(data.size_bytes)
        continue
      with contextlib.suppress(OSError):  # damaged from outside
        held.append((path / snapshot_file.DATA_NAME).stat().st_size)
    return sum(held)
