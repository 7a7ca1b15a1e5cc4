"""Host memory that a run may take: tmpfs, machine and cgroup limits."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from moetion_jax import errors

_UNLIMITED_BYTES = 1 << 60  # cgroup v1 writes "no limit" as about 2**63


@dataclasses.dataclass(frozen=True, kw_only=True)
class Room:
  """Host memory that a folder can still take.

  Attributes:
    folder: the folder these numbers are about.
    tmpfs_free_bytes: free bytes in the file system of the folder.
    tmpfs_bytes: size of that file system.
    memory_available_bytes: memory the kernel could give; None if unknown.
    cgroup_available_bytes: memory that the strictest memory cgroup (v1 or v2)
      around this process leaves; None without a limit.
  """

  folder: str
  tmpfs_free_bytes: int
  tmpfs_bytes: int
  memory_available_bytes: int | None = None
  cgroup_available_bytes: int | None = None


def format_bytes(count: int) -> str:
  """Formats a number of bytes for people: '64.0 MiB'."""
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
    raise errors.StoreError(
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
      raise errors.StoreError(
        f'{room.folder}: {need} of host memory are needed, but {what} '
        f'{format_bytes(available_bytes)}. {remedy}, or keep less with '
        '--log_iterations.'
      )


def _shm_size(need_bytes: int) -> str:
  """Formats a size for docker, with a quarter to spare: '2g'."""
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
  """Returns the least that any memory cgroup of this process still grants.

  Args:
    membership: text of /proc/self/cgroup.
    root: directory where the cgroup file systems are mounted.
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
  """Returns what one memory cgroup still grants; None without a limit."""
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
