"""The fingerprint of what is read, computed once for the workers of a host.

A file that is mapped may be large, and may change: who reads it once more takes
seconds, in each recovery too. So whoever comes first leaves the fingerprint in
the host store, with what the system says of the file. Those that come later
read the file only if that has changed. Each agent begins with a reading.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import time
from typing import Any

from moetion_jax.hostmem import private, store_folder
from moetion_jax.training import worker

# Times of files are that coarse: what is written within one of them, after the
# file was read, cannot be told from what was written before.
_TIME_SECONDS = 2.0


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
