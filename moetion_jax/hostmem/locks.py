"""Locks of open file descriptions (fcntl(2), F_OFD_SETLK; flock(2)).

They end with the descriptor, so also with a kill -9 of whoever holds them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

_FLOCK = struct.Struct('hhqqi4x')  # glibc's struct flock, 64-bit offsets
# What file systems answer that cannot lock a folder (NFS, some of FUSE).
_NO_FOLDER_LOCK = (
  errno.EBADF,
  errno.EINVAL,
  errno.EISDIR,
  errno.ENOLCK,
  errno.ENOSYS,
  errno.ENOTSUP,
)


def try_lock(fd: int, kind: int, offset: int) -> bool:
  """Takes (or with F_UNLCK releases) the lock of one byte; False if held."""
  lock = _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
  try:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
  except (BlockingIOError, PermissionError):
    return False
  return True


def lock(fd: int) -> None:
  """Locks a file as a whole, or a folder where its file system can do that.

  A folder's lock, unlike that of a file in it, is not lost with that file.

  Raises:
    BlockingIOError: somebody else holds the lock.
    OSError: a file cannot be locked.
  """
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    is_folder = stat.S_ISDIR(os.fstat(fd).st_mode)
    if not is_folder or error.errno not in _NO_FOLDER_LOCK:
      raise
