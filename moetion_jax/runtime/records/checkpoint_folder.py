"""The folder of a checkpoint: whether it is whole, and how it is replaced.

Others may put files into it, which no save takes away.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator
from typing import Any

from moetion_jax import disk, errors, job_spec
from moetion_jax.runtime.records import files as record_files, own_files
from moetion_jax.snapshots import file as snapshot_file

# What a sync answers that loses what was written.
_OF_DISK = (errno.EIO, errno.ENOSPC, errno.EDQUOT)
# In the custom metadata: the settings of the run, all that there was at first.
CONFIG = 'moetion_config'
# Beside them: the digests, and what they are of (`proof`).
DIGESTS = 'moetion_digests'


def is_committed(path: str | os.PathLike[str]) -> bool:
  """Returns whether Orbax committed a checkpoint in a folder.

  Args:
    path: the folder, which need not exist.
  """
  folder = pathlib.Path(path)
  if (folder / snapshot_file.COMMIT_MARKER_NAME).is_file():
    return True
  # Versions before that file, and copies without it.
  return bool(_metadata(folder).get('commit_timestamp_nsecs'))


def stated(path: str | os.PathLike[str]) -> tuple[int, str] | None:
  """Reads the iteration and the state's digest that a checkpoint says it has.

  Args:
    path: the checkpoint's folder.

  Returns:
    Both; None if it says neither: it is damaged, or of an earlier version.
  """
  metadata = _metadata(pathlib.Path(path)).get('custom_metadata')
  try:
    digests = metadata[DIGESTS]  # pyright: ignore[reportOptionalSubscript]
    return digests['iteration'], digests['state']
  except (KeyError, TypeError):
    return None


def digest_of(path: str | os.PathLike[str]) -> str:
  """Reads the digest of a checkpoint's state; '' if it does not say one."""
  found = stated(path) if path else None
  return found[1] if found else ''


def doubt(workdir: str | os.PathLike[str], iterations: int) -> str:
  """Says why the checkpoint in a workdir is not the end of the run there.

  Somebody may have copied or converted another one to its place.

  Args:
    workdir: the workdir, which has a committed checkpoint.
    iterations: the number of the run's iterations.

  Returns:
    The end of a sentence; '' if it is, as far as it says what it is.
  """
  lines = record_files.read_lines(pathlib.Path(workdir, own_files.METRICS))
  newest = max(lines, default=0)
  if newest != iterations:
    return (
      f'{own_files.METRICS} ends with iteration {newest} of {iterations}, and '
      'a run is finished only after its last one'
    )
  known = newest, lines[newest].get('digest')
  folder = pathlib.Path(workdir, own_files.CHECKPOINT_NAME)
  found = stated(folder)
  if found is None and known[1] and not _is_unproven(folder):
    return (
      f'its {snapshot_file.ORBAX_METADATA_NAME} is missing or damaged, and '
      f'nothing else says that its digest is {known[1]}, with which '
      f'{own_files.METRICS} ends'
    )
  if found in (None, known):
    return ''
  return (
    f'it is of iteration {found[0]} with digest {found[1]}, and '
    f'{own_files.METRICS} ends with iteration {newest} and digest {known[1]}'
  )


def _is_unproven(folder: pathlib.Path) -> bool:
  """Tells whether a checkpoint was saved before there were digests in it."""
  metadata = _metadata(folder).get('custom_metadata')
  return isinstance(metadata, dict) and metadata.keys() == {CONFIG}


def base(
  workdir: str | os.PathLike[str], iterations: int
) -> job_spec.Base | None:
  """Finds the checkpoint of a run that is trained longer.

  It is of the iteration that was the last one before, which its digest proves.

  Args:
    workdir: the workdir.
    iterations: the number of the run's iterations.

  Returns:
    The checkpoint, from which the run goes on; None if there is none.
  """
  path = pathlib.Path(workdir, own_files.CHECKPOINT_NAME)
  found = stated(path) if is_committed(path) else None
  if found is None or found[0] >= iterations:
    return None
  lines = record_files.read_lines(pathlib.Path(workdir, own_files.METRICS))
  if lines.get(found[0], {}).get('digest') != found[1]:
    return None
  return job_spec.Base(path=str(path), iteration=found[0], digest=found[1])


def _metadata(folder: pathlib.Path) -> dict[str, Any]:
  """Reads what Orbax keeps about a checkpoint; {} if that cannot be read."""
  try:
    value = read_metadata(folder)
  except (OSError, ValueError):
    return {}
  return value if isinstance(value, dict) else {}


def read_metadata(path: str | os.PathLike[str]) -> Any:
  """Reads what Orbax keeps about a checkpoint: not by Orbax, which logs errors.

  Raises:
    OSError: it cannot be read.
    ValueError: it is damaged.
  """
  data = pathlib.Path(path, snapshot_file.ORBAX_METADATA_NAME).read_bytes()
  try:
    return json.loads(data)
  except RecursionError as error:
    raise ValueError(str(error)) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[str]:
  """Gives a place to write a checkpoint to, then moves it to where it belongs.

  The place lies beside the path. When the body has ended, all of it is synced
  to disk. Then it changes places with the checkpoint that was at the path,
  which is removed by name: at each moment one of them is there. If others put
  files into that, or the file system cannot exchange names, it is removed
  first, and the new one is moved in beside files of others, what commits it
  last. Once this ends, not even a loss of power takes the new one away.

  Args:
    path: the folder of the checkpoint.

  Yields:
    The path to write to, at which nothing is.

  Raises:
    errors.StoreError: the folder cannot be replaced.
  """
  folder = pathlib.Path(os.path.abspath(path))
  try:
    place = _prepare(folder)
  except OSError as error:
    raise _error(folder, error) from error
  try:
    yield str(place)
  except Exception:
    with contextlib.suppress(OSError):
      clear(place)
    raise
  try:
    disk.sync_tree(place)
    disk.sync_folder(folder.parent)  # its name, before the old one goes
  except OSError as error:
    raise _sync_error(folder, error) from error
  try:
    if not _exchange(place, folder):
      _clear(folder, re.escape(folder.name))
      if folder.is_dir():
        _move_into(place, folder)
      else:
        place.rename(folder)
  except OSError as error:
    raise _error(folder, error) from error
  try:
    disk.sync_folder(folder.parent)
  except OSError as error:
    raise _sync_error(folder, error) from error
  try:
    clear_rest(folder)
  except OSError as error:
    raise _error(folder, error) from error


def _exchange(place: pathlib.Path, folder: pathlib.Path) -> bool:
  """Exchanges a new checkpoint with an old one alone in its folder, if can be.

  Returns:
    Whether that was done.
  """
  if not is_committed(folder):
    return False
  if own_files.find(folder, own_files.CHECKPOINT).others:
    return False
  return disk.exchange(place, folder)


def clear_rest(path: str | os.PathLike[str]) -> None:
  """Removes what saves that were killed left beside a checkpoint, by name.

  Args:
    path: the checkpoint's folder.

  Raises:
    OSError: something cannot be removed.
  """
  folder = pathlib.Path(path)
  aside = re.escape(own_files.ASIDE_SUFFIX)
  orbax = re.escape(own_files.ORBAX_SUFFIX)
  name = re.escape(folder.name)
  _clear(folder, rf'{name}({aside}(-\d+)?({orbax}.*)?|{orbax}.*)')


def bring_to_disk(place: str) -> None:
  """Brings a checkpoint to disk; what is read of it then is what that has.

  Args:
    place: the place that `replacing` gave.

  Raises:
    errors.StoreError: it cannot be.
  """
  try:
    disk.sync_tree(place)
    disk.forget_tree(place)
  except OSError as error:
    raise _sync_error(pathlib.Path(place), error) from error


def clear(path: str | os.PathLike[str]) -> None:
  """Removes a checkpoint, and what a killed Orbax left of it, by name.

  Args:
    path: the checkpoint's folder.

  Raises:
    OSError: something cannot be removed.
  """
  folder = pathlib.Path(path)
  orbax = re.escape(own_files.ORBAX_SUFFIX)
  _clear(folder, rf'{re.escape(folder.name)}({orbax}.*)?')


def _clear(folder: pathlib.Path, name: str) -> None:
  """Removes the checkpoints beside a folder that have names of a pattern."""
  if folder.parent.is_dir():
    own_files.remove(
      own_files.find(folder.parent, {name: own_files.CHECKPOINT})
    )


def _prepare(folder: pathlib.Path) -> pathlib.Path:
  """Removes what earlier saves left; returns a path at which nothing is."""
  if folder.is_symlink():
    raise OSError(0, 'is a symbolic link, and no folder', str(folder))
  clear_rest(folder)
  for number in itertools.count(1):
    suffix = own_files.ASIDE_SUFFIX + (f'-{number}' if number > 1 else '')
    place = folder.with_name(folder.name + suffix)
    # Orbax removes whatever has the name of its temporary folder.
    written = place.with_name(place.name + own_files.ORBAX_SUFFIX)
    if not os.path.lexists(place) and not os.path.lexists(written):
      return place
  raise AssertionError


def _move_into(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves all that is in a folder into another one, what commits it last.

  Each file that commits is moved when all before it is on disk, and is on disk
  itself when this returns.
  """
  target.mkdir(exist_ok=True)
  marker, commits = snapshot_file.COMMIT_MARKER_NAME, snapshot_file.COMMIT_NAMES
  for name in sorted(
    os.listdir(source), key=lambda n: (n in commits, n == marker, n)
  ):
    inner = source / name
    if name in commits:
      disk.sync_folder(target)
    if inner.is_dir() and (target / name).is_dir():
      _move_into(inner, target / name)
    else:
      inner.replace(target / name)
  disk.sync_folder(target)
  source.rmdir()


def _error(folder: pathlib.Path, error: OSError) -> errors.StoreError:
  return errors.StoreError(
    f'{error.filename or folder}: {error.strerror}; move it away, then start '
    'again: a checkpoint is to be written there'
  )


def _sync_error(folder: pathlib.Path, error: OSError) -> errors.StoreError:
  if error.errno not in _OF_DISK:
    return errors.StoreError(
      f'{error.filename or folder}: {error.strerror}; make that possible, then '
      'start again: a checkpoint is to be written there'
    )
  return errors.StoreError(
    f'{error.filename or folder}: {error.strerror}: {disk.device_of(folder)} '
    'does not keep what is written; have that disk looked at, or move the '
    'workdir to another one, then start again: a checkpoint is to be written '
    'there'
  )
