"""A run's folder in host memory: its owner, its files, its removal.

The folder lies in tmpfs (`/dev/shm/moetion-<run id>`, mode 0700) and outlives
the processes that use it: what is committed in it is what a recovery reads. Its
locks, of the folder and of a file in it, are open file descriptions, created by
the agent and inherited by its workers, so they are free exactly when the last
of them is gone, whoever removes the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterable, Iterator

from moetion_jax import errors
from moetion_jax.hostmem import locks, memory_limits, private

_PREFIX = 'moetion-'
_OWNER = 'owner'
# What workers know of the data (`runtime/worker/fingerprints.py`).
FINGERPRINT = 'fingerprint.tmp'
_OWN_NAMES = ('lock', _OWNER, FINGERPRINT)
# Fields of the owner file that say which folder the run has: its path, and its
# device and inode, which tell it from copies.
WORKDIR, FOLDER = 'workdir', 'folder'
_RUN_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,63}')


def identity_of(folder: str | os.PathLike[str]) -> tuple[int, int]:
  """Returns the device and inode of a folder; raises OSError without one."""
  status = os.stat(folder)
  return status.st_dev, status.st_ino


# --- The folder --------------------------------------------------------------


class StoreFolder:
  """The store folder of one run, and the lock that says the run lives.

  The agent uses it: `start()`, spawn workers with `pass_fds=lock_fds`, then
  `remove()` when the run is finished or `close()` to keep it for a resumption.

  Attributes:
    path: the folder.
    run_id: id of the run.
    workdir: the run's workdir, absolute; '' if there is none.
    lock_fds: the descriptors whose inheritance keeps the locks; () when closed.
  """

  def __init__(
    self,
    hostmem_dir: str | os.PathLike[str],
    run_id: str,
    workdir: str | os.PathLike[str] = '',
  ):
    """Stores the names; nothing is created before `start`.

    Args:
      hostmem_dir: an existing directory in tmpfs, such as '/dev/shm'.
      run_id: id of the run: letters, digits, '.', '_' and '-'.
      workdir: the run's workdir, absolute, for the owner file; '' for none.

    Raises:
      StoreError: the run id is not usable as a name.
    """
    if not _RUN_ID.fullmatch(run_id):
      raise errors.StoreError(f'{run_id!r} cannot be a run id')
    self.path = pathlib.Path(hostmem_dir) / (_PREFIX + run_id)
    self.run_id = run_id
    self.workdir = str(workdir)
    self.lock_fds: tuple[int, ...] = ()
    self._owner_before: bytes | None = None

  def start(self) -> None:
    """Creates the folder, or takes over the one a dead run left.

    Raises:
      StoreError: a living process uses the folder, it is not ours or not
        private, or it cannot be created.
    """
    is_new = not self.path.exists()
    try:
      private.make_folder(self.path, exist_ok=True)
    except OSError as error:
      errors.check_limits(error, self.path)
      raise errors.StoreError(
        f'{self.path}: cannot be created ({error.strerror}); name another '
        'directory in tmpfs with --hostmem_dir'
      ) from error
    check_private(self.path)
    self.lock_fds = _lock(self.path)
    try:
      self._write_owner()
    except OSError as error:
      if is_new:
        self.remove()
      self.close()
      errors.check_limits(error, self.path)
      raise errors.StoreError(
        f'{self.path}: its owner file cannot be written ({error.strerror}); '
        'make room there, or name another directory in tmpfs with --hostmem_dir'
      ) from error

  def _write_owner(self) -> None:
    """Says in the folder whose it is; replaces what was said before."""
    owner: dict[str, object] = {
      'run_id': self.run_id,
      WORKDIR: self.workdir,
      'pid': os.getpid(),
      'host': socket.gethostname(),
      'started': time.strftime('%Y-%m-%dT%H:%M:%S%z'),
    }
    if self.workdir:
      with contextlib.suppress(FileNotFoundError):
        owner[FOLDER] = identity_of(self.workdir)
    with contextlib.suppress(FileNotFoundError):
      self._owner_before = (self.path / _OWNER).read_bytes()
    self._replace_owner(json.dumps(owner).encode() + b'\n')

  def _replace_owner(self, data: bytes) -> None:
    temporary = self.path / f'{_OWNER}.tmp'
    try:
      private.write(temporary, data)
      temporary.rename(self.path / _OWNER)
    except OSError:
      temporary.unlink(missing_ok=True)
      raise

  def disown(self) -> None:
    """Has the folder say again whose it was before `start`.

    Call it for a run that put nothing into the folder, before `close`.
    """
    if self._owner_before is not None:
      with contextlib.suppress(OSError):  # a full tmpfs: it is of use only
        self._replace_owner(self._owner_before)

  @property
  def is_gone(self) -> bool:
    """True if the folder that `start` locked was removed, or moved away."""
    if not self.lock_fds:
      return False
    try:
      status = os.stat(self.path)
    except (FileNotFoundError, NotADirectoryError):
      return True
    return not os.path.samestat(status, os.fstat(self.lock_fds[0]))

  def make_anew(self) -> None:
    """Makes the folder anew, empty, after somebody removed it while it lived.

    The descriptors keep their numbers, and have the locks of the new folder.

    Raises:
      StoreError: as of `start`; then the descriptors are as before.
    """
    before, new = self.lock_fds, ()
    try:
      self.start()
      new = self.lock_fds
    finally:
      self.lock_fds = before
    for ours, its in zip(before, new, strict=True):
      os.dup2(its, ours, inheritable=False)
    _close(new)

  def close(self) -> None:
    """Gives the lock back and keeps the folder; may be called twice."""
    _close(self.lock_fds)
    self.lock_fds = ()

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


def _lock(path: pathlib.Path, *, create: bool = True) -> tuple[int, ...]:
  """Locks a store folder; the descriptors hold the locks until closed.

  Args:
    path: the folder.
    create: whether to make the lock file if there is none.

  Raises:
    StoreError: a living process holds the lock, or is removing the folder, or
      there is no lock file.
  """
  name = path / 'lock'
  flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
  flags |= os.O_CREAT if create else 0
  fds: list[int] = []
  refusal: OSError | None = None
  try:
    fds.append(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    # First: who holds it keeps its lock file, be that gone or not.
    locks.lock(fds[0])
    fds.append(os.open(name, flags, 0o600))
    private.restrict(fds[1])  # the umask may have taken bits away
    locks.lock(fds[1])
    if os.path.samestat(os.stat(name), os.fstat(fds[1])):
      return tuple(fds)
    reason = 'was just removed by its run'  # we locked what nobody else finds
  except FileNotFoundError:
    reason = 'was just removed by its run' if create else 'has no lock file'
  except BlockingIOError:
    reason = f'in use by a living run (pid {read_owner(path).get("pid")})'
  except OSError as error:
    reason = f'cannot be locked ({error.strerror})'
    refusal = error
  _close(fds)
  if refusal is not None:
    errors.check_limits(refusal, name)
  raise errors.StoreError(f'{path}: {reason}')


def _close(fds: Iterable[int]) -> None:
  for fd in fds:
    os.close(fd)


def read_owner(path: str | os.PathLike[str]) -> dict[str, object]:
  """Reads the owner file; empty when there is none or it is damaged."""
  try:
    owner = json.loads(pathlib.Path(path, _OWNER).read_text())
  except (OSError, ValueError, RecursionError):
    return {}
  return owner if isinstance(owner, dict) else {}


@contextlib.contextmanager
def hold(path: str | os.PathLike[str]) -> Iterator[None]:
  """Keeps other runs out of a dead one's store folder; changes nothing in it.

  Raises:
    StoreError: a living process uses the folder, or it is not private.
  """
  check_private(path)
  fds = _lock(pathlib.Path(path))
  try:
    yield
  finally:
    _close(fds)


# --- Leftovers ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
  """A store folder whose run is dead.

  Attributes:
    path: the folder.
    run_id: id of the run.
    pid: process id of the agent that owned it; 0 if unknown.
    workdir: the run's workdir when it was last started; '' if unknown.
    size_bytes: host memory that it occupies.
  """

  path: pathlib.Path
  run_id: str
  pid: int
  workdir: str
  size_bytes: int


def find_leftovers(hostmem_dir: str | os.PathLike[str]) -> list[Leftover]:
  """Lists this user's store folders that no living process holds, by name.

  A folder without a lock file only looks like one of ours; it stays as it is.
  """
  leftovers = []
  for path in sorted(pathlib.Path(hostmem_dir).glob(_PREFIX + '*')):
    try:
      check_private(path)
      _close(_lock(path, create=False))
    except (OSError, errors.StoreError):
      continue
    owner = read_owner(path)
    pid, workdir = owner.get('pid'), owner.get('workdir')
    leftovers.append(
      Leftover(
        path=path,
        run_id=path.name.removeprefix(_PREFIX),
        pid=pid if isinstance(pid, int) else 0,
        workdir=workdir if isinstance(workdir, str) else '',
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
  fds = _lock(folder)
  shutil.rmtree(folder, ignore_errors=True)
  _close(fds)


def is_empty(path: str | os.PathLike[str]) -> bool:
  """Tells whether a store folder of ours has nothing to go on with."""
  try:
    entries = list(pathlib.Path(path).iterdir())
  except OSError:  # somebody else's
    return False
  return all(x.name in _OWN_NAMES or x.is_socket() for x in entries)


def empty_store(path: str | os.PathLike[str]) -> None:
  """Removes all that runs put into a store folder; its run holds the lock.

  What the processes that live need stays: lock, owner, and their sockets.
  """
  for entry in pathlib.Path(path).iterdir():
    if entry.is_dir() and not entry.is_symlink():
      shutil.rmtree(entry)
    elif entry.name not in _OWN_NAMES and not entry.is_socket():
      entry.unlink()


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
