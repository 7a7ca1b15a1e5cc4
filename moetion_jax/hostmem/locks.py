"""Locks of open file descriptions (fcntl(2), F_OFD_SETLK).

They end with the descriptor, so also with a kill -9 of whoever holds them.
"""

from __future__ import annotations

import fcntl
import os
import struct

_FLOCK = struct.Struct('hhqqi4x')  # glibc's struct flock, 64-bit offsets


def try_lock(fd: int, kind: int, offset: int) -> bool:
  """Takes (or with F_UNLCK releases) the lock of one byte; False if held."""
  lock = _FLOCK.pack(kind, os.SEEK_SET, offset, 1, 0)
  try:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
  except (BlockingIOError, PermissionError):
    return False
  return True
