"""A run's folder in host memory: its owner, its files, its removal.

The folder lies in tmpfs (`/dev/shm/moetion-<run id>`, mode 0700) and outlives
the processes that use it: what is committed in it is what a recovery reads. Its
lock is one open file description, created by the agent and inherited by its
workers, so it is free exactly when the last of them is gone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator

from moetion_jax import errors
from moetion_jax.hostmem import memory_limits, private

_PREFIX = 'moetion-'
_RUN_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,63}')


# --- The folder --------------------------------------------------------------


class StoreFolder:
  """The store folder of one run, and the lock that says the run lives.

  The agent uses it: `start()`, spawn workers with `pass_fds=[lock_fd]`, then
  `remove()` when the run is finished or `close()` to keep it for a resumption.

  Attributes:
    path: the folder.
  """

  def __init__(self, hostmem_dir: str | os.PathLike[str], run_id: str):
    """Stores the names; nothing is created before `start`.

    Args:
      hostmem_dir: an existing directory in tmpfs, such as '/dev/shm'.
      run_id: id of the run: letters, digits, '.', '_' and '-'.

    Raises:
      StoreError: the run id is not usable as a name.
    """
    if not _RUN_ID.fullmatch(run_id):
      raise errors.StoreError(f'{run_id!r} cannot be a run id')
    self.path = pathlib.Path(hostmem_dir) / (_PREFIX + run_id)
    self._run_id = run_id
    self._lock_fd = -1

  @property
  def lock_fd(self) -> int:
    """The descriptor whose inheritance keeps the lock; -1 when closed."""
    return self._lock_fd

  def start(self) -> None:
    """Creates the folder, or takes over the one a dead run left.

    Raises:
      StoreError: a living process uses the folder, it is not ours or not
        private, or it cannot be created.
    """
    try:
      private.make_folder(self.path, exist_ok=True)
    except OSError as error:
      raise errors.StoreError(
        f'{self.path}: cannot be created ({error.strerror}); name another '
        'directory in tmpfs with --hostmem_dir'
      ) from error
    check_private(self.path)
    self._lock_fd = _lock(self.path)
    owner = {
      'run_id': self._run_id,
      'pid': os.getpid(),
      'host': socket.gethostname(),
      'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    }
    temporary = self.path / 'owner.tmp'
    private.write(temporary, json.dumps(owner).encode() + b'\n')
    temporary.rename(self.path / 'owner')

  def close(self) -> None:
    """Gives the lock back and keeps the folder; may be called twice."""
    if self._lock_fd >= 0:
      os.close(self._lock_fd)
      self._lock_fd = -1

  def remove(self) -> None:
    """Removes the folder with all that is in it, then gives the lock back."""
    shutil.rmtree(self.path, ignore_errors=True)
    self.close()


def check_private(path: str | os.PathLike[str]) -> None:
  """Raises StoreError unless `path` is our own directory of mode 0700."""
  try:
    status = os.lstat(path)
  except OSError as error:
    raise errors.StoreError(f'{path}: {error.strerror}') from error
  if not stat.S_ISDIR(status.st_mode):
    raise errors.StoreError(f'{path}: not a directory')
  if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
    raise errors.StoreError(
      f'{path}: must belong to this user and have mode 0700'
    )


def _lock(path: pathlib.Path) -> int:
  """Locks a store folder; the descriptor holds the lock until closed.

  Raises:
    StoreError: a living process holds the lock, or is removing the folder.
  """
  name = path / 'lock'
  flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
  try:
    fd = os.open(name, flags, 0o600)
    private.restrict(fd)  # the umask may have taken bits away
  except OSError as error:
    raise errors.StoreError(f'{name}: {error.strerror}') from error
  try:
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.path.samestat(os.stat(name), os.fstat(fd)):
      return fd
    reason = 'was just removed by its run'  # we locked what nobody else finds
  except FileNotFoundError:
    reason = 'was just removed by its run'
  except BlockingIOError:
    reason = f'in use by a living run (pid {_owner(path).get("pid")})'
  os.close(fd)
  raise errors.StoreError(f'{path}: {reason}')


def _owner(path: pathlib.Path) -> dict[str, object]:
  """Reads the owner file; empty when there is none or it is damaged."""
  try:
    owner = json.loads((path / 'owner').read_text())
  except (OSError, ValueError):
    return {}
  return owner if isinstance(owner, dict) else {}


@contextlib.contextmanager
def hold(path: str | os.PathLike[str]) -> Iterator[None]:
  """Keeps other runs out of a dead one's store folder; changes nothing in it.

  Raises:
    StoreError: a living process uses the folder, or it is not private.
  """
  check_private(path)
  fd = _lock(pathlib.Path(path))
  try:
    yield
  finally:
    os.close(fd)


# --- Leftovers ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
  """A store folder whose run is dead.

  Attributes:
    path: the folder.
    run_id: id of the run.
    pid: process id of the agent that owned it; 0 if unknown.
    size_bytes: host memory that it occupies.
  """

  path: pathlib.Path
  run_id: str
  pid: int
  size_bytes: int


def find_leftovers(hostmem_dir: str | os.PathLike[str]) -> list[Leftover]:
  """Lists this user's store folders that no living process holds, by name."""
  leftovers = []
  for path in sorted(pathlib.Path(hostmem_dir).glob(_PREFIX + '*')):
    try:
      check_private(path)
      os.close(_lock(path))
    except (OSError, errors.StoreError):
      continue
    pid = _owner(path).get('pid')
    leftovers.append(
      Leftover(
        path=path,
        run_id=path.name.removeprefix(_PREFIX),
        pid=pid if isinstance(pid, int) else 0,
        size_bytes=used_bytes(path),
      )
    )
  return leftovers


def used_bytes(folder: str | os.PathLike[str]) -> int:
  """Returns the host memory that a store folder occupies."""
  files = pathlib.Path(folder).rglob('*')
  return sum(file.lstat().st_blocks * 512 for file in files)


def remove_store(path: str | os.PathLike[str]) -> None:
  """Removes the store folder of a dead run; does nothing if it is gone.

  Raises:
    StoreError: a living process uses the folder, or it is not one of ours.
  """
  folder = pathlib.Path(path)
  if not folder.name.startswith(_PREFIX):
    raise errors.StoreError(f'{folder}: not a store folder')
  if not folder.exists():
    return
  check_private(folder)
  fd = _lock(folder)
  shutil.rmtree(folder, ignore_errors=True)
  os.close(fd)


def reserve(path: str | os.PathLike[str], size_bytes: int) -> int:
  """Creates a file whose every page exists, so that no write dies of SIGBUS.

  Returns:
    A descriptor open for reading and writing.

  Raises:
    StoreError: there is no room; then there is no file either.
  """
  # First, since beyond a cgroup's limit the kernel does not refuse, it kills.
  memory_limits.check_room(
    size_bytes, memory_limits.read_room(pathlib.Path(path).parent)
  )
  fd = private.create(path, exclusive=True)
  try:
    os.posix_fallocate(fd, 0, size_bytes)
  except OSError as error:
    os.close(fd)
    os.unlink(path)
    raise errors.StoreError(
      f'{path}: no room for {memory_limits.format_bytes(size_bytes)}: '
      f'{error.strerror}'
    ) from error
  return fd
