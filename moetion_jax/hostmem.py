"""A run's folder in host memory: its owner, its room, its removal.

The folder lies in tmpfs (`/dev/shm/moetion-<run id>`, mode 0700) and outlives
the processes that use it: what is committed in it is what a recovery reads. Its
lock is one open file description, created by the agent and inherited by its
workers, so it is free exactly when the last of them is gone.

No JAX here: the agent uses this module and never creates a JAX backend.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import pathlib
import re
import shutil
import socket
import stat
import time

from moetion_jax import base

_PREFIX = 'moetion-'
_RUN_ID = re.compile(r'[A-Za-z0-9][A-Za-z0-9._-]{0,63}')
_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as about 2**63


@dataclasses.dataclass(frozen=True, order=True)
class WorkerId:
  """Who publishes, reads or reports (DESIGN section 3, fencing).

  Attributes:
    stage: of the worker; -1 for an agent.
    replica: of the worker; the host's index for an agent.
    generation: grows with every replacement; stores reject older ones.
  """

  stage: int
  replica: int
  generation: int

  def __str__(self) -> str:
    return (
      f'stage {self.stage} replica {self.replica} (generation '
      f'{self.generation})'
    )


# --- Room -------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """How much host memory a folder can still take.

  Attributes:
    folder: the folder these numbers are about.
    tmpfs_free_bytes: free in the file system of the folder.
    tmpfs_bytes: size of that file system.
    memory_available_bytes: what the kernel could give, None if unknown.
    cgroup_available_bytes: what the strictest memory cgroup (v1 or v2) around
      this process leaves, None without a limit.
  """

  folder: str
  tmpfs_free_bytes: int
  tmpfs_bytes: int
  memory_available_bytes: int | None = None
  cgroup_available_bytes: int | None = None


def format_bytes(count: int) -> str:
  """`count` bytes for people: '64.0 MiB'."""
  value = float(count)
  for unit in ('bytes', 'KiB', 'MiB', 'GiB'):
    if abs(value) < 1024:
      return f'{value:.0f} {unit}' if unit == 'bytes' else f'{value:.1f} {unit}'
    value /= 1024
  return f'{value:.1f} TiB'


def check_room(need_bytes: int, room: Room) -> None:
  """Raises StoreError, remedy included, if `need_bytes` more do not fit."""
  need = format_bytes(need_bytes)
  if need_bytes > room.tmpfs_free_bytes:
    raise base.StoreError(
      f'{room.folder}: {need} are needed, but its file system has only '
      f'{format_bytes(room.tmpfs_free_bytes)} free of '
      f'{format_bytes(room.tmpfs_bytes)}. In a container give /dev/shm more: '
      f'docker run --shm-size={_shm_size(need_bytes)}, in Kubernetes an '
      'emptyDir with "medium: Memory" mounted there; or name a larger tmpfs '
      'with --hostmem_dir; or keep less with --log_iterations.'
    )
  for available_bytes, what, remedy in (
    (
      room.cgroup_available_bytes,
      'the memory limit of this cgroup leaves only',
      'Raise the limit (docker run --memory, resources.limits.memory of the '
      'Kubernetes pod, systemd MemoryMax)',
    ),
    (
      room.memory_available_bytes,
      'this machine has only',
      'Stop what else uses its memory',
    ),
  ):
    if available_bytes is not None and need_bytes > available_bytes:
      raise base.StoreError(
        f'{room.folder}: {need} of host memory are needed, but {what} '
        f'{format_bytes(available_bytes)}. {remedy}, or keep less with '
        '--log_iterations.'
      )


def _shm_size(need_bytes: int) -> str:
  """A docker size with a quarter to spare: '2g'."""
  return f'{max(1, -(-need_bytes * 5 // 4 >> 30))}g'


def read_room(
  folder: str | os.PathLike[str],
  cgroup_root: str | os.PathLike[str] = '/sys/fs/cgroup',
  proc_root: str | os.PathLike[str] = '/proc',
) -> Room:
  """Measures the room of an existing folder, all limits included."""
  proc = pathlib.Path(proc_root)
  file_system = os.statvfs(folder)
  return Room(
    folder=os.fspath(folder),
    tmpfs_free_bytes=file_system.f_bavail * file_system.f_frsize,
    tmpfs_bytes=file_system.f_blocks * file_system.f_frsize,
    memory_available_bytes=_memory_available_bytes(_read(proc / 'meminfo')),
    cgroup_available_bytes=_cgroup_available_bytes(
      _read(proc / 'self/cgroup'), pathlib.Path(cgroup_root)
    ),
  )


def _read(path: pathlib.Path) -> str:
  try:
    return path.read_text()
  except OSError:
    return ''


def _memory_available_bytes(meminfo: str) -> int | None:
  found = re.search(r'^MemAvailable:\s+(\d+) kB', meminfo, re.MULTILINE)
  return int(found[1]) * 1024 if found else None


def _cgroup_available_bytes(membership: str, root: pathlib.Path) -> int | None:
  """The least that any memory cgroup of this process still grants.

  Args:
    membership: text of /proc/self/cgroup.
    root: where the cgroup file systems are mounted.
  """
  available_bytes = []
  for line in membership.splitlines():
    hierarchy, controllers, path = line.split(':', 2)
    if hierarchy == '0':
      unified = root / 'unified'  # where both versions are mounted
      mount = unified if unified.is_dir() else root
      names = ('memory.max', 'memory.current', 'inactive_file')
    elif 'memory' in controllers.split(','):
      mount = root / 'memory'
      names = (
        'memory.limit_in_bytes',
        'memory.usage_in_bytes',
        'total_inactive_file',
      )
    else:
      continue
    # The path is the host's; inside a container only its end, or nothing of
    # it, exists. Every ancestor limits as well.
    parts = [part for part in path.split('/') if part]
    for depth in range(len(parts) + 1):
      group = mount.joinpath(*parts[:depth])
      left_bytes = _group_available_bytes(group, *names)
      if left_bytes is not None:
        available_bytes.append(left_bytes)
  return min(available_bytes, default=None)


def _group_available_bytes(
  group: pathlib.Path, limit_name: str, usage_name: str, cache_name: str
) -> int | None:
  """What one memory cgroup still grants; None without a limit."""
  limit, usage = _read(group / limit_name), _read(group / usage_name)
  if not limit.strip().isdigit() or int(limit) >= _UNLIMITED_BYTES:
    return None
  used_bytes = int(usage) if usage.strip().isdigit() else 0
  # Clean file pages count as used but are given back on demand; tmpfs pages
  # are not among them.
  cache = re.search(
    rf'^{cache_name} (\d+)', _read(group / 'memory.stat'), re.MULTILINE
  )
  if cache:
    used_bytes = max(0, used_bytes - int(cache[1]))
  return max(0, int(limit) - used_bytes)


# --- The folder --------------------------------------------------------------


class StoreFolder:
  """The store folder of one run, and the lock that says the run lives.

  Used by the agent: `start()`, spawn workers with `pass_fds=[lock_fd]`, then
  `remove()` when the run is finished or `close()` to keep it for a resumption.

  Attributes:
    path: the folder.
  """

  def __init__(self, hostmem_dir: str | os.PathLike[str], run_id: str):
    """Stores the names; nothing is created before `start`.

    Args:
      hostmem_dir: an existing directory in tmpfs, such as '/dev/shm'.
      run_id: letters, digits, '.', '_' and '-'.

    Raises:
      StoreError: the run id is not usable as a name.
    """
    if not _RUN_ID.fullmatch(run_id):
      raise base.StoreError(f'{run_id!r} cannot be a run id')
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
      StoreError: a living process uses it, it is not ours or not private, or
        it cannot be created.
    """
    try:
      self.path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
      raise base.StoreError(
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
    temporary.write_text(json.dumps(owner) + '\n')
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
    raise base.StoreError(f'{path}: {error.strerror}') from error
  if not stat.S_ISDIR(status.st_mode):
    raise base.StoreError(f'{path}: not a directory')
  if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
    raise base.StoreError(
      f'{path}: must belong to this user and have mode 0700'
    )


def _lock(path: pathlib.Path) -> int:
  """Locks a store folder; the descriptor holds the lock until closed.

  Raises:
    StoreError: a living process holds it.
  """
  name = path / 'lock'
  while True:
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
      fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
      # A run that removed the folder in between left us the lock of a file
      # that nobody else can find.
      with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.stat(name), os.fstat(fd)):
          return fd
    except BlockingIOError:
      os.close(fd)
      raise base.StoreError(
        f'{path}: in use by a living run (pid {_owner(path).get("pid")})'
      ) from None
    os.close(fd)
    path.mkdir(mode=0o700, exist_ok=True)


def _owner(path: pathlib.Path) -> dict[str, object]:
  """What the owner file says; empty when there is none or it is damaged."""
  try:
    owner = json.loads((path / 'owner').read_text())
  except (OSError, ValueError):
    return {}
  return owner if isinstance(owner, dict) else {}


# --- Leftovers ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leftover:
  """A store folder whose run is dead.

  Attributes:
    path: the folder.
    run_id: of the run.
    pid: of the agent that owned it, 0 if unknown.
    size_bytes: host memory that it occupies.
  """

  path: pathlib.Path
  run_id: str
  pid: int
  size_bytes: int


def find_leftovers(hostmem_dir: str | os.PathLike[str]) -> list[Leftover]:
  """This user's store folders that no living process holds, by name."""
  leftovers = []
  for path in sorted(pathlib.Path(hostmem_dir).glob(_PREFIX + '*')):
    try:
      check_private(path)
      os.close(_lock(path))
    except (OSError, base.StoreError):
      continue
    pid = _owner(path).get('pid')
    leftovers.append(
      Leftover(
        path=path,
        run_id=path.name.removeprefix(_PREFIX),
        pid=pid if isinstance(pid, int) else 0,
        size_bytes=sum(
          file.lstat().st_blocks * 512 for file in path.rglob('*')
        ),
      )
    )
  return leftovers


def remove_store(path: str | os.PathLike[str]) -> None:
  """Removes the store folder of a dead run; nothing to do if it is gone.

  Raises:
    StoreError: a living process uses it, or it is no store folder of ours.
  """
  folder = pathlib.Path(path)
  if not folder.name.startswith(_PREFIX):
    raise base.StoreError(f'{folder}: not a store folder')
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
  flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
  fd = os.open(path, flags, 0o600)
  try:
    os.posix_fallocate(fd, 0, size_bytes)
  except OSError as error:
    os.close(fd)
    os.unlink(path)
    if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EFBIG):
      parent = pathlib.Path(path).parent
      check_room(size_bytes, read_room(parent))
      raise base.StoreError(
        f'{path}: no room for {format_bytes(size_bytes)} ({error.strerror})'
      ) from error
    raise base.StoreError(f'{path}: {error.strerror}') from error
  return fd
