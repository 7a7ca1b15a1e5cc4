"""The fingerprint of what is read, computed once for the workers of a host.

A file that is mapped may be large, and may change: who reads it once more takes
seconds, in each recovery too. So whoever comes first leaves the fingerprint in
the host store, with what the system says of the file. Those that come later
read the file only if that has changed. Each agent begins with a reading. What a
worker reads while it trains is looked after by `WatchedData`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import time
from collections.abc import Callable
from typing import Any, TypeVar

from moetion_jax import job_spec
from moetion_jax.hostmem import private, store_folder
from moetion_jax.training import worker

# Times of files are that coarse: what is written within one of them, after the
# file was read, cannot be told from what was written before.
_TIME_SECONDS = 2.0

_Batch = TypeVar('_Batch')


def of(data: worker.Data, folder: str | os.PathLike[str]) -> dict[str, Any]:
  """Returns the fingerprint of the data that this worker reads.

  Args:
    data: the data.
    folder: the store of this host, which an agent holds.
  """
  sources = sources_of(data)
  owner = store_folder.read_owner(folder)
  if not sources or not owner:
    return data.fingerprint()
  mark = [owner, sources]
  path = pathlib.Path(folder, store_folder.FINGERPRINT)
  try:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW)
  except OSError:  # a full tmpfs: it is of use only
    return data.fingerprint()
  with open(fd, 'r+b') as file:
    private.restrict(fd)
    fcntl.flock(fd, fcntl.LOCK_EX)  # whoever waits here has less to do then
    with contextlib.suppress(ValueError):
      known_mark, known = json.load(file)
      if known_mark == mark:
        return known
    found = data.fingerprint()
    newest = max(changed for *_, changed in sources) / 1e9
    is_settled = newest < time.time() - _TIME_SECONDS
    if is_settled and sources_of(data) == sources:
      with contextlib.suppress(OSError):
        file.seek(0)
        file.truncate()
        file.write(json.dumps([mark, found]).encode())
    return found


def sources_of(data: worker.Data) -> list[list[int]]:
  """Returns what the system says of the files that are read each time.

  Returns:
    By file: device, inode, size, times of the last change of the content and of
    anything, in ns; [] if the data is in memory, does not say, or is gone.
  """
  try:
    found = [os.stat(x) for x in getattr(data, 'mapped_files', tuple)()]
  except OSError:
    return []
  return [
    [s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for s in found
  ]


class WatchedData:
  """Data in mapped files, of which no batch is given once it has changed.

  After each batch was read, and before anything is made of it, it asks the
  system for the files (some microseconds). If they are not what they were,
  the fingerprint decides: that they were touched, or copied back, is no change.
  """

  def __init__(
    self,
    data: worker.Data,
    setting: str,
    folder: str | os.PathLike[str],
    fingerprint: dict[str, Any],
    sources: list[list[int]],
  ):
    """Stores the arguments.

    Args:
      data: the data.
      setting: the setting that names it.
      folder: the store of this host.
      fingerprint: the fingerprint that the data must have.
      sources: its `sources_of`, from before the fingerprint was made.
    """
    self.fingerprint = lambda: fingerprint
    self._data = data
    self._setting = setting
    self._folder = folder
    self._sources = sources
    self._settled_at = -float('inf')

  def batch(self, iteration: int, microbatch: int) -> Any:
    """Returns the batch of a global microbatch.

    Raises:
      errors.ConfigError: the data has changed.
    """
    return self._checked(lambda: self._data.batch(iteration, microbatch))

  def held_out_batch(self, index: int) -> Any:
    """Returns a held-out batch.

    Raises:
      errors.ConfigError: the data has changed.
    """
    return self._checked(lambda: self._data.held_out_batch(index))

  def _checked(self, read: Callable[[], _Batch]) -> _Batch:
    while True:
      try:
        batch = read()
      finally:  # also if what was read is no batch: that may be why
        is_other = self._check()
      if not is_other:
        return batch
      # The file is as it was; perhaps it was not when the batch was read.

  def _check(self) -> bool:
    """Tells whether something was done to the files; raises if they differ."""
    now = sources_of(self._data)
    is_other = now != self._sources
    # Whoever writes a file may go on to, within one of its times.
    if is_other or time.monotonic() < self._settled_at:
      found = of(self._data, self._folder)
      job_spec.check_data(self._setting, self.fingerprint(), found)
    if is_other:
      self._sources = now
      self._settled_at = time.monotonic() + _TIME_SECONDS
    return is_other
