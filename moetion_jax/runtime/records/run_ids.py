"""Which store is a run's: by the id in its workdir, told from its copies'."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterable

from moetion_jax import errors
from moetion_jax.hostmem import run_store, store_folder
from moetion_jax.runtime.records import changes, held_run


def choose(
  path: str | os.PathLike[str],
  locked_id: str,
  hostmem_dir: str,
  durable_dir: str,
) -> tuple[str, str]:
  """Chooses the id of the run in a workdir: the stored one, or a new one.

  A copy of another workdir gets an id of its own: the store stays with the
  other one, which may live.

  Args:
    path: the workdir, locked and checked.
    locked_id: the id in its lock file; '' for none.
    hostmem_dir: the directory of the stores.
    durable_dir: the directory of snapshots on disk; '' for none.

  Returns:
    The id, and what to tell the user, if anything.
  """
  run_id = held_run.read_id(path)
  if not run_id:
    run_id = _former(path, hostmem_dir, durable_dir)
    run_id = run_id or locked_id or held_run.new_id()
  original = original_of(path, run_id, hostmem_dir)
  if not original:
    return run_id, ''
  return held_run.new_id(), (
    f'{path} is a copy of {original}, whose store is left alone: iterations of '
    'which this folder has no snapshots are done again, and compared with the '
    'lines it has.'
  )


def choose_new(
  path: str | os.PathLike[str],
  locked_id: str,
  hostmem_dir: str,
  durable_dir: str,
) -> tuple[str, str]:
  """Chooses the id of a run that begins anew where another one was.

  It is not the other one's: what that left, wherever, is never gone on with.

  Args:
    path: the workdir, locked and checked.
    locked_id: the id in its lock file; '' for none.
    hostmem_dir: the directory of the stores.
    durable_dir: the directory of snapshots on disk; '' for none.

  Returns:
    The id, and that of the run whose stores go; '' if there are none, or they
    may be those of another folder, of which this one is a copy.
  """
  config = held_run.read_config(path)
  if config is None:
    return locked_id or held_run.new_id(), ''
  earlier = held_run.read_id(path) or _former(path, hostmem_dir, durable_dir)
  run_id = locked_id if locked_id != earlier else ''
  is_another = any(
    recorded and not _is_same(path, recorded)
    for recorded in _recorded(path, earlier, hostmem_dir)
  )
  return run_id or held_run.new_id(), '' if is_another else earlier


def check_place(
  path: str | os.PathLike[str], run_id: str, hostmem_dir: str
) -> str:
  """Checks that the run's stores are looked for where they are.

  Args:
    path: the workdir, checked.
    run_id: the run's id.
    hostmem_dir: the directory of the stores, its real path.

  Returns:
    What to tell the user, if anything.

  Raises:
    errors.ConfigError: a store there is of before the run went on with other
      software elsewhere, and may not be gone on with.
  """
  config = held_run.read_config(path) or {}
  recorded = config.get(held_run.HOSTMEM_DIR) or hostmem_dir
  if recorded == hostmem_dir:
    return ''
  stale = run_store.folders(hostmem_dir, run_id)
  if stale and config.get(changes.CHANGES):
    raise errors.ConfigError(
      'hostmem_dir',
      hostmem_dir,
      f'{stale[0]} is of before this run went on with other software, in '
      f'{recorded}; pass --hostmem_dir={recorded}, or remove that folder',
    )
  if not os.path.isdir(recorded) or not run_store.folders(recorded, run_id):
    return ''
  return (
    f"The run's snapshots are in {recorded}: with --hostmem_dir={recorded} it "
    'goes on from them.'
  )


def find(path: str | os.PathLike[str], hostmem_dir: str) -> str:
  """Finds the id of the run in a folder that is not locked; changes nothing.

  Returns:
    The id; if none is stored and nothing lies under a former one, that one.
  """
  found = held_run.read_id(path) or _former(path, hostmem_dir, '')
  return found or run_store.former_id(os.path.abspath(path))


def original_of(
  path: str | os.PathLike[str], run_id: str, hostmem_dir: str
) -> str:
  """Returns the folder of which another one is a copy; '' if it is none.

  A folder that was moved is no copy: where it was is nothing now, or another
  run.

  Args:
    path: the folder that may be a copy.
    run_id: the id that it has.
    hostmem_dir: the directory of the stores.
  """
  for recorded in _recorded(path, run_id, hostmem_dir):
    if _is_other(path, recorded) and held_run.read_id(recorded) == run_id:
      return recorded
  return ''


def _recorded(
  path: str | os.PathLike[str], run_id: str, hostmem_dir: str
) -> Iterable[str]:
  """Yields the paths that the run's workdir had when the run last began."""
  for store in run_store.folders(hostmem_dir, run_id):
    yield str(store_folder.read_owner(store).get('workdir') or '')
  try:
    config = held_run.read_config(path)
  except (OSError, held_run.NotOursError):
    return
  yield str((config or {}).get(held_run.WORKDIR) or '')


def _is_same(path: str | os.PathLike[str], recorded: str) -> bool:
  try:
    return os.path.samefile(path, recorded)
  except OSError:  # it is not there any more
    return False


def _is_other(path: str | os.PathLike[str], recorded: str) -> bool:
  try:
    return os.path.isabs(recorded) and not os.path.samefile(path, recorded)
  except OSError:  # it is not there any more
    return False


def _former(
  path: str | os.PathLike[str], hostmem_dir: str, durable_dir: str
) -> str:
  """Finds what a version left that named stores after the workdir's path.

  Returns:
    The id under which something lies; '' if nothing does.
  """
  try:
    if held_run.read_config(path) is None:
      return ''
  except (OSError, held_run.NotOursError):
    return ''
  for spelling in (os.path.abspath(path), os.path.realpath(path)):
    run_id = run_store.former_id(spelling)
    on_disk = pathlib.Path(durable_dir, run_store.folder_name(run_id))
    if run_store.folders(hostmem_dir, run_id) or (
      durable_dir and on_disk.is_dir()
    ):
      return run_id
  return ''
