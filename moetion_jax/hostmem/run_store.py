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
from moetion_jax.hostmem import memory_limits, segment, store_folder

# Prefix of folders of final states on their way into the checkpoint (see
# `runtime/final_state.py`).
STATE_PREFIX = 'state-stage-'
_TEMPORARY_SUFFIXES = ('.new', '.tmp')
_DYING_SECONDS = 2.0


def host_id(run_id: str, host: int) -> str:
  """Names the store of a run on one of its hosts."""
  return f'{run_id}-host{host}' if host else run_id


def folder_name(run_id: str) -> str:
  """Names what a run has in a directory that it shares with other runs."""
  return store_folder.StoreFolder('', run_id).path.name


def former_id(workdir: str | os.PathLike[str]) -> str:
  """Returns the id of a run whose workdir stores none, from its path.

  Versions before the id was stored named stores like that.

  Args:
    workdir: the path of the workdir as that version was given it, absolute.
  """
  return hashlib.blake2b(os.fsencode(workdir), digest_size=8).hexdigest()


def report_leftovers(hostmem_dir: str, run_id: str, *, anew: bool) -> bool:
  """Prints what dead runs left; removes nothing.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: id of the run.
    anew: whether the run begins without what it left.

  Returns:
    True if this run left something.
  """
  found = False
  for leftover in store_folder.find_leftovers(hostmem_dir):
    is_ours = _is_of(leftover, run_id)
    found = found or is_ours
    of_workdir = f' of {leftover.workdir}' if leftover.workdir else ''
    what = f'start the run{of_workdir} again, or remove the folder.'
    if is_ours:
      what = 'the run goes on with it, if it can begin.'
      if anew:
        what = 'removed as soon as the new run can begin.'
    print(
      f'{leftover.path}: '
      f'{memory_limits.format_bytes(leftover.size_bytes)} left by '
      f'pid {leftover.pid}; {what}',
      flush=True,
    )
  return found


def empty(hostmem_dir: str, run_id: str, hosts: int) -> None:
  """Empties a run's stores, for a run that begins anew in them.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: id of the run.
    hosts: the number of its hosts, whose processes live and hold their stores;
      stores of hosts beyond them are removed.

  Raises:
    errors.ConfigError: something cannot be removed.
  """
  living = paths(hostmem_dir, run_id, hosts)
  try:
    for path in folders(hostmem_dir, run_id):
      if path not in living:
        store_folder.remove_store(path)
    for path in filter(pathlib.Path.is_dir, living):
      store_folder.empty_store(path)
  except errors.StoreError as error:
    raise _error(hostmem_dir, error) from error
  except OSError as error:
    raise errors.ConfigError(
      'hostmem_dir',
      hostmem_dir,
      f'{error.filename}, of the earlier run: {error.strerror}; remove it',
    ) from error


def paths(hostmem_dir: str, run_id: str, hosts: int) -> list[pathlib.Path]:
  """Lists where a run's hosts have their store folders, existing or not.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: id of the run.
    hosts: the number of hosts.
  """
  names = (host_id(run_id, host) for host in range(hosts))
  return [store_folder.StoreFolder(hostmem_dir, name).path for name in names]


def remove_leftovers(hostmem_dir: str, run_id: str) -> None:
  """Removes what this run left on hosts that it no longer has.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: id of the run.
  """
  for leftover in store_folder.find_leftovers(hostmem_dir):
    if _is_of(leftover, run_id):
      with contextlib.suppress(errors.StoreError):  # somebody else was quicker
        store_folder.remove_store(leftover.path)


def _is_of(leftover: store_folder.Leftover, run_id: str) -> bool:
  pattern = rf'{re.escape(run_id)}(-host\d+)?'
  return re.fullmatch(pattern, leftover.run_id) is not None


def newest_generation(folder: str | os.PathLike[str]) -> int:
  """Returns the newest generation that wrote into a store; 0 if none did.

  Raises:
    errors.SystemRefusalError: the system does not let a log be opened.
  """
  newest = 0
  for path in pathlib.Path(folder).glob('*.segment'):
    try:
      newest = max(newest, segment.newest_generation(path))
    except OSError as error:
      errors.check_refusal(error, path)
    except errors.StoreError:
      continue
  return newest


def open_store(
  hostmem_dir: str, run_id: str, workdir: str = ''
) -> store_folder.StoreFolder:
  """Opens and locks the store folder of this name.

  Args:
    hostmem_dir: existing directory in tmpfs.
    run_id: name of the store, see `host_id`.
    workdir: the run's workdir, absolute, for the owner file; '' for none.

  Raises:
    errors.ConfigError: the folder cannot be used.
  """
  try:
    store = store_folder.StoreFolder(hostmem_dir, run_id, workdir)
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
  """Removes from a store folder what only its past processes needed.

  Somebody may have removed the folder.
  """
  for path in pathlib.Path(folder).glob('*'):
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


def folders(hostmem_dir: str, run_id: str) -> list[pathlib.Path]:
  """Lists the existing store folders of a run, by host."""
  first = store_folder.StoreFolder(hostmem_dir, run_id).path
  others = (
    (int(name[1]), path)
    for path in first.parent.glob(f'{first.name}-host*')
    if (name := re.fullmatch(r'.*-host(\d+)', path.name))
  )
  found = [first, *(path for _, path in sorted(others))]
  # Not `is_dir`, which raises where the directory may not be searched.
  return [path for path in found if os.path.isdir(path)]


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
