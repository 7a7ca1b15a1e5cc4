"""Files and folders that must outlive a loss of power, and their disk's name.

A rename is atomic for whoever looks, but until it is synced a machine that
loses power may come back with the name and without the data.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
from collections.abc import Iterator

# What file systems without a sync of folders (some of FUSE) answer.
_NO_FOLDER_SYNC = (errno.EINVAL, errno.ENOTSUP)
# What those answer that cannot exchange names (NFS), and old kernels.
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
  """Has an error of a descriptor name its file, as errors of paths do."""
  try:
    yield
  except OSError as error:
    if error.filename is not None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def sync_file(path: str | os.PathLike[str]) -> None:
  """Returns once a file's data and size are on disk.

  Raises:
    OSError: they cannot be; it names the file.
  """
  _sync(path, os.O_RDONLY)


def sync_folder(path: str | os.PathLike[str]) -> None:
  """Returns once the names in a folder are on disk.

  Raises:
    OSError: they cannot be; it names the folder.
  """
  try:
    _sync(path, os.O_RDONLY | os.O_DIRECTORY)
  except OSError as error:
    if error.errno not in _NO_FOLDER_SYNC:
      raise


def sync_tree(path: str | os.PathLike[str]) -> None:
  """Returns once a folder is on disk, with all that is below it.

  Files come before the folders that name them. Links are not followed.

  Raises:
    OSError: it cannot be; it names the file or folder.
  """
  for folder, _, files in os.walk(path, topdown=False, onerror=_raise):
    for name in files:
      file = os.path.join(folder, name)
      if not os.path.islink(file):
        sync_file(file)
    sync_folder(folder)


def exchange(
  first: str | os.PathLike[str], second: str | os.PathLike[str]
) -> bool:
  """Exchanges the names of two files or folders of one file system at once.

  Returns:
    False where that cannot be done: then nothing was.

  Raises:
    OSError: one of them is not there, or may not be renamed.
  """
  libc = ctypes.CDLL(None, use_errno=True)
  if not hasattr(libc, 'renameat2'):
    return False
  names = os.fsencode(first), os.fsencode(second)
  old, new = ((_AT_FDCWD, ctypes.c_char_p(name)) for name in names)
  if libc.renameat2(*old, *new, _RENAME_EXCHANGE) == 0:
    return True
  number = ctypes.get_errno()
  if number in _NO_EXCHANGE:
    return False
  raise OSError(number, os.strerror(number), str(first), None, str(second))


def forget_tree(path: str | os.PathLike[str]) -> None:
  """Has the system forget the files below a folder, which are on disk.

  What is read after it comes from the disk, as far as that can be asked for.

  Raises:
    OSError: a file cannot be opened; it names the file.
  """
  for folder, _, files in os.walk(path, onerror=_raise):
    for name in files:
      fd = os.open(os.path.join(folder, name), os.O_RDONLY | os.O_CLOEXEC)
      try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
      finally:
        os.close(fd)


def device_of(path: str | os.PathLike[str]) -> str:
  """Names the device on which a path lies, and where it is mounted.

  Args:
    path: the path; of what does not exist, the nearest folder that does counts.

  Returns:
    For people; the path itself where the system does not tell.
  """
  real = os.path.realpath(path)
  best = ('', str(path))
  try:
    with open('/proc/self/mountinfo') as file:
      for mount, name in _mounts(file):
        inside = mount.rstrip('/') + '/'
        # Of several at one place the last one is seen.
        if f'{real}/'.startswith(inside) and len(mount) >= len(best[0]):
          best = mount, name
  except OSError:
    pass
  return best[1]


def _mounts(lines: Iterator[str]) -> Iterator[tuple[str, str]]:
  """Yields mount points, and what is mounted there in words."""
  for line in lines:
    fields, _, rest = line.partition(' - ')
    mount = re.sub(
      r'\\([0-7]{3})', lambda m: chr(int(m[1], 8)), fields.split()[4]
    )
    kind, source, *_ = rest.split()
    yield mount, f'{source} ({kind}, mounted at {mount})'


def _sync(path: str | os.PathLike[str], flags: int) -> None:
  with naming(path):
    fd = os.open(path, flags | os.O_CLOEXEC)
    try:
      os.fsync(fd)
    finally:
      os.close(fd)


def _raise(error: OSError) -> None:
  raise error
