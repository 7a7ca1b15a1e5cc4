"""Folders that are gone when their program is, whatever ended it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

# Unlike the folders of stores, which the next run goes on with.
_PREFIX = 'moetion_scratch-'


@contextlib.contextmanager
def folder(parent: str | os.PathLike[str] = '') -> Iterator[pathlib.Path]:
  """A new folder, which is removed at the end.

  Those of programs that were killed are removed first: nobody locks them.

  Args:
    parent: where to make it; '' for where temporary files belong.
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
  """Removes this user's folders in a place whose programs live no more."""
  for path in pathlib.Path(parent).glob(_PREFIX + '*'):
    with contextlib.suppress(OSError):  # another one's, or just removed
      fd = _lock(path)
      try:
        if os.fstat(fd).st_uid == os.geteuid():
          shutil.rmtree(path)
      finally:
        os.close(fd)


def _make(parent: pathlib.Path) -> tuple[pathlib.Path, int]:
  """A new folder, and the lock on it."""
  while True:
    path = pathlib.Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    with contextlib.suppress(OSError):  # taken for abandoned by somebody
      fd = _lock(path)
      if path.exists():
        return path, fd
      os.close(fd)


def _lock(path: pathlib.Path) -> int:
  """Locks a folder until the descriptor is closed; OSError if it is locked."""
  fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError:
    os.close(fd)
    raise
  return fd
