"""A disk whose power can be cut: what was not synced is gone then."""

import contextlib
import fcntl
import os
import pathlib
import struct
import subprocess

import pytest

_SIZE_BYTES = 32 << 20
# FS_IOC_SHUTDOWN of linux/fs.h, and its flag that leaves the journal unwritten.
_SHUTDOWN, _WITHOUT_FLUSH = 0x8004587D, 2


class Disk:
  """A file system in a file of its own; `cut` is what a loss of power does.

  Attributes:
    path: where it is mounted.
  """

  def __init__(self, folder):
    self.path = folder / 'mounted'
    self._image = folder / 'image'

  def start(self):
    """Makes and mounts it; skips the test where this may not be done."""
    self.path.mkdir()
    with open(self._image, 'wb') as file:
      file.truncate(_SIZE_BYTES)
    try:
      subprocess.run(['mkfs.ext4', '-q', '-F', self._image], check=True)
      self._mount()
    except (OSError, subprocess.CalledProcessError) as error:
      pytest.skip(f'no file system can be mounted here: {error}')
    os.sync()

  def cut(self):
    """Loses all that was not synced."""
    fd = os.open(self.path, os.O_RDONLY)
    fcntl.ioctl(fd, _SHUTDOWN, struct.pack('I', _WITHOUT_FLUSH))
    os.close(fd)
    subprocess.run(['umount', self.path], check=True)
    self._mount()

  def replace(self, old, new):
    """Replaces bytes below the file system; returns how often they were found.

    What it has in memory stays.
    """
    content = self._image.read_bytes()
    with open(self._image, 'r+b') as file:
      file.seek(content.find(old))
      file.write(new)
    return content.count(old)

  def _mount(self):
    subprocess.run(
      ['mount', '-o', 'loop', self._image, self.path],
      check=True,
      capture_output=True,
    )


def record(monkeypatch):
  """Returns a list that grows with each call that a loss of power can follow.

  Its items are ('sync' or 'remove', path) and ('move', path, new path). The
  calls are made all the same. A file system may keep more than it has to, as
  ext4 does of names with each sync: their order tells what must be kept.
  """
  calls = []

  def wrap(name, kind):
    real = getattr(os, name)

    def call(path, *others, **named):
      is_fd = isinstance(path, int)
      if is_fd:
        calls.append((kind, os.readlink(f'/proc/self/fd/{path}')))
      real(path, *others, **named)
      if not is_fd:
        calls.append((kind, *map(str, (path, *others))))

    monkeypatch.setattr(os, name, call)

  for name in ('unlink', 'rmdir'):
    wrap(name, 'remove')
  for name in ('rename', 'replace'):
    wrap(name, 'move')
  wrap('fsync', 'sync')
  return calls


@contextlib.contextmanager
def disk(folder: pathlib.Path):
  """Yields a started `Disk` whose files are in a folder."""
  one = Disk(folder)
  one.start()
  try:
    yield one
  finally:
    # Where a test failed somebody may still hold a file.
    subprocess.run(['umount', '--lazy', one.path], check=True)
