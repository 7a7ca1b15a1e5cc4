"""A run's store folder on a host: its name, checks, opening and removal."""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import re
import shutil
import time
from collections.abc import Iterator, Sequence

from moetion_jax import errors
from moetion_jax.hostmem import memory_limits, segment_reader, store_folder

# Prefix of folders of final states on their way into the checkpoint (see
# `runtime/final_state.py`).
STATE_PREFIX = 'state-stage-'
_TEMPORARY_SUFFIXES = ('.new', '.tmp')
_DYING_SECONDS = 2.0


def run_id(workdir: str, host: int = 0) -> str:
  """Names the store of a workdir (absolute) on one of the run's hosts."""
  name = hashlib.blake2b(workdir.encode(), digest_size=8).hexdigest()
  return f'{name}-host{host}' if host else name


def report_leftovers(hostmem_dir: str, run_id: str, *, fresh: bool) -> bool:
  """Prints what dead runs left; with `fresh`, removes what this run left.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: id of the run's store on host 0.
    fresh: whether to remove what this run left, on all its hosts.

  Returns:
    True if this run left something and it is still there.

  Raises:
    errors.ConfigError: something cannot be removed.
  """
  found = False
  try:
    for leftover in store_folder.find_leftovers(hostmem_dir):
      is_ours = _is_of(leftover, run_id)
      what = 'start it again, or remove the folder.'
      if is_ours:
        what = 'removed.' if fresh else 'going on with it.'
      print(
        f'{leftover.path}: '
        f'{memory_limits.format_bytes(leftover.size_bytes)} left by '
        f'pid {leftover.pid}; {what}',
        flush=True,
      )
      if is_ours and fresh:
        store_folder.remove_store(leftover.path)
      found = found or (is_ours and not fresh)
  except errors.StoreError as error:
    raise _error(hostmem_dir, error) from error
  return found


def remove_leftovers(hostmem_dir: str, run_id: str) -> None:
  """Removes what this run left on hosts that it no longer has.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: id of the run's store on host 0.
  """
  for leftover in store_folder.find_leftovers(hostmem_dir):
    if _is_of(leftover, run_id):
      with contextlib.suppress(errors.StoreError):  # somebody else was quicker
        store_folder.remove_store(leftover.path)


def _is_of(leftover: store_folder.Leftover, run_id: str) -> bool:
  return f'{leftover.run_id}-'.startswith(f'{run_id}-')


def newest_generation(folder: str | os.PathLike[str]) -> int:
  """Returns the newest generation that wrote into a store; 0 if none did."""
  newest = 0
  for path in pathlib.Path(folder).glob('*.segment'):
    reader = segment_reader.SegmentReader(path)
    with contextlib.suppress(OSError, errors.StoreError):
      reader.start()
      newest = max(newest, reader.generation)
    reader.close()
  return newest


def open_store(hostmem_dir: str, run_id: str) -> store_folder.StoreFolder:
  """Opens and locks the store folder of this name.

  Raises:
    errors.ConfigError: the folder cannot be used.
  """
  try:
    store = store_folder.StoreFolder(hostmem_dir, run_id)
    store.start()
  except errors.StoreError as error:
    raise _error(hostmem_dir, error) from error
  return store


def close_store(store: store_folder.StoreFolder, *, keep: bool) -> None:
  """Closes a store once all processes that used it are gone.

  Args:
    store: the store, started.
    keep: whether the folder stays, with all that a later run goes on with.
  """
  if keep:
    tidy(store.path)
    store.close()
  else:
    store.remove()


def tidy(folder: str | os.PathLike[str]) -> None:
  """Removes from a store folder what only its past processes needed."""
  for path in pathlib.Path(folder).iterdir():
    if path.is_socket() or path.suffix in _TEMPORARY_SUFFIXES:
      path.unlink()
    elif path.name.startswith(STATE_PREFIX):
      shutil.rmtree(path)


def remove_store(hostmem_dir: str, run_id: str) -> None:
  """Removes the store of processes that are dead or just dying.

  Raises:
    errors.StoreError: they are alive.
  """
  deadline = time.monotonic() + _DYING_SECONDS
  path = store_folder.StoreFolder(hostmem_dir, run_id).path
  while True:
    try:
      return store_folder.remove_store(path)
    except errors.StoreError:
      if time.monotonic() > deadline:
        raise
    time.sleep(0.05)


def folders(hostmem_dir: str, workdir: str) -> list[pathlib.Path]:
  """Lists the existing store folders of a workdir (absolute), by host."""
  first = store_folder.StoreFolder(hostmem_dir, run_id(workdir)).path
  others = (
    (int(name[1]), path)
    for path in first.parent.glob(f'{first.name}-host*')
    if (name := re.fullmatch(r'.*-host(\d+)', path.name))
  )
  found = [first, *(path for _, path in sorted(others))]
  return [path for path in found if path.is_dir()]


@contextlib.contextmanager
def hold(
  paths: Sequence[pathlib.Path], wait_seconds: float = _DYING_SECONDS
) -> Iterator[None]:
  """Keeps other runs out of the stores of a dead one.

  Args:
    paths: paths of the stores.
    wait_seconds: seconds that the run may take to die.

  Raises:
    errors.StoreError: the run is alive.
  """
  deadline = time.monotonic() + wait_seconds
  with contextlib.ExitStack() as stack:
    for path in paths:
      while True:
        try:
          stack.enter_context(store_folder.hold(path))
          break
        except errors.StoreError:
          if time.monotonic() > deadline:
            raise
        time.sleep(0.05)
    yield


def check_hostmem_dir(hostmem_dir: str) -> None:
  """Raises ConfigError unless `hostmem_dir` is an existing directory."""
  if not os.path.isdir(hostmem_dir):
    raise errors.ConfigError('hostmem_dir', hostmem_dir, 'no such directory')


def check_room(hostmem_dir: str, need_bytes: int) -> None:
  """Raises ConfigError, remedy included, if `need_bytes` do not fit."""
  try:
    memory_limits.check_room(need_bytes, memory_limits.read_room(hostmem_dir))
  except errors.StoreError as error:
    raise _error(hostmem_dir, error) from error


def _error(hostmem_dir: str, error: errors.StoreError) -> errors.ConfigError:
  return errors.ConfigError('hostmem_dir', hostmem_dir, str(error))
