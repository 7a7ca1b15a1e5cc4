"""Files and folders for this user alone, whatever the umask is.

All that we make inside a store folder is made here. The folder's own mode keeps
others out already; that of its files holds for who was in it before, and for
who copies them elsewhere. The umask of the process is left alone: files of the
workdir follow it.
"""

from __future__ import annotations

import os
import pathlib

_FOLDER_MODE = 0o700
_FILE_MODE = 0o600


def create(path: str | os.PathLike[str], *, exclusive: bool = False) -> int:
  """Creates an empty file, or empties the one that is there.

  Args:
    path: the file's path; a link is not followed.
    exclusive: whether a file that is there already is an error.

  Returns:
    A descriptor open for reading and writing.

  Raises:
    OSError: as `os.open`.
  """
  flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
  flags |= os.O_EXCL if exclusive else os.O_TRUNC
  fd = os.open(path, flags, _FILE_MODE)
  try:
    os.fchmod(fd, _FILE_MODE)  # the umask may have taken bits away
  except OSError:
    os.close(fd)
    raise
  return fd


def write(path: str | os.PathLike[str], data: bytes) -> None:
  """Writes a file; whatever is there already is replaced, its mode too.

  It is not written at once: who reads meanwhile may find a part of it.

  Args:
    path: the file's path; a link is not followed.
    data: all that the file will hold.

  Raises:
    OSError: it cannot be written; what was there may be gone.
  """
  with open(create(path), 'wb') as file:
    file.write(data)


def make_folder(
  path: str | os.PathLike[str], *, exist_ok: bool = False
) -> None:
  """Makes a folder; one that is there already keeps its mode.

  Raises:
    OSError: as `os.mkdir`.
  """
  try:
    os.mkdir(path, _FOLDER_MODE)
  except FileExistsError:
    if exist_ok and pathlib.Path(path).is_dir():
      return
    raise
  os.chmod(path, _FOLDER_MODE)


def restrict(path: int | str | os.PathLike[str]) -> None:
  """Gives its mode to a file, or descriptor, that was made elsewhere."""
  os.chmod(path, _FILE_MODE)
