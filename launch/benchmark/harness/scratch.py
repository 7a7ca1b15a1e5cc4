"""Temporary folders that do not outlive their program, however it ended."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterator

# Never the name of a store folder: those outlive a run, for the next one.
_PREFIX = 'moetion_scratch-'
_NAME = re.compile(_PREFIX + '[a-z0-9_]{8}')  # as `tempfile` makes them


@contextlib.contextmanager
def folder(parent: str | os.PathLike[str] = '') -> Iterator[pathlib.Path]:
  """Makes a folder and removes it at the end.

  Folders of killed programs are removed first: nobody locks them.

  Args:
    parent: the folder to make it in; '' for the system's temporary folder.
  """
  where = pathlib.Path(parent or tempfile.gettempdir())
  remove_abandoned(where)
  path, fd = _make(where)
  try:
    yield path
  finally:
    shutil.rmtree(path, ignore_errors=True)
    os.close(fd)


def remove_abandoned(parent: str | os.PathLike[str]) -> None:
  """Removes this user's scratch folders whose programs have ended."""
  for path in pathlib.Path(parent).glob(_PREFIX + '*'):
    if not _NAME.fullmatch(path.name):
      continue
    with contextlib.suppress(OSError):  # in use, not ours, or just removed
      fd = _lock(path)
      try:
        status = os.fstat(fd)
        if (status.st_uid, status.st_mode & 0o777) == (os.geteuid(), 0o700):
          shutil.rmtree(path)
      finally:
        os.close(fd)


def _make(parent: pathlib.Path) -> tuple[pathlib.Path, int]:
  """Makes a folder; returns its path and the descriptor of its lock."""
  while True:
    path = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with contextlib.suppress(OSError):  # another program took it for abandoned
      fd = _lock(path)
      if path.exists():
        return path, fd
      os.close(fd)


def _lock(path: pathlib.Path) -> int:
  """Locks a folder until the descriptor is closed; OSError if locked."""
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(fd)
    raise
  return fd
